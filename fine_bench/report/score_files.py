"""Score files of anybody's method, against a ground truth. Nothing is trained.

A file holds the scores of one run of the method on the task's training data, in index order,
positive where training on an example lowers the loss, as tensors of any of these names:

- ``self``: ``(n,)`` or ``(1, n)``, the influence of every example on its own loss;
- ``queries``: ``(q, n)``, on each of the task's queries;
- ``validation``: ``(n,)`` or ``(1, n)``, on their mean.

Score files of the benchmark's own store are read too. Several files are several seeds: the numbers
are then means with 95 % intervals over seeds, beside their consistency.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TypeAlias

import numpy as np
import safetensors
import torch
from numpy.typing import NDArray

from fine_bench.errors import UserError
from fine_bench.leaderboard.consistency import LEVEL
from fine_bench.leaderboard.tables import CellState, Leaderboard, Row, Stat, Table
from fine_bench.metrics.consistency import pairwise_consistency
from fine_bench.metrics.detection import detection_metrics, suspicion
from fine_bench.metrics.intervals import mean_interval, pair_mean_interval
from fine_bench.metrics.registry import columns, stat_key
from fine_bench.retraining.truth import Half, Truth
from fine_bench.store.guarded import is_file
from fine_bench.types import SUSPICIOUS_END

Scores: TypeAlias = Mapping[str, NDArray[np.float64]]

ACCEPTED: Mapping[str, str] = {"self": "(n,)", "queries": "(q, n)", "validation": "(n,)"}
OPPOSITE = -0.3
"""A fidelity below it looks like scores of the opposite sign."""


class ScoreFileError(UserError, ValueError):
    """A score file cannot be used. The message names it and what to do."""


def read_scores(path: Path | str, truth: Truth) -> dict[str, NDArray[np.float64]]:
    """The score matrices of a file by target, each ``(rows, n)`` float64.

    Raises:
        ScoreFileError: no such file, no safetensors, nothing recognised in it, a shape that does
            not fit the truth, or values that are not finite or all equal.
    """
    path = Path(path)
    if not is_file(path):
        raise ScoreFileError(f"there is no score file {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            names = sorted(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
    except (safetensors.SafetensorError, OSError) as error:
        raise ScoreFileError(
            f"{path} is no whole safetensors file ({error}); write it with "
            'safetensors.torch.save_file({"self": scores}, path)'
        ) from error
    if "values" in tensors and about.get("target") in ACCEPTED:  # of the benchmark's own store
        if "watched" in tensors:
            raise ScoreFileError(f"{path} scores a sample of the examples; score all of them")
        tensors = {about["target"]: tensors["values"]}
    known = {target: tensors[target] for target in ACCEPTED if target in tensors}
    if not known:
        raise ScoreFileError(
            f"{path} holds {', '.join(names) or 'nothing'}; none of {', '.join(ACCEPTED)}. Name "
            "the tensors after what they answer"
        )
    return {target: _matrix(path, target, tensor, truth) for target, tensor in known.items()}


def _matrix(path: Path, target: str, tensor: torch.Tensor, truth: Truth) -> NDArray[np.float64]:
    shape, n = tuple(tensor.shape), truth.n_train
    rows = truth.n_query or None if target == "queries" else 1
    values = tensor[None] if tensor.ndim == 1 and target != "queries" else tensor
    if values.ndim != 2 or values.shape[1] != n or rows not in (None, len(values)):
        expected = f"({rows or 'q'}, {n})" if target == "queries" else f"({n},) or (1, {n})"
        turned = values.ndim == 2 and len(values) == n and target == "queries"
        raise ScoreFileError(
            f"{path}: {target} has shape {shape}, expected {expected}: one column for each of the "
            f"training examples of {truth.name}, in index order"
            + ("; transpose it" if turned else "")
        )
    array = values.to(torch.float64).numpy()
    broken = np.count_nonzero(~np.isfinite(array))
    if broken:
        raise ScoreFileError(
            f"{path}: {target} holds {broken} values that are NaN or infinite; an example without "
            "a score cannot be ranked"
        )
    if (np.ptp(array, axis=1) == 0).all():
        raise ScoreFileError(
            f"{path}: {target} is constant over the examples; such scores order nothing"
        )
    return array


def score(values: NDArray[np.float64], target: str, truth: Truth, half: Half) -> dict[str, float]:
    """All metrics of one score matrix ``(rows, n)``, by name."""
    found = truth.metrics(values, target, half)
    if 0 < np.count_nonzero(truth.is_bad) < truth.n_train:
        row = suspicion(values, SUSPICIOUS_END[target])
        found |= detection_metrics(row, truth.is_bad)
    return found


def board(
    runs: Sequence[Scores], truth: Truth, half: Half = "published", name: str = "scores"
) -> Leaderboard:
    """A leaderboard of one method, a row for each target.

    Args:
        runs: one mapping from target to score matrix a seed.
        truth: the ground truth.
        half: which half of it to score against.
        name: of the rows.
    """
    k = int(truth.is_bad.sum())
    rows, cells = [], []
    for target in (t for t in ACCEPTED if any(t in run for run in runs)):
        own = {seed: run[target] for seed, run in enumerate(runs) if target in run}
        by_metric: dict[str, dict[int, float]] = {}
        for seed, values in own.items():
            for metric, value in score(values, target, truth, half).items():
                by_metric.setdefault(metric, {})[seed] = value
        stats = {m: Stat(*mean_interval(v, LEVEL), n=len(v)) for m, v in by_metric.items()}
        stats |= _consistency(own, target, k)
        rows.append(Row(name, "", "", target, 1, tuple(own), stats, k=k))
        cells += [
            CellState(
                truth.task, truth.setting, name, "", target, seed, "missing", "not in its file"
            )
            for seed in range(len(runs))
            if seed not in own
        ]
    part = truth.half(half)
    options: dict[str, object] = {
        "n_train": truth.n_train,
        "bad": k,
        "half": half,
        "models": part.n_models,
        "ceiling": round(part.ceiling, 3),
        "clean ceiling": round(part.ceiling_clean, 3),
    }
    if truth.subsets is not None:
        options["LDS ceiling"] = round(part.lds_ceiling, 3)
    table = Table(
        task=truth.task,
        setting=truth.setting,
        data=truth.data_sha256,
        options={name: x for name, x in options.items() if x == x},  # a NaN is not known
        training={},
        k=k,
        seeds=tuple(range(len(runs))),
        rows=tuple(rows),
        cells=tuple(cells),
    )
    shown = tuple(c for c in columns() if any(c.key in row.stats for row in rows))
    return Leaderboard((table,), (), shown)


def _consistency(own: Mapping[int, NDArray[np.float64]], target: str, k: int) -> dict[str, Stat]:
    """Agreement between the seeds, as in the leaderboard."""
    rows = {seed: suspicion(values, SUSPICIOUS_END[target]) for seed, values in own.items()}
    pairs = {
        (a, b): pairwise_consistency(rows[a], rows[b], max(k, 1), "high")
        for a, b in combinations(rows, 2)
    }
    names = next(iter(pairs.values()), {})
    return {
        stat_key("consistency", name): Stat(
            *pair_mean_interval({pair: found[name] for pair, found in pairs.items()}, LEVEL),
            n=len(own),
        )
        for name in names
        if k or not name.startswith("jaccard")
    }


def refuse_copies(paths: Sequence[Path], runs: Sequence[Scores]) -> None:
    """Refuse files of which two hold the same scores of a target.

    Raises:
        ScoreFileError: the message names both.
    """
    for a, b in combinations(range(len(runs)), 2):
        for target in runs[a].keys() & runs[b].keys():
            if np.array_equal(runs[a][target], runs[b][target]):
                raise ScoreFileError(
                    f"{paths[a]} and {paths[b]} hold the same {target}; several files are several "
                    "seeds, each from a run of its own"
                )


def warnings_of(board: Leaderboard) -> list[str]:
    """Rows whose scores look as if they had the opposite sign, a line each."""
    return [
        f"{row.target}: {metric} is {row.stats[metric].mean:.3f}. Scores are positive where "
        "training on an example lowers the loss; do these have the opposite sign?"
        for row in board.tables[0].rows
        for metric in ("fidelity", "lds")
        if metric in row.stats and row.stats[metric].mean < OPPOSITE
    ]
