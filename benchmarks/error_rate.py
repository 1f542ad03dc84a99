"""Does the error rate hold? Trusted sets drawn again and again, against planted truth.

    python benchmarks/error_rate.py [--results results] [--task NAME …] [--trusted 200 500]
        [--levels 0.05 0.1] [--draws 20]

Reads finished records and their scores, trains nothing, and writes error_rate.csv and
error_rate.md into the results folder: for every task, method and target the mean false discovery
proportion at each level with its interval, the power, and how well two runs agree on what to flag.
Trusted examples are drawn at random, as the rate asks for, and in two ways that break it.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
from rich.console import Console
from rich.progress import Progress

from fine_bench.errors import ConfigError, DataError
from fine_bench.metrics.error_rate import MIN_DRAWS, NOISY_SHARE, Choice, Mask, Rate, repeated
from fine_bench.store.files import StoreError, write_atomic
from fine_bench.store.records import RecordStore, newest
from fine_bench.store.spreadsheet import to_csv
from fine_bench.types import TARGETS, InfluenceScores, RunRecord

TRUTH = "truth/is_bad"
TITLES = {
    "random": (
        "Trusted examples drawn at random from the good ones",
        "What the error rate asks for: the mean false share must not exceed the level.",
    ),
    "easy": (
        "Trusted examples drawn from the less suspicious half of the good ones",
        "What happens when a person picks clear cases. No rate is promised here.",
    ),
    "noisy": (
        f"{NOISY_SHARE:.0%} of the trusted examples are bad, the others drawn at random",
        "What happens when verification errs: bad examples hide behind bad trusted ones.",
    ),
}


@dataclass(frozen=True)
class Line:
    """One row of the table."""

    task: str
    setting: str
    estimator: str
    estimator_hash: str
    target: str
    choice: str
    rate: Rate


def groups(records: Sequence[RunRecord]) -> Iterator[list[RunRecord]]:
    """Finished records that differ in their run seed only."""
    by_key: dict[tuple[object, ...], list[RunRecord]] = {}
    for r in records:
        if r.status == "finished":
            key = (r.task, r.setting, r.data_sha256, r.target, r.estimator, r.estimator_hash)
            by_key.setdefault(key, []).append(r)
    for key in sorted(by_key, key=str):
        yield sorted(by_key[key], key=lambda r: r.seed)


def truth_of(record: RunRecord, scores: InfluenceScores) -> Mask:
    """Which examples are bad: beside the scores, else from the task's data, built again."""
    if TRUTH in scores.extras:
        return np.asarray(scores.extras[TRUTH], dtype=np.bool_)
    from fine_bench.runner.recorded import job_of

    return np.asarray(job_of(record).data.truth.is_bad, dtype=np.bool_)


def measure(
    store: RecordStore,
    records: Sequence[RunRecord],
    sizes: Sequence[int],
    levels: Sequence[float],
    n_draws: int,
) -> tuple[list[Line], list[str]]:
    """Lines of one method and target, and why some are missing."""
    first = records[0]
    name = f"{first.task}: {first.estimator}, target {first.target}"
    scores = {r.seed: store.load_scores(r) for r in records}
    bad = truth_of(first, scores[first.seed])
    watched = scores[first.seed].watched
    if watched is not None:
        if any(s.watched is None or not s.watched.equal(watched) for s in scores.values()):
            return [], [f"{name}: its runs scored different samples; left out"]
        bad = bad[watched.numpy()]
    if not bad.any():
        return [], [f"{name}: no bad example is known; left out"]
    lines, left_out = [], []
    for size in sizes:
        if 2 * size > int((~bad).sum()):
            left_out.append(
                f"{name}: {size} trusted are too many for {int((~bad).sum())} good examples"
            )
            continue
        for choice in get_args(Choice) if size == min(sizes) else ("random",):
            rates = repeated(
                {seed: s.watched_values for seed, s in scores.items()},
                bad,
                n_trusted=size,
                levels=levels,
                end=first.end,
                n_draws=n_draws,
                choice=choice,
            )
            lines += [
                Line(
                    first.task,
                    first.setting[:8],
                    first.estimator,
                    first.estimator_hash[:8],
                    first.target,
                    choice,
                    rate,
                )
                for rate in rates
            ]
    return lines, left_out


def frame(lines: Sequence[Line]) -> pd.DataFrame:
    """One row a line, numbers in full."""
    return pd.DataFrame(
        [
            {
                "task": line.task,
                "setting": line.setting,
                "estimator": line.estimator,
                "estimator_hash": line.estimator_hash,
                "target": line.target,
                "trusted": line.choice,
                "level": line.rate.level,
                "n_trusted": line.rate.n_trusted,
                "n_tested": line.rate.n_tested,
                "n_draws": line.rate.n_draws,
                "n_seeds": line.rate.n_seeds,
                "mean_flagged": line.rate.flagged,
                "false_share": line.rate.false_share.mean,
                "false_share_lower": line.rate.false_share.lower,
                "false_share_upper": line.rate.false_share.upper,
                "power": line.rate.power,
                "jaccard": line.rate.jaccard,
            }
            for line in lines
        ]
    )


def markdown(lines: Sequence[Line], left_out: Sequence[str], command: str) -> str:
    """The tables with what is to be known about them, and the command that made them."""
    text = [
        "# Error rate for deleting data",
        "",
        f"Rebuilt from records and scores by `{command}`.",
        "",
        "Conformal p-values against the trusted examples, then Benjamini–Hochberg at the level. "
        "*False share*: share of the flagged examples that are good, 0 when nothing is flagged; "
        "mean over the draws of the trusted set (each used with every run seed) with a 95 % "
        "interval over draws. *Power*: share of the untrusted bad examples that are flagged. "
        "*Jaccard*: of the sets that two run seeds flag with the same trusted examples. "
        "**Bold**: the whole interval lies above the level.",
    ]
    for choice, (title, what) in TITLES.items():
        mine = [line for line in lines if line.choice == choice]
        if not mine:
            continue
        text += ["", f"## {title}", "", what, ""]
        if choice != "random":
            top = max(line.rate.level for line in mine)
            mine = [line for line in mine if line.rate.level == top]
            text[-2] += " The highest level and the fewest trusted only; the csv has all levels."
        header = "task (setting) | target | estimator | trusted | level | flagged | false share"
        text.append(f"| {header} | power | Jaccard | draws × seeds |")
        text.append("| --- | --- | --- |" + " ---: |" * 7)
        mine.sort(
            key=lambda e: (
                e.task, e.setting, TARGETS.index(e.target), e.rate.n_trusted, e.rate.level,
                -e.rate.power, e.estimator, e.estimator_hash,
            )
        )  # fmt: skip
        hashes: dict[tuple[str, str, str], set[str]] = {}
        for e in mine:
            hashes.setdefault((e.task, e.setting, e.estimator), set()).add(e.estimator_hash)
        for line in mine:
            rate, share = line.rate, line.rate.false_share
            number = f"{share.mean:.3f}" if not rate.exceeded else f"**{share.mean:.3f}**"
            jaccard = "–" if math.isnan(rate.jaccard) else f"{rate.jaccard:.2f}"
            several = len(hashes[line.task, line.setting, line.estimator]) > 1
            name = f"{line.estimator} ({line.estimator_hash})" if several else line.estimator
            text.append(
                f"| {line.task} ({line.setting}) | {line.target} | {name} | {rate.n_trusted} | "
                f"{rate.level:g} | {rate.flagged:.0f} | {number} [{share.lower:.3f}, "
                f"{share.upper:.3f}] | {rate.power:.3f} | {jaccard} | "
                f"{rate.n_draws} × {rate.n_seeds} |"
            )
    if left_out:
        text += ["", "Left out:", "", *[f"- {line}" for line in left_out]]
    return "\n".join(text) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write; 0 done, 1 the rate did not hold somewhere, 2 nothing to read."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Exit status: 0 the level held for every method with trusted examples drawn at "
        "random; 1 it did not, or scores could not be read; 2 bad input.",
    )
    parser.add_argument("--results", metavar="DIR", type=Path, default=Path("results"))
    parser.add_argument("--task", metavar="NAME", nargs="+", help="these tasks only")
    parser.add_argument(
        "--trusted", metavar="N", type=int, nargs="+", default=[200, 500], help="default: 200 500"
    )
    parser.add_argument(
        "--levels", metavar="L", type=float, nargs="+", default=[0.05, 0.1], help="0.05 0.1"
    )
    parser.add_argument(
        "--draws", metavar="N", type=int, default=MIN_DRAWS, help=f"at least {MIN_DRAWS}"
    )
    given = sys.argv[1:] if argv is None else list(argv)
    arguments = parser.parse_args(given)
    command = shlex.join(["python", "benchmarks/error_rate.py", *given])
    store = RecordStore(arguments.results)
    records = [
        r
        for r in newest(store.scan().records)
        if arguments.task is None or r.task in arguments.task
    ]  # skipped and failed cells have no scores
    found = list(groups(records))
    missing = sorted(set(arguments.task or ()) - {group[0].task for group in found})
    if not found or missing:
        print(
            f"no finished records{' of ' + ', '.join(missing) if missing else ''} below "
            f"{store.records}; make some with `python -m fine_bench`, or name the folder with "
            "--results",
            file=sys.stderr,
        )
        return 2
    lines: list[Line] = []
    left_out: list[str] = []
    errors = Console(stderr=True, highlight=False)
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress:
        for group in progress.track(found):
            try:
                mine, reasons = measure(
                    store, group, arguments.trusted, arguments.levels, arguments.draws
                )
            except (StoreError, ConfigError, DataError) as error:
                mine, reasons = [], [f"{group[0].task}: {group[0].estimator}: {error}"]
            except ValueError as error:
                print(error, file=sys.stderr)
                return 2
            lines += mine
            left_out += reasons
    for name, content in (
        ("error_rate.csv", to_csv(frame(lines))),
        ("error_rate.md", markdown(lines, left_out, command)),
    ):
        write_atomic(arguments.results / name, content.encode())
        print(f"written: {arguments.results / name}")
    for reason in left_out:
        print(f"left out: {reason}")
    over = [line for line in lines if line.choice == "random" and line.rate.exceeded]
    for line in over:
        print(
            f"above the level {line.rate.level:g}: {line.task}, {line.estimator}, {line.target}: "
            f"{line.rate.false_share.mean:.3f}",
            file=sys.stderr,
        )
    return 1 if over or not lines else 0


if __name__ == "__main__":
    raise SystemExit(main())
