"""``fine-bench cure``: act on stored scores, train again, and compare."""

from __future__ import annotations

import argparse

from fine_bench.commands import common
from fine_bench.errors import ConfigError, UserError

METHODS = ("fine", "mean_loss", "aum")
TREATMENTS = ("remove", "relabel", "downweight", "remove_best")
USUAL = TREATMENTS[:3]
MIN_SEEDS = 5
TABLES = ("leaderboard", "summary", "sensitivity")
"""Names in a results folder that other commands write."""


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    made = common.parser(
        "cure",
        "Remove, relabel or weight down the most suspicious training examples by stored scores, "
        "train again with fresh seeds, and compare the test accuracy with the oracle (the bad ones "
        "first) and with a random order. They are read from DIR/scores.",
        notes="Written: DIR/NAME.csv, DIR/NAME.md and DIR/figures/NAME--TASK.{png,svg}, replaced "
        "if they exist.",
        statuses={
            0: "done",
            1: "done, but a file of records cannot be read (each is named)",
            2: "bad input",
        },
        examples=["--task digits_mislabel --methods fine mean_loss"],
    )
    common.add_results(made)
    add = made.add_argument
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
        default=list(USUAL),
        help=f"some of {', '.join(TREATMENTS)} (default: the first three); remove_best removes "
        "the least suspicious first, and with remove gives the areas of both curves",
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
    common.add_packages(made, "packages besides fine_bench and baselines that the records may name")
    return made


@common.command(parser)
def main(arguments: argparse.Namespace) -> int:
    """Read, retrain, write."""
    from fine_bench.models.classifier import DivergedError
    from fine_bench.report.cure import choose, write
    from fine_bench.runner.backends.images import images_of
    from fine_bench.runner.cure import cure
    from fine_bench.runner.recorded import job_of
    from fine_bench.store.files import slug
    from fine_bench.store.records import RecordStore, newest
    from fine_bench.terminal import bar_on

    if arguments.name != slug(arguments.name) or arguments.name in TABLES:
        raise ConfigError(
            f"--name {arguments.name!r} must consist of letters, digits, _, - and ., and be none "
            f"of {', '.join(TABLES)}; it names files in {arguments.results}: --name cure, say"
        )
    store = RecordStore(arguments.results)
    scan = store.scan()
    for problem in scan.problems:
        common.say(problem, error=True)
    records = newest(scan.records)
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
    try:
        job = job_of(first, arguments.allow_packages)
        scores = {name: [store.load_scores(r) for r in rs] for name, rs in chosen.items()}
        with bar_on() as progress:
            bar = progress.add_task("retraining", total=None)
            points = cure(
                job, scores,
                shares=arguments.shares, treatments=list(dict.fromkeys(arguments.treatments)),
                n_seeds=arguments.seeds, weight=arguments.weight,
                advance=lambda done, total: progress.update(bar, completed=done, total=total),
            )  # fmt: skip
    except UserError:
        raise
    except (DivergedError, ValueError) as error:
        raise ConfigError(str(error)) from error
    for path in write(
        arguments.results,
        arguments.name,
        points,
        images_of(job),
        chosen,
        target=arguments.target,
        weight=arguments.weight,
    ):
        common.say(f"written: {path}")
    return common.INCOMPLETE if scan.problems else common.DONE
