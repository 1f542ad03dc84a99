"""A toy bank that worker processes can train without importing much."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fine_bench.retraining.bank import Bank
from fine_bench.retraining.build import Examples, Retraining
from fine_bench.retraining.design import Design
from fine_bench.retraining.train import Recipe


@dataclass(frozen=True)
class Small:
    """Fully connected, one hidden layer."""

    n_in: int = 5
    n_classes: int = 3
    hidden: int = 6

    def __call__(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return nn.Sequential(
                nn.Linear(self.n_in, self.hidden), nn.Tanh(), nn.Linear(self.hidden, self.n_classes)
            )


N, Q = 30, 4
RECIPE = Recipe(max_epochs=2, batch_size=8, lr=0.2, momentum=0.5)
DESIGN = Design(seed=2)
RETRAINING = Retraining(RECIPE, DESIGN, Small())


def examples() -> Examples:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(N + Q, 5, generator=g), torch.randint(3, (N + Q,), generator=g)
    return Examples(x[:N], y[:N], x[N:], y[N:])


def new_bank(folder: Path) -> Bank:
    return Bank.create(folder, {"task": "toy", "n_train": N, "n_query": Q})
