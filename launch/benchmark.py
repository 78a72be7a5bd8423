"""Ours and its peers on the same model, data and seed, in turns: time, FLOPs, bytes sent, memory,
as ratios with their spread.

    python launch/benchmark.py                  # every engine, minutes on 2 CPU cores
    python launch/benchmark.py --engines fsdp2,zero2 --dtype bfloat16 --size 18M --rounds 15 \\
        --json results.json
    python launch/benchmark.py --markdown docs/benchmark.md

Exit codes: 0 measured, 1 a job failed, 2 a wrong argument.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tram_ds.runtime import terminal


def main(arguments: list[str] | None = None) -> int:
    """The exit code."""
    terminal.guard()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    options = parser.parse_args(arguments)
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
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    for text in dict.fromkeys(line for found in measured["engines"] for line in found["missing"]):
        print(text)
    Console(width=150).print(run.table(measured))
    if options.json:
        options.json.write_text(json.dumps(measured, indent=1))
    if options.markdown:
        command = shlex.join(
            ["python", "launch/benchmark.py", *(sys.argv[1:] if arguments is None else arguments)]
        )
        options.markdown.write_text(run.markdown(measured, command))
    return 0


if __name__ == "__main__":
    sys.exit(main())
