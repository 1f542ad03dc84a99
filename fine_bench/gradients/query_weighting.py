"""How much each query counts in a mean over queries: one rule for f-INE and for every baseline.

A validation target averages over queries. Queries differ in scale by orders of magnitude (an
uncertain query has a large gradient, a confident one a small gradient), so an unweighted mean is a
mean over a few of them. ``"norm"`` divides query v by the norm of its gradient, ``"noise"`` by
the spread of its statistic over reference examples, σ_v = std_j ⟨g_j, g_v⟩: the scale on which a
test sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import get_args

import torch
from torch import Tensor

from fine_bench.gradients.blocks.dense import DenseBlock
from fine_bench.gradients.blocks.direction import Direction, add_directions
from fine_bench.gradients.per_example import PerExampleGradients
from fine_bench.gradients.reciprocal import inverse_or_zero
from fine_bench.seeds import stream
from fine_bench.types import Problem, QueryWeighting, Reduce

N_REFERENCE = 2048
"""Training examples from which post-hoc methods estimate the noise of a query."""


def check_weighting(weighting: QueryWeighting) -> None:
    """Refuse an unknown weighting."""
    if weighting is not None and weighting not in ("norm", "noise"):
        raise ValueError(
            f'query_weighting must be None, "norm" or "noise" ({get_args(QueryWeighting)}), '
            f"got {weighting!r}"
        )


def query_weights(
    queries: PerExampleGradients, reference: PerExampleGradients | None, weighting: QueryWeighting
) -> Tensor:
    """One weight a query, ``(V,)``: 1, 1/‖g_v‖ or 1/std_j ⟨g_j, g_v⟩ (n − 1 in the variance).

    A query without gradient or without spread says nothing and gets the weight 0.

    Args:
        queries: gradients of the V queries' observable.
        reference: gradients of the reference examples, needed for ``"noise"``; at least 2.
    """
    if weighting is None:
        return queries.norm2().new_ones(len(queries))
    if weighting == "norm":
        scale = queries.norm2().sqrt()
    else:
        if reference is None or len(reference) < 2:
            raise ValueError('query_weighting="noise" needs at least two reference examples')
        scale = reference.gram(queries).std(0)
    return inverse_or_zero(scale)


def noise_weights(statistic: Tensor) -> Tensor:
    """The weights of ``"noise"`` from each query's statistic over reference examples.

    ``(V, R)`` → ``(V,)``: 1/std (n − 1 in the variance), 0 where there is no spread. The statistic
    is whatever the method compares a query and an example by.

    Raises:
        ValueError: fewer than two reference examples.
    """
    # the shared rule, told that a query's dot products with the reference *are* the statistic: in
    # the coordinates of the reference examples these are the unit vectors
    unit = torch.eye(statistic.shape[1], dtype=statistic.dtype, device=statistic.device)
    return query_weights(
        PerExampleGradients([DenseBlock("statistic", statistic)]),
        PerExampleGradients([DenseBlock("reference", unit)]),
        "noise",
    )


def query_direction(
    batches: Iterable[tuple[slice, PerExampleGradients]],
    groups: Tensor,
    weigh: Callable[[slice, PerExampleGradients], Tensor],
) -> Direction:
    """Σ_v w_v g_v for each row of a reduction.

    Args:
        batches: positions and gradients of the queries, at least one batch.
        groups: ``(rows, V)``; see ``query_groups``.
        weigh: the weights w of a batch's queries.
    """
    direction: Direction | None = None
    for which, queries in batches:
        weights = weigh(which, queries)
        part = queries.weighted_sum(groups[:, which].to(weights) * weights)
        direction = part if direction is None else add_directions(direction, part)
    assert direction is not None
    return direction


def reduced_rows(
    rows: Tensor, problem: Problem, weighting: QueryWeighting, norms: Callable[[], Tensor]
) -> Tensor:
    """Scores of all queries ``(V, n)`` averaged as the problem asks, ``(rows, n)``.

    Args:
        rows: every query against every training example.
        problem: its queries' labels and ``reduce``.
        weighting: weights of the queries in a mean; ``"noise"`` is the spread of ``rows``.
        norms: ``(V,)``, asked for where ``"norm"`` needs them.
    """
    if problem.reduce is None:
        return rows
    groups = query_groups(problem.labels("queries"), problem.reduce).to(rows)
    if weighting == "noise":
        groups = groups * noise_weights(rows[:, reference_rows(problem.n_train)])
    elif weighting == "norm":
        groups = groups * inverse_or_zero(norms().to(rows))
    return groups @ rows


def query_groups(labels: Tensor, reduce: Reduce) -> Tensor:
    """Averaging weights ``(rows, V)`` of a reduction: rows sum to one.

    ``None`` keeps every query, ``"mean"`` makes one row, ``"class"`` one row for every class that
    occurs, in ascending order.
    """
    n = len(labels)
    if reduce is None:
        return torch.eye(n, dtype=torch.float64)
    if reduce == "mean":
        return torch.full((1, n), 1.0 / n, dtype=torch.float64)
    classes = torch.unique(labels)
    member: Tensor = (labels[None, :] == classes[:, None]).double()
    share: Tensor = member / member.sum(1, keepdim=True)
    return share


def reference_rows(n_train: int) -> Tensor:
    """Positions of the reference examples: a fixed random draw, in ascending order."""
    if n_train <= N_REFERENCE:
        return torch.arange(n_train)
    rows = torch.randperm(n_train, generator=stream(0, "query-noise/reference"))
    return rows[:N_REFERENCE].sort().values
