"""Before and around a run: doctor, sweep, SLURM.

Imports checkpoint, tracking, planning and below.
"""
