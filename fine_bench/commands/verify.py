"""``fine-bench verify``: compute a record again and compare."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fine_bench.commands import common
from fine_bench.errors import ConfigError, UserError

if TYPE_CHECKING:
    from fine_bench.runner.machine_difference import Explanation
    from fine_bench.runner.verify import Verdict


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    made = common.parser(
        "verify",
        "Compute one record again from its own configuration and compare: data, scores (bit for "
        "bit), metrics and training facts, which decide; commit, versions and hardware, which "
        "explain. One model is trained, in a temporary folder; nothing that is stored is touched.",
        notes="Bit-equal scores can be expected on the same versions and kind of processor alone. "
        "Elsewhere a record is equal within what the difference of machine explains when no number "
        "moved farther than two recorded seeds of its row may differ, and the scores agree at "
        "least as well as those of any two seeds; docs/verify.md has the rule and measurements.",
        statuses={
            0: "equal, or equal within what the difference of machine explains",
            1: "different (each thing is named)",
            2: "it cannot be computed again",
        },
        examples=[
            "\\\n    results/records/digits_mislabel/1a2b3c4d/fine--self--seed0--5e6f7a8b--r1.json",
        ],
    )
    add = made.add_argument
    add(
        "record",
        metavar="RECORD",
        type=Path,
        help="a file below DIR/records, or the name that a published record would have there",
    )
    add(
        "--results",
        metavar="DIR",
        type=Path,
        help="where its scores and ground truths are (default: the folder that the record lies in)",
    )
    for option, what in (
        ("path", "training samples"),
        ("queries-path", "held-out completions"),
        ("test-path", "clean held-out samples"),
    ):
        add(
            f"--{option}",
            metavar="FILE",
            type=Path,
            help=f"the {what} (JSONL) of a record of your own files, which says nothing of places",
        )
    common.add_packages(made, "packages besides fine_bench and baselines that the record may name")
    return made


@common.command(parser)
def main(arguments: argparse.Namespace) -> int:
    """Recompute, compare and report."""
    from fine_bench.runner.recorded import OWN_FILES
    from fine_bench.runner.verify import results_of, verify
    from fine_bench.store.records import read_record
    from fine_bench.terminal import Terminal, bar_on, visible

    out = Terminal(soft_wrap=True)
    errors = Terminal(stderr=True)
    record = read_record(arguments.record)
    results = arguments.results or results_of(arguments.record)
    out.print(
        visible(
            f"{record.task} · {record.estimator} · {record.target} · seed {record.seed} · "
            f"revision {record.revision}, made {record.created[:10] or 'at an unknown time'}"
        )
    )

    @contextmanager
    def busy(line: str) -> Iterator[None]:
        with bar_on(errors) as progress:
            progress.add_task(line.split(": ", 1)[-1], total=None)
            yield

    own = [(name, getattr(arguments, name)) for name in OWN_FILES]
    try:
        verdict = verify(
            record,
            results,
            allow_packages=arguments.allow_packages,
            files={name: file for name, file in own if file is not None},
            say=lambda line: errors.print("  " + line),
            busy=busy,
        )
    except UserError:
        raise
    except ValueError as error:  # a record of somebody else may hold anything
        raise ConfigError(str(error)) from error
    for line in lines_of(verdict):
        out.print(line)
    return common.INCOMPLETE if verdict.outcome == "different" else common.DONE


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
        within = verdict.outcome == "within"
        head = "equal within what this difference of machine explains:" if within else "different:"
        lines += [head, *(f"  {difference}" for difference in verdict.differences)]
    if verdict.explanation is not None:
        lines += explanation_lines(verdict.explanation)
    if verdict.circumstances:
        lines.append("made under other circumstances:")
        lines += [f"  {difference}" for difference in verdict.circumstances]
    elif verdict.again is not None:
        lines.append("commit, versions and hardware are the same")
    return [*lines, *verdict.notes]


def explanation_lines(explanation: Explanation) -> list[str]:
    """What the machine may explain, what each number did, and what speaks against it."""
    from fine_bench.runner.machine_difference import MIN_SEEDS

    lines = []
    if explanation.causes:
        lines += ["what moves bits:", *(f"  {cause}" for cause in explanation.causes)]
    if explanation.seeds >= MIN_SEEDS and explanation.changes:
        lines.append(f"against the {explanation.seeds} recorded seeds of the row:")
        lines += [f"  {change}" for change in explanation.changes]
    if math.isfinite(explanation.correlation):
        least = explanation.least
        known = math.isfinite(least)
        seeds = f"two seeds of the row {least:.4f} or more" if known else "no seeds were compared"
        lines.append(
            f"scores: Spearman {explanation.correlation:.6f} with the stored ones ({seeds})"
        )
    if not explanation.holds:
        lines += ["not explained:", *(f"  {reason}" for reason in explanation.against)]
    return lines
