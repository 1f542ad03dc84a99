"""Per-example gradients of token sequences, at the price of what is really in them.

Three things make them cheaper than ``GradientEngine`` alone, and change nothing but rounding:

- Logits are computed where something is labelled only (``SequenceModel.at``). Prompts and padding
  have no loss, and a vocabulary makes logits the largest tensors of a pass.
- A batch is taken in pieces of samples of about the same length, so that little is padding.
- The gradients of few parameters (LoRA matrices of a small model) are formed in full, P numbers a
  sample, where the factors of T tokens would be many times as many; and a memory that the model
  carries keeps them for the next method (``fine_bench.gradients.cache``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fine_bench.gradients.blocks.dense import in_full
from fine_bench.gradients.cache import GradientMemory, fingerprint
from fine_bench.gradients.engine import GradientEngine
from fine_bench.gradients.per_example import PerExampleGradients, stack_examples
from fine_bench.gradients.token_losses import labelled_positions, lengths, mean_complement
from fine_bench.types import Loss, UnsupportedProblemError

DENSE_PARAMETERS = 2**18
"""Up to so many trained parameters, gradients are formed in full: 1 MiB a sample in float32."""

PIECE = 32
"""Samples of a piece."""

CHUNK = 128
"""Samples that are kept under one name: as many as the task's methods take at once by default."""


class SequenceModel(nn.Module):
    """What the engine asks of a model of token sequences.

    Attributes:
        memory: where gradients are kept for further methods; None keeps nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.memory: GradientMemory | None = None

    def at(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Logits ``(B, K, V)`` at some positions ``(B, K)`` of each row of ids ``(B, T)``."""
        raise NotImplementedError

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


class SequenceEngine(GradientEngine):
    """Gradients of each sample's own loss, or of another function of its labelled tokens.

    Args:
        net: the model.
        loss: ``loss(logits, y, reduction="none") -> (batch,)``; a function of the logits that
            predict labelled tokens, as all in ``fine_bench.gradients.token_losses`` are.
        layers: names of modules to differentiate; None for all trained parameters.
        dense: form the gradients in full; None decides by ``DENSE_PARAMETERS``.
        complement: give the mean 1 − p of each sample besides.
    """

    def __init__(
        self,
        net: SequenceModel,
        loss: Loss,
        layers: Sequence[str] | None = None,
        *,
        dense: bool | None = None,
        complement: bool = False,
    ) -> None:
        super().__init__(net, loss, layers, self._logits)
        self.net = net
        self.layer_names = None if layers is None else tuple(layers)
        trained = [p for part in self.recorder.parameters().values() for p in part]
        small = sum(p.numel() for p in trained) <= DENSE_PARAMETERS
        self.dense = small if dense is None else dense
        self.complement = complement
        self._kept: Tensor | None = None

    def __call__(
        self, x: Any, y: Tensor, observable: Literal["loss", "margin"] = "loss"
    ) -> PerExampleGradients:
        """Gradients at the present parameters.

        Args:
            x, y: ids and labels, ``(B, T)``.
            observable: ``"loss"``; sequences have no margin of their own.
        """
        if observable != "loss":
            raise UnsupportedProblemError('token sequences have no margin; use observable="loss"')
        if not self.dense:
            return self._pass(x, y)
        if self.net.memory is None:
            return self._in_pieces(x, y)
        # whoever asks for more samples at once finds them too
        return stack_examples(
            [
                self._remembered(self.net.memory, x[i : i + CHUNK], y[i : i + CHUNK])
                for i in range(0, len(x), CHUNK)
            ]
        )

    def _remembered(self, memory: GradientMemory, x: Tensor, y: Tensor) -> PerExampleGradients:
        loss = f"{getattr(self.loss, '__module__', '')}.{getattr(self.loss, '__qualname__', '')}"
        key = fingerprint(
            [x, y, *self.net.trained().values()],
            loss,
            self.layer_names,
            self.complement,
            next(self.net.parameters()).dtype,
        )
        return memory(key, lambda: self._in_pieces(x, y))

    def _in_pieces(self, x: Tensor, y: Tensor) -> PerExampleGradients:
        """The batch by length, in full, and in its own order again."""
        order = lengths(x).argsort(stable=True)
        parts = [_full(self._pass(x[i], y[i])) for i in torch.split(order, PIECE)]
        return stack_examples(parts).rows(order.argsort().to(parts[0].blocks[0].values.device))

    def _pass(self, x: Tensor, y: Tensor) -> PerExampleGradients:
        """One pass over the whole batch."""
        positions, labels = labelled_positions(y)
        try:
            gradients = super().__call__((x, positions), labels)
            if not self.complement:
                return gradients
            assert self._kept is not None
            return replace(gradients, one_minus_p=mean_complement(self._kept, labels))
        finally:
            self._kept = None

    def _logits(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        logits = self.net.at(*inputs)
        if self.complement:
            self._kept = logits.detach()
        return logits


def _full(gradients: PerExampleGradients) -> PerExampleGradients:
    return replace(gradients, blocks=[in_full(block) for block in gradients.blocks])
