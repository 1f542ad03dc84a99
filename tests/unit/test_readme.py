"""The README says what the code does."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

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
    published = (ROOT / "results/published/leaderboard.md").read_text().splitlines()
    assert rows
    assert set(rows) <= set(published)


def test_the_table_over_tasks_is_that_of_the_records() -> None:
    """Both are rebuilt by ``test_published_results``."""
    whole = (ROOT / "results/published/summary.md").read_text().split("#### ")[1:]
    shown = README.split("<!-- summary:start -->")[1].split("<!-- summary:end -->")[0]
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
