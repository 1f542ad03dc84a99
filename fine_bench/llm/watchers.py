"""f-INE for sequences: the project's callbacks with a sequence loss and the loss as observable.

The margin log(p/(1−p)) belongs to one class label; an answer of many tokens has no such number, so
the observable is the sample's loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import pytorch_lightning as pl
from torch.utils.data import Dataset

from fine_bench.callback import FINECallback
from fine_bench.callback.paper import PaperFINECallback
from fine_bench.fine.effects import Composition, Contrast
from fine_bench.fine.subsets import Members
from fine_bench.gradients.engine import GradientEngine
from fine_bench.llm.net import CausalNet
from fine_bench.llm.task import LOSSES, LossName
from fine_bench.types import QueryWeighting, Target, UnsupportedProblemError


class SequenceFINE(FINECallback):
    """f-INE for every sample; see ``FINECallback``.

    Args:
        target, composition, schedule, contrast: as there.
        queries, query_weighting, refresh_every, every_n_steps, n_snapshots: as there.
        loss: the training loss: the ``mean`` or the ``sum`` over a sample's tokens.
    """

    name = "fine"

    def __init__(
        self,
        target: Target = "self",
        composition: Composition = "accumulated",
        schedule: Literal["in_batch", "snapshot"] = "in_batch",
        *,
        contrast: Contrast = "substitution",
        queries: Dataset[Any] | None = None,
        query_weighting: QueryWeighting = "noise",
        refresh_every: int = 10,
        every_n_steps: int | None = None,
        n_snapshots: int | None = None,
        loss: LossName = "mean",
    ) -> None:
        super().__init__(
            target,
            observable="loss",
            composition=composition,
            schedule=schedule,
            contrast=contrast,
            queries=queries,
            query_weighting=query_weighting,
            refresh_every=refresh_every,
            every_n_steps=every_n_steps,
            n_snapshots=n_snapshots,
            loss=LOSSES[loss],
        )


class SequencePaperFINE(PaperFINECallback):
    """The paper's estimator: does a source of samples move the loss of the queries?

    Args:
        target: ``"validation"`` only: what sources are asked about is the query set.
        queries, subsets, sample, sample_seed, every_n_steps: see ``PaperFINECallback``.
        batch_size, members, selection, auxiliary: see there.
        query_weighting, refresh_every, seed: see there.
        loss: the training loss: the ``mean`` or the ``sum`` over a sample's tokens.

    Raises:
        UnsupportedProblemError: another target.
    """

    name = "fine_paper"

    def __init__(
        self,
        target: Target = "validation",
        *,
        queries: Dataset[Any] | None = None,
        subsets: Mapping[str, Members] | None = None,
        sample: int | None = None,
        sample_seed: int = 0,
        every_n_steps: int = 10,
        batch_size: int | None = None,
        members: int | None = None,
        selection: Literal["split", "max"] = "split",
        auxiliary: Literal["reseed"] | None = None,
        query_weighting: QueryWeighting = "noise",
        refresh_every: int = 10,
        seed: int = 0,
        loss: LossName = "mean",
    ) -> None:
        if target != "validation":
            raise UnsupportedProblemError(
                "asks what a source does to the queries; type 'targets=[validation]'"
            )
        super().__init__(
            target,
            observable="loss",
            queries=queries,
            subsets=subsets,
            sample=sample,
            sample_seed=sample_seed,
            every_n_steps=every_n_steps,
            batch_size=batch_size,
            members=members,
            selection=selection,
            auxiliary=auxiliary,
            query_weighting=query_weighting,
            refresh_every=refresh_every,
            seed=seed,
            loss=LOSSES[loss],
        )

    def _make_engine(self, pl_module: pl.LightningModule) -> GradientEngine:
        """Where the model has its own kind of engine, that one."""
        net = getattr(pl_module, "net", None)
        if isinstance(net, CausalNet):
            return net.gradient_engine(self.options.loss, self.options.layers)
        return super()._make_engine(pl_module)
