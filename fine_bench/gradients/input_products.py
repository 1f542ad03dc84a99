"""What the Gram matrices of one network at several parameters have in common.

    ⟨b_i a_iᵀ, b_j a_jᵀ⟩ = ⟨a_i, a_j⟩ ⟨b_i, b_j⟩

In the first layer of a fully connected network a are the data, whatever the parameters, and ⟨a_i,
a_j⟩ is the dearest product of all, for the data are wide. It is kept with the inputs that it was
made of, and used again where these are the same: every number is the one that would be computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fine_bench.gradients.blocks.linear import FactorBlock
from fine_bench.gradients.blocks.protocol import Block
from fine_bench.gradients.per_example import PerExampleGradients

HELD_FLOATS = 2**27
"""Numbers that the products may take: 0.5 GiB in float32."""


class InputProducts:
    """Gram matrices of batches, with products of inputs that are the same from call to call.

    Args:
        held_floats: numbers that may be kept; what does not fit is computed anew.

    Attributes:
        n_reused: products that were not computed.
    """

    def __init__(self, held_floats: int = HELD_FLOATS) -> None:
        self.n_reused = 0
        self._left = held_floats
        # a layer is in it as long as its inputs have been the same
        self._kept: dict[int, dict[tuple[int, int], Tensor]] = {}
        self._inputs: dict[tuple[int, int], Tensor] = {}
        self._changing: set[int] = set()

    def gram(
        self, mine: PerExampleGradients, own: int, theirs: PerExampleGradients, other: int
    ) -> Tensor:
        """Dot products ⟨g_i, g'_j⟩, ``(B, B')``.

        Args:
            mine, theirs: the batches.
            own, other: numbers that name these batches, the same in every call.
        """
        total: Tensor | None = None
        for layer, (x, y) in enumerate(zip(mine.blocks, theirs.blocks, strict=True)):
            part = self._of(layer, x, own, y, other)
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    def _of(self, layer: int, x: Block, own: int, y: Block, other: int) -> Tensor:
        if not (_has_factors(x) and _has_factors(y)):
            return x.gram(y)
        assert isinstance(x, FactorBlock)
        assert isinstance(y, FactorBlock)
        if not (self._same(layer, own, x.a) and self._same(layer, other, y.a)):
            return x.gram(y)
        kept = self._kept.setdefault(layer, {})
        inputs = kept.get((own, other))
        if inputs is None:
            inputs = x.input_gram(y)
            if inputs.numel() <= self._left:
                self._left -= inputs.numel()
                kept[own, other] = inputs
        else:
            self.n_reused += 1
        return inputs * (x.b[:, 0] @ y.b[:, 0].T)

    def _same(self, layer: int, batch: int, a: Tensor) -> bool:
        """Whether a layer's inputs have always been these; if not, nothing of it is kept."""
        if layer in self._changing:
            return False
        before = self._inputs.get((layer, batch))
        if before is a or (before is not None and torch.equal(before, a)):
            # the same object is found at once when it comes again
            self._inputs[layer, batch] = a
            return True
        if before is None:
            self._inputs[layer, batch] = a
            return True
        self._changing.add(layer)
        self._left += sum(part.numel() for part in self._kept.pop(layer, {}).values())
        for key in [key for key in self._inputs if key[0] == layer]:
            del self._inputs[key]
        return False


def _has_factors(block: Block) -> bool:
    """Whether a gradient is one outer product of an input and an output."""
    return type(block) is FactorBlock and block.weight and block.n_positions == 1
