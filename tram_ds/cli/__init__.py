"""The command line: one module a command, started as `tram NAME`, `python -m tram_ds NAME` or
launch/NAME.py.

A module's docstring is its help; `options` adds what it understands to a parser, and `run` does it
and gives the exit code. At the top each imports next to nothing: `tram --help` answers at once.
"""
