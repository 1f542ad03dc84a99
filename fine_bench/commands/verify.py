"""``python -m fine_bench.verify``: the command. What is compared stands in ``verifying``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from fine_bench.errors import ConfigError, DataError
from fine_bench.retraining.truth_files import TruthError
from fine_bench.runner.verify import Verdict, results_of, verify
from fine_bench.store.files import StoreError
from fine_bench.store.records import read_record
from fine_bench.terminal import bar_on


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fine_bench.verify",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Compute one record again from its own configuration and compare: data, "
        "scores (bit for bit),\nmetrics and training facts, which decide; commit, versions and "
        "hardware, which explain. One model is\ntrained, in a temporary folder; nothing that is "
        "stored is touched.",
        epilog="Bit-equal scores can be expected on the same versions and kind of processor "
        "alone. Where they\ndiffer, the printed distance says whether it is rounding or another "
        "result.\n\n"
        "Exit status: 0 equal; 1 something differs (each thing is named); 2 it cannot be computed "
        "again.\n\nExample (one of the files that `python -m fine_bench` leaves):\n"
        "  python -m fine_bench.verify \\\n"
        "      results/records/digits_mislabel/1a2b3c4d/fine--self--seed0--5e6f7a8b--r1.json",
    )
    parser.add_argument("record", metavar="RECORD", type=Path, help="a file below DIR/records")
    parser.add_argument(
        "--results",
        metavar="DIR",
        type=Path,
        help="where its scores and ground truths are (default: the folder that the record lies in)",
    )
    parser.add_argument(
        "--allow-packages",
        metavar="PACKAGE",
        nargs="+",
        default=[],
        help="packages besides fine_bench and baselines that the record may name",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Recompute, compare and report; see ``--help``. Returns the exit status."""
    arguments = _parser().parse_args(argv)
    out = Console(highlight=False, soft_wrap=True)
    errors = Console(stderr=True, highlight=False)
    try:
        record = read_record(arguments.record)
        results = arguments.results or results_of(arguments.record)
        out.print(
            f"{record.task} · {record.estimator} · {record.target} · seed {record.seed} · "
            f"revision {record.revision}, made {record.created[:10] or 'at an unknown time'}",
            markup=False,
        )

        @contextmanager
        def busy(line: str) -> Iterator[None]:
            with bar_on(errors) as progress:
                progress.add_task(line.split(": ", 1)[-1], total=None)
                yield

        verdict = verify(
            record,
            results,
            allow_packages=arguments.allow_packages,
            say=lambda line: errors.print("  " + escape(line)),
            busy=busy,
        )
    except (ConfigError, DataError, StoreError, TruthError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    for line in lines_of(verdict):
        out.print(line, markup=False)
    return 0 if verdict.equal else 1


def lines_of(verdict: Verdict) -> list[str]:
    """The verdict in words."""
    record = verdict.record
    lines = []
    if record.environment.get("dirty") is True:
        lines.append("the record was made by code with uncommitted changes")
    if verdict.equal:
        lines.append(
            f"equal: scores bit for bit ({record.scores_sha256[:12]}…), {verdict.compared} metrics "
            "and facts of training"
        )
    else:
        lines.append("differs:")
        lines += [f"  {difference}" for difference in verdict.differences]
    if verdict.circumstances:
        lines.append("made under other circumstances:")
        lines += [f"  {difference}" for difference in verdict.circumstances]
    elif verdict.again is not None:
        lines.append("commit, versions and hardware are the same")
    return [*lines, *verdict.notes]
