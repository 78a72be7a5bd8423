"""A run's state on disk, and the export.

Imports recipe and below.
"""
