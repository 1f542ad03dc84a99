"""What a run and a sweep show in W&B beside the curves of training: tables, charts, pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import wandb
from torch import Tensor

from fine_bench.metrics.detection import detection_curve, suspicion
from fine_bench.metrics.registry import STANDARD, known
from fine_bench.runner.plan import Job
from fine_bench.runner.write import Written
from fine_bench.store.scores import asked_about

HEADLINES = ("average_precision", "fidelity", "lds")
"""Metrics that stand in a run's summary, where W&B's table of runs can sort by them."""

SUSPICIOUS = 16
"""Examples a method and target in the table of the most suspicious ones."""

POINTS = 200
"""Points of a detection curve."""


def headlines(done: Sequence[Written]) -> dict[str, float]:
    """``<target>/<metric>/<row>``: a few numbers a cell."""
    return {
        f"{one.cell.target}/{name}/{one.cell.estimator}": one.record.metrics[name]
        for one in done
        for name in HEADLINES
        if name in one.record.metrics
    }


def of_run(job: Job, done: Sequence[Written]) -> dict[str, Any]:
    """Everything to log when a run is over: ``cells``, detection curves, suspicious examples."""
    logged: dict[str, Any] = {}
    if done:
        logged["cells"] = _cells(done)
    for target in dict.fromkeys(one.cell.target for one in done):
        mine = [one for one in done if one.cell.target == target and one.scores is not None]
        curves = [(one.cell.estimator, *_curve(job, one)) for one in mine if _detects(one)]
        if curves:
            logged[f"detection/{target}"] = wandb.plot.line_series(
                xs=[list(share) for _, share, _ in curves],
                ys=[list(recall) for _, _, recall in curves],
                keys=[name for name, _, _ in curves],
                title=f"{job.data.name}, {target}: bad examples found",
                xname="share inspected",
            )
        if mine:
            logged[f"suspicious/{target}"] = _suspicious(job, mine)
    return logged


def of_sweep(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The leaderboard: whole and tidy, and its two standard tables with a column a metric."""
    columns = list(rows[0])
    logged: dict[str, Any] = {"leaderboard": _table(columns, rows)}
    for heading, name in zip(STANDARD, ("detection", "consistency_and_cost"), strict=True):
        labels = {one.key: one.label for one in known() if one.table == heading}
        wide: dict[tuple[str, ...], dict[str, Any]] = {}
        for row in rows:
            if row["metric"] in labels and row["mean"] == row["mean"]:
                key = (str(row["task"]), str(row["target"]), str(row["estimator"]))
                cells = wide.setdefault(key, dict(zip(_WHO, key, strict=True)))
                label = labels[row["metric"]]
                cells |= {label: row["mean"], f"{label} ±": _half_width(row)}
        shown = [c for label in labels.values() for c in (label, f"{label} ±")]
        shown = [c for c in shown if any(c in cells for cells in wide.values())]
        if shown:
            logged[name] = _table([*_WHO, *shown], list(wide.values()))
    return logged


_WHO = ("task", "target", "estimator")


def _half_width(row: Mapping[str, Any]) -> float | None:
    width = (float(row["upper"]) - float(row["lower"])) / 2
    return width if np.isfinite(width) else None


def _table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> wandb.Table:
    return _made(columns, [[row.get(column) for column in columns] for row in rows])


def _made(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> wandb.Table:
    return wandb.Table(columns=list(columns), data=list(rows), allow_mixed_types=True)


def _cells(done: Sequence[Written]) -> wandb.Table:
    columns = ["estimator", "target", "metric", "value"]
    data = [
        [one.cell.estimator, one.cell.target, name, float(value)]
        for one in done
        for name, value in {
            **one.record.metrics,
            **{f"cost/{k}": v for k, v in one.record.cost.items()},
        }.items()
    ]
    return _made(columns, data)


def _detects(one: Written) -> bool:
    return "auroc" in one.record.metrics


def _curve(job: Job, one: Written) -> tuple[list[float], list[float]]:
    """Share inspected, and recall there: of the examples of known truth, as the numbers are."""
    assert one.scores is not None
    scores, bad = one.scores, job.data.truth.is_bad
    asked = asked_about(job.data.truth, scores.watched)
    values = scores.values if asked is None else scores.values[:, asked]
    row = suspicion(values, job.end(one.cell.target))
    share, recall = detection_curve(row, bad if asked is None else bad[asked])
    some = np.unique(np.linspace(0, len(share) - 1, POINTS).round().astype(int))
    return [float(share[i]) for i in some], [float(recall[i]) for i in some]


def _suspicious(job: Job, done: Sequence[Written]) -> wandb.Table:
    """The most suspicious examples of each method, with a picture or their text."""
    show = _Examples(job)
    columns = ["estimator", "place", "example", show.heading, "given label", "known to be bad"]
    columns += ["score", "± 1.96 standard errors"]
    data = []
    for one in done:
        assert one.scores is not None
        scores = one.scores
        values = scores.watched_values.double().mean(0)
        where = torch.arange(job.data.n_train) if scores.watched is None else scores.watched
        order = np.argsort(-suspicion(scores.watched_values, job.end(one.cell.target)))
        errors = scores.std_error
        # of a mean over queries, whose errors are not independent, nothing is stated
        error = errors[0] if errors is not None and len(errors) == 1 else None
        for place, i in enumerate(order[:SUSPICIOUS].tolist(), start=1):
            example = int(where[i])
            spread = None if error is None else float(1.96 * error[example])
            data.append(
                [
                    one.cell.estimator,
                    place,
                    example,
                    show(example),
                    show.label(example),
                    bool(job.data.truth.is_bad[example]),
                    float(values[i]),
                    spread if spread is not None and np.isfinite(spread) else None,
                ]
            )
    return _made(columns, data)


class _Examples:
    """Training examples as W&B shows them: pictures, texts, or rows of numbers."""

    def __init__(self, job: Job) -> None:
        self._data = job.data
        self._made: dict[int, Any] = {}
        self._decode: Callable[[Tensor], str] | None = None
        if job.data.kind == "language":
            tokenizer = job.data.model.tokenizer()  # type: ignore[attr-defined]
            self._decode = lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True))
        self.heading = "text" if self._decode else "image" if self._pictures else "inputs"

    @property
    def _pictures(self) -> bool:
        return self._data.x.ndim == 4 and self._data.x.shape[1] in (1, 3)

    def label(self, example: int) -> Any:
        """The given label; None for texts, whose labels are their tokens."""
        return None if self._decode else int(self._data.y[example])

    def __call__(self, example: int) -> Any:
        """The example; each is made once."""
        if example not in self._made:
            x = self._data.x[example]
            if self._decode:
                self._made[example] = self._decode(x)
            elif self._pictures:
                self._made[example] = wandb.Image(picture(x))
            else:
                self._made[example] = ", ".join(f"{v:.3g}" for v in x.flatten()[:32].tolist())
        return self._made[example]


def picture(x: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Network inputs ``(1 or 3, H, W)`` as grey or colour levels 0 … 255.

    Darkest and lightest pixel of the image become 0 and 255: how the inputs were standardised is
    not known here.
    """
    low, high = float(x.min()), float(x.max())
    levels = (x - low) / (high - low if high > low else 1.0)
    found = (255 * levels).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return found[:, :, 0] if found.shape[2] == 1 else found
