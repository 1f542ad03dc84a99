"""Where the gain comes from: every form, observable, schedule and geometry on the same runs.

    FINE_BENCH_DATA=… python benchmarks/gain.py compute --experiment mnist_mlp --seeds 0 1 2
    FINE_BENCH_DATA=… python benchmarks/gain.py table --half published

``compute`` trains each seed once and scores it in every way of ``summation_forms``:

    forms       raw, weighted, standardised, accumulated, and whitened (self with EK-FAC)
    observable  margin, loss
    schedule    final (last checkpoint), epochs (end of every epoch), steps (in-batch, every step)
    geometry    euclidean, ekfac (refitted at the start of every epoch; at every checkpoint)
    weight      lr (step sizes), uncertainty (times the mean of 1 − p over batch or training set)

for the targets *self*, *queries* (the first ``--queries`` of the task) and *validation* (their
mean). At most 15 checkpoints are scored, equally spaced up to the last one. Each stands for the
steps since the one before: w = Σ η_t and v = Σ η_t² over them. The reference are 32 examples for
*self* and all training examples for the rest. In-batch, the batch is the reference (with EK-FAC,
16 examples of it for *self*), query gradients are 20 steps old at most, and single queries are
left out with EK-FAC: 100 of them a step would cost ten trainings.

``table`` compares them with the ground truth in ``results/ground_truth`` and writes
``results/gain/``.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gain_table
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from seed_files import job_of
from summation_forms import FormSums, set_row
from torch import Tensor
from torch.utils.data import TensorDataset

from fine_bench.fine.effects import direction_effects, self_effects
from fine_bench.gradients.curvature.ekfac import EKFAC, fit_ekfac
from fine_bench.gradients.curvature.products import Roots
from fine_bench.gradients.engine import GradientEngine
from fine_bench.gradients.per_example import PerExampleGradients
from fine_bench.gradients.reciprocal import inverse_or_zero
from fine_bench.gradients.recorder import LayerRecorder
from fine_bench.runner.backends import images
from fine_bench.runner.plan import Job
from fine_bench.seeds import stream
from fine_bench.types import Problem

OBSERVABLES = ("margin", "loss")
WEIGHTS = ("lr", "uncertainty")
REFRESH, N_REFERENCE, N_REFERENCE_IN_BATCH, BATCH, DAMPING = 20, 32, 16, 500, 0.1
MAX_CHECKPOINTS = 15


def complement_of(logit_gradients: Tensor) -> Tensor:
    """1 − p from p − onehot(y): its positive entries sum to Σ_{k≠y} p_k."""
    return logit_gradients.clamp_min(0.0).sum(1)


class Sums:
    """All forms of one schedule and geometry.

    Args:
        prefix: ``schedule|geometry``.
        n_train, n_query: sizes.
    """

    def __init__(self, prefix: str, n_train: int, n_query: int) -> None:
        self.prefix = prefix
        rows = {"self": 1, "queries": n_query, "mean": 1, "weighted mean": 1}
        self.sums = {
            (target, observable, weight): FormSums(n, n_train)
            for target, n in rows.items()
            for observable in OBSERVABLES
            for weight in WEIGHTS
        }

    def add_self(
        self,
        index: Tensor,
        own: Tensor,
        centred: Tensor,
        sigma: Tensor,
        complement: Tensor,
        weights: dict[str, tuple[float, float]],
    ) -> None:
        """One time: ``own``, ``centred``, ``sigma`` for the loss, each ``(m,)``."""
        for observable in OBSERVABLES:
            factor = inverse_or_zero(complement) if observable == "margin" else torch.ones(())
            implied = (own.sqrt() * factor)[None] if self.prefix.endswith("ekfac") else None
            for weight, (w, v) in weights.items():
                self.sums["self", observable, weight].visit(
                    index, (own * factor)[None], (centred * factor)[None], (sigma * factor)[None],
                    w, v, implied,
                )  # fmt: skip

    def add_queries(
        self,
        index: Tensor,
        c: Tensor,
        complement: Tensor,
        weights: dict[str, tuple[float, float]],
    ) -> None:
        """One time: similarities with the queries' losses, ``(Q, m)``."""
        for observable in OBSERVABLES:
            rows = c * inverse_or_zero(complement)[:, None] if observable == "margin" else c
            spread = rows.std(1)
            self.add_rows("queries", observable, index, rows, weights)
            for weighted, target in enumerate(("mean", "weighted mean")):
                row = set_row(rows, spread, weighted=bool(weighted))
                self.add_rows(target, observable, index, row, weights)

    def add_rows(
        self,
        target: str,
        observable: str,
        index: Tensor,
        rows: Tensor,
        weights: dict[str, tuple[float, float]],
    ) -> None:
        """One time: similarities with given directions, ``(R, m)``."""
        centred, sigma = direction_effects(rows)
        for weight, (w, v) in weights.items():
            self.sums[target, observable, weight].visit(index, rows, centred, sigma, w, v)

    def result(self, scale: float) -> dict[str, Tensor]:
        """``target|schedule|geometry|observable|weight|form`` → float32 rows."""
        found = {}
        for (target, observable, weight), sums in self.sums.items():
            for form, values in sums.scores(scale).items():
                # the plain mean has the raw form, the weighted mean is what the others start from
                if target == "mean" and form != "raw":
                    continue
                if target == "queries" and self.prefix == "steps|ekfac":
                    continue
                if target == "weighted mean":
                    if form == "weighted":
                        continue
                    form = "weighted" if form == "raw" else form
                name = "validation" if "mean" in target else target
                key = "|".join((name, self.prefix, observable, weight, form))
                found[key] = values.float().contiguous()
        return found


def against(own: Tensor, similarity: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Centred similarity with oneself and its noise, each ``(m,)``, in float64.

    Args:
        own: K_ii, ``(m,)``.
        similarity: K_ij with R reference examples, ``(m, R)``.
        reference: their positions among the m, ``(R,)``: nobody is his own reference.
    """
    k = similarity.double()
    other = torch.ones_like(k)
    other[reference, torch.arange(len(reference))] = 0.0
    count = other.sum(1)
    mean = (k * other).sum(1) / count
    sigma = (((k - mean[:, None]) * other).square().sum(1) / (count - 1)).sqrt()
    return own.double() - mean, sigma


class Curvature:
    """EK-FAC fits of one model, the model's own Fisher, on all training examples."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.roots = Roots("fisher", F.cross_entropy, torch.zeros(problem.n_train, 0))

    def batches(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """The training examples."""
        return self.problem.batches("train", BATCH)

    def fit(self, engine: GradientEngine) -> EKFAC:
        """At the present parameters."""
        ekfac = fit_ekfac(engine, self.batches, self.roots, self.problem.n_train)
        ekfac.damp(None, DAMPING)
        return ekfac


class Tap(pl.Callback):
    """Records each training pass; who is below it looks at the batch before its step is taken.

    Attributes:
        recorder: of the pass.
        index: positions of the batch's examples, ``(m,)``.
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach the hooks."""
        self.recorder = LayerRecorder(pl_module, None, tap=True)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Record the pass."""
        self.index: Tensor = batch[2]
        self.recorder.start()

    def complement(self) -> Tensor:
        """Stop recording; 1 − p of the batch's examples, ``(m,)``."""
        self.recorder.stop()
        logits = self.recorder.calls[-1].grad
        assert logits is not None
        return complement_of(logits * len(self.index))

    def gradients(self) -> PerExampleGradients:
        """Of the batch's examples, each of its own loss."""
        m = len(self.index)
        return PerExampleGradients(self.recorder.blocks(m, scale=float(m)))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Detach the hooks."""
        self.recorder.close()


class InBatch(Tap):
    """The schedule ``steps``: what the training batches show, in every way."""

    def __init__(self, problem: Problem, geometries: Sequence[str]) -> None:
        assert not isinstance(problem.queries, str)
        self.problem = problem
        self.query_x, self.query_y = problem.queries.tensors  # type: ignore[attr-defined]
        self.sums = {g: Sums(f"steps|{g}", problem.n_train, problem.n_query) for g in geometries}
        self.costs = dict.fromkeys(geometries, 0.0)
        self.rates: dict[int, list[float]] = defaultdict(list)
        self.m = 0

    @property
    def seconds(self) -> float:
        """What the runner subtracts from the time of training."""
        return sum(self.costs.values())

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach the hooks."""
        super().on_fit_start(trainer, pl_module)
        self.engine = GradientEngine(pl_module, F.cross_entropy)
        self.curvature = Curvature(self.problem)
        self.step = 0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refit the curvature."""
        start = time.perf_counter()
        if "ekfac" in self.sums:
            self.ekfac = self.curvature.fit(self.engine)
            self.costs["ekfac"] += time.perf_counter() - start

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any
    ) -> None:
        """Look at the batch."""
        start = time.perf_counter()
        complement = self.complement()
        lr = float(optimizer.param_groups[0]["lr"])
        self.rates[trainer.current_epoch].append(lr)
        self.m = max(self.m, len(self.index))
        g = self.gradients()
        u = float(complement.mean())
        weights = {"lr": (lr, lr**2), "uncertainty": (lr * u, (lr * u) ** 2)}
        if self.step % REFRESH == 0:
            self.queries = self.engine(self.query_x, self.query_y)
        shared = time.perf_counter() - start
        start = time.perf_counter()
        sums = self.sums["euclidean"]
        gram = g.gram()
        centred, sigma = self_effects(gram, None)
        sums.add_self(self.index, gram.diagonal(), centred, sigma, complement, weights)
        sums.add_queries(self.index, self.queries.gram(g), self.query_complement, weights)
        self.costs["euclidean"] += time.perf_counter() - start + shared
        if "ekfac" in self.sums:
            start = time.perf_counter()
            self._whitened(g, complement, weights)
            self.costs["ekfac"] += time.perf_counter() - start + shared
        self.recorder.clear()
        self.step += 1

    @property
    def query_complement(self) -> Tensor:
        """1 − p of the queries at their last look."""
        assert self.queries.one_minus_p is not None
        return self.queries.one_minus_p

    def _whitened(
        self, g: PerExampleGradients, complement: Tensor, weights: dict[str, tuple[float, float]]
    ) -> None:
        """The batch in the geometry of the inverse curvature."""
        sums, view = self.sums["ekfac"], self.ekfac.view(g)
        reference = slice(0, min(N_REFERENCE_IN_BATCH, len(g)))
        similarity = view.contract(self.ekfac.prepare(g.rows(reference))).T
        own = self.ekfac.quadratic(g)
        sums.add_self(
            self.index, own, *against(own, similarity, torch.arange(reference.stop)), complement,
            weights,
        )  # fmt: skip
        if self.step % REFRESH == 0:
            spread = view.contract(self.ekfac.prepare(self.queries)).std(1)
            ones = torch.eye(len(spread))
            means = [
                set_row(
                    ones * inverse_or_zero(self.query_complement)[:, None], spread, weighted=False
                ),
                set_row(ones, spread, weighted=False),
                set_row(ones, spread, weighted=True),
            ]
            # c_q/σ_q does not depend on the observable: three directions serve both
            self.directions = self.ekfac.solve(self.queries.weighted_sum(torch.cat(means)))
        margin, loss, weighted = g.contract(self.directions).split(1)
        for observable, mean in (("margin", margin), ("loss", loss)):
            sums.add_rows("mean", observable, self.index, mean, weights)
            sums.add_rows("weighted mean", observable, self.index, weighted, weights)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Detach the hooks."""
        super().on_fit_end(trainer, pl_module)
        self.engine.close()


def snapshot(
    net: torch.nn.Module,
    problem: Problem,
    geometry: str,
    sums: Sequence[Sums],
    weights: Sequence[tuple[float, float]],
) -> None:
    """All examples at the present parameters, into each of ``sums`` with its (w, v)."""
    n = problem.n_train
    engine = GradientEngine(net, F.cross_entropy)
    ekfac = Curvature(problem).fit(engine) if geometry == "ekfac" else None
    reference = torch.randperm(n, generator=stream(0, "gain/reference"))[:N_REFERENCE]
    x, y = problem.train.tensors  # type: ignore[attr-defined]
    queries = engine(*problem.queries.tensors)  # type: ignore[union-attr]
    references = engine(x[reference], y[reference])
    if ekfac is not None:
        query_directions, directions = ekfac.prepare(queries), ekfac.prepare(references)
    own, complement, cross, gram = [], [], [], []
    for _, xb, yb in problem.batches("train", BATCH):
        g = engine(xb, yb)
        if ekfac is None:
            own.append(g.norm2())
            gram.append(g.gram(references))
            cross.append(queries.gram(g))
        else:
            view = ekfac.view(g)
            own.append(ekfac.quadratic(g))
            gram.append(view.contract(directions).T)
            cross.append(view.contract(query_directions))
        complement.append(g.one_minus_p)
    engine.close()
    mine = torch.cat(own)
    centred, sigma = against(mine, torch.cat(gram), reference)
    one_minus_p = torch.cat(complement)
    every = torch.arange(n)
    u = float(one_minus_p.mean())
    for target, (w, v) in zip(sums, weights, strict=True):
        pairs = {"lr": (w, v), "uncertainty": (w * u, v * u * u)}
        target.add_self(every, mine, centred, sigma, one_minus_p, pairs)
        target.add_queries(every, torch.cat(cross, 1), queries.one_minus_p, pairs)


def spaced(n: int) -> list[int]:
    """At most ``MAX_CHECKPOINTS`` of n checkpoints, equally spaced, the last one included."""
    step = -(-n // MAX_CHECKPOINTS)
    return list(range(n - 1, -1, -step))[::-1]


def score_run(job: Job, n_query: int, geometries: Sequence[str]) -> tuple[dict[str, Tensor], dict]:
    """Train one seed and score it in every way."""
    data = job.data
    problem = Problem(
        model=torch.nn.Identity(),
        loss=F.cross_entropy,
        train=TensorDataset(data.x, data.y),
        queries=TensorDataset(data.query_x[:n_query], data.query_y[:n_query]),
    )
    watcher = InBatch(problem, geometries)
    run = images.train(job, [watcher], None)  # type: ignore[list-item]
    n, m = data.n_train, watcher.m
    found: dict[str, Tensor] = {}
    costs = {f"steps|{g}": seconds for g, seconds in watcher.costs.items()}
    for geometry, sums in watcher.sums.items():
        found |= sums.result(1 / math.sqrt(n))
        epochs = Sums(f"epochs|{geometry}", n, problem.n_query)
        final = Sums(f"final|{geometry}", n, problem.n_query)
        start = time.perf_counter()
        chosen = spaced(len(run.checkpoints))
        for before, number in zip([-1, *chosen], chosen, strict=False):
            run.model.load_state_dict(dict(run.checkpoints[number].params))
            rates = [r for epoch in range(before + 1, number + 1) for r in watcher.rates[epoch]]
            targets, weights = [epochs], [(sum(rates), sum(r * r for r in rates))]
            if number == chosen[-1]:
                last = time.perf_counter()
                targets, weights = [epochs, final], [*weights, (1.0, 1.0)]
            snapshot(run.model, problem, geometry, targets, weights)
        end = time.perf_counter()
        costs |= {f"epochs|{geometry}": end - start, f"final|{geometry}": end - last}
        found |= epochs.result(math.sqrt(m) / n) | final.result(math.sqrt(m) / n)
    facts = {key: run.facts[key] for key in ("seconds", "test_accuracy", "train_accuracy")}
    return found, {**facts, **{f"seconds {key}": value for key, value in costs.items()}}


def compute(arguments: argparse.Namespace) -> None:
    """Score the seeds that have no file yet."""
    torch.set_num_threads(arguments.threads)
    folder = arguments.work / arguments.experiment / arguments.vary
    folder.mkdir(parents=True, exist_ok=True)
    fixed = {
        "both": [], "initialisation": ["trainer.order_seed=0"], "order": ["trainer.init_seed=0"]
    }[arguments.vary]  # fmt: skip
    geometries = ("euclidean",) if arguments.no_ekfac else ("euclidean", "ekfac")
    for seed in arguments.seeds:
        path = folder / f"seed{seed}.safetensors"
        if path.exists():
            continue
        job = job_of(arguments.experiment, seed, fixed, arguments.work / "runs")
        found, facts = score_run(job, arguments.queries, geometries)
        metadata = {
            **{key: repr(float(value)) for key, value in facts.items()},
            "task": job.data.name, "data_sha256": job.data.sha256, "setting": job.setting,
        }  # fmt: skip
        temporary = path.with_suffix(".tmp")
        save_file(found, temporary, metadata)
        temporary.rename(path)
        seconds = ", ".join(f"{k[8:]} {v:.0f} s" for k, v in facts.items() if k[:8] == "seconds ")
        print(
            f"{arguments.experiment} seed {seed}: trained in {facts['seconds']:.1f} s, test "
            f"accuracy {facts['test_accuracy']:.3f}, given labels {facts['train_accuracy']:.3f}; "
            f"{seconds}",
            flush=True,
        )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("results/gain/work"))
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("compute", help="train and score")
    one.add_argument("--experiment", required=True)
    one.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    one.add_argument("--queries", type=int, default=100)
    one.add_argument("--vary", choices=("both", "initialisation", "order"), default="both")
    one.add_argument("--no-ekfac", action="store_true", help="leave out the dear geometry")
    one.add_argument("--threads", type=int, default=1)
    one.set_defaults(call=compute)
    two = commands.add_parser("table", help="compare with the ground truth")
    gain_table.add_arguments(two)
    arguments = parser.parse_args()
    arguments.call(arguments)


if __name__ == "__main__":
    main()
