"""Ours and its peers on the same model, data and seed, in turns: time, FLOPs, bytes sent, memory,
as ratios with their spread.

    tram benchmark                  # every engine, minutes on 2 CPU cores
    tram benchmark --engines fsdp2,zero2 --dtype bfloat16 --size 18M --rounds 15 \\
        --json results.json
    tram benchmark --markdown docs/benchmark.md

Exit codes: 0 measured, 1 a job failed, 2 a wrong argument.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path


def options(parser: argparse.ArgumentParser) -> None:
    """Its command line."""
    parser.add_argument("--engines", help="with commas; default: all")
    parser.add_argument("--rows", help="algorithms, with commas; default: all measured ones")
    parser.add_argument(
        "--size",
        default="small",
        help="of the model: small, 18M, vocabulary, ...; a wrong one names all",
    )
    parser.add_argument("--batch", type=int, default=4, help="sequences of one rank's micro-batch")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a sequence")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="of the working copy"
    )
    parser.add_argument(
        "--logits", default="chunks", choices=("chunks", "whole"), help="how ours take them"
    )
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each contender")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")


def run(options: argparse.Namespace) -> int:
    """The exit code."""
    from rich.console import Console

    # torch is imported only when something is to be measured
    from tram_ds.bench import contenders, run

    engines = options.engines.split(",") if options.engines else list(contenders.ENGINES)
    rows = options.rows.split(",") if options.rows else list(contenders.OURS)
    work = contenders.Work(
        options.size, options.batch, options.tokens, options.dtype, options.logits, options.seed
    )
    try:
        measured = run.run(work, engines, rows, options.rounds)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for text in dict.fromkeys(line for found in measured["engines"] for line in found["missing"]):
        print(text)
    Console(width=150).print(run.table(measured))
    if options.json:
        options.json.write_text(json.dumps(measured, indent=1))
    if options.markdown:
        options.markdown.write_text(run.markdown(measured, shlex.join(options.command)))
    return 0
