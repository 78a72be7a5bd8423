"""A run's export as a folder to hand on, with its model card, and on the Hugging Face hub.

    tram export runs/m2d2_s2orc_gpt2-tram_prev-0 --out gpt2-tram --dtype bfloat16
    tram export runs/llama_lora-tram_prev-0 --out llama-tram --merge --push ME/llama-tram
    tram export runs/llama_lora-tram_prev-0 --out adapters --push ME/adapters --dry-run

Of a run of adapters FOLDER has the adapters in peft's format; with --merge the whole model, with
the adapters in its weights. A repository that is not there is made, private.

Exit codes: 0 done, 2 the run, FOLDER or the hub.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def options(parser: argparse.ArgumentParser) -> None:
    """Its command line."""
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder of a run that has ended")
    parser.add_argument(
        "--out", metavar="FOLDER", type=Path, required=True, help="a new or empty folder"
    )
    parser.add_argument(
        "--merge",
        action="store_true",
        help="of adapters: the model with them in its weights",
    )
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="of the weights; default: as exported"
    )
    parser.add_argument(
        "--push", metavar="REPO", help="upload FOLDER to this repository of the hub, OWNER/NAME"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be written and uploaded, do neither"
    )


def run(options: argparse.Namespace) -> int:
    """Writes FOLDER, uploads it where asked to; returns the exit code."""
    from tram_ds.evaluation import hub_upload, run_export

    wanted = run_export.wanted(options.run, options.out, options.merge, options.dtype)
    if options.push:
        hub_upload.check(options.push, online=not options.dry_run)
    target = f"{options.out}, uploaded to {options.push}" if options.push else f"{options.out}"
    if options.dry_run:
        print("\n".join([f"would be written to {target}:", *run_export.listed(wanted)]))
        return 0
    run_export.write(wanted)
    print("\n".join([f"written to {options.out}:", *run_export.found(options.out)]))
    if options.push:
        print(f"uploaded: {hub_upload.upload(options.out, options.push, options.run.name)}")
    return 0
