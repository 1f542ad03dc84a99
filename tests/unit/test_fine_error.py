"""The error of one run's μ: against block-by-block twins, and against other runs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fine_bench.callback import FINECallback
from fine_bench.fine.accumulator import FineAccumulator
from fine_bench.fine.snapshot_accumulator import SnapshotAccumulator, SnapshotInterval
from fine_bench.fine.standard_error import INFLATION, WIDE_INFLATION, inflation, learn_inflation
from fine_bench.models.classifier import Classifier
from support.training import QUIET

N, EPOCHS = 6, 9


def trace(seed: int, epochs: int = EPOCHS) -> tuple[Tensor, Tensor, Tensor]:
    """Effects and noise ``(epochs, N)`` whose sizes fall together, and a step size an epoch."""
    g = torch.Generator().manual_seed(seed)
    fall = torch.exp(-torch.arange(epochs, dtype=torch.float64) / 4)[:, None]
    common = 1 + 0.3 * torch.rand(epochs, N, generator=g, dtype=torch.float64)
    effect = fall * common * (1 + 0.2 * torch.randn(epochs, N, generator=g, dtype=torch.float64))
    sigma = fall * common * (0.5 + torch.rand(epochs, N, generator=g, dtype=torch.float64))
    return effect, sigma, torch.linspace(0.1, 0.05, epochs, dtype=torch.float64)


def spread(u: Tensor, v: Tensor) -> Tensor:
    """The linear jackknife of Σ U / sqrt(n Σ V) over blocks ``(k, N)``, block by block."""
    total = v.sum(0)
    mu = u.sum(0) / (N * total).sqrt()
    z = u / (N * total).sqrt() - mu * v / (2 * total)
    k = len(u)
    return (k / (k - 1) * (z - z.mean(0)).square().sum(0)).sqrt()


def test_in_batch_against_the_twin() -> None:
    effect, sigma, lr = trace(0)
    sums = FineAccumulator(N, 1)
    for t in range(EPOCHS):  # two batches an epoch
        for index in (torch.arange(0, N, 2), torch.arange(1, N, 2)):
            sums.observe(index, effect[t, index], sigma[t, index], float(lr[t]))
    eta = lr[:, None]
    expected = spread(eta * effect, (eta * sigma).square())
    torch.testing.assert_close(sums.mu()[1][0], expected, rtol=1e-9, atol=0)
    error = sums.scores("fine", "self").std_error
    assert error is not None
    torch.testing.assert_close(error[0], (INFLATION * expected).float())
    # the noise in the denominator matters here, or the twin would not show it
    u = eta * effect
    numerator = (EPOCHS / (EPOCHS - 1) * (u - u.mean(0)).square().sum(0)).sqrt()
    numerator = numerator / (N * (eta * sigma).square().sum(0)).sqrt()
    assert float((numerator / expected - 1).abs().max()) > 0.1


def test_snapshots_of_one_epoch_are_one_block() -> None:
    effect, sigma, lr = trace(1, 3 * EPOCHS)
    sums, apart = SnapshotAccumulator(N, 1), SnapshotAccumulator(N, 1)
    resumed: SnapshotAccumulator | None = None
    u, v = torch.zeros(EPOCHS, N).double(), torch.zeros(EPOCHS, N).double()
    for t in range(3 * EPOCHS):
        interval = SnapshotInterval()
        interval.add(float(lr[t]), 4)
        arguments: Any = (torch.arange(N), effect[t][None], sigma[t][None], interval)
        sums.observe_snapshot(*arguments, epoch=t // 3)
        apart.observe_snapshot(*arguments)
        if resumed is not None:
            resumed.observe_snapshot(*arguments, epoch=t // 3)
        if t == 10:  # in the middle of an epoch
            resumed = SnapshotAccumulator(N, 1)
            resumed.load_state_dict(sums.state_dict())
        u[t // 3] += lr[t] * effect[t]
        v[t // 3] += lr[t] ** 2 / 4 * N * sigma[t].square()
    torch.testing.assert_close(sums.mu()[1][0], spread(u, v), rtol=1e-9, atol=0)
    assert resumed is not None
    assert torch.equal(resumed.mu()[1], sums.mu()[1])
    assert torch.equal(apart.mu()[0], sums.mu()[0])
    assert not torch.allclose(apart.mu()[1], sums.mu()[1], rtol=0.05)


def test_it_is_nearly_the_jackknife_that_leaves_blocks_out() -> None:
    effect, sigma, lr = trace(2, 200)
    u, v = lr[0] * (1 + effect), lr[0] ** 2 * (1 + sigma)

    def mu(keep: Tensor) -> Tensor:
        return u[keep].sum(0) / (N * v[keep].sum(0)).sqrt()

    k = len(u)
    # μ grows with the number of blocks as √k: brought back to k of them
    left = torch.stack([mu(torch.arange(k) != b) for b in range(k)]) * math.sqrt(k / (k - 1))
    exact = ((k - 1) / k * (left - left.mean(0)).square().sum(0)).sqrt()
    assert float((spread(u, v) / exact - 1).abs().max()) < 0.02


def test_intervals_cover_where_blocks_are_independent() -> None:
    """Blocks of one distribution: the jackknife is then right without any factor."""
    g = torch.Generator().manual_seed(5)
    runs, blocks = 300, 40
    values, errors = [], []
    for _ in range(runs):
        sums = FineAccumulator(N, 1)
        for _ in range(blocks):
            scale = 0.5 + torch.rand(N, generator=g, dtype=torch.float64)
            effect = scale * (0.7 + torch.randn(N, generator=g, dtype=torch.float64))
            sums.observe(torch.arange(N), effect, scale, 0.1)
        mu, error = sums.mu()
        values.append(mu[0])
        errors.append(error[0])
    x, error = torch.stack(values), torch.stack(errors)
    inside = ((x - x.mean(0)).abs() <= 1.96 * error).double().mean()
    assert 0.93 < float(inside) < 0.965
    assert abs(learn_inflation(x, error) - 1) < 0.06


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95])
def test_learning_finds_the_factor(level: float) -> None:
    """Runs that differ twice as much as their own errors say, unlike sizes and a few bad errors."""
    g = torch.Generator().manual_seed(8)
    error = (0.1 + torch.rand(5000, generator=g, dtype=torch.float64)).expand(3, -1).clone()
    values = torch.randn(3, 5000, generator=g, dtype=torch.float64) * 2 * error + 3
    error[1, :7] = float("inf")
    error[2, 7:9] = 0.0
    assert learn_inflation(values, error, level) == pytest.approx(2, rel=0.03)


def test_learning_refuses_what_it_cannot_use() -> None:
    ones = torch.ones(2, 4)
    with pytest.raises(ValueError, match="at least two runs"):
        learn_inflation(ones[:1], ones[:1])
    with pytest.raises(ValueError, match="one shape"):
        learn_inflation(ones, ones[:, :3])
    with pytest.raises(ValueError, match=r"try 0\.95"):
        learn_inflation(ones, ones, 95)
    with pytest.raises(ValueError, match="finite error"):
        learn_inflation(ones, torch.full((2, 4), float("inf")))


@pytest.mark.parametrize("snapshot", [False, True])
def test_states_of_earlier_versions_go_on_with_an_unknown_error(snapshot: bool) -> None:
    def feed(sums: FineAccumulator, epochs: range) -> None:
        effect, sigma, lr = trace(3)
        for t in epochs:
            if isinstance(sums, SnapshotAccumulator):
                interval = SnapshotInterval()
                interval.add(float(lr[t]), 4)
                sums.observe_snapshot(
                    torch.arange(N), effect[t][None], sigma[t][None], interval, epoch=t
                )
            else:
                sums.observe(torch.arange(N), effect[t], sigma[t], float(lr[t]))

    kind = SnapshotAccumulator if snapshot else FineAccumulator
    whole, first, rest = kind(N, 1), kind(N, 1), kind(N, 1)
    feed(whole, range(EPOCHS))
    feed(first, range(4))
    old = {key: value for key, value in first.state_dict().items() if key != "block"}
    old["sums"] = old["sums"][:5]
    rest.load_state_dict(old)
    feed(rest, range(4, EPOCHS))
    assert torch.equal(rest.mu()[0], whole.mu()[0])
    assert torch.isinf(rest.mu()[1]).all()


def test_single_queries_and_whitened_directions_get_wider_intervals() -> None:
    assert inflation("self", "euclidean") == inflation("self", "ekfac") == INFLATION
    assert inflation("validation", "euclidean") == INFLATION
    for target, geometry in (
        ("queries", "euclidean"),
        ("queries", "ekfac"),
        ("validation", "ekfac"),
        ("validation_per_class", "ekfac"),
    ):
        assert inflation(target, geometry) == WIDE_INFLATION  # type: ignore[arg-type]


def test_the_callback_widens_what_it_reports() -> None:
    g = torch.Generator().manual_seed(0)
    data = TensorDataset(
        torch.randn(24, 4, generator=g), torch.randint(3, (24,), generator=g), torch.arange(24)
    )
    queries = TensorDataset(*(part[:5] for part in data.tensors[:2]))
    callbacks = [FINECallback("self"), FINECallback("queries", queries=queries)]
    pl.Trainer(
        max_epochs=3,
        **QUIET,
        callbacks=[*callbacks],
    ).fit(Classifier(nn.Linear(4, 3), 3, lr=0.1), DataLoader(data, batch_size=8, shuffle=True))
    for callback, factor in zip(callbacks, (INFLATION, WIDE_INFLATION), strict=True):
        error = callback.scores().std_error
        assert error is not None
        assert callback._schedule is not None
        _, own = callback._schedule.accumulator.mu()
        torch.testing.assert_close(error, (factor * own).float())
