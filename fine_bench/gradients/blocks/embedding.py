"""Per-example gradients of an embedding table, without (batch, vocabulary · width).

Row v of the table W (V, D) is the output wherever the token is v, so with δ_it (D,) the gradient
at position t of example i

    ∂ℓ_i/∂W = Σ_t onehot(v_it) δ_itᵀ,        ⟨g_i, g'_j⟩ = Σ_st [v_is = v'_jt] ⟨δ_is, δ'_jt⟩.

Kept are the tokens (B, T) and δ (B, T, D). In multiplications:

    gram          Σ_v n_v n'_v D, if token v occurs in n_v examples of one batch, n'_v of the other
    norm2         B T D, once repeated tokens of an example are added up
    contract (R)  R B T D

Positions that hold the padding token carry δ = 0.

Shapes: B examples, T positions, V tokens in the vocabulary, D width, R rows of a direction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fine_bench.gradients.blocks.direction import BlockDirection, matrix_weights
from fine_bench.gradients.blocks.protocol import (
    HELD_FLOATS,
    Block,
    Columns,
    combined,
    positions_side_by_side,
)


@dataclass(frozen=True, eq=False)
class TokenBlock(Block):
    """Gradients of one embedding table for B examples.

    Attributes:
        name: name of the layer in its model.
        tokens: ``(B, T)`` integers, 0 ≤ token < ``n_tokens``.
        b: gradients of each example's own loss at the output, ``(B, T, D)``.
        n_tokens: V.
    """

    name: str
    tokens: Tensor
    b: Tensor
    n_tokens: int

    kind: ClassVar[str] = "tokens"

    @property
    def width(self) -> int:
        """D."""
        return self.b.shape[2]

    @property
    def n_params(self) -> int:
        """Number of trained parameters."""
        return self.n_tokens * self.width

    @property
    def values(self) -> Tensor:
        """The tensor that is linear in the gradient: its scale, precision and device."""
        return self.b

    @property
    def n_positions(self) -> int:
        """T."""
        return self.b.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What the block is made of, ``(B, …)`` each."""
        return self.tokens, self.b

    def with_tensors(self, *tensors: Tensor) -> TokenBlock:
        """Other gradients of the same table, from their ``tensors``."""
        tokens, b = tensors
        return TokenBlock(self.name, tokens, b, self.n_tokens)

    def scaled(self, factor: Tensor) -> TokenBlock:
        """Every example's gradient times its factor, ``(B,)``."""
        return TokenBlock(self.name, self.tokens, self.b * factor[:, None, None], self.n_tokens)

    @staticmethod
    def _side_by_side(tensors: Sequence[Tensor]) -> Tensor:
        return positions_side_by_side(tensors)

    def summed(self) -> tuple[Tensor, Tensor, Tensor]:
        """The rows of all gradients that are not zero.

        Returns:
            examples ``(U,)``, tokens ``(U,)`` and rows ``(U, D)``, one for each token that occurs
            in an example; by ascending token, then example.
        """
        n = len(self)
        examples = torch.arange(n, device=self.b.device)[:, None].expand_as(self.tokens)
        keys, where = torch.unique(self.tokens * n + examples, return_inverse=True)
        rows = self.b.new_zeros(len(keys), self.width)
        rows.index_add_(0, where.flatten(), self.b.flatten(0, 1))
        return keys % n, torch.div(keys, n, rounding_mode="floor"), rows

    def dense(self) -> Tensor:
        """``(B, P)``: the table row by row."""
        n = len(self)
        result = self.b.new_zeros(n * self.n_tokens, self.width)
        first = self.n_tokens * torch.arange(n, device=self.b.device)[:, None]
        result.index_add_(0, (first + self.tokens).flatten(), self.b.flatten(0, 1))
        return result.view(n, self.n_params)

    def norm2(self) -> Tensor:
        """Squared norms, ``(B,)``."""
        examples, _, rows = self.summed()
        return rows.new_zeros(len(self)).index_add_(0, examples, rows.square().sum(1))

    def gram(self, other: Block) -> Tensor:
        """Dot products with another batch of the same table, ``(B, B')``.

        Only examples that share a token contribute. Tokens are handled together that occur in
        about as many examples, so that a rare one costs little beside a frequent one.
        """
        n, m, other = len(self), len(other), self.same(other)
        total = self.b.new_zeros(n, m)
        mine = _by_token(self.summed())
        theirs = mine if other is self else _by_token(other.summed())
        mine, theirs = _shared(mine, theirs)
        if not len(mine.tokens):
            return total
        # tokens whose counts agree up to a factor of two, in both batches
        kinds = _magnitude(mine.counts) * 64 + _magnitude(theirs.counts)
        for kind in torch.unique(kinds):
            which = kinds == kind
            left_examples, left = mine.padded(which)
            right_examples, right = theirs.padded(which)
            widest = left.shape[1] * right.shape[1]
            step = max(1, HELD_FLOATS // (left[0].numel() + right[0].numel() + widest))
            for k in range(0, len(left), step):
                some = slice(k, k + step)
                where = left_examples[some, :, None] * m + right_examples[some, None, :]
                products = torch.bmm(left[some], right[some].mT)
                total.view(-1).index_add_(0, where.flatten(), products.flatten())
        return total

    def contract(self, direction: BlockDirection) -> Tensor:
        """Dot products with R directions, ``(R, B)``."""
        assert direction.weight is not None
        rows = [(w[self.tokens] * self.b).sum((1, 2)) for w in direction.weight]
        return torch.stack(rows)

    def weighted_sum(self, weights: Tensor) -> BlockDirection:
        """Σ_i w_ri g_i for weights ``(R, B)``."""
        result = self.b.new_zeros(len(weights), self.n_tokens, self.width)
        tokens = self.tokens.flatten()
        for row, w in zip(result, weights, strict=True):
            row.index_add_(0, tokens, (self.b * w[:, None, None]).flatten(0, 1))
        return BlockDirection(result, None)

    # ------------------------------------------------------------------ products ⟨g, d ∘ g'⟩

    def diagonal_weights(self, parameters: Sequence[Tensor]) -> BlockDirection:
        """Weights d as a direction, ``(1, V, D)``."""
        return matrix_weights(parameters, True, False)

    def diagonal_gram(self, other: Block, d: BlockDirection) -> Tensor:
        """⟨g_i, d ∘ g'_j⟩, ``(B, B')``: the weights of a token's row go with its gradient."""
        theirs = self.same(other)
        assert d.weight is not None
        return self.with_tensors(self.tokens, self.b * d.weight[0][self.tokens]).gram(theirs)

    def diagonal_norm2(self, d: BlockDirection) -> Tensor:
        """⟨g_i, d ∘ g_i⟩, ``(B,)``."""
        assert d.weight is not None
        examples, tokens, rows = self.summed()
        squares = (rows.square() * d.weight[0][tokens]).sum(1)
        return squares.new_zeros(len(self)).index_add_(0, examples, squares)

    # ------------------------------------------------------------------ for random projections

    def columns(self) -> Iterator[Columns]:
        """The rows of the table that occur, each with the examples in which it does."""
        for token, examples, gradients in self.by_token():
            yield Columns(token * self.width, examples, gradients)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """V and D."""
        return self.n_tokens, self.width

    def projected_factors(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens' ``rows``, and δ times ``columns``."""
        return rows[self.tokens], self.b @ columns[:-1]

    def in_order(self, matrix: Tensor) -> Tensor:
        """Row by row; there is no bias."""
        return matrix[:, :-1].flatten(0, 1)

    @property
    def sides(self) -> tuple[int, int]:
        """V and D: an input is one-hot."""
        return self.n_tokens, self.width

    def sketched(self, p: Tensor | None, q: Tensor | None) -> Tensor:
        """Σ_t (Qᵀδ_t)(Pᵀonehot(v_t))ᵀ, ``(B, …)``."""
        b = self.b if q is None else combined(self.b, q)
        if p is None:
            inputs = F.one_hot(self.tokens, self.n_tokens).to(self.values)
        else:
            inputs = p.T[self.tokens]
        return torch.bmm(b.mT, inputs).flatten(1)

    def by_token(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(token, examples ``(k,)``, rows ``(k, D)``) for every token that occurs, ascending."""
        examples, tokens, rows = self.summed()
        present, counts = torch.unique_consecutive(tokens, return_counts=True)
        sizes = counts.tolist()
        yield from zip(
            present.tolist(), torch.split(examples, sizes), torch.split(rows, sizes), strict=True
        )


@dataclass(frozen=True, eq=False)
class _TokenRows:
    """Rows ``(U, D)`` and their examples ``(U,)``, sorted by token; where each token's rows are."""

    examples: Tensor
    rows: Tensor
    tokens: Tensor
    starts: Tensor
    counts: Tensor

    def of(self, which: Tensor) -> _TokenRows:
        """Some of the tokens, by a mask."""
        return _TokenRows(
            self.examples, self.rows, self.tokens[which], self.starts[which], self.counts[which]
        )

    def padded(self, which: Tensor) -> tuple[Tensor, Tensor]:
        """Examples ``(K, c)`` and rows ``(K, c, D)`` of some tokens, filled up with zero rows."""
        starts, counts = self.starts[which], self.counts[which]
        place = torch.arange(int(counts.max()), device=starts.device)
        filled = place < counts[:, None]
        where = torch.where(filled, starts[:, None] + place, 0)
        return self.examples[where], torch.where(filled[:, :, None], self.rows[where], 0.0)


def _by_token(summed: tuple[Tensor, Tensor, Tensor]) -> _TokenRows:
    examples, tokens, rows = summed
    present, counts = torch.unique_consecutive(tokens, return_counts=True)
    return _TokenRows(examples, rows, present, counts.cumsum(0) - counts, counts)


def _shared(x: _TokenRows, y: _TokenRows) -> tuple[_TokenRows, _TokenRows]:
    """The tokens that occur in both."""
    if x is y:
        return x, y
    return x.of(torch.isin(x.tokens, y.tokens)), y.of(torch.isin(y.tokens, x.tokens))


def _magnitude(counts: Tensor) -> Tensor:
    """⌈log₂ count⌉."""
    return torch.log2(counts.double()).ceil().long()
