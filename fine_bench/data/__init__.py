"""Tasks: data, their corruption, and the truth about it.

A task is one function here, returning a checked ``TaskData``, and one YAML file that names it.
"""
