"""Grey-scale images to network inputs."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def standardise(images: NDArray[np.uint8], white: int, mean: float, std: float) -> Tensor:
    """``(pixel / white - mean) / std`` as float32, with a channel axis.

    Computed once for each grey level in float64 and looked up: fast, and the same bits on every
    machine, which the data hash relies on.

    Args:
        images: ``(n, height, width)``, values 0 … ``white``.
        white: the largest grey level, ≤ 255.
        mean, std: of the pixels scaled to [0, 1]; std > 0.

    Returns:
        ``(n, 1, height, width)``.
    """
    levels = ((np.arange(white + 1) / white - mean) / std).astype(np.float32)
    result = np.empty((len(images), 1, *images.shape[1:]), dtype=np.float32)
    # in chunks, because numpy widens the looked-up bytes to eight each
    for start in range(0, len(images), 1024):
        rows = slice(start, start + 1024)
        result[rows, 0] = levels[images[rows]]
    return torch.from_numpy(result)
