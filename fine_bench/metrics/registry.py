"""What a metric says of itself, beside its function, and who asks it.

A metric is one file. It is a function of what is known about one run's scores, with a declaration
above it::

    @metric(Metric("first_ten", "bad in first 10", better="higher", unit="examples"), needs=["bad"])
    def first_ten(given: Given) -> float:
        return float(given.bad[np.argsort(-given.suspicion)[:10]].sum())

Nothing lists it: metrics are found in the package ``fine_bench.metrics`` and in the module or
package ``metrics`` of every package that is named besides (``allow_packages`` of a run). The runner
computes it for every cell that has what it needs, records keep the number under its name, and the
leaderboard, the report and the figures take label, direction, unit and digits from here.

A number that is not computed from one run's scores (agreement between runs, what retraining shows,
seconds) is declared in ``METRICS`` of the file that holds its formula.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fine_bench.metrics._arrays import Vector, suspicion
from fine_bench.types import End

Better: TypeAlias = Literal["higher", "lower", ""]
Source: TypeAlias = Literal["metrics", "consistency", "cost"]
Compute: TypeAlias = "Callable[[Given], float | Mapping[str, float]]"
F = TypeVar("F", bound=Callable[..., Any])

ARROWS: Mapping[Better, str] = {"higher": "↑", "lower": "↓", "": ""}
OWN = "fine_bench"
HOME = "metrics"
"""The module or package in which a package's metrics are looked for."""

DETECTION = "detection"
BETWEEN_RUNS = "consistency over seeds, and cost"
STANDARD = (DETECTION, BETWEEN_RUNS)
"""Headings of the two tables that every setting has."""
FURTHER = "further metrics"


def stat_key(source: Source, name: str) -> str:
    """``auroc``, ``consistency_spearman``, ``cost_seconds``: a number's name in all tables."""
    return name if source == "metrics" else f"{source}_{name}"


@dataclass(frozen=True)
class Metric:
    """A number and how it is shown.

    Attributes:
        name: key in ``record.metrics`` or ``record.cost``, or of a comparison of runs.
        label: heading of a column.
        better: ``"higher"``, ``"lower"``, or ``""`` where neither is better; rows are then neither
            ranked nor compared by it.
        unit: of the number, empty for a pure one.
        digits: decimals; None for an amount of unknown size: three significant digits.
        source: where it comes from: a record's metrics, a comparison of runs, a record's cost.
        table: heading of the table that it is a column of; empty for none (it is in the csv alone).
            The tables of ``STANDARD`` stand everywhere, another shows the rows that have a number
            of its columns, and only the columns that one of them has.
        beside: key of another number of that table without which a row does not show this one.
        title: in full, for axes and captions; the label where it is empty.
        note: a sentence below tables that show it, for their readers.
        rank: place among the columns, ascending; those of other packages come last.
    """

    name: str
    label: str
    better: Better = ""
    unit: str = ""
    digits: int | None = 3
    source: Source = "metrics"
    table: str = FURTHER
    beside: str = ""
    title: str = ""
    note: str = ""
    rank: int = 1000

    def __post_init__(self) -> None:
        if not self.name or not self.label:
            raise ValueError(
                f"a metric needs a name and a label, got {self.name!r}, {self.label!r}"
            )
        if self.better not in ("higher", "lower", ""):
            raise ValueError(
                f'{self.name}: better must be "higher", "lower" or "", got {self.better!r}'
            )

    @property
    def key(self) -> str:
        """Name among a row's ``stats`` and in the csv."""
        return stat_key(self.source, self.name)

    @property
    def arrow(self) -> str:
        """Which way is better."""
        return ARROWS[self.better]

    @property
    def in_full(self) -> str:
        """The title, or the label where there is none."""
        return self.title or self.label


@dataclass(frozen=True, eq=False)
class Given:
    """What a metric may use: one run's scores of the examples that have one, and what is known.

    Where the truth is known of some examples only (``GroundTruth.known``), these are the n.

    Attributes:
        values: ``(n_query, n)`` scores, positive where training on an example lowers the loss.
        target: one of ``types.TARGETS``.
        end: the suspicious end of the scores.
        is_bad: ``(n,)`` boolean; None where nobody knows, or where the bad ones can have no effect.
        kind: of the task: ``"images"`` or ``"language"``.
        mu: ``(n,)`` influence of each example on its own margin by retraining, where it is known.
        facts: about the training run, by name.
        reviewed: ``(n,)`` boolean, the examples that people looked at; None where nobody made that
            difference.
    """

    values: Tensor
    target: str
    end: End
    is_bad: Tensor | None
    kind: str = "images"
    mu: NDArray[Any] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    reviewed: Tensor | None = None

    @cached_property
    def suspicion(self) -> Vector:
        """``(n,)``, high for suspicious: the mean over the queries, turned to the end."""
        return suspicion(self.values, self.end)

    @cached_property
    def bad(self) -> NDArray[np.bool_]:
        """``is_bad`` as an array, for metrics that need ``"bad"``."""
        if self.is_bad is None:
            raise ValueError('nobody knows the bad examples; declare needs=["bad"]')
        return np.asarray(self.is_bad.cpu().numpy(), dtype=np.bool_)

    @cached_property
    def has(self) -> frozenset[str]:
        """What a metric can ask for in ``needs``.

        ``"bad"`` (bad examples are known, and good ones), ``"reviewed"`` (so are those that people
        looked at), ``"mu"``, the target and the kind of task.
        """
        found = {self.target, self.kind}
        if self.is_bad is not None and 0 < int(self.is_bad.sum()) < len(self.is_bad):
            found.add("bad")
        if self.reviewed is not None:
            found.add("reviewed")
        if self.mu is not None:
            found.add("mu")
        return frozenset(found)


@dataclass(frozen=True)
class _Declaration:
    metrics: tuple[Metric, ...]
    needs: frozenset[str]


def metric(*declared: Metric, needs: Iterable[str] = ()) -> Callable[[F], F]:
    """Declare what a function of ``Given`` computes.

    Args:
        declared: the one number that it returns, or the several in the mapping that it returns by
            name (some of which may be left out).
        needs: what must be there, see ``Given.has``; without it the metric is left out.
    """
    if not declared:
        raise ValueError('metric() declares nothing; write @metric(Metric("name", "label"))')
    said = _Declaration(declared, frozenset([needs] if isinstance(needs, str) else needs))

    def mark(function: F) -> F:
        function.__dict__["declares"] = said
        return function

    return mark


def _home(package: str) -> Sequence[ModuleType]:
    """``package.metrics`` and, where it is a package, the modules in it; nothing without one."""
    try:
        if importlib.util.find_spec(f"{package}.{HOME}") is None:
            return ()
    except ModuleNotFoundError:  # no such package, or a single module, which holds no other
        return ()
    home = importlib.import_module(f"{package}.{HOME}")
    names = [module.name for module in pkgutil.iter_modules(getattr(home, "__path__", ()))]
    return [home, *(importlib.import_module(f"{home.__name__}.{name}") for name in sorted(names))]


def _functions(module: ModuleType) -> list[tuple[Compute, _Declaration]]:
    return [
        (item, said)
        for item in vars(module).values()
        if getattr(item, "__module__", "") == module.__name__
        and isinstance(said := getattr(item, "declares", None), _Declaration)
    ]


def _modules(packages: Iterable[str]) -> list[ModuleType]:
    return [module for package in dict.fromkeys((OWN, *packages)) for module in _home(package)]


def known(packages: Iterable[str] = ()) -> tuple[Metric, ...]:
    """All declared metrics, in the order of their columns.

    Args:
        packages: where to look besides ``fine_bench``.

    Raises:
        ValueError: two metrics share a name; names both files.
    """
    found: dict[str, tuple[Metric, str]] = {}
    for module in _modules(packages):
        declared = list(getattr(module, "METRICS", ()))
        declared += [one for _, said in _functions(module) for one in said.metrics]
        for one in declared:
            if one.key in found:
                raise ValueError(
                    f"two metrics are called {one.key}, in {found[one.key][1]} and in "
                    f"{module.__name__}; call one of them otherwise"
                )
            found[one.key] = (one, module.__name__)
    return tuple(sorted((one for one, _ in found.values()), key=lambda m: (m.rank, m.key)))


def together(packages: Iterable[str] = ()) -> tuple[frozenset[str], ...]:
    """Names in ``record.metrics`` that come together: of one function, or of one ``METRICS``.

    A whole block may be absent from a record, as may what its function left out; see
    ``leaderboard.completeness``.
    """
    blocks = []
    for module in _modules(packages):
        declared = [said.metrics for _, said in _functions(module)]
        for metrics in (*declared, getattr(module, "METRICS", ())):
            blocks.append(frozenset(one.name for one in metrics if one.source == "metrics"))
    return tuple(block for block in blocks if len(block) > 1)


def columns(packages: Iterable[str] = ()) -> tuple[Metric, ...]:
    """The metrics that are a column of a printed table, in order; see ``known``."""
    return tuple(one for one in known(packages) if one.table)


def named(name: str, packages: Iterable[str] = ()) -> Metric:
    """The metric of a key; one that nobody declared is called by its key and has no direction."""
    return next((m for m in known(packages) if m.key == name), Metric(name, name, table=""))


def measure(given: Given, packages: Iterable[str] = ()) -> dict[str, float]:
    """All metrics of one run's scores that have what they need, by name.

    Raises:
        ValueError: a metric failed, or returned a name that it does not declare; says which.
    """
    result: dict[str, float] = {}
    for module in _modules(packages):
        for function, said in _functions(module):
            if not said.needs <= given.has:
                continue
            where = f"{module.__name__}.{getattr(function, '__name__', '')}"
            try:
                found = function(given)
            except Exception as error:
                raise ValueError(f"{where}: {type(error).__name__}: {error}") from error
            declared = {one.name for one in said.metrics}
            numbers = found if isinstance(found, Mapping) else {said.metrics[0].name: found}
            if set(numbers) - declared:
                strange = ", ".join(sorted(set(numbers) - declared))
                raise ValueError(f"{where} returned {strange}, which it does not declare")
            result |= {name: float(value) for name, value in numbers.items()}
    return result
