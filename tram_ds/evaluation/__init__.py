"""Scores of a model, of a run while it trains, of exports.

Imports checkpoint, tracking, planning and below.
"""
