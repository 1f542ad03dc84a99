"""Random damages of every kind of file: the short form of ``benchmarks/fuzz.py``."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.benchmarks import loaded

MUTATIONS = 40


def test_random_damage_is_named_and_breaks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    counts, broken = loaded("fuzz").fuzz(tmp_path, range(MUTATIONS), seed=1)
    assert sum(counts.values()) == MUTATIONS
    assert broken == []
