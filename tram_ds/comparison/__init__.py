"""Finished runs as the paper's tables, figures and a page.

Imports evaluation, jobs and below.
"""
