"""The paper: options, table, ascent, distance, trust region, objective, step, stepper, and what a
step costs.

Imports runtime, engines and models; knows no task.
"""
