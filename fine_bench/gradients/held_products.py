"""v ↦ C v of a fully connected network, with all that does not depend on v computed once.

A Krylov space or a series takes hundreds of products with one curvature. ``CurvatureProducts`` goes
through the network anew at each of them, forward, forward along v and backward; here the
activations and their derivatives are held, and a product is the two matrix products of each layer
that hold v (``fine_bench.gradients.batch_products``).

Shapes: n examples, K vectors, P parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from fine_bench.gradients.batch_products import BatchProduct, DenseProducts, Matrix, is_dense
from fine_bench.gradients.curvature.products import Batches, Curvature
from fine_bench.types import Loss

HELD_FLOATS = 2**26
"""Numbers of the activations that are held between two products: half a gigabyte in float64."""


def has_held_products(model: nn.Module, names: Sequence[str], kind: Curvature, x: Tensor) -> bool:
    """Whether ``HeldProducts`` serves a model on inputs like ``x (n, ...)``.

    Args:
        names: parameters, in the order of the vectors' coordinates.
        kind: which curvature.
    """
    own = [name for name, _ in model.named_parameters()]
    return kind in ("ggn", "hessian") and list(names) == own and is_dense(model, x)


class HeldProducts:
    """v ↦ C v, C the mean curvature over some examples at the model's present parameters.

    Args:
        model: fully connected, see ``batch_products.is_dense``; read once.
        loss: ``loss(logits, y, reduction="none") -> (batch,)``.
        kind: ``"ggn"`` or ``"hessian"``.
        batches: the examples.
        n: their number.

    Attributes:
        products: vectors multiplied so far.
    """

    def __init__(
        self, model: nn.Module, loss: Loss, kind: Curvature, batches: Batches, n: int
    ) -> None:
        matrix: Matrix = "hessian" if kind == "hessian" else "gauss_newton"
        self._of = DenseProducts(model, loss, matrix)
        self._params = [p.detach().clone() for p in model.parameters()]
        self._batches, self.n = batches, n
        self._held: list[tuple[BatchProduct, int]] | None = None
        # inputs, outputs, two derivatives and two errors of every layer
        floats = n * sum(p.shape[1] + 5 * p.shape[0] for p in self._params if p.ndim == 2)
        self._holds = floats <= HELD_FLOATS
        self.products = 0

    def __call__(self, vectors: Tensor) -> Tensor:
        """``(K, P)`` → ``(K, P)``."""
        k, shapes = len(vectors), [p.shape for p in self._params]
        parts = torch.split(vectors, [shape.numel() for shape in shapes], 1)
        given = [part.reshape(k, *shape) for part, shape in zip(parts, shapes, strict=True)]
        into = [vectors.new_zeros(k, *shape) for shape in shapes]
        for product, m in self._prepared():
            product(given, into, m / self.n)
        self.products += k
        return torch.cat([part.flatten(1) for part in into], 1)

    def _prepared(self) -> Iterator[tuple[BatchProduct, int]]:
        if self._held is not None:
            yield from self._held
            return
        held = []
        for _, x, y in self._batches():
            found = self._of.at(self._params, x, y), len(x)
            if self._holds:
                held.append(found)
            yield found
        if self._holds:
            self._held = held
