"""How far a result repeats on another machine: one run under other threads and other kernels.

    python benchmarks/machines.py [--n-train 2000] [--epochs 15] [--out FILE [--force]]

One task (MNIST with 20 % flips, the MLP of ``mnist_mlp``), one run seed. The same cells are made
in processes of their own that differ in nothing but what another machine would change: the number
of threads, and the kernels of PyTorch and of its BLAS, which are made to behave like those of an
older processor by the variables that their makers provide. Each is compared with the first: how
many of the score matrices have the same bits, the lowest rank correlation among them, and the
largest change of a metric. The same with float64 throughout, where rounding starts 10⁹ times
smaller: what stays different there would be no rounding. Last, for comparison, what other seeds do.
Writes the table as Markdown into the results folder, or into ``--out``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from outputs import Outputs

from fine_bench.metrics.detection import suspicion
from fine_bench.metrics.reliability import spearman
from fine_bench.store.records import RecordStore
from fine_bench.types import InfluenceScores, RunRecord

METHODS: dict[str, dict[str, Any]] = {
    "fine": {"_target_": "fine_bench.callback.FINECallback"},
    "tracin": {"_target_": "baselines.tracin.TracIn"},
    "trak": {"_target_": "baselines.trak.TRAK", "ridge": 1.0, "seed": 0},
    "ekfac": {"_target_": "baselines.influence_functions.InfluenceFunction", "solver": "ekfac"},
    "mean_loss": {"_target_": "baselines.controls.MeanTrainingLoss"},
}
IDLE = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "GOMP_SPINCOUNT": "0"}
"""Threads that wait sleep: no bit depends on it, and two of them on a busy machine end sooner."""
OLD_MKL = {"MKL_CBWR": "COMPATIBLE"}
OLD_ATEN = {"ATEN_CPU_CAPABILITY": "default"}
SETTINGS: tuple[tuple[str, int, Mapping[str, str]], ...] = (
    ("the same again", 1, {}),
    ("2 threads", 2, {}),
    ("PyTorch's kernels without AVX (ATEN_CPU_CAPABILITY=default)", 1, OLD_ATEN),
    ("MKL's without AVX (MKL_CBWR=COMPATIBLE)", 1, OLD_MKL),
    ("both, 2 threads", 2, OLD_MKL | OLD_ATEN),
)
Cells = dict[tuple[str, str], tuple[RunRecord, InfluenceScores]]


def compute(root: Path, seed: int, threads: int, dtype: str, n: int, epochs: int) -> None:
    """All cells of one run, in this process."""
    from fine_bench.runner.config import check
    from fine_bench.runner.execution import execute
    from fine_bench.runner.plan import plan

    config = {
        "seed": seed,
        "task": {
            "_target_": "fine_bench.data.mnist.mnist_mislabel",
            "name": "machines",
            "seed": 0,
            "n_train": n,
            "n_query": 200,
        },
        "model": {"_target_": "fine_bench.models.networks.mlp", "name": "mlp", "hidden": [256]},
        "trainer": {
            "max_epochs": epochs,
            "batch_size": 64,
            "lr": 0.05,
            "progress": False,
            "num_threads": threads,
        },
        "targets": ["self", "validation"],
        "estimators": METHODS,
        "results_dir": str(root),
    }
    job = plan(check(OmegaConf.create(config)))
    if dtype == "float64":
        torch.set_default_dtype(torch.float64)
        for name in ("x", "query_x", "test_x"):  # a task of images is float32 by its contract
            object.__setattr__(job.data, name, getattr(job.data, name).double())
    execute(job, "machines", None, lambda _: None)


def run(
    seed: int, threads: int, dtype: str, extra: Mapping[str, str], n: int, epochs: int
) -> Cells:
    """The finished cells of a process of its own."""
    drop = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", *OLD_MKL, *OLD_ATEN)
    environment = {name: value for name, value in os.environ.items() if name not in drop}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, __file__, "--compute",
             json.dumps([folder, seed, threads, dtype, n, epochs])],
            env={**environment, **IDLE, **extra}, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(done.stderr)
        store = RecordStore(folder)
        found = store.scan()
        failed = [r for r in found.records if r.status == "failed"]
        if found.problems or failed:
            raise SystemExit(f"{found.problems} {[(r.estimator, r.reason) for r in failed]}")
        return {
            (r.estimator, r.target): (r, store.load_scores(r))
            for r in found.records
            if r.status == "finished"
        }


def line(name: str, first: Cells, other: Cells) -> list[str]:
    """One row of the table."""
    same = sum(first[cell][0].scores_sha256 == other[cell][0].scores_sha256 for cell in first)
    agreement = {cell: _agreement(first[cell], other[cell]) for cell in first}
    worst = min(agreement, key=lambda cell: agreement[cell])
    changes = {
        metric: max(abs(first[c][0].metrics[metric] - other[c][0].metrics[metric]) for c in first)
        for metric in ("auroc", "average_precision")
    }
    a, b = (next(iter(cells.values()))[0].training["test_accuracy"] for cells in (first, other))
    return [
        name,
        f"{same} of {len(first)}",
        f"{agreement[worst]:.6f} ({worst[0]}, {worst[1]})",
        f"{changes['auroc']:.2g}",
        f"{changes['average_precision']:.2g}",
        f"{abs(a - b):.2g}",
    ]


def _agreement(a: tuple[RunRecord, InfluenceScores], b: tuple[RunRecord, InfluenceScores]) -> float:
    (record, one), (_, other) = a, b
    return spearman(suspicion(one.values, record.end), suspicion(other.values, record.end))


def table(n: int, epochs: int, seeds: int) -> str:
    """All rows, as Markdown."""
    rows: list[list[str]] = []
    first: dict[str, Cells] = {}
    for dtype in ("float32", "float64"):
        first[dtype] = run(0, 1, dtype, {}, n, epochs)
        for name, threads, extra in SETTINGS if dtype == "float32" else SETTINGS[1:]:
            other = run(0, threads, dtype, extra, n, epochs)
            rows.append(line(f"{dtype}: {name}", first[dtype], other))
            print(" | ".join(rows[-1]), flush=True)
    others = [first["float32"], *(run(s, 1, "float32", {}, n, epochs) for s in range(1, seeds))]
    between = [line("", a, b) for a, b in combinations(others, 2)]
    for words, pick in (("the closest two", max), ("the farthest two", min)):
        chosen = pick(between, key=lambda row: float(row[2].split()[0]))
        rows.append([f"float32: of {seeds} seeds {words}", *chosen[1:]])
    head = ["against one thread of this machine", "scores with the same bits",
            "lowest Spearman of scores", "AUROC moved at most by", "average precision",
            "test accuracy"]  # fmt: skip
    about = next(iter(first["float32"].values()))[0].environment
    lines = [head, ["---"] * len(head), *rows]
    said = ", ".join(str(about[name]) for name in ("cpu", "cpu_kernels", "blas", "torch"))
    return "\n".join(
        [
            f"n = {n:,}, {epochs} epochs, {len(first['float32'])} score matrices; {said}.",
            "",
            *(f"| {' | '.join(cells)} |" for cells in lines),
            "",
        ]
    )


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n-train", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--force", action="store_true")
    parser.add_argument("--compute", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.compute is not None:
        folder, *more = json.loads(asked.compute)
        compute(Path(folder), *more)
        return
    path = asked.out or asked.results / "machines.md"
    outputs = Outputs([path], default=asked.out is None, force=asked.force)
    text = table(asked.n_train, asked.epochs, asked.seeds)
    outputs.write(path, text)
    print(text)


if __name__ == "__main__":
    main()
