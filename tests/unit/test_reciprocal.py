"""Divisions by a size that may be zero."""

from __future__ import annotations

import pytest
import torch

from fine_bench.gradients.reciprocal import inverse_or_zero, ratio_or_zero, unit_rows

KINDS = [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", KINDS)
def test_what_has_no_size_counts_nothing(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).tiny
    scale = torch.tensor([0.0, tiny / 4, 2 * tiny, 4.0, float("inf")], dtype=dtype)
    assert inverse_or_zero(scale).tolist() == [0.0, 0.0, 1 / (2 * tiny), 0.25, 0.0]
    values = torch.tensor([[3.0], [-8.0]], dtype=dtype)
    assert ratio_or_zero(values, scale[[0, 3]]).tolist() == [[0.0, 0.75], [0.0, -2.0]]


@pytest.mark.parametrize("dtype", KINDS)
def test_unit_rows(dtype: torch.dtype) -> None:
    rows, norms = unit_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=dtype))
    torch.testing.assert_close(rows, torch.tensor([[0.6, 0.8], [0.0, 0.0]], dtype=dtype))
    assert norms.tolist() == [[5.0], [0.0]]
