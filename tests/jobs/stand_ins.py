"""Stand-ins for SLURM's commands and for container runtimes: a job script runs for real, on this
machine, and what it called is written down."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

TOOLS = {
    # no requeue: after one that is accepted a script waits for SLURM to end it
    "scontrol": '[ "$1" = show ] && echo node1',
    "squeue": """case "$*" in *--steps*) cat "$LOGS/steps" 2>/dev/null;; *) echo RUNNING;; esac""",
    # for python3 below, which saves when its step is told to stop, as training does
    "scancel": """echo "$*" >> "$LOGS/scancel"
touch "$LOGS/told.${@: -1}"; true""",
    "sbatch": "echo 7",
    # runs the command as the only task of a step
    "srun": """n=$(cat "$LOGS/count" 2>/dev/null || echo 0); echo $((n + 1)) > "$LOGS/count"
printf '%s\\n' "$@" > "$LOGS/srun.$n"; name=step
while [[ $1 == --* ]]; do
    case $1 in
        --job-name=*) name=${1#*=} ;;
        --container-image=*) export INSIDE="pyxis ${1#*=}" ;;
        --container-workdir=*) cd "${1#*=}" || exit 9 ;;
    esac
    shift
done
[ "$name" = tram_ds ] || name=${1##*/}
echo "7.$n $name" >> "$LOGS/steps"; export STEP=7.$n
exec "$@"
""",
    "apptainer": """printf '%s\\n' "$@" > "$LOGS/apptainer"
[ "$1" = exec ] || exit 9
shift
while [[ $1 == --* ]]; do shift; done
export INSIDE="apptainer $1"; shift
exec "$@"
""",
    # the ranks' Python: says where it runs, and finishes the run, or saves it when it is asked to
    "python3": """printf '%s\\n' "$INSIDE" "$PWD" "$@" > "$LOGS/python"
for last; do case $last in *.yaml) cell=${last%.yaml};; esac; done
run=$(cat "$cell.folder"); mkdir -p "$run"
[ -z "$SLOW" ] && { touch "$run/DONE"; exit 0; }
for _ in $(seq 100); do
    [ -e "$LOGS/told.$STEP" ] && { touch "$run/REQUEUE"; exit 75; }
    sleep 0.1
done
exit 9
""",
}


def install(folder: Path, **more: str) -> dict[str, str]:
    """Writes the stand-ins into `folder`; the environment of a job that calls them."""
    (folder / "bin").mkdir(parents=True)
    (folder / "logs").mkdir()
    for name, body in {**TOOLS, **more}.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / "bin" / name).chmod(0o755)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "PYTHON"))}
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "SLURM_JOB_USER": "me"}
    paths = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "LOGS": str(folder / "logs")}
    return {**kept, **job, **paths}


def run(script: Path, env: dict[str, str], stop_when: Path | None = None) -> tuple[int, str]:
    """(status, output) of a job script. Once `stop_when` is there it gets SLURM's signal."""
    log = script.with_suffix(".out")
    with log.open("w") as out:
        job = subprocess.Popen(
            ["bash", script.name], cwd=script.parent, env=env, stdout=out, stderr=out
        )
        try:
            end = time.monotonic() + 30
            while stop_when and not stop_when.exists() and time.monotonic() < end:
                time.sleep(0.05)
            if stop_when:
                job.send_signal(signal.SIGUSR2)
            return job.wait(timeout=60), log.read_text()
        finally:
            job.kill()
