"""Memory, traffic and hours of a run at any number of GPUs, from its recipe alone, before a GPU is
asked for.

Imports recipe and below.
"""
