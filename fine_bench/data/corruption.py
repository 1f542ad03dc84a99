"""Label corruption: what is done to the training labels, and to which of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fine_bench.errors import ConfigError


def check_rate(rate: float) -> None:
    """Refuse a noise rate outside [0, 1)."""
    # written as "not inside", so that NaN is refused too
    if not 0.0 <= rate < 1.0:
        raise ConfigError(
            f"task.noise_rate is the share of flipped labels, at least 0 and below 1; got {rate}. "
            "Type for instance task.noise_rate=0.2"
        )


def flip_uniform(
    labels: Tensor, rate: float, n_classes: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Uniform label noise: ``round(rate * n)`` labels, each moved to a uniformly drawn other class.

    The number is exact and not binomial, so the noise rate is known to the metrics; no flip
    lands on its own class, so every flip is an error. (``round`` takes halves to the even.)

    Args:
        labels: ``(n,)`` int64 in 0 … n_classes - 1; left as it is.
        rate: share of labels to flip, 0 ≤ rate < 1.
        n_classes: at least 2.
        generator: the random stream of the flips.

    Returns:
        The new labels ``(n,)`` and ``is_flipped`` ``(n,)`` boolean.

    Raises:
        ConfigError: a rate outside [0, 1).
        ValueError: labels outside the classes, or fewer than two classes.
    """
    check_rate(rate)
    if n_classes < 2:
        raise ValueError(f"flipping needs at least two classes, got n_classes={n_classes}")
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= n_classes):
        raise ValueError(
            f"labels must lie in 0 … {n_classes - 1}, got {int(labels.min())} … {int(labels.max())}"
        )
    n = len(labels)
    flipped = torch.randperm(n, generator=generator)[: round(rate * n)]
    # a shift by 1 … n_classes - 1 reaches every other class with the same probability
    shift = torch.randint(1, n_classes, (len(flipped),), generator=generator)
    new_labels = labels.clone()
    new_labels[flipped] = (labels[flipped] + shift) % n_classes
    is_flipped = torch.zeros(n, dtype=torch.bool)
    is_flipped[flipped] = True
    return new_labels, is_flipped


def apportion(weights: Tensor, total: int) -> Tensor:
    """Whole numbers in proportion to ``weights`` that sum to ``total`` (Sainte-Laguë's divisors).

    The ``total`` largest of all quotients w_k / (j + ½), j = 0, 1, … each give one place to their
    class k; of equal ones the lower class comes first. A larger total takes no place away.

    Args:
        weights: ``(n_classes,)``, ≥ 0 and not all zero.
        total: ≥ 0.

    Returns:
        ``(n_classes,)`` int64.
    """
    return torch.bincount(places(weights, total), minlength=len(weights))


def places(weights: Tensor, total: int) -> Tensor:
    """The class of each place that ``apportion`` gives away, in order, ``(total,)``."""
    quotients = weights.double()[:, None] / (torch.arange(total, dtype=torch.float64) + 0.5)
    return quotients.flatten().argsort(descending=True, stable=True)[:total] // max(total, 1)


def check_confusions(confusions: Sequence[tuple[int, int]], n_classes: int) -> None:
    """Refuse pairs that are no map from some classes to other classes."""
    example = "Type for instance 'task.confusions=[[4,9],[7,1]]'"
    if not confusions:
        raise ConfigError(f"task.confusions is empty, so nothing would be flipped. {example}")
    for pair in confusions:
        if len(pair) != 2 or pair[0] == pair[1] or not all(0 <= c < n_classes for c in pair):
            raise ConfigError(
                f"task.confusions holds pairs [class, other class that it is mistaken for] from "
                f"0 … {n_classes - 1}; got {list(pair)}. {example}"
            )
    sources = [pair[0] for pair in confusions]
    repeated = sorted({c for c in sources if sources.count(c) > 1})
    if repeated:
        raise ConfigError(
            f"task.confusions sends class {repeated[0]} to several classes; name each class once "
            "on the left, or give a whole matrix with task=digits_transition or "
            f"task=mnist_transition. {example}"
        )


def flip_confusions(
    labels: Tensor,
    confusions: Sequence[tuple[int, int]],
    rate: float,
    n_classes: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Asymmetric label noise: of each class a named in a pair (a, b), a share becomes b.

    Args:
        labels: ``(n,)`` int64 in 0 … n_classes - 1; left as it is.
        confusions: pairs (a, b); no a twice. Their order is of no consequence.
        rate: share of the examples *of each named class* that is flipped: ``round(rate * n_a)``.
        n_classes: number of classes.
        generator: the random stream of the flips.

    Returns:
        The new labels ``(n,)`` and ``is_flipped`` ``(n,)`` boolean.

    Raises:
        ConfigError: a rate outside [0, 1), or pairs that are no such map.
    """
    check_rate(rate)
    check_confusions(confusions, n_classes)
    new_labels = labels.clone()
    for source, target in sorted(confusions):
        members = (labels == source).nonzero()[:, 0]
        order = torch.randperm(len(members), generator=generator)
        new_labels[members[order[: round(rate * len(members))]]] = target
    return new_labels, new_labels != labels


def check_transition(matrix: Sequence[Sequence[float]], n_classes: int) -> Tensor:
    """The matrix as ``(n_classes, n_classes)`` float64, refused unless each row is a distribution.

    Raises:
        ConfigError: another shape, an entry outside [0, 1], a row that does not sum to one.
    """
    widths = {len(row) for row in matrix}
    if len(matrix) != n_classes or widths != {n_classes}:
        raise ConfigError(
            f"task.matrix must have {n_classes} rows of {n_classes} numbers, got {len(matrix)} "
            f"rows of {', '.join(map(str, sorted(widths))) or 'no'} numbers. Row a holds the share "
            "of class a that is given each label"
        )
    result = torch.tensor([list(map(float, row)) for row in matrix], dtype=torch.float64)
    for number, row in enumerate(result):
        # written as "not inside", so that NaN is refused too
        if not bool(((row >= 0) & (row <= 1)).all()):
            raise ConfigError(
                f"row {number} of task.matrix holds a number outside of 0 … 1: {row.tolist()}. "
                "Entries are shares of a class"
            )
        if abs(float(row.sum()) - 1) > 1e-6:
            raise ConfigError(
                f"row {number} of task.matrix sums to {float(row.sum()):.6g}, but the shares of a "
                f"class sum to 1. Raise its diagonal entry by {1 - float(row.sum()):.6g}, for "
                "instance"
            )
    return result


def flip_transition(
    labels: Tensor, matrix: Sequence[Sequence[float]], n_classes: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Label noise by a transition matrix: the share ``matrix[a][b]`` of class a becomes b.

    The shares are met as closely as whole numbers allow (``apportion``); which examples of a class
    get which label is drawn uniformly.

    Args:
        labels: ``(n,)`` int64 in 0 … n_classes - 1; left as it is.
        matrix: n_classes rows of n_classes numbers, each row summing to one.
        n_classes: number of classes.
        generator: the random stream of the flips.

    Returns:
        The new labels ``(n,)`` and ``is_flipped`` ``(n,)`` boolean.

    Raises:
        ConfigError: see ``check_transition``.
    """
    shares = check_transition(matrix, n_classes)
    new_labels = labels.clone()
    for source in range(n_classes):
        members = (labels == source).nonzero()[:, 0]
        counts = apportion(shares[source], len(members))
        given = torch.arange(n_classes).repeat_interleave(counts)
        order = torch.randperm(len(members), generator=generator)
        new_labels[members[order]] = given
    return new_labels, new_labels != labels


def flip_least_sure(labels: Tensor, probabilities: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """Instance-dependent label noise: the hardest examples get the label they resemble most.

    The ``round(rate * n)`` examples to whose label a model gives the lowest probability are
    flipped (of equal ones the first), each to the most probable of the other classes. A higher
    rate flips the same examples and more.

    Args:
        labels: ``(n,)`` int64; left as it is.
        probabilities: ``(n, n_classes)`` of a model that has not seen these examples.
        rate: share of labels to flip, 0 ≤ rate < 1.

    Returns:
        The new labels ``(n,)`` and ``is_flipped`` ``(n,)`` boolean.

    Raises:
        ConfigError: a rate outside [0, 1).
    """
    check_rate(rate)
    rows = torch.arange(len(labels))
    flipped = least_sure(labels, probabilities, round(rate * len(labels)))
    others = probabilities.clone()
    others[rows, labels] = -1.0
    new_labels = labels.clone()
    new_labels[flipped] = others[flipped].argmax(1)
    return new_labels, new_labels != labels


def least_sure(labels: Tensor, probabilities: Tensor, count: int) -> Tensor:
    """Positions of the ``count`` examples whose label is least probable, ascending."""
    own = probabilities.gather(1, labels[:, None])[:, 0]
    return own.argsort(stable=True)[:count].sort().values
