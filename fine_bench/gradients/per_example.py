"""Per-example gradients of a model, block by block, and the contractions that the methods need.

A block is a layer: its gradients are kept as factors (``factors.py``), as tokens and output
gradients for an embedding table (``tokens.py``), or in full where they are small. Dot products,
norms and sums are taken block by block; the (batch, parameters) matrix is not formed.

Shapes: B examples, P parameters, R rows of a direction.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fine_bench.gradients.blocks.direction import BlockDirection, Direction, add_directions
from fine_bench.gradients.blocks.embedding import TokenBlock
from fine_bench.gradients.blocks.linear import FactorBlock, group_rows

__all__ = [
    "Block",
    "BlockDirection",
    "DenseBlock",
    "Direction",
    "FactorBlock",
    "PerExampleGradients",
    "TokenBlock",
    "add_directions",
]


@dataclass(frozen=True, eq=False)
class DenseBlock:
    """Gradients formed in full, ``(B, P)``.

    For layers with few parameters (normalisation, grouped convolutions), and for whatever
    ``torch.func`` has to take.
    """

    name: str
    g: Tensor

    def __len__(self) -> int:
        return self.g.shape[0]

    @property
    def n_params(self) -> int:
        """Number of trained parameters."""
        return self.g.shape[1]

    @property
    def values(self) -> Tensor:
        """The tensor that is linear in the gradient: its scale, precision and device."""
        return self.g

    @property
    def n_floats(self) -> int:
        """Numbers in ``tensors``."""
        return self.g.numel()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What the block is made of, ``(B, …)`` each."""
        return (self.g,)

    def with_tensors(self, g: Tensor) -> DenseBlock:
        """Other gradients of the same parameters, from their ``tensors``."""
        return DenseBlock(self.name, g)

    def scaled(self, factor: Tensor) -> DenseBlock:
        """Every example's gradient times its factor, ``(B,)``."""
        return DenseBlock(self.name, self.g * factor[:, None])

    def rows(self, which: slice | Tensor) -> DenseBlock:
        """The gradients of some of the examples."""
        return DenseBlock(self.name, self.g[which])

    def double(self) -> DenseBlock:
        """The same in float64."""
        return DenseBlock(self.name, self.g.double())

    def dense(self) -> Tensor:
        """``(B, P)``."""
        return self.g

    def norm2(self) -> Tensor:
        """Squared norms, ``(B,)``."""
        return self.g.square().sum(1)

    def gram(self, other: DenseBlock) -> Tensor:
        """Dot products with another batch, ``(B, B')``."""
        return self.g @ other.g.T

    def grams(self, n_groups: int, rows: Tensor | None = None) -> Tensor:
        """Gram matrices of consecutive groups; see ``FactorBlock.grams``."""
        g = self.g.reshape(n_groups, -1, self.g.shape[1])
        return group_rows(g, rows) @ g.mT

    def own_and_rows(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """‖g_i‖² ``(B,)`` and ⟨g_c, g_i⟩ for the chosen positions, ``(r, B)``."""
        return self.norm2(), self.g[chosen] @ self.g.T

    def contract(self, direction: BlockDirection) -> Tensor:
        """Dot products with R directions, ``(R, B)``."""
        assert direction.weight is not None
        return direction.weight @ self.g.T

    def weighted_sum(self, weights: Tensor) -> BlockDirection:
        """Σ_i w_ri g_i for weights ``(R, B)``."""
        return BlockDirection(weights @ self.g, None)


Block = FactorBlock | TokenBlock | DenseBlock


@dataclass(frozen=True, eq=False)
class PerExampleGradients:
    """The gradients of B examples, block by block.

    Attributes:
        blocks: in the order of the model's layers.
        loss: the value whose gradient this is, for each example, ``(B,)``, where it is known.
        one_minus_p: 1 − p of the given label, ``(B,)``, without cancellation; None where the
            model's output is not a batch of class logits.
    """

    blocks: Sequence[Block]
    loss: Tensor | None = None
    one_minus_p: Tensor | None = None

    def __len__(self) -> int:
        return len(self.blocks[0])

    @property
    def n_params(self) -> int:
        """Number of trained parameters that the blocks cover."""
        return sum(block.n_params for block in self.blocks)

    def scaled(self, factor: Tensor) -> PerExampleGradients:
        """Every example's gradient times its factor, ``(B,)``."""
        blocks = [block.scaled(factor) for block in self.blocks]
        return PerExampleGradients(blocks, self.loss, self.one_minus_p)

    def rows(self, which: slice | Tensor) -> PerExampleGradients:
        """The gradients of some of the examples."""
        return PerExampleGradients(
            [block.rows(which) for block in self.blocks],
            None if self.loss is None else self.loss[which],
            None if self.one_minus_p is None else self.one_minus_p[which],
        )

    def double(self) -> PerExampleGradients:
        """The same in float64, so that dot products are taken in it."""
        return PerExampleGradients(
            [block.double() for block in self.blocks],
            None if self.loss is None else self.loss.double(),
            None if self.one_minus_p is None else self.one_minus_p.double(),
        )

    def dense(self) -> Tensor:
        """``(B, P)``, blocks side by side. For small models and for tests."""
        return torch.cat([block.dense() for block in self.blocks], 1)

    def norm2(self) -> Tensor:
        """Squared norms, ``(B,)``."""
        return _total(block.norm2() for block in self.blocks)

    def gram(self, other: PerExampleGradients | None = None) -> Tensor:
        """Dot products ⟨g_i, g'_j⟩, ``(B, B')``; with itself by default."""
        pairs = zip(self.blocks, (other or self).blocks, strict=True)
        return _total(_block_gram(x, y) for x, y in pairs)

    def grams(self, n_groups: int, rows: Tensor | None = None) -> Tensor:
        """Gram matrices of consecutive groups of m examples, ``(groups, m, m)``.

        Args:
            n_groups: into how many groups of one length the examples fall.
            rows: positions in each group, ``(groups, r)``; only their rows, ``(groups, r, m)``.
        """
        return _total(_block_grams(block, n_groups, rows) for block in self.blocks)

    def own_and_rows(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """‖g_i‖² ``(B,)`` and ⟨g_c, g_i⟩ for the chosen positions, ``(r, B)``."""
        parts = [block.own_and_rows(chosen) for block in self.blocks]
        return _total(own for own, _ in parts), _total(rows for _, rows in parts)

    def contract(self, direction: Direction) -> Tensor:
        """Dot products with R directions, ``(R, B)``."""
        return _total(x.contract(d) for x, d in zip(self.blocks, direction, strict=True))

    def weighted_sum(self, weights: Tensor) -> Direction:
        """The directions Σ_i w_ri g_i for weights ``(R, B)``."""
        return [block.weighted_sum(weights) for block in self.blocks]


def _block_gram(x: Block, y: Block) -> Tensor:
    if isinstance(x, FactorBlock) and isinstance(y, FactorBlock):
        return x.gram(y)
    if isinstance(x, TokenBlock) and isinstance(y, TokenBlock):
        return x.gram(y)
    if isinstance(x, DenseBlock) and isinstance(y, DenseBlock):
        return x.gram(y)
    raise TypeError(f"blocks {x.name!r} and {y.name!r} are of different kinds: different models?")


def _block_grams(block: Block, n_groups: int, rows: Tensor | None) -> Tensor:
    if isinstance(block, DenseBlock) or (isinstance(block, FactorBlock) and block.sizes[1] == 1):
        return block.grams(n_groups, rows)
    m = len(block) // n_groups
    groups = [block.rows(slice(k * m, (k + 1) * m)) for k in range(n_groups)]
    return torch.stack(
        [
            _block_gram(group if rows is None else group.rows(rows[k]), group)
            for k, group in enumerate(groups)
        ]
    )


def _total(terms: Iterable[Tensor]) -> Tensor:
    # one at a time, so that only one term is held beside the running sum
    result: Tensor | None = None
    for term in terms:
        result = term if result is None else result + term
    assert result is not None
    return result
