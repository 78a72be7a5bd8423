"""How a model is called and loaded: its output, logits whole or in chunks, masks, noise, Hugging
Face.

Imports runtime, engines and data.
"""
