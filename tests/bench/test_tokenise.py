"""Tokenising: how fast, and that the memory it takes does not grow with the text (M2D2's largest
domain has 1.4 B tokens)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHILD = """
import json, resource, sys, tarfile, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tram_ds.data.bpe import train_tokenizer
from tram_ds.data.choose import open_source
from tram_ds.data.tokenize import tokenize

folder, megabytes = Path(sys.argv[2]), int(sys.argv[3])
stems, ends = ("tra", "mol", "quant", "field", "sharp"), ("", "s", "ing", "ed", "ness")
words = [stem + end for stem in stems for end in ends]
line = " ".join(words[(7 * i + i * i) % len(words)] for i in range(120))
tokenizer = train_tokenizer([line] * 50, 400)
(folder / "Art").mkdir(parents=True)
with (folder / "Art" / "train.txt").open("w") as file:
    for i in range(megabytes * 1_000_000 // (len(line) + 9)):
        file.write(f"{i:08d} {line}\\n")
if sys.argv[4] == "archive":
    with tarfile.open(folder / "Art.tar.gz", "w:gz", compresslevel=1) as tar:
        tar.add(folder / "Art" / "train.txt", "Art/train.txt")
    (folder / "Art" / "train.txt").unlink()
    (folder / "Art").rmdir()
source = open_source(str(folder), folder / "cache")
source.digest("Art", "train")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.monotonic()
tokens = tokenize(source, "Art", "train", tokenizer, folder / "cache")
seconds = time.monotonic() - start
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = {"mb_per_s": megabytes / seconds, "tokens": len(tokens)}
print(json.dumps(found | {"before_mb": before / 1024, "peak_mb": after / 1024}))
"""


@pytest.mark.bench
@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_memory_does_not_grow_with_the_text(tmp_path, kind):
    peaks = {}
    for megabytes in (8, 64):
        command = [
            sys.executable,
            "-c",
            CHILD,
            str(ROOT),
            str(tmp_path / str(megabytes)),
            str(megabytes),
            kind,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=900)
        found = json.loads(done.stdout.splitlines()[-1])
        peaks[megabytes] = found["peak_mb"]
        print(
            f"{kind} of {megabytes} MB: {found['mb_per_s']:.1f} MB/s, {found['tokens']} tokens, "
            f"peak {found['peak_mb']:.0f} MB"
        )
    assert peaks[64] < peaks[8] + 40, "64 MB of text take hardly more memory than 8 MB"
