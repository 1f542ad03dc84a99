"""The schedule ``snapshot``: its timing, its scale, what it leaves untouched, and resuming."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fine_bench.callback import FINECallback
from fine_bench.fine.batch_adapter import BatchAdapter
from fine_bench.fine.effects import reference_effects
from fine_bench.fine.snapshot import SnapshotSchedule
from fine_bench.fine.snapshot_accumulator import SnapshotAccumulator, SnapshotInterval, SnapshotPlan
from fine_bench.fine.training_data import TrainingData
from fine_bench.types import UnsupportedProblemError
from support.training import QUIET

N, BATCH, CLASSES = 24, 8, 3


class Scale(nn.Module):
    """A layer without factors."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Module(pl.LightningModule):
    """Dropout, and a step size that decays."""

    def __init__(self, dropout: float = 0.3, middle: nn.Module | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(
                nn.Linear(6, 8), middle or nn.Identity(), nn.ReLU(), nn.Dropout(dropout)
            )
            self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.2)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)]


def data(n: int = N) -> TensorDataset:
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(n, 6, generator=g), torch.randint(CLASSES, (n,), generator=g)
    return TensorDataset(x, y, torch.arange(n))


def queries() -> TensorDataset:
    g = torch.Generator().manual_seed(2)
    return TensorDataset(torch.randn(5, 6, generator=g), torch.randint(CLASSES, (5,), generator=g))


def watch(target: Any = "self", **options: Any) -> FINECallback:
    asked = None if target == "self" else queries()
    options = {"schedule": "snapshot", "n_reference": 10, **options}
    return FINECallback(target, queries=asked, **options)


def fit(
    *callbacks: pl.Callback,
    module: pl.LightningModule | None = None,
    dataset: Dataset[Any] | None = None,
    shuffle: bool = True,
    resume: Path | None = None,
    batch: int = BATCH,
    **options: Any,
) -> tuple[pl.LightningModule, pl.Trainer]:
    torch.manual_seed(4)  # dropout
    module = module or Module()
    loader = (DataLoader if shuffle else Resumable)(
        dataset or data(),
        batch_size=batch,
        shuffle=shuffle,
        generator=torch.Generator().manual_seed(3),
    )
    trainer = pl.Trainer(**{"max_epochs": 3, **QUIET, **options}, callbacks=list(callbacks))
    trainer.fit(module, loader, ckpt_path=resume)
    return module, trainer


# ------------------------------------------------------------------------------------ one snapshot


def test_reference_effects_are_the_plain_formula() -> None:
    g = torch.Generator().manual_seed(0)
    everyone = torch.randn(2, 12, generator=g, dtype=torch.float64) ** 3
    reference = torch.tensor([1, 4, 5, 9])
    examples = torch.tensor([0, 4, 7, 9])
    for contrast in ("substitution", "removal"):
        effect, sigma = reference_effects(
            everyone[:, examples],
            everyone[:, reference],
            torch.isin(examples, reference),
            contrast,  # type: ignore[arg-type]
        )
        # the same numbers, with a row of reference products for each example
        each = everyone[:, reference][:, None, :].expand(2, 4, 4)
        own = reference_effects(
            everyone[:, examples],
            each,
            torch.isin(examples, reference),
            contrast,  # type: ignore[arg-type]
        )
        for row in range(2):
            for k, i in enumerate(examples.tolist()):
                others = [j for j in reference.tolist() if j != i]
                c = everyone[row, others]
                expected = everyone[row, i] - (c.mean() if contrast == "substitution" else 0.0)
                assert torch.isclose(effect[row, k], expected, rtol=1e-12)
                assert torch.isclose(sigma[row, k], c.std(), rtol=1e-10)
        assert torch.allclose(own[0], effect, rtol=1e-12)
        assert torch.allclose(own[1], sigma, rtol=1e-12)


class Still(torch.optim.SGD):
    """Steps of a size that is recorded and never taken."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return None if closure is None else closure()


@pytest.mark.parametrize("target", ["self", "validation"])
@pytest.mark.parametrize("composition", ["accumulated", "weighted", "standardised"])
def test_both_schedules_estimate_the_same_number(target: Any, composition: Any) -> None:
    """Where nothing moves, the in-batch estimate converges to that of the snapshots."""

    class Frozen(Module):
        def configure_optimizers(self) -> Any:
            return Still(self.parameters(), lr=0.2)

    options: dict[str, Any] = {"composition": composition, "query_weighting": None}
    once = watch(target, n_reference=48, n_snapshots=1, **options)
    thrice = watch(target, n_reference=48, n_snapshots=3, **options)
    in_batch = FINECallback(target, queries=once.options.queries, refresh_every=10**6, **options)
    fit(once, thrice, in_batch, module=Frozen(0.0), dataset=data(48), batch=24, max_epochs=100)
    a, b = (callback.scores().values for callback in (once, in_batch))
    scale = float(a.abs().max())
    if composition == "accumulated":
        # a mean over 23 batch mates is off by about σ/sqrt(23) at each of the 100 observations
        assert float((a - b).abs().max()) < 0.06 * scale
        assert abs(float((a - b).mean())) < 0.01 * scale
    else:
        # the mean of 1/σ̂ over batches lies above 1/σ
        assert float((a - b).abs().max()) < 0.12 * scale
    assert torch.allclose(thrice.scores().values, a, rtol=1e-5)
    bounds = [callback.scores().extras["bound"] for callback in (once, thrice, in_batch)]
    assert torch.allclose(bounds[0], bounds[1], rtol=1e-5)
    large = bounds[0] > bounds[0].median()
    assert torch.allclose(bounds[0][large], bounds[2][large], rtol=0.25)


def test_variance_of_the_statistic_over_whole_runs() -> None:
    """μ's denominator is the spread of X over runs that draw other batches, sizes unequal."""
    g = torch.Generator().manual_seed(0)
    n, i = 40, 7
    c = torch.randn(n, generator=g, dtype=torch.float64) + 1.0
    c[i] = 6.0
    steps = [(0.3, 10), (0.1, 4), (0.2, 10), (0.05, 20)]
    runs = 4000
    x = torch.zeros(runs, dtype=torch.float64)
    others = torch.cat([c[:i], c[i + 1 :]])
    for lr, m in steps:
        # with replacement: batches of independent examples, as the variance σ²/m means it
        drawn = torch.randint(n - 1, (runs, m), generator=g)
        x += lr * others[drawn].mean(1)
    interval = SnapshotInterval()
    for lr, m in steps:
        interval.add(lr, m)
    sums = SnapshotAccumulator(n, 1)
    effect, sigma = reference_effects(c[None, [i]], c[None], torch.tensor([True]))
    sums.observe_snapshot(torch.tensor([i]), effect, sigma, interval)
    expected_shift = sum(lr for lr, _ in steps) * (c[i] - others.mean()) / n
    assert torch.isclose(sums.mu()[0][0, i], expected_shift / x.std(), rtol=0.04)


def test_standard_error_is_the_spread_over_runs() -> None:
    g = torch.Generator().manual_seed(2)
    interval = SnapshotInterval()
    for _ in range(6):
        interval.add(0.1, 10)
    everyone = torch.arange(3)
    for composition in ("accumulated", "weighted", "standardised"):
        values, errors = [], []
        for _ in range(400):
            sums = SnapshotAccumulator(20, 1, composition)  # type: ignore[arg-type]
            for _ in range(12):
                effect = 0.5 + torch.randn(1, 3, generator=g)
                sums.observe_snapshot(everyone, effect, torch.ones(1, 3), interval)
            mu, error = sums.mu()
            values.append(mu[0, :3])
            errors.append(error[0, :3])
            assert torch.isinf(error[0, 3:]).all()
        spread = torch.stack(values).std()
        assert abs(float(torch.stack(errors).mean() / spread) - 1) < 0.08


# ------------------------------------------------------------------------------------------- when


def test_the_plan() -> None:
    def snapshots(plan: SnapshotPlan) -> list[int]:
        return [step for step in range(1, 13) if plan.due(step, epoch_ends=step % 4 == 0)]

    assert snapshots(SnapshotPlan()) == [4, 8, 12]
    assert snapshots(SnapshotPlan(every_n_steps=5)) == [5, 10]
    assert snapshots(SnapshotPlan(n_snapshots=3, total_steps=12)) == [4, 8, 12]
    assert snapshots(SnapshotPlan(n_snapshots=5, total_steps=12)) == [3, 5, 8, 10, 12]
    assert snapshots(SnapshotPlan(n_snapshots=50, total_steps=12)) == list(range(1, 13))
    with pytest.raises(ValueError, match="number of steps is unknown"):
        SnapshotPlan(n_snapshots=3, total_steps=math.inf)


@pytest.mark.parametrize(
    ("options", "count"),
    [({}, 3), ({"every_n_steps": 2}, 5), ({"n_snapshots": 4}, 4), ({"every_n_steps": 100}, 1)],
)
def test_observations_and_cost_are_counted(options: dict[str, Any], count: int) -> None:
    callback = watch("validation", **options)
    fit(callback)
    scores = callback.scores()
    assert scores.n_observations is not None
    assert scores.n_observations.tolist() == [count] * N
    assert callback.gradient_evaluations == count * (N + 10 + 5)
    assert callback.seconds > 0
    fitted = watch("validation", geometry="ekfac", fit_examples=15, **options)
    fit(fitted)
    fits = (fitted.gradient_evaluations - callback.gradient_evaluations) / 30
    # one an epoch at most
    assert fits == min(count, 3)


def test_an_unknown_number_of_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="give the Trainer max_epochs or max_steps"):
        fit(watch(n_snapshots=3), max_epochs=-1)


# ------------------------------------------------------------------------- what stays as it was


@pytest.mark.parametrize("target", ["self", "validation"])
@pytest.mark.parametrize("geometry", ["euclidean", "ekfac"])
def test_watching_changes_nothing(target: Any, geometry: Any) -> None:
    class Order(pl.Callback):
        def __init__(self) -> None:
            self.seen: list[list[int]] = []
            self.modes: set[bool] = set()
            self.random: list[float] = []

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any) -> None:
            self.seen.append(batch[2].tolist())
            self.modes |= {part.training for part in pl_module.modules()}
            self.random += [float(torch.rand(())), float(np.random.rand())]  # noqa: NPY002

    def run(*callbacks: pl.Callback) -> tuple[pl.LightningModule, Order]:
        np.random.seed(0)  # noqa: NPY002
        order = Order()
        return fit(*callbacks, order)[0], order

    plain, alone = run()
    options: dict[str, Any] = {"geometry": geometry, "fit_examples": 15}
    watchers = [
        watch(target, every_n_steps=1, **options),
        FINECallback(target, queries=None if target == "self" else queries(), **options),
    ]
    watched, beside = run(*watchers)
    assert alone.seen == beside.seen
    assert alone.random == beside.random
    assert beside.modes == {True}
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.equal(a.grad, b.grad)  # type: ignore[arg-type]
    assert not any(m._forward_hooks for m in watched.modules())


def test_snapshots_leave_out_dropout_and_the_random_state_of_the_data() -> None:
    class Frozen(Module):
        def configure_optimizers(self) -> Any:
            return Still(self.parameters(), lr=0.2)

    class Drawing(Dataset[Any]):
        """Reading an example draws random numbers."""

        def __len__(self) -> int:
            return N

        def __getitem__(self, i: int) -> Any:
            torch.rand(())
            return data()[i]

    without, dropped = watch(), watch()
    fit(without, module=Frozen(0.0))
    fit(dropped, module=Frozen(0.9))
    assert torch.equal(without.scores().values, dropped.scores().values)
    plain, _ = fit(dataset=Drawing())
    for geometry in ("euclidean", "ekfac"):
        watched, _ = fit(watch(geometry=geometry), dataset=Drawing())
        for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
            assert torch.equal(a, b)


def test_scores_can_be_repeated_and_the_seed_draws_the_reference() -> None:
    callbacks = [watch(), watch(), watch(seed=1)]
    for callback in callbacks:
        fit(callback)
    values = [callback.scores().values for callback in callbacks]
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])
    schedule = callbacks[0]._schedule
    assert isinstance(schedule, SnapshotSchedule)
    draws = [schedule.draw_reference(step).tolist() for step in (3, 6)]
    assert draws[0] != draws[1]
    for draw in draws:
        assert draw == sorted(set(draw))
        assert len(draw) == 10


def test_watched_examples_get_the_scores_that_they_get_among_all() -> None:
    everyone, some = (
        watch(step_weight="uncertainty"),
        watch(step_weight="uncertainty", watched=[17, 3, 11]),
    )
    fit(everyone)
    fit(some)
    whole, part = everyone.scores(), some.scores()
    assert part.watched is not None
    assert part.watched.tolist() == [3, 11, 17]
    assert torch.allclose(part.watched_values, whole.values[:, part.watched], rtol=1e-4)
    rest = torch.ones(N, dtype=torch.bool)
    rest[part.watched] = False
    assert part.n_observations is not None
    assert int(part.n_observations[rest].sum()) == 0
    assert (part.values[:, rest] == 0).all()
    assert part.std_error is not None
    assert torch.isinf(part.std_error[:, rest]).all()
    assert some.gradient_evaluations == 3 * (3 + 10)


def test_other_kinds_of_data_and_batches() -> None:
    class Mapped(Dataset[Any]):
        def __len__(self) -> int:
            return N

        def __getitem__(self, i: int) -> dict[str, Any]:
            x, y, index = data()[i]
            return {"x": x, "y": y, "index": index}

    class Pairs(Module):
        def training_step(self, batch: Any, _: int) -> Tensor:
            return F.cross_entropy(self(batch["x"]), batch["y"])

    class Double(Module):
        def training_step(self, batch: Any, _: int) -> Tensor:
            return F.cross_entropy(self(batch[0].double()), batch[1])

    plain, mapped, double = watch(), watch(), watch()
    fit(plain)
    fit(mapped, module=Pairs(), dataset=Mapped())
    assert torch.equal(plain.scores().values, mapped.scores().values)
    fit(double, module=Double().double())
    assert double.scores().values.abs().sum() > 0
    # an index is not needed where positions are known
    unnumbered = watch()
    fit(unnumbered, dataset=TensorDataset(*data().tensors[:2]))
    assert torch.equal(plain.scores().values, unnumbered.scores().values)


def test_layers_without_factors_are_served() -> None:
    callback = watch(geometry="ekfac")
    fit(callback, module=Module(middle=Scale()))
    assert callback.scores().values.abs().sum() > 0
    plain, told = watch(), watch(forward=lambda m, x: m(x))
    for callback in (plain, told):
        fit(callback, module=Module(middle=Scale()))
    assert torch.equal(plain.scores().values, told.scores().values)
    with pytest.raises(UnsupportedProblemError, match="GroupNorm"):
        fit(watch(layers=["head"], batch_norm="refuse"), module=Module(middle=nn.BatchNorm1d(8)))


# ------------------------------------------------------------------------------------------ resume


def states() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "snapshots", {"schedule": "snapshot", "every_n_steps": 2}
    yield (
        "snapshots, ekfac",
        {
            "schedule": "snapshot",
            "every_n_steps": 2,
            "geometry": "ekfac",
            "refit_every": 5,
        },
    )
    yield "in-batch, ekfac", {"schedule": "in_batch", "geometry": "ekfac"}
    yield "in-batch, weighted", {"schedule": "in_batch", "step_weight": "uncertainty"}


class KilledError(RuntimeError):
    pass


class Resumable(DataLoader[Any]):
    """Goes on after a checkpoint where it was, in the middle of an epoch."""

    taken = start = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.taken, start, self.start = self.start, self.start, 0
        for batch in islice(super().__iter__(), start, None):
            self.taken += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["taken"]


@pytest.mark.parametrize("target", ["self", "validation"])
@pytest.mark.parametrize(("name", "options"), list(states()))
def test_a_killed_and_resumed_run_gives_the_scores_of_an_uninterrupted_one(
    tmp_path: Path, target: Any, name: str, options: dict[str, Any]
) -> None:
    """Killed in the middle of an epoch, after step 7 of 12, with a checkpoint after step 5."""

    class Kill(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 5:
                trainer.save_checkpoint(tmp_path / "five.ckpt")
            if trainer.global_step == 7:
                raise KilledError

    def callback() -> FINECallback:
        return watch(target, fit_examples=15, refresh_every=3, **options)

    settings: dict[str, Any] = {"shuffle": False, "max_epochs": 4}
    whole = callback()
    fit(whole, module=Module(0.0), **settings)
    with pytest.raises(KilledError):
        fit(callback(), Kill(), module=Module(0.0), **settings)
    resumed = callback()
    fit(resumed, module=Module(0.0), resume=tmp_path / "five.ckpt", **settings)
    assert torch.equal(whole.scores().values, resumed.scores().values)
    # up to a unit in the last place, by which a bound differs on some processors
    bounds = whole.scores().extras["bound"], resumed.scores().extras["bound"]
    torch.testing.assert_close(*bounds, rtol=1.3e-7, atol=0)
    if options.get("schedule") == "snapshot":
        assert resumed.scores().n_observations is not None
        assert resumed.scores().n_observations.tolist() == [6] * N  # type: ignore[union-attr]


def test_a_prolonged_run_goes_on_as_if_it_had_not_ended(tmp_path: Path) -> None:
    """The snapshot that closes a run is no part of its checkpoint."""
    whole, first, second = (watch(every_n_steps=4) for _ in range(3))
    fit(whole, module=Module(0.0), shuffle=False, max_epochs=4)
    _, trainer = fit(first, module=Module(0.0), shuffle=False, max_epochs=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    assert first.scores().n_observations is not None
    assert int(first.scores().n_observations[0]) == 2  # type: ignore[index]
    fit(second, module=Module(0.0), shuffle=False, max_epochs=4, resume=tmp_path / "half.ckpt")
    assert torch.equal(whole.scores().values, second.scores().values)


def test_a_state_of_the_other_schedule_is_refused() -> None:
    sums = SnapshotAccumulator(4, 1)
    in_batch = FINECallback("self")
    fit(in_batch)
    with pytest.raises(ValueError, match="resume with that schedule"):
        sums.load_state_dict(in_batch.state_dict()["accumulator"])
    keys = {watch().state_key, in_batch.state_key, FINECallback(geometry="ekfac").state_key}
    assert len(keys) == 3


# ---------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps must be at least 1, got 0"),
        ({"n_snapshots": 0}, "n_snapshots must be at least 1"),
        ({"every_n_steps": 2, "n_snapshots": 2}, "give one of them"),
        ({"n_reference": 2}, "n_reference must be at least 3"),
        ({"refit_every": 0}, "refit_every must be at least 1"),
        ({"fit_examples": 1}, "fit_examples must be at least 2"),
        ({"relative_damping": 0.0}, "relative_damping must be a number > 0"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"watched": []}, "k ≥ 1"),
        ({"watched": [0.5]}, "integers"),
        ({"watched": [1, 1]}, "each position once"),
        ({"watched": [-1]}, "each position once"),
        ({"schedule": "in_batch", "watched": [1]}, 'watched: for schedule="snapshot" only'),
        ({"schedule": "in_batch", "every_n_steps": 1}, "every_n_steps: for"),
        ({"schedule": "daily"}, "schedule must be one of"),
        ({"geometry": "flat"}, "geometry must be one of"),
        ({"step_weight": "time"}, "step_weight must be one of"),
        (
            {"step_weight": "uncertainty", "composition": "standardised"},
            'use composition="accumulated", composition="weighted" or step_weight="lr"',
        ),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        watch(**options)


def test_bad_data() -> None:
    with pytest.raises(ValueError, match="watched names position 24, but there are 24"):
        fit(watch(watched=[0, N]))
    with pytest.raises(ValueError, match="at least 3 training examples"):
        fit(watch(), dataset=data(2))
    shuffled = TensorDataset(*data().tensors[:2], torch.arange(N).flip(0))
    with pytest.raises(ValueError, match="not the position it was asked for"):
        fit(watch(), dataset=shuffled)
    with pytest.raises(ValueError, match=r"must yield \(x, y, …\) or a mapping"):
        BatchAdapter().parts({"x": torch.zeros(2, 6)})
    with pytest.raises(ValueError, match="got Tensor"):
        BatchAdapter().parts(torch.zeros(2, 6))
    x, y = TrainingData(data()).read(torch.tensor([3, 0]))
    assert torch.equal(x, data().tensors[0][[3, 0]])
    assert torch.equal(y, data().tensors[1][[3, 0]])


def smoothed(logits: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(logits, y, reduction=reduction, label_smoothing=0.2)


class Regression(Module):
    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.mse_loss(self(batch[0])[:, 0], batch[0][:, 0])


def regression(z: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    return F.mse_loss(z[:, 0], y, reduction=reduction)


def test_what_has_no_probability_is_refused() -> None:
    with pytest.raises(UnsupportedProblemError, match='Use observable="loss"'):
        fit(watch(loss=smoothed, observable="margin"))
    with pytest.raises(UnsupportedProblemError, match='Use step_weight="lr"'):
        fit(watch(loss=smoothed, observable="loss", step_weight="uncertainty"))
    fit(watch(loss=smoothed, observable="loss"))

    class Smoothed(Module):
        def training_step(self, batch: Any, _: int) -> Tensor:
            return smoothed(self(batch[0]), batch[1])

    weighted = FINECallback("self", observable="loss", step_weight="uncertainty")
    with pytest.raises(UnsupportedProblemError, match='Use step_weight="lr"'):
        fit(weighted, module=Smoothed())
    real = TensorDataset(data().tensors[0], data().tensors[0][:, 0])
    options: dict[str, Any] = {"loss": regression, "observable": "loss"}
    fit(watch(**options), dataset=real, module=Regression())
    with pytest.raises(UnsupportedProblemError, match='use geometry="euclidean"'):
        fit(watch(geometry="ekfac", **options), dataset=real, module=Regression())


def test_a_layer_without_curvature_is_refused() -> None:
    """No input ever reaches the layer: its Fisher matrix is zero, and λ has no scale."""

    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.inner(torch.zeros_like(x))

    with pytest.raises(ValueError, match=r"'body\.1\.inner' is singular"):
        fit(watch(geometry="ekfac"), module=Module(middle=Dead()))


@pytest.mark.parametrize("geometry", ["euclidean", "ekfac"])
def test_snapshots_without_finite_gradients_are_left_out_and_reported(geometry: Any) -> None:
    class Break(pl.Callback):
        """After two epochs the parameters are lost for one snapshot."""

        def __init__(self) -> None:
            self.kept: list[Tensor] = []

        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if self.kept:
                for p, kept in zip(pl_module.parameters(), self.kept, strict=True):
                    p.data.copy_(kept)
                self.kept = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 6:
                self.kept = [p.detach().clone() for p in pl_module.parameters()]
                for p in pl_module.parameters():
                    p.data.fill_(float("nan"))

    callback = watch("validation", geometry=geometry)
    with pytest.warns(UserWarning, match="in the snapshot after step 6: this snapshot"):
        fit(Break(), callback)
    assert callback.n_not_finite == 1
    scores = callback.scores()
    assert torch.isfinite(scores.values).all()
    assert scores.n_observations is not None
    assert scores.n_observations.tolist() == [2] * N
