"""Recomputing a record from its own configuration, and comparing what comes out.

A record holds the full configuration of one cell, so it can be computed again: the data are made
and compared by digest, one model is trained with the record's seed, and the estimator is asked
once more. *Equal* means: the scores bit for bit, and metrics and training facts with them. On
another machine that cannot be expected, and ``runner.machine_difference`` says whether what differs
is *within* what the machine explains; if it is not, the record is *different*. Commit, versions and
hardware are compared too, but do not decide: they explain.

What is never compared: seconds and memory, which no two runs share; agreement with other
estimators of the same run, which are not computed here; fidelity by another version of the ground
truth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from fine_bench.metrics.reliability import spearman
from fine_bench.retraining.truth_files import find, folders
from fine_bench.runner.execution import execute
from fine_bench.runner.machine_difference import Explanation, explain, row_of
from fine_bench.runner.plan import Job
from fine_bench.runner.recorded import cell_of, digests_of
from fine_bench.store.environment import environment
from fine_bench.store.files import StoreError, temporary_folder
from fine_bench.store.plausibility import FILES
from fine_bench.store.records import RecordStore
from fine_bench.types import InfluenceScores, RunRecord

FACTS = ("test_accuracy", "train_accuracy", "test_loss", "train_loss", "n_steps")
TRUTH_METRICS = ("fidelity", "lds", "truth_version")
OF_OTHERS = "agreement/"


@dataclass(frozen=True)
class Difference:
    """Something that is not equal: in the record, and now."""

    name: str
    then: str
    now: str

    def __str__(self) -> str:
        return f"{self.name}: {self.then} in the record, {self.now} now"


@dataclass(frozen=True)
class Verdict:
    """What recomputing a record showed.

    Attributes:
        record: the one that was verified.
        again: the one computed now; None when that was impossible.
        differences: what decides; empty for an equal record.
        circumstances: commit, versions and hardware that differ.
        notes: what was not compared, and why.
        compared: how many metrics and training facts are equal.
        explanation: whether the machine explains what differs; None where nothing does, or where
            nothing was computed.
    """

    record: RunRecord
    again: RunRecord | None
    differences: tuple[Difference, ...]
    circumstances: tuple[Difference, ...]
    notes: tuple[str, ...] = ()
    compared: int = 0
    explanation: Explanation | None = None

    @property
    def equal(self) -> bool:
        """Whether the record came out as it is."""
        return self.again is not None and not self.differences

    @property
    def outcome(self) -> Literal["equal", "within", "different"]:
        """The verdict in one word."""
        if self.equal:
            return "equal"
        holds = self.explanation is not None and self.explanation.holds
        return "within" if holds else "different"


@dataclass
class _Findings:
    differences: list[Difference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    compared: int = 0
    moved: list[tuple[str, float, float]] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    scores: tuple[InfluenceScores, InfluenceScores] | None = None

    def compare(self, name: str, then: Any, now: Any) -> None:
        if then == now or (_nan(then) and _nan(now)):
            self.compared += 1
            return
        rounded = isinstance(then, float) and isinstance(now, float)
        self.differ(name, repr(then), repr(now), number=rounded)
        if rounded:
            self.moved.append((name, then, now))

    def differ(self, name: str, then: str, now: str, *, number: bool = False) -> None:
        self.differences.append(Difference(name, then, now))
        if not number:
            self.others.append(name)


def _nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def results_of(path: Path) -> Path | None:
    """The results folder that a record's file lies in; None when it lies elsewhere."""
    parents = path.resolve().parents
    return parents[3] if len(parents) > 3 and parents[2].name == "records" else None


def verify(
    record: RunRecord,
    results: Path | None = None,
    *,
    allow_packages: Sequence[str] = (),
    files: Mapping[str, Path] = MappingProxyType({}),
    say: Callable[[str], None] = lambda _: None,
    busy: Callable[[str], AbstractContextManager[object]] = lambda _: nullcontext(),
) -> Verdict:
    """Compute a record again in a folder of its own and compare; nothing stored is touched.

    Args:
        record: a finished one.
        results: the results folder it comes from, for its scores and ground truths, if known.
        allow_packages: packages besides ``fine_bench`` and ``baselines`` that it may name.
        files: where the user's own files lie that the data came from; see ``recorded.cell_of``.
        say, busy: as in ``execution.execute``.

    Raises:
        ValueError: the record is failed or skipped.
        ConfigError, DataError: see ``recorded.cell_of``.
    """
    if record.status != "finished":
        raise ValueError(
            f"the record of {record.estimator} seed {record.seed} is {record.status} "
            f"({record.reason}); only a finished record holds values to compare"
        )
    with temporary_folder("verify") as folder:
        job = cell_of(record, folder, allow_packages, files)
        (cell,) = job.cells
        findings = _Findings()
        for what, then, now in (
            ("data", record.data_sha256, _data_of(job, record)),
            ("setting", record.setting, job.setting),
            ("estimator's configuration", record.estimator_hash, cell.estimator_hash),
            ("method version", record.version, cell.version),
        ):
            findings.compare(what, then, now)
        changed = _changed_files(record, job)
        # the digest of the data covers what training and queries hold, but not the test samples
        if findings.differences or any(file.name == "task.test_path" for file in changed):
            findings.differences[:0] = changed
            changed = []
        here = (*changed, *_circumstances(record.environment, environment()))
        if findings.differences:
            why = "not computed: another identity is another record"
            return Verdict(record, None, tuple(findings.differences), here, (why,))
        if results is not None:
            job = replace(job, truth=find(folders(results), job.data.sha256, job.setting))
        (outcome,) = execute(job, "verify", None, say, busy)
        again = outcome.record
        here = (*changed, *_circumstances(record.environment, again.environment))
        if again.status != "finished" or outcome.scores is None:
            findings.compare("status", record.status, f"{again.status}: {again.reason}")
            return Verdict(record, again, tuple(findings.differences), here)
        findings.compared = 0
        _compare_metrics(findings, record, again)
        _compare_scores(findings, record, again, results, outcome.scores)
        explanation = None
        if findings.differences:
            row = row_of(record, None if results is None else RecordStore(results))
            explanation = explain(
                record, again, findings.moved, findings.others, row, findings.scores
            )
        return Verdict(
            record,
            again,
            tuple(findings.differences),
            here,
            tuple(findings.notes),
            findings.compared,
            explanation,
        )


def _data_of(job: Job, record: RunRecord) -> str:
    """The digest of the data now, in the form that the record has."""
    return record.data_sha256 if job.made(record.data_sha256) else job.data_sha256


def _changed_files(record: RunRecord, job: Job) -> list[Difference]:
    """Files of the user's own that have other bytes than those that the record was made of."""
    then, now = digests_of(record.training.get(FILES)), digests_of(job.data.files)
    return [
        Difference(f"task.{option}", f"{sha[:12]}…", f"{now[option][:12]}…")
        for option, sha in then.items()
        if now.get(option, sha) != sha
    ]


def _circumstances(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    names = [name for name in (*then, *now) if name in then or name in now]
    return [
        Difference(name, str(then.get(name, "unknown")), str(now.get(name, "unknown")))
        for name in dict.fromkeys(names)
        if then.get(name) != now.get(name)
    ]


def _compare_metrics(findings: _Findings, record: RunRecord, again: RunRecord) -> None:
    versions = [r.metrics.get("truth_version") for r in (record, again)]
    other_truth = versions[0] != versions[1]
    for name, then in sorted(record.metrics.items()):
        if name.startswith(OF_OTHERS):
            continue
        if other_truth and name.startswith(TRUTH_METRICS):
            continue
        if name not in again.metrics:
            findings.differ(name, repr(then), "absent")
        else:
            findings.compare(name, then, again.metrics[name])
    if any(name.startswith(OF_OTHERS) for name in record.metrics):
        findings.notes.append(
            f"not compared: {OF_OTHERS}…, which needs the other estimators of the run"
        )
    if other_truth:
        words = ["none" if v is None else f"version {v:g}" for v in versions]
        findings.notes.append(
            f"not compared: fidelity and LDS; ground truth then: {words[0]}, now: {words[1]}"
        )
    for name in FACTS:
        if name in record.training and name in again.training:
            findings.compare(f"training: {name}", record.training[name], again.training[name])


def _compare_scores(
    findings: _Findings,
    record: RunRecord,
    again: RunRecord,
    results: Path | None,
    now: InfluenceScores,
) -> None:
    stored: InfluenceScores | None = None
    if results is None:
        findings.notes.append("the record lies in no results folder: no score file to look at")
    elif record.scores_file and not (results / "scores" / record.scores_file).is_file():
        findings.notes.append(f"the score file {record.scores_file} is not here: digests decide")
    else:
        try:
            stored = RecordStore(results).load_scores(record)
        except StoreError as error:
            findings.differ("score file", str(error), "whole")
    if record.scores_sha256 == again.scores_sha256:
        return
    digests = (f"{r.scores_sha256[:12]}…" for r in (record, again))
    findings.differ("scores", *digests, number=True)
    if stored is not None:
        findings.notes.append(distance(stored, now))
        if stored.watched_values.shape == now.watched_values.shape:
            findings.scores = (stored, now)
        else:
            findings.others.append("the scores' shape")


def distance(then: InfluenceScores, now: InfluenceScores) -> str:
    """How far two score matrices of one cell are apart, in words."""
    a, b = (s.watched_values.double().numpy() for s in (then, now))
    if a.shape != b.shape:
        return f"scores: shape {a.shape} in the record, {b.shape} now"
    differ = int((a != b).sum())
    spread = float(a.std())
    text = (
        f"scores: {differ:,} of {a.size:,} values differ, at most by "
        f"{float(np.abs(a - b).max()):.3g} (the scores' standard deviation is {spread:.3g})"
    )
    rows = [spearman(x, y) for x, y in zip(a, b, strict=True)]
    return f"{text}; Spearman {float(np.mean(rows)):.6f}"
