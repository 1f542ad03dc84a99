"""Products with a curvature that holds what does not depend on the vectors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fine_bench.gradients.held_products as module
from fine_bench.gradients.curvature.products import Curvature, CurvatureProducts
from fine_bench.gradients.held_products import HeldProducts, has_held_products
from support.tensors import close

N = 13


def net() -> nn.Module:
    torch.manual_seed(1)
    layers = (nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 3))
    return nn.Sequential(nn.Flatten(), *layers).double()


@pytest.mark.parametrize("kind", ["ggn", "hessian"])
@pytest.mark.parametrize("holds", [True, False])
def test_they_are_the_products_of_the_slow_twin(
    monkeypatch: pytest.MonkeyPatch, kind: Curvature, holds: bool
) -> None:
    if not holds:
        monkeypatch.setattr(module, "HELD_FLOATS", 10)
    model = net()
    x, y = torch.randn(N, 2, 2, dtype=torch.float64), torch.randint(3, (N,))
    passes = []

    def batches() -> Iterator[tuple[slice, Tensor, Tensor]]:
        passes.append(1)
        for start in (0, 5, 10):
            rows = slice(start, min(start + 5, N))
            yield rows, x[rows], y[rows]

    names = [name for name, _ in model.named_parameters()]
    assert has_held_products(model, names, kind, x)
    slow = CurvatureProducts(model, F.cross_entropy, names, kind, batches, N, torch.zeros(N, 1))
    fast = HeldProducts(model, F.cross_entropy, kind, batches, N)
    n_params = sum(p.numel() for p in model.parameters())
    for k in (1, 4):
        vectors = torch.randn(k, n_params, dtype=torch.float64)
        expected = slow(vectors)
        before = len(passes)
        close(fast(vectors), expected)
        assert len(passes) - before == (0 if holds and k == 4 else 1)
    assert fast.products == 5


def test_others_take_the_general_way() -> None:
    model, x = net(), torch.zeros(2, 2, 2, dtype=torch.float64)
    names = [name for name, _ in model.named_parameters()]
    assert not has_held_products(model, names[2:], "ggn", x)
    assert not has_held_products(model, names, "fisher", x)
    assert not has_held_products(nn.Sequential(nn.Conv2d(1, 1, 2)), ["0.weight"], "ggn", x)
