"""The table over all tasks."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from fine_bench.commands.summary import main
from fine_bench.errors import DataError
from fine_bench.leaderboard.summary import headings, summarise, to_markdown
from fine_bench.leaderboard.tables import Leaderboard, Row, Stat, Table


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
    assert " mnist_mislabel |" in text.splitlines()[2]
