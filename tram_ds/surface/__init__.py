"""Sharpness, loss landscape, Hessian and CKA of a model.

Imports training, comparison and below.
"""
