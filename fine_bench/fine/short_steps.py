"""Steps of too few examples: an example is compared with at least two others of its step."""

from __future__ import annotations

import warnings

from torch import Tensor

from fine_bench.fine.accumulator import FineAccumulator
from fine_bench.fine.effects import MIN_BATCH
from fine_bench.types import UnsupportedProblemError


class ShortSteps:
    """Says which examples are left out because their steps are too short for a σ.

    Args:
        accumulator: of the run; it counts the steps.
    """

    def __init__(self, accumulator: FineAccumulator) -> None:
        self.accumulator = accumulator
        self._examples: set[int] = set()

    def leave_out(self, index: Tensor, step: int) -> None:
        """One more step.

        Args:
            index: its examples, ``(m,)``.
            step: its number.
        """
        found = set(index.tolist())
        if not self.accumulator.n_short_batches:
            warnings.warn(
                f"step {step} has {len(found)} different example{'s'[: len(found) - 1]}, fewer "
                f"than {MIN_BATCH}: an example is compared with at least two others of its step, "
                "so those of shorter steps are not observed in them. Use larger batches, or leave "
                "out the last one with drop_last=True",
                stacklevel=2,
            )
        self._examples |= found
        self.accumulator.skip_short_batch()

    def training_ends(self) -> None:
        """Say what has become of them."""
        never = int((self.accumulator.n_observations[sorted(self._examples)] == 0).sum())
        if never:
            steps = self.accumulator.n_short_batches
            warnings.warn(
                f"{steps} steps had fewer than {MIN_BATCH} different examples, and {never} of "
                f"their {len(self._examples)} examples were never observed: their value is 0 and "
                "their std_error infinite. Use larger batches",
                stacklevel=2,
            )


def refuse_short_steps(batch_size: int | None, parts: int, n_train: int) -> None:
    """Refuse a run in which no step can be observed.

    Args:
        batch_size: of the loader; None if unknown.
        parts: the most batches that a step is put together from, on all processes.
        n_train: number of training examples.

    Raises:
        UnsupportedProblemError: its steps are too short.
    """
    if n_train < MIN_BATCH:
        raise UnsupportedProblemError(
            f"the training set has {n_train} examples: f-INE compares an example with at least two "
            "others, so it needs three"
        )
    if batch_size is not None and batch_size * parts < MIN_BATCH:
        raise UnsupportedProblemError(
            f"batch_size={batch_size} gives steps of {batch_size * parts}, but in-batch an example "
            "is compared with at least two others of its step: none could ever be observed. Use "
            f"batch_size={MIN_BATCH} or more, gradients accumulated over several batches, or "
            'schedule="snapshot", which compares with examples of its own choice'
        )


__all__ = ["ShortSteps", "refuse_short_steps"]
