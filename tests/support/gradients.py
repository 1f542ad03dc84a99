"""Per-example gradients straight from the definition, and what follows from them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fine_bench.gradients import PerExampleGradients
from fine_bench.gradients.projection.random import make_projection, projection_matrix
from support.tensors import close


def reference(model: nn.Module, x: Tensor, y: Tensor, loss: Any) -> dict[str, Tensor]:
    """Per-example gradients by name, straight from the definition."""
    params = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}

    def one(values: dict[str, Tensor], xi: Tensor, yi: Tensor) -> Tensor:
        return loss(functional_call(model, values, (xi[None],)), yi[None], reduction="none").sum()

    return vmap(grad(one), in_dims=(None, 0, 0))(params, x, y)


def flat(grads: dict[str, Tensor], names: list[str] | None = None) -> Tensor:
    return torch.cat([grads[k].reshape(len(grads[k]), -1) for k in names or grads], 1)


def same(g: PerExampleGradients, expected: Tensor) -> None:
    """All contractions and projections of g against the explicit gradients."""
    n = len(expected)
    assert g.n_params == expected.shape[1]
    assert len(g) == n
    close(g.dense(), expected)
    close(g.gram(), expected @ expected.T)
    close(g.norm2(), expected.square().sum(1))
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(3, n, dtype=torch.float64, generator=generator)
    for rows in (weights, weights[:1]):
        close(g.contract(g.weighted_sum(rows)), rows @ expected @ expected.T)
    factor = torch.rand(n, dtype=torch.float64, generator=generator)
    some = g.scaled(factor).rows(slice(0, (n + 1) // 2))
    part = (expected * factor[:, None])[: (n + 1) // 2]
    close(some.dense(), part)
    close(g.gram(some), expected @ part.T)
    close(g.rows(torch.arange(n - 1, -1, -1)).gram(g), expected.flip(0) @ expected.T)
    for kind in ("gaussian", "rademacher", "sjlt", "factorized"):
        projection = make_projection(kind, 6, 0)  # type: ignore[arg-type]
        explicit = projection_matrix(projection, g)
        close(projection.project(g), expected @ explicit)
        if n > 1:
            batches = [g.rows(slice(0, 1)), g.rows(slice(1, n))]
            close(projection.project_all(batches), expected @ explicit)
