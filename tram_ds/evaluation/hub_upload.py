"""A folder as a repository of the Hugging Face hub. What can be refused is refused before anything
is merged or written."""

from __future__ import annotations

import os
from pathlib import Path

from tram_ds.runtime.hub import HUB, answers
from tram_ds.runtime.wording import first_line


def check(repo: str, online: bool = True) -> None:
    """ValueError for a name that no repository has; online: also without a token or a network."""
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"--push {repo}: {first_line(error)}: give OWNER/NAME") from error
    if not online:
        return
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        raise ValueError(
            f"--push {repo}: HF_HUB_OFFLINE is set: unset it, or leave --push out and upload "
            "FOLDER from where there is a network, with `hf upload REPO FOLDER`"
        )
    if get_token() is None:
        raise ValueError(
            f"--push {repo}: no token of the hub: `hf auth login`, or HF_TOKEN in the environment"
        )
    address = os.environ.get("HF_ENDPOINT") or HUB
    if not answers(address):
        raise ValueError(
            f"--push {repo}: the hub ({address}) does not answer: leave --push out and upload "
            "FOLDER from where there is a network, with `hf upload REPO FOLDER`"
        )


def upload(folder: Path, repo: str, run: str) -> str:
    """All of `folder` in one commit; the repository is made, private, where there is none. Returns
    its address. ValueError, with what to do, where the hub refuses; the folder stays."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # of whichever client it uses

    api = HfApi()
    try:
        made = api.create_repo(repo, private=True, exist_ok=True)
        message = f"{run}, exported by tram_ds"
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message=message)
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"--push {repo}: {first_line(error)}; {folder} is whole: try again with "
            f"`hf upload {repo} {folder}`"
        ) from error
    return str(made)
