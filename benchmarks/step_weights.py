"""Why a form of f-INE fits one bank and not the next: how its sum weighs the steps.

    FINE_BENCH_DATA=… python benchmarks/step_weights.py compute --experiment mnist_mlp --seeds 10 11
    python benchmarks/step_weights.py table

``compute`` trains a run and keeps, for every example i and step t that saw it, the in-batch effect
e_it = K_ii − mean_j K_ij and its noise σ_it = std_j K_ij (*self*, Euclidean), 1 − p_it, the step
size η_t and the batch's mean uncertainty u_t = mean(1 − p). From these every form follows:

    accumulated   Σ_t w_t e_it/d_it / sqrt(Σ_t w_t² σ_it²/d_it²),   d = 1 − p (margin) or 1 (loss)
    standardised  Σ_t w_t e_it/σ_it / sqrt(Σ_t w_t²)      (the callback's ``weighted``)

with the weights w named in the table. ``fine`` is accumulated on the margin with w = η u,
``fine_plain`` with w = η, ``fine_loss`` accumulated on the loss with w = η, ``fine_standardised``
standardised with w = 1, ``fine_weighted`` with w = η u. Standardised, observables and scales of a
step drop out: only w is left.

``table`` compares them with the *development* half of each bank: fidelity over the ceiling, and the
Jaccard index of the 20 % largest scores of two runs, means over runs and over pairs of them;
*shortfall* is the largest distance to the best form on any bank. It writes ``step_weights.md``.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import seed_files
import torch
from gain import Tap
from numpy.typing import NDArray
from outputs import Outputs, add_force
from scipy.stats import spearmanr
from which_form import BANKS

from fine_bench.fine.effects import self_effects
from fine_bench.metrics.consistency import pairwise_consistency
from fine_bench.retraining.truth import Truth
from fine_bench.retraining.truth_files import folders, named
from fine_bench.runner.backends import images

Array: TypeAlias = NDArray[np.float64]
COLUMNS = ("index", "effect", "sigma", "complement", "lr", "uncertainty")
WORK = Path("results/step_weights")
CONTROL = "(mean loss)"
TOP = 0.2
_TINY = 1e-9  # of 1 − p: an example that is fitted to the last digit


class Steps(Tap):
    """Keeps what every step shows of the examples in its batch."""

    seconds = 0.0

    def __init__(self) -> None:
        self.rows: list[tuple[Array, ...]] = []

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any
    ) -> None:
        """Look at the batch."""
        complement = self.complement().double()
        gram = self.gradients().gram()
        effect, sigma = self_effects(gram, None)
        self.recorder.clear()
        lr, u = float(optimizer.param_groups[0]["lr"]), float(complement.mean())
        one = np.ones(len(self.index))
        found = (self.index, effect, sigma, complement)
        self.rows.append((*(x.cpu().double().numpy() for x in found), lr * one, u * one))


def forms(steps: Mapping[str, Array], n: int) -> dict[str, Array]:
    """Every form of one run, ``(n,)`` each.

    Args:
        steps: ``COLUMNS``, each ``(observations,)``; an example without noise beside it
            (``sigma`` 0) adds nothing.
        n: number of training examples.
    """
    index = steps["index"].astype(np.int64)
    known = steps["sigma"] > 0
    effect = np.where(known, steps["effect"], 0.0)
    sigma = np.where(known, steps["sigma"], 1.0)
    lr, u, p = steps["lr"], steps["uncertainty"], np.maximum(steps["complement"], _TINY)

    def total(x: Array) -> Array:
        return np.bincount(index, weights=np.where(known, x, 0.0), minlength=n)

    def inverse(x: Array) -> Array:
        # 0 for an example that was never seen
        return np.divide(1.0, x, where=x > 0, out=np.zeros_like(x))

    def accumulated(w: Array, d: Array | float) -> Array:
        return total(w * effect / d) * inverse(np.sqrt(total((w * sigma / d) ** 2)))

    def standardised(w: Array) -> Array:
        return total(w * effect / sigma) * inverse(np.sqrt(total(w * w)))

    found = {
        "accumulated, margin, η u (`fine`)": accumulated(lr * u, p),
        "accumulated, margin, η (`fine_plain`)": accumulated(lr, p),
        "accumulated, margin, u": accumulated(u, p),
        "accumulated, loss, η u": accumulated(lr * u, 1.0),
        "accumulated, loss, η (`fine_loss`)": accumulated(lr, 1.0),
        "standardised, 1 (`fine_standardised`)": standardised(np.ones_like(u)),
    }
    for power in (0.5, 1.0, 1.5, 2.0, 3.0):
        found[f"standardised, u^{power:g}"] = standardised(u**power)
        found[f"standardised, η u^{power:g}"] = standardised(lr * u**power)
    # what one run knows without gradients: no form, and sets no mark
    found[CONTROL] = -total(np.log1p(-np.minimum(p, 1 - _TINY)))
    return found


def compare(runs: Sequence[Mapping[str, Array]], truth: Truth) -> pd.DataFrame:
    """By form: fidelity to the development half over its ceiling, and Jaccard between runs."""
    half = truth.development
    lines = {}
    for name in runs[0]:
        rho = [spearmanr(run[name], half.mu_margin).statistic / half.ceiling for run in runs]
        k = round(TOP * truth.n_train)
        pairs = [
            pairwise_consistency(a[name], b[name], k, "high")["jaccard"]
            for a, b in combinations(runs, 2)
        ]
        lines[name] = {
            "fidelity": np.mean(rho),
            "jaccard": np.mean(pairs) if pairs else float("nan"),
        }
    return pd.DataFrame.from_dict(lines, orient="index")


def markdown(tables: Mapping[str, pd.DataFrame], runs: Mapping[str, int]) -> str:
    """The page: forms by their largest shortfall."""
    fidelity = pd.DataFrame({task: table["fidelity"] for task, table in tables.items()})
    fidelity = fidelity.drop(index=CONTROL)
    worst = (fidelity.max() - fidelity).max(axis=1).sort_values(kind="stable")
    lines = [
        "# How f-INE weighs the steps",
        "",
        "Made by `python benchmarks/step_weights.py table`, on the *development* half of each "
        "bank: fidelity of *self* scores over the ceiling / Jaccard of two runs' 20 % largest "
        "scores, n runs. η: step size, u: the batch's mean of 1 − p.",
        "",
        "| form, weight of a step | "
        + " | ".join(f"{BANKS[task]} (n = {runs[task]})" for task in tables)
        + " | largest shortfall |",
        "| --- |" + " ---: |" * (len(tables) + 1),
    ]
    for name in (*worst.index, CONTROL):
        shortfall = f"{worst[name]:.3f}" if name in worst.index else "–"
        cells = [
            f"{table.loc[name, 'fidelity']:.3f} / {table.loc[name, 'jaccard']:.2f}"
            for table in tables.values()
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {shortfall} |")
    return "\n".join(lines) + "\n"


def compute(arguments: argparse.Namespace) -> None:
    """Watch the seeds that have no file yet."""
    torch.set_num_threads(1)
    folder = arguments.work / arguments.experiment
    for seed, path in seed_files.missing(folder, arguments.seeds):
        job = seed_files.job_of(
            arguments.experiment, seed, arguments.override, arguments.work / "runs"
        )
        watcher = Steps()
        run = images.train(job, [watcher], None)  # type: ignore[list-item]
        columns = (
            torch.from_numpy(np.concatenate(part)) for part in zip(*watcher.rows, strict=True)
        )
        kept = dict(zip(COLUMNS, columns, strict=True))
        seed_files.save(path, kept)
        print(f"{path}: given labels {run.facts['train_accuracy']:.3f}", flush=True)


def table(arguments: argparse.Namespace) -> None:
    """Compare all that was watched."""
    folder = arguments.output or Path("results")
    path = folder / "step_weights.md"
    outputs = Outputs([path], default=arguments.output is None, force=arguments.force)
    runs = seed_files.load(arguments.work, "step_weights.py")
    tables = {}
    for task in (task for task in BANKS if task in runs):
        truth = named(task, folders(arguments.results))
        found = [
            forms({name: steps[name].numpy() for name in COLUMNS}, truth.n_train)
            for steps in runs[task].values()
        ]
        tables[task] = compare(found, truth)
    outputs.write(path, markdown(tables, {task: len(runs[task]) for task in tables}))
    print(f"written: {path}")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=WORK)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("compute", help="train and keep what every step shows")
    seed_files.add_compute(one, (10, 11))
    one.set_defaults(call=compute)
    two = commands.add_parser("table", help="compare the forms")
    two.add_argument("--results", type=Path, default=Path("results"), help="has the ground truths")
    two.add_argument("--output", metavar="DIR", type=Path, help="default: results")
    add_force(two)
    two.set_defaults(call=table)
    arguments = parser.parse_args(argv)
    arguments.call(arguments)


if __name__ == "__main__":
    main()
