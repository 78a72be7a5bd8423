"""One process of a job: its ranks and peers, signals, the run folder and its lock, files written
whole, exit codes, secrets.

Imports no other package.
"""
