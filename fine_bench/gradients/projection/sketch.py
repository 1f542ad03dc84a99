"""Per-example gradients from a few random combinations of each layer's inputs and outputs.

A layer's gradient G = Σ_t b_t a_tᵀ, (O, I), is replaced by QᵀGP = Σ_t (Qᵀb_t)(Pᵀa_t)ᵀ, (k, k), with
random matrices P (I, k) and Q (O, k) of independent ±1/√k. As E[PPᵀ] = E[QQᵀ] = I, independently,

    E⟨QᵀGP, QᵀG'P⟩ = ⟨G, G'⟩:

products of gradients, squared norms among them, come out right on average over the draw. The bias's
gradient Σ_t b_t becomes Qᵀ Σ_t b_t. In an embedding table a token's input is its row of P. A side
narrower than 2k stays as it is. Exact, too, are normalisation layers, whose gradients are small,
and linear layers that are applied at one position of each example: products of B of those follow
from B² (I + O) multiplications.

*Error.* For G = b aᵀ the relative standard deviation of ‖QᵀGP‖² is at most sqrt((1 + 2/k)² − 1),
about 2/√k. Layers and draws are independent, so it averages out over both: P and Q are drawn anew
every ``REDRAW`` steps, and an example that is seen once an epoch meets another draw each time. The
spread of products over examples includes the error's own spread, so σ comes out larger, and |μ|
smaller, than from exact products.

*Cost.* k (I + O + k) multiplications a position, where training takes 3 I O and forming G another
I O. Exact products need every ‖g_i‖², and so every G or all products of an example's positions.
Nothing of a layer but its (B, k²) sketch has to be kept until the backward pass is through.

The structure is that of the LoGra projection (Choe et al. 2024, arXiv:2405.13954), which
``projections.Factorized`` has for methods that need the same coordinates at all times.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fine_bench.gradients.blocks.convolution import FieldBlock
from fine_bench.gradients.per_example import Block, DenseBlock, FactorBlock, TokenBlock
from fine_bench.seeds import random_signs, stream

REDRAW = 8
"""Steps that share a draw: drawing for every one would cost a small network much of what it saves.
"""


class Sketch:
    """Sketches of the gradients of one run.

    Args:
        size: k, ≥ 1.
        seed: of the draws, ≥ 0.
    """

    def __init__(self, size: int, seed: int) -> None:
        if size < 1:
            raise ValueError(f"the size of a sketch must be at least 1, got {size}")
        self.size = size
        self.seed = seed
        self._draw = 0
        self._drawn: dict[str, tuple[Tensor | None, Tensor | None]] = {}

    def at_step(self, step: int) -> None:
        """Use the draw of a step: it depends on its number alone, so a resumed run draws alike."""
        if step // REDRAW != self._draw:
            self._draw, self._drawn = step // REDRAW, {}

    def __call__(self, block: Block) -> Block:
        """The sketch of a layer's gradients, or the block itself where it stays exact."""
        if isinstance(block, DenseBlock) or block.b.shape[1] == 1:
            return block
        return self.dense(block)

    def sum(self, blocks: Sequence[Block]) -> DenseBlock:
        """The sketch of a sum of gradients of one layer."""
        parts = [self.dense(block).g for block in blocks]
        return DenseBlock(blocks[0].name, torch.stack(parts).sum(0))

    def dense(self, block: Block) -> DenseBlock:
        """The sketch of a layer's gradients, ``(B, k · k)`` and k more for a bias."""
        if isinstance(block, DenseBlock):
            return block
        p, q = self.matrices(block)
        b = block.b if q is None else _combined(block.b, q)
        parts = []
        if isinstance(block, TokenBlock):
            parts.append(torch.bmm(b.mT, _inputs_of_tokens(block, p)).flatten(1))
        elif block.weight:
            parts += self._weight(block, p, b)
        if isinstance(block, FactorBlock) and block.bias:
            parts.append(b.sum(1))
        return DenseBlock(block.name, parts[0] if len(parts) == 1 else torch.cat(parts, 1))

    def matrices(self, block: FactorBlock | TokenBlock) -> tuple[Tensor | None, Tensor | None]:
        """Pᵀ ``(k, I)`` and Qᵀ ``(k, O)`` of a layer; None for a side that stays as it is.

        They depend on seed, draw, the layer's name and its sizes alone. An embedding's I is its
        number of tokens.
        """
        if block.name not in self._drawn:
            generator = stream(self.seed, f"fine/sketch/{self._draw}/{block.name}")
            if isinstance(block, TokenBlock):
                sizes = block.n_tokens, block.width
            else:
                sizes = block.sizes[2], block.sizes[3]
            p, q = (self._matrix(size, generator, block.values) for size in sizes)
            self._drawn[block.name] = p, q
        return self._drawn[block.name]

    def _matrix(self, width: int, generator: torch.Generator, like: Tensor) -> Tensor | None:
        if width < 2 * self.size:
            return None
        return random_signs(self.size, width, generator).mul_(self.size**-0.5).to(like)

    @staticmethod
    def _weight(block: FactorBlock, p: Tensor | None, b: Tensor) -> list[Tensor]:
        """The weight's part from its sketched outputs ``(B, T, ·)``, ``(B, …)`` each."""
        if not isinstance(block, FieldBlock):
            a = block.a if p is None else _combined(block.a, p)
        elif p is not None:
            a = block.fields.combined(p)
        else:
            # few inputs: the receptive fields as windows, without writing all of them out
            fields = FieldBlock(block.name, block.fields, b, True, False)
            return list(fields.formed([slice(None)]))
        return [torch.bmm(b.mT, a).flatten(1)]


def _inputs_of_tokens(block: TokenBlock, p: Tensor | None) -> Tensor:
    """Every position's column of Pᵀ, ``(B, T, k)``."""
    if p is None:
        return F.one_hot(block.tokens, block.n_tokens).to(block.values)
    return p.T[block.tokens]


def _combined(x: Tensor, matrix: Tensor) -> Tensor:
    """``x`` ``(B, T, K)`` times a matrix ``(k, K)`` transposed, ``(B, T, k)``."""
    if not x.is_contiguous() and x.mT.is_contiguous():  # as convolutions have it: without a copy
        return torch.bmm(matrix.expand(len(x), -1, -1), x.mT).mT
    return F.linear(x, matrix)
