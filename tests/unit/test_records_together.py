"""Several processes write into one results folder while another reads it: nothing lost or torn.

The writers start together. Each has a cell of its own; all share one cell, one cached comparison
and one table. The reader checks all of it all the time.
"""

from __future__ import annotations

import multiprocessing
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch

from fine_bench.store import files as files_module
from fine_bench.store.comparisons import Consistency
from fine_bench.store.files import write_atomic
from fine_bench.store.records import RecordStore
from fine_bench.types import InfluenceScores, RunRecord
from support.records import make_record

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "numpy", "pytest", "fine_bench.store.records"])
WRITERS, TIMES, SIZE = 3, 25, 3000
SHARED = 99


def record(writer: int, seed: int, number: int) -> RunRecord:
    return make_record(seed=seed, metrics={"number": float(number)}, training={"writer": writer})


def scores(writer: int, number: int) -> InfluenceScores:
    values = torch.full((1, SIZE), float(1000 * writer + number))
    return InfluenceScores(values=values, method="fine", target="self")


def consistency(value: float) -> Consistency:
    pairs = {(0, 1): {f"metric {i}": value for i in range(200)}}
    return Consistency("digits", "0123456789abcdef", "fine", "self", 5, 1, {0: "a", 1: "b"}, pairs)


def write(root: Path, writer: int, start: Any, locks: bool) -> None:
    if not locks:
        files_module.fcntl = None
    store = RecordStore(root)
    start.wait(60)
    for number in range(TIMES):
        store.save(record(writer, writer, number), scores(writer, number))
        store.save(record(writer, SHARED, number), scores(writer, number))
        store.save_consistency(consistency(float(writer)))
        write_atomic(root / "leaderboard.csv", str(writer).encode() * 20_000)


def look(root: Path) -> int:
    """Check everything that is there now; the number of records."""
    store = RecordStore(root)
    scan = store.scan()
    assert scan.problems == []
    for found in scan.records[-20:]:
        values = store.load_scores(found).values
        expected = 1000 * found.training["writer"] + found.metrics["number"]
        assert torch.equal(values, torch.full((1, SIZE), expected))
    for cached in scan.consistency:
        assert len(set(cached.pairs[0, 1].values())) == 1
    if (root / "leaderboard.csv").exists():
        table = (root / "leaderboard.csv").read_bytes()
        assert len(table) == 20_000
        assert len(set(table)) == 1
    return len(scan.records)


@pytest.mark.parametrize("locks", [True, False], ids=["locks", "no locks"])
def test_writers_and_a_reader_at_once(tmp_path: Path, locks: bool) -> None:
    start = CONTEXT.Barrier(WRITERS + 1)
    processes = [
        CONTEXT.Process(target=write, args=(tmp_path, number, start, locks), daemon=True)
        for number in range(WRITERS)
    ]
    for process in processes:
        process.start()
    start.wait(60)
    seen = [0]
    while any(process.is_alive() for process in processes):
        seen.append(look(tmp_path))
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert seen == sorted(seen)  # what was there once is there later
    assert any(0 < n < 2 * WRITERS * TIMES for n in seen)  # it was read while it was written

    found = RecordStore(tmp_path).scan().records
    assert look(tmp_path) == len(found) == 2 * WRITERS * TIMES
    for writer in range(WRITERS):
        own = sorted((r.revision, r.metrics["number"]) for r in found if r.seed == writer)
        assert own == [(number + 1, float(number)) for number in range(TIMES)]
    shared = sorted((r.revision, r.training["writer"]) for r in found if r.seed == SHARED)
    assert [revision for revision, _ in shared] == list(range(1, WRITERS * TIMES + 1))
    numbers = {(r.training["writer"], r.metrics["number"]) for r in found if r.seed == SHARED}
    assert len(numbers) == WRITERS * TIMES
    turns = [writer for writer, _ in groupby(writer for _, writer in shared)]
    assert len(turns) > WRITERS  # they wrote at the same time, not one after the other
    assert len(list(tmp_path.rglob("*.safetensors"))) == len(found)
    assert not list(tmp_path.rglob("*.tmp"))
