"""What a shell is offered at a half-written word."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import environment


def offered(line: str, tmp_path: Path) -> list[str]:
    """As the function that register-python-argcomplete defines asks for it."""
    answer = tmp_path / "answer"
    asked = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "_ARGCOMPLETE_SUPPRESS_SPACE": "1",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "COMP_TYPE": "9",
    }
    code = "import sys; from tram_ds.cli import main; sys.exit(main.main([]))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(**asked), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and done.stdout == "", done.stderr
    return answer.read_text().split("\n") if answer.exists() else []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("tram tr", {"train"}),
        ("tram s", {"sweep", "submit", "sync"}),
        ("tram train --re", {"--recipe", "--resume"}),
        ("tram train --recipe m2d2_g", {"m2d2_gpt2xl.yaml"}),
        ("tram evaluate --recipe mi", {"mine.yaml"}),
        ("tram train --recipe quickstart.yaml algorithm.radius_", {"scale", "min", "max"}),
        ("tram train --recipe quickstart.yaml run_d", {"run_dir="}),
        ("tram nothing", set()),
    ],
)
def test_a_half_written_word(line: str, expected: set[str], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("{}")
    if "radius_" in line:
        expected = {f"algorithm.radius_{end}=" for end in expected}
    assert {word for word in offered(line, tmp_path) if word} == expected
