"""``fine-bench publish``: pack records, and write, check and unpack archives of their scores."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fine_bench.commands import common
from fine_bench.errors import DataError

if TYPE_CHECKING:
    from fine_bench.leaderboard.tables import Leaderboard
    from fine_bench.store.records import RecordStore
    from fine_bench.store.score_archive import ArchiveReport

SHOWN = 10
"""Names that are printed of a long list."""


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    made = common.parser(
        "publish",
        "Add the records and comparisons of DIR/records to DIR/published, one JSON-lines file a "
        "table, and rebuild DIR/published/leaderboard.md, leaderboard.csv and summary.md from the "
        "packed records alone. A published line is never altered or dropped; running it twice "
        "changes nothing. Cells that were computed again leave earlier revisions behind, which no "
        "table reads: --set-aside moves them to DIR/superseded.\n\n"
        "Scores are not packed. With --scores, --check and --unpack they go into an archive and "
        "back.",
        statuses={
            0: "done",
            1: "something is missing, cannot be read, does not verify or stands against it (each "
            "is named)",
            2: "no records, or a wrong argument",
        },
        examples=["--task mnist_mlp", "--unpack scores.tar.gz"],
    )
    common.add_results(made)
    made.add_argument("--task", metavar="NAME", nargs="+", default=[], help="these tasks only")
    archive = made.add_mutually_exclusive_group()
    for option, text in (
        ("--scores", "write the scores of all published records into this file"),
        ("--check", "hold this archive's scores against the published records"),
        ("--unpack", "check them and put them into DIR/scores"),
    ):
        archive.add_argument(option, metavar="ARCHIVE", type=Path, help=text)
    archive.add_argument(
        "--set-aside",
        action="store_true",
        help="move packed lines that a later revision replaces to DIR/superseded; no table changes",
    )
    made.add_argument(
        "--force", action="store_true", help="with --scores: replace ARCHIVE if it is there already"
    )
    return made


@common.command(parser)
def main(arguments: argparse.Namespace) -> int:
    """Publish, or handle an archive of scores."""
    from functools import partial

    from fine_bench.store.files import StoreError
    from fine_bench.store.records import RecordStore
    from fine_bench.store.score_archive import check_archive, unpack_archive, write_archive

    store = RecordStore(arguments.results)
    actions: dict[str, Callable[[RecordStore, Path], ArchiveReport]] = {
        "scores": partial(write_archive, force=arguments.force),
        "check": check_archive,
        "unpack": unpack_archive,
    }
    try:
        for name, action in actions.items():
            path = getattr(arguments, name)
            if path is not None:
                return _archive(action(store, path), path, name)
        if arguments.set_aside:
            return _set_aside(store)
        return _publish(store, arguments.task)
    except StoreError as error:
        common.say(error, error=True)
        return common.INCOMPLETE


def _set_aside(store: RecordStore) -> int:
    from fine_bench.store.publication import set_aside

    done = set_aside(store)
    common.say(
        f"set aside: {done.records:,} records and {done.comparisons:,} comparisons of seeds that "
        f"later revisions replace, {done.size / 1e6:.1f} MB"
    )
    if done.written:
        common.say("written: " + ", ".join(map(str, done.written)))
    return common.DONE


def _build(store: RecordStore) -> Leaderboard:
    from fine_bench.leaderboard.build import build
    from fine_bench.retraining.oracles import limits_in
    from fine_bench.terminal import record_bar

    with record_bar() as bar:
        return build(store, bar.comparing, limits=limits_in(store.root))


def _publish(store: RecordStore, tasks: Sequence[str]) -> int:
    from dataclasses import replace

    from fine_bench.leaderboard import render
    from fine_bench.leaderboard.summary import text_of
    from fine_bench.store.files import write_atomic
    from fine_bench.store.publication import publish
    from fine_bench.store.records import RecordStore

    published, own, problems = store.entries()
    if not published and not own and not problems:
        raise DataError(
            f"no records below {store.records}. Make some with `fine-bench run`, or name the "
            "folder that holds records/ with --results DIR"
        )
    if own:
        _build(store)  # compares the seeds of new rows, so that the comparisons are published too
    done = publish(store, tasks)
    packed = RecordStore(store.root, published_only=True)
    found = _build(packed)
    if packed.compared:
        # of records that were published before there was this comparison, or that came since the
        # first look: the tables have its numbers, so it is published with them, whatever the task
        more = publish(store, comparisons=packed.compared)
        done = replace(
            more,
            new_records=done.new_records,
            new_comparisons=done.new_comparisons + more.new_comparisons,
            written=tuple(sorted({*done.written, *more.written})),
        )
    common.say(
        f"published: {done.records:,} records and {done.comparisons:,} comparisons of seeds in "
        f"{len(done.files)} files, {done.size / 1e6:.1f} MB; new: {done.new_records:,} records, "
        f"{done.new_comparisons:,} comparisons"
    )
    folder = store.published.folder
    written = [*done.written, *render.write(found, folder)]
    parts, reasons = [], []
    for target in ("self", "validation"):
        try:
            parts.append(text_of(found, "average_precision", target))
        except DataError as error:
            reasons.append(f"summary.md without target {target}: {error}")
    if parts:
        write_atomic(folder / "summary.md", "\n".join(parts).encode())
        written.append(folder / "summary.md")
    common.say("written: " + ", ".join(map(str, written)))
    for line in reasons:
        common.say(line)
    for line in dict.fromkeys((*done.problems, *found.problems)):
        common.say(line, error=True)
    return common.INCOMPLETE if done.problems or found.problems else common.DONE


def _archive(report: ArchiveReport, path: Path, action: str) -> int:
    total = report.good + len(report.missing) + len(report.wrong)
    if not total:
        raise DataError("no published record has scores; publish some with `fine-bench publish`")
    common.say(f"{report.good:,} of {total:,} scores of published records verify bit for bit")
    if action == "unpack":
        common.say(f"written: {report.written:,} score files")
    elif report.written:
        common.say(f"written: {path} ({path.stat().st_size / 1e6:.1f} MB)")
    for line in _first([f"missing: {name}" for name in report.missing]):
        common.say(line, error=True)
    for line in _first(report.wrong):
        common.say(line, error=True)
    return common.DONE if report.complete else common.INCOMPLETE


def _first(lines: Sequence[str]) -> list[str]:
    more = len(lines) - SHOWN
    return [*lines[:SHOWN], *([f"… and {more:,} more"] if more > 0 else [])]
