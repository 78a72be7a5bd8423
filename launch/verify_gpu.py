"""`tram verify_gpu` of this checkout: `python launch/verify_gpu.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tram_ds.cli.main import script

if __name__ == "__main__":
    script("verify_gpu")
