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
``projection.random.Factorized`` has for methods that need the same coordinates at all times.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fine_bench.gradients.blocks.dense import DenseBlock
from fine_bench.gradients.blocks.protocol import Block
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
        return block if block.n_positions == 1 else self.dense(block)

    def sum(self, blocks: Sequence[Block]) -> DenseBlock:
        """The sketch of a sum of gradients of one layer."""
        parts = [self.dense(block).g for block in blocks]
        return DenseBlock(blocks[0].name, torch.stack(parts).sum(0))

    def dense(self, block: Block) -> DenseBlock:
        """The sketch of a layer's gradients, ``(B, k · k)`` and k more for a bias."""
        return DenseBlock(block.name, block.sketched(*self.matrices(block)))

    def matrices(self, block: Block) -> tuple[Tensor | None, Tensor | None]:
        """Pᵀ ``(k, I)`` and Qᵀ ``(k, O)`` of a layer; None for a side that stays as it is.

        They depend on seed, draw, the layer's name and its sizes alone. An embedding's I is its
        number of tokens.
        """
        if block.sides is None:
            return None, None
        if block.name not in self._drawn:
            generator = stream(self.seed, f"fine/sketch/{self._draw}/{block.name}")
            p, q = (self._matrix(size, generator, block.values) for size in block.sides)
            self._drawn[block.name] = p, q
        return self._drawn[block.name]

    def _matrix(self, width: int, generator: torch.Generator, like: Tensor) -> Tensor | None:
        if width < 2 * self.size:
            return None
        return random_signs(self.size, width, generator).mul_(self.size**-0.5).to(like)
