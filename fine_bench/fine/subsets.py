"""Which subsets are watched, and the measurement batches that include and exclude them.

For a subset S, a *P batch* of m examples holds k of its members and m − k others from outside of S;
a *Q batch* holds m examples from outside of S (Panda et al., arXiv:2510.10510). These batches are
only measured: they come from a random stream of their own and no training step uses them.

Drawing two batches for every subset and differentiating each would cost 2·m gradients a subset.
Here one *pool* of examples is drawn for a step and shared by all subsets: it is a random order of
the training set, cut off as soon as every subset finds 2m − k outsiders in it. Each subset starts
at a random place of the pool, reads on cyclically past its own members, takes the first m − k
outsiders for P and the next m for Q. Within one subset, P and Q are thus two disjoint uniform
draws: independent but for the correlation of −1/(n − 1) of drawing without replacement. *Between*
subsets they are dependent: two subsets may meet the same outsiders at the same step. That biases no
single result, but the errors of different subsets are correlated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fine_bench.seeds import stream

Members: TypeAlias = Tensor | Sequence[int] | Sequence[bool]
"""Positions ``(|S|,)`` in the training set, or a boolean mask ``(n_train,)``."""

Column: TypeAlias = Tensor | Sequence[Any]
"""A label for every training example, ``(n_train,)``; None for "in no group"."""


@dataclass(frozen=True, eq=False)
class Subsets:
    """The watched subsets: single examples first, then named groups.

    Attributes:
        n_train: number of training examples.
        singles: ``(W,)`` positions of the examples that are a subset each, ascending.
        names: of the groups.
        groups: positions of each group's members, ascending.
    """

    n_train: int
    singles: Tensor
    names: tuple[str, ...]
    groups: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.singles) + len(self.groups)

    @property
    def keys(self) -> tuple[str, ...]:
        """One name a subset: the position of a single example, the name of a group."""
        return (*map(str, self.singles.tolist()), *self.names)

    @property
    def sizes(self) -> Tensor:
        """|S| of each subset."""
        sizes = [1] * len(self.singles) + [len(group) for group in self.groups]
        return torch.tensor(sizes, dtype=torch.int64)

    def contain(self, positions: Tensor) -> Tensor:
        """Which subset contains which of the examples, ``(S, M)`` boolean."""
        rows = [positions[None, :] == self.singles[:, None]]
        rows += [torch.isin(positions, group)[None, :] for group in self.groups]
        return torch.cat(rows)


def watch(
    n_train: int,
    labels: Callable[[], Tensor],
    *,
    subsets: Mapping[str, Members] | None = None,
    groups: Column | None = None,
    sample: int | None = None,
    sample_seed: int = 0,
) -> Subsets:
    """What the user asked to watch, checked.

    Args:
        n_train: number of training examples.
        labels: gives the labels as training sees them, ``(n_train,)``; called for ``sample`` only.
        subsets: name → members.
        groups: one label an example; every value makes a subset called ``group <value>``.
        sample: number of single examples, drawn by ``stratified_sample``.
        sample_seed: of that draw. It is no run seed: all runs of a task watch the same examples.

    Raises:
        ValueError: a subset that is empty, everything, out of range or not made of positions;
            nothing to watch.
    """
    named = {
        name: as_positions(members, n_train, name) for name, members in (subsets or {}).items()
    }
    for name, positions in _by_value(groups, n_train).items():
        if name in named:
            raise ValueError(f"subsets and groups both define {name!r}; rename the subset")
        named[name] = positions
    singles = torch.zeros(0, dtype=torch.int64)
    if sample is not None:
        if not 1 <= sample <= n_train:
            raise ValueError(
                f"sample={sample}, but the training set has {n_train} examples; type a number "
                f"from 1 to {n_train}, or None for no single examples"
            )
        draw = stream(sample_seed, "fine_paper/sample")
        singles = stratified_sample(labels(), sample, draw)
    if not named and not len(singles):
        raise ValueError(
            "nothing to watch: pass sample=300 for single examples, subsets={name: positions}, or "
            "groups=(one label a training example)"
        )
    return Subsets(n_train, singles, tuple(named), tuple(named.values()))


def as_positions(members: Members, n_train: int, name: str) -> Tensor:
    """Members as ascending positions ``(|S|,)``, refused unless a proper subset of the examples."""
    where = f"subset {name!r}"
    try:
        given = torch.as_tensor(members)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{where} must be positions or a boolean mask over the {n_train} training examples: "
            f"{error}"
        ) from error
    if given.numel() == 0:
        raise ValueError(f"{where} is empty; name at least one training example, or leave it out")
    if given.ndim != 1 or given.is_floating_point() or given.is_complex():
        raise ValueError(
            f"{where} must be integer positions or a boolean mask over the {n_train} training "
            f"examples, got {given.dtype} of shape {tuple(given.shape)}"
        )
    if given.dtype == torch.bool:
        if len(given) != n_train:
            raise ValueError(
                f"{where} is a mask of {len(given)} entries for {n_train} training examples; pass "
                "one entry an example, or positions"
            )
        given = given.nonzero()[:, 0]
        if len(given) == 0:
            raise ValueError(f"{where} is empty: no entry of its mask is True")
    positions = given.long().cpu().sort().values
    low, high = int(positions[0]), int(positions[-1])
    if low < 0 or high >= n_train:
        raise ValueError(
            f"{where} names positions from {low} to {high}, but the training set has {n_train} "
            f"examples: 0 … {n_train - 1}"
        )
    if bool((positions.diff() == 0).any()):
        raise ValueError(f"{where} names an example twice; name each member once")
    if len(positions) == n_train:
        raise ValueError(
            f"{where} is the whole training set: no batch can leave it out, so there is nothing "
            "to compare with; name a part of it"
        )
    return positions


def _by_value(column: Column | None, n_train: int) -> dict[str, Tensor]:
    if column is None:
        return {}
    values = column.tolist() if isinstance(column, Tensor) else list(column)
    if len(values) != n_train:
        raise ValueError(
            f"groups has {len(values)} entries for {n_train} training examples; pass one label an "
            "example, None for an example in no group"
        )
    if any(isinstance(value, float) for value in values):
        raise ValueError("groups holds fractions; label groups by integers or words")
    by_value: dict[str, list[int]] = {}
    for position, value in enumerate(values):
        if value is not None:
            by_value.setdefault(f"group {value}", []).append(position)
    if not by_value:
        raise ValueError("groups names no group: all of its entries are None")
    return {name: as_positions(by_value[name], n_train, name) for name in sorted(by_value)}


def stratified_sample(labels: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """``size`` positions, each label represented by its share; ascending.

    Shares of ``size`` are rounded down, and the places left go to the largest remainders (to the
    smaller label in a tie); within a label the draw is uniform. Only what training is given is
    used, never which examples are bad. Labels that are no integers make one stratum.
    """
    n = len(labels)
    if labels.ndim != 1 or labels.is_floating_point():
        labels = torch.zeros(n, dtype=torch.int64)
    order = torch.randperm(n, generator=generator)
    values, counts = torch.unique(labels, return_counts=True)
    # integers throughout: size·count/n rounded down, and what the rounding has left
    places, left = size * counts // n, size * counts % n
    spare = size - int(places.sum())
    places[torch.argsort(left, descending=True, stable=True)[:spare]] += 1
    shuffled = labels[order]
    chosen = [
        order[shuffled == value][:place]
        for value, place in zip(values.tolist(), places.tolist(), strict=True)
    ]
    return torch.cat(chosen).sort().values


def members_per_batch(subsets: Subsets, batch_size: int, members: int | None) -> Tensor:
    """k: how many members of each subset a P batch holds, ``(S,)``.

    max(1, round(m·|S|/n)) by default, the number that a random batch would hold, but never none;
    with ``members`` that number for all subsets that have as many.

    Raises:
        ValueError: k exceeds the batch, or S leaves too few examples for two disjoint batches.
    """
    sizes = subsets.sizes
    if members is None:
        k = (batch_size * sizes / subsets.n_train).round().long().clamp_min(1)
    else:
        if not 1 <= members <= batch_size:
            raise ValueError(
                f"members={members} must lie between 1 and the batch size {batch_size}; None takes "
                "max(1, round(m·|S|/n))"
            )
        k = torch.full_like(sizes, members)
    k = torch.minimum(k, sizes)
    short = (subsets.n_train - sizes) < (2 * batch_size - k)
    if bool(short.any()):
        first = int(short.nonzero()[0])
        raise ValueError(
            f"subset {subsets.keys[first]!r} leaves {subsets.n_train - int(sizes[first])} training "
            f"examples, but a P and a Q batch of {batch_size} need {2 * batch_size - int(k[first])}"
            " others; pass a smaller batch_size=… to the callback, or watch a smaller subset"
        )
    return k


@dataclass(frozen=True, eq=False)
class Draw:
    """The measurement batches of one step.

    Attributes:
        pool: ``(M,)`` positions, the shared pool.
        members, member_group: ``(K,)`` each: the members of groups that stand in P batches, and
            the number of the group that each stands for.
        singles: ``(W,)``; each stands in the P batch of its own subset.
        targets, target_group: ``(H,)`` each: the members over which a group's own observable is
            averaged (target ``self``), and their group. Drawn independently of ``members``.
        others_p, others_q, outside: ``(S, M)`` boolean over the pool: the others of the P batch,
            the Q batch, and everything that is not in S.
        batch_size: m.
    """

    pool: Tensor
    members: Tensor
    member_group: Tensor
    singles: Tensor
    targets: Tensor
    target_group: Tensor
    others_p: Tensor
    others_q: Tensor
    outside: Tensor
    batch_size: int

    @property
    def batch_ids(self) -> Tensor:
        """Pool, members: what the batches consist of besides single examples."""
        return torch.cat([self.pool, self.members])

    @property
    def target_ids(self) -> Tensor:
        """Singles, targets: the examples whose observable a subset's own target is made of."""
        return torch.cat([self.singles, self.targets])

    def batches(self, subset: int) -> tuple[Tensor, Tensor, Tensor]:
        """P batch, Q batch and targets of one subset, as positions."""
        group = subset - len(self.singles)
        own = self.singles[subset : subset + 1]
        targets = own
        if group >= 0:
            own = self.members[self.member_group == group]
            targets = self.targets[self.target_group == group]
        p = torch.cat([own, self.pool[self.others_p[subset]]])
        return p, self.pool[self.others_q[subset]], targets


def draw_batches(
    subsets: Subsets,
    k: Tensor,
    batch_size: int,
    generator: torch.Generator,
    *,
    pool_size: int,
    target_members: int,
) -> Draw:
    """Draw the measurement batches of one step.

    Args:
        subsets: what is watched.
        k: from ``members_per_batch``.
        batch_size: m.
        generator: the step's own stream.
        pool_size: least size of the pool; it grows when a subset finds too few outsiders in it.
        target_members: most members over which a group's observable is averaged; 0 for none.
    """
    n = subsets.n_train
    order = torch.randperm(n, generator=generator)
    size = min(pool_size, n)
    while True:
        pool = order[:size]
        outside = ~subsets.contain(pool)
        count = outside.sum(1)
        if bool((count >= 2 * batch_size - k).all()):
            break
        size = min(2 * size, n)  # ends: every subset has enough outsiders in the whole set
    # place of every outsider in the cyclic order that starts at the subset's own random offset
    reached = outside.cumsum(1)
    start = torch.randint(size, (len(subsets), 1), generator=generator)
    before = reached.gather(1, start) - outside.gather(1, start).long()
    place = (reached - before - 1) % count[:, None]
    others = (batch_size - k)[:, None]
    members, targets = [], []
    n_singles = len(subsets.singles)
    for number, group in enumerate(subsets.groups):
        members.append(_some(group, int(k[n_singles + number]), generator))
        targets.append(_some(group, target_members, generator))
    return Draw(
        pool=pool,
        members=_joined(members),
        member_group=_numbers(members),
        singles=subsets.singles,
        targets=_joined(targets),
        target_group=_numbers(targets),
        others_p=outside & (place < others),
        others_q=outside & (place >= others) & (place < others + batch_size),
        outside=outside,
        batch_size=batch_size,
    )


def _some(group: Tensor, count: int, generator: torch.Generator) -> Tensor:
    if count >= len(group):
        return group
    return group[torch.randperm(len(group), generator=generator)[:count]]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([torch.zeros(0, dtype=torch.int64), *parts])


def _numbers(parts: Sequence[Tensor]) -> Tensor:
    return _joined([torch.full((len(part),), g) for g, part in enumerate(parts)])
