"""Layers that are frozen, let go of or added while the run goes on, against a twin in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import BaseFinetuning, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from baselines.in_run_shapley import InRunShapleyCallback
from fine_bench.callback import FINECallback, PaperFINECallback
from fine_bench.types import UnsupportedProblemError
from support.tensors import close, observable_gradients
from support.training import QUIET

N, V, BATCH, LR = 18, 4, 6, 0.2


def data(seed: int, n: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 5, generator=g, dtype=torch.float64), torch.randint(3, (n,), generator=g)


class Module(pl.LightningModule):
    """Notes parameters and step sizes of each step; 0 for what is frozen.

    Args:
        change: called with the module and the epoch when an epoch starts.
        every: the optimiser holds frozen parameters too.
    """

    def __init__(self, change: Callable[[Module, int], None] = lambda *_: None) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(
            nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)
        ).double()
        self.change = change
        self.within: Callable[[Module, int], None] = lambda *_: None
        self.diary: list[tuple[dict[str, Tensor], Tensor, dict[str, float]]] = []
        change(self, -1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def on_train_epoch_start(self) -> None:
        self.change(self, self.current_epoch)

    def training_step(self, batch: Any, _: int) -> Tensor:
        self.within(self, self.global_step)
        x, y, index = batch
        optimizer = self.trainer.optimizers[0]
        rate = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
        named = dict(self.net.named_parameters())
        params = {k: v.detach().clone() for k, v in named.items()}
        rates = {k: rate.get(id(v), 0.0) * v.requires_grad for k, v in named.items()}
        self.diary.append((params, index, rates))
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=LR)


def fit(module: Module, *callbacks: pl.Callback, epochs: int = 4, **options: Any) -> pl.Trainer:
    loader = DataLoader(
        TensorDataset(*data(1, N), torch.arange(N)),
        batch_size=BATCH,
        shuffle=True,
        generator=torch.Generator().manual_seed(11),
    )
    resume = options.pop("resume", None)
    trainer = pl.Trainer(max_epochs=epochs, **(QUIET | options), callbacks=list(callbacks))
    trainer.fit(module, loader, ckpt_path=resume)
    return trainer


def twin(module: Module, target: str) -> Tensor:
    (x, y), (xq, yq) = data(1, N), data(2, V)
    rows = V if target == "queries" else 1
    shift, noise = torch.zeros(2, rows, N, dtype=torch.float64)
    for params, index, rates in module.diary:
        moved = observable_gradients(module.net, params, x[index], y[index], "loss") * torch.cat(
            [torch.full((v.numel(),), rates[k], dtype=torch.float64) for k, v in params.items()]
        )
        own = observable_gradients(module.net, params, x[index], y[index], "margin")
        h = observable_gradients(module.net, params, xq, yq, "margin")
        for k, i in enumerate(index.tolist()):
            others = [j for j in range(len(index)) if j != k]
            for r in range(rows):
                c = moved @ (own[k] if target == "self" else h[r])
                shift[r, i] += c[k] - c[others].mean()
                noise[r, i] += c[others].var()
    return shift / (N * noise).sqrt()


def later(module: Module, epoch: int) -> None:
    """The first layer trains from epoch 2 on."""
    module.net[0].requires_grad_(epoch >= 2)


def earlier(module: Module, epoch: int) -> None:
    """The first layer trains before epoch 2, the second one's bias before epoch 1."""
    module.net[0].requires_grad_(epoch < 2)
    module.net[2].bias.requires_grad_(epoch < 1)


def headless(module: Module, epoch: int) -> None:
    """The last layer, at whose output 1 − p is read, trains before epoch 2 and in epoch 3."""
    module.net[4].requires_grad_(epoch != 2)


class Released(BaseFinetuning):
    """Lightning's own way: the optimiser gets the layer when it is let go of."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 2:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer)


class Trained(Module):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=LR)


def queries(target: str) -> TensorDataset | None:
    return None if target == "self" else TensorDataset(*data(2, V))


@pytest.mark.any_trainer("a layer that is let go of during the run")
@pytest.mark.any_trainer("a layer that is frozen during the run")
@pytest.mark.parametrize("change", [later, earlier, headless])
@pytest.mark.parametrize("target", ["self", "queries"])
def test_each_step_counts_the_layers_that_it_trains(change: Any, target: str) -> None:
    callback = FINECallback(target, queries=queries(target), refresh_every=1)
    module = Module(change)
    fit(module, callback)
    close(callback._watched.schedule.accumulator.mu()[0], twin(module, target), 1e-9)
    plain = Module(change)
    fit(plain)
    for a, b in zip(plain.parameters(), module.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.any_trainer("`BaseFinetuning`, `add_param_group`")
@pytest.mark.parametrize("target", ["self", "queries"])
def test_a_layer_that_the_optimiser_gets_later(target: str) -> None:
    callback = FINECallback(target, queries=queries(target), refresh_every=3)
    direct = FINECallback(target, queries=queries(target), refresh_every=1)
    module = Trained()
    fit(module, Released(), callback, direct)
    assert module.diary[-1][2]["0.weight"] == pytest.approx(LR / 10)
    close(direct._watched.schedule.accumulator.mu()[0], twin(module, target), 1e-9)
    assert bool(torch.isfinite(callback.scores().values).all())


@pytest.mark.any_trainer("a layer that is let go of during the run")
@pytest.mark.any_trainer("a layer that is frozen during the run")
@pytest.mark.parametrize("change", [later, earlier])
@pytest.mark.parametrize("every", [1, 4, None])
@pytest.mark.parametrize("target", ["self", "queries"])
def test_snapshots_too(change: Any, every: int | None, target: str) -> None:
    """At every step: the formula. Otherwise: steps of before weigh a layer by what they did."""
    options: dict[str, Any] = {"schedule": "snapshot", "n_reference": N, "every_n_steps": every}
    callback = FINECallback(target, queries=queries(target), **options)
    module = Module(change)
    fit(module, callback)
    (x, y), (xq, yq) = data(1, N), data(2, V)
    after = [params for params, _, _ in module.diary[1:]]
    after.append({k: v.detach() for k, v in module.net.named_parameters()})
    rows = V if target == "queries" else 1
    shift, variance = torch.zeros(2, rows, N, dtype=torch.float64)
    waits: list[dict[str, float]] = []
    total = len(module.diary)
    for step, (params, (_, _, rates)) in enumerate(zip(after, module.diary, strict=True), 1):
        waits.append(rates)
        if step % (every or 3) and step != total:
            continue
        trained = {k for k, v in rates.items() if v}  # those that train when it is taken
        sums = {k: sum(r[k] for r in waits) * (k in trained) for k in rates}
        largest, steps = max(sums.values()), len(waits)
        waits = []
        moved = observable_gradients(module.net, params, x, y, "loss") * torch.cat(
            [torch.full((v.numel(),), sums[k], dtype=torch.float64) for k, v in params.items()]
        )
        observed = (x, y) if target == "self" else (xq, yq)
        h = observable_gradients(module.net, params, *observed, "margin")
        for i in range(N):
            others = [j for j in range(N) if j != i]
            for r in range(rows):
                c = moved @ h[i if target == "self" else r]
                shift[r, i] += (c[i] - c[others].mean()) / N
                # V_s of steps of one size η each: Σ η²/m, where H_s is Σ η
                variance[r, i] += c[others].var() * steps * LR**2 / largest**2 / BATCH
    close(callback._watched.schedule.accumulator.mu()[0], shift / variance.sqrt(), 1e-9)


@pytest.mark.any_trainer("a layer that is let go of during the run")
@pytest.mark.parametrize(
    "options",
    [
        {"geometry": "ekfac"},
        {"geometry": "ekfac", "noise": "model"},
        {"preconditioner": "optimiser"},
        {"sketch": 2},
        {"step_weight": "uncertainty"},
        {"observe_every": 2},
        {"schedule": "snapshot", "geometry": "ekfac"},
    ],
)
def test_with_every_option(options: dict[str, Any]) -> None:
    scores = []
    for change in (later, earlier, lambda *_: None, headless):
        callback = FINECallback("self", **options)
        fit(Module(change), callback)
        scores.append(callback.scores().values)
        assert bool(torch.isfinite(scores[-1]).all())
    assert not torch.equal(scores[0], scores[2])
    assert not torch.equal(scores[1], scores[2])


@pytest.mark.any_trainer("all watched layers are frozen during the run")
@pytest.mark.parametrize("schedule", ["in_batch", "snapshot"])
def test_training_goes_on_where_nothing_is_left_to_watch(schedule: Any) -> None:
    def change(module: Module, epoch: int) -> None:
        module.net[0].requires_grad_(epoch < 2)

    options: dict[str, Any] = {"schedule": schedule, "layers": ["net.0"], "observable": "loss"}
    callback, short = (FINECallback("self", **options) for _ in "ab")
    with pytest.warns(UserWarning, match="trained any more"):
        fit(Module(change), callback)
    fit(Module(change), short, epochs=2)
    assert torch.equal(callback.scores().values, short.scores().values)


@pytest.mark.any_trainer("a layer that is let go of during the run")
def test_one_without_factors_is_refused_by_its_name() -> None:
    class Net(Module):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Embedding(3, 3, max_norm=1.0).double().requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            z = self.net(x)
            return z + self.extra(z.argmax(1))

        def on_train_epoch_start(self) -> None:
            self.extra.requires_grad_(self.current_epoch >= 1)

    callback = FINECallback("self", observable="loss")
    with pytest.raises(UnsupportedProblemError, match=r"'extra'.*max_norm"):
        fit(Net(), callback)
    assert int(callback.scores().n_observations.min()) == 1  # those of the first epoch stay


@pytest.mark.any_trainer("layers that are frozen or let go of within a step")
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_step_in_which_layers_change_is_left_out(accumulate: int) -> None:
    def within(module: Module, step: int) -> None:
        batches = len(module.diary)
        if batches == 4:  # within a pass; of the second micro-batch of a step with three
            module.net[0].requires_grad_(False)

    module = Module()
    module.within = within
    callback = FINECallback("self")
    with pytest.warns(UserWarning, match="while step"):
        fit(module, callback, accumulate_grad_batches=accumulate)
    scores = callback.scores()
    left_out = BATCH * accumulate
    assert int(scores.n_observations.sum()) == 4 * N - left_out
    assert bool(torch.isfinite(scores.values).all())


@pytest.mark.any_trainer("a layer that is replaced during the run")
def test_a_layer_that_is_replaced_is_taken_in() -> None:
    def change(module: Module, epoch: int) -> None:
        if epoch == 1:
            torch.manual_seed(5)
            module.net[2] = nn.Linear(4, 4).double()
            module.trainer.optimizers[0].add_param_group({"params": module.net[2].parameters()})

    callback = FINECallback("self")
    module = Module(change)
    fit(module, callback, epochs=3)
    close(callback._watched.schedule.accumulator.mu()[0], twin(module, "self"), 1e-9)


@pytest.mark.any_trainer("a layer that is let go of during the run")
@pytest.mark.parametrize("target", ["self", "validation"])
@pytest.mark.parametrize("geometry", ["euclidean", "ekfac"])
def test_a_run_that_is_resumed(target: str, geometry: Any, tmp_path: Path) -> None:
    """Interrupted in the epoch before the layer is let go of, and in the one after."""

    def callback() -> FINECallback:
        return FINECallback(target, queries=queries(target), geometry=geometry, refresh_every=1)

    whole = callback()
    fit(Module(later), whole, epochs=4)
    for stop in (2, 3):
        first, second = callback(), callback()
        keeper = ModelCheckpoint(tmp_path / f"{stop}", save_last=True)
        loader = {"enable_checkpointing": True}
        fit(Module(later), first, keeper, epochs=stop, **loader)
        fit(Module(later), second, epochs=4, resume=tmp_path / f"{stop}" / "last.ckpt")
        assert second.scores().n_observations.tolist() == [4] * N


@pytest.mark.any_trainer("a layer that is let go of during the run")
@pytest.mark.any_trainer("a layer that is frozen during the run")
@pytest.mark.parametrize("change", [later, earlier])
@pytest.mark.parametrize("target", ["self", "validation"])
def test_the_papers_samples_are_of_the_layers_that_train(change: Any, target: Any) -> None:
    """A sampler that begins when the layers are as they are now measures the same."""
    found: list[tuple[Tensor, Tensor]] = []

    class Compared(PaperFINECallback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            fresh = PaperFINECallback(target, subsets={"some": [0, 1, 2]}, queries=queries(target))
            fresh.on_train_start(trainer, pl_module)
            step = trainer.global_step
            # directions of later steps are those of the last renewal, unless layers change
            self._sampler._direction = None
            found.append((self._sampler.measure(step), fresh._sampler.measure(step)))
            fresh._close()

    fit(Module(change), Compared(target, subsets={"some": [0, 1, 2]}, queries=queries(target)))
    assert len(found) == 12
    for mine, theirs in found:
        assert torch.equal(mine, theirs)
        assert bool(torch.isfinite(mine).all())


@pytest.mark.any_trainer("a layer that is let go of during the run")
@pytest.mark.any_trainer("a layer that is frozen during the run")
@pytest.mark.parametrize("change", [later, earlier, headless])
@pytest.mark.parametrize("target", ["queries", "validation"])
def test_in_run_shapley_shares_what_each_step_moves(change: Any, target: Any) -> None:
    callback = InRunShapleyCallback(target, queries=queries(target))
    module = Module(change)
    fit(module, callback)
    (x, y), (xq, yq) = data(1, N), data(2, V)
    values = torch.zeros(V, N, dtype=torch.float64)
    for params, index, rates in module.diary:
        g = observable_gradients(module.net, params, x[index], y[index], "loss")
        h = observable_gradients(module.net, params, xq, yq, "loss")
        rate = [torch.full((v.numel(),), rates[k], dtype=torch.float64) for k, v in params.items()]
        values[:, index] += h @ (g * torch.cat(rate)).T / len(index)
    if target == "validation":
        values = values.mean(0, keepdim=True)
    close(callback.scores().values, values, 1e-6)


def test_in_run_shapley_refuses_what_the_optimiser_does_not_hold() -> None:
    class Part(Module):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.net[:4].parameters(), lr=LR)

    with pytest.raises(UnsupportedProblemError, match=r"net\.4\.weight.*requires_grad=False"):
        fit(Part(), InRunShapleyCallback("validation", queries=queries("validation")))
