"""A small run under many kinds of Trainer; run as a script, on one or two processes.

    PYTHONPATH=tests python tests/support/trainer_setting.py OUT PROCESSES ACCUMULATE BATCH

writes the scores of several callbacks, their weights and the module's weights to OUT.
"""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from fine_bench.callback import FINECallback
from support.training import QUIET

N, CLASSES, BATCHES = 44, 3, 8


class Net(pl.LightningModule):
    """A network with the optimiser and the precision that a setting asks for."""

    def __init__(
        self, optimizer: str = "SGD", dtype: torch.dtype = torch.float64, compiled: str = ""
    ) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, CLASSES))
        net = net.to(dtype)
        self.net = torch.compile(net, backend=compiled) if compiled else net
        self.kind = optimizer

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        settings: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}
        if self.kind != "SGD":
            settings = {"lr": 0.01}
        optimizer = getattr(torch.optim, self.kind)(self.parameters(), **settings)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def data(n: int = N, seed: int = 1, dtype: torch.dtype = torch.float64) -> TensorDataset:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=g, dtype=torch.float64)
    return TensorDataset(x.to(dtype), torch.randint(CLASSES, (n,), generator=g), torch.arange(n))


def watchers(dtype: torch.dtype = torch.float64) -> dict[str, FINECallback]:
    queries = TensorDataset(*data(5, 2, dtype).tensors[:2])
    return {
        "self": FINECallback(),
        "loss": FINECallback(observable="loss", composition="standardised"),
        "columns": FINECallback(reference_columns=4),
        "sketch": FINECallback(sketch=2),
        "uncertainty": FINECallback(step_weight="uncertainty"),
        "optimiser": FINECallback(preconditioner="optimiser"),
        "ekfac": FINECallback(geometry="ekfac", noise="model"),
        "validation": FINECallback("validation", queries=queries, refresh_every=2),
        "queries": FINECallback("queries", queries=queries, refresh_every=1),
        "snapshot": FINECallback(schedule="snapshot", every_n_steps=2, n_reference=10),
    }


def sums(callback: FINECallback) -> Tensor:
    """μ in float64."""
    callback.scores()
    assert callback._schedule is not None
    return callback._schedule.accumulator.mu()[0]


class Shared(Net):
    """Deals examples out to processes in their order: Lightning's own sampler would shuffle."""

    def __init__(self, batch: int, n: int = N) -> None:
        super().__init__("Adam")
        self.batch, self.n = batch, n

    def train_dataloader(self) -> DataLoader[Any]:
        processes, rank = self.trainer.world_size, self.trainer.global_rank
        dataset = data(self.n)
        sampler: Any = DistributedSampler(dataset, processes, rank, shuffle=False)
        if processes == 1:  # an example that makes two processes' shares equal comes twice
            sampler = [*range(self.n), *range(self.n % 2)]
        return DataLoader(dataset, batch_size=self.batch, sampler=sampler)


def train(processes: int, accumulate: int, batch: int, n: int = N) -> tuple[int, dict[str, Any]]:
    """Train once: the rank, and the scores and the weights."""
    callbacks, module = watchers(), Shared(batch, n)
    trainer = pl.Trainer(
        **QUIET,
        max_epochs=3,
        accumulate_grad_batches=accumulate,
        strategy="ddp" if processes > 1 else "auto",
        devices=processes,
        use_distributed_sampler=False,
        callbacks=list(callbacks.values()),
    )
    trainer.fit(module)
    found = {name: sums(callback) for name, callback in callbacks.items()}
    weights = torch.cat([p.detach().flatten() for p in module.parameters()])
    return trainer.global_rank, {"scores": found, "weights": weights}


def main() -> None:
    """Train once and write down what came of it."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    rank, found = train(*map(int, sys.argv[2:6]))
    torch.save(found, f"{sys.argv[1]}.{rank}")


if __name__ == "__main__":
    main()
