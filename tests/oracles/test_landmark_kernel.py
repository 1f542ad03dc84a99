"""Kernels from the rows of landmarks, and products that several kernels share: against the matrices
in full, in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from fine_bench.fine.kernel_scores import matched_ridge, regression, rows_of
from fine_bench.fine.kernel_states import landmarks_of
from fine_bench.gradients.engine import GradientEngine
from fine_bench.gradients.input_products import InputProducts
from fine_bench.gradients.landmark_kernel import JITTER, LandmarkFlow, landmark_features
from fine_bench.gradients.per_example import PerExampleGradients
from fine_bench.gradients.tangent_kernel import KernelFlow, Probe, cross_gram, gram_matrix
from fine_bench.types import UnsupportedProblemError
from support.networks import CLASSES, models
from support.tensors import close

N, V, DIM, BATCH = 30, 6, 12, 8


def kernel_of(seed: int = 0) -> Tensor:
    x = torch.randn(N + V, DIM, generator=torch.Generator().manual_seed(seed)).double()
    kernel = x @ x.T + 0.3 * torch.exp(-torch.cdist(x, x) / 2)
    return kernel / kernel.diagonal()[:N].mean()


def labelled() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    residual, y, slope = (torch.randn(m, 3, generator=g).double() for m in (N, N, V))
    return residual, y - y.mean(1, keepdim=True), slope


# ------------------------------------------------------------------------------------ landmarks


def test_features_are_nystroems_formula() -> None:
    kernel, chosen = kernel_of(), torch.tensor([1, 4, 5, 11, 20, 30, 31, 32])
    phi = landmark_features(kernel[chosen], chosen)
    small = kernel[chosen][:, chosen] + JITTER * torch.eye(8)
    close(phi.T @ phi, kernel[:, chosen] @ torch.linalg.solve(small, kernel[chosen]), 1e-10)
    close((phi.T @ phi)[chosen], kernel[chosen], 1e-3)


@pytest.mark.parametrize("steps", [1, 4])
def test_the_flow_in_features_is_that_of_their_kernel(steps: int) -> None:
    g = torch.Generator().manual_seed(2)
    phi = torch.randn(7, N + V, generator=g).double() / 7**0.5
    known, asked, y = phi[:, :N], phi[:, N:], labelled()[1]
    slow = KernelFlow(known.T @ known, 0.7, steps)
    fast = LandmarkFlow(known, 0.7, steps)
    close(fast.smoother(asked), slow.smoother(asked.T @ known), 1e-10)
    close(fast.solve(y), slow.solve(y), 1e-10)


@pytest.mark.parametrize("options", [{"time": 0.4}, {"ridge": 0.6}, {}])
def test_all_examples_as_landmarks_are_the_whole_kernel(options: dict[str, float]) -> None:
    kernel, (residual, y, slope) = 3.0 * kernel_of(), labelled()
    groups = rows_of(torch.eye(V), None)
    whole = regression(kernel, residual * 0.4, slope, y, groups, **options)
    rows = torch.arange(N + V)
    found = regression(kernel, residual * 0.4, slope, y, groups, landmarks=rows, **options)
    # apart from the jitter
    close(found.mu, whole.mu, 3e-3)
    close(found.sigma, whole.sigma, 3e-3)
    close(found.fitted, whole.fitted, 3e-3)
    # a ridge is matched to one part in a thousand of its odds
    assert found.ridge == pytest.approx(whole.ridge, rel=1e-2)


def test_a_ridge_is_matched_by_any_solver() -> None:
    kernel, y = kernel_of()[:N, :N], labelled()[1]
    found = matched_ridge(lambda ridge: KernelFlow(kernel.clone(), 1 / ridge, 1), y, 0.5)
    assert found == pytest.approx(matched_ridge(kernel, y, 0.5))


def test_which_landmarks() -> None:
    assert landmarks_of(None, N, V, 0) is None
    assert landmarks_of(N, N, V, 0) is None
    found = landmarks_of(10, N, V, 0)
    assert found is not None
    assert found[10:].tolist() == list(range(N, N + V))
    assert found[:10].tolist() == sorted(set(found[:10].tolist()) & set(range(N)))
    other = landmarks_of(10, N, V, 1)
    assert other is not None
    assert other.tolist() != found.tolist()


def test_rows_that_are_no_kernel() -> None:
    with pytest.raises(UnsupportedProblemError, match="2 landmarks is numerically singular"):
        landmark_features(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), torch.arange(2))


# ------------------------------------------------------------------------------ shared products


def network(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(3)
    net, shape = models()[name]
    return net.double(), torch.randn(N, *shape, dtype=torch.float64)


@pytest.mark.parametrize("name", ["relu", "tanh, no bias", "cnn"])
def test_products_of_inputs_are_taken_once_and_are_the_same(name: str) -> None:
    net, x = network(name)
    probe = Probe()
    engine = GradientEngine(net, probe)

    def gradients(start: int = 0) -> Iterator[tuple[slice, PerExampleGradients]]:
        for first in range(0, N, BATCH):
            rows = slice(first, min(first + BATCH, N))
            if rows.stop > start:
                yield rows, engine(x[rows], torch.zeros(len(x[rows]), dtype=torch.int64))

    products, across = InputProducts(), InputProducts()
    for number in range(4):
        probe.draw(CLASSES, torch.Generator().manual_seed(number))
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.1 * torch.randn_like(p))
        plain = gram_matrix(gradients, N)
        assert torch.equal(gram_matrix(gradients, N, products), plain)
        few = cross_gram(list(gradients())[:2], gradients, N, products=across)[0]
        assert torch.equal(few, cross_gram(list(gradients())[:2], gradients, N)[0])
    # the first layer's, and of no other, from the second kernel on
    pairs, layers = 4 * 5 // 2, int(name != "cnn")
    assert products.n_reused == 3 * pairs * layers
    assert across.n_reused == 3 * 2 * 4 * layers


def test_products_that_do_not_fit_are_computed_anew() -> None:
    net, x = network("relu")
    engine = GradientEngine(net, nn.functional.cross_entropy)
    found = engine(x, torch.zeros(N, dtype=torch.int64))
    products = InputProducts(N * N - 1)
    for _ in range(3):
        assert torch.equal(products.gram(found, 0, found, 0), found.gram())
    assert products.n_reused == 0


def test_inputs_that_change_free_their_place() -> None:
    net, x = network("relu")
    engine = GradientEngine(net, nn.functional.cross_entropy)
    y = torch.zeros(N, dtype=torch.int64)
    products = InputProducts(2 * N * N)
    for factor in (1.0, 2.0, 3.0):
        found = engine(x * factor, y)
        assert torch.equal(products.gram(found, 0, found, 0), found.gram())
    assert products.n_reused == 0
    assert products._left == 2 * N * N
    assert not products._inputs
