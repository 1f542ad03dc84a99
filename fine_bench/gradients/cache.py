"""Gradients that several methods ask for at the same parameters, taken once.

Methods that read the checkpoints of one run ask for the same per-example gradients again and again.
Where these are small (LoRA matrices), a model may carry a ``GradientMemory``; its own kind of
engine looks there first. What is kept is found by what it was computed from, so a method need not
know who asked before it.

A method's cost must not depend on who came first: the memory counts the seconds that were saved,
and whoever measures adds them to the time that passed.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fine_bench import clock
from fine_bench.gradients.engine import GradientEngine
from fine_bench.gradients.per_example import PerExampleGradients
from fine_bench.types import Loss

KEPT_BYTES = 2**30
"""Gradients that one memory holds: a gibibyte."""


class GradientMemory:
    """Per-example gradients by what they are gradients of; the longest unused go first.

    Args:
        n_bytes: most that is held, ≥ 0.

    Attributes:
        saved: seconds that what was found here had taken when it was computed.
    """

    def __init__(self, n_bytes: int = KEPT_BYTES) -> None:
        if n_bytes < 0:
            raise ValueError(f"n_bytes must be at least 0, got {n_bytes}")
        self.n_bytes = n_bytes
        self.saved = 0.0
        self._held: OrderedDict[str, tuple[PerExampleGradients, float, int]] = OrderedDict()
        self._size = 0

    def __len__(self) -> int:
        return len(self._held)

    def __call__(self, key: str, compute: Callable[[], PerExampleGradients]) -> PerExampleGradients:
        """What is held under the key, or what ``compute`` gives.

        Only gradients in full are kept; nobody may write into them.
        """
        if key in self._held:
            self._held.move_to_end(key)
            gradients, seconds, _ = self._held[key]
            self.saved += seconds
            return gradients
        start = clock.now()
        gradients = compute()
        seconds = clock.now() - start
        if all(block.in_full for block in gradients.blocks):
            self._keep(key, gradients, seconds)
        return gradients

    def _keep(self, key: str, gradients: PerExampleGradients, seconds: float) -> None:
        size = sum(block.values.nbytes for block in gradients.blocks)
        if size > self.n_bytes:
            return
        while self._size + size > self.n_bytes:
            _, (_, _, freed) = self._held.popitem(last=False)
            self._size -= freed
        self._held[key] = (gradients, seconds, size)
        self._size += size


def fingerprint(tensors: Iterable[Tensor], *further: object) -> str:
    """A digest of numbers, their shapes and types, and of whatever else matters."""
    found = hashlib.blake2b(repr(further).encode(), digest_size=16)
    for tensor in tensors:
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        plain = tensor.detach().cpu().contiguous()
        found.update(plain.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def engine_of(
    model: nn.Module, loss: Loss, layers: Sequence[str] | None = None, **options: Any
) -> GradientEngine:
    """The model's own kind of engine, by its method ``gradient_engine``; else the general one.

    Args:
        model, loss, layers: see ``GradientEngine``.
        options: for the model's own engine; a general one has none.
    """
    own = getattr(model, "gradient_engine", None)
    engine: GradientEngine = (
        own(loss, layers, **options) if callable(own) else GradientEngine(model, loss, layers)
    )
    return engine
