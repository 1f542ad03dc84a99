"""Which group steers the queries? Subset f-INE with its interval, beside summed scores.

    python benchmarks/groups.py [--results results] [--task mnist_backdoor mnist_duplicates]

Reads finished records of target validation and their scores, trains nothing, and writes groups.csv
and groups.md into the results folder: for every group of the task f-INE's μ with an interval
(``fine_bench.metrics.groups``), and for every method how far the group's sum stands from random
groups of its size, and how suspicious its members look one by one.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from torch import Tensor

from fine_bench.errors import ConfigError, DataError
from fine_bench.metrics.groups import between_runs, group_influence, refuse_overlaps, standing
from fine_bench.runner.recorded import job_of
from fine_bench.store.files import StoreError, write_atomic
from fine_bench.store.records import RecordStore, newest
from fine_bench.store.spreadsheet import to_csv
from fine_bench.types import End, InfluenceScores, RunRecord

Row = dict[str, object]


def rows_of(
    store: RecordStore,
    records: Sequence[RunRecord],
    groups: Mapping[str, Tensor],
    end: End,
) -> list[Row]:
    """The groups by one method, over its runs."""
    first = records[0]
    runs: list[InfluenceScores] = [store.load_scores(r) for r in records]
    if any(s.watched is not None or len(s.values) != 1 for s in runs):
        return []
    found: list[Row] = []
    for name, members in groups.items():
        stands = [standing(s.values[0], members, end) for s in runs]
        row: Row = {
            "task": first.task,
            "setting": first.setting[:8],
            "estimator": first.estimator,
            "estimator_hash": first.estimator_hash[:8],
            "group": name,
            "size": len(members),
            "n_seeds": len(runs),
            "total": float(np.mean([s.total for s in stands])),
            "z": float(np.mean([s.z for s in stands])),
            "z_least": float(np.min([s.z for s in stands])),
            "median_member": float(np.mean([s.median_member for s in stands])),
            "least_member": float(np.mean([s.least_member for s in stands])),
        }
        if all(s.std_error is not None for s in runs):
            influences = [group_influence(s, members) for s in runs]
            row |= {
                "mu_run": influences[0].mu,
                "mu_run_lower": influences[0].lower,
                "mu_run_upper": influences[0].upper,
            }
            if len(runs) > 1:
                mean = between_runs([i.mu for i in influences])
                row |= {"mu": mean.mean, "mu_lower": mean.lower, "mu_upper": mean.upper}
        found.append(row)
    return found


def measure(store: RecordStore, records: Sequence[RunRecord], task: str) -> list[Row]:
    """All methods of a task on target validation.

    Raises:
        ValueError: no scores, no groups, or groups that overlap.
    """
    mine = [
        r
        for r in records
        if (r.task, r.target, r.status) == (task, "validation", "finished") and r.scores_sha256
    ]
    if not mine:
        raise ValueError(
            f"there are no finished records of {task} on target validation below {store.records}; "
            f"make some with `python -m fine_bench +experiment={task}`"
        )
    by_key: dict[tuple[str, str, str, str], list[RunRecord]] = {}
    for r in sorted(mine, key=lambda r: r.seed):
        key = (r.setting, r.data_sha256, r.estimator, r.estimator_hash)
        by_key.setdefault(key, []).append(r)
    found: list[Row] = []
    for key in sorted(by_key):
        job = job_of(by_key[key][0])
        if not job.data.groups:
            raise ValueError(f"task {task} has no groups; try mnist_backdoor or mnist_duplicates")
        refuse_overlaps(job.data.groups, job.data.n_train)
        found += rows_of(store, by_key[key], job.data.groups, job.end("validation"))
    return found


def markdown(table: pd.DataFrame, ends: Mapping[str, End], command: str) -> str:
    """The tables with what is to be known about them."""
    text = [
        "# Groups: which one steers the queries?",
        "",
        f"Rebuilt from records and scores by `{command}`.",
        "",
        "*μ*: f-INE of the whole group, the sum of its members' (`fine_bench.metrics.groups`), "
        "mean over runs with Student's interval over them; *one run*: seed 0 with an interval that "
        "holds for any dependence between the members' errors. *z*: how many standard deviations "
        "the group's summed score lies beyond random groups of its size, towards the suspicious "
        "end, mean over runs. *Members*: share of all examples that are less suspicious than the "
        "group's median member, and than its least suspicious one. Errors of groups that are "
        "measured, and how often their intervals hold: `group_coverage.md`.",
    ]
    for task, part in table.groupby("task", sort=False):
        text += ["", f"## {task}", "", f"Suspicious end of validation scores: {ends[str(task)]}."]
        for name, lines in part.groupby("group", sort=False):
            text += ["", f"### {name} ({lines['size'].iloc[0]} examples)", ""]
            text.append(
                "| method | μ over runs | μ, one run | z | members: median | least | runs |"
            )
            text.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
            hashes = lines.groupby("estimator")["estimator_hash"].nunique()
            for line in lines.sort_values("z", ascending=False).to_dict("records"):
                label = str(line["estimator"])
                if hashes[label] > 1:
                    label += f" ({line['estimator_hash']})"
                text.append(
                    f"| {label} | {_interval(line, 'mu')} | {_interval(line, 'mu_run')} | "
                    f"{_number(line['z'], '.1f')} | {line['median_member']:.3f} | "
                    f"{line['least_member']:.3f} | {line['n_seeds']} |"
                )
    return "\n".join(text) + "\n"


def _number(value: float, form: str) -> str:
    return "–" if value != value else format(value, form)


def _interval(line: Mapping[object, float], name: str) -> str:
    mean = line.get(name, float("nan"))
    if mean != mean:
        return "–"
    return f"{mean:.2f} [{line[name + '_lower']:.2f}, {line[name + '_upper']:.2f}]"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write; 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="Exit status: 0 done; 2 bad input."
    )
    parser.add_argument("--results", metavar="DIR", type=Path, default=Path("results"))
    parser.add_argument(
        "--task", metavar="NAME", nargs="+", default=["mnist_backdoor", "mnist_duplicates"]
    )
    given = sys.argv[1:] if argv is None else list(argv)
    arguments = parser.parse_args(given)
    store = RecordStore(arguments.results)
    records = newest(store.scan().records)
    found: list[Row] = []
    ends: dict[str, End] = {}
    try:
        for task in arguments.task:
            found += measure(store, records, task)
            ends[task] = next(r.end for r in records if (r.task, r.target) == (task, "validation"))
    except (ValueError, StoreError, ConfigError, DataError) as error:
        print(error, file=sys.stderr)
        return 2
    table = pd.DataFrame(found)
    command = shlex.join(["python", "benchmarks/groups.py", *given])
    for name, content in (
        ("groups.csv", to_csv(table)),
        ("groups.md", markdown(table, ends, command)),
    ):
        write_atomic(arguments.results / name, content.encode())
        print(f"written: {arguments.results / name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
