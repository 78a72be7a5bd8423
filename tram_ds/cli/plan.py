"""What a recipe needs on N GPUs, before it queues: memory by part, bytes and FLOPs per step, hours;
fits, or what to change.

    tram plan --recipe m2d2_gpt2xl.yaml --gpus 2,4 --gpu-memory 80
    tram plan --recipe llama7b_fsdp2.yaml --gpus 64 --gpu h100 \\
        train.global_batch=256 algorithm=tram_x
    tram plan --recipe llama7b_fsdp2.yaml --gpus 64 --trace train.global_batch=256

Needs neither GPUs nor weights. Exit codes: 0 it fits, 1 it does not, 2 a wrong recipe or argument,
or --trace of what cannot be traced (ZeRO, DDP, offloading): the message says what can.
"""

from __future__ import annotations

import argparse

from tram_ds.cli import shared
from tram_ds.runtime import terminal


def options(parser: argparse.ArgumentParser) -> None:
    """Its command line."""
    shared.recipe(parser)
    parser.add_argument("--gpus", required=True, metavar="N[,M]", help="numbers of GPUs, 1 to 4096")
    parser.add_argument("--gpu", default="a100", help="whose arithmetic: a100, h100 or h200")
    parser.add_argument(
        "--gpu-memory", type=float, help="GB of one GPU; default: as that GPU is sold"
    )
    parser.add_argument(
        "--mfu", type=float, default=0.45, help="share of the GPUs' peak that becomes model FLOPs"
    )
    parser.add_argument(
        "--trace",
        action="store_true",
        help="run the step itself, as one rank without memory: minutes for a large model",
    )
    shared.overrides(parser)


def run(options: argparse.Namespace) -> int:
    """The exit code."""
    from tram_ds.recipe.loading import load

    recipe = load(options.recipe, options.overrides)
    from tram_ds.planning import report  # torch is imported only for a recipe that can be read

    assumed = report.assumptions(options.gpu, options.gpu_memory, options.mfu, recipe.model.dtype)
    counts = report.gpu_counts(options.gpus)
    if options.trace:
        from tram_ds.bench.trace import refuse

        for world in counts:
            refuse(recipe, world)  # before minutes are spent on the others
    fits = True
    for world in counts:
        fits &= report.show(recipe, world, assumed)
        if options.trace:
            from tram_ds.bench import trace_report

            trace_report.show(recipe, world)
    return terminal.reported(0 if fits else 1)
