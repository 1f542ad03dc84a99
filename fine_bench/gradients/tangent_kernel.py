"""The tangent kernel of a network, of pairs of examples, and the ridge regression with a kernel.

    K(i, j) = ⟨∇_θ v·z(x_i), ∇_θ v·z(x_j)⟩                          z the logits, v a probe

How far a small step on one example moves the output of another. With v random signs about their
mean, K is in expectation the sum over pairs of classes of the whole kernel, of which only what a
softmax sees is kept (adding a constant to all logits changes no probability). Jacot, Gabriel,
Hongler: *Neural Tangent Kernel* (NeurIPS 2018, arXiv:1806.07572).

    Z = K_q (K + λI)⁻¹                                              (V, n)

is how much the regression's value at each query moves with the target at each example. Leaving
out example i moves it by exactly −Z_qi (y_i − f₋ᵢ(x_i)), where f₋ᵢ is the regression without i, and
y_i − f₋ᵢ(x_i) = α_i / [(K + λI)⁻¹]_ii with α = (K + λI)⁻¹ y.

A network that is trained for a while solves no ridge regression: its outputs follow a gradient flow
and are stopped at time τ. Then A = (I − e^{−τK}) K⁻¹ stands for (K + λI)⁻¹ (``KernelFlow``).

Shapes: n training examples, V queries, k classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from fine_bench.gradients.input_products import InputProducts
from fine_bench.gradients.per_example import PerExampleGradients
from fine_bench.types import UnsupportedProblemError

HELD_FLOATS = 2**27
"""Numbers that the gradients held at a time may take: 0.5 GiB in float32."""

FLOW_STEPS = 4
"""m, implicit steps of ``KernelFlow``."""

Batches = Iterable[tuple[slice, PerExampleGradients]]


class Probe:
    """The loss v·z of ``GradientEngine``: a weighted sum of the logits, whatever the label.

    Attributes:
        weights: ``(k,)``, set by ``draw``.
    """

    weights: Tensor

    def draw(self, n_classes: int, generator: torch.Generator) -> None:
        """Random signs minus their mean, not all zero. ``n_classes`` ≥ 2."""
        while True:
            signs = torch.randint(0, 2, (n_classes,), generator=generator).double() * 2 - 1
            if bool((signs != signs[0]).any()):
                self.weights = signs - signs.mean()
                return

    def __call__(self, logits: Tensor, y: Tensor, reduction: str = "none") -> Tensor:
        """v·z of each example, ``(batch,)``."""
        del y, reduction
        return logits @ self.weights.to(logits)


def gram_matrix(
    train: Callable[[int], Iterator[tuple[slice, PerExampleGradients]]],
    n: int,
    products: InputProducts | None = None,
) -> Tensor:
    """Dot products of all pairs of training examples, ``(n, n)``.

    As many gradients are held as ``HELD_FLOATS`` allows; for each such share the later ones are
    taken again.

    Args:
        train: positions and gradients of the batches that end after a position, in order.
        n: examples, at least 1.
        products: of the same batches at other parameters; what they have in common is taken once.
    """
    kernel: Tensor | None = None
    start = 0
    while start < n:
        held: list[tuple[slice, PerExampleGradients]] = []
        size, full = 0, False
        for rows, found in train(start):
            gradients = _formed(found)
            floats = _floats(gradients)
            full = full or (bool(held) and size + floats > HELD_FLOATS)
            if not full:
                held.append((rows, gradients))
                size, start = size + floats, rows.stop
            for own, mine in held:
                part = _gram(products, mine, own.start, gradients, rows.start)
                if kernel is None:
                    kernel = part.new_empty(n, n)
                kernel[own, rows] = part
                kernel[rows, own] = part.T
    assert kernel is not None
    return kernel


def cross_gram(
    queries: Batches,
    train: Callable[[], Batches],
    n: int,
    prepare: Callable[[PerExampleGradients], PerExampleGradients] | None = None,
    products: InputProducts | None = None,
) -> tuple[Tensor, Tensor]:
    """Dot products of queries and training examples ``(V, n)``, and squared norms ``(V,)``.

    As many queries' gradients are held as ``HELD_FLOATS`` allows, at least one batch; for each
    such share the training examples' are taken again.

    Args:
        queries: positions and gradients, batch by batch; taken as they are needed.
        train: starts a pass over the training examples.
        n: training examples, at least 1.
        prepare: what becomes of gradients before their products are taken; by default they are
            formed in full where that is small.
        products: of the same batches at other parameters; see ``gram_matrix``.
    """
    prepare = prepare or _formed
    norms: list[Tensor] = []
    rows_of_cross = []
    for asked in _shares(prepare(gradients) for _, gradients in queries):
        # batches of queries are named by numbers below zero
        first = -1 - len(norms)
        norms += [gradients.norm2() for gradients in asked]
        cross = norms[-1].new_empty(sum(map(len, asked)), n)
        for rows, gradients in train():
            theirs = prepare(gradients)
            parts = [
                _gram(products, mine, first - number, theirs, rows.start)
                for number, mine in enumerate(asked)
            ]
            cross[:, rows] = torch.cat(parts)
        rows_of_cross.append(cross)
        del asked
    one = len(rows_of_cross) == 1  # no copy of what may be large
    return rows_of_cross[0] if one else torch.cat(rows_of_cross), torch.cat(norms)


def _gram(
    products: InputProducts | None,
    mine: PerExampleGradients,
    own: int,
    theirs: PerExampleGradients,
    other: int,
) -> Tensor:
    return mine.gram(theirs) if products is None else products.gram(mine, own, theirs, other)


def _shares(batches: Iterable[PerExampleGradients]) -> Iterator[list[PerExampleGradients]]:
    """Batches together as far as ``HELD_FLOATS`` allows, at least one."""
    held: list[PerExampleGradients] = []
    size = 0
    for gradients in batches:
        floats = _floats(gradients)
        if held and size + floats > HELD_FLOATS:
            yield held
            held, size = [], 0
        held.append(gradients)
        size += floats
    if held:
        yield held


def _floats(gradients: PerExampleGradients) -> int:
    return sum(part.numel() for block in gradients.blocks for part in block.tensors)


def _formed(gradients: PerExampleGradients) -> PerExampleGradients:
    """Layers with several positions in full where that is small: they would be formed anew for
    every pair of batches."""
    if gradients.n_params * len(gradients) > HELD_FLOATS:
        return gradients
    blocks = [block.positions_summed() for block in gradients.blocks]
    return PerExampleGradients(blocks, gradients.loss, gradients.one_minus_p)


class KernelRidge:
    """Ridge regression with a kernel of mean diagonal 1.

    Args:
        kernel: ``(n, n)``, symmetric, of mean diagonal 1; λ is added to it *in place*.
        ridge: λ, > 0.

    Raises:
        UnsupportedProblemError: K + λI is numerically singular.
    """

    def __init__(self, kernel: Tensor, ridge: float) -> None:
        self.ridge = ridge
        kernel.diagonal().add_(ridge)
        self._factor, info = torch.linalg.cholesky_ex(kernel)
        if int(info) > 0:
            raise UnsupportedProblemError(
                f"the kernel of {len(kernel)} examples with ridge={ridge} is numerically singular; "
                "pass a larger ridge"
            )

    def smoother(self, cross: Tensor) -> Tensor:
        """Z = K_q (K + λI)⁻¹, ``(V, n)``, of ``cross`` K_q."""
        found: Tensor = torch.cholesky_solve(cross.T.contiguous(), self._factor).T
        return found

    def solve(self, targets: Tensor) -> Tensor:
        """α = (K + λI)⁻¹ y, ``(n, k)`` as ``targets``; the residuals of the fit are λα."""
        found: Tensor = torch.cholesky_solve(targets, self._factor)
        return found

    def implicit_steps(self, targets: Tensor, count: int) -> Tensor:
        """(B + B² + … + Bᵐ) y/λ, ``(n, k)`` as ``targets``: m = ``count`` implicit steps."""
        part = self.solve(targets)
        total = part.clone()
        for _ in range(count - 1):
            part = self.ridge * self.solve(part)
            total += part
        return total

    def inverse_diagonal(self) -> Tensor:
        """[(K + λI)⁻¹]_ii, ``(n,)``; the smoother's own diagonal is 1 − λ times that."""
        found: Tensor = torch.cholesky_inverse(self._factor).diagonal().clone()
        return found

    def left_out_residuals(self, targets: Tensor) -> Tensor:
        """y_i − f₋ᵢ(x_i) of every example, the regression without it; ``(n, k)`` as ``targets``."""
        return self.solve(targets) / self.inverse_diagonal()[:, None]


class KernelFlow:
    """Gradient flow with a kernel of mean diagonal 1, stopped at a time.

        df/dt = K (y − f),  f(0) = 0      f(τ) = K α,  α = A y,  A = (I − e^{−τK}) K⁻¹

    and f(τ) = K_q A y at queries: A stands where ridge regression has (K + λI)⁻¹. A push r of
    example i that lasts for all the time moves the query by (K_q A)_qi r. The time is cut into m
    implicit steps,

        e^{−τK} ≈ Bᵐ,  B = λ(K + λI)⁻¹,  λ = m/τ,      A ≈ (B + B² + … + Bᵐ)/λ,

    which costs one factorisation and m solves, errs by 1/m, keeps every eigenvalue of KA in
    [0, 1) and for m = 1 is ridge regression. Early stopping as regularisation: Yao, Rosasco,
    Caponnetto 2007 (Constructive Approximation 26).

    Args:
        kernel: ``(n, n)``, symmetric, of mean diagonal 1; λ is added to it *in place*.
        time: τ, > 0.
        steps: m, ≥ 1.

    Raises:
        UnsupportedProblemError: K + λI is numerically singular.
    """

    def __init__(self, kernel: Tensor, time: float, steps: int = FLOW_STEPS) -> None:
        self.steps = steps
        self._ridge = KernelRidge(kernel, steps / time)

    def smoother(self, cross: Tensor) -> Tensor:
        """Z = K_q A, ``(V, n)``, of ``cross`` K_q."""
        return self.solve(cross.T.contiguous()).T

    def solve(self, targets: Tensor) -> Tensor:
        """α = A y, ``(n, k)`` as ``targets``."""
        return self._ridge.implicit_steps(targets, self.steps)
