"""Per-example gradients of an embedding table, without (batch, vocabulary · width).

Row v of the table W (V, D) is the output wherever the token is v, so with δ_it (D,) the gradient
at position t of example i

    ∂ℓ_i/∂W = Σ_t onehot(v_it) δ_itᵀ,        ⟨g_i, g'_j⟩ = Σ_st [v_is = v'_jt] ⟨δ_is, δ'_jt⟩.

Kept are the tokens (B, T) and δ (B, T, D). In multiplications:

    gram          the cheaper of B B' T T' D (all pairs of positions) and, over the K ≤ V distinct
                  tokens of both batches, B B' K D
    norm2         B T D, once repeated tokens of an example are added up
    contract (R)  R B T D

Shape decides (with K taken as its bound min(V, B T)), so results do not depend on the data.
Positions that hold the padding token carry δ = 0.

Shapes: B examples, T positions, V tokens in the vocabulary, D width, R rows of a direction.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fine_bench.gradients.directions import BlockDirection
from fine_bench.gradients.factors import HELD_FLOATS


@dataclass(frozen=True, eq=False)
class TokenBlock:
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

    def __len__(self) -> int:
        return self.b.shape[0]

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
    def g(self) -> Tensor:
        """The gradients in full, as a ``DenseBlock`` has them. Large: for small tables."""
        return self.dense()

    def scaled(self, factor: Tensor) -> TokenBlock:
        """Every example's gradient times its factor, ``(B,)``."""
        return TokenBlock(self.name, self.tokens, self.b * factor[:, None, None], self.n_tokens)

    def rows(self, which: slice | Tensor) -> TokenBlock:
        """The gradients of some of the examples."""
        return TokenBlock(self.name, self.tokens[which], self.b[which], self.n_tokens)

    def double(self) -> TokenBlock:
        """The same in float64."""
        return TokenBlock(self.name, self.tokens, self.b.double(), self.n_tokens)

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

    def gram(self, other: TokenBlock) -> Tensor:
        """Dot products with another batch of the same table, ``(B, B')``."""
        n, t, _ = self.b.shape
        m, s, _ = other.b.shape
        if t * s <= min(self.n_tokens, n * t, m * s):
            return self._gram_of_pairs(other)
        return self._gram_of_tokens(other)

    def _gram_of_pairs(self, other: TokenBlock) -> Tensor:
        """All pairs of positions, some examples at a time."""
        m, s, _ = other.b.shape
        t = self.b.shape[1]
        step = max(1, HELD_FLOATS // (t * m * s))
        right, theirs = other.b.flatten(0, 1).T, other.tokens.flatten()
        parts = []
        for b, tokens in zip(
            torch.split(self.b, step), torch.split(self.tokens, step), strict=True
        ):
            products = b.flatten(0, 1) @ right
            products.mul_(tokens.flatten()[:, None] == theirs)
            parts.append(products.view(len(b), t, m, s).sum((1, 3)))
        return torch.cat(parts)

    def _gram_of_tokens(self, other: TokenBlock) -> Tensor:
        """Rows of the table that occur, as matrices ``(B, K · D)``, some tokens at a time."""
        total = self.b.new_zeros(len(self), len(other))
        present = torch.unique(self.tokens)
        mine = self.summed()
        theirs = mine if other is self else other.summed()
        step = max(1, HELD_FLOATS // (max(len(self), len(other)) * self.width))
        for chunk in torch.split(present, step):
            left = _matrix(mine, chunk, len(self))
            right = left if other is self else _matrix(theirs, chunk, len(other))
            total.addmm_(left, right.T)
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

    def by_token(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(token, examples ``(k,)``, rows ``(k, D)``) for every token that occurs, ascending."""
        examples, tokens, rows = self.summed()
        present, counts = torch.unique_consecutive(tokens, return_counts=True)
        sizes = counts.tolist()
        yield from zip(
            present.tolist(), torch.split(examples, sizes), torch.split(rows, sizes), strict=True
        )


def _matrix(summed: tuple[Tensor, Tensor, Tensor], chunk: Tensor, n: int) -> Tensor:
    """Rows of the tokens in ``chunk`` (ascending) side by side, ``(n, len(chunk) · D)``."""
    examples, tokens, rows = summed
    start = int(torch.searchsorted(tokens, chunk[0]))
    stop = int(torch.searchsorted(tokens, chunk[-1], right=True))
    examples, tokens, rows = examples[start:stop], tokens[start:stop], rows[start:stop]
    place = torch.searchsorted(chunk, tokens).clamp_max_(len(chunk) - 1)
    inside = chunk[place] == tokens
    result = rows.new_zeros(n, len(chunk), rows.shape[1])
    result[examples[inside], place[inside]] = rows[inside]
    return result.flatten(1)
