"""Is the reading by rows faithful? A network with batch normalisation beside its twin without.

    FINE_BENCH_DATA=… python benchmarks/batch_norm.py [--models 128] [--seeds 0 1 2]
        [--work /tmp/batch_norm] [--out results/batch_norm.md] [--force]

Two small convolutional networks (``gn_cnn``, ``bn_cnn``) that differ in their normalisation alone
are trained by one recipe: 1,500 MNIST images, 20 % of their labels flipped, plain SGD, 20 epochs.
For each, a bank of ``--models`` models on random halves gives the μ of every example, by the margin
(``fine_bench.metrics.retraining``), and each of ``--seeds`` is a run on all images, scored by the
row ``fine`` and by the control ``mean_loss``. Fidelity is Spearman's correlation with μ, averaged
over the runs; its ceiling is what the bank's own noise allows.

Intervals of 95 % are ± 1.96 standard deviations over 200 draws of models and runs, not quantiles:
μ is noisier where some models count twice and others not at all, which lowers every correlation.
Nothing is chosen by what comes out, so all models count. Banks and scores are kept in ``--work``,
and a second call goes on from there.
"""

from __future__ import annotations

import argparse
import platform
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from numpy.typing import NDArray
from outputs import Outputs, add_force
from safetensors.torch import load_file, save_file
from torch import Tensor

from baselines.controls import MeanTrainingLoss
from fine_bench.callback import FINECallback
from fine_bench.estimator import replay
from fine_bench.metrics.reliability import spearman_rows, split_half
from fine_bench.metrics.retraining import retraining_mu
from fine_bench.runner import bank_config
from fine_bench.runner.backends import images
from fine_bench.runner.bank import BankJob
from fine_bench.runner.cells import problem_of
from fine_bench.runner.config import check
from fine_bench.runner.plan import plan
from fine_bench.runner.schema import config_folder, register
from fine_bench.seeds import derive

Floats = NDArray[np.float64]

TASK = [
    "task=mnist_mlp", "task.name=mnist_norm", "task.n_train=1500", "trainer.max_epochs=20",
    "model.channels=[8,16]", "model.halving=[stride,stride]",
]  # fmt: skip
NETWORKS = {
    "group": ["model=gn_cnn", "model.groups=4"],
    "batch": ["model=bn_cnn"],
}
METHODS = ("fine", "mean_loss")
RESAMPLES = 200
LIMIT = 0.03
"""How far the fidelity of ``fine`` may be below that of the network with group normalisation."""


@dataclass(frozen=True, eq=False)
class Found:
    """One network.

    Attributes:
        members, margin: ``(K, n)`` of the bank.
        scores: ``(runs, n)`` of each method.
        accuracy: of each run, on held-out images.
    """

    members: NDArray[np.bool_]
    margin: Floats
    scores: dict[str, Floats]
    accuracy: Floats

    def fidelity(self, method: str, models: slice | NDArray[np.int64] = slice(None)) -> Floats:
        """Of each run, ``(runs,)``, by the given models of the bank."""
        mu = retraining_mu(self.members[models], self.margin[models]).mu
        scores = self.scores[method]
        return np.asarray(spearman_rows(scores, np.broadcast_to(mu, scores.shape)))

    def ceiling(self) -> float:
        """Of the whole bank."""
        return split_half(self.members, self.margin).ceiling

    def drawn(self, method: str, rng: np.random.Generator) -> float:
        """Mean fidelity of models and runs drawn with replacement."""
        count = len(self.members)
        each = self.fidelity(method, rng.integers(count, size=count))
        return float(rng.choice(each, size=len(each)).mean())


def bank_of(name: str, n_models: int, work: Path) -> tuple[NDArray[np.bool_], Floats]:
    """Who was in each model's training set, and the margins; trains what is missing."""
    register()
    overrides = [*NETWORKS[name], *TASK, f"results_dir={work}", f"bank.models={n_models}"]
    with initialize_config_dir(config_dir=str(config_folder()), version_base="1.3"):
        job = BankJob.prepare(*bank_config.check(compose("bank", [*overrides, "bank.processes=1"])))
    job.run()
    models = job.bank.load("single")
    first = np.argsort(models.subset)[:n_models]
    return models.members[first], models.margin[first].astype(np.float64)


def run_of(name: str, seed: int, work: Path) -> dict[str, Tensor]:
    """Scores and test accuracy of one run on all images."""
    path = work / f"{name}--seed{seed}.safetensors"
    if path.exists():
        return load_file(path)
    register()
    overrides = [*NETWORKS[name], *TASK, f"results_dir={work}", f"seed={seed}"]
    with initialize_config_dir(config_dir=str(config_folder()), version_base="1.3"):
        job = plan(
            check(compose("config", [*overrides, "estimator=[random]", "trainer.progress=false"]))
        )
    # the row ``fine`` of the tables
    callback = FINECallback("self", step_weight="uncertainty")
    run = images.train(job, [callback], None)
    problem = problem_of(job, "self", run.model)
    found = {
        "fine": callback.scores().values[0],
        "mean_loss": replay(MeanTrainingLoss(), problem, run.checkpoints).values[0],
        "accuracy": torch.tensor([run.facts["test_accuracy"]]),
    }
    save_file({key: value.float().contiguous() for key, value in found.items()}, path)
    return found


def measured(name: str, arguments: argparse.Namespace) -> Found:
    """Train what is missing and read it."""
    members, margin = bank_of(name, arguments.models, arguments.work)
    runs = [run_of(name, seed, arguments.work) for seed in arguments.seeds]
    scores = {m: torch.stack([run[m] for run in runs]).double().numpy() for m in METHODS}
    accuracy = torch.cat([run["accuracy"] for run in runs]).double().numpy()
    return Found(members, margin, scores, accuracy)


def interval(value: float, drawn: Floats) -> str:
    """A value with its 95 %."""
    half = 1.96 * float(drawn.std(ddof=1))
    return f"{value:.3f} [{value - half:.3f}, {value + half:.3f}]"


def table(found: dict[str, Found], arguments: argparse.Namespace) -> str:
    """The page."""
    seeds = " ".join(map(str, arguments.seeds))
    command = f"python benchmarks/batch_norm.py --models {arguments.models} --seeds {seeds}"
    lines = [
        "# Batch normalisation by rows, against retraining",
        "",
        f"Made by `{command}` ({arguments.models} models and {len(arguments.seeds)} runs a "
        f"network; torch {torch.__version__}, {platform.machine()}); see the script for what is "
        "measured. "
        "The networks differ in their normalisation alone; `fine` is "
        '`FINECallback("self", step_weight="uncertainty")`, the row of the other tables.',
        "",
        "| normalisation | test accuracy | ceiling | `fine` | of ceiling | `mean_loss` |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    drawn: dict[tuple[str, str], Floats] = {}
    for name, one in found.items():
        for method in METHODS:
            rng = np.random.default_rng(derive(0, f"batch_norm/{name}/{method}"))
            drawn[name, method] = np.array([one.drawn(method, rng) for _ in range(RESAMPLES)])
        ceiling = one.ceiling()
        mean = {method: float(one.fidelity(method).mean()) for method in METHODS}
        lines.append(
            f"| {name} | {one.accuracy.mean():.3f} | {ceiling:.3f} "
            f"| {interval(mean['fine'], drawn[name, 'fine'])} | {mean['fine'] / ceiling:.3f} "
            f"| {interval(mean['mean_loss'], drawn[name, 'mean_loss'])} |"
        )
    lines.append("")
    for method in METHODS:
        below = float(
            found["group"].fidelity(method).mean() - found["batch"].fidelity(method).mean()
        )
        spread = interval(below, drawn["group", method] - drawn["batch", method])
        lines.append(
            f"- `{method}`: fidelity with batch normalisation is {abs(below):.3f} "
            f"{'below' if below > 0 else 'above'} that with group normalisation "
            f"(group minus batch {spread})."
        )
        if method == "fine":
            verdict = "kept" if below <= LIMIT else "**not kept**"
            lines[-1] += f" The limit that was set beforehand, {LIMIT} below, is {verdict}."
    return "\n".join([*lines, ""])


def main() -> None:
    """Train, score, compare, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=int, default=128)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("/tmp") / "batch_norm")
    parser.add_argument("--out", type=Path)
    add_force(parser)
    arguments = parser.parse_args()
    out: Path = arguments.out or Path("results") / "batch_norm.md"
    files = Outputs([out], default=arguments.out is None, force=arguments.force)
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    page = table({name: measured(name, arguments) for name in NETWORKS}, arguments)
    print(page)
    files.write(out, page)


if __name__ == "__main__":
    main()
