"""Tuning under Lightning: AdamW on the LoRA matrices, every sample counted the same."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from fine_bench.gradients.adam import AdamCheckpoint
from fine_bench.llm.net import CausalNet
from fine_bench.llm.tokens import collate
from fine_bench.models.classifier import refuse_divergence
from fine_bench.models.lr_schedule import check_schedule, scheduled
from fine_bench.types import Loss, LRSchedule

BETAS = (0.9, 0.999)
EPSILON = 1e-8


class Tuner(pl.LightningModule):
    """Trains the LoRA matrices on batches ``{"x", "y", "index"}``.

    Args:
        net: logits from padded ids.
        loss: one loss a sample; the batch's loss is their mean.
        lr: step size of AdamW, > 0.
        weight_decay: of AdamW, ≥ 0.
        lr_schedule: ``"constant"`` or ``"cosine"``; see ``fine_bench.models.lr_schedule``.
    """

    def __init__(
        self,
        net: CausalNet,
        loss: Loss,
        *,
        lr: float = 2e-3,
        weight_decay: float = 0.0,
        lr_schedule: LRSchedule = "constant",
    ) -> None:
        super().__init__()
        check_schedule(lr_schedule)
        self.net, self.loss = net, loss
        self.lr, self.weight_decay, self.lr_schedule = lr, weight_decay, lr_schedule
        self.losses: list[float] = []
        self._sum, self._count = torch.zeros(()), 0

    def forward(self, x: Tensor) -> Tensor:
        """Logits, ``(B, T', V)``."""
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Mean over the samples of each sample's own loss."""
        logits, labels = self.net.labelled(batch["x"], batch["y"])
        loss: Tensor = self.loss(logits, labels, reduction="mean")
        self._sum += loss.detach().cpu()
        self._count += 1
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop a run that has diverged instead of scoring noise."""
        refuse_divergence(outputs, self.global_step, self.lr)

    def on_train_epoch_end(self) -> None:
        """Keep the epoch's mean training loss."""
        mean = self._sum / max(self._count, 1)
        self.losses.append(float(mean))
        self.log("train_loss", mean)
        self._sum, self._count = torch.zeros(()), 0

    def configure_optimizers(self) -> Any:
        """AdamW on the trained parameters alone."""
        optimizer = torch.optim.AdamW(
            list(self.net.trained().values()),
            lr=self.lr,
            betas=BETAS,
            eps=EPSILON,
            weight_decay=self.weight_decay,
            fused=True,
        )
        return scheduled(self, optimizer, self.lr_schedule)


class TokenDataset(Dataset[dict[str, Any]]):
    """Samples ``{"x", "y", "index"}``; x and y ``(n, T)``."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": self.x[index], "y": self.y[index], "index": index}


def token_loader(
    x: Tensor, y: Tensor, *, batch_size: int, generator: torch.Generator
) -> DataLoader[dict[str, Any]]:
    """Batches in an order that the generator draws anew each epoch, padded to their longest row."""
    dataset = TokenDataset(x, y)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=RandomSampler(dataset, generator=generator),
        collate_fn=collate,
        # a loader draws a seed for its workers: from a generator of its own
        generator=torch.Generator().manual_seed(0),
    )


def kept_epochs(epochs: int, count: int) -> tuple[int, ...]:
    """At whose ends checkpoints are kept: ``count`` of them (or all), evenly spaced, the last too.

    Args:
        epochs: of the run, counted from 1.
        count: at least 1.
    """
    count = min(count, epochs)
    return tuple(round(epochs * (k + 1) / count) for k in range(count))


class EpochCheckpoints(pl.Callback):
    """Writes the LoRA matrices and Adam's state of them at the end of some epochs.

    Args:
        folder: where the files ``0001.safetensors`` … go, named after the epoch.
        epochs: which, counted from 1; None for all.
    """

    def __init__(self, folder: Path, epochs: Collection[int] | None = None) -> None:
        self.folder = folder
        self.epochs = epochs
        self._rates: list[float] = []

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any
    ) -> None:
        """Note the step size."""
        self._rates.append(float(optimizer.param_groups[0]["lr"]))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write one checkpoint; its step size is the mean since the one before."""
        assert isinstance(pl_module, Tuner)
        if self.epochs is not None and trainer.current_epoch + 1 not in self.epochs:
            return
        state = trainer.optimizers[0].state
        tensors: dict[str, Tensor] = {}
        updates = 0
        for name, p in pl_module.net.trained().items():
            tensors[f"param/{name}"] = p.detach().cpu().contiguous()
            tensors[f"mean/{name}"] = state[p]["exp_avg"].cpu().contiguous()
            tensors[f"square/{name}"] = state[p]["exp_avg_sq"].cpu().contiguous()
            updates = int(state[p]["step"])
        facts = {
            "lr": repr(sum(self._rates) / max(len(self._rates), 1)),
            "step": str(trainer.global_step),
            "updates": str(updates),
        }
        self._rates = []
        path = self.folder / f"{trainer.current_epoch + 1:04d}.safetensors"
        save_file(tensors, path, metadata=facts)


def read_checkpoint(path: Path) -> AdamCheckpoint:
    """One of the files of ``EpochCheckpoints``."""
    parts: dict[str, dict[str, Tensor]] = {"param": {}, "mean": {}, "square": {}}
    with safe_open(path, framework="pt") as file:
        facts = file.metadata()
        for key in file.keys():  # noqa: SIM118  (not a mapping)
            part, _, name = key.partition("/")
            parts[part][name] = file.get_tensor(key)
    return AdamCheckpoint(
        params=parts["param"],
        lr=float(facts["lr"]),
        step=int(facts["step"]),
        mean=parts["mean"],
        square=parts["square"],
        betas=BETAS,
        epsilon=EPSILON,
        updates=int(facts["updates"]),
    )
