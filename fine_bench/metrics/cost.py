"""What a method costs beyond the plain training of its run; measured by the runner."""

from __future__ import annotations

from fine_bench.metrics.registry import BETWEEN_RUNS, Metric


def _seconds(name: str, label: str) -> Metric:
    return Metric(name, label, "lower", "s", None, "cost", table="")


METRICS = (
    Metric("seconds", "extra s", "lower", "s", None, "cost", BETWEEN_RUNS, rank=60,
           title="extra seconds, beyond plain training"),
    _seconds("shared_seconds", "of them shared with other cells"),
    _seconds("ensemble_seconds", "of them training the ensemble"),
    _seconds("auxiliary_seconds", "of them the auxiliary run"),
    Metric("gradient_evaluations", "gradients of single examples", "lower", "gradients", None,
           "cost", table=""),
    Metric("auxiliary_gradient_evaluations", "of them in the auxiliary run", "lower", "gradients",
           None, "cost", table=""),
)  # fmt: skip
