"""Wires a recipe to a run: the loop, throughput, progress.

Imports evaluation, jobs and below.
"""
