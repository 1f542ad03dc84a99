"""Random projections: the fast paths against the explicit matrix, and the matrix's statistics."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fine_bench.gradients import GradientEngine, PerExampleGradients
from fine_bench.gradients.blocks.dense import DenseBlock
from fine_bench.gradients.blocks.linear import FactorBlock
from fine_bench.gradients.projection import random as module
from fine_bench.gradients.projection.random import make_projection, projection_matrix
from support.tensors import close

KINDS = ("gaussian", "rademacher", "sjlt", "factorized")


class Mixed(nn.Module):
    """Layers with factors, a bare parameter, and a linear layer on several positions."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(6))
        self.token = nn.Linear(6, 5)
        self.last = nn.Linear(5, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.token(x * self.scale)).mean(1))


def models() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        frozen = nn.Sequential(nn.Linear(70, 5), nn.ReLU(), nn.Linear(5, 4))
        frozen[0].weight.requires_grad_(False)
        frozen[2].bias.requires_grad_(False)
        return {
            # 70 and 300 inputs: unit by unit, with rows of P that span portions of it
            "mlp": (nn.Sequential(nn.Linear(70, 9), nn.ReLU(), nn.Linear(9, 4)), (70,)),
            "wide, no bias": (
                nn.Sequential(
                    nn.Linear(300, 8, bias=False), nn.Tanh(), nn.Linear(8, 4, bias=False)
                ),
                (300,),
            ),
            "frozen": (frozen, (70,)),
            "cnn": (
                nn.Sequential(
                    nn.Conv2d(2, 4, 3),
                    nn.ReLU(),
                    nn.Conv2d(4, 3, 2),
                    nn.Flatten(),
                    nn.Linear(24, 4),
                ),
                (2, 7, 5),
            ),
            "mixed": (Mixed(), (3, 6)),
        }


MODELS = tuple(models())


def gradients(name: str, n: int = 7, dtype: torch.dtype = torch.float64) -> PerExampleGradients:
    model, shape = models()[name]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, *shape, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randint(4, (n,), generator=generator)
    return GradientEngine(model.to(dtype), F.cross_entropy)(x, y)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [1, 2, 24])
def test_projecting_is_multiplying_by_the_explicit_matrix(kind: str, name: str, dim: int) -> None:
    g = gradients(name)
    projection = make_projection(kind, dim, 0)  # type: ignore[arg-type]
    explicit = projection_matrix(projection, g)
    assert explicit.shape == (g.n_params, dim)
    expected = g.dense() @ explicit
    close(projection.project(g), expected)
    close(projection.project(g), expected)  # deterministic: P is drawn anew, and the same
    batches = [g.rows(slice(0, 3)), g.rows(slice(3, 4)), g.rows(slice(4, 7))]
    close(projection.project_all(batches), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_drawing_p_once_a_batch_or_once_for_all_is_the_same(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = gradients("cnn")
    projection = make_projection(kind, 16, 0)  # type: ignore[arg-type]
    batches = [g.rows(slice(i, i + 1)) for i in range(len(g))]
    together = projection.project_all(batches)
    monkeypatch.setattr(module, "HELD_BYTES", 1)
    close(projection.project_all(iter(batches)), together)
    close(projection.project(g.rows(torch.arange(6, -1, -1))).flip(0), together)


def test_batches_of_different_lengths_of_sequence_can_follow_each_other() -> None:
    def batches() -> Iterator[PerExampleGradients]:
        for positions in (2, 3, 2):
            generator = torch.Generator().manual_seed(positions)
            a = torch.randn(4, positions, 30, generator=generator, dtype=torch.float64)
            b = torch.randn(4, positions, 20, generator=generator, dtype=torch.float64)
            yield PerExampleGradients([FactorBlock("layer", a, b, True, True)])

    projection = make_projection("gaussian", 8, 0)
    close(projection.project_all(batches()), torch.cat([projection.project(g) for g in batches()]))


@pytest.mark.parametrize("kind", KINDS)
def test_precision_does_not_change_the_matrix(kind: str) -> None:
    projection = make_projection(kind, 24, 0)  # type: ignore[arg-type]
    single = projection.project(gradients("mlp", dtype=torch.float32))
    assert single.dtype == torch.float32
    close(single.double(), projection.project(gradients("mlp")), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_and_seeds_have_their_own_streams(kind: str) -> None:
    def matrix(name: str, seed: int) -> Tensor:
        factors = FactorBlock(name, torch.ones(1, 1, 5), torch.ones(1, 1, 4), True, True)
        dense = DenseBlock(name, torch.ones(1, 3))
        projection = make_projection(kind, 6, seed)  # type: ignore[arg-type]
        return torch.cat([projection.matrix(factors), projection.matrix(dense)])

    assert torch.equal(matrix("0", 0), matrix("0", 0))
    assert not torch.equal(matrix("0", 0), matrix("1", 0))
    assert not torch.equal(matrix("0", 0), matrix("0", 1))


def test_unused_units_are_skipped_without_a_trace() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(50, 1, 80, generator=generator, dtype=torch.float64)
    b = torch.randn(50, 1, 6, generator=generator, dtype=torch.float64)
    b[:, :, 0] = 0.0
    b[:40, :, 1] = 0.0
    g = PerExampleGradients([FactorBlock("layer", a, b, True, True)])
    projection = make_projection("gaussian", 8, 0)
    close(projection.project(g), g.dense() @ projection_matrix(projection, g))


def test_no_projection_is_the_gradient() -> None:
    g = gradients("mixed")
    projection = make_projection("none", 3, 0)
    assert torch.equal(projection.project(g), g.dense())
    assert torch.equal(projection_matrix(projection, g), torch.eye(g.n_params, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_entries_are_what_the_kind_says(kind: str) -> None:
    projection = make_projection(kind, 30, 0)  # type: ignore[arg-type]
    p = projection.matrix(FactorBlock("x", torch.ones(1, 1, 99), torch.ones(1, 1, 20), True, True))
    n = p.numel()
    # E P² = 1/dim for every kind: four standard errors of the mean of independent entries
    assert abs(float(p.square().sum()) / len(p) - 1) < (0.5 if kind == "factorized" else 0.03)
    if kind == "gaussian":
        z = p.flatten() * 30**0.5
        assert abs(float(z.mean())) < 4 / n**0.5
        assert abs(float(z.pow(4).mean()) - 3) < 4 * (96 / n) ** 0.5
    if kind == "rademacher":
        assert torch.equal(p.abs(), torch.full_like(p, 30**-0.5))
        assert abs(float(p.sign().mean())) < 4 / n**0.5
    if kind == "sjlt":
        # 30 columns in four ranges: 0–6, 7–14, 15–21, 22–29
        for start, stop in ((0, 7), (7, 15), (15, 22), (22, 30)):
            entries = p[:, start:stop]
            assert bool(((entries != 0).sum(1) == 1).all())
            share = (entries != 0).double().mean(0) * (stop - start)
            assert bool((share - 1).abs().lt(0.2).all())
        assert torch.equal(p[p != 0].abs(), torch.full((4 * len(p),), 0.5, dtype=torch.float64))
        assert abs(float(p[p != 0].sign().mean())) < 4 / (4 * len(p)) ** 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_norms_and_inner_products_are_kept_in_expectation(kind: str) -> None:
    g = gradients("mlp")
    exact = g.dense()
    kernel = exact @ exact.T
    norms = kernel.diagonal().sqrt()
    scale = norms[:, None] * norms[None, :]
    draws, dim = 400, 24
    sums, squares = torch.zeros_like(kernel), torch.zeros_like(kernel)
    for seed in range(draws):
        phi = make_projection(kind, dim, seed).project(g)  # type: ignore[arg-type]
        error = (phi @ phi.T - kernel) / scale
        sums += error
        squares += error.square()
    mean, variance = sums / draws, squares / draws
    # unbiased: within 4.5 standard errors in all 28 distinct entries
    assert bool((mean.abs() < 4.5 * (variance / draws).sqrt()).all())
    # the variances of the module's docstring, for norms
    k_a, k_b = 6, 4
    bound = 2 / dim if kind != "factorized" else (1 + 2 / k_a) * (1 + 2 / k_b) - 1
    assert float(variance.diagonal().max()) < 1.5 * bound
    if kind == "gaussian":
        assert float(variance.diagonal().mean()) > 0.7 * bound


def test_the_split_of_the_factorized_dimension() -> None:
    splits = {1: (1, 1), 3: (1, 3), 24: (4, 6), 512: (16, 32), 1024: (32, 32)}
    for dim, split in splits.items():
        projection = module.Factorized(dim, 0)
        assert (projection.k_b, projection.k_a) == split


def test_refusals() -> None:
    with pytest.raises(ValueError, match="'gaussian', 'rademacher', 'sjlt', 'factorized', got 'x'"):
        make_projection("x", 8, 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dim must be at least 1, got 0"):
        make_projection("gaussian", 0, 0)
    with pytest.raises(ValueError, match="seed must be a non-negative integer, got -1"):
        make_projection("sjlt", 8, -1)
    with pytest.raises(ValueError, match=r"509 is prime; pass dim=510"):
        make_projection("factorized", 509, 0)
