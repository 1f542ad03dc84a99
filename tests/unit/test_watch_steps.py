"""A loop in plain PyTorch: step sizes, draws and index as under Lightning, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fine_bench
from fine_bench.callback import FINECallback
from support.training import QUIET

N, EPOCHS = 20, 3


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        first, _, last = self.net
        groups = [
            {"params": first.parameters(), "lr": 0.05},
            {"params": [last.weight], "lr": 0.3},
            {"params": [last.bias], "lr": 0.1},
        ]
        return torch.optim.SGD(groups)


def loader(sampled: bool) -> DataLoader[Any]:
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(N, 5, generator=g), torch.randint(3, (N,), generator=g)
    data = fine_bench.with_index(TensorDataset(x, y))
    # the last two of each round are left out
    order = torch.randperm(N, generator=g)[:18]
    if sampled:
        order = torch.multinomial(torch.linspace(0.5, 2, N), 24, replacement=True, generator=g)
    return DataLoader(data, batch_sampler=[part.tolist() for part in order.split(6)])


@pytest.mark.any_trainer("parameter groups with different step sizes")
@pytest.mark.any_trainer("sampling with replacement, `WeightedRandomSampler`")
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("schedule", ["in_batch", "snapshot"])
def test_a_loop_counts_as_the_callback_does(sampled: bool, told: bool, schedule: Any) -> None:
    options: dict[str, Any] = {"schedule": schedule}
    if schedule == "snapshot":
        options["every_n_steps"] = 2
    callback = FINECallback(**options)
    trainer = pl.Trainer(max_epochs=EPOCHS, callbacks=[callback], **QUIET)
    trainer.fit(Net(), loader(sampled))
    net, batches = Net(), loader(sampled)
    optimizer = net.configure_optimizers()
    train = batches.dataset
    with fine_bench.watch(net.net, optimizer=optimizer, train_set=train, **options) as fine:
        for _ in range(EPOCHS):
            for x, y, index in batches:
                fine.batch(index, y)
                fine.loss(F.cross_entropy(net.net(x), y)).backward()
                optimizer.step()
                optimizer.zero_grad()
            if told:
                fine.epoch_ends()
    one, other = callback.scores(), fine.scores()
    assert torch.equal(one.n_observations, other.n_observations)
    assert torch.equal(one.values, other.values)
    if schedule == "in_batch" or told:  # errors are over epochs
        assert torch.equal(one.std_error, other.std_error)
