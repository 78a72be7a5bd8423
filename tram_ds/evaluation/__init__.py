"""Scores of a model, of a run while it trains, of exports; what an export is handed on with.

Imports checkpoint, tracking, planning and below.
"""
