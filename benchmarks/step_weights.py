"""Why a form of f-INE fits one bank and not the next: how its sum weighs the steps.

    FINE_BENCH_DATA=… python benchmarks/step_weights.py compute --experiment mnist_mlp --seeds 10 11
    python benchmarks/step_weights.py table
    python benchmarks/step_weights.py parts [--checkpoints results/checkpoints]

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

``parts`` asks why μ of the accumulated form is no number, on the same halves. With the effective
step size η' = η/(1 − momentum), batches of m and n examples, its μ is a ratio of two numbers in
logits, which the bank measures each:

    effect  Σ_t η'_t e_it/(d_it m_t)                     the mean margin with i minus without
    noise   sqrt(n Σ_t (η'_t σ_it/(d_it m_t))²)          the spread of the margin between models

It writes the slopes (the bank's in one predicted unit, through the origin) to ``slope_parts.md``.
With ``--checkpoints``, the last checkpoints of a sweep, it also takes the spread of an example's
margin between runs, shrunk towards that of all examples, as noise.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
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
from outputs import Outputs, add_force, number_text
from scipy.stats import spearmanr
from torch import Tensor
from which_form import BANKS

from fine_bench.fine.effects import self_effects
from fine_bench.metrics.consistency import pairwise_consistency
from fine_bench.retraining.truth import Truth
from fine_bench.retraining.truth_files import folders, named
from fine_bench.runner.backends import images
from fine_bench.runner.plan import Job

Array: TypeAlias = NDArray[np.float64]
STEP = ("batch", "momentum")
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
        momentum = float(optimizer.param_groups[0].get("momentum", 0.0))
        rates = (lr * one, u * one, len(one) * one, momentum * one)
        self.rows.append((*(x.cpu().double().numpy() for x in found), *rates))


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


def effect_and_noise(steps: Mapping[str, Array], n: int) -> tuple[Array, Array]:
    """What the sums of one run predict, in logits, ``(n,)`` each; see the top of the file."""
    index, known = steps["index"].astype(np.int64), steps["sigma"] > 0
    rate = steps["lr"] / (1.0 - steps["momentum"]) / steps["batch"]
    rate = np.where(known, rate / np.maximum(steps["complement"], _TINY), 0.0)
    effect = np.bincount(index, weights=rate * steps["effect"], minlength=n)
    return effect, np.sqrt(
        n * np.bincount(index, weights=(rate * steps["sigma"]) ** 2, minlength=n)
    )


def spread_between(margins: Array) -> Array:
    """Standard deviation of each example's margin between runs ``(runs, n)``, shrunk.

    Its variance and the mean one of all examples, which counts as four further runs.
    """
    own = margins.var(0, ddof=1)
    freedom = len(margins) - 1
    return np.asarray(np.sqrt((freedom * own + 4.0 * own.mean()) / (freedom + 4.0)))


def margins(job: Job, folder: Path) -> Array:
    """Of all training examples after each whole run in a sweep's checkpoints, ``(runs, n)``."""
    net = images.build_model(job).eval()
    x, y = images.images_of(job).x, images.images_of(job).y[:, None]
    found = []
    for run in sorted(folder.glob("*/seed*")):
        last = max(run.glob("*.ckpt"), default=None)
        if last is None or ".tmp" in run.name:
            continue
        state = torch.load(last, weights_only=True, map_location="cpu")["state_dict"]
        net.load_state_dict(state)
        with torch.no_grad():
            logits = net(x).double()
        rest = logits.scatter(1, y, -torch.inf).logsumexp(1)
        found.append((logits.gather(1, y)[:, 0] - rest).numpy())
    return np.array(found)


def slope(predicted: Array, true: Array) -> float:
    """The true value in one predicted unit, through the origin."""
    return float(predicted @ true / (predicted @ predicted))


def parts(truth: Truth, runs: Sequence[Mapping[str, Array]], of_runs: Array) -> dict[str, float]:
    """One line: slopes of both parts and of the ratios, mean over runs.

    Args:
        truth: whose development half is compared.
        runs: ``COLUMNS`` and ``STEP`` of each.
        of_runs: margins ``(runs, n)``; with fewer than three the spread between them is unknown.
    """
    half = truth.development
    mu, effect = half.mu_margin.astype(np.float64), half.effect_margin.astype(np.float64)
    # the spread is the ratio of the two, which a μ near 0 does not tell
    told = np.abs(mu) > np.median(np.abs(mu))
    spread = effect[told] / mu[told]
    between = spread_between(of_runs) if len(of_runs) > 2 else np.full(len(mu), np.nan)
    lines = []
    for run in runs:
        first, noise = effect_and_noise(run, truth.n_train)
        ratio = np.divide(first, noise, where=noise > 0, out=np.zeros_like(first))
        by_runs = first / between
        lines.append(
            {
                "effect": slope(first, effect),
                "noise": slope(noise[told], spread),
                "mu": slope(ratio, mu),
                "spread between runs": slope(between[told], spread),
                "effect over it": slope(by_runs, mu),
                "true effect over it": slope(effect / between, mu),
                "fidelity": spearmanr(ratio, mu).statistic / half.ceiling,
                "fidelity over it": spearmanr(by_runs, mu).statistic / half.ceiling,
            }
        )
    sizes = {"n": float(len(runs)), "runs": float(len(of_runs))}
    return sizes | {k: float(np.mean([one[k] for one in lines])) for k in lines[0]}


def parts_page(lines: Mapping[str, Mapping[str, float]]) -> str:
    """The page of both parts."""
    text = [
        "# Why μ of one run is no number",
        "",
        "Made by `python benchmarks/step_weights.py parts --checkpoints DIR`, on the *development* "
        "half of each bank, n runs. Slopes: what retraining shows in one predicted unit, 1 where "
        "the prediction is a number. *effect*, *noise*: the two parts of μ of `fine_plain` from a "
        "run's own sums, in logits, and *μ* their ratio. *Between runs*, where checkpoints of a "
        "sweep are at hand: the spread of an example's margin between its runs in place of the "
        "noise, as slopes of the spread itself / of the predicted effect over it / of the *true* "
        "effect over it. Fidelity: of the ceiling, with the noise / between runs.",
        "",
        "| bank | effect | noise | μ | between runs | fidelity |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for task, x in lines.items():
        between = (
            f"{x['spread between runs']:.2f} / {x['effect over it']:.3f} / "
            f"{x['true effect over it']:.2f} (of {x['runs']:.0f} runs)"
            if x["runs"] > 2
            else "–"
        )
        text.append(
            f"| {BANKS[task]} (n = {x['n']:.0f}) | {x['effect']:.3f} | {x['noise']:.3f} | "
            f"{x['mu']:.2f} | {between} | "
            f"{number_text(x['fidelity'])} / {number_text(x['fidelity over it'])} |"
        )
    return "\n".join(text) + "\n"


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
        kept = dict(zip(COLUMNS + STEP, columns, strict=True))
        seed_files.save(path, kept)
        print(f"{path}: given labels {run.facts['train_accuracy']:.3f}", flush=True)


def watched(arguments: argparse.Namespace) -> Iterator[tuple[str, Truth, list[dict[str, Tensor]]]]:
    """Each task with a bank: its truth and what was watched of its runs."""
    runs = seed_files.load(arguments.work, "step_weights.py")
    for task in (task for task in BANKS if task in runs):
        yield task, named(task, folders(arguments.results)), list(runs[task].values())


def table(arguments: argparse.Namespace) -> None:
    """Compare all that was watched."""
    folder = arguments.output or Path("results")
    path = folder / "step_weights.md"
    outputs = Outputs([path], default=arguments.output is None, force=arguments.force)
    tables, counts = {}, {}
    for task, truth, runs in watched(arguments):
        found = [
            forms({name: steps[name].numpy() for name in COLUMNS}, truth.n_train) for steps in runs
        ]
        tables[task], counts[task] = compare(found, truth), len(runs)
    outputs.write(path, markdown(tables, counts))
    print(f"written: {path}")


def explain(arguments: argparse.Namespace) -> None:
    """Compare the parts."""
    torch.set_num_threads(1)
    folder = arguments.output or Path("results")
    path = folder / "slope_parts.md"
    outputs = Outputs([path], default=arguments.output is None, force=arguments.force)
    lines = {}
    for task, truth, runs in watched(arguments):
        found = [{name: x.double().numpy() for name, x in run.items()} for run in runs]
        checkpoints = arguments.checkpoints and arguments.checkpoints / task
        of_runs = np.empty((0, truth.n_train))
        if checkpoints and checkpoints.is_dir():
            job = seed_files.job_of(task, 0, [], arguments.work / "runs")
            of_runs = margins(job, checkpoints)
        lines[task] = parts(truth, found, of_runs)
    outputs.write(path, parts_page(lines))
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
    three = commands.add_parser("parts", help="compare effect and noise with the bank's")
    three.add_argument("--results", type=Path, default=Path("results"), help="has the truths")
    three.add_argument("--checkpoints", type=Path, help="of sweeps over seeds")
    three.add_argument("--output", metavar="DIR", type=Path, help="default: results")
    add_force(three)
    three.set_defaults(call=explain)
    arguments = parser.parse_args(argv)
    arguments.call(arguments)


if __name__ == "__main__":
    main()
