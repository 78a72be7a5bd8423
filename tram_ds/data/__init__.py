"""Text, pairs and images on disk: sources, cache, tokens, order.

Imports runtime.
"""
