"""Language modeling, entailment and image classification: model, rows and forward.

Imports runtime, data and models; knows no engine and no algorithm.
"""
