"""Metrics: pure functions from scores (and the truth) to numbers, without input or output."""
