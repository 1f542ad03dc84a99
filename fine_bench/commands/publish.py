"""``fine-bench publish``: pack records, and write, check and unpack archives of their scores."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from fine_bench.errors import DataError
from fine_bench.leaderboard import render
from fine_bench.leaderboard.build import build
from fine_bench.leaderboard.summary import summarise, to_markdown
from fine_bench.leaderboard.tables import Leaderboard
from fine_bench.store.files import StoreError, write_atomic
from fine_bench.store.publication import publish
from fine_bench.store.records import RecordStore
from fine_bench.store.score_archive import (
    ArchiveReport,
    check_archive,
    unpack_archive,
    write_archive,
)
from fine_bench.terminal import bar_on

SHOWN = 10
"""Names that are printed of a long list."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fine-bench publish",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Add the records and comparisons of DIR/records to DIR/published, one "
        "JSON-lines file a table,\nand rebuild DIR/published/leaderboard.md, leaderboard.csv and "
        "summary.md from the packed\nrecords alone. A published line is never altered or dropped; "
        "running it twice changes nothing.\n\nScores are not packed. With --scores, --check and "
        "--unpack they go into an archive and back.",
        epilog="Exit status: 0 done; 1 something is missing, cannot be read, does not verify or "
        "stands against\nit (each is named); 2 no records, or a wrong argument. Examples:\n"
        "  fine-bench publish --task mnist_mlp\n"
        "  fine-bench publish --unpack scores.tar.gz",
    )
    parser.add_argument(
        "--results", metavar="DIR", type=Path, default=Path("results"), help="default: results"
    )
    parser.add_argument(
        "--task", metavar="NAME", nargs="+", default=[], help="publish these tasks only"
    )
    archive = parser.add_mutually_exclusive_group()
    for option, text in (
        ("--scores", "write the scores of all published records into this new file"),
        ("--check", "hold this archive's scores against the published records"),
        ("--unpack", "check them and put them into DIR/scores"),
    ):
        archive.add_argument(option, metavar="ARCHIVE", type=Path, help=text)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Publish, or handle an archive of scores; see ``--help``. Returns the exit status."""
    arguments = _parser().parse_args(argv)
    store = RecordStore(arguments.results)
    actions: dict[str, Callable[[RecordStore, Path], ArchiveReport]] = {
        "scores": write_archive,
        "check": check_archive,
        "unpack": unpack_archive,
    }
    try:
        for name, action in actions.items():
            path = getattr(arguments, name)
            if path is not None:
                return _archive(action(store, path), path, name)
        return _publish(store, arguments.task)
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    except StoreError as error:
        print(error, file=sys.stderr)
        return 1


def _build(store: RecordStore) -> Leaderboard:
    with bar_on(Console(stderr=True, highlight=False)) as progress:
        bar = progress.add_task("reading records", total=None)

        def show(done: int, total: int, name: str) -> None:
            progress.update(bar, completed=done, total=total, description=f"comparing {name}")

        return build(store, show)


def _publish(store: RecordStore, tasks: Sequence[str]) -> int:
    published, own, problems = store.entries()
    if not published and not own and not problems:
        raise DataError(
            f"no records below {store.records}. Make some with `python -m fine_bench`, or name the "
            "folder that holds records/ with --results DIR"
        )
    if own:
        _build(store)  # compares the seeds of new rows, so that the comparisons are published too
    done = publish(store, tasks)
    print(
        f"published: {done.records:,} records and {done.comparisons:,} comparisons of seeds in "
        f"{len(done.files)} files, {done.size / 1e6:.1f} MB; new: {done.new_records:,} records, "
        f"{done.new_comparisons:,} comparisons"
    )
    found = _build(RecordStore(store.root, published_only=True))
    folder = store.published.folder
    written = [*done.written, *render.write(found, folder)]
    parts, reasons = [], []
    for target in ("self", "validation"):
        try:
            parts.append(to_markdown(summarise(found, "average_precision", target)))
        except DataError as error:
            reasons.append(f"summary.md without target {target}: {error}")
    if parts:
        write_atomic(folder / "summary.md", "\n".join(parts).encode())
        written.append(folder / "summary.md")
    print("written: " + ", ".join(map(str, written)))
    for line in reasons:
        print(line)
    for line in dict.fromkeys((*done.problems, *found.problems)):
        print(line, file=sys.stderr)
    return 1 if done.problems or found.problems else 0


def _archive(report: ArchiveReport, path: Path, action: str) -> int:
    total = report.good + len(report.missing) + len(report.wrong)
    if not total:
        raise DataError("no published record has scores; publish some with `fine-bench publish`")
    print(f"{report.good:,} of {total:,} scores of published records verify bit for bit")
    if action == "unpack":
        print(f"written: {report.written:,} score files")
    elif report.written:
        print(f"written: {path} ({path.stat().st_size / 1e6:.1f} MB)")
    for line in _first([f"missing: {name}" for name in report.missing]):
        print(line, file=sys.stderr)
    for line in _first(report.wrong):
        print(line, file=sys.stderr)
    return 0 if report.complete else 1


def _first(lines: Sequence[str]) -> list[str]:
    more = len(lines) - SHOWN
    return [*lines[:SHOWN], *([f"… and {more:,} more"] if more > 0 else [])]


if __name__ == "__main__":
    raise SystemExit(main())
