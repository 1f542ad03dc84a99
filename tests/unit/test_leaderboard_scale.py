"""The synthetic store of ``benchmarks/leaderboard_scale.py`` is one that the tables are made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from fine_bench.store.records import RecordStore
from support.benchmarks import loaded

scale = loaded("leaderboard_scale")


@pytest.mark.parametrize("ties", [False, True])
def test_a_synthetic_store_makes_whole_tables(tmp_path: Path, ties: bool) -> None:
    made = scale.make(tmp_path, records=21, seeds=3, n=30, ties=ties, per_table=4)
    found = RecordStore(tmp_path).scan()
    assert (len(made), len(found.records), found.problems) == (21, 21, [])
    assert len({record.task for record in found.records}) == 2
    assert scale.rebuild(tmp_path)["rows"] == 7
    assert len(RecordStore(tmp_path).scan().consistency) == 7
    assert scale.find(tmp_path, made) > 0


def test_what_is_kept_grows_with_the_square_of_the_seeds(tmp_path: Path) -> None:
    """Four times as much for twice the seeds; all pairs again at every seed were eight times."""
    small, large = (scale.grow(tmp_path / str(n), n, 20) for n in (6, 12))
    assert 3 < large / small < 5
