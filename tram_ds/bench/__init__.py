"""What a step costs: measured on every engine, ours and its peers, by launch/benchmark.py.

Imports training, comparison and below.
"""
