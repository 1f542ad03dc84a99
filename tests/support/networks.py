"""Networks of the oracles' tests, with the shape of one input."""

from __future__ import annotations

import torch
from torch import nn

CLASSES = 4


def models() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Fresh ones on every call, always with the same parameters; four classes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {
            "relu": (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, CLASSES)), (6,)),
            "tanh, no bias": (
                nn.Sequential(
                    nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, CLASSES, bias=False)
                ),
                (6,),
            ),
            "cnn": (
                nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18, CLASSES)),
                (2, 5, 4),
            ),
            "logistic": (nn.Sequential(nn.Linear(6, CLASSES)), (6,)),
        }


MODELS = tuple(models())
