"""Gradients that are formed before micro-batches are put side by side: the same Gram matrix."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from fine_bench.gradients.blocks.dense import DenseBlock
from fine_bench.gradients.blocks.linear import FactorBlock
from fine_bench.gradients.per_example import PerExampleGradients, stack_examples

SIZES = [8, 16, 33, 128, 352]


def parts(
    dtype: torch.dtype, t: int, n_in: int, n_out: int, sizes: tuple[int, ...] = (8, 8), **kind: bool
) -> list[PerExampleGradients]:
    draw = torch.Generator().manual_seed(n_in + n_out)
    kind = {"weight": True, "bias": False, **kind}
    return [
        PerExampleGradients(
            [
                FactorBlock(
                    "layer",
                    torch.randn(n, t, n_in, generator=draw).to(dtype),
                    torch.randn(n, t, n_out, generator=draw).to(dtype).mul_(0.37),
                    **kind,
                )
            ]
        )
        for n in sizes
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gram_matrix_is_the_same_bit_for_bit(dtype: torch.dtype) -> None:
    formed = 0
    for t, n_in, n_out in product([2, 7, 64], SIZES, SIZES):
        given = parts(dtype, t, n_in, n_out, (5, 8, 3))
        late, early = stack_examples(given), stack_examples(given, for_gram=True)
        assert torch.equal(late.gram(), early.gram()), (t, n_in, n_out)
        if isinstance(early.blocks[0], DenseBlock):
            formed += 1
            assert early.blocks[0].n_floats <= late.blocks[0].n_floats
            in_full = torch.cat([part.dense() for part in given]).double()
            wanted = in_full @ in_full.T
            found = early.gram().double()
            assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert formed >= 15


def laid_out_otherwise(part: PerExampleGradients) -> PerExampleGradients:
    (block,) = part.blocks
    a, b = block.tensors
    return PerExampleGradients([block.with_tensors(a, b.mT.contiguous().mT)])


def test_what_is_not_the_same_is_left_as_it_is() -> None:
    """A bias, no weight, other numbers of positions, several shares of units, larger in full."""
    f64 = torch.float64
    longer = [*parts(f64, 64, 8, 16), *parts(f64, 60, 8, 16)]
    for given in (
        parts(f64, 64, 8, 16, bias=True),
        parts(f64, 64, 8, 16, weight=False, bias=True),
        longer,
        parts(f64, 512, 300, 300, (6, 6)),  # units are taken in shares
        parts(f64, 4, 128, 352),
        parts(f64, 64, 33, 33),  # rows that do not begin at a cache line
        [laid_out_otherwise(part) for part in parts(f64, 64, 8, 16)],
    ):
        early = stack_examples(given, for_gram=True)
        assert isinstance(early.blocks[0], FactorBlock)
        assert torch.equal(early.gram(), stack_examples(given).gram())
