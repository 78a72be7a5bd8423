"""YAML to one frozen, checked Recipe, and its reference page.

Imports what stands below: options of algorithms, names of tasks.
"""
