"""Accumulated gradients: the scores are those of one large batch of the same examples."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader, TensorDataset

from fine_bench.callback import FINECallback
from fine_bench.fine.micro_batches import window_weights
from fine_bench.gradients.blocks.dense import DenseBlock
from fine_bench.gradients.blocks.embedding import TokenBlock
from fine_bench.gradients.blocks.linear import FactorBlock
from fine_bench.gradients.per_example import PerExampleGradients, stack_examples
from support.training import QUIET

CLASSES, LR = 3, 0.3


class Small(pl.LightningModule):
    """A small network in float64; ``rate(t)`` is the step size of step t."""

    def __init__(self, rate: Any = lambda t: LR) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, CLASSES)).double()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def data(n: int, seed: int = 7) -> TensorDataset:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=g, dtype=torch.float64)
    return TensorDataset(x, torch.randint(CLASSES, (n,), generator=g), torch.arange(n))


def watch(target: Any = "self", **options: Any) -> FINECallback:
    queries = None if target == "self" else TensorDataset(*data(6, 8).tensors[:2])
    return FINECallback(target, queries=queries, **options)


def fit(callbacks: list[pl.Callback], n: int, batch: int, module: Small, **options: Any) -> None:
    trainer = pl.Trainer(**{"max_epochs": 3, **QUIET, **options}, callbacks=callbacks)
    trainer.fit(module, DataLoader(data(n), batch_size=batch))


def numbers(callback: FINECallback) -> list[Tensor]:
    callback.scores()
    assert callback._schedule is not None
    sums = callback._schedule.accumulator
    return [*sums.mu(), *sums.sums.values(), sums.n_observations.double()]


def same(first: FINECallback, second: FINECallback) -> None:
    for a, b in zip(numbers(first), numbers(second), strict=True):
        assert torch.isfinite(a).all()
        assert float((a - b).abs().max()) <= 1e-10 * max(1.0, float(b.abs().max()))


SETTINGS: list[dict[str, Any]] = [
    {},
    {"observable": "loss", "composition": "standardised"},
    {"step_weight": "uncertainty"},
    {"reference_columns": 5},
    {"target": "validation", "refresh_every": 2},
    {"target": "queries", "observable": "loss"},
    {"geometry": "ekfac", "noise": "model"},
    {"schedule": "snapshot", "every_n_steps": 2},
]


@pytest.mark.any_trainer("accumulated gradients")
@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_micro_batches_give_the_scores_of_one_large_batch(options: dict[str, Any]) -> None:
    """The last window of an epoch has two of four micro-batches: half a step on 16 examples."""
    n = 32 + 16

    def rate(t: int) -> float:
        return LR / (1 + t // 2)

    large, parts = watch(**options), watch(**options)
    module = Small(lambda t: rate(t) * (0.5 if t % 2 else 1.0))
    fit([large], n, 32, module)
    other = Small(rate)
    fit([parts], n, 8, other, accumulate_grad_batches=4)
    for a, b in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)
    same(parts, large)
    # accumulating must matter, or the comparison says nothing
    alone = watch(**options)
    fit([alone], n, 8, Small(rate))
    assert not torch.allclose(numbers(alone)[0], numbers(large)[0], rtol=1e-2)


class Diary(pl.Callback):
    """The parameters before each micro-batch and who is in it."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, dict[str, Tensor], Tensor]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any) -> None:
        params = {k: v.detach().clone() for k, v in pl_module.net.named_parameters()}
        self.batches.append((trainer.global_step, params, batch[2].clone()))


@pytest.mark.any_trainer("accumulated gradients")
@pytest.mark.parametrize("composition", ["accumulated", "standardised"])
def test_windows_of_unequal_micro_batches(composition: Any) -> None:
    """Example by example, with the weight w_i that Lightning gives it in the step's gradient."""
    n, per_step = 45, 4  # 8 8 8 8 | 8 5: the last window weighs its two micro-batches alike
    callback, diary = watch(observable="loss", composition=composition), Diary()
    fit([callback, diary], n, 8, Small(), accumulate_grad_batches=per_step)
    x, y, _ = data(n).tensors
    net = Small().net

    def loss(params: Any, xi: Tensor, yi: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, params, (xi[None],)), yi[None])

    top, bottom, total, seen = (torch.zeros(n, dtype=torch.float64) for _ in range(4))
    for step in sorted({entry[0] for entry in diary.batches}):
        window = [entry for entry in diary.batches if entry[0] == step]
        params = window[0][1]
        index = torch.cat([entry[2] for entry in window]).tolist()
        w = [1 / (per_step * len(entry[2])) for entry in window for _ in entry[2]]
        g = vmap(grad(loss), in_dims=(None, 0, 0))(params, x[index], y[index])
        g = torch.cat([part.flatten(1) for part in g.values()], 1)
        m = len(index)
        for k, i in enumerate(index):
            c = g @ g[k]
            others = torch.cat([c[:k], c[k + 1 :]])
            # x = Σ_j w_j c_j: its shift, and its variance over batches of this kind
            shift = w[k] * (c[k] - others.mean())
            variance = sum(v * v for v in w) * others.var()
            total[i] += shift / variance.sqrt()
            # X sums over all steps, n/m times as many as i is in
            top[i] += LR * shift * m
            bottom[i] += LR**2 * variance * m
            seen[i] += 1
    expected = top / (n * bottom).sqrt() if composition == "accumulated" else total / seen.sqrt()
    assert float((numbers(callback)[0][0] - expected).abs().max()) < 1e-10


def test_weights_of_a_window() -> None:
    full = window_weights([8, 8], [2, 2])
    assert (full.m, full.mean, full.rms, full.relative) == (16, 1.0, 1.0, None)
    short = window_weights([8], [4])
    assert (short.m, short.mean, short.rms, short.relative) == (8, 0.25, 0.25, None)
    uneven = window_weights([3, 1], [2, 2])
    r = torch.tensor([4 / 6, 4 / 6, 4 / 6, 4 / 2], dtype=torch.float64)
    assert uneven.relative is not None
    assert torch.allclose(uneven.relative * uneven.rms, r)
    assert abs(uneven.mean - float(r.mean())) < 1e-15


def test_a_repeated_example_in_a_window_counts_twice() -> None:
    """Scores: ``test_fine_draws.py``."""

    class Repeats(TensorDataset):
        def __getitem__(self, i: int) -> Any:
            return super().__getitem__(i % 8)

    dataset, callback = Repeats(*data(32).tensors), watch()
    trainer = pl.Trainer(**QUIET, max_epochs=1, accumulate_grad_batches=2, callbacks=[callback])
    trainer.fit(Small(), DataLoader(dataset, batch_size=8))
    sums = callback._watched.schedule.accumulator
    assert sums.n_observations.tolist() == [2] * 8 + [0] * 24
    assert sums.n_repeats == 16


def test_stacked_examples_are_the_examples_side_by_side() -> None:
    """Sentences of different lengths are filled up without changing any gradient."""
    g = torch.Generator().manual_seed(0)

    def part(n: int, t: int) -> PerExampleGradients:
        a = torch.randn(n, t, 4, generator=g, dtype=torch.float64)
        b = torch.randn(n, t, 3, generator=g, dtype=torch.float64)
        tokens = torch.randint(6, (n, t), generator=g)
        dense = torch.randn(n, 5, generator=g, dtype=torch.float64)
        blocks = [
            FactorBlock("linear", a, b, True, True),
            TokenBlock("table", tokens, b, 6),
            DenseBlock("norm", dense),
        ]
        return PerExampleGradients(blocks, dense[:, 0], None)

    parts = [part(2, 3), part(3, 5), part(1, 1)]
    stacked = stack_examples(parts)
    dense = torch.cat([p.dense() for p in parts])
    assert torch.allclose(stacked.dense(), dense)
    assert torch.allclose(stacked.gram(), dense @ dense.T)
    assert torch.allclose(stacked.norm2(), dense.square().sum(1))
    assert stacked.loss is not None
    assert len(stacked.loss) == 6
    assert stacked.one_minus_p is None
    assert stack_examples(parts[:1]) is parts[0]
    other = PerExampleGradients([*parts[0].blocks[:2], parts[0].blocks[0]])
    for mixed in ([parts[0], other], [other, parts[0]]):
        with pytest.raises(TypeError, match="of different kinds"):
            stack_examples(mixed)
