"""The table over all tasks."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fine_bench.commands.summary import main
from fine_bench.errors import DataError
from fine_bench.leaderboard.captions import KINDS
from fine_bench.leaderboard.summary import (
    COLUMNS,
    by_kind,
    headings,
    summarise,
    text_of,
    to_markdown,
)
from fine_bench.leaderboard.tables import Leaderboard, Row, Stat, Table
from fine_bench.store.records import RecordStore
from fine_bench.types import InfluenceScores
from support.records import make_record


def row(name: str, value: float, target: str = "self", watched: int | None = None) -> Row:
    stat = Stat(value, value - 0.01, value + 0.01, 3)
    stats = {"average_precision": stat, "cost_seconds": stat}
    return Row(name, "", "h", target, 1, (0, 1, 2), stats, watched=watched)


def table(task: str, *rows: Row) -> Table:
    return Table(task, "s", "d", {}, {}, 20, (0, 1, 2), rows, ())


BOARD = Leaderboard(
    (
        table("easy", row("fine", 0.9), row("loss", 0.95), row("fine", 0.5, "validation")),
        table("hard", row("fine", 0.7), row("loss", 0.6), row("constant", math.nan)),
        table("third", row("tracin", 0.8), row("fine_paper", 0.99, watched=300)),
        table("empty", row("fine", 0.1, "validation")),
    )
)


def test_methods_by_tasks() -> None:
    found = summarise(BOARD, "average_precision", "self")
    assert [t.task for t in found.tables] == ["easy", "hard", "third"]
    # by mean rank as a share of the rows: tracin 0, loss 1/6, fine 1/4; undefined ones come last
    assert found.labels == ("tracin", "loss", "fine", "constant")
    text = to_markdown(found)
    assert "| fine | 0.900 [0.890, 0.910] | **0.700** [0.690, 0.710] | – |" in text
    assert "| constant | – | undefined | – |" in text
    assert "fine_paper" not in text  # it scores a sample
    assert "Known bad: 20 of the examples of easy" in text


def test_tables_of_one_task_are_told_apart() -> None:
    found = [
        replace(table(name, row("fine", 0.5)), setting=setting, options=options)
        for name, setting, options in (
            ("digits", "aaaaaaaaaa", {}),
            ("natural", "bbbbbbbbbb", {"model": "mlp", "trainer.lr": 0.1}),
            ("natural", "cccccccccc", {"model": "cnn", "trainer.lr": 0.2}),
            ("seeds", "dddddddddd", {"trainer.init_seed": None, "trainer.order_seed": None}),
            ("seeds", "eeeeeeeeee", {"trainer.init_seed": None, "trainer.order_seed": 0}),
            ("seeds", "ffffffffff", {"trainer.init_seed": 0, "trainer.order_seed": None}),
            ("same", "0123456789", {"lr": 1}),
            ("same", "9876543210", {"lr": 1}),
        )
    ]
    assert headings(found) == [
        "digits", "natural (model=mlp)", "natural (model=cnn)",
        "seeds (init_seed=None, order_seed=None)", "seeds (init_seed=None, order_seed=0)",
        "seeds (init_seed=0)", "same (01234567)", "same (98765432)",
    ]  # fmt: skip
    text = to_markdown(summarise(Leaderboard(tuple(found)), "average_precision", "self"))
    assert "| natural (model=mlp) | natural (model=cnn) |" in text


def of(module: str, name: str, *rows: Row) -> Table:
    return replace(table(name, *rows), made_by=f"fine_bench.{module}.make")


def test_tasks_of_a_kind_stand_together_and_no_row_is_empty() -> None:
    tables = [
        of("data.cifar10n", "cifar", row("loss", 0.4)),
        *(of("data.mnist", f"flips{i}", row("fine", 0.9), row("loss", 0.8)) for i in range(3)),
        of("llm.task", "poison", row("bm25", 0.3)),
        replace(of("data.mnist", "theirs", row("fine", 0.5)), made_by="others.data.mnist.make"),
        table("unnamed", row("mine", 0.5), row("fine", 0.5, "validation")),
        *(of("data.mnist", "seeds", row("trak", 0.7 + i / 100)) for i in range(COLUMNS + 1)),
        of("data.natural", "natural", row("loss", 0.2), row("aum", 0.6)),
        of("data.digits", "small", row("aum", 0.6)),
    ]
    board = Leaderboard(tuple(tables))
    found = by_kind(board, "average_precision", "self")
    assert [(kind, [t.task for t in s.tables]) for kind, s in found] == [
        (KINDS["mnist"], ["flips0", "flips1", "flips2"]),
        (KINDS["mnist"], ["seeds"] * (COLUMNS + 1)),  # settings of one task are compared
        (KINDS["mnist"], ["small"]),
        (KINDS["natural"], ["cifar", "natural"]),
        (KINDS["task"], ["poison"]),
        ("Other tasks", ["theirs", "unnamed"]),
    ]
    for _, summary in found:
        assert all(any(cell is not None for cell in cells) for cells in summary.cells)
        for column in zip(*summary.cells, strict=True):
            assert any(cell is not None for cell in column)
    assert found[0][1].labels == ("fine", "loss")  # ranks are those of the table
    text = text_of(board, "average_precision", "self")
    assert text.count("#### ") == 1
    assert text.count("**Flipped labels**") == 1  # its second table continues the first
    assert "**Human errors**\n\n| method | cifar | natural |\n" in text
    assert [line for line in text.splitlines() if line.startswith("| bm25")] == [
        "| bm25 | **0.300** [0.290, 0.310] |"
    ]
    # who names tasks wants them beside each other
    named = text_of(board, "average_precision", "self", ["poison", "flips0"])
    assert "| method | poison | flips0 |" in named
    assert "**Flipped" not in named


def test_every_task_of_ours_is_of_a_kind() -> None:
    """A new module that makes tasks needs a word here, or its tasks are *other* ones."""
    conf = Path(__file__).parents[2] / "conf" / "task"
    targets = [
        line.split(":")[1].split("#")[0].strip()
        for path in sorted(conf.glob("*.yaml"))
        for line in path.read_text().splitlines()
        if line.startswith("_target_:")
    ]
    assert len(targets) > 15
    assert {target.split(".")[-2] for target in targets} <= set(KINDS)


def test_order_of_tasks_and_direction() -> None:
    found = summarise(BOARD, "cost_seconds", "self", ["hard", "easy"])
    assert [t.task for t in found.tables] == ["hard", "easy"]
    text = to_markdown(found)
    assert "| **0.600** [0.590, 0.610] |" in text  # less is better
    assert "Known bad" not in text


@pytest.mark.parametrize(
    ("measure", "target", "tasks", "message"),
    [
        ("speed", "self", [], "no measure 'speed'"),
        ("auroc", "self", [], "run the experiments first"),
        ("average_precision", "all", [], "no target 'all'"),
        ("average_precision", "self", ["x"], "no records of x"),
    ],
)
def test_refusals(measure: str, target: str, tasks: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        summarise(BOARD, measure, target, tasks)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--results", str(tmp_path)]) == 2
    assert "no records below" in capsys.readouterr().err
    assert not (tmp_path / "summary.md").exists()
    shutil.copytree(Path(__file__).parents[2] / "results/published", tmp_path / "published")
    assert main(["--results", str(tmp_path), "--target", "self"]) == 0
    text = (tmp_path / "summary.md").read_text()
    assert capsys.readouterr().out.rstrip() == text.rstrip()
    assert text.splitlines()[2] == "**Flipped labels**"
    heads = [line.count("|") - 2 for line in text.splitlines() if line.startswith("| method")]
    assert len(heads) > 5
    assert max(heads) <= COLUMNS


def test_a_task_without_one_of_the_targets_is_summarised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``--tasks mnist_natural``, which was asked for *self* alone, gave an error and no table."""
    store = RecordStore(tmp_path)
    for seed in range(2):
        draw = torch.Generator().manual_seed(seed)
        metrics = {"average_precision": 0.25, "n_bad": 2.0}
        record = make_record(seed=seed, metrics=metrics)
        store.save(record, InfluenceScores(torch.randn(1, 9, generator=draw), "fine", "self"))
    assert main(["--results", str(tmp_path), "--tasks", record.task]) == 0
    out = capsys.readouterr().out
    assert "**0.250**" in out
    assert f"left out: no record of {record.task} has average_precision on target valid" in out
    assert "left out" not in (tmp_path / "summary.md").read_text()
    assert main(["--results", str(tmp_path), "--measure", "lds"]) == 2
    assert capsys.readouterr().err.count("run the experiments first") == 2
