"""Reviewed decisions become a cleaned copy of the data and a trusted list.

``store.decisions`` has the csv: *accept* (the given label is right), *reject* (leave the row out)
or *relabel*. The review page writes it.

What may be trusted is not what was accepted: rows were accepted because somebody looked where the
ranking pointed. Only rows that were drawn at random may be, and all of the draw that are right, not
those that were easy to decide. So the trusted list holds the accepted rows of ``verify_first.csv``,
and what is undecided of that draw is said.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from fine_bench.errors import DataError
from fine_bench.runner.clean.inputs.items import Items
from fine_bench.store.decisions import Decision, read_decisions


@dataclass(frozen=True)
class Decisions:
    """What was decided.

    Attributes:
        accepted, rejected: rows of the source.
        relabelled: row → its new label.
    """

    accepted: tuple[int, ...]
    rejected: tuple[int, ...]
    relabelled: Mapping[int, Any]

    def __len__(self) -> int:
        return len(self.accepted) + len(self.rejected) + len(self.relabelled)


def decisions_of(paths: Sequence[Path], items: Items) -> Decisions:
    """Read files of decisions about these data.

    Raises:
        DataError: see ``store.decisions.read_decisions``; also a decision about a row that was left
            out as unusable, and files that contradict each other.
    """
    # the page counts rows of the source; rows that were left out stand there without a class
    names = [""] * items.n_source
    labels = [0] * items.n_source
    for k, row in enumerate(items.rows):
        names[row], labels[row] = str(items.names[k]), int(items.y[k])
    for one in items.left_out:
        names[one.row] = one.name
    unusable = {one.row: one for one in items.left_out}
    accepted, rejected, relabelled = [], [], {}
    found: list[tuple[Path, Decision]] = []
    before: dict[int, tuple[Decision, Path]] = {}
    for path in paths:
        found += [(path, one) for one in read_decisions(path, names, labels, items.classes)]
    for path, decision in found:
        known = before.get(decision.row)
        if known is not None and known[0] != decision:
            raise DataError(
                f"row {decision.row} ({names[decision.row]}) is decided as {known[0].kind} in "
                f"{known[1]} and as {decision.kind} in {path}; keep one of them"
            )
        if known is not None:
            continue
        before[decision.row] = (decision, path)
        left = unusable.get(decision.row)
        if left is not None and decision.kind != "reject":
            raise DataError(
                f"{path}: row {left.row} ({left.name}) was left out ({left.reason}); it can "
                "only be rejected, or leave its line out"
            )
        if decision.kind == "accept":
            accepted.append(decision.row)
        elif decision.kind == "reject":
            rejected.append(decision.row)
        else:
            assert decision.label is not None
            relabelled[decision.row] = items.classes[decision.label]
    return Decisions(tuple(accepted), tuple(rejected), relabelled)


@dataclass(frozen=True)
class Applied:
    """What was written.

    Attributes:
        copy: the cleaned data.
        kept: number of its rows.
        trusted: rows of the source that may be trusted, ascending.
        trusted_cleaned: the same rows by their positions in the copy.
        notes: what the user should know.
    """

    copy: Path
    kept: int
    trusted: tuple[int, ...]
    trusted_cleaned: tuple[int, ...]
    notes: tuple[str, ...]


COPIES = ("cleaned", "cleaned.csv", "cleaned.parquet", "cleaned.jsonl", "cleaned.npz")
"""Names that a copy may have."""


def apply(items: Items, decisions: Decisions, drawn: pd.DataFrame | None, folder: Path) -> Applied:
    """Write the cleaned copy; rows nobody decided about stay as they are, unusable ones too.

    The copy is whole or absent: it gets its name when it is done, and takes the place of one that
    is there.

    Args:
        items: the data.
        decisions: about them.
        drawn: ``verify_first.csv`` of the call that the decisions follow, or None.
        folder: exists; the copy is made in it.

    Raises:
        DataError: nothing is left.
    """
    gone = set(decisions.rejected)
    # an image that cannot be read stays where it is: it is named, and nobody decided about it
    keep = [row for row in range(items.n_source) if row not in gone]
    if not keep:
        raise DataError("every row is rejected; nothing is left to write")
    with tempfile.TemporaryDirectory(prefix=".cleaned-", dir=folder) as place:
        written = items.origin.write(Path(place), keep, decisions.relabelled)
        copy = folder / written.path.name
        if copy.is_dir() and not copy.is_symlink():
            shutil.rmtree(copy)
        os.replace(written.path, copy)
    notes = []
    accepted = set(decisions.accepted)
    trusted: list[int] = []
    if drawn is None:
        notes.append(
            "no trusted list: there is no verify_first.csv of a call before. Only rows drawn at "
            "random can be trusted, not those that the ranking pointed at"
        )
    else:
        rows = [int(row) for row in drawn["row"]]
        trusted = sorted(set(rows) & accepted)
        decided = accepted | gone | set(decisions.relabelled)
        undecided = [row for row in rows if row not in decided]
        # the draw is in random order: a part from its top is a draw as well
        first = next((k for k, row in enumerate(rows) if row not in decided), len(rows))
        if undecided and first < len(rows):
            trusted = sorted(set(rows[:first]) & accepted)
            notes.append(
                f"{len(undecided)} of the {len(rows)} rows of verify_first.csv are undecided, the "
                f"first in its line {first + 2}; the trusted list ends there, since what was "
                "skipped may be what is hard"
            )
        others = len(accepted - set(rows))
        if others:
            notes.append(
                f"{others} accepted row(s) were not drawn at random and are not in the trusted list"
            )
    after = {row: k for k, row in enumerate(written.rows)}
    return Applied(
        copy,
        len(keep),
        tuple(trusted),
        tuple(sorted(after[row] for row in trusted)),
        tuple(notes),
    )


def counts(decisions: Decisions) -> Counter[str]:
    """How many of each."""
    return Counter(
        accepted=len(decisions.accepted),
        rejected=len(decisions.rejected),
        relabelled=len(decisions.relabelled),
    )


__all__ = ["Applied", "Decisions", "apply", "counts", "decisions_of"]
