"""theta, its gradient and its move, on every sharding: one protocol, three engines, their shards.

Imports runtime.
"""
