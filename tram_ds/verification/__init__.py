"""What only a machine with GPUs can show: measured step by step in jobs of their own, judged by ten
laws, and written as one page, by launch/verify_gpu.py.

Imports bench, training and below. The float64 oracle is the tests', so parity needs a checkout.
"""
