"""`python -m tram_ds` is `tram`, also under launchers that start modules: torchrun, deepspeed,
srun."""

from __future__ import annotations

from tram_ds.cli.main import tram

tram()
