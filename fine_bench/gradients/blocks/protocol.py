"""What is asked of the gradients of one layer, whatever its kind.

A block holds the gradients of B examples in one layer's parameters. A kind of layer is one class:
it says what it keeps (``tensors``), how others of the same kind are made of that
(``with_tensors``) and what the gradients are in full (``dense``). Everything else follows from
these, and a class overrides what its structure makes cheaper. What differs by kind and belongs to
a method is registered for the class: the curvature in ``curvature/block.py``, what a recorded
module turns into in ``layers.py``.

Shapes: B examples, T positions, P parameters, R rows of a direction, k a small width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fine_bench.gradients.blocks.direction import BlockDirection, flat_weights

HELD_FLOATS = 2**20
"""Numbers of an intermediate result that are held at a time: about what stays in a CPU's cache."""

COLUMNS = 1024
"""Columns of the gradients that ``Block.columns`` gives at a time, about."""


class Columns(NamedTuple):
    """Some consecutive parameters' gradients, of all examples or of those that are not zero.

    Attributes:
        start: position of the first of these parameters in the order of ``Block.dense``.
        examples: whose gradients they are, ``(k,)``; None for all.
        values: ``(B, columns)`` or ``(k, columns)``.
    """

    start: int
    examples: Tensor | None
    values: Tensor


class OuterProducts(NamedTuple):
    """Gradients of a weight that are one outer product b aᵀ for each example.

    Attributes:
        a: ``(B, I)``.
        b: ``(B, O)``; also the bias's gradient.
        bias: whether a bias follows the weight.
    """

    a: Tensor
    b: Tensor
    bias: bool


class Block(ABC):
    """Gradients of B examples in one layer's parameters.

    Attributes:
        name: name of the layer in its model.
        kind: blocks of one kind can be compared and put side by side.
        in_full: the gradients themselves are what is kept.
        of_its_step: they follow from ``tensors`` at the parameters of their own step alone.
    """

    name: str
    kind: ClassVar[str]
    in_full: ClassVar[bool] = False
    of_its_step: ClassVar[bool] = False

    # ------------------------------------------------------------------ what it is made of

    def __len__(self) -> int:
        return self.values.shape[0]

    @property
    @abstractmethod
    def n_params(self) -> int:
        """Number of trained parameters, P."""

    @property
    @abstractmethod
    def values(self) -> Tensor:
        """The tensor that is linear in the gradient: its scale, precision and device."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """What the block is made of, ``(B, …)`` each."""

    @abstractmethod
    def with_tensors(self, *tensors: Tensor) -> Block:
        """Other gradients of the same parameters, from their ``tensors``."""

    @abstractmethod
    def scaled(self, factor: Tensor) -> Block:
        """Every example's gradient times its factor, ``(B,)``."""

    def by_parameter(self, factors: Sequence[float], sizes: Sequence[int]) -> Block | None:
        """Each parameter's part of every gradient times its factor, ≥ 0; of the same kind.

        Args:
            factors: one for each of the layer's trained parameters, in their order.
            sizes: their numbers of elements.

        Returns:
            None where what is kept does not tell the parameters apart.
        """
        return None

    @abstractmethod
    def dense(self) -> Tensor:
        """The gradients in full, ``(B, P)``."""

    @property
    def n_floats(self) -> int:
        """Numbers in ``tensors``."""
        return sum(part.numel() for part in self.tensors)

    @property
    def n_positions(self) -> int:
        """T, the positions whose terms a gradient is the sum of."""
        return 1

    def rows(self, which: slice | Tensor) -> Block:
        """The gradients of some of the examples."""
        return self.with_tensors(*(part[which] for part in self.tensors))

    def double(self) -> Block:
        """The same in float64."""
        return self.with_tensors(
            *(part.double() if part.is_floating_point() else part for part in self.tensors)
        )

    def same(self, other: Block) -> Self:
        """The other block, which must be of the same kind.

        Raises:
            TypeError: it is not, so the two are of different models.
        """
        if other.kind != self.kind:
            raise TypeError(
                f"blocks {self.name!r} and {other.name!r} are of different kinds: different models?"
            )
        return cast(Self, other)

    def stacked(self, others: Sequence[Block]) -> Block:
        """These examples and then those of other blocks of the same layer, as one batch.

        Raises:
            TypeError: a block is of another kind: they are of different models.
        """
        blocks = [self, *others]
        if any(block.kind != self.kind for block in blocks):
            kinds = sorted({type(block).__name__ for block in blocks})
            raise TypeError(f"blocks of layer {self.name!r} are of different kinds, {kinds}")
        parts = zip(*(block.tensors for block in blocks), strict=True)
        return self.with_tensors(*(self._side_by_side(part) for part in parts))

    def stacked_for_gram(self, others: Sequence[Block]) -> Block:
        """As ``stacked``, where nothing but the Gram matrix is taken of the result."""
        return self.stacked(others)

    @staticmethod
    def _side_by_side(tensors: Sequence[Tensor]) -> Tensor:
        """``(B_k, …)`` → ``(Σ B_k, …)``."""
        return torch.cat(list(tensors))

    def compact(self) -> Block:
        """The gradients in full where these are fewer numbers, else the block itself."""
        return self

    def positions_summed(self) -> Block:
        """In full where a gradient is a sum over positions of a matrix's terms, else itself."""
        return self

    # ------------------------------------------------------------------ products

    def norm2(self) -> Tensor:
        """Squared norms, ``(B,)``."""
        return self.dense().square().sum(1)

    def gram(self, other: Block) -> Tensor:
        """Dot products with another batch of the same layer, ``(B, B')``.

        Raises:
            TypeError: a block of another kind.
        """
        theirs = self.same(other)
        return self.dense() @ theirs.dense().T

    def grams(self, n_groups: int, rows: Tensor | None = None) -> Tensor:
        """Gram matrices of consecutive groups of m examples, ``(groups, m, m)``.

        Args:
            n_groups: into how many groups of one length the examples fall.
            rows: positions in each group, ``(groups, r)``; only their rows, ``(groups, r, m)``.
        """
        m = len(self) // n_groups
        groups = [self.rows(slice(k * m, (k + 1) * m)) for k in range(n_groups)]
        return torch.stack(
            [
                (group if rows is None else group.rows(rows[k])).gram(group)
                for k, group in enumerate(groups)
            ]
        )

    def own_and_rows(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """‖g_i‖² ``(B,)`` and ⟨g_c, g_i⟩ for the chosen positions, ``(r, B)``."""
        return self.norm2(), self.rows(chosen).gram(self)

    def contract(self, direction: BlockDirection) -> Tensor:
        """Dot products with R directions, ``(R, B)``."""
        assert direction.weight is not None
        return direction.weight @ self.dense().T

    def weighted_sum(self, weights: Tensor) -> BlockDirection:
        """Σ_i w_ri g_i for weights ``(R, B)``."""
        return BlockDirection(weights @ self.dense(), None)

    # ------------------------------------------------------------------ products ⟨g, d ∘ g'⟩

    def diagonal_weights(self, parameters: Sequence[Tensor]) -> BlockDirection:
        """Weights d as a direction, from one tensor for each of the layer's parameters.

        Args:
            parameters: in the shapes and the order of the layer's trained parameters.
        """
        return flat_weights(parameters)

    def diagonal_gram(self, other: Block, d: BlockDirection) -> Tensor:
        """⟨g_i, d ∘ g'_j⟩, ``(B, B')``.

        Raises:
            TypeError: a block of another kind.
        """
        theirs = self.same(other)
        assert d.weight is not None
        return (self.dense() * d.weight) @ theirs.dense().T

    def diagonal_norm2(self, d: BlockDirection) -> Tensor:
        """⟨g_i, d ∘ g_i⟩, ``(B,)``."""
        assert d.weight is not None
        return self.dense().square() @ d.weight[0]

    # ------------------------------------------------------------------ for random projections

    def columns(self) -> Iterator[Columns]:
        """The columns of ``dense`` in their order, some at a time, without those of zeros."""
        start = 0
        for values in torch.split(self.dense(), COLUMNS, dim=1):
            yield Columns(start, None, values)
            start += values.shape[1]

    def outer_products(self) -> OuterProducts | None:
        """The factors where each gradient is one outer product (and a bias), else None."""
        return None

    @property
    def matrix_shape(self) -> tuple[int, int] | None:
        """Rows and columns of the weight, where its gradient is known by factors of both sides."""
        return None

    def projected_factors(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of the gradient times a random matrix on either side of it.

        Args:
            rows: ``(matrix_shape[0], k_b)``.
            columns: ``(matrix_shape[1] + 1, k_a)``; the last row belongs to a bias.

        Returns:
            ``(B, T, k_b)`` and ``(B, T, k_a)``.
        """
        raise NotImplementedError(f"gradients of {self.name!r} have no factors")

    def in_order(self, matrix: Tensor) -> Tensor:
        """``(matrix_shape[0], matrix_shape[1] + 1, …)`` in the order of ``dense``, ``(P, …)``."""
        raise NotImplementedError(f"gradients of {self.name!r} have no factors")

    @property
    def sides(self) -> tuple[int, int] | None:
        """Widths of a position's input and of its output, None where there are no such factors."""
        return None

    def sketched(self, p: Tensor | None, q: Tensor | None) -> Tensor:
        """QᵀGP of every gradient G, ``(B, …)``; see ``projection/sketch.py``.

        Args:
            p: Pᵀ ``(k, sides[0])``, or None to leave the inputs as they are.
            q: Qᵀ ``(k, sides[1])``, alike for the outputs.
        """
        return self.dense()


def positions_side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    """``(B_k, T_k, …)`` → ``(Σ B_k, max T_k, …)``, filled up with zeros.

    Positions that are filled up carry a zero gradient at the output, so they add nothing to any
    sum over them.
    """
    longest = max(t.shape[1] for t in tensors)
    return torch.cat([_filled(t, longest) for t in tensors])


def multiplied_alike(tensors: Sequence[Tensor], n_result: int) -> bool:
    """Whether an example's matrix product has the same bits in any batch.

    On a CPU it has where memory is laid out alike: a library's kernels may take the ends of rows
    apart that do not begin at a cache line. On other devices the batch may choose the kernel.

    Args:
        tensors: the factors, ``(B, …)``.
        n_result: numbers in one product.
    """
    line = 64
    return all(
        x.device.type == "cpu"
        and x.is_contiguous()
        and x.data_ptr() % line == 0
        and x.stride(0) * x.itemsize % line == 0
        and n_result * x.itemsize % line == 0
        for x in tensors
    )


def _filled(x: Tensor, length: int) -> Tensor:
    missing = length - x.shape[1]
    return F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing)) if missing else x


def combined(x: Tensor, matrix: Tensor) -> Tensor:
    """``x`` ``(B, T, K)`` times a matrix ``(k, K)`` transposed, ``(B, T, k)``."""
    if not x.is_contiguous() and x.mT.is_contiguous():  # as convolutions have it: without a copy
        return torch.bmm(matrix.expand(len(x), -1, -1), x.mT).mT
    return F.linear(x, matrix)


def group_rows(x: Tensor, rows: Tensor | None) -> Tensor:
    """Rows ``(G, r)`` of each group of ``(G, m, K)``; all if None."""
    if rows is None:
        return x
    groups, m, width = x.shape
    first = m * torch.arange(groups, device=x.device)[:, None]
    # whole rows are copied, where ``gather`` would look up every number
    found = x.reshape(groups * m, width).index_select(0, (first + rows).flatten())
    return found.view(groups, -1, width)
