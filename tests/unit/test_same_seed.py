"""Training again without some examples, with the same initialisation and order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fine_bench.gradients.margin import margins
from fine_bench.metrics.reliability import spearman_rows
from fine_bench.models.networks import mlp
from fine_bench.retraining.same_seed import (
    SameSeed,
    draw_sets,
    load,
    measure,
    neighbouring,
    save,
    train_without,
)
from fine_bench.retraining.truth_files import TruthError
from fine_bench.types import TrainingSteps

N, Q, D, C = 20, 5, 6, 3


def dense() -> nn.Module:
    return mlp((D,), C, hidden=(7,))


def general() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 5), nn.Softplus(), nn.Linear(5, C))


def data(dtype: Any = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(N + Q, D, generator=g, dtype=torch.float64).to(dtype)
    return x, torch.randint(C, (N + Q,), generator=g)


def steps(net: nn.Module, **options: Any) -> TrainingSteps:
    g = torch.Generator().manual_seed(2)
    batches = [part for _ in range(4) for part in torch.randperm(N, generator=g).split(6)]
    lr = [0.3 - 0.01 * t for t in range(len(batches))]
    return TrainingSteps(net.state_dict(), batches, lr, "SGD", options)


def by_hand(net: nn.Module, run: TrainingSteps, without: Tensor) -> Tensor:
    """The same by autograd and ``torch.optim``, one model."""
    x, y = data()
    net.load_state_dict(dict(run.initial))
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0, **run.options)
    for rows, lr in zip(run.batches, run.lr, strict=True):
        stays = [int(i) for i in rows if i not in without]
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        (F.cross_entropy(net(x[stays]), y[stays], reduction="sum") / len(rows)).backward()
        optimizer.step()
    return margins(net(x[N:]), y[N:]).detach()


@pytest.mark.parametrize("make", [dense, general])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.8, "weight_decay": 0.1}])
def test_the_run_without_a_set(make: Any, options: dict[str, float]) -> None:
    torch.manual_seed(0)
    net, (x, y) = make().double(), data()
    run = steps(net, **options)
    sets = draw_sets(N, 0.1, 3, seed=0)
    truth = measure(net, run, (x[:N], y[:N]), (x[N:], y[N:]), sets, repeats=1)
    assert truth.margin.shape == (1, 3, Q)
    for without, margin in zip(sets, truth.margin[0], strict=True):
        np.testing.assert_allclose(margin, by_hand(make().double(), run, without), atol=1e-6)
    everything = by_hand(make().double(), run, torch.empty(0))
    np.testing.assert_allclose(truth.whole[0], everything, atol=1e-6)


def test_another_optimiser_is_refused() -> None:
    net, (x, y) = dense().double(), data()
    run = steps(net)
    for wrong in (replace(run, optimizer="Adam"), replace(run, options={"nesterov": True})):
        with pytest.raises(ValueError, match="only one by SGD with momentum"):
            train_without(net, wrong, x[:N], y[:N], draw_sets(N, 0.1, 1, 0))


def test_sets_are_drawn_once_and_more_only_append() -> None:
    few, more = draw_sets(N, 0.2, 2, seed=3), draw_sets(N, 0.2, 5, seed=3)
    assert torch.equal(few, more[:2])
    assert few.shape == (2, 4)
    assert bool((few.diff(dim=1) > 0).all())
    assert not torch.equal(few, draw_sets(N, 0.2, 2, seed=4))
    with pytest.raises(ValueError, match="leave out at least one"):
        draw_sets(N, 0.001, 1, seed=0)


def test_a_neighbouring_start_is_one_unit_away() -> None:
    run = steps(dense())
    moved = neighbouring(run, 1)
    for name, value in run.initial.items():
        away = (moved.initial[name] - value).abs()
        least = torch.nextafter(value.abs(), torch.tensor(torch.inf)) - value.abs()
        assert bool((away <= least).all())
    assert any(not torch.equal(moved.initial[name], v) for name, v in run.initial.items())
    assert all(map(torch.equal, neighbouring(run, 1).initial.values(), moved.initial.values()))


def made(repeats: int = 2, noise: float = 0.0) -> tuple[SameSeed, np.ndarray[Any, Any]]:
    """A run that answers linearly, up to noise that differs between the repeats."""
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((Q, N))
    sets = draw_sets(N, 0.2, 40, seed=0).numpy().astype(np.int32)
    answer = -scores[:, sets].sum(2).T
    margin = answer + noise * rng.standard_normal((repeats, *answer.shape))
    whole = np.zeros((repeats, Q), np.float32)
    return SameSeed(sets, margin.astype(np.float32), whole, N), scores


def test_agreement_is_with_the_models_of_a_half() -> None:
    truth, scores = made()
    assert truth.agreement(scores).mean == pytest.approx(1.0)
    assert truth.agreement(-scores[:2], "development").mean == pytest.approx(-1.0)
    assert truth.ceiling() == pytest.approx(1.0)
    assert truth.share == 0.2
    noisy, scores = made(noise=2.0)
    mean = noisy.margin.mean(0)[1::2]
    expected = spearman_rows(-scores[:, noisy.left_out[1::2]].sum(2), mean.T)
    np.testing.assert_allclose(noisy.agreement(scores).per_query, expected)
    r = spearman_rows(noisy.margin[0, 1::2].T, noisy.margin[1, 1::2].T).mean()
    assert noisy.ceiling() == pytest.approx((2 * r / (1 + r)) ** 0.5)
    assert np.isnan(made(repeats=1)[0].ceiling())
    with pytest.raises(ValueError, match="with 1 to 5 queries"):
        truth.agreement(scores[:, :3])


def test_a_file_is_whole_or_named_as_damaged(tmp_path: Path) -> None:
    truth = replace(made()[0], about={"task": "mine"})
    path = tmp_path / "mine.safetensors"
    save(truth, path)
    again = load(path)
    assert again.about == {"task": "mine"}
    np.testing.assert_array_equal(again.margin, truth.margin)
    np.testing.assert_array_equal(again.left_out, truth.left_out)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(TruthError, match="not what was written"):
        load(path)
    with pytest.raises(TruthError, match="there is no file"):
        load(tmp_path / "other.safetensors")


FROZEN = sorted((Path(__file__).parents[2] / "results/ground_truth/same_seed").iterdir())


@pytest.mark.parametrize("path", FROZEN, ids=lambda path: path.stem)
def test_the_frozen_truths_are_what_they_say(path: Path) -> None:
    truth = load(path)
    assert truth.about["task"] == "mnist_mlp"
    about = truth.about
    assert path.stem.startswith(f"mnist_mlp--batch{about['batch_size']}")
    assert path.stem.endswith(f"--seed{about['seed']}--share{truth.share:g}")
    sets = draw_sets(truth.n_train, truth.share, len(truth.left_out), truth.about["seed"])
    np.testing.assert_array_equal(truth.left_out, sets.numpy())
    assert 0.9 < truth.ceiling() <= 1.0


def test_shapes_are_checked() -> None:
    truth = made()[0]
    with pytest.raises(ValueError, match="must be"):
        replace(truth, whole=truth.whole[:1])
    with pytest.raises(ValueError, match="outside"):
        replace(truth, n_train=3)
    with pytest.raises(ValueError, match="finite"):
        replace(truth, margin=truth.margin * np.inf)
