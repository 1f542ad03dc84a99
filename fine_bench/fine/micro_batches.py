"""The examples behind one optimiser step, and how much each of them counts in it.

A step's gradient may be put together from several backward passes: A = ``accumulate_grad_batches``
micro-batches, on each of W processes. Their union, of m = Σ_k m_k examples, is the *global batch*.
Lightning divides every micro-batch's mean loss by A, and averages over processes, so the gradient
of the step is

    Σ_i w_i g_i,   w_i = 1/(A · W · m_k) for example i of micro-batch k.

With r_i = m · w_i, which is 1 for all if the micro-batches are equally long and the window is
full, and c̄, σ as in ``effects``, the statistic x = Σ_i w_i c_i is shifted by (r_i/m) (c_i − c̄) if i
takes the place of an average example; its variance is ρ² σ²/m with ρ² = mean r². These are the
formulas of one batch of m examples with step size η ρ and effects (r_i/ρ) (c_i − c̄). For instance,
where an epoch ends after K < A micro-batches of one length, ρ = K/A and nothing else changes: the
step is that of the K · m_k examples with a step size of η K/A, which is what Lightning does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fine_bench.fine.distributed import Processes
from fine_bench.fine.training_data import complement_from_logit_gradients
from fine_bench.gradients.per_example import PerExampleGradients, stack_examples


@dataclass(frozen=True, eq=False)
class WindowWeights:
    """How the examples of a window count.

    Attributes:
        m: number of examples.
        mean: mean of r_i.
        rms: ρ.
        relative: r_i/ρ, ``(m,)`` in float64; None where all are one.
    """

    m: int
    mean: float
    rms: float
    relative: Tensor | None


def window_weights(sizes: Sequence[int], parts: Sequence[float]) -> WindowWeights:
    """r_i of the module's text.

    Args:
        sizes: m_k, the number of examples of each micro-batch of each process, ≥ 1.
        parts: A · W for each of them: into how many equal parts the step's gradient is divided.
    """
    if len(sizes) == 1:  # nearly every step: plain numbers
        return WindowWeights(sizes[0], 1.0 / parts[0], 1.0 / parts[0], None)
    m = sum(sizes)
    r = [m / (size * part) for size, part in zip(sizes, parts, strict=True)]
    if all(value == r[0] for value in r):
        return WindowWeights(m, r[0], r[0], None)
    each = torch.tensor(r, dtype=torch.float64).repeat_interleave(torch.tensor(sizes))
    rms = math.sqrt(float(each.square().mean()))
    return WindowWeights(m, float(each.mean()), rms, each / rms)


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What one backward pass told.

    Attributes:
        index: which training examples, ``(m_k,)``.
        gradients: as the pass has them; None in a step too short for a standard deviation.
        scale: what makes them those of each example's own loss.
        logit_gradients: of the loss at the logits, ``(m_k, classes)``, as the pass has them, where
            1 − p is needed.
        parts: into how many parts the step's gradient is divided, A · W.
        repeats: whether an example stands in it twice.
    """

    index: Tensor
    gradients: PerExampleGradients | None
    scale: float
    logit_gradients: Tensor | None
    parts: float
    repeats: bool = False

    @property
    def complement(self) -> Tensor | None:
        """1 − p, ``(m_k,)``."""
        grad = self.logit_gradients
        return None if grad is None else complement_from_logit_gradients(grad) * self.scale


@dataclass(frozen=True, eq=False)
class GlobalBatch:
    """Everything that one optimiser step is put together from.

    Attributes:
        parts: this process's micro-batches.
        lr: η_t ρ.
        number: of the step, for reports.
        relative: r_i/ρ of the examples of all processes, ``(m,)``; None for ones.
    """

    parts: list[MicroBatch]
    lr: float
    number: int
    relative: Tensor | None

    def index_and_complement(self, processes: Processes) -> tuple[Tensor, Tensor | None]:
        """Indices and 1 − p of the global batch, ``(m,)`` each."""
        window = self.parts
        index, complement = window[0].index, window[0].complement
        if len(window) > 1:
            index = torch.cat([b.index for b in window])
            if complement is not None:
                complement = torch.cat([b.complement for b in window if b.complement is not None])
        if processes.count > 1:
            index = processes.join(index)
            complement = None if complement is None else processes.join(complement)
        return index, complement

    def gradients(
        self, processes: Processes, *, for_gram: bool = False
    ) -> tuple[PerExampleGradients, float]:
        """The gradients of this process's examples, and their scale.

        Args:
            processes: of the run.
            for_gram: whether nothing but the Gram matrix is taken of them.
        """
        parts = [(b.gradients, b.scale) for b in self.parts if b.gradients is not None]
        if len(parts) == 1 and processes.count == 1:
            return parts[0]
        return stack_examples(
            [scaled_gradients(gradients, scale) for gradients, scale in parts],
            for_gram=for_gram and processes.count == 1,
        ), 1.0


def scaled_gradients(gradients: PerExampleGradients, scale: float) -> PerExampleGradients:
    """All gradients times one number."""
    values = gradients.blocks[0].values
    return gradients.scaled(values.new_full((len(gradients),), scale))
