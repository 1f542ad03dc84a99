"""Variable lengths, padding and label masks: exactly, against loops and one sample at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fine_bench.gradients import GradientEngine
from fine_bench.gradients.token_losses import (
    IGNORED,
    PAD,
    mean_complement,
    mean_token_loss,
    negative_token_margin,
    sum_token_loss,
)
from fine_bench.llm.net import CausalNet
from support.language import build, one_at_a_time


def slow(logits: Tensor, y: Tensor) -> list[list[float]]:
    """log p of every labelled token of every sample, straight from the definition."""
    found = []
    for z, labels in zip(logits, y, strict=True):
        row = []
        for t in range(1, len(labels)):
            if labels[t] != IGNORED:
                p = torch.softmax(z[t - 1], 0)
                row.append(float(torch.log(p[labels[t]])))
        found.append(row)
    return found


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(3, 6, 5, generator=generator, dtype=torch.float64)
    y = torch.tensor(
        [[-100, -100, 3, 1, 4, 0], [-100, 2, 2, -100, -100, -100], [0, -100, -100, -100, 1, -100]]
    )
    return logits, y


def test_the_losses_are_those_of_the_definition(batch: tuple[Tensor, Tensor]) -> None:
    logits, y = batch
    expected = slow(logits, y)
    means = torch.tensor([-sum(row) / len(row) for row in expected], dtype=torch.float64)
    sums = torch.tensor([-sum(row) for row in expected], dtype=torch.float64)
    torch.testing.assert_close(mean_token_loss(logits, y), means)
    torch.testing.assert_close(sum_token_loss(logits, y), sums)
    torch.testing.assert_close(mean_token_loss(logits, y, reduction="mean"), means.mean())


def test_the_margin_and_the_complement(batch: tuple[Tensor, Tensor]) -> None:
    logits, y = batch
    rows = [torch.tensor(row, dtype=torch.float64).exp() for row in slow(logits, y)]
    margin = torch.stack([-torch.log(p / (1 - p)).mean() for p in rows])
    complement = torch.stack([(1 - p).mean() for p in rows])
    torch.testing.assert_close(negative_token_margin(logits, y), margin)
    torch.testing.assert_close(mean_complement(logits, y), complement)
    # where p rounds to one, 1 − p keeps its digits
    sure = torch.zeros(1, 2, 2, dtype=torch.float32)
    sure[0, 0, 0] = 60.0
    label = torch.tensor([[IGNORED, 0]])
    assert 0 < float(mean_complement(sure, label)) < 1e-25
    assert float(negative_token_margin(sure, label)) == pytest.approx(-60.0)


def test_a_position_is_predicted_by_the_one_before(batch: tuple[Tensor, Tensor]) -> None:
    logits, y = batch
    moved = logits.clone()
    moved[:, -1] += torch.randn(5, dtype=torch.float64)  # predicts what comes after the end
    torch.testing.assert_close(mean_token_loss(moved, y), mean_token_loss(logits, y))
    moved[0, 1, 3] += 1.0  # predicts the first label of the first sample
    assert float(mean_token_loss(moved, y)[0]) < float(mean_token_loss(logits, y)[0])


def test_fewer_columns_of_logits_and_half_precision(batch: tuple[Tensor, Tensor]) -> None:
    logits, y = batch
    wide = torch.nn.functional.pad(y, (0, 3), value=IGNORED)
    torch.testing.assert_close(mean_token_loss(logits, wide), mean_token_loss(logits, y))
    assert mean_token_loss(logits.bfloat16(), y).dtype == torch.float32
    with pytest.raises(ValueError, match='"none" or "mean"'):
        mean_token_loss(logits, y, reduction="sum")


@pytest.mark.parametrize("loss", [mean_token_loss, sum_token_loss])
def test_gradients_are_those_of_one_sample_at_a_time(
    net: CausalNet, data: dict[str, Tensor], loss: Any
) -> None:
    x, y = data["x"], data["y"]
    widths = (x != PAD).sum(1)
    assert int(widths.min()) < int(widths.max())  # lengths do vary
    slow_gradients = one_at_a_time(net, x, y, loss)
    engine = GradientEngine(net, loss)
    names = [f"{layer}.weight" for layer in engine.recorder.layers]
    assert names == list(net.trained())  # columns of both in one order
    fast = engine(x, y)
    torch.testing.assert_close(fast.dense(), slow_gradients, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        fast.gram(), slow_gradients @ slow_gradients.T, rtol=1e-9, atol=1e-12
    )
    torch.testing.assert_close(fast.norm2(), slow_gradients.square().sum(1), rtol=1e-9, atol=1e-12)


def test_padding_and_company_change_nothing(net: CausalNet, data: dict[str, Tensor]) -> None:
    x, y = data["x"], data["y"]
    engine = GradientEngine(net, mean_token_loss)
    alone = engine(x[:5], y[:5]).dense()
    more = (
        torch.nn.functional.pad(x, (0, 9), value=PAD),
        torch.nn.functional.pad(y, (0, 9), value=IGNORED),
    )
    torch.testing.assert_close(engine(*more).dense()[:5], alone, rtol=1e-10, atol=1e-13)
    # whatever stands in for padding is seen by nobody
    filled = torch.where(x == PAD, 7, x)
    logits, other = net(x), net(filled)
    real = (x != PAD)[:, : logits.shape[1]]
    torch.testing.assert_close(other[real], logits[real], rtol=1e-10, atol=1e-12)


def test_prompts_are_not_trained_on(net: CausalNet, data: dict[str, Tensor]) -> None:
    engine = GradientEngine(net, mean_token_loss)
    nothing = torch.full_like(data["y"], IGNORED)
    assert float(engine(data["x"], nothing).norm2().max()) == 0.0
    everything = torch.where(data["x"] != PAD, data["x"], IGNORED)
    with_prompts = engine(data["x"], everything).dense()
    assert not torch.allclose(with_prompts, engine(data["x"], data["y"]).dense())


def test_the_loss_agrees_with_transformers(net: CausalNet, data: dict[str, Tensor]) -> None:
    row = int((data["x"] != PAD).sum(1).argmax())
    x, y = data["x"][row : row + 1], data["y"][row : row + 1]
    theirs = net.model(input_ids=x, labels=y).loss
    torch.testing.assert_close(
        mean_token_loss(net(x), y)[0].float(), theirs.float(), rtol=1e-5, atol=1e-6
    )


def test_only_the_lora_matrices_are_state(folder: Path, exact_norm: None) -> None:
    import copy

    net = build(folder)
    state = net.state_dict()
    assert state.keys() == net.trained().keys()
    assert all("lora_" in name for name in state)
    twin = copy.deepcopy(net)
    frozen = {n: p for n, p in net.named_parameters() if not p.requires_grad}
    copies = dict(twin.named_parameters())
    assert all(copies[n].data_ptr() == p.data_ptr() for n, p in frozen.items())
    assert all(copies[n].data_ptr() != p.data_ptr() for n, p in net.trained().items())
    twin.float()  # a copy in another precision leaves the original alone
    assert all(p.dtype == torch.float64 for p in net.parameters())
    twin.double().load_state_dict({name: torch.ones_like(p) for name, p in state.items()})
    assert all(float(p.detach().min()) == 1.0 for p in twin.trained().values())
    assert not any(float(p.detach().min()) == 1.0 for p in net.trained().values())
    with pytest.raises(RuntimeError, match="missing"):
        net.load_state_dict({})
    wrong = {name: p[:1] for name, p in state.items()}
    with pytest.raises(RuntimeError, match="of another shape"):
        net.load_state_dict(wrong)
    assert "inner.model" in next(iter(torch.nn.ModuleDict({"inner": net}).state_dict()))


def test_the_model_before_tuning(folder: Path, exact_norm: None, data: dict[str, Tensor]) -> None:
    fresh, tuned = build(folder, randomise=False), build(folder)
    with tuned.untuned():
        before = tuned(data["x"])
    torch.testing.assert_close(before, fresh(data["x"]))  # B = 0 adds nothing
    assert not torch.allclose(before, tuned(data["x"]))
    with (
        pytest.raises(RuntimeError, match="no adapter"),
        CausalNet(torch.nn.Linear(2, 2)).untuned(),
    ):
        pass
