"""What an auditor asks: how much could be told about a subset, and how sure is that?

Reads records and scores. Each run gives an interval of μ at the asked confidence, and what is said
is said of its ends: *at least* of the end nearer 0, *at most* of the farther one. An estimate
bounds nothing by itself, so a bound without an end of an interval is unknown, with the reason.

- *At least*, *at most*: what a reader of the one statistic can tell that the method tests.
- *All steps, at most*: a reader of that statistic at each of T steps, by composition of Gaussians:
  the farther end times √T. Where it lets everything be told it is left out, since it says nothing.

The interval of a group is computed from the samples of the run where its scores are at hand, so at
any confidence; else it is the record's own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.special import ndtri

from fine_bench.errors import DataError
from fine_bench.store.files import StoreError
from fine_bench.store.records import RecordStore
from fine_bench.terminal import visible
from fine_bench.theory.decision import Told, farther_end, nearer_end, told
from fine_bench.theory.estimation import Method, estimate_mu
from fine_bench.theory.families import GaussianTradeOff
from fine_bench.types import InfluenceScores, RunRecord

EPSILONS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
SAYS_NOTHING = 0.99
"""δ at every tabled ε from which a bound is left out."""

AS_STORED = (
    "the interval is the record's own, and the samples behind it are not at hand; in records made "
    "before the correlation from step to step was measured it is too short. Unpack the scores, or "
    "run estimator=fine_paper again, for one that has it in"
)
"""Said where an interval cannot be computed from samples."""

Kind = Literal["at least", "at most", "all steps, at most"]


@dataclass(frozen=True)
class Bound:
    """One bound on |μ|, or why there is none."""

    kind: Kind
    told: Told | None
    """What it lets tell; None where it is unknown or says nothing."""
    sentence: str
    delta: tuple[float, ...] = ()
    """δ at ``EPSILONS``."""


@dataclass(frozen=True)
class Evidence:
    """What one record says of a subset.

    Attributes:
        seed: run seed.
        mu: signed μ̂ of one statistic; NaN where nothing can be told.
        lower, upper: its interval at the asked confidence; infinite where an end is open.
        reason: why an end is open.
        root: √T by which a step's μ is composed to that of the run; None where it is not known.
        composed: an estimate of the composed μ that has no interval; None where there is none.
        note: what is to be known of the interval; empty for most.
    """

    seed: int
    mu: float
    lower: float
    upper: float
    reason: str = ""
    root: float | None = None
    composed: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Audit:
    """All evidence on a subset, with what was asked.

    Attributes:
        subject: the group or example, and of which task, target and method.
        evidence: of each run, by seed.
        confidence: of the intervals.
        alpha: type-I error at which type-II errors are told.
        at_delta: δ at which ε is told.
    """

    subject: Mapping[str, str]
    evidence: Sequence[Evidence]
    confidence: float = 0.95
    alpha: float = 0.05
    at_delta: float = 1e-5

    def bounds(self, item: Evidence) -> list[Bound]:
        """At least, at most, and over all steps."""
        return [self._at_least(item), self._at_most(item), self._all_steps(item)]

    def _at_least(self, item: Evidence) -> Bound:
        end = nearer_end(item.lower, item.upper)
        if end is not None:
            return self._known(
                "at least",
                abs(end),
                f"|mu| >= {abs(end):.4g}, the end of the interval nearer 0. Whoever reads this "
                "statistic can tell at least this much; a reader of more may tell more.",
            )
        if math.isinf(item.lower) and math.isinf(item.upper):
            return Bound("at least", None, f"unknown: {item.reason}")
        return Bound(
            "at least",
            None,
            f"unknown: the interval holds 0, so this statistic shows nothing at {self._level}",
        )

    def _at_most(self, item: Evidence) -> Bound:
        end = farther_end(item.lower, item.upper)
        if end is None:
            return Bound("at most", None, f"unknown: {item.reason}")
        return self._known(
            "at most",
            end,
            f"|mu| <= {end:.4g}, the farther end of the interval. Who reads this statistic and "
            "nothing else can tell no more.",
        )

    def _all_steps(self, item: Evidence) -> Bound:
        kind: Kind = "all steps, at most"
        end = farther_end(item.lower, item.upper)
        if item.composed is not None:
            return Bound(
                kind,
                None,
                f"unknown: the steps compose to mu = {item.composed:.4g}, an estimate of which no "
                "error is known",
            )
        if end is None:
            return Bound(kind, None, "unknown: there is no farther end to compose")
        if item.root is None:
            return Bound(kind, None, "unknown: the record does not tell the number of steps")
        return self._known(
            kind,
            end * item.root,
            f"mu <= {end * item.root:.4g}, the farther end times sqrt({item.root**2:.0f} steps). "
            "Who reads this statistic at every step can tell no more, if no step's mu lies beyond "
            "the interval.",
        )

    def _known(self, kind: Kind, mu: float, sentence: str) -> Bound:
        delta = tuple(GaussianTradeOff(mu).delta(np.array(EPSILONS)).tolist())
        if kind != "at least" and min(delta) > SAYS_NOTHING:
            return Bound(
                kind,
                None,
                f"says nothing: mu <= {mu:.4g} lets delta be {min(delta):.4g} at epsilon = "
                f"{EPSILONS[-1]:g}, that is, everything be told",
            )
        return Bound(kind, told(mu, self.alpha, self.at_delta), sentence, delta)

    @property
    def _level(self) -> str:
        return f"{100 * self.confidence:g} % confidence"

    # ------------------------------------------------------------------------------- looks

    def title(self) -> str:
        """One line: whom it is about, and how sure."""
        s = self.subject
        return (
            f"{s['kind']} {s['name']} of {s['task']}, target {s['target']}, by {s['estimator']}, "
            f"at {self._level}"
        )

    def _head(self, item: Evidence) -> str:
        if not math.isfinite(item.mu):
            return f"seed {item.seed}: mu cannot be told"
        if math.isinf(item.lower) and math.isinf(item.upper):
            return f"seed {item.seed}: mu = {item.mu:.4g}, no interval"
        return f"seed {item.seed}: mu = {item.mu:.4g} [{item.lower:.4g}, {item.upper:.4g}]"

    def _table(self, bounds: Sequence[Bound]) -> list[list[str]]:
        """Header and rows of what the known bounds let tell; nothing where none is known."""
        known = [(b, b.told) for b in bounds if b.told is not None]
        if not known:
            return []
        rows = [["", *(b.kind for b, _ in known)]]
        rows.append(
            [f"type-II error at type-I {self.alpha:g}", *(f"{t.type_2:.4g}" for _, t in known)]
        )
        rows.append(["both errors, when equal", *(f"{t.equal_errors:.4g}" for _, t in known)])
        rows.append(
            [f"epsilon at delta {self.at_delta:g}", *(f"{t.epsilon:.4g}" for _, t in known)]
        )
        for number, epsilon in enumerate(EPSILONS):
            rows.append(
                [f"delta at epsilon {epsilon:g}", *(f"{b.delta[number]:.4e}" for b, _ in known)]
            )
        return rows

    def to_text(self) -> str:
        """For the terminal."""
        lines = [self.title()]
        for item in self.evidence:
            bounds = self.bounds(item)
            lines += ["", self._head(item)]
            lines += [f"  note: {item.note}"] if item.note else []
            lines += [f"  {b.kind}: {b.sentence}" for b in bounds]
            rows = self._table(bounds)
            widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
            for row in rows:
                first, *others = (cell.rjust(w) for cell, w in zip(row, widths, strict=True))
                lines.append("  ".join(["  " + row[0].ljust(len(first)), *others]))
        return "\n".join(lines) + "\n"

    def to_markdown(self) -> str:
        """The same as Markdown."""
        lines = [f"# {self.title()}"]
        for item in self.evidence:
            bounds = self.bounds(item)
            lines += ["", f"## {self._head(item)}", ""]
            lines += [f"- *note*: {item.note}"] if item.note else []
            lines += [f"- *{b.kind}*: {b.sentence}" for b in bounds]
            rows = self._table(bounds)
            if rows:
                head, *body = rows
                lines += ["", f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
                lines += [f"| {' | '.join(row)} |" for row in body]
        return "\n".join(lines) + "\n"

    def to_json(self) -> str:
        """The same as JSON: what is unknown is null, with its sentence."""
        return (
            json.dumps(
                {
                    **self.subject,
                    "confidence": self.confidence,
                    "alpha": self.alpha,
                    "delta": self.at_delta,
                    "epsilons": EPSILONS,
                    "runs": [
                        {
                            "seed": item.seed,
                            "mu": _finite(item.mu),
                            "lower": _finite(item.lower),
                            "upper": _finite(item.upper),
                            "note": item.note,
                            "bounds": [_plain(bound) for bound in self.bounds(item)],
                        }
                        for item in self.evidence
                    ],
                },
                indent=2,
                allow_nan=False,
            )
            + "\n"
        )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plain(bound: Bound) -> dict[str, Any]:
    t = bound.told
    return {
        "kind": bound.kind,
        "sentence": bound.sentence,
        "mu": None if t is None else t.mu,
        "type_2": None if t is None else t.type_2,
        "equal_errors": None if t is None else t.equal_errors,
        "epsilon": None if t is None else _finite(t.epsilon),
        "deltas": None if t is None else list(bound.delta),
    }


def of_group(
    store: RecordStore, records: Iterable[RunRecord], group: str, confidence: float = 0.95
) -> list[Evidence]:
    """Evidence on a group from the records of the paper's estimator.

    Raises:
        DataError: no record has the group (the message names those that exist), or one lacks a
            number of it.
    """
    found, known = [], set()
    for record in records:
        names = {key.split("/")[1] for key in record.metrics if key.startswith("group/")}
        known |= names
        if group in names:
            keys = [f"group/{group}/{name}" for name in ("mu", "lower", "upper", "mu_run")]
            lacking = [key for key in keys if key not in record.metrics]
            if lacking:
                raise DataError(
                    f"the record of {record.estimator} seed {record.seed} lacks "
                    f"{', '.join(lacking)}: it was cut or edited; compute it again with force=true"
                )
            mu = record.metrics[keys[0]]
            lower, upper, reason, note = _group_interval(store, record, group, confidence)
            root = _root(record, group)
            found.append(Evidence(record.seed, mu, lower, upper, reason, root, note=note))
    if not found:
        raise DataError(
            f"no record holds the group {visible(repr(group))}; "
            + (f"there are: {', '.join(sorted(known))}" if known else "run estimator=fine_paper")
        )
    return sorted(found, key=lambda e: e.seed)


def _group_interval(
    store: RecordStore, record: RunRecord, group: str, confidence: float
) -> tuple[float, float, str, str]:
    """Interval at the asked confidence, why an end is open, and what is to be known of it."""
    options = record.config.get("estimator", {})
    options = options if isinstance(options, Mapping) else {}
    try:
        arms = _samples(store.load_scores(record), record.metrics.get(f"group/{group}/index"))
    except StoreError:
        arms = None
    if arms is not None:
        method: Method = "max" if options.get("selection", "split") == "max" else "two_stage"
        estimate = estimate_mu(*arms, method, confidence, correlated=True)
        return float(estimate.lower), float(estimate.upper), str(estimate.reason), ""
    lower, upper = (float(record.metrics[f"group/{group}/{end}"]) for end in ("lower", "upper"))
    level = float(options.get("level", 0.95))
    if not math.isclose(level, confidence):
        reason = (
            f"the record holds an interval of {100 * level:g} % and the samples behind it are not "
            f"at hand: type --confidence {level:g}, or unpack the scores "
            "(fine-bench publish --help)"
        )
        return -math.inf, math.inf, reason, ""
    note = "" if math.isinf(lower) and math.isinf(upper) else AS_STORED
    return lower, upper, "the run's samples leave this end of the interval open", note


def _samples(
    scores: InfluenceScores, index: float | None
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]] | None:
    """Both arms of group number ``index`` as they were tested; None where they were not kept."""
    extras = scores.extras
    if index is None or "trace/subset" not in extras:
        return None
    rows = (extras["trace/subset"] == -1 - int(index)).nonzero().flatten().tolist()
    if not rows:
        return None
    p, q = (extras[f"trace/{arm}"][rows[0]].double() for arm in "pq")
    if "trace/auxiliary" in extras:
        other = extras["trace/auxiliary"][rows[0]].double()
        p, q = p - other, q - other
    return p.numpy(), q.numpy()


def _root(record: RunRecord, group: str) -> float | None:
    """√T: what a record's groups were multiplied by, told by one whose μ is not 0."""
    names = sorted({key.split("/")[1] for key in record.metrics if key.startswith("group/")})
    for name in [group, *names]:
        mu, of_run = (record.metrics.get(f"group/{name}/{k}", math.nan) for k in ("mu", "mu_run"))
        if mu and math.isfinite(mu) and math.isfinite(of_run):
            return abs(of_run / mu)
    return None


def of_example(
    store: RecordStore, records: Iterable[RunRecord], example: int, confidence: float = 0.95
) -> list[Evidence]:
    """Evidence on one training example from the all-example f-INE scores.

    The interval is that of the stored standard error, which is meant for other seeds: it holds the
    mean μ over runs (``fine_bench.fine.standard_error``).

    Raises:
        DataError: no scores with a composed μ, or no such example.
        StoreError: scores cannot be read.
    """
    found = []
    for record in records:
        scores = store.load_scores(record)
        if "bound" not in scores.extras or scores.values.shape[0] != 1:
            continue
        n = scores.values.shape[1]
        if not 0 <= example < n:
            raise DataError(f"example {example} is out of range; the task has 0 … {n - 1}")
        if scores.watched is not None and example not in scores.watched:
            reason = (
                f"this run watched {len(scores.watched)} examples, and not this one; its score is "
                "no measurement"
            )
            found.append(Evidence(record.seed, math.nan, -math.inf, math.inf, reason))
            continue
        mu = float(scores.values[0, example])
        composed = float(scores.extras["bound"][0, example])
        error, reason = math.inf, "no standard error is stored; mu alone is an estimate, no bound"
        if scores.std_error is not None:
            error = float(scores.std_error[0, example])
            reason = "its standard error is infinite: it was observed less than twice"
        reach = float(ndtri(0.5 + 0.5 * confidence)) * error
        found.append(Evidence(record.seed, mu, mu - reach, mu + reach, reason, None, composed))
    if not found:
        raise DataError("no scores of f-INE with one row were found; run estimator=fine")
    return sorted(found, key=lambda e: e.seed)
