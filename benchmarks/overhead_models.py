"""The trainings whose overhead ``callback_overhead.py`` measures: network, inputs, batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fine_bench.models.networks import cnn, mlp, resnet9
from fine_bench.models.transformer import token_transformer

CLASSES = 10


class BasicBlock(nn.Module):
    """Two 3 × 3 convolutions beside a shortcut, with group normalisation."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False),
            nn.GroupNorm(8, n_out),
            nn.ReLU(),
            nn.Conv2d(n_out, n_out, 3, padding=1, bias=False),
            nn.GroupNorm(8, n_out),
        )
        same = stride == 1 and n_in == n_out
        self.shortcut = nn.Identity() if same else nn.Conv2d(n_in, n_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet18() -> nn.Module:
    """Eighteen layers for images of 3 × 32 × 32, 11 million parameters."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.GroupNorm(8, 64), nn.ReLU()
    ]  # fmt: skip
    n_in = 64
    for n_out, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [BasicBlock(n_in, n_out, stride), BasicBlock(n_out, n_out, 1)]
        n_in = n_out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, CLASSES))


@dataclass(frozen=True)
class Workload:
    """One training.

    Attributes:
        make: a new network.
        shape: of one input; of tokens if ``tokens``.
        batch: examples in a batch.
        steps, pairs: of a run, and of runs, by default.
        n_query: queries of the target ``validation``.
        tokens: size of the vocabulary; 0 for images.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int
    steps: int
    pairs: int = 3
    n_query: int = 500
    tokens: int = 0

    def inputs(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Random inputs."""
        if self.tokens:
            return torch.randint(self.tokens, (n, *self.shape), generator=generator)
        return torch.randn(n, *self.shape, generator=generator)


SMALL = ("mlp", "cnn", "transformer", "transformer-long")
WORKLOADS = {
    "mlp": Workload(lambda: mlp((1, 28, 28), CLASSES), (1, 28, 28), 64, 400, pairs=9),
    "cnn": Workload(lambda: cnn((1, 28, 28), CLASSES), (1, 28, 28), 64, 200, pairs=7),
    "transformer": Workload(
        lambda: token_transformer(1000, 32, CLASSES), (32,), 64, 100, tokens=1000
    ),
    "transformer-long": Workload(
        lambda: token_transformer(1000, 128, CLASSES), (128,), 16, 100, n_query=128, tokens=1000
    ),
    # 6.6 million parameters, batch normalisation
    "resnet9-bn": Workload(
        lambda: resnet9((3, 32, 32), CLASSES, norm="batch"), (3, 32, 32), 64, 10, n_query=64
    ),
    # for a GPU: 11 and 110 million parameters
    "resnet18": Workload(resnet18, (3, 32, 32), 128, 100),
    "transformer-100m": Workload(
        lambda: token_transformer(32_000, 512, CLASSES, width=768, heads=12, depth=12),
        (512,), 16, 50, n_query=64, tokens=32_000,
    ),
}  # fmt: skip
