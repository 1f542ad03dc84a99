"""Which rows to verify first, so that a second call can promise an error rate.

The promise (``metrics.error_rate``) needs rows that were drawn at random and found right. No
p-value is smaller than 1/(n + 1), so Benjamini–Hochberg at a level α flags k of m rows only if
n ≥ m / (α k) − 1 rows are trusted (``theory.false_discovery.trusted_size_needed``). The runs say
how many rows are likely wrong, K: most of them suspect so many. The draw is made as large as is
needed to flag K/2, half of them, plus as many as are likely to be found wrong in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import numpy as np
import pandas as pd

from fine_bench.runner.clean.inputs.items import Items
from fine_bench.seeds import derive
from fine_bench.theory.false_discovery import trusted_size_needed

COLUMNS = ("row", "name", "label")


@dataclass(frozen=True, eq=False)
class Draw:
    """Rows to verify.

    Attributes:
        table: ``row``, ``name``, ``label``, in random order, so that a part of it, from the top, is
            a smaller draw.
        needed: right rows that are needed.
        expected: rows that may be flagged then.
        enough: False where the data hold too few rows for what was asked.
    """

    table: pd.DataFrame
    needed: int
    expected: int
    enough: bool


def draw_to_verify(items: Items, n_suspected: int, level: float, seed: int) -> Draw:
    """Draw rows from the stream ``clean/verify`` of the seed; see the module.

    At most half of the rows are drawn: who verifies more needs no error rate.
    """
    n = len(items)
    expected = max(ceil(n_suspected / 2), ceil(n / 100))
    needed = trusted_size_needed(level, n, min(expected, n))
    share_right = max(1 - n_suspected / n, 0.5)
    size = ceil(needed / share_right)
    rng = np.random.default_rng(derive(seed, "clean/verify"))
    chosen = rng.permutation(n)[: min(size, n // 2)]
    table = pd.DataFrame(
        {
            "row": items.rows[chosen],
            "name": [items.names[k] for k in chosen],
            "label": [items.classes[items.y[k]] for k in chosen],
        }
    )
    return Draw(table, needed, expected, size <= n // 2)
