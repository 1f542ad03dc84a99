"""Examples that are drawn with replacement, against a twin in float64 straight from the formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset, WeightedRandomSampler

from fine_bench.callback import FINECallback
from fine_bench.fine.accumulator import FineAccumulator
from fine_bench.fine.draws import Draws, Evenness, effects_of_rows
from fine_bench.fine.effects import direction_effects, self_effects
from fine_bench.fine.example_labels import ExampleLabels
from support.tensors import close, observable_gradients
from support.training import QUIET

N, V, BATCH, LR, DRAWN = 9, 3, 6, 0.2, 22


def data(seed: int, n: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 5, generator=g, dtype=torch.float64), torch.randint(3, (n,), generator=g)


class Module(pl.LightningModule):
    """Rows of one example differ, as under augmentation, if they are to."""

    def __init__(self, uneven: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        self.uneven = uneven
        self.diary: list[tuple[dict[str, Tensor], Tensor, Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, _: int) -> Tensor:
        x, y, index = batch
        if self.uneven:
            x = x * torch.linspace(0.5, 1.5, len(x), dtype=x.dtype)[:, None]
        params = {k: v.detach().clone() for k, v in self.net.named_parameters()}
        self.diary.append((params, index, x, y))
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=LR)


def sampler(kind: str = "weighted") -> Any:
    g = torch.Generator().manual_seed(5)
    if kind == "uniform":
        return RandomSampler(range(N), replacement=True, num_samples=DRAWN, generator=g)
    weights = torch.linspace(0.2, 2.0, N).tolist()
    return WeightedRandomSampler(weights, DRAWN, generator=g)


def fit(module: Module, *callbacks: pl.Callback, kind: str = "weighted", **options: Any) -> None:
    resume = options.pop("resume", None)
    dataset = TensorDataset(*data(1, N), torch.arange(N))
    loader = DataLoader(dataset, batch_size=BATCH, sampler=sampler(kind))
    trainer = pl.Trainer(**(QUIET | {"max_epochs": 3} | options), callbacks=list(callbacks))
    trainer.fit(module, loader, ckpt_path=resume)


def mu(callback: FINECallback) -> Tensor:
    return callback._watched.schedule.accumulator.mu()[0]


def twin(
    module: Module,
    target: str,
    *,
    contrast: str = "substitution",
    composition: str = "accumulated",
    accumulate: int = 1,
) -> Tensor:
    """μ, step by step, row by row."""
    xq, yq = data(2, V)
    rows = V if target == "queries" else 1
    shift, noise, total, counted, weights = torch.zeros(5, rows, N, dtype=torch.float64)
    seen, drawn = torch.zeros(N, dtype=torch.float64), 0
    per_epoch = -(-DRAWN // BATCH)
    steps = [
        module.diary[e + s : min(e + s + accumulate, e + per_epoch)]
        for e in range(0, len(module.diary), per_epoch)
        for s in range(0, per_epoch, accumulate)
    ]
    for step in steps:
        params = step[0][0]
        index, x, y = (torch.cat([part[k] for part in step]) for k in (1, 2, 3))
        m = len(index)
        # the step's gradient is Σ_k w_k g_k; m w_k is one where the window is full and even
        w = torch.cat([torch.full((len(p[1]),), m / (accumulate * len(p[1]))) for p in step])
        if len(set(index.tolist())) < 3:
            continue
        drawn += m
        g = observable_gradients(module.net, params, x, y, "loss")
        own = observable_gradients(module.net, params, x, y, "margin")
        h = observable_gradients(module.net, params, xq, yq, "margin")
        for i in sorted(set(index.tolist())):
            mine = [k for k in range(m) if int(index[k]) == i]
            others = [k for k in range(m) if int(index[k]) != i]
            seen[i] += 1
            for r in range(rows):
                c = g @ (own[mine].mean(0) if target == "self" else h[r])
                mean = float(c[others].mean()) if contrast == "substitution" else 0.0
                effect = sum(float(w[k]) * (float(c[k]) - mean) for k in mine)
                variance = float(w.double().square().mean() * c[others].var())
                shift[r, i] += LR * effect
                noise[r, i] += LR**2 * variance
                total[r, i] += effect / (m * variance) ** 0.5
                # on X = Σ η x/σ, σ that of single examples: a step of ρ² = mean w² has η ρ of noise
                counted[r, i] += LR * effect / float(c[others].std())
                weights[r, i] += LR**2 * float(w.double().square().mean())
    if composition == "standardised":
        return (total / seen.sqrt()).nan_to_num(0.0)
    if composition == "weighted":
        return (counted / (drawn / seen * weights).sqrt()).nan_to_num(0.0)
    return (shift / (drawn / seen * noise).sqrt()).nan_to_num(0.0)


@pytest.mark.any_trainer("sampling with replacement, `WeightedRandomSampler`")
@pytest.mark.parametrize("kind", ["weighted", "uniform"])
@pytest.mark.parametrize("target", ["self", "queries"])
@pytest.mark.parametrize("contrast", ["substitution", "removal"])
@pytest.mark.parametrize("uneven", [False, True])
def test_an_example_counts_as_often_as_it_stands_in_the_batch(
    kind: str, target: str, contrast: Any, uneven: bool
) -> None:
    queries = None if target == "self" else TensorDataset(*data(2, V))
    options: dict[str, Any] = {"queries": queries, "refresh_every": 1, "contrast": contrast}
    callback, module = FINECallback(target, **options), Module(uneven)
    fit(module, callback, kind=kind)
    assert any(len(set(i.tolist())) < len(i) for _, i, _, _ in module.diary)
    close(mu(callback), twin(module, target, contrast=contrast), 1e-9)


@pytest.mark.any_trainer("sampling with replacement, `WeightedRandomSampler`")
@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("composition", ["accumulated", "weighted", "standardised"])
def test_over_the_micro_batches_of_a_step(accumulate: int, composition: Any) -> None:
    callback, module = FINECallback("self", composition=composition), Module(uneven=True)
    fit(module, callback, accumulate_grad_batches=accumulate)
    kind: dict[str, Any] = {"composition": composition, "accumulate": accumulate}
    close(mu(callback), twin(module, "self", **kind), 1e-6)  # 1/m of float32 weights


@pytest.mark.any_trainer("sampling with replacement, `WeightedRandomSampler`")
def test_twice_as_often_has_twice_the_effect() -> None:
    """Examples 0 and 1 are alike but for how often they are drawn."""
    accumulator = FineAccumulator(40, 1)
    g = torch.Generator().manual_seed(0)
    c = torch.randn(40, generator=g, dtype=torch.float64)
    c[:3] = 0.5
    weights = torch.ones(40)
    weights[1], weights[2] = 2.0, 4.0
    plain = FineAccumulator(40, 1)
    often = torch.zeros(40, dtype=torch.float64)
    for _ in range(3_000):
        rows = torch.multinomial(weights, 8, replacement=True, generator=g)
        often += rows.bincount(minlength=40)
        found = effects_of_rows(rows, c[rows][None], None, None, "removal", gram=False)
        for sums in (accumulator, plain):
            sums.observe(*found, 0.1, 8)
    accumulator.with_replacement = True
    values = accumulator.mu()[0][0]
    close(values[1] / values[0], float(often[1] / often[0]), 0.08)
    close(values[2] / values[0], float(often[2] / often[0]), 0.08)
    # with n in the place of M/k_i, roots of it would come out
    steps = plain.n_observations.double()
    wrong = often[2] / often[0] / (steps[2] / steps[0]).sqrt()
    close(plain.mu()[0][0, 2] / plain.mu()[0][0, 0], float(wrong), 0.08)


@pytest.mark.any_trainer("sampling with replacement, `WeightedRandomSampler`")
def test_intervals_cover_other_runs_in_which_other_numbers_are_drawn() -> None:
    n, runs, steps = 40, 40, 60
    g = torch.Generator().manual_seed(1)
    c = torch.randn(n, generator=g, dtype=torch.float64)
    weights = torch.linspace(0.5, 2.0, n)
    values, errors = [], []
    for _ in range(runs):
        sums = FineAccumulator(n, 1)
        sums.with_replacement = True
        for _ in range(steps):
            rows = torch.multinomial(weights, 8, replacement=True, generator=g)
            noisy = c[rows] + 0.5 * torch.randn(8, generator=g, dtype=torch.float64)
            found = effects_of_rows(rows, noisy[None], None, None, "substitution", gram=False)
            sums.observe(*found, 0.1, 8)
        mean, error = sums.mu()
        values.append(mean[0])
        errors.append(error[0])
    value, error = torch.stack(values), torch.stack(errors)
    covered = ((value - value.mean(0)).abs() <= 1.96 * error).double().mean()
    assert 0.9 <= float(covered) <= 0.99


@pytest.mark.any_trainer("sampling with replacement, `WeightedRandomSampler`")
def test_rows_without_repeats_give_the_usual_effects() -> None:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(7, 5, generator=g, dtype=torch.float64)
    index, one_minus_p = torch.randperm(7, generator=g), torch.rand(7, generator=g).double()
    order = index.argsort()
    for contrast in ("substitution", "removal"):
        examples, effect, sigma = effects_of_rows(
            index, x @ x.T, 1 / one_minus_p, None, contrast, gram=True
        )
        usual, spread = self_effects(x @ x.T, one_minus_p, contrast)
        assert examples.tolist() == list(range(7))
        close(effect[0], usual[order])
        close(sigma[0], spread[order])
        _, effect, sigma = effects_of_rows(index, x.T, None, None, contrast, gram=False)
        usual, spread = direction_effects(x.T, contrast)
        close(effect, usual[:, order])
        close(sigma, spread[:, order])


@pytest.mark.any_trainer("sampling with replacement, `WeightedRandomSampler`")
@pytest.mark.parametrize(
    "options",
    [
        {"geometry": "ekfac", "noise": "model"},
        {"geometry": "ekfac"},
        {"preconditioner": "optimiser"},
        {"sketch": 2},
        {"reference_columns": 3},
        {"observe_every": 2},
        {"step_weight": "uncertainty"},
    ],
)
def test_with_every_option(options: dict[str, Any]) -> None:
    callback, module = FINECallback("self", **options), Module()
    fit(module, callback)
    scores = callback.scores()
    seen = scores.n_observations > 0
    assert bool(torch.isfinite(scores.values).all())
    assert bool((scores.values[0, seen] != 0).all())
    if set(options) & {"preconditioner", "sketch"}:  # exact here
        close(mu(callback), twin(module, "self"), 1e-9)


@pytest.mark.any_trainer("sampling with replacement, `WeightedRandomSampler`")
def test_thinned_steps_stand_for_the_others() -> None:
    """At a constant θ every step tells the same, so a share of the steps tells nearly as much."""

    class Still(Module):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-12)

    whole, thinned = FINECallback("self"), FINECallback("self", observe_every=2)
    fit(Still(), whole, thinned, max_epochs=40)
    assert float((mu(thinned) / mu(whole) - 1)[:, 1:].abs().mean()) < 0.15


@pytest.mark.any_trainer("sampling with replacement, `WeightedRandomSampler`")
def test_a_run_that_is_resumed(tmp_path: Path) -> None:
    whole, first, second = (FINECallback("self") for _ in range(3))

    class Seeded(Module):
        """Draws that depend on the epoch alone."""

        def on_train_epoch_start(self) -> None:
            self.trainer.train_dataloader.sampler.generator.manual_seed(self.current_epoch)

    fit(Seeded(), whole, max_epochs=4)
    keeper = ModelCheckpoint(tmp_path, save_last=True)
    fit(Seeded(), first, keeper, max_epochs=2, enable_checkpointing=True)
    fit(Seeded(), second, max_epochs=4, resume=tmp_path / "last.ckpt")
    a, b = whole.scores(), second.scores()
    close(b.values, a.values.double(), 1e-6)
    assert a.n_observations.tolist() == b.n_observations.tolist()


@pytest.mark.any_trainer("sampling with replacement, `WeightedRandomSampler`")
def test_without_a_repeat_in_any_batch_the_epoch_tells() -> None:
    """Batches without repeats, epochs with: M/k_i all the same."""
    dataset = TensorDataset(*data(1, N), torch.arange(N))
    order = [0, 1, 2, 3, 0, 4, 5, 6, 0, 7, 8, 1]
    callback = FINECallback("self")
    trainer = pl.Trainer(max_epochs=2, callbacks=[callback], **QUIET)
    trainer.fit(Module(), DataLoader(dataset, batch_size=4, sampler=order))
    sums = callback._watched.schedule.accumulator
    assert sums.with_replacement
    assert sums._n_draws().tolist() == [4.0, 6.0, *[12.0] * 7]


@pytest.mark.any_trainer("batches of fewer than three examples")
def test_a_batch_of_two_different_examples_is_too_short() -> None:
    dataset = TensorDataset(*data(1, N), torch.arange(N))
    order = [0, 1, 0, 1, 2, 3, 4, 5]
    callback = FINECallback("self")
    trainer = pl.Trainer(max_epochs=1, callbacks=[callback], **QUIET)
    with pytest.warns(UserWarning, match="fewer than 3"):
        trainer.fit(Module(), DataLoader(dataset, batch_size=4, sampler=order))
    assert callback.scores().n_observations.tolist() == [0, 0, 1, 1, 1, 1, 0, 0, 0]


@pytest.mark.any_trainer("sampling with replacement, `WeightedRandomSampler`")
def test_snapshots_say_that_examples_are_drawn_unevenly() -> None:
    weights = WeightedRandomSampler([9.0] * 2 + [1.0] * (N - 2), 60)
    dataset = TensorDataset(*data(1, N), torch.arange(N))
    callback = FINECallback("self", schedule="snapshot", n_reference=N)
    trainer = pl.Trainer(max_epochs=2, callbacks=[callback], **QUIET)
    with pytest.warns(UserWarning, match=r"more often.*schedule=\"in_batch\""):
        trainer.fit(Module(), DataLoader(dataset, batch_size=BATCH, sampler=weights))


def test_equally_likely_examples_are_drawn_evenly() -> None:
    g = torch.Generator().manual_seed(0)
    for n in (3, 50, 1000):
        even, weighted, names = Evenness(n), Evenness(n), Evenness(n)
        for _ in range(40):
            even.note(torch.randint(n, (n // 2 + 1,), generator=g))
            weighted.note((torch.rand(n // 2 + 1, generator=g).square() * n).long())
            names.note(["a.png"])
        assert not even.uneven
        assert not names.uneven
        assert weighted.uneven or n == 3


def test_rounds_of_which_nobody_tells() -> None:
    accumulator = FineAccumulator(20, 1)
    draws = Draws(accumulator)
    draws.told = False
    for seed in range(3):  # without the last two of each round, as with drop_last
        order = torch.randperm(20, generator=torch.Generator().manual_seed(seed))[:18]
        for batch in order.split(6):
            draws.note(batch, 0)
    assert not accumulator.with_replacement
    draws.note(torch.tensor([3, 4]), 0)
    draws.note(torch.tensor([5, 4]), 0)
    assert accumulator.with_replacement


@pytest.mark.parametrize("again", [None, 3, 17])
@pytest.mark.parametrize("told", [True, False])
def test_batches_that_wait_tell_what_each_would(again: int | None, told: bool) -> None:
    """``again``: the batch that holds an example of an earlier one of its epoch."""
    found = []
    for waits in (False, True):
        accumulator = FineAccumulator(30, 1)
        draws = Draws(accumulator)
        draws.told = told
        for epoch in range(3):
            order = torch.randperm(30, generator=torch.Generator().manual_seed(epoch))
            for number, batch in enumerate(order.split(4), 8 * epoch):
                index = torch.cat([batch[:-1], order[:1]]) if number == again else batch
                (draws.later if waits else draws.note)(index, epoch)
                if number % 5 == 4:
                    draws.settle()
        draws.settle()
        found.append(accumulator.with_replacement)
    assert found[0] == found[1] == (again is not None)


def test_labels_that_wait_are_compared_as_each_would() -> None:
    index, labels = torch.tensor([4, 1, 2]), torch.tensor([0, 1, 2])
    known = ExampleLabels(6)
    known.later(index, labels)
    known.later(index.flip(0), labels.flip(0))
    labels[0] = 7  # the caller's memory, which holds the next batch by now
    known.settle()
    assert known.known[index].tolist() == [0, 1, 2]
    known.later(torch.tensor([3, 5]), torch.tensor([1, 1]))
    known.later(torch.tensor([0, 3]), torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="example 3 had the label 1 before and has 2 now"):
        known.settle()
    known.later(torch.tensor([0, 0]), torch.tensor([4, 5]))
    with pytest.raises(ValueError, match=r"had the label|twice with different labels"):
        known.settle()
