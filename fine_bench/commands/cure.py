"""``python -m fine_bench.cure``: the command. It reads stored scores, retrains, and writes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from fine_bench.errors import ConfigError, DataError
from fine_bench.metrics.cure import CurePoint
from fine_bench.models import DivergedError
from fine_bench.report.cure import figure, frame, markdown
from fine_bench.report.figures.style import FORMATS, to_bytes
from fine_bench.report.figures.tables import kind_of
from fine_bench.runner.cure import MIN_SEEDS, TREATMENTS, cure
from fine_bench.runner.plan import Job
from fine_bench.runner.retrain import job_of
from fine_bench.store.files import StoreError, write_atomic
from fine_bench.store.records import RecordStore, newest
from fine_bench.terminal import bar_on
from fine_bench.types import RunRecord

METHODS = ("fine", "mean_loss", "aum")


def choose(
    records: Sequence[RunRecord], task: str, setting: str, target: str, methods: Sequence[str]
) -> dict[str, list[RunRecord]]:
    """Finished records of each method by row name, one setting and one data set, seeds in order.

    Raises:
        ValueError: nothing to choose from, several settings, or no scores of a method.
    """
    here = [
        r for r in records
        if r.status == "finished" and r.task == task and r.setting.startswith(setting)
    ]  # fmt: skip
    if not here:
        tasks = sorted({r.task for r in records if r.status == "finished"})
        raise ValueError(
            f"there are no finished records of task {task!r}"
            + (f" and setting {setting!r}" if setting else "")
            + (f"; there are: {', '.join(tasks)}" if tasks else "; make some with "
               "`python -m fine_bench`, or name the folder with --results")
        )  # fmt: skip
    places = sorted({(r.setting[:8], r.data_sha256[:8]) for r in here})
    if len(places) > 1:
        raise ValueError(
            f"task {task!r} has several settings: {', '.join(s for s, _ in places)}; choose one "
            "with --setting"
        )
    found = {}
    rows = sorted({r.estimator for r in here if r.target == target})
    for name in methods:
        mine = sorted(
            (r for r in here if r.estimator == name and r.target == target), key=lambda r: r.seed
        )
        if not mine:
            raise ValueError(
                f"{task} has no finished scores of {name!r} for target {target}; there are: "
                f"{', '.join(rows)}. Choose with --methods"
            )
        if len({r.estimator_hash for r in mine}) > 1:
            raise ValueError(
                f"{name!r} stands for several configurations in these records; keep one of them "
                "in a results folder of its own"
            )
        found[name] = mine
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fine_bench.cure",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Remove, relabel or weight down the most suspicious training examples by "
        "stored scores,\ntrain again with fresh seeds, and compare the test accuracy with the "
        "oracle (the bad ones\nfirst) and with a random order. Scores are read from DIR/records "
        "and DIR/scores.",
        epilog="Written: DIR/NAME.csv, DIR/NAME.md and DIR/figures/NAME--TASK.{png,svg}, "
        "replaced if they exist.\n"
        "Exit status: 0 done; 2 bad input.\n\n"
        "Example, after python -m fine_bench:\n"
        "  python -m fine_bench.cure --task digits_mislabel --methods fine mean_loss",
    )
    add = parser.add_argument
    add("--results", metavar="DIR", type=Path, default=Path("results"), help="default: results")
    add("--task", metavar="NAME", required=True)
    add(
        "--setting", metavar="DIGEST", default="", help="its first digits, where a task has several"
    )
    add("--target", choices=("self", "validation"), default="self", help="default: self")
    add(
        "--methods",
        metavar="ROW",
        nargs="+",
        help=f"rows of the leaderboard; default: those of {', '.join(METHODS)} that have scores",
    )
    add(
        "--treatments",
        metavar="TREATMENT",
        choices=TREATMENTS,
        nargs="+",
        default=list(TREATMENTS),
        help=f"some of {', '.join(TREATMENTS)} (default: all of them)",
    )
    add(
        "--shares",
        metavar="S",
        type=float,
        nargs="+",
        default=[0.05, 0.1, 0.2, 0.3],
        help="of the training set to touch (default: 0.05 0.1 0.2 0.3)",
    )
    add(
        "--seeds",
        metavar="N",
        type=int,
        default=MIN_SEEDS,
        help=f"retraining seeds, at least {MIN_SEEDS} (the default)",
    )
    add(
        "--weight",
        metavar="W",
        type=float,
        default=0.1,
        help="of an example that is weighted down (default: 0.1)",
    )
    add("--name", metavar="NAME", default="cure", help="of the files written (default: cure)")
    add(
        "--allow-packages",
        metavar="PACKAGE",
        nargs="+",
        default=[],
        help="packages besides fine_bench and baselines that the records may name",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Read, retrain, write; see ``--help``. Returns the exit status."""
    arguments = _parser().parse_args(argv)
    store = RecordStore(arguments.results)
    errors = Console(stderr=True, highlight=False)
    try:
        records = newest(store.scan().records)
        wanted = arguments.methods
        if wanted is None:
            have = {
                r.estimator for r in records
                if (r.status, r.task, r.target) == ("finished", arguments.task, arguments.target)
            }  # fmt: skip
            wanted = [name for name in METHODS if name in have]
        chosen = choose(
            records, arguments.task, arguments.setting, arguments.target, wanted or METHODS[:1]
        )
        first = next(iter(chosen.values()))[0]
        job = job_of(first, arguments.allow_packages)
        scores = {name: [store.load_scores(r) for r in rs] for name, rs in chosen.items()}
        with bar_on(errors) as progress:
            bar = progress.add_task("retraining", total=None)
            points = cure(
                job, scores,
                shares=arguments.shares, treatments=list(dict.fromkeys(arguments.treatments)),
                n_seeds=arguments.seeds, weight=arguments.weight,
                advance=lambda done, total: progress.update(bar, completed=done, total=total),
            )  # fmt: skip
        _write(arguments, job, first, chosen, points)
    except (ConfigError, DataError, StoreError, DivergedError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _write(
    arguments: argparse.Namespace,
    job: Job,
    first: RunRecord,
    chosen: Mapping[str, Sequence[RunRecord]],
    points: Sequence[CurePoint],
) -> None:
    data = job.data
    size = (
        f"{data.name}, {data.n_train:,} training examples, {data.truth.n_bad:,} of them bad, "
        f"{len(data.test_x):,} test examples, {points[0].n_seeds} retraining seeds"
    )
    notes = [
        "Test accuracy, mean over retraining seeds with its 95 % bootstrap interval, and how many "
        "of the touched examples are bad.",
        f"Scores of target {arguments.target}, run seeds: "
        + "; ".join(f"{m}: {', '.join(str(r.seed) for r in rs)}" for m, rs in chosen.items())
        + ". Retraining seed j uses the scores of the (j mod R)-th of R runs.",
        "Removed examples are in no batch; the number of epochs stays. The new label is the most "
        "probable class besides the given one, by the mean probability over the epochs of an "
        "untreated run of the same seed, on its own training data. A down-weighted example's "
        f"loss counts {arguments.weight:g}.",
        "The oracle touches the bad examples first, and relabels to the right label.",
    ]
    table = frame(points, data.name, first.setting, arguments.target)
    heading = f"Made by `python -m fine_bench.cure --task {data.name}`: {size}."
    files = {
        arguments.results / f"{arguments.name}.csv": table.to_csv(
            index=False, lineterminator="\n"
        ).encode(),
        arguments.results / f"{arguments.name}.md": markdown(points, heading, notes).encode(),
    }
    kinds = {name: kind_of(name, rs[0].config) for name, rs in chosen.items()}
    drawn = figure(points, kinds, size=size, rate=data.truth.rate)
    for kind in FORMATS:
        path = arguments.results / "figures" / f"{arguments.name}--{data.name}.{kind}"
        files[path] = to_bytes(drawn, kind)
    for path, content in files.items():
        write_atomic(path, content)
        print(f"written: {path}")
