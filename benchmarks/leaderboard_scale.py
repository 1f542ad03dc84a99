"""CPU time of the leaderboard on synthetic stores, and how it grows with their size.

    python benchmarks/leaderboard_scale.py [--records 1250 2500 5000 10000] [--seeds 3 30]

Makes a results folder of one's own for every size in the system's temporary folder: records as a
run writes them, one file each, with scores of ``--examples`` training examples (a common order
plus noise, rounded where ``--ties`` asks for it). Then the tables are rebuilt twice, *first* with
nothing but records and scores, and *known* with the comparisons that the first rebuild kept; both
in a process of its own, whose CPU seconds (user and system, one thread) without the imports are
printed. *Find* is the time that a sweep's plan takes to look for one record, in milliseconds, mean
over 200 records that are there and 200 that are not. *Grow* adds seeds to one row, one at a time,
and says how many bytes of comparisons are kept in the end.

CPU seconds are what other work on the machine disturbs least; the growth (seconds a record,
relative to the smallest size) is what must not rise.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fine_bench.leaderboard.build import build
from fine_bench.store.digest import digest
from fine_bench.store.record_json import record_file, record_json, score_file
from fine_bench.store.records import RecordStore
from fine_bench.store.scores import pack, scores_digest
from fine_bench.types import InfluenceScores, RunRecord


def a_record(row: int, table: int, seed: int, n: int) -> RunRecord:
    """A finished record that says what a run of MNIST says, in about as many bytes."""
    noise = np.random.default_rng([row, table, seed])
    estimator = {
        "_target_": "baselines.trak.TRAK",
        "dim": 512,
        "layers": None,
        "projection": "factorized",
        "query_weighting": "noise",
        "ridge": 0.0,
        "seed": None,
        "row": row,
    }
    task = {
        "_target_": "mine.task",
        "n_query": 200,
        "n_train": n,
        "name": f"synthetic_{table}",
        "noise_rate": 0.2,
        "seed": table,
    }
    trainer = {
        "batch_size": 64,
        "init_seed": None,
        "lr": 0.05,
        "lr_schedule": "constant",
        "max_epochs": 15,
        "momentum": 0.0,
        "num_threads": 1,
        "order_seed": None,
        "progress": True,
        "weight_decay": 0.0,
    }
    model = {"_target_": "fine_bench.models.networks.mlp", "hidden": [256], "name": "mlp"}
    auroc, ap, recall, area, top = np.clip(0.8 + 0.05 * noise.normal(size=5), 0, 1).tolist()
    curves = {
        name: noise.random(15).tolist() for name in ("test_accuracy", "test_loss", "train_loss")
    }
    return RunRecord(
        task=f"synthetic_{table}",
        setting=digest(["setting", table]),
        estimator=f"method_{row:03d}",
        estimator_hash=digest(estimator),
        version=1,
        target="self" if row % 2 else "validation",
        seed=seed,
        status="finished",
        metrics={
            "auroc": auroc,
            "average_precision": ap,
            "recall_at_rate": recall,
            "recall_curve_area": area,
            "recall_top_20": top,
            "n_bad": float(max(1, n // 5)),
        },
        cost={"gradient_evaluations": 63000.0, "seconds": float(noise.random())},
        data_sha256=digest(["data", table]),
        config={
            "allow_packages": [],
            "estimator": estimator,
            "model": model,
            "seed": seed,
            "targets": ["self", "validation"],
            "task": task,
            "trainer": trainer,
        },
        environment={
            "commit": "8c32bb0b7036b87b55b04e3cc17fc55961ba9ccb",
            "cores": 2,
            "cpu": "a CPU",
            "dirty": False,
            "fine_bench": "0.1.0",
            "torch": "2.13.0+cpu",
        },
        training={
            "curves": curves,
            "device": "cpu",
            "n_steps": 945,
            "n_train": n,
            "seconds": float(noise.random()),
            "test_accuracy": float(noise.random()),
            "train_accuracy": float(noise.random()),
        },
        scores_sha256="pending",
        created="2026-01-01T00:00:00.000000+00:00",
        sweep="synthetic",
    )


def a_score(row: int, table: int, seed: int, n: int, ties: bool) -> InfluenceScores:
    """Scores ``(1, n)``: an order that the seeds of a row share, plus noise."""
    common = np.random.default_rng([1, row, table]).normal(size=n)
    values = common + 0.5 * np.random.default_rng([2, row, table, seed]).normal(size=n)
    values = np.round(values, 1) if ties else values
    return InfluenceScores(
        torch.from_numpy(values).float()[None],
        f"method_{row:03d}",
        "self" if row % 2 else "validation",
    )


def add(root: Path, row: int, table: int, seed: int, n: int, ties: bool) -> RunRecord:
    """Write one record and its scores, without the flushes of ``RecordStore.save``."""
    scores = a_score(row, table, seed, n, ties)
    record = replace(a_record(row, table, seed, n), scores_sha256=scores_digest(scores))
    record = replace(record, scores_file=score_file(record))
    for path, text in (
        (root / "scores" / record.scores_file, pack(scores)),
        (root / "records" / record_file(record), record_json(record)),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
    return record


def make(
    root: Path, records: int, seeds: int, n: int, ties: bool = False, per_table: int = 24
) -> list[RunRecord]:
    """A store of so many records, rounded down to whole rows, with so many rows a table."""
    rows = [divmod(i, per_table)[::-1] for i in range(max(1, records // seeds))]
    return [
        add(root, row, table, seed, n, ties and row % 2 == 1)
        for row, table in rows
        for seed in range(seeds)
    ]


def cpu() -> float:
    """CPU seconds of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def rebuild(root: Path) -> dict[str, float]:
    """Rebuild in this process: CPU seconds and rows."""
    torch.set_num_threads(1)
    start = cpu()
    board = build(RecordStore(root))
    if board.problems:
        raise SystemExit("\n".join(board.problems[:5]))
    return {"seconds": cpu() - start, "rows": sum(len(t.rows) for t in board.tables)}


def find(root: Path, records: list[RunRecord]) -> float:
    """Milliseconds to look for a record, as ``runner.plan`` does."""
    names = ("task", "setting", "estimator", "estimator_hash", "version", "target", "data_sha256")
    some = records[:: max(1, len(records) // 200)][:200]
    store, start = RecordStore(root), time.process_time()
    for record in some:
        identity = {name: getattr(record, name) for name in names}
        if store.find(**identity, seed=record.seed) is None or store.find(**identity, seed=10**6):
            raise SystemExit(f"{record.estimator} seed {record.seed} was not found as it is")
    return 1000 * (time.process_time() - start) / (2 * len(some))


def grow(root: Path, seeds: int, n: int) -> int:
    """Bytes of comparisons after the tables of one row were rebuilt at every further seed."""
    for seed in range(seeds):
        add(root, 1, 0, seed, n, ties=False)
        if seed:
            rebuild(root)
    return sum(path.stat().st_size for path in root.rglob("consistency--*.json"))


def one_size(
    root: Path, records: int, seeds: int, n: int, ties: bool, per_table: int
) -> dict[str, float]:
    """All figures of one size."""
    made = make(root, records, seeds, n, ties, per_table)
    line: dict[str, float] = {"records": len(made), "seeds": seeds}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    for name in ("first", "known"):
        done = subprocess.run(
            [sys.executable, __file__, "--rebuild", str(root)],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(done.stderr)
        line[name] = json.loads(done.stdout)["seconds"]
    line["find"] = find(root, made)
    return line


def main() -> None:
    """Parse, measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--records", type=int, nargs="+", default=[1250, 2500, 5000, 10000])
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 30])
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=24, help="rows of a table")
    parser.add_argument("--ties", action="store_true", help="every other row has tied scores")
    parser.add_argument("--grow", type=int, nargs="*", default=[5, 10, 20])
    parser.add_argument("--rebuild", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.rebuild is not None:
        print(json.dumps(rebuild(asked.rebuild)))
        return
    print("| records | seeds a row | first, s | known, s | first, ms a record | known | find, ms |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for seeds in asked.seeds:
        for records in asked.records:
            with tempfile.TemporaryDirectory() as folder:
                line = one_size(
                    Path(folder), records, seeds, asked.examples, asked.ties, asked.rows
                )
            size = line["records"]
            print(
                f"| {size:,} | {seeds} | {line['first']:.1f} | {line['known']:.1f} "
                f"| {1000 * line['first'] / size:.2f} | {1000 * line['known'] / size:.2f} "
                f"| {line['find']:.2f} |",
                flush=True,
            )
    for seeds in asked.grow:
        with tempfile.TemporaryDirectory() as folder:
            size = grow(Path(folder), seeds, 100)
        print(f"comparisons kept of a row of {seeds} seeds added one by one: {size:,} bytes")


if __name__ == "__main__":
    main()
