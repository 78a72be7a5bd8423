"""What a step costs: measured on every engine, ours and its peers, by launch/benchmark.py; traced
as one rank of any number, without its memory, by launch/plan.py --trace.

Imports training, comparison and below.
"""
