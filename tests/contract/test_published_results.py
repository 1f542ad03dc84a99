"""What git holds of the results: packed records, and tables that are rebuilt from them alone."""

from __future__ import annotations

import io
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from fine_bench.leaderboard import render, summary
from fine_bench.leaderboard.build import build
from fine_bench.leaderboard.tables import Leaderboard
from fine_bench.metrics.registry import columns, known
from fine_bench.retraining.oracles import limits_in
from fine_bench.store.published import Published, file_text, one_line
from fine_bench.store.records import RecordStore

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "results" / "published"


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory: pytest.TempPathFactory) -> Leaderboard:
    """From a copy of the packed records: neither scores nor anybody's own records are beside it."""
    root = tmp_path_factory.mktemp("published")
    (root / "published").mkdir()
    for path in PUBLISHED.glob("*.jsonl"):
        shutil.copyfile(path, root / "published" / path.name)
    board = build(RecordStore(root), limits=limits_in(root))
    assert [path.name for path in root.iterdir()] == ["published"]  # nothing was computed anew
    return board


def test_the_leaderboard_is_rebuilt_byte_for_byte(rebuilt: Leaderboard) -> None:
    assert rebuilt.problems == ()
    assert render.to_markdown(rebuilt) == (PUBLISHED / "leaderboard.md").read_text()


def test_every_published_number_is_declared(rebuilt: Leaderboard) -> None:
    """But those that are called after a group or after another row."""
    table = pd.read_csv(io.StringIO(render.to_csv(rebuilt)), low_memory=False)
    declared = {one.key for one in columns()} | {one.key for one in known()}
    undeclared = set(table["metric"].dropna()) - declared
    assert {n for n in undeclared if not n.startswith(("group/", "agreement/"))} == set()


def test_the_summary_is_rebuilt_byte_for_byte(rebuilt: Leaderboard) -> None:
    parts = [
        summary.text_of(rebuilt, "average_precision", target) for target in ("self", "validation")
    ]
    assert "\n".join(parts) == (PUBLISHED / "summary.md").read_text()


def test_lines_are_whole_in_order_and_as_the_store_writes_them() -> None:
    tables = list(Published(ROOT / "results").tables())
    assert tables
    for table in tables:
        assert table.problems == ()
        orders = [entry.order for entry in table.entries]
        assert orders == sorted(orders)
        for number, entry in enumerate(table.entries, 1):
            assert entry.where == f"published/{entry.table}:{number}"
            assert one_line(file_text(entry.line)) == entry.line
    assert all(path.read_bytes().endswith(b"}\n") for path in PUBLISHED.glob("*.jsonl"))


def test_git_holds_little() -> None:
    """Under 22 MB without the tests (a quarter of it as an archive), nothing that a run leaves."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("no checkout")
    names = [n for n in listed.stdout.split("\0") if n and not n.startswith("tests/")]
    size = sum((ROOT / name).stat().st_size for name in names if (ROOT / name).is_file())
    assert size < 22e6
    left = ("records", "scores", "figures", "checkpoints", "leaderboard.md", "leaderboard.csv")
    tracked = {name.split("/")[1] for name in names if name.startswith("results/")}
    assert tracked.isdisjoint(left)
    images = [n for n in names if n.startswith("results/") and n.endswith((".png", ".svg"))]
    assert len(images) <= 5
