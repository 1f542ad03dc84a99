"""Per-example gradients of a model, block by block, and the contractions that the methods need.

A block is a layer; each kind of layer keeps what is cheapest for it (``blocks/``): factors, tokens
and output gradients for an embedding table, or the gradients in full where they are small. Dot
products, norms and sums are taken block by block; the (batch, parameters) matrix is not formed.

Shapes: B examples, P parameters, R rows of a direction.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fine_bench.gradients.blocks.direction import Direction
from fine_bench.gradients.blocks.protocol import Block
from fine_bench.gradients.blocks.single_examples import contracted, single_examples


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
        return _total(x.gram(y) for x, y in pairs)

    def grams(self, n_groups: int, rows: Tensor | None = None) -> Tensor:
        """Gram matrices of consecutive groups of m examples, ``(groups, m, m)``.

        Args:
            n_groups: into how many groups of one length the examples fall.
            rows: positions in each group, ``(groups, r)``; only their rows, ``(groups, r, m)``.
        """
        return _total(block.grams(n_groups, rows) for block in self.blocks)

    def own_and_rows(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """‖g_i‖² ``(B,)`` and ⟨g_c, g_i⟩ for the chosen positions, ``(r, B)``."""
        parts = [block.own_and_rows(chosen) for block in self.blocks]
        return _total(own for own, _ in parts), _total(rows for _, rows in parts)

    def contract(self, direction: Direction) -> Tensor:
        """Dot products with R directions, ``(R, B)``."""
        return _total(contracted(x, d) for x, d in zip(self.blocks, direction, strict=True))

    def weighted_sum(self, weights: Tensor) -> Direction:
        """The directions Σ_i w_ri g_i for weights ``(R, B)``."""
        return [block.weighted_sum(weights) for block in self.blocks]

    def each(self, weights: Tensor) -> Direction:
        """One direction an example, w_i g_i for weights ``(B,)``: not formed where that is dear."""
        return [single_examples(block, weights) for block in self.blocks]


def stack_examples(
    parts: Sequence[PerExampleGradients], *, for_gram: bool = False
) -> PerExampleGradients:
    """The gradients of all parts as those of one batch, in the order of the parts.

    Passes at the same parameters may differ in the number of positions T (sentences padded to
    different lengths): what is filled up adds nothing.

    Args:
        parts: at least one, of the same model and layers; ``(B_k, …)`` each.
        for_gram: whether nothing but the Gram matrix is taken of the result, which may then be
            kept in another form.

    Returns:
        ``(Σ B_k, …)``; the part itself if there is only one.

    Raises:
        TypeError: a layer's blocks are of different kinds: the parts are of different models.
    """
    if len(parts) == 1:
        return parts[0]
    return PerExampleGradients(
        stack_blocks(parts, for_gram=for_gram),
        _stack_known([part.loss for part in parts]),
        _stack_known([part.one_minus_p for part in parts]),
    )


def stack_blocks(parts: Sequence[PerExampleGradients], *, for_gram: bool = False) -> list[Block]:
    """The blocks of several batches, each layer's as those of one batch."""
    layers = zip(*(part.blocks for part in parts), strict=True)
    if for_gram:
        return [first.stacked_for_gram(others) for first, *others in layers]
    return [first.stacked(others) for first, *others in layers]


def _stack_known(values: Sequence[Tensor | None]) -> Tensor | None:
    known = [v for v in values if v is not None]
    return torch.cat(known) if len(known) == len(values) else None


def _total(terms: Iterable[Tensor]) -> Tensor:
    # one at a time, so that only one term is held beside the running sum
    result: Tensor | None = None
    for term in terms:
        result = term if result is None else result + term
    assert result is not None
    return result
