"""Which configurations a declared range consists of, and what their cells are called.

A range is one grid or a list of them. A grid names options with lists of values and stands for
every combination; ``targets`` in it says for which targets it is meant (all by default). A
configuration is what it *changes* of the row's own options, so the row itself changes nothing and
is never declared twice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from fine_bench.errors import ConfigError
from fine_bench.types import TARGETS, VARIED

ONLY = "targets"


@dataclass(frozen=True, eq=False)
class Point:
    """One configuration of a range.

    Attributes:
        changes: option → value, where it is another than the row's own; never empty.
        targets: for which targets; empty for all.
    """

    changes: Mapping[str, Any]
    targets: frozenset[str] = frozenset()

    def serves(self, target: str) -> bool:
        """Whether it was declared for a target."""
        return not self.targets or target in self.targets


def label_of(changes: Mapping[str, Any]) -> str:
    """``observable=loss,refresh_every=5``, options by name; equal for equal changes only."""
    return ",".join(f"{name}={_word(changes[name])}" for name in sorted(changes))


def name_of(row: str, changes: Mapping[str, Any]) -> str:
    """What the cells of a configuration are called: ``fine@observable=loss``."""
    return f"{row}{VARIED}{label_of(changes)}"


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def points(declared: Any, own: Mapping[str, Any], where: str) -> list[Point]:
    """The configurations of a range, in the order of their declaration, each once.

    Args:
        declared: one grid or a list of grids.
        own: the row's options, with the defaults of those that it does not name.
        where: the range's name in messages.

    Raises:
        ConfigError: something that is no grid, or a range in which nothing changes.
    """
    grids = declared if isinstance(declared, list) else [declared]
    found: dict[str, Point] = {}
    for grid in grids:
        if not isinstance(grid, Mapping) or not set(grid) - {ONLY}:
            raise ConfigError(
                f"{where}={grid} is no grid; give lists of values by option, for instance "
                "{refresh_every: [5, 80]}"
            )
        for name, values in grid.items():
            if not isinstance(values, list) or not values:
                raise ConfigError(
                    f"{where}.{name}={values} must be a list of at least one value; type "
                    f"{name}: [{values if values not in ([], {}) else '…'}]"
                )
        targets = frozenset(map(str, grid.get(ONLY, ())))
        if targets - set(TARGETS):
            raise ConfigError(f"{where}.{ONLY}={sorted(targets)} must be some of {list(TARGETS)}")
        options = [str(name) for name in grid if name != ONLY]
        for values in product(*(grid[name] for name in options)):
            chosen = dict(zip(options, values, strict=True))
            changes = {k: v for k, v in chosen.items() if k not in own or own[k] != v}
            if not changes:
                continue
            label = label_of(changes)
            before = found.get(label)
            if before is not None:
                every = not before.targets or not targets
                merged = frozenset() if every else before.targets | targets
                found[label] = Point(changes, merged)
            else:
                found[label] = Point(changes, targets)
    if not found:
        raise ConfigError(
            f"{where} names only the values that the row has itself; give others, or leave it out"
        )
    return list(found.values())


def declared_for(found: Sequence[Point], target: str) -> list[dict[str, Any]]:
    """What a range changes for one target, as records keep it."""
    return [dict(point.changes) for point in found if point.serves(target)]
