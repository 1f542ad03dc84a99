"""Fidelity of stored scores to a ground truth that was made after them: nothing is trained.

    python benchmarks/score_records.py --task mnist_atypical [--target self] [--results results]

Every finished cell of the task is scored as ``fine-bench score`` would, on the published
half of the truth; the table has one line a row of the leaderboard: mean over seeds of the fidelity
(Spearman's correlation with the μ that retraining shows), of the same over the ceiling that the
truth's noise sets, and of the average precision at the examples that the task marks. Rows that
score a sample of the examples are left out. Writes
``fidelity--TASK.csv`` and ``.md`` into the results folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from fine_bench.retraining.truth_files import find, folders
from fine_bench.store.files import write_atomic
from fine_bench.store.records import RecordStore
from fine_bench.store.spreadsheet import to_csv


def table(results: Path, task: str, target: str) -> tuple[pd.DataFrame, float]:
    """One line a cell, and the ceiling of the truth."""
    store = RecordStore(results)
    lines, ceiling = [], float("nan")
    newest = {}
    for record in store.scan().records:
        if (record.task, record.target, record.status) == (task, target, "finished"):
            key = (record.estimator, record.estimator_hash, record.seed)
            if key not in newest or newest[key].revision < record.revision:
                newest[key] = record
    for record in newest.values():
        truth = find(folders(results), record.data_sha256, record.setting)
        if truth is None:
            raise SystemExit(
                f"no ground truth of {task}, setting {record.setting[:8]}, in {results}; build a "
                "bank and freeze it: fine-bench bank, fine-bench truth"
            )
        scores = store.load_scores(record)
        if scores.watched is not None:  # a sample of the examples: no rank among all of them
            continue
        values = scores.values
        found = truth.metrics(values, target, "published")
        lines.append(
            {
                "method": record.estimator,
                "seed": record.seed,
                "fidelity": found["fidelity"],
                "of_ceiling": found["fidelity_of_ceiling"],
                "average_precision": record.metrics.get("average_precision", float("nan")),
            }
        )
        ceiling = found["fidelity"] / found["fidelity_of_ceiling"] if found["fidelity"] else ceiling
    if not lines:
        raise SystemExit(f"no finished cells of {task}, target {target}, in {results}")
    return pd.DataFrame(lines), ceiling


def main() -> None:
    """Score, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", required=True)
    parser.add_argument("--target", default="self")
    parser.add_argument("--results", type=Path, default=Path("results"))
    arguments = parser.parse_args()
    cells, ceiling = table(arguments.results, arguments.task, arguments.target)
    columns = ["fidelity", "of_ceiling", "average_precision"]
    groups = cells.groupby("method")[columns]
    frame = groups.mean().join(groups.size().rename("n")).sort_values("fidelity", ascending=False)
    stem = arguments.results / f"fidelity--{arguments.task}"
    ordered = cells.sort_values(["method", "seed"])
    write_atomic(stem.with_suffix(".csv"), to_csv(ordered, float_format="%.4f").encode())
    rows = ["| method | n | fidelity ↑ | of ceiling ↑ | avg. precision ↑ |"]
    rows.append("| --- | ---: | ---: | ---: | ---: |")
    for method, line in frame.iterrows():
        numbers = [f"{line[name]:.3f}" if pd.notna(line[name]) else "undefined" for name in columns]
        rows.append(f"| {method} | {int(line['n'])} | {' | '.join(numbers)} |")
    text = (
        f"# Fidelity to retraining: {arguments.task}, target {arguments.target}\n\n"
        f"Made by `python benchmarks/score_records.py --task {arguments.task}` from stored scores; "
        f"means over n run seeds. The truth's noise allows at most {ceiling:.3f}.\n\n"
    )
    write_atomic(stem.with_suffix(".md"), (text + "\n".join(rows) + "\n").encode())
    print(text + "\n".join(rows))


if __name__ == "__main__":
    main()
