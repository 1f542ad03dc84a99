"""What cheaper settings of in-batch f-INE lose: fewer refreshes, steps or columns, and sketches.

    FINE_BENCH_DATA=… python benchmarks/cheaper_settings.py [--seeds 0 1 2] [--out results/cheaper]
    FINE_BENCH_DATA=… python benchmarks/cheaper_settings.py --experiment mnist_cnn --targets self
        --out results/cheaper--cnn

Sketches are for layers that are applied at several positions, so of the second form only.

Every setting watches the same training (``--experiment``, one run a seed), so that its scores
differ from the full setting's for no other reason than the setting. For each: Spearman's
correlation with the full setting (``validation``: queries computed anew at every step; ``self``:
the exact Gram matrix at every step), average precision on the planted flips, consistency (mean
Spearman correlation between two seeds), and for *self* the fidelity to retraining where a ground
truth exists. What each setting costs is measured by ``callback_overhead.py``. Writes a CSV and a
Markdown table.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from outputs import Outputs, add_force
from scipy.stats import spearmanr
from seed_files import job_of
from torch.utils.data import TensorDataset

from fine_bench.callback import FINECallback
from fine_bench.metrics.detection import detection_metrics, suspicion
from fine_bench.retraining.truth_files import find, folders
from fine_bench.runner.backends import images
from fine_bench.types import SUSPICIOUS_END

REFRESH = (1, 5, 20, 50, 100, 500)
EVERY = (1, 2, 4, 8)
COLUMNS = (8, 16, 32)
SKETCH = (8, 16, 32, 64)
FULL = {"self": "one step in 1", "validation": "queries every 1 steps"}


def settings(
    queries: TensorDataset, targets: Sequence[str], *, sketches: bool
) -> dict[tuple[str, str], Callable[[], FINECallback]]:
    """What is compared, by target and name; the first of a target is the full setting."""

    def watch(target: Any, **options: Any) -> Callable[[], FINECallback]:
        asked = None if target == "self" else queries
        return lambda: FINECallback(target, queries=asked, step_weight="uncertainty", **options)

    found = {("self", f"one step in {k}"): watch("self", observe_every=k) for k in EVERY}
    found |= {
        ("self", f"{k} reference columns"): watch("self", reference_columns=k) for k in COLUMNS
    }
    if sketches:
        found |= {("self", f"sketch of {k}"): watch("self", sketch=k) for k in SKETCH}
        found["self", "sketch of 16, one step in 2"] = watch("self", sketch=16, observe_every=2)
    for k in REFRESH:
        found["validation", f"queries every {k} steps"] = watch("validation", refresh_every=k)
    for k in EVERY[1:]:
        found["validation", f"queries every 20 steps, one step in {k}"] = watch(
            "validation", refresh_every=max(1, 20 // k), observe_every=k
        )
    return {key: make for key, make in found.items() if key[0] in targets}


def measure(arguments: argparse.Namespace) -> pd.DataFrame:
    """One line a setting: means over seeds."""
    results = arguments.results
    scores: dict[tuple[str, str], list[np.ndarray]] = {}
    detected: dict[tuple[str, str], list[float]] = {}
    faithful: dict[tuple[str, str], list[float]] = {}
    full = {target: (target, name) for target, name in FULL.items()}
    for seed in arguments.seeds:
        job = job_of(arguments.experiment, seed, arguments.overrides, arguments.work)
        truth = find(folders(results), job.data.sha256, job.setting)
        queries = TensorDataset(job.data.query_x, job.data.query_y)
        sketches = not str(job.config.model["_target_"]).endswith(".mlp")
        makers = settings(queries, arguments.targets, sketches=sketches)
        wanted = tuple(arguments.settings)
        watchers = {
            key: make()
            for key, make in makers.items()
            if not wanted or key[1].startswith(wanted) or key[1] == FULL[key[0]]
        }
        images.train(job, list(watchers.values()), None)
        for (target, name), watcher in watchers.items():
            values = watcher.scores().values
            key = (target, name)
            scores.setdefault(key, []).append(values[0].double().numpy())
            end = SUSPICIOUS_END[watcher.options.target]
            metrics = detection_metrics(suspicion(values, end), job.data.truth.is_bad)
            detected.setdefault(key, []).append(metrics["average_precision"])
            if truth is not None and target == "self":
                fidelity = truth.metrics(values, target, "published")["fidelity"]
                faithful.setdefault(key, []).append(fidelity)
        print(f"seed {seed} done", flush=True)
    lines = []
    for key, runs in scores.items():
        target, name = key
        with_full = [spearmanr(a, b)[0] for a, b in zip(runs, scores[full[target]], strict=True)]
        between = [spearmanr(a, b)[0] for a, b in combinations(runs, 2)]
        lines.append(
            {
                "target": target,
                "setting": name,
                "seeds": len(runs),
                "with_full": np.mean(with_full),
                "average_precision": np.mean(detected[key]),
                "consistency": np.mean(between) if between else np.nan,
                "fidelity": np.mean(faithful[key]) if key in faithful else np.nan,
            }
        )
    return pd.DataFrame(lines)


def markdown(frame: pd.DataFrame, command: str) -> str:
    """The table, with the command that made it."""
    titles = {
        "target": "target", "setting": "setting", "seeds": "n", "with_full": "Spearman with full",
        "average_precision": "avg. precision", "consistency": "between seeds",
        "fidelity": "fidelity",
    }  # fmt: skip
    rows = ["| " + " | ".join(titles.values()) + " |", "| --- | --- |" + " ---: |" * 5]
    for line in frame.to_dict("records"):
        cells = [
            "–" if isinstance(v, float) and np.isnan(v) else f"{v:.3f}" if isinstance(v, float)
            else str(v) for v in (line[name] for name in titles)
        ]  # fmt: skip
        rows.append("| " + " | ".join(cells) + " |")
    return (
        "# What cheaper settings of in-batch f-INE lose\n\n"
        f"Made by `{command}`. All settings of a seed watched one and the same training; means "
        "over n seeds. What a setting costs: [overhead](overhead.md).\n\n" + "\n".join(rows) + "\n"
    )


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiment", default="mnist_mlp")
    parser.add_argument("--overrides", nargs="*", default=[], help="of the experiment, as in Hydra")
    parser.add_argument("--targets", nargs="+", default=list(FULL), choices=list(FULL))
    parser.add_argument("--settings", nargs="*", default=[], help="names' beginnings; else all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=Path("results"), help="with ground_truth")
    parser.add_argument("--work", type=Path, default=Path("results/cheaper/work"))
    parser.add_argument("--out", type=Path, default=Path("results/cheaper"), help="without ending")
    add_force(parser)
    arguments = parser.parse_args()
    csv, text = (arguments.out.with_suffix(ending) for ending in (".csv", ".md"))
    default = arguments.out == parser.get_default("out")
    files = Outputs((csv, text), default=default, force=arguments.force)
    torch.set_num_threads(arguments.threads)
    frame = measure(arguments)
    files.write(csv, frame)
    seeds = " ".join(map(str, arguments.seeds))
    command = f"python benchmarks/cheaper_settings.py --experiment {arguments.experiment}"
    if arguments.targets != list(FULL):
        command += f" --targets {' '.join(arguments.targets)}"
    if arguments.overrides:
        command += f" --overrides {' '.join(arguments.overrides)}"
    if arguments.settings:
        command += " --settings " + " ".join(f'"{name}"' for name in arguments.settings)
    files.write(text, markdown(frame, f"{command} --seeds {seeds}"))
    print(frame.to_string(index=False))


if __name__ == "__main__":
    main()
