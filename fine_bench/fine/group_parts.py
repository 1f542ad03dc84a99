"""What a run shows of the error of a *group's* μ: the parts that each epoch has in it.

μ_S = Σ_{i ∈ S} μ_i for targets that ask queries (``fine_bench.metrics.groups``). The errors of its
members go together: copies err alike, a class moves as a whole. How much is in no member's own
error, but it is in the epochs. With z_b,i the part that epoch b has in the linear jackknife of μ_i
(``fine.standard_error``), leaving epoch b out changes μ_S by

    Z_b = Σ_{i ∈ S} z_b,i,      se_S² = k/(k − 1) · Σ_b (Z_b − Z̄)²

which is the jackknife of the group: every covariance between members is in it, whatever it comes
from. For a single example it is that of ``std_error``. It is kept on request, since it takes 16
bytes an epoch, row and example.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class GroupParts:
    """Sums of shift and noise by epoch: U_b and V_b of every example.

    Args:
        n_rows, n_train: R and n.
    """

    def __init__(self, n_rows: int, n_train: int) -> None:
        self.shape = (2, n_rows, n_train)
        self._blocks: list[Tensor] = []

    def observe(self, index: Tensor, shift: Tensor, noise: Tensor, times: Tensor) -> None:
        """Take in S in-batch steps. An example's block is how often it was in a batch before.

        Args:
            index: ``(S, m)``.
            shift, noise: u and v, ``(S, R, m)``.
            times: how often each example was in a batch before the first of them, ``(n,)``.
        """
        times = times.long()
        for rows, u, v in zip(index.cpu(), shift, noise, strict=True):
            before = times[rows]
            while len(self._blocks) <= int(before.max()):
                self._blocks.append(torch.zeros(self.shape, dtype=torch.float64))
            both = torch.stack([u, v])
            for block in sorted(set(before.tolist())):
                some = before == block
                self._blocks[block].index_add_(2, rows[some], both[:, :, some])
            times = times.index_add(0, rows, torch.ones_like(rows))

    def close(self, block: Tensor) -> None:
        """Take in a block that is complete, ``(2, R, n)``."""
        self._blocks.append(block.clone())

    def parts(
        self, mu: Tensor, inverse: Tensor, variance: Tensor, still_open: Tensor | None = None
    ) -> Tensor:
        """z_b,i, ``(k, R, n)`` in float64.

        Args:
            mu, inverse, variance: μ, 1/sqrt(n V) and V, ``(R, n)``.
            still_open: a further block that has not been closed, ``(2, R, n)``.
        """
        blocks = [*self._blocks, *([] if still_open is None else [still_open])]
        if not blocks:
            return mu.new_zeros(0, *mu.shape)
        u, v = torch.stack(blocks, 1)
        half = 0.5 * mu / variance.clamp_min(torch.finfo(variance.dtype).tiny)
        parts: Tensor = u * inverse - half * v
        return parts

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on after an interruption."""
        return {"blocks": [block.clone() for block in self._blocks]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict()``."""
        self._blocks = [block.clone() for block in state["blocks"]]
