"""What consistency and fidelity cost: f-INE from free to a snapshot a step, TracIn, TRAK.

    FINE_BENCH_DATA=… python benchmarks/pareto.py compute --seeds 0 1 2
    python benchmarks/pareto.py figure

``compute`` trains each seed of ``--experiment`` in pairs, without anything and watched, for every
budget of f-INE (target *self*, margin, steps weighted by uncertainty): in-batch at one step in 8,
4, 2 and at every step, and snapshots of all examples every so many steps, down to every step.
TracIn and TRAK read 1, 3, 5, … of the plain run's checkpoints, equally spaced up to the last one.
Extra cost is time over that of the plain training: for f-INE the wall time of the watched run less
that of the plain one beside it (the median of several pairs where it is small), for the others
that of scoring. ``figure`` writes ``pareto.csv`` and draws
consistency (mean Spearman correlation between the scores of two seeds) and fidelity (Spearman
correlation with the true μ by retraining, ``results/ground_truth``) against it. All points of one
seed come from one process, one after the other. The median of the cost and the mean of the other
two are drawn, with 95 % intervals over seeds, and the ceiling that the truth's own noise sets.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import seed_files
import torch
from matplotlib.figure import Figure
from outputs import Outputs, add_out
from safetensors.torch import load_file
from torch import Tensor

from baselines.tracin import TracIn
from baselines.trak import TRAK
from fine_bench.callback import FINECallback
from fine_bench.estimator import InfluenceEstimator, replay
from fine_bench.metrics.intervals import UNDEFINED, mean_interval, pair_mean_interval
from fine_bench.report.figures.benchmark import title_of
from fine_bench.report.figures.labels import Name, place
from fine_bench.report.figures.style import (
    BLACK,
    BLUE,
    FORMATS,
    GREEN,
    GREY,
    VERMILLION,
    canvas,
    settle,
    styled,
    to_bytes,
)
from fine_bench.retraining.truth import Truth
from fine_bench.retraining.truth_files import find, folders
from fine_bench.runner.backends import images
from fine_bench.runner.cells import problem_of
from fine_bench.runner.plan import Job
from fine_bench.store.files import write_atomic

CHECKPOINTS = (1, 3, 5, 15)
THINNED = (8, 4, 2, 1)
REPEATS = 5
"""Pairs of plain and watched trainings, of whose ratios the median counts."""
OUT = Path("results/pareto")
CHEAP = 16
"""Steps between two snapshots below which one pair is enough: they cost several trainings."""

EVERY = (64, 32, 16, 8, 4, 2, 1)
FAMILIES = {
    "f-INE in-batch": (BLUE, "o"),
    "f-INE snapshots": (BLACK, "s"),
    "TracIn": (VERMILLION, "^"),
    "TRAK": (GREEN, "D"),
}
MEASURES = {"consistency": "Spearman between seeds", "fidelity": "Spearman with the true μ"}


@dataclass(frozen=True)
class Point:
    """One budget of one family."""

    family: str
    budget: int

    @property
    def name(self) -> str:
        """Key of its scores."""
        return f"{self.family}|{self.budget}"

    def watcher(self, seed: int) -> FINECallback:
        """f-INE's callback at this budget: steps between two snapshots, or observed steps."""
        if self.family == "f-INE in-batch":
            return FINECallback("self", step_weight="uncertainty", observe_every=self.budget)
        return FINECallback(
            "self",
            step_weight="uncertainty",
            schedule="snapshot",
            every_n_steps=self.budget,
            seed=seed,
        )

    def estimator(self, seed: int, n_train: int) -> InfluenceEstimator:
        """The method that reads checkpoints; TRAK's dimension stays below the examples."""
        if self.family == "TracIn":
            return TracIn()
        return TRAK(projection="factorized", dim=min(512, n_train // 2), seed=seed)


def spaced(n: int, wanted: int) -> list[int]:
    """``wanted`` of n positions (all if there are fewer), equally spaced, the last included."""
    wanted = min(n, wanted)
    return [(i + 1) * n // wanted - 1 for i in range(wanted)]


def score_seed(job: Job, every: Sequence[int]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Scores ``(1, n)`` of every point, and its extra cost over plain training."""
    found: dict[str, Tensor] = {}
    costs: dict[str, float] = {}
    bases: list[float] = []
    points = [Point("f-INE in-batch", k) for k in THINNED]
    for point in [*points, *(Point("f-INE snapshots", k) for k in every)]:
        cheap = point.family == "f-INE in-batch" or point.budget >= CHEAP
        ratios = []
        for _ in range(REPEATS if cheap else 1):
            plain = images.train(job, [], None)
            bases.append(plain.facts["seconds_with_callbacks"])
            watcher = point.watcher(job.config.seed)
            run = images.train(job, [watcher], None)
            start = time.perf_counter()
            found[point.name] = watcher.scores().values
            finish = time.perf_counter() - start
            ratios.append((run.facts["seconds_with_callbacks"] + finish) / bases[-1])
        costs[point.name] = statistics.median(ratios) - 1.0
    base = statistics.median(bases)
    problem = problem_of(job, "self", plain.model)
    budgets = sorted({min(k, len(plain.checkpoints)) for k in CHECKPOINTS})
    for family in ("TracIn", "TRAK"):
        for budget in budgets:
            point = Point(family, budget)
            chosen = [plain.checkpoints[i] for i in spaced(len(plain.checkpoints), budget)]
            start = time.perf_counter()
            scores = replay(point.estimator(job.config.seed, job.data.n_train), problem, chosen)
            costs[point.name] = (time.perf_counter() - start) / base
            found[point.name] = scores.values
    return found, costs


def compute(arguments: argparse.Namespace) -> None:
    """Score the seeds that have no file yet."""
    torch.set_num_threads(arguments.threads)
    for seed, path in seed_files.missing(arguments.work / arguments.experiment, arguments.seeds):
        job = seed_files.job_of(
            arguments.experiment, seed, arguments.override, arguments.work / "runs"
        )
        found, costs = score_seed(job, arguments.every)
        about = {"costs": costs, "data_sha256": job.data.sha256, "setting": job.setting}
        write_atomic(path.with_suffix(".json"), json.dumps(about, indent=1).encode())
        seed_files.save(path, found)
        print(seed, {name: round(cost, 2) for name, cost in costs.items()}, flush=True)


def measured(
    scores: Mapping[int, Mapping[str, Tensor]],
    costs: Mapping[int, Mapping[str, float]],
    truth: Truth | None,
) -> pd.DataFrame:
    """One line a point: extra cost, consistency, and fidelity where there is a truth."""
    seeds = sorted(scores)
    lines = []
    for name in scores[seeds[0]]:
        family, budget = name.split("|")
        values = {seed: scores[seed][name][0] for seed in seeds}
        faithful = {
            seed: truth.metrics(value[None], "self", "published")["fidelity"]
            for seed, value in values.items()
            if truth is not None
        }
        ranked = {seed: pd.Series(value.numpy()).rank() for seed, value in values.items()}
        spearman = {
            (a, b): float(ranked[a].corr(ranked[b]))
            for i, a in enumerate(seeds)
            for b in seeds[i + 1 :]
        }
        found = {
            "consistency": pair_mean_interval(spearman) if spearman else UNDEFINED,
            "fidelity": mean_interval(faithful) if faithful else UNDEFINED,
        }
        line: dict[str, object] = {
            "family": family, "budget": int(budget), "seeds": len(seeds),
            "extra_cost": float(np.median([costs[seed][name] for seed in seeds])),
        }  # fmt: skip
        for measure, interval in found.items():
            line[measure] = interval.mean
            line[f"{measure}_lower"], line[f"{measure}_upper"] = interval.lower, interval.upper
        lines.append(line)
    return pd.DataFrame(lines)


@styled
def draw(frame: pd.DataFrame, title: str, ceiling: float = float("nan")) -> Figure:
    """Both measures against extra cost with 95 % intervals over seeds; beside a point its budget.

    Args:
        frame: as ``measured`` returns it; without intervals none are drawn.
        title: experiment and number of seeds.
        ceiling: highest fidelity that the noise of the truth allows.
    """
    figure = canvas(9.6, 4.4)
    axes = figure.subplots(1, len(MEASURES), sharex=True)
    title_of(
        figure,
        "What consistency and fidelity cost",
        f"{title}: mean and 95 % interval over seeds; beside a point, checkpoints read or steps "
        "between two observations",
    )
    for axis, (measure, label) in zip(axes, MEASURES.items(), strict=True):
        for family, (colour, marker) in FAMILIES.items():
            some = _points(frame, family, measure)
            reach = np.stack([some.y - some.lower, some.upper - some.y]).clip(min=0)
            axis.errorbar(
                some.x, some.y, yerr=np.nan_to_num(reach), color=colour, marker=marker,
                markersize=5, elinewidth=0.9, capsize=2.0, label=family,
            )  # fmt: skip
        axis.set_xscale("log")
        axis.set_xlabel("extra time / time of plain training")
        axis.set_ylabel(label)
        if measure == "fidelity" and np.isfinite(ceiling):
            axis.axhline(ceiling, color=GREY, linestyle="--", linewidth=1.0,
                         label="ceiling of the truth")  # fmt: skip
        if not np.isfinite(frame[measure]).any():
            axis.text(
                0.5, 0.5, "unknown: too few seeds,\nor no ground truth of this setting",
                transform=axis.transAxes, ha="center", va="center", color=GREY,
            )  # fmt: skip
    handles, labels = axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=len(labels))
    settle(figure)  # the budgets are placed for this layout
    for axis, measure in zip(axes, MEASURES, strict=True):
        names, bars = [], []
        for family, (colour, _) in FAMILIES.items():
            some = _points(frame, family, measure)
            for x, y, low, high, budget in some.itertuples(index=False):
                if np.isfinite(low):
                    bars.append(np.array([(x, low), (x, high)]))
                if budget:
                    names.append(Name(str(int(budget)), x, y, colour))
            xy = some[["x", "y"]].to_numpy()
            bars += [np.stack(pair) for pair in pairwise(xy)]
        place(axis, names, bars)
    return figure


def _points(frame: pd.DataFrame, family: str, measure: str) -> pd.DataFrame:
    """Place, interval and budget of a family's defined points, by budget."""
    some = frame[(frame.family == family) & np.isfinite(frame[measure])]
    missing = pd.Series(np.nan, index=some.index)
    found = pd.DataFrame(
        {
            # a free method may come out faster than plain training: shown at the axis' left end
            "x": some.extra_cost.clip(lower=0.01),
            "y": some[measure],
            "lower": some.get(f"{measure}_lower", missing),
            "upper": some.get(f"{measure}_upper", missing),
            "budget": some.budget,
        }
    )
    return found.sort_values("budget", kind="stable")


def figure(arguments: argparse.Namespace) -> None:
    """Write the table and the figure from what ``compute`` left."""
    stem = arguments.out / f"pareto--{arguments.experiment}"
    csv = stem.with_suffix(".csv")
    pictures = {kind: stem.with_suffix(f".{kind}") for kind in FORMATS}
    files = Outputs((csv, *pictures.values()), default=arguments.out == OUT, force=arguments.force)
    scores, costs, truth = {}, {}, None
    for path in seed_files.paths(arguments.work / arguments.experiment):
        seed = seed_files.seed_of(path)
        scores[seed] = load_file(path)
        about = json.loads(path.with_suffix(".json").read_text())
        costs[seed] = about["costs"]
        truth = find(folders(arguments.results), about["data_sha256"], about["setting"])
    if not scores:
        raise SystemExit(f"no runs of {arguments.experiment} in {arguments.work}; compute first")
    frame = measured(scores, costs, truth)
    files.write(csv, frame)
    ceiling = float("nan") if truth is None else truth.published.ceiling
    drawn = draw(frame, f"{arguments.experiment}, {len(scores)} seeds", ceiling)
    for kind, path in pictures.items():
        files.write(path, to_bytes(drawn, kind))
    print(frame.to_string(index=False))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiment", default="mnist_mlp")
    parser.add_argument("--work", type=Path, default=Path("results/pareto/work"))
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("compute", help="train and score")
    one.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    one.add_argument("--every", type=int, nargs="+", default=list(EVERY))
    one.add_argument("--threads", type=int, default=1)
    one.add_argument("--override", nargs="*", default=[], help="Hydra overrides")
    one.set_defaults(call=compute)
    two = commands.add_parser("figure", help="table and drawing")
    two.add_argument("--results", type=Path, default=Path("results"), help="with ground_truth")
    add_out(two, OUT)
    two.set_defaults(call=figure)
    arguments = parser.parse_args()
    arguments.call(arguments)


if __name__ == "__main__":
    main()
