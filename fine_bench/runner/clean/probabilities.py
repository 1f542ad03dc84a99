"""Probabilities that were made elsewhere: one file a run, rows as in the data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fine_bench.errors import DataError
from fine_bench.runner.clean.inputs.csv_files import read_csv
from fine_bench.runner.clean.inputs.items import Items, reason_of
from fine_bench.runner.clean.inputs.tables import named
from fine_bench.runner.clean.training import Floats, Run

_HOW = (
    "a .npy of shape (rows, classes), classes in ascending order, or a .csv with a column for each "
    "class, named as the class"
)
_TOLERANCE = 1e-3


def given_runs(items: Items, given: Sequence[Any]) -> list[Run]:
    """Runs from files or arrays, without f-INE.

    Args:
        items: whose source has the rows.
        given: paths or ``(rows, classes)`` arrays; a ``(runs, rows, classes)`` array is several.

    Raises:
        DataError: wrong shapes, or values that are no probabilities, with the row.
    """
    runs = []
    for one in given:
        where = str(one) if isinstance(one, str | Path) else "probabilities"
        array = _read(Path(one), items) if isinstance(one, str | Path) else np.asarray(one)
        for part in array if array.ndim == 3 else [array]:
            p = _checked(part, items, where)
            nothing = np.full(len(items), np.nan)
            runs.append(Run(p, np.full_like(p, np.nan), nothing, nothing, (), 0))
    return runs


def _read(path: Path, items: Items) -> Any:
    try:
        if path.suffix.lower() == ".csv":
            table = named(read_csv(path), path)
            lost = [str(c) for c in items.classes if str(c) not in table.columns]
            if lost:
                raise DataError(
                    f"{path} has no column for the class(es) {', '.join(lost[:5])}; give {_HOW}"
                )
            return table[[str(c) for c in items.classes]].to_numpy(dtype=np.float64)
        return np.load(path, allow_pickle=False)
    except DataError:
        raise
    except Exception as error:  # damaged files
        raise DataError(f"{path} cannot be read ({reason_of(error)}); give {_HOW}") from error


def _checked(array: Any, items: Items, where: str) -> Floats:
    p = np.asarray(array)
    k = len(items.classes)
    if p.dtype.kind not in "fiu" or p.shape != (items.n_source, k):
        raise DataError(
            f"{where} holds {p.dtype} of shape {p.shape}, but the data have {items.n_source} rows "
            f"and {k} classes; give {_HOW}"
        )
    p = p.astype(np.float64)[items.rows]
    total = p.sum(axis=1)
    bad = ~np.isfinite(p).all(axis=1) | (p < 0).any(axis=1) | (np.abs(total - 1) > _TOLERANCE)
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        raise DataError(
            f"{where}, row {int(items.rows[first])}: {p[first][:4].tolist()} … are no "
            f"probabilities (they sum to {total[first]:.4g}); apply softmax"
        )
    return np.asarray(p / total[:, None])
