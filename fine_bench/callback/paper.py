"""The paper's estimator in anybody's Trainer; formulas are in ``fine.subset_test``.

callback = PaperFINECallback("self", sample=300, subsets={"group": [3, 14, 15]}, auxiliary=None)
Trainer(callbacks=[callback]).fit(module, loader)
callback.results()                              # one line a subset
callback.scores().values                        # (1, n_train), of the sampled examples

With the paper's auxiliary run, train twice:

helper = PaperFINECallback("self", sample=300)
Trainer(callbacks=[helper]).fit(module_of_another_seed, loader_of_another_order)
callback = PaperFINECallback("self", sample=300, auxiliary_signal=helper.signal())
Trainer(callbacks=[callback]).fit(module, loader)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import torch

from fine_bench.callback.base import InRunMethod, WatchedRun, built_from
from fine_bench.callback.trainer import AROUND, training_data
from fine_bench.fine import subset_test
from fine_bench.fine.aside import beside_training, own_randomness
from fine_bench.fine.geometry import Euclidean
from fine_bench.fine.passes import Passes, QueryDirections
from fine_bench.fine.setup import refuse_private
from fine_bench.fine.subset_options import SubsetOptions
from fine_bench.fine.subset_sampler import SubsetSampler
from fine_bench.fine.subset_samples import PaperAccumulator, Signal
from fine_bench.fine.subset_test import (
    PaperResult,
    SubsetInfluence,
)
from fine_bench.fine.subsets import (
    members_per_batch,
)
from fine_bench.fine.training_data import read_queries
from fine_bench.gradients.engine import GradientEngine
from fine_bench.types import (
    InfluenceScores,
    Target,
    UnsupportedProblemError,
)

if TYPE_CHECKING:
    import pytorch_lightning as pl


class PaperFINECallback(InRunMethod):
    """Measures batches with and without each subset while a model trains.

    The measured batches come from a random stream of their own, and the training batches stay
    what they are: the weights are bit-identical with and without. The training data must give the
    same example for the same position each time (no random augmentation), and positions are those
    of the training DataLoader's dataset.

    Its arguments are the fields of ``fine_bench.fine.subset_options.SubsetOptions``, which says
    what they mean. ``auxiliary_signal`` may also be set after the run, as an attribute.

    Raises:
        ValueError: bad arguments; subsets that no batch can include or leave out.
        UnsupportedProblemError: the margin does not exist for the model's output.
    """

    name = "fine_paper"
    version = subset_test.VERSION

    @built_from(SubsetOptions)
    def __init__(self, options: SubsetOptions) -> None:
        self.options = options
        self.auxiliary_signal = options.auxiliary_signal
        super().__init__(
            about={"queries": options.queries, "layers": options.layers},
            target=options.target,
            observable=options.observable,
            sample=options.sample,
            subsets=sorted(options.subsets or {}),
        )
        self._sampler: SubsetSampler | None = None
        self._result: tuple[Any, PaperResult] | None = None

    # ------------------------------------------------------------------ what a run asks

    @classmethod
    def needs(cls, target: Target, options: Mapping[str, Any], run: WatchedRun) -> dict[str, Any]:
        """The queries, and the task's groups as subsets besides those of the options."""
        subsets = {**run.groups, **(options.get("subsets") or {})}
        return super().needs(target, options, run) | {"subsets": subsets}

    def check(self, run: WatchedRun) -> None:
        """Refuse what a training set of such a length in such batches makes impossible.

        Raises:
            ValueError: what ``on_train_start`` would raise, before anything is trained.
        """
        options, n = self.options, run.n_train
        watched = options.watch(n, lambda: torch.zeros(n, dtype=torch.int64))
        members_per_batch(watched, options.batch_size or run.batch_size, options.members)

    def metrics(self) -> dict[str, float]:
        """``group/<name>/<number>``; ``index`` is the group's number in the scores' traces."""
        return {
            f"group/{line.name}/{name}": value
            for index, line in enumerate(self.group_results())
            for name, value in [("index", float(index)), *line.numbers().items()]
        }

    def auxiliary(self) -> bool:
        """Whether the signal of a second run is subtracted."""
        return self.options.auxiliary is not None

    def subtract(self, other: Self) -> None:
        """Subtract the signal that ``other`` saw in a second run."""
        self.auxiliary_signal = other.signal()

    # ------------------------------------------------------------------ results

    def scores(self) -> InfluenceScores:
        """The sampled single examples, ``(1, n_train)``; see ``subset_test.to_scores``."""
        return subset_test.to_scores(
            self._evaluated(), self._accumulator, self._subtracted(), target=self.options.target
        )

    def results(self) -> tuple[SubsetInfluence, ...]:
        """One line a subset: the single examples in ascending order, then the groups."""
        return self._evaluated().subsets

    def group_results(self) -> tuple[SubsetInfluence, ...]:
        """The lines of the groups alone."""
        lines = self.results()
        return lines[len(self._accumulator.subsets.singles) :]

    def signal(self) -> Signal:
        """This run's signal, for another run to subtract: ``auxiliary_signal=helper.signal()``."""
        return self._accumulator.signal()

    @property
    def gradient_evaluations(self) -> int:
        """Per-example gradients taken beside those of the training."""
        return 0 if self._sampler is None else self._sampler.passes.evaluations

    @property
    def _accumulator(self) -> PaperAccumulator:
        accumulator: PaperAccumulator = self._require()
        return accumulator

    def _subtracted(self) -> Signal | None:
        if self.options.auxiliary is not None and self.auxiliary_signal is None:
            raise RuntimeError(
                'auxiliary="reseed" subtracts the signal of a second run: train another model of '
                "the same kind on the same data with PaperFINECallback of the same subsets, set "
                "auxiliary_signal=helper.signal() here; or do without by auxiliary=None"
            )
        return self.auxiliary_signal

    def _evaluated(self) -> PaperResult:
        accumulator, auxiliary = self._accumulator, self._subtracted()
        state = (accumulator, len(accumulator.steps), auxiliary)
        if self._result is None or self._result[0] != state:
            result = subset_test.evaluate(
                accumulator,
                selection=self.options.selection,
                auxiliary=auxiliary,
                level=self.options.level,
                seed=self.options.seed,
            )
            self._result = (state, result)
        return self._result[1]

    # ------------------------------------------------------------------ Lightning events

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the data and lay out the subsets."""
        self._forget()
        self._sampler = None
        with self._timed():
            self._begin(trainer, pl_module)

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.world_size != 1:
            raise UnsupportedProblemError(
                f"training on {trainer.world_size} processes is not supported yet; use devices=1"
            )
        refuse_private(pl_module, trainer.optimizers)
        options = self.options
        data = training_data(trainer, pl_module, "PaperFINECallback")
        size = options.batch_size or getattr(trainer.train_dataloader, "batch_size", None)
        if size is None:
            raise ValueError(
                "the training DataLoader has no batch_size; pass batch_size=… to PaperFINECallback"
            )
        m = size if options.batch_size else size * trainer.accumulate_grad_batches
        with own_randomness():
            watched = options.watch(data.n, data.labels)
        members = members_per_batch(watched, m, options.members)
        queries = None
        if options.queries is not None:
            x, y = read_queries(options.queries, pl_module.device)
            weighting, observable = options.query_weighting, options.observable
            queries = QueryDirections(x, y, "mean", weighting, observable)
        self._sampler = SubsetSampler(
            Passes(
                self._make_engine(pl_module),
                data,
                Euclidean(),
                queries,
                lambda: beside_training(pl_module),
            ),
            watched,
            members,
            m,
            options,
        )
        self._start_with(PaperAccumulator(watched))
        self._last_step = self._epoch_began_at = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Every k-th update: measure at the parameters that the next step starts from."""
        step = trainer.global_step
        if step == self._last_step:
            return  # gradients are still being accumulated
        self._last_step = step
        accumulator = self._accumulator
        accumulator.n_steps = step
        if step % self.options.every_n_steps:
            return
        assert self._sampler is not None
        with self._timed():
            if not accumulator.observe(step, self._sampler.measure(step)):
                self._warn_not_finite(step, "the f-INE samples")

    def state_dict(self) -> dict[str, Any]:
        """State for Lightning's checkpoints."""
        if self._observed is None:
            return {}
        return {"accumulator": self._observed.state_dict(), "question": self.question}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after an interruption; see ``InRunMethod.load_state_dict``."""
        super().load_state_dict(state_dict)
        self._saved = state_dict.get("accumulator")

    def _nothing_seen(self, trainer: pl.Trainer) -> str:
        moved, self._epoch_began_at = (
            trainer.global_step > self._epoch_began_at,
            trainer.global_step,
        )
        return "" if moved else AROUND

    def _make_engine(self, pl_module: pl.LightningModule) -> GradientEngine:
        """What takes the gradients of a model."""
        options = self.options
        forward = options.forward or (lambda module, x: module(x))
        return GradientEngine(
            pl_module, self.options.loss, self.options.layers, lambda x: forward(pl_module, x)
        )

    def _close(self) -> None:
        if self._sampler is not None:
            self._sampler.passes.close()


__all__ = ["PaperFINECallback"]
