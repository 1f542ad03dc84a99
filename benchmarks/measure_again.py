"""Metrics that records lack, from their stored scores: nothing is trained.

    python benchmarks/measure_again.py --task mnist_mlp mnist_mlp_interpolating [--results results]

A metric that is new, or a ground truth that was made after the runs, is missing from older records.
Where their scores are at hand, each gets a further revision: the same scores, cost and facts about
training, and every number that the code of today measures. A number that the record has already
must come out equal (to 1e-9 of its size, or the scores are not those of the record or the metric
has changed): otherwise the record is named and nothing is written for it. ``environment`` stays
that of the run, with ``measured_from`` (the revision) and ``measured_commit`` added, and ``dirty``
where either code had uncommitted changes. No data are made: the scores hold the truth about the
examples. Tasks of language models, whose metrics ask for more than that, are left out.

Exit status: 0, or 1 if a record could not be measured again.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fine_bench.metrics.registry import Given, measure
from fine_bench.retraining.truth import Truth
from fine_bench.retraining.truth_files import find, folders
from fine_bench.store.environment import environment
from fine_bench.store.records import RecordStore, newest
from fine_bench.store.scores import asked_about, carried_truth
from fine_bench.types import RunRecord

CLOSE = 1e-9
LANGUAGE = "fine_bench.llm"


def changed(then: Mapping[str, float], now: Mapping[str, float]) -> list[str]:
    """Names of numbers that are in both and not equal."""
    return [
        f"{name} {then[name]!r} → {now[name]!r}"
        for name in sorted(then.keys() & now.keys())
        if not (math.isnan(then[name]) and math.isnan(now[name]))
        and not math.isclose(then[name], now[name], rel_tol=CLOSE, abs_tol=CLOSE)
    ]


def measured(store: RecordStore, record: RunRecord, truth: Truth | None) -> dict[str, float]:
    """What today's code measures of a record's scores."""
    scores = store.load_scores(record)
    known = carried_truth(scores)
    asked = asked_about(known, scores.watched)
    rows = slice(None) if asked is None else asked
    reviewed = None if known is None else known.reviewed
    given = Given(
        values=scores.values[:, rows],
        target=record.target,
        end=record.end,
        is_bad=None if known is None else known.is_bad[rows],
        facts=record.training,
        reviewed=None if reviewed is None else reviewed[rows],
    )
    found = measure(given) if given.values.numel() else {}
    if truth is not None:
        found |= truth.metrics(scores.values, record.target, watched=scores.watched)
    return found


def again(
    store: RecordStore, record: RunRecord, truth: Truth | None, code: Mapping[str, Any]
) -> str:
    """A further revision of a record, if there is something to add; what became of it, in words."""
    found = measured(store, record, truth)
    if other := changed(record.metrics, found):
        return f"refused, {len(other)} numbers differ: {'; '.join(other[:3])}"
    if found.keys() <= record.metrics.keys():
        return ""
    origin = {"measured_from": record.revision, "measured_commit": str(code["commit"])}
    # scores of code with uncommitted changes stay such, whoever measures them
    dirty = record.environment.get("dirty") is True or code["dirty"]
    made = replace(
        record,
        metrics={**record.metrics, **found},
        environment={**record.environment, **origin, "dirty": dirty},
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
    code, failed, absent = environment(), 0, 0
    truths: dict[tuple[str, str], Truth | None] = {}
    for record in newest(store.scan().records):
        wanted = record.task in arguments.task and record.target in arguments.target
        target = str(record.config.get("task", {}).get("_target_", ""))
        if not wanted or record.status != "finished" or target.startswith(LANGUAGE):
            continue
        if not store.has_scores(record):
            absent += 1
            continue
        where = (record.data_sha256, record.setting)
        if where not in truths:
            truths[where] = find(folders(arguments.results), *where)
        said = again(store, record, truths[where], code)
        failed += said.startswith("refused")
        if said:
            print(f"{record.task} {record.estimator} {record.target} seed {record.seed}: {said}")
    print(f"{absent} records have no scores here")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
