"""Further issues: duplicates, near duplicates, outliers, classes that are confused.

Neighbours are scikit-learn's, in ``features.neighbour_vectors``. With d_i the distance to the
nearest other row that is no exact duplicate, and d̄ the median of all d_i:

- *exact duplicates*: the same content, by a digest of it;
- *near duplicates*: pairs at most a tenth of d̄ apart;
- *outliers*: rows whose mean distance to ten neighbours has a logarithm above Q3 + 3 (Q3 − Q1) of
  all rows (Tukey's far-out fence);
- *confused classes*: pairs (given, suggested) among the rows that most runs suspect.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from fine_bench.runner.clean.features import neighbour_vectors
from fine_bench.runner.clean.inputs.items import Items
from fine_bench.runner.clean.scoring import suspected

NEAR = 0.1
NEIGHBOURS = 10
FENCE = 3.0
COLUMNS = ("issue", "group", "row", "name", "label", "detail")


def _digests(items: Items) -> list[bytes]:
    """A digest of each item's content."""
    if items.kind == "table":
        return [
            hashlib.sha256(repr(tuple(map(str, row))).encode()).digest()
            for row in items.content.itertuples(index=False)
        ]
    if items.kind == "text":
        return [hashlib.sha256(" ".join(t.split()).encode()).digest() for t in items.content]
    return [hashlib.sha256(np.ascontiguousarray(one).tobytes()).digest() for one in items.content]


def exact_groups(items: Items) -> list[list[int]]:
    """Positions of items that are the same, a list a group."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    for k, digest in enumerate(_digests(items)):
        groups[digest].append(k)
    return [group for group in groups.values() if len(group) > 1]


def _connected(pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Groups of positions that a chain of pairs connects."""
    home: dict[int, int] = {}

    def root(k: int) -> int:
        home.setdefault(k, k)
        while home[k] != k:
            home[k] = home[home[k]]
            k = home[k]
        return k

    for a, b in pairs:
        home[root(a)] = root(b)
    groups: dict[int, list[int]] = defaultdict(list)
    for k in sorted(home):
        groups[root(k)].append(k)
    return list(groups.values())


def find_issues(items: Items, x: Tensor, table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """All of them, a line a row: ``issue``, ``group``, ``row``, ``name``, ``label``, ``detail``.

    Args:
        items: as they were read.
        x: ``(n, ...)`` what the model was given.
        table: the ranking, for what is confused.
        seed: of the decomposition for neighbours.
    """
    from sklearn.neighbors import NearestNeighbors

    lines: list[dict[str, Any]] = []

    def add(issue: str, group: int, k: int, detail: str) -> None:
        lines.append(
            {
                "issue": issue,
                "group": group,
                "row": int(items.rows[k]),
                "name": items.names[k],
                "label": items.classes[items.y[k]],
                "detail": detail,
            }
        )

    def add_groups(issue: str, groups: list[list[int]]) -> None:
        for number, group in enumerate(groups, start=1):
            labels = {int(items.y[k]) for k in group}
            within = "one class" if len(labels) == 1 else f"{len(labels)} classes"
            for k in group:
                add(issue, number, k, f"{len(group)} rows, {within}")

    exact = exact_groups(items)
    add_groups("exact duplicates", exact)

    # one of each group stands for all: a copy is no neighbour
    again = {k for group in exact for k in group[1:]}
    alone = np.array([k for k in range(len(items)) if k not in again])
    k = min(NEIGHBOURS, len(alone) - 1)
    if k >= 1:
        vectors = neighbour_vectors(x[alone], seed)
        # asked for nothing, it leaves a row out of its own neighbours, also where others lie on it
        distance, neighbour = NearestNeighbors(n_neighbors=k).fit(vectors).kneighbors()
        limit = NEAR * float(np.median(distance[:, 0]))
        close = np.argwhere(distance <= limit)
        pairs = [(int(alone[i]), int(alone[neighbour[i, j]])) for i, j in close]
        add_groups("near duplicates", _connected(pairs))
        mean = np.log(np.maximum(distance.mean(axis=1), 1e-12))
        low, high = np.quantile(mean, [0.25, 0.75])
        far = np.flatnonzero(mean > high + FENCE * (high - low))
        for i in far[np.argsort(-mean[far], kind="stable")]:
            times = float(np.exp(mean[i] - np.median(mean)))
            add("outlier", 0, int(alone[i]), f"{times:.1f} times as far from others as is usual")

    place = {int(row): k for k, row in enumerate(items.rows)}
    doubted = suspected(table)
    pairs_of = Counter(zip(doubted["label"], doubted["suggested"], strict=True))
    for number, ((given, other), count) in enumerate(pairs_of.most_common(), start=1):
        both = (doubted["label"] == given) & (doubted["suggested"] == other)
        for row in doubted["row"][both]:
            add("confused classes", number, place[int(row)], f"{given} → {other}: {count} rows")
    return pd.DataFrame(lines, columns=list(COLUMNS))


def summary(issues: pd.DataFrame) -> list[str]:
    """A sentence an issue, with counts."""
    said = []
    for issue, what in (("exact duplicates", "the same"), ("near duplicates", "nearly the same")):
        part = issues[issues["issue"] == issue]
        across = part[~part["detail"].str.endswith("one class")]
        said.append(
            f"{issue}: {part['group'].nunique()} group(s) of {len(part)} rows that are {what}, "
            f"{across['group'].nunique()} of them across classes"
            if len(part)
            else f"{issue}: none"
        )
    outliers = issues[issues["issue"] == "outlier"]
    said.append(f"outliers: {len(outliers)}" if len(outliers) else "outliers: none")
    confused = issues[issues["issue"] == "confused classes"].drop_duplicates("group")
    if len(confused):
        said.append("confused classes: " + "; ".join(confused["detail"].head(5)))
    return said


def cleanlab_summary(p: Any, items: Items) -> str | None:
    """What cleanlab says of the same probabilities; None where it is not installed."""
    try:
        from cleanlab.dataset import overall_label_health_score
        from cleanlab.filter import find_label_issues
    except ImportError:
        return None
    health = overall_label_health_score(items.y, p, verbose=False)
    n = int(find_label_issues(items.y, p).sum())
    return f"cleanlab, on the same probabilities: label health {health:.3f}, {n} label issues"
