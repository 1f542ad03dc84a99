"""How often one run's interval for μ covers the mean over other seeds.

    FINE_BENCH_DATA=… python benchmarks/interval_coverage.py compute --experiment mnist_mlp \\
        --seeds 0 1 2 3 4 5 6 7 8 9 10 11
    python benchmarks/interval_coverage.py learn
    python benchmarks/interval_coverage.py table

``compute`` trains each seed once, watched by f-INE in several recipes, and keeps μ with two errors:
*naive*, the spread of the run's observations of the shift, taken as independent and with the noise
in the denominator as known; and *jackknife*, that of ``fine_bench.fine.standard_error``. ``learn``
finds the factor on the jackknife from the seeds of ``--learn-seeds`` on ``--learn-from``. ``table``
asks of every seed that was *not* learnt from, and of every example: does the interval of this run
hold the mean μ of the others? It writes ``results/interval_coverage.md`` and ``.csv``.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import NormalDist

import pandas as pd
import seed_files
import torch
from outputs import add_out, number_text, table_files
from torch import Tensor
from torch.utils.data import TensorDataset

from fine_bench.callback import FINECallback
from fine_bench.fine.accumulator import FineAccumulator
from fine_bench.fine.standard_error import (
    INFLATION,
    KERNEL_INFLATION,
    WIDE_INFLATION,
    inflation,
    learn_inflation,
)
from fine_bench.runner.backends import images

COMPUTE = "python benchmarks/interval_coverage.py compute --experiment TASK --seeds 0 1 … 9"
OUT = Path("results")
LEVELS = (0.5, 0.8, 0.9, 0.95, 0.99)
RECIPES: dict[str, dict[str, str | int]] = {
    "fine": {"step_weight": "uncertainty"},
    "fine_plain": {},
    "fine_snapshot": {"schedule": "snapshot"},
    "fine_standardised": {"composition": "standardised"},
    "fine_ekfac": {"geometry": "ekfac", "noise": "model", "step_weight": "uncertainty"},
    "fine_queries": {"schedule": "snapshot", "geometry": "kernel"},
    "fine_sketch": {"step_weight": "uncertainty", "sketch": 16},
}
TARGETS = {
    "fine": ("self", "validation", "queries"),
    "fine_queries": ("queries",),
    "fine_sketch": ("self",),
}
"""Targets of a recipe; *self* and *validation* where it is not named."""
PAIRS = [(r, t) for r in RECIPES for t in TARGETS.get(r, ("self", "validation"))]
N_QUERIES = 10
"""Single queries under *queries*, the first of the task."""


def naive(sums: FineAccumulator) -> Tensor:
    """Spread of the observations of the shift over the noise as it came out, ``(R, n)``."""
    s, k = sums.sums, sums.n_observations.double()
    squares = s["shift2"] - s["shift"].square() / k.clamp_min(1)
    error = (squares.clamp_min(0.0) * k / (k - 1).clamp_min(1)).sqrt()
    return error / (sums.n_train * s["variance"]).sqrt()


def has_naive(recipe: str) -> bool:
    """Whether the naive error exists: of single observations of an accumulated shift."""
    options = RECIPES[recipe]
    return "schedule" not in options and "composition" not in options


def compute(arguments: argparse.Namespace) -> None:
    """Train and watch the seeds that have no file yet."""
    torch.set_num_threads(1)
    name = arguments.name or arguments.experiment
    for seed, path in seed_files.missing(arguments.work / name, arguments.seeds):
        job = seed_files.job_of(
            arguments.experiment, seed, arguments.override, arguments.work / "runs"
        )
        queries = TensorDataset(job.data.query_x, job.data.query_y)
        single = TensorDataset(*(part[:N_QUERIES] for part in queries.tensors))
        asked = {"self": None, "validation": queries, "queries": single}
        watchers = {
            (recipe, target): FINECallback(
                target,  # type: ignore[arg-type]
                queries=asked[target],
                **RECIPES[recipe],  # type: ignore[arg-type]
            )
            for recipe, target in PAIRS
            if recipe in arguments.recipes and (target == "self" or not arguments.self_only)
        }
        run = images.train(job, list(watchers.values()), None)
        found: dict[str, Tensor] = {}
        for key, watcher in watchers.items():
            scores = watcher.scores()
            assert watcher._schedule is not None
            sums = watcher._schedule.accumulator
            found["|".join((*key, "mu"))] = scores.values
            if has_naive(recipe=key[0]):
                found["|".join((*key, "naive"))] = naive(sums)
            found["|".join((*key, "jackknife"))] = sums.mu()[1]
        facts = {key: f"{run.facts[key]:.4f}" for key in ("test_accuracy", "train_accuracy")}
        seed_files.save(path, {k: v.float() for k, v in found.items()}, facts)
        print(f"{name} seed {seed}: {facts}", flush=True)


def load(work: Path) -> dict[str, dict[int, dict[str, Tensor]]]:
    """Task → seed → name → ``(1, n)``."""
    return seed_files.load(work, "interval_coverage.py")


def stacked(runs: Mapping[int, Mapping[str, Tensor]], seeds: Sequence[int], name: str) -> Tensor:
    """One array of several seeds, ``(S, rows · n)``."""
    return torch.stack([runs[seed][name].flatten().double() for seed in seeds])


def learnt(arguments: argparse.Namespace) -> dict[tuple[str, str], float]:
    """(recipe, target) → the factor that the development runs ask for."""
    runs = load(arguments.work)[arguments.learn_from]
    missing = set(arguments.learn_seeds) - set(runs)
    if missing:
        raise SystemExit(f"seeds {sorted(missing)} of {arguments.learn_from} are not computed")
    factors = {}
    for recipe, target in PAIRS:
        prefix = f"{recipe}|{target}"
        if all(f"{prefix}|mu" in runs[seed] for seed in arguments.learn_seeds):
            mu = stacked(runs, arguments.learn_seeds, f"{prefix}|mu")
            error = stacked(runs, arguments.learn_seeds, f"{prefix}|jackknife")
            factors[recipe, target] = learn_inflation(mu, error)
    return factors


def learn(arguments: argparse.Namespace) -> None:
    """Print the factors."""
    print(f"learnt from seeds {arguments.learn_seeds} of {arguments.learn_from}:")
    for (recipe, target), factor in learnt(arguments).items():
        print(f"  {recipe:<14} {target:<11} {factor:.3f}")
    print(f"in the code: {INFLATION} and {WIDE_INFLATION}, see fine_error.inflation")


def coverage(gap: Tensor, error: Tensor, level: float) -> float:
    """Share of runs and examples whose interval holds the mean of the others."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    usable = torch.isfinite(error)
    return float((gap <= z * error)[usable].double().mean())


def rows(arguments: argparse.Namespace) -> pd.DataFrame:
    """One line a task, recipe, target and level."""
    lines = []
    for task, runs in load(arguments.work).items():
        learnt_from = arguments.learn_seeds if task == arguments.learn_from else []
        seeds = [seed for seed in runs if seed not in learnt_from]
        for recipe, target in PAIRS:
            prefix = f"{recipe}|{target}"
            if f"{prefix}|mu" not in runs[seeds[0]]:
                continue
            mu = stacked(runs, seeds, f"{prefix}|mu")
            jackknife = stacked(runs, seeds, f"{prefix}|jackknife")
            known = has_naive(recipe)
            factor = inflation(target, str(RECIPES[recipe].get("geometry", "euclidean")))  # type: ignore[arg-type]
            plain = stacked(runs, seeds, f"{prefix}|naive") if known else jackknife * torch.nan
            gap = (mu - (mu.sum(0) - mu) / (len(seeds) - 1)).abs()
            size = mu.abs().mean(0).argsort().argsort() * 5 // mu.shape[1]
            for level in LEVELS:
                line = {
                    "task": task, "recipe": recipe, "target": target, "seeds": len(seeds),
                    "examples": mu.shape[1], "level": level,
                    "naive": coverage(gap, plain, level) if known else float("nan"),
                    "jackknife": coverage(gap, jackknife, level),
                    "ours": coverage(gap, factor * jackknife, level),
                }  # fmt: skip
                for name, fifth in (("lowest", 0), ("highest", 4)):
                    some = size == fifth
                    line[f"ours_{name}_fifth"] = coverage(
                        gap[:, some], factor * jackknife[:, some], level
                    )
                line["width_ratio"] = float((factor * jackknife / plain).median())
                line["factor_here"] = learn_inflation(mu, jackknife, level)
                lines.append(line)
    return pd.DataFrame(lines)


def table(arguments: argparse.Namespace) -> None:
    """Write the Markdown and the CSV file."""
    files, csv, page = table_files("interval_coverage", arguments.out, OUT, force=arguments.force)
    frame = rows(arguments)
    files.write(csv, frame)
    text = [
        "# How often one run's interval covers the mean over other seeds",
        "",
        f"Made by `{arguments.command}`. Share of (run, example) pairs in which the interval of "
        "one run holds the mean μ of the other runs of the same task; runs differ in "
        "initialisation and order. *naive*: spread of the run's observations of the shift, taken "
        "as independent. "
        "*jackknife*: over the run's epochs, of the whole ratio. *ours*: `std_error`, the "
        f"jackknife times {INFLATION} ({WIDE_INFLATION} for *queries*, and for *validation* in the "
        f"EK-FAC geometry; {KERNEL_INFLATION} in the kernel geometry), learnt from seeds "
        f"{', '.join(map(str, arguments.learn_seeds))} of {arguments.learn_from}, which are not "
        "among the seeds below; no truth and no flag of a bad example was used. *factor*: what "
        "the task would have asked for at that level. Fifths: of the examples by mean |μ|. "
        "*width*: median of ours over naive, where that exists (accumulated, in-batch). *queries*: "
        f"the first {N_QUERIES} of the task, a row each. First, for each task: "
        f"`{COMPUTE}`, and the seeds that are learnt from.",
        "",
        "| task | recipe | target | seeds | nominal | naive | jackknife | ours | lowest fifth | "
        "highest fifth | factor | width |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for line in frame.to_dict("records"):
        text.append(
            f"| {line['task']} | {line['recipe']} | {line['target']} | {line['seeds']} | "
            f"{line['level']:.2f} | {number_text(line['naive'])} | {line['jackknife']:.3f} | "
            f"**{line['ours']:.3f}** | {line['ours_lowest_fifth']:.3f} | "
            f"{line['ours_highest_fifth']:.3f} | {line['factor_here']:.2f} | "
            f"{number_text(line['width_ratio'], 2)} |"
        )
    files.write(page, "\n".join(text) + "\n")
    print(frame[frame.level == 0.95].to_string(index=False))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("results/interval_coverage/work"))
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("compute", help="train and watch")
    seed_files.add_compute(one, range(10))
    one.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    one.add_argument("--self-only", action="store_true", help="leave out the validation target")
    one.set_defaults(call=compute)
    for name, call in (("learn", learn), ("table", table)):
        more = commands.add_parser(name)
        more.add_argument("--learn-from", default="mnist_mlp")
        more.add_argument("--learn-seeds", type=int, nargs="+", default=[100, 101, 102])
        add_out(more, OUT)
        more.set_defaults(call=call, command=f"python benchmarks/interval_coverage.py {name}")
    arguments = parser.parse_args()
    arguments.call(arguments)


if __name__ == "__main__":
    main()
