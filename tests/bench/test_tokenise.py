"""Tokenising: how fast, and that the memory it takes does not grow with the text (M2D2's largest
domain has 1.4 B tokens)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL, LARGE = 4, 24  # megabytes
GROWTH = 14  # of the 20 that a text, or its ids in 8 bytes each, would add at the least
CHILD = """
import json, resource, sys, tarfile, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tram_ds.data.bpe import train_tokenizer
from tram_ds.data.choose import open_source
from tram_ds.data.tokenize import tokenize

stems, ends = ("tra", "mol", "quant", "field", "sharp"), ("", "s", "ing", "ed", "ness")
words = [stem + end for stem in stems for end in ends]
line = " ".join(words[(7 * i + i * i) % len(words)] for i in range(120))
tokenizer = train_tokenizer([line] * 50, 400)
for megabytes in map(int, sys.argv[4:]):
    folder = Path(sys.argv[2]) / str(megabytes)
    (folder / "Art").mkdir(parents=True)
    with (folder / "Art" / "train.txt").open("w") as file:
        for i in range(megabytes * 1_000_000 // (len(line) + 9)):
            file.write(f"{i:08d} {line}\\n")
    if sys.argv[3] == "archive":
        with tarfile.open(folder / "Art.tar.gz", "w:gz", compresslevel=1) as tar:
            tar.add(folder / "Art" / "train.txt", "Art/train.txt")
        (folder / "Art" / "train.txt").unlink()
        (folder / "Art").rmdir()
    source = open_source(str(folder), folder / "cache")
    source.digest("Art", "train")
    start = time.monotonic()
    tokens = tokenize(source, "Art", "train", tokenizer, folder / "cache")
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps([megabytes, megabytes / seconds, len(tokens), peak]))
"""


@pytest.mark.bench
@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_memory_does_not_grow_with_the_text(tmp_path, kind):
    """One process tokenises the small text, then the large one: its peak is hardly higher."""
    command = [sys.executable, "-c", CHILD, str(ROOT), str(tmp_path), kind, str(SMALL), str(LARGE)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=900)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    for megabytes, speed, tokens, peak in rows:
        print(f"{kind} of {megabytes} MB: {speed:.1f} MB/s, {tokens} tokens, peak {peak:.0f} MB")
    (small, *_, before), (large, *_, after) = rows
    assert (small, large) == (SMALL, LARGE)
    assert after < before + GROWTH, "24 MB of text take hardly more memory than 4 MB"
