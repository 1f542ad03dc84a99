"""Receptive fields as windows: every contraction against the fields written out, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fine_bench.gradients import FactorBlock
from fine_bench.gradients.blocks.convolution import FieldBlock, Fields
from fine_bench.gradients.blocks.direction import BlockDirection

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "padded": {"kernel_size": 3, "padding": 1},
    "oblong": {"kernel_size": (2, 3), "padding": (0, 2)},
    "dilated": {"kernel_size": 3, "dilation": (2, 1), "padding": 2},
    "same, even": {"kernel_size": 4, "padding": "same"},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "one row": {"kernel_size": (1, 3)},
}


def blocks(name: str, n: int, seed: int = 0) -> tuple[FieldBlock, FactorBlock]:
    """The same gradients with fields as windows, and with fields by ``unfold``."""
    g = torch.Generator().manual_seed(seed)
    conv = nn.Conv2d(3, 70, dtype=torch.float64, **SHAPES[name])
    x = torch.randn(n, 3, 7, 6, generator=g, dtype=torch.float64)
    output = conv(x)
    b = torch.randn(n, *output.shape[1:], generator=g, dtype=torch.float64)
    padded = F.pad(
        x,
        conv._reversed_padding_repeated_twice,
        mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode,
    )
    a = F.unfold(padded, conv.kernel_size, conv.dilation).transpose(1, 2)  # type: ignore[arg-type]
    positions = b.flatten(2).transpose(1, 2)
    fields = Fields(conv, x)
    return (
        FieldBlock("x", fields, positions, True, True),
        FactorBlock("x", a, positions, True, True),
    )


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("few_inputs", [0.0, 1e9], ids=["convolved", "formed"])
@pytest.mark.parametrize("name", SHAPES)
def test_every_contraction(name: str, few_inputs: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fine_bench.gradients.blocks.convolution.FEW_INPUTS", few_inputs)
    monkeypatch.setattr(
        "fine_bench.gradients.blocks.linear.HELD_FLOATS", 1
    )  # several runs of units
    (mine, plain), (theirs, their_plain) = blocks(name, 4), blocks(name, 6, seed=1)
    # the products below must come from gradients that were formed, not from factors
    monkeypatch.setattr(FactorBlock, "_gram_from_factors", None)
    assert mine.sizes == plain.sizes
    close(mine.a, plain.a)
    close(mine.norm2(), plain.dense().square().sum(1))
    close(mine.gram(mine), plain.dense() @ plain.dense().T)
    expected = plain.dense() @ their_plain.dense().T
    for left, right in ((mine, theirs), (mine, their_plain), (plain, theirs)):
        close(left.gram(right), expected)
        close(right.gram(left), expected.T)
    chosen = torch.tensor([3, 1])
    own, rows = mine.own_and_rows(chosen)
    close(own, plain.norm2())
    close(rows, (plain.dense() @ plain.dense().T)[chosen])
    g = torch.Generator().manual_seed(2)
    for n_rows in (1, 2, 5):
        direction = BlockDirection(
            torch.randn(n_rows, 70, plain.a.shape[2], generator=g, dtype=torch.float64),
            torch.randn(n_rows, 70, generator=g, dtype=torch.float64),
        )
        close(mine.contract(direction), plain.contract(direction))
    for n_rows in (1, 2, 5):
        weights = torch.randn(n_rows, 4, generator=g, dtype=torch.float64)
        sums, expected_sums = mine.weighted_sum(weights), plain.weighted_sum(weights)
        assert sums.weight is not None
        assert expected_sums.weight is not None
        close(sums.weight, expected_sums.weight)
        assert sums.bias is not None
        assert expected_sums.bias is not None
        close(sums.bias, expected_sums.bias)


def test_some_examples_scaled_and_in_another_precision() -> None:
    mine, plain = blocks("padded", 4)
    close(mine.rows(slice(1, 3)).dense(), plain.dense()[1:3])
    close(
        mine.scaled(torch.arange(4.0).double()).dense(), plain.dense() * torch.arange(4.0)[:, None]
    )
    assert mine.double().norm2().dtype == torch.float64


def test_nothing_is_written_out_for_norms_and_products(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, plain = blocks("padded", 4)

    def refuse(self: Fields) -> Tensor:
        raise AssertionError("the fields were written out")

    monkeypatch.setattr(Fields, "full", property(refuse))
    monkeypatch.setattr(FactorBlock, "_gram_from_factors", None)
    close(mine.gram(mine), plain.gram(plain))
    close(mine.own_and_rows(torch.tensor([0, 2]))[0], plain.norm2())


@pytest.mark.parametrize(
    "options", [{"stride": 2}, {"groups": 3}, {"kernel_size": 1}], ids=["stride", "groups", "1×1"]
)
def test_other_convolutions_keep_their_fields_in_full(options: dict[str, Any]) -> None:
    assert not Fields.serves(nn.Conv2d(3, 6, **({"kernel_size": 3} | options)))
    assert not Fields.serves(nn.Conv1d(3, 6, 3))
