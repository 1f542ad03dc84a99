"""The README says what the code does."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fine_bench.leaderboard import build as leaderboard
from fine_bench.leaderboard import render, summary
from fine_bench.store.records import RecordStore

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_python_blocks_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    printed = io.StringIO()
    names: dict[str, object] = {}
    with contextlib.redirect_stdout(printed):
        for block in blocks:
            exec(compile(block, "README.md", "exec"), names)
    assert printed.getvalue().count("torch.Size([1, 600])") == 2


def test_the_table_is_that_of_the_records() -> None:
    shown = README.split("<!-- leaderboard:start -->")[1].split("<!-- leaderboard:end -->")[0]
    rows = [line for line in shown.splitlines() if line.startswith("| ")]
    published = (ROOT / "results" / "leaderboard.md").read_text().splitlines()
    assert rows
    assert set(rows) <= set(published)


def test_the_published_leaderboard_is_rebuilt_from_the_published_records() -> None:
    if not (ROOT / "results" / "records").is_dir():
        pytest.skip("results/ holds no records")
    board = leaderboard.build(RecordStore(ROOT / "results"))
    assert render.to_markdown(board) == (ROOT / "results/leaderboard.md").read_text()
    assert render.to_csv(board) == (ROOT / "results/leaderboard.csv").read_text()


def published(folder: Path) -> RecordStore:
    """The published records alone: runs of one's own, which git does not know, lie beside them."""
    if shutil.which("git") is None:
        return RecordStore(ROOT / "results")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "results/records"], cwd=ROOT, capture_output=True, check=False
    )
    names = [name for name in listed.stdout.decode().split("\0") if name]
    if listed.returncode or not names:
        return RecordStore(ROOT / "results")  # not a checkout
    for name in names:
        if (ROOT / name).is_file():
            copy = folder / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy)
    (folder / "results" / "scores").symlink_to(ROOT / "results" / "scores")
    return RecordStore(folder / "results")


def test_the_table_over_tasks_is_that_of_the_records(tmp_path: Path) -> None:
    if not (ROOT / "results" / "records").is_dir():
        pytest.skip("results/ holds no records")
    board = leaderboard.build(published(tmp_path))
    parts = [
        summary.to_markdown(summary.summarise(board, "average_precision", target))
        for target in ("self", "validation")
    ]
    assert "\n".join(parts) == (ROOT / "results" / "summary.md").read_text()
    shown = README.split("<!-- summary:start -->")[1].split("<!-- summary:end -->")[0]
    whole = (ROOT / "results" / "summary.md").read_text().split("#### ")[1:]
    for short, full in zip(shown.split("#### ")[1:], whole, strict=True):
        lines = [line for line in short.splitlines() if line.startswith("| ") and "---" not in line]
        heads = [cell.strip() for cell in lines[0].strip("|").split("|")]
        rows = {line.split(" | ")[0]: line.strip("|").split("|") for line in full.splitlines()}
        columns = [cell.strip() for cell in rows["| method"]]
        assert len(lines) > 5
        for line in lines[1:]:
            for head, cell in list(zip(heads, line.strip("|").split("|"), strict=True))[1:]:
                found = rows[line.split(" | ")[0]][columns.index(head)]
                assert cell.strip() == found.strip().split(" [")[0], line


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if "://" not in target:
            assert (ROOT / target).exists(), target
