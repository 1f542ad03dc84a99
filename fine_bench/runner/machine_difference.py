"""Whether another machine explains that a record came out differently.

Sums of floating-point numbers are rounded in the order in which an instruction set, a number of
threads and a library make them, and a training makes the rounding grow: on another kind of
processor the same seed ends at slightly other weights. At worst the run is then as different as one
with another seed, never more so. That is the yardstick: a number of the record is explained when it
moved by no more than two seeds of its row may differ,

    |now − then| ≤ t(0.975, R − 1) · √2 · s,

s the standard deviation over the R ≥ 3 seeds of the row, in which the number of now stands in the
place of the one that is in doubt, and t the quantile of Student's distribution (exceeded by one
pair of seeds in twenty); the scores, when they agree with the stored ones at least as well as the
two seeds of the row that agree least. Counts are not rounded: they must be equal. It takes a
difference that can move bits (``store.environment.BITS``): on the same machine nothing is
explained.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import t as student

from fine_bench.metrics.detection import suspicion
from fine_bench.metrics.intervals import Interval, mean_interval
from fine_bench.metrics.reliability import spearman
from fine_bench.store.comparisons import Consistency
from fine_bench.store.environment import BITS
from fine_bench.store.record_json import IDENTITY, key_of
from fine_bench.store.records import RecordStore, newest
from fine_bench.types import InfluenceScores, RunRecord

MIN_SEEDS = 3
"""Two have one difference, which shows no spread of differences."""
LEVEL = 0.95
_ROW = tuple(name for name in IDENTITY if name != "seed")
_NOT_RECORDED = "not in the record"


@dataclass(frozen=True)
class Change:
    """A number that came out otherwise, beside what seeds do to it.

    Attributes:
        name: of the metric, or of the fact about the training.
        then, now: in the record, and computed now.
        interval: mean over the recorded seeds of the row with its 95 % interval.
        limit: what two seeds may differ by; NaN where nobody knows.
    """

    name: str
    then: float
    now: float
    interval: Interval
    limit: float

    @property
    def size(self) -> float:
        """How far it moved."""
        return abs(self.now - self.then)

    @property
    def explained(self) -> bool:
        """Whether another seed may move it as far."""
        return self.size <= self.limit

    def __str__(self) -> str:
        _, lower, upper = self.interval
        seeds = f"interval over seeds [{lower:.4g}, {upper:.4g}], two seeds differ by up to"
        return (
            f"{self.name}: {self.then:.4g} in the record, {self.now:.4g} now, moved by "
            f"{self.size:.2g} ({seeds} {self.limit:.2g})"
        )


@dataclass(frozen=True)
class Explanation:
    """Whether a difference of machine explains all that differs.

    Attributes:
        causes: what differs or is not in the record, of the things that move bits.
        changes: every number that differs.
        correlation: Spearman of the scores then and now; NaN without the stored scores.
        least: the lowest Spearman between two recorded seeds of the row; NaN where none is known.
        seeds: how many recorded seeds the row has.
        against: why it is no explanation; empty when it is one.
    """

    causes: tuple[str, ...]
    changes: tuple[Change, ...]
    correlation: float
    least: float
    seeds: int
    against: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.against


@dataclass(frozen=True)
class Row:
    """The recorded seeds of a record's row, and how their scores agree.

    Attributes:
        records: newest revision of each finished seed, the verified record's own for its seed.
        agreement: Spearman of the pairs of them that were compared.
    """

    records: tuple[RunRecord, ...]
    agreement: tuple[float, ...]


def row_of(record: RunRecord, store: RecordStore | None) -> Row:
    """What a results folder knows of the other seeds of a record's row."""
    if store is None:
        return Row((record,), ())
    scan = store.scan()
    found = {
        other.seed: other
        for other in newest(scan.records)
        if other.status == "finished" and key_of(other, _ROW) == key_of(record, _ROW)
    }
    found[record.seed] = record
    shas = {other.scores_sha256 for other in found.values()}
    return Row(tuple(found[seed] for seed in sorted(found)), _agreement(scan.consistency, shas))


def _agreement(compared: Iterable[Consistency], shas: set[str]) -> tuple[float, ...]:
    pairs: dict[tuple[str, str], float] = {}
    for one in compared:
        for (a, b), values in one.pairs.items():
            both = (one.scores[a], one.scores[b])
            if shas.issuperset(both) and math.isfinite(values.get("spearman", math.nan)):
                pairs[both] = values["spearman"]
    return tuple(pairs.values())


def causes(record: RunRecord, now: Mapping[str, object]) -> tuple[str, ...]:
    """What of the things that move bits differs, or may differ since the record lacks it."""
    then = record.environment
    lines = [
        f"{name}: {then[name]} in the record, {now[name]} now"
        for name in BITS
        if name in then and name in now and then[name] != now[name]
    ]
    lacking = [name for name in BITS if name not in then and name in now]
    return (*lines, *([f"{_NOT_RECORDED}: {', '.join(lacking)}"] if lacking else []))


def explain(
    record: RunRecord,
    again: RunRecord,
    moved: Sequence[tuple[str, float, float]],
    others: Sequence[str],
    row: Row,
    scores: tuple[InfluenceScores, InfluenceScores] | None,
) -> Explanation:
    """Hold what differs against what seeds do.

    Args:
        record, again: then and now.
        moved: name, then and now of each number that differs; facts as ``"training: NAME"``.
        others: what differs besides and is no number: nothing explains it.
        row: the recorded seeds.
        scores: the stored ones and those of now; None where the stored ones are not at hand.
    """
    found = causes(record, again.environment)
    changes = tuple(change(name, then, now, row.records, record.seed) for name, then, now in moved)
    against = [f"{name} is nothing that a machine rounds" for name in others]
    if not found:
        against.append("the machine is the same: nothing that moves bits differs")
    if moved and len(row.records) < MIN_SEEDS:
        against.append(
            f"only {len(row.records)} recorded seeds of this row are at hand, and {MIN_SEEDS} are "
            "needed to say how far another seed moves a number; name the results folder that "
            "holds them with --results DIR"
        )
    else:
        against += [f"{c.name} moved farther than seeds do" for c in changes if not c.explained]
    correlation, least = math.nan, min(row.agreement, default=math.nan)
    if scores is not None:
        correlation = _correlation(record, *scores)
        if correlation < least:
            against.append(
                f"the scores agree less (Spearman {correlation:.4f}) than any two seeds of the "
                f"row do ({least:.4f})"
            )
    if not moved and not math.isfinite(least - correlation):
        against.append(
            "neither a number nor compared scores say how large the difference is; unpack the "
            "archive of scores with `fine-bench publish --unpack ARCHIVE`"
        )
    return Explanation(found, changes, correlation, least, len(row.records), tuple(against))


def change(name: str, then: float, now: float, row: Sequence[RunRecord], seed: int) -> Change:
    """One number that moved, beside what the seeds of its row do to it."""
    fact = name.removeprefix("training: ")
    values: dict[int, float] = {}
    for record in row:
        value = (record.training if fact != name else record.metrics).get(fact)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            values[record.seed] = float(value)
    values[seed] = now  # what is in doubt does not widen its own limit
    if len(values) < MIN_SEEDS or not math.isfinite(now):
        return Change(name, then, now, Interval(math.nan, math.nan, math.nan), math.nan)
    limit = two_seeds_differ_by(list(values.values()))
    return Change(name, then, now, mean_interval(values), limit)


def two_seeds_differ_by(values: Sequence[float]) -> float:
    """What two further seeds differ by in all but one case of twenty; see the module's text."""
    n, mean = len(values), math.fsum(values) / len(values)
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (n - 1))
    return float(student.ppf((1 + LEVEL) / 2, n - 1)) * math.sqrt(2) * deviation


def _correlation(record: RunRecord, then: InfluenceScores, now: InfluenceScores) -> float:
    """Spearman of one suspicion an example, as seeds are compared; NaN for other shapes."""
    a, b = (suspicion(scores.watched_values, record.end) for scores in (then, now))
    return spearman(a, b) if a.shape == b.shape else math.nan
