"""The clean data that a task of labelled images samples from, and the check of its seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fine_bench.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Source:
    """A clean, labelled image data set in two parts.

    Attributes:
        images: ``(n, ...)`` uint8, the training pool.
        labels: ``(n,)``.
        ids: ``(n,)`` positions in the source data set.
        test_images, test_labels: clean and disjoint from the pool.
        n_classes: number of classes.
        to_input: from raw images to float32 network inputs.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    ids: NDArray[np.int64]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int64]
    n_classes: int
    to_input: Callable[[NDArray[np.uint8]], Tensor]


def check_seed(seed: int) -> None:
    """Refuse a negative task seed."""
    if seed < 0:
        raise ConfigError(
            f"task.seed must be an integer of at least 0, got {seed}. Type for instance task.seed=0"
        )
