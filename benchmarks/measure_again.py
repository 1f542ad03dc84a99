"""Metrics that records lack, from their stored scores: nothing is trained.

    python benchmarks/measure_again.py --task mnist_mlp mnist_mlp_interpolating [--results results]

A metric that is new, or a ground truth that was made after the runs, is missing from older records.
Where their scores are at hand, each gets a further revision: the same scores, cost and facts about
training, and every number that the code of today measures. A number that the record has already
must come out equal (to 1e-9 of its size, or the scores are not those of the record or the metric
has changed): otherwise the record is named and nothing is written for it. ``environment`` stays
that of the run, with ``measured_from`` (the revision) and ``measured_commit`` added.

Exit status: 0, or 1 if a record could not be measured again.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fine_bench.runner.backends.backend import backend_of
from fine_bench.runner.plan import Job
from fine_bench.runner.recorded import job_of
from fine_bench.store.environment import environment
from fine_bench.store.records import RecordStore, newest
from fine_bench.types import RunRecord

CLOSE = 1e-9


def changed(then: Mapping[str, float], now: Mapping[str, float]) -> list[str]:
    """Names of numbers that are in both and not equal."""
    return [
        f"{name} {then[name]!r} → {now[name]!r}"
        for name in sorted(then.keys() & now.keys())
        if not (math.isnan(then[name]) and math.isnan(now[name]))
        and not math.isclose(then[name], now[name], rel_tol=CLOSE, abs_tol=CLOSE)
    ]


def measured(store: RecordStore, record: RunRecord, job: Job) -> dict[str, float]:
    """What today's code measures of a record's scores."""
    scores = store.load_scores(record)
    found = backend_of(job).measure(job, scores.target, scores, record.training)
    if job.truth is not None:
        found |= job.truth.metrics(scores.values, record.target, watched=scores.watched)
    return found


def again(store: RecordStore, record: RunRecord, job: Job, code: Mapping[str, Any]) -> str:
    """A further revision of a record, if there is something to add; what became of it, in words."""
    found = measured(store, record, job)
    if other := changed(record.metrics, found):
        return f"refused, {len(other)} numbers differ: {'; '.join(other[:3])}"
    if found.keys() <= record.metrics.keys():
        return ""
    origin = {"measured_from": record.revision, "measured_commit": str(code["commit"])}
    made = replace(
        record,
        metrics={**record.metrics, **found},
        environment={**record.environment, **origin, "dirty": code["dirty"]},
    )
    store.save(made, store.load_scores(record))
    return f"{len(found.keys() - record.metrics.keys())} numbers added"


def main() -> int:
    """Measure, write, say."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--task", metavar="NAME", nargs="+", required=True)
    parser.add_argument("--target", metavar="NAME", nargs="+", default=["self", "validation"])
    parser.add_argument("--results", metavar="DIR", type=Path, default=Path("results"))
    arguments = parser.parse_args()
    store = RecordStore(arguments.results)
    code, jobs, failed, absent = environment(), dict[tuple[str, str, str], Job](), 0, 0
    for record in newest(store.scan().records):
        wanted = record.task in arguments.task and record.target in arguments.target
        if not wanted or record.status != "finished" or record.varies:
            continue
        if not store.has_scores(record):
            absent += 1
            continue
        where = (record.task, record.setting, record.data_sha256)
        if where not in jobs:
            jobs[where] = job_of(record)
        said = again(store, record, jobs[where], code)
        failed += said.startswith("refused")
        if said:
            print(f"{record.task} {record.estimator} {record.target} seed {record.seed}: {said}")
    print(f"{absent} records have no scores here")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
