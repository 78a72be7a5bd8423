"""The main job in one command: pre-train a tiny GPT-2 on all domains but one, fine-tune it there with TRAM on 2 ranks.

python launch/quickstart.py [section.key=value ...]      # overrides of the fine-tuning recipe
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PRETRAINED = Path("runs/quickstart-pretrained")


def launch(recipe: str, *overrides: str) -> None:
    """One training run on 2 ranks under the deepspeed launcher."""
    launcher = Path(sys.executable).with_name("deepspeed")
    script = ROOT / "launch" / "train.py"
    command = [str(launcher), "--num_accelerators", "2", str(script), "--recipe", recipe, "--overwrite", *overrides]
    print("$", " ".join(command), flush=True)
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def main() -> int:
    """The exit code of the first run that fails, or 0."""
    overrides = sys.argv[1:]
    source = [text for text in overrides if text.startswith("task.data=")]
    held_out = [text.partition("=")[2] for text in overrides if text.startswith("task.train=")]
    first = [*source, *(f"task.exclude=[{domain}]" for domain in held_out)]
    try:
        launch("quickstart_pretrain.yaml", *first)
        shutil.rmtree(PRETRAINED, ignore_errors=True)
        shutil.copytree("runs/quickstart_pretrain-base-0/export", PRETRAINED)
        launch("quickstart.yaml", *overrides)
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
