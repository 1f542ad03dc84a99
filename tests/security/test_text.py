"""Attacks by text: markup, formulas, escape sequences and line breaks in names of others."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from fine_bench.commands import figures, leaderboard, report, sensitivity, summary
from fine_bench.leaderboard import build, render
from fine_bench.leaderboard.sheet import Entry, Head, Line, Sheet, markdown, rich_table
from fine_bench.report.figures.style import canvas, styled, to_bytes
from fine_bench.runner import sweep
from fine_bench.store.record_json import PENDING
from fine_bench.store.records import RecordStore
from fine_bench.store.spreadsheet import cell, to_csv
from fine_bench.terminal import Terminal, marked, say, visible, visible_lines
from support.records import make_record
from support.report_results import fill

ESCAPE = "\x1b]0;owned\x07\x1b[31m\x9b2J"
EVIL = f"[/b][link=file:///x]$\\frac{{$ {ESCAPE}\nproblem: all\u202e \ud800 :smile: | =1"


def printed(*pieces: object) -> str:
    out = io.StringIO()
    console = Terminal(file=out, force_terminal=True, color_system=None, width=200)
    for piece in pieces:
        console.print(piece)
    return out.getvalue()


def test_visible() -> None:
    assert visible(ESCAPE) == r"\x1b]0;owned\x07\x1b[31m\x9b2J"
    assert visible("a\r\nb\tc\u202e\ud800") == r"a\r\nb\tc\u202e\ud800"
    assert visible_lines("a\nb\tc\r") == "a\nb\tc\\r"
    assert visible("μ ≤ 0.3 – “Äß” 漢字 🙂") == "μ ≤ 0.3 – “Äß” 漢字 🙂"


def test_a_console_takes_text_for_text() -> None:
    out = printed(EVIL, marked("error:", f" {EVIL}"), table_of_evil())
    assert "\x1b" not in out
    assert "\x9b" not in out
    assert out.count("[/b][link=file:///x]") >= 2
    assert ":smile:" in out


def table_of_evil() -> object:
    return rich_table(evil_sheet(), EVIL)


def evil_sheet() -> Sheet:
    return Sheet(
        EVIL, (Head(EVIL, left=True), Head(EVIL)), (Line(EVIL, (Entry(EVIL), Entry("1"))),)
    )


def test_a_table_on_any_console_parses_no_markup() -> None:
    out = io.StringIO()
    Console(file=out, width=200).print(rich_table(evil_sheet()))
    assert "[/b]" in out.getvalue()
    assert "\x1b" not in out.getvalue()


def test_names_make_no_lines_of_their_own_in_markdown() -> None:
    lines = markdown(evil_sheet())
    assert len(lines) == 3
    assert not any("\n" in line or "\x1b" in line for line in lines)


def test_say(capsys: pytest.CaptureFixture[str]) -> None:
    say(EVIL)
    say(ESCAPE, error=True)
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    assert "\ud800" not in captured.out


def test_the_consoles_of_the_runner_parse_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(sweep.out, Terminal)
    out = io.StringIO()
    monkeypatch.setattr(sweep, "out", Terminal(file=out))
    with pytest.raises(SystemExit):
        sweep.refuse(ValueError(EVIL))
    assert "[/b]" in out.getvalue()


def test_no_source_file_asks_for_markup() -> None:
    """A line with markup of ours would show its brackets on these consoles."""
    folder = Path(sweep.__file__).parents[1]
    for path in folder.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "rich.markup" not in text, path
        assert "[bold" not in text, path
        if path.name != "terminal.py":
            assert " Console(" not in text, f"{path}: use fine_bench.terminal.Terminal"


TASK = "=cmd|' C calc'!A0[b]$x"


@pytest.fixture(name="evil_results")
def fixture_evil_results(tmp_path: Path) -> Path:
    store = RecordStore(tmp_path)
    evil = EVIL.replace("\ud800", "")
    for seed in (0, 1):
        about = {"setting": "f" * 16, "task": TASK, "seed": seed}
        name = "@" + evil[:60].replace("/", "")
        record = make_record(
            **about, estimator=name, status="failed", reason=evil, metrics={}, scores_sha256=""
        )
        store.save(record, None)
    return tmp_path


def test_tables_of_evil_records(evil_results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for form in ("table", "md", "csv", "json"):
        leaderboard.main(["--results", str(evil_results), "--format", form])
        captured = capsys.readouterr()
        assert "\x1b" not in captured.out + captured.err
        assert "\x9b" not in captured.out + captured.err
        if form == "json":
            json.loads(captured.out)
    for main in (sensitivity.main, summary.main):
        main(["--results", str(evil_results)])
        captured = capsys.readouterr()
        assert "\x1b" not in captured.out + captured.err
    table = pd.read_csv(evil_results / "leaderboard.csv", dtype=str, keep_default_na=False)
    for name in table.columns:
        for value in table[name]:
            assert value[:1] not in ("=", "@"), (name, value)
    board = build.build(RecordStore(evil_results))
    assert "\x1b" not in render.to_markdown(board)


# ------------------------------------------------------------------ csv


@pytest.mark.parametrize("text", ["=1+1", "+cmd", "-cmd", "@SUM(A1)", "  =1", "\t=1", "=\x1b"])
def test_text_is_no_formula(text: str) -> None:
    assert cell(text)[0] not in "=+-@\t "[:5] or cell(text).lstrip()[0] not in "=+-@"


@pytest.mark.parametrize("value", ["-1", "+3.5e-2", "-", "–", "fine", "a=b", -1.5, 3, None, True])
def test_numbers_and_plain_words_stay(value: object) -> None:
    assert cell(value) == value


def test_columns_and_heads_of_a_table() -> None:
    text = to_csv(pd.DataFrame({"=a": ["@x", "y"], "n": [-1.5, 2.0]}))
    assert text == "'=a,n\n'@x,-1.5\ny,2.0\n"


# ------------------------------------------------------------------ figures


@styled
def evil_figure(name: str) -> Figure:
    figure = canvas(4, 3)
    axes = figure.subplots()
    axes.plot([1, 10, 1000], [0, 1, 2], label=name)
    axes.set_xscale("log")
    axes.set_title(name)
    axes.set_yticks([0, 1], labels=[name, name])
    axes.annotate(name, (1, 1))
    axes.legend()
    figure.suptitle(name)
    return figure


@pytest.mark.parametrize("name", ["$", "$x$", "$\\frac{$", "a $1 $2", EVIL])
def test_names_are_no_formulas_in_figures(name: str) -> None:
    figure = evil_figure(name)
    assert to_bytes(figure, "png").startswith(b"\x89PNG")
    ElementTree.fromstring(to_bytes(figure, "svg"))


def test_powers_along_an_axis_stay_formulas() -> None:
    figure = evil_figure("plain")
    labels = [t for t in figure.axes[0].get_xticklabels() if "mathdefault" in t.get_text()]
    assert labels
    assert all(t.get_parse_math() for t in labels)


def test_figures_and_report_of_evil_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = fill(tmp_path, (0,), task="$\\frac{$ [b]\x1b[31m\n=1", setting="e" * 16)
    for record in store.scan().records:
        name = "$x [/b]\x1b$" + record.estimator
        scores = store.load_scores(record)
        changed = replace(record, estimator=name, scores_file="", scores_sha256=PENDING)
        store.save(changed, scores)
    assert report.main(["--results", str(tmp_path)]) in (0, 1)
    assert figures.main(["--results", str(tmp_path)]) in (0, 1)
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    drawn = list((tmp_path / "figures").glob("*.svg"))
    assert drawn
    for path in drawn:
        ElementTree.fromstring(path.read_bytes())
    assert b"\x1b" not in (tmp_path / "report.html").read_bytes()
