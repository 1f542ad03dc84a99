"""Cleaning a data set: what ``fine-bench clean DATA`` does, as a function.

from fine_bench import clean
result = clean("images/")
result.table.head()
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fine_bench.errors import ConfigError
from fine_bench.metrics.error_rate import Flags, flag
from fine_bench.runner.clean import check as checking
from fine_bench.runner.clean.features import features
from fine_bench.runner.clean.fold_store import FoldStore, key_of
from fine_bench.runner.clean.inputs.items import Items, Reading
from fine_bench.runner.clean.inputs.recognise import load
from fine_bench.runner.clean.inputs.trusted import trusted_items, without_trusted
from fine_bench.runner.clean.issues import cleanlab_summary, find_issues
from fine_bench.runner.clean.probabilities import given_runs
from fine_bench.runner.clean.recipe import Recipe, own_recipe, recipe_for
from fine_bench.runner.clean.repeats import with_repeats
from fine_bench.runner.clean.scoring import (
    SCORES,
    Score,
    ranking,
    stable_share,
    suspected,
)
from fine_bench.runner.clean.training import Run, joined, train_run
from fine_bench.runner.clean.verify_first import Draw, draw_to_verify
from fine_bench.seeds import derive

Advance = Callable[[str, int, int], None]
"""Told ``(what, done, total)`` as epochs go by."""


@dataclass(frozen=True, eq=False)
class Cleaning:
    """What was found.

    Attributes:
        items: the data as they were read, with what was left out.
        recipe: what was trained; None where probabilities were given.
        runs: what each run said.
        table: a line for each row, the most suspicious first; see ``scoring.ranking``
            and ``repeats.with_repeats``.
        issues: duplicates, outliers and confused classes; see ``issues.find_issues``.
        verify: rows to verify first; None with a trusted list.
        flags: what the error rate covers; None without a trusted list.
        check: accuracies with and without the flagged rows, where asked for.
        cleanlab: its summary, where it is installed.
        stable: of the rows that any run suspects, the share that all do.
    """

    items: Items
    recipe: Recipe | None
    runs: Sequence[Run]
    table: pd.DataFrame
    issues: pd.DataFrame
    verify: Draw | None
    flags: Flags | None
    check: checking.Check | None
    cleanlab: str | None
    stable: float

    @property
    def suspects(self) -> pd.DataFrame:
        """The lines of ``table`` that most runs suspect."""
        return suspected(self.table)

    @property
    def n_repeatable(self) -> int | None:
        """How many of them are expected to repeat, at the asked level; None where unknown."""
        if self.table["repeats"].isna().all():
            return None
        return int(self.table["repeatable"].sum())


def clean(
    data: Any,
    *,
    encoder: str | None = None,
    trusted: Any = None,
    level: float = 0.1,
    model: Any = None,
    probabilities: Sequence[Any] = (),
    runs: int = 3,
    score: Score = "doubt",
    influence: bool = True,
    check: bool = False,
    seed: int = 0,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    folder: Path | None = None,
    read: Callable[[Items], None] = lambda items: None,
    advance: Advance = lambda what, done, total: None,
    first: Callable[[pd.DataFrame], None] = lambda table: None,
    **reading: Unpack[Reading],
) -> Cleaning:
    """Find rows whose labels are likely wrong, how often that repeats, and at which error rate.

    Args:
        data: a path, a pandas ``DataFrame``, a ``Dataset`` of ``datasets``, or ``(x, y)``; see
            ``inputs.recognise.load``.
        encoder: for texts: a folder in the hub's format, or a name of ``sentence-transformers``.
        trusted: rows that were drawn at random and found right: a file, a column, or rows.
        level: share of flags to accept, on average, that are wrong, or that another run would not
            repeat, in (0, 1).
        model: instead of the one for this kind of data; see ``recipe.own_recipe``.
        probabilities: of models trained elsewhere, one a run: then nothing is trained.
        runs: how many, ≥ 1.
        score: what ranks; see ``scoring``.
        influence: whether f-INE watches.
        check: retrain with and without the flagged rows, or without those that most runs suspect
            where no list is trusted.
        seed: of all draws; the same seed gives the same result.
        epochs, batch_size, lr: of the training, where the recipe's should not hold.
        folder: where finished folds of runs are kept; nowhere without.
        read: told the items once they are read.
        advance: told how far it is.
        first: told the ranking of the first run, when others follow.
        reading: ``kind``, ``label``, ``text``, … of ``inputs.items.Reading``.

    Raises:
        UserError: whatever does not fit, with what to type instead.
    """
    _check_options(level, runs, score, seed, epochs, batch_size, lr)
    items = load(data, **reading)
    read(items)
    mask = None if trusted is None else trusted_items(items, trusted)
    items = without_trusted(items, trusted)
    if mask is not None:  # refused before training: the answer does not depend on the scores
        _flag(np.zeros(len(items)), mask, level)
    x = features(items, encoder)
    y = torch.from_numpy(items.y)
    n_classes = len(items.classes)
    recipe: Recipe | None = None
    if len(probabilities):
        if check or model is not None or score in ("mu", "doubt"):
            score = _without_training(check, model, score)
        found = given_runs(items, probabilities)
    else:
        base = recipe_for(items.kind, tuple(x.shape[1:]))
        changes = {"epochs": epochs, "batch_size": batch_size, "lr": lr}
        base = replace(base, **{k: v for k, v in changes.items() if v is not None})  # type: ignore[arg-type]
        recipe = base if model is None else own_recipe(base, model, x, n_classes)

        def told(run: Run) -> None:
            if runs > 1:
                first(ranking(items, [run], score, None))

        found = _train(x, y, n_classes, recipe, runs, seed, influence, folder, advance, told)
    flags = None
    if mask is not None:
        from fine_bench.runner.clean.scoring import score_of

        flags = _flag(score_of(joined(found), items.y, score), mask, level)
    table = with_repeats(ranking(items, found, score, flags), items, found, score, level)
    checked = None
    if check and recipe is not None:
        rows = table["row"][table["covered"]] if flags is not None else suspected(table)["row"]
        leave = np.isin(items.rows, rows.to_numpy())
        total = 2 * checking.SEEDS * recipe.epochs
        count = _Counter(lambda done: advance("checking", done, total))
        checked = checking.check(
            x, y, n_classes, leave, mask, recipe, seed=derive(seed, "clean/check"), advance=count
        )
    draw = None if mask is not None else draw_to_verify(items, len(suspected(table)), level, seed)
    return Cleaning(
        items,
        recipe,
        found,
        table,
        find_issues(items, x, table, seed),
        draw,
        flags,
        checked,
        cleanlab_summary(joined(found).probabilities, items),
        stable_share(found, items.y, score),
    )


def _train(
    x: Tensor,
    y: Tensor,
    n_classes: int,
    recipe: Recipe,
    runs: int,
    seed: int,
    influence: bool,
    folder: Path | None,
    advance: Advance,
    first: Callable[[Run], None],
) -> list[Run]:
    place: AbstractContextManager[Any] = (
        nullcontext(folder) if folder is not None else tempfile.TemporaryDirectory()
    )
    seeds = [derive(seed, f"clean/run/{number}") % 2**31 for number in range(runs)]
    each = recipe.folds * recipe.epochs
    total = runs * each
    with place as where:
        store = FoldStore(Path(where), key_of(x, y, recipe, influence))
        found = []
        for number, one in enumerate(seeds):
            before = number * each

            def said(done: int, before: int = before, number: int = number) -> None:
                what = f"run {number + 1} of {runs}"
                advance(what, min(before + done, total), total)

            count = _Counter(said)
            found.append(
                train_run(
                    x, y, n_classes, recipe, seed=one, influence=influence,
                    keep=store.keeper(one), advance=count,
                )
            )  # fmt: skip
            # early stopping ends before the most epochs there may be
            said(each)
            if number == 0:
                first(found[0])
    return found


class _Counter:
    def __init__(self, said: Callable[[int], None]) -> None:
        self.said, self.done = said, 0

    def __call__(self) -> None:
        self.done += 1
        self.said(self.done)


def _flag(values: Any, mask: Any, level: float) -> Flags:
    try:
        return flag(values, mask, level)
    except ValueError as error:  # too few trusted rows, with the number needed
        raise ConfigError(str(error)) from error


def _without_training(check: bool, model: Any, score: Score) -> Score:
    """What needs no training: the score, or a refusal."""
    if check:
        raise ConfigError("--check trains, but --probabilities means that nothing is trained; "
                          "leave one of them out")  # fmt: skip
    if model is not None:
        raise ConfigError("--model and --probabilities exclude each other; leave one of them out")
    if score == "mu":
        raise ConfigError("--score mu needs training; use --score doubt with --probabilities")
    return score


def _check_options(
    level: float,
    runs: int,
    score: str,
    seed: int,
    epochs: int | None,
    batch_size: int | None,
    lr: float | None,
) -> None:
    for name, value, fine, example in (
        ("level", level, 0 < level < 1, 0.1),
        ("runs", runs, 1 <= runs <= 100, 3),
        ("seed", seed, seed >= 0, 0),
        ("epochs", epochs, epochs is None or epochs >= 1, 40),
        # f-INE compares an example with at least two others of its batch
        ("batch-size", batch_size, batch_size is None or batch_size >= 3, 64),
        ("lr", lr, lr is None or 0 < lr < float("inf"), 0.05),
    ):
        if not fine:
            raise ConfigError(f"--{name} {value} is out of range; type for instance {example}")
    if score not in SCORES:
        raise ConfigError(f"--score {score} is unknown; it is one of {', '.join(SCORES)}")


__all__ = ["Cleaning", "clean"]
