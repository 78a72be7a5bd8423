"""metrics.jsonl, samples of the machine, and their copy in MLflow.

Imports recipe and below.
"""
