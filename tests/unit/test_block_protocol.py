"""A further kind of layer is one class of blocks and one rule: everything else follows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fine_bench.gradients import FactorBlock, GradientEngine, PerExampleGradients
from fine_bench.gradients.blocks.protocol import Block
from fine_bench.gradients.curvature.ekfac import EKFAC, fit_ekfac
from fine_bench.gradients.curvature.products import Roots
from fine_bench.gradients.diagonal import diagonal_gram, diagonal_norm2
from fine_bench.gradients.layers import _KINDS, LayerKind, register_layer
from fine_bench.gradients.per_example import stack_examples
from fine_bench.gradients.projection.random import make_projection, projection_matrix
from fine_bench.gradients.projection.sketch import Sketch

N, WIDTH, CLASSES = 8, 5, 3


class Scale(nn.Module):
    """Each coordinate times a trained number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


@dataclass(frozen=True, eq=False)
class ScaleBlock(Block):
    """Input and output gradient, ``(B, T, D)`` each: the gradient is Σ_t x_t ∘ δ_t."""

    name: str
    x: Tensor
    b: Tensor

    kind: ClassVar[str] = "scale"

    @property
    def n_params(self) -> int:
        return self.b.shape[2]

    @property
    def values(self) -> Tensor:
        return self.b

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.x, self.b

    def with_tensors(self, *tensors: Tensor) -> ScaleBlock:
        return ScaleBlock(self.name, *tensors)

    def scaled(self, factor: Tensor) -> ScaleBlock:
        return self.with_tensors(self.x, self.b * factor[:, None, None])

    def dense(self) -> Tensor:
        return (self.x * self.b).sum(1)


class ScaleKind(LayerKind):
    """How a ``Scale`` becomes a ``ScaleBlock``."""

    def features(self, layer: nn.Module, x: Tensor) -> Tensor:
        return x.reshape(len(x), -1, WIDTH)

    def positions(self, layer: nn.Module, grad: Tensor) -> Tensor:
        return grad.reshape(len(grad), -1, WIDTH)

    def block_of(self, name: str, layer: nn.Module, a: Any, b: Tensor) -> Block:
        return ScaleBlock(name, a, b)


@pytest.fixture
def found() -> Iterator[tuple[PerExampleGradients, PerExampleGradients, EKFAC]]:
    """Gradients of a network with such a layer, by the rule and by ``torch.func``; its EK-FAC."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(Scale(), nn.Tanh(), nn.Linear(WIDTH, CLASSES)).double()
        x = torch.randn(N, WIDTH, dtype=torch.float64)
    y = torch.arange(N) % CLASSES
    in_full = GradientEngine(model, F.cross_entropy)(x, y)
    register_layer(Scale, ScaleKind())
    try:
        engine = GradientEngine(model, F.cross_entropy)
        roots = Roots("fisher", F.cross_entropy, torch.rand(N, 1))
        fitted = fit_ekfac(engine, lambda: iter([(slice(0, N), x, y)]), roots, N)
        fitted.damp(None, 0.1)
        yield engine(x, y), in_full, fitted
    finally:
        del _KINDS[Scale]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


Found = tuple[PerExampleGradients, PerExampleGradients, EKFAC]


def test_the_rule_gives_the_gradients(found: Found) -> None:
    g, in_full, _ = found
    assert isinstance(g.blocks[0], ScaleBlock)
    assert isinstance(g.blocks[1], FactorBlock)
    # what torch.func takes comes last
    close(g.blocks[0].dense(), in_full.blocks[1].dense())
    close(g.blocks[1].dense(), in_full.blocks[0].dense())


def test_products_follow(found: Found) -> None:
    g = found[0]
    full = g.dense()
    close(g.gram(), full @ full.T)
    close(g.norm2(), full.square().sum(1))
    close(g.rows(slice(2, 5)).gram(g), full[2:5] @ full.T)
    close(g.double().grams(2)[1], full[4:] @ full[4:].T)
    own, rows = g.own_and_rows(torch.tensor([1, 6]))
    close(own, full.square().sum(1))
    close(rows, full[[1, 6]] @ full.T)
    weights = torch.linspace(-1, 1, 2 * N, dtype=torch.float64).view(2, N)
    close(g.contract(g.weighted_sum(weights)), weights @ full @ full.T)
    close(g.scaled(weights[0]).dense(), full * weights[0, :, None])
    close(stack_examples([g, g.rows(slice(0, 3))]).dense(), torch.cat([full, full[:3]]))


def test_diagonal_geometries_follow(found: Found) -> None:
    g = found[0]
    full = g.dense()
    shapes = [[(WIDTH,)], [(CLASSES, WIDTH), (CLASSES,)]]
    parameters = [[1.0 + torch.rand(s, dtype=torch.float64) for s in part] for part in shapes]
    d = [b.diagonal_weights(p) for b, p in zip(g.blocks, parameters, strict=True)]
    flat = torch.cat([p.flatten() for part in parameters for p in part])
    close(diagonal_gram(g, g, d), (full * flat) @ full.T)
    close(diagonal_norm2(g, d), (full.square() * flat).sum(1))


@pytest.mark.parametrize("kind", ["none", "gaussian", "sjlt", "factorized"])
def test_projections_follow(found: Found, kind: Any) -> None:
    g, projection = found[0], make_projection(kind, 6, 0)
    close(projection.project(g), g.dense() @ projection_matrix(projection, g))


def test_a_sketch_leaves_it_exact(found: Found) -> None:
    block = found[0].blocks[0]
    close(Sketch(1, 0).dense(block).g, block.dense())


def test_the_curvature_follows(found: Found) -> None:
    g, in_full, fitted = found
    v = in_full.blocks[1].dense()
    solved = fitted.blocks[0].prepare(g.blocks[0]).weight
    assert solved is not None
    s, lam = fitted.blocks[0].eigenvalues, fitted.damping[0]
    assert len(s) == WIDTH
    close(fitted.blocks[0].quadratic(g.blocks[0]), (v * solved).sum(1))
    again = EKFAC.from_state(fitted.state_dict())
    close(again.gram(g), fitted.gram(g))
    # (C + λ)⁻¹ has the trace Σ 1/(s + λ)
    unit = ScaleBlock(
        "unit", torch.eye(WIDTH).double()[:, None], torch.ones(WIDTH, 1, WIDTH).double()
    )
    close(fitted.blocks[0].quadratic(unit).sum(), (1.0 / (s + lam)).sum())


def test_blocks_of_different_kinds_are_refused(found: Found) -> None:
    first, second = found[0].blocks
    with pytest.raises(TypeError, match="of different kinds: different models"):
        first.gram(second)
    with pytest.raises(TypeError, match="are of different kinds"):
        first.stacked([second])
