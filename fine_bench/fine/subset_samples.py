"""The samples of the paper's estimator: batches with and without a subset, measured.

The formulas of x_P and x_Q stand in ``fine_bench.fine.subset_test``, which tests what is sampled
here; ``fine_bench.fine.subsets`` draws the batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fine_bench.fine.effects import Observable
from fine_bench.fine.subsets import Draw, Subsets
from fine_bench.gradients.blocks.direction import Direction
from fine_bench.gradients.per_example import PerExampleGradients

MIN_SAMPLES = 4
"""Fewest samples of an arm that split into a half that chooses and a half that counts."""


def self_products(
    batch: PerExampleGradients, h: PerExampleGradients, draw: Draw, observable: Observable
) -> tuple[Tensor, Tensor]:
    """⟨g_j, ∇h_S⟩ for the target ``self``: h_S is the mean observable of S.

    Args:
        batch: loss gradients of ``draw.batch_ids`` (pool, members).
        h: gradients of the observable of ``draw.target_ids`` (singles, targets).
        draw: the step's batches.
        observable: which one.

    Returns:
        products ``(S, pool + members)`` and each single example's own product ⟨g_i, ∇h_i⟩ ``(W,)``,
        in float64 on the CPU.
    """
    n_singles, n_groups = len(draw.singles), len(draw.outside) - len(draw.singles)
    dots = h.gram(batch).double().cpu()
    count = torch.bincount(draw.target_group, minlength=n_groups)
    means = dots.new_zeros(n_groups, dots.shape[1])
    means.index_add_(0, draw.target_group, dots[n_singles:])
    own = h.norm2()[:n_singles].double()
    if observable == "margin":
        assert h.one_minus_p is not None
        own = own * h.one_minus_p[:n_singles].double()  # g_i = (1 − p_i) ∇h_i
    return torch.cat([dots[:n_singles], means / count[:, None]]), own.cpu()


def direction_products(
    gradients: PerExampleGradients, direction: Direction, draw: Draw
) -> tuple[Tensor, Tensor]:
    """⟨g_j, ∇h⟩ for the one ∇h of the validation target; shapes as ``self_products``.

    Args:
        gradients: loss gradients of ``draw.batch_ids`` followed by ``draw.singles``.
        direction: ∇h, one row.
        draw: the step's batches.
    """
    c = gradients.contract(direction)[:1].double().cpu()
    n_batch = len(draw.batch_ids)
    return c[:, :n_batch].expand(len(draw.outside), -1), c[0, n_batch:]


def samples(products: Tensor, own: Tensor, draw: Draw) -> Tensor:
    """The samples of one step, from the products of ``self_products`` or ``direction_products``.

    Returns:
        ``(3, S)``: x_P, x_Q, and the mean of ⟨g_j, ∇h⟩ over all outsiders of the pool, which is
        what an auxiliary run contributes.
    """
    n_pool, n_singles = len(draw.pool), len(draw.singles)
    stands_for = draw.member_group + n_singles
    columns = n_pool + torch.arange(len(draw.members))
    members = products.new_zeros(len(draw.outside))
    members[:n_singles] = own
    members.index_add_(0, stands_for, products[stands_for, columns])
    pool = products[:, :n_pool]
    x_p = (members + (pool * draw.others_p).sum(1)) / draw.batch_size
    x_q = (pool * draw.others_q).sum(1) / draw.batch_size
    level = (pool * draw.outside).sum(1) / draw.outside.sum(1)
    return torch.stack([x_p, x_q, level])


@dataclass(frozen=True, eq=False)
class Signal:
    """What an auxiliary run contributes: the Q-type signal of each subset, step by step.

    Attributes:
        steps: ``(n,)`` update steps after which it was measured, ascending.
        values: ``(n, S)`` float64.
        keys: names of the subsets.
    """

    steps: Tensor
    values: Tensor
    keys: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.values.shape != (len(self.steps), len(self.keys)):
            raise ValueError(
                f"a signal of {len(self.steps)} steps and {len(self.keys)} subsets needs values of "
                f"that shape, got {tuple(self.values.shape)}"
            )

    def state_dict(self) -> dict[str, Any]:
        """Tensors and words only: ``torch.save`` it, and load it with ``weights_only=True``."""
        return {"steps": self.steps, "values": self.values, "keys": list(self.keys)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Signal:
        """Inverse of ``state_dict``."""
        return cls(state["steps"], state["values"], tuple(state["keys"]))


class PaperAccumulator:
    """The samples of a run: 24 bytes a subset and measured step.

    Args:
        subsets: what is watched.
    """

    def __init__(self, subsets: Subsets) -> None:
        self.subsets = subsets
        self.steps: list[int] = []
        self.samples: list[Tensor] = []
        self.n_steps = 0
        self.n_not_finite = 0

    def observe(self, step: int, samples: Tensor) -> bool:
        """Take in one step's ``(3, S)`` samples; a step that is not finite is counted, not kept.

        Returns:
            Whether it was kept.
        """
        if not bool(torch.isfinite(samples).all()):
            self.n_not_finite += 1
            return False
        self.steps.append(step)
        self.samples.append(samples)
        return True

    def stacked(self) -> Tensor:
        """``(n, 3, S)``: x_P, x_Q and the level of every measured step."""
        if not self.samples:
            return torch.zeros(0, 3, len(self.subsets), dtype=torch.float64)
        return torch.stack(self.samples)

    def signal(self) -> Signal:
        """This run as the auxiliary of another."""
        steps = torch.tensor(self.steps, dtype=torch.int64)
        return Signal(steps, self.stacked()[:, 2].clone(), self.subsets.keys)

    def arms(self, auxiliary: Signal | None) -> tuple[Tensor, Tensor, Tensor]:
        """Measured steps ``(n,)`` and both arms ``(S, n)``, the auxiliary signal subtracted.

        Steps that the auxiliary run did not measure are left out.

        Raises:
            ValueError: the signal is of other subsets; too few samples to split.
        """
        steps = torch.tensor(self.steps, dtype=torch.int64)
        samples = self.stacked()
        matching = ""
        if auxiliary is not None:
            if auxiliary.keys != self.subsets.keys:
                raise ValueError(
                    f"the auxiliary signal is of {len(auxiliary.keys)} other subsets than the "
                    f"{len(self.subsets)} watched here; measure both runs with the same subsets, "
                    "sample and sample_seed"
                )
            place = {step: i for i, step in enumerate(auxiliary.steps.tolist())}
            kept = [i for i, step in enumerate(self.steps) if step in place]
            matched = auxiliary.values[[place[self.steps[i]] for i in kept]]
            steps, samples = steps[kept], samples[kept]
            samples = samples - matched[:, None, :]
            matching = f" that the auxiliary run's {len(place)} match"
        if len(steps) < MIN_SAMPLES:
            lost = f", {self.n_not_finite} more were not finite" if self.n_not_finite else ""
            raise ValueError(
                f"{len(steps)} samples of P and of Q were taken{matching}{lost}; a test needs at "
                f"least {MIN_SAMPLES}: lower every_n_steps, or train longer"
            )
        return steps, samples[:, 0].T.contiguous(), samples[:, 1].T.contiguous()

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on after an interruption."""
        return {
            "steps": torch.tensor(self.steps, dtype=torch.int64),
            "samples": self.stacked(),
            "keys": list(self.subsets.keys),
            "counts": (self.n_steps, self.n_not_finite),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict()``."""
        if tuple(state["keys"]) != self.subsets.keys:
            raise ValueError(
                f"the saved state is of {len(state['keys'])} other subsets than the "
                f"{len(self.subsets)} watched now; resume with the same data and subsets"
            )
        self.steps = state["steps"].tolist()
        self.samples = list(state["samples"].clone())
        self.n_steps, self.n_not_finite = state["counts"]
