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

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import Dataset

from fine_bench.callback.base import InRunMethod, WatchedRun
from fine_bench.callback.trainer import beside_training, parameter_dtype, training_set
from fine_bench.fine import subset_test
from fine_bench.fine.effects import Observable, choose
from fine_bench.fine.geometry import Euclidean
from fine_bench.fine.passes import Passes, QueryDirections
from fine_bench.fine.subset_samples import PaperAccumulator, Signal, SubsetSampler
from fine_bench.fine.subset_test import (
    Auxiliary,
    PaperResult,
    PaperTarget,
    Selection,
    SubsetInfluence,
)
from fine_bench.fine.subsets import (
    Column,
    Members,
    Subsets,
    members_per_batch,
    watch,
)
from fine_bench.fine.training_data import TrainingData, read_queries
from fine_bench.gradients.engine import GradientEngine
from fine_bench.gradients.query_weighting import check_weighting
from fine_bench.types import (
    InfluenceScores,
    Loss,
    QueryWeighting,
    Target,
    UnsupportedProblemError,
    dataset_size,
)


class PaperFINECallback(InRunMethod):
    """Measures batches with and without each subset while a model trains.

    The measured batches come from a random stream of their own, and the training batches stay
    what they are: the weights are bit-identical with and without. The training data must give the
    same example for the same position each time (no random augmentation), and positions are those
    of the training DataLoader's dataset.

    Args:
        target: ``"self"``: the mean observable of the subset's own members; ``"validation"``: that
            of the queries.
        observable: ``"margin"``, h = −log(p/(1−p)), or ``"loss"``.
        queries: dataset of ``(x, y)`` for ``"validation"``.
        subsets: name → positions or boolean mask ``(n_train,)``.
        groups: one label a training example, ``(n_train,)``; each value is a subset.
        sample: number of single examples to watch, drawn by given label; None for none.
        sample_seed: of that draw, the same for all runs that are to be compared.
        every_n_steps: update steps between two measured ones, ≥ 1. The paper measures every step
            (1); the cost is one pass over pool and watched examples each time.
        members: k, the members of a group in a P batch; None for max(1, round(m·|S|/n)).
        selection: ``"split"`` or ``"max"`` (the published rule); see ``fine.subset_test``.
        auxiliary: ``"reseed"``: subtract the signal of a second run on the same data with other
            randomness, given as ``auxiliary_signal``; None: test the signals as they are.
        auxiliary_signal: ``signal()`` of the other run; may also be set after the run, as an
            attribute.
        query_weighting: weights of the queries, ``"noise"``, ``"norm"`` or None.
        refresh_every: update steps between two computations of the queries' gradients, ≥ 1.
        seed: of the measurement batches, ≥ 0.
        batch_size: m of the measured batches, ≥ 2; None for that of the training batches.
        pool: examples drawn a step, shared by all subsets; None for 4·m.
        target_members: members over which a group's own observable is averaged at one step, drawn
            anew each time and independently of those in the P batch.
        level: coverage of the intervals.
        layers: names of modules to differentiate; None for all.
        forward: ``forward(module, x) -> logits``; ``module(x)`` by default.
        loss: the training loss, per example.

    Raises:
        ValueError: bad arguments; subsets that no batch can include or leave out.
        UnsupportedProblemError: the margin does not exist for the model's output.
    """

    name = "fine_paper"
    version = subset_test.VERSION

    def __init__(
        self,
        target: PaperTarget = "self",
        observable: Observable = "margin",
        *,
        queries: Dataset[Any] | None = None,
        subsets: Mapping[str, Members] | None = None,
        groups: Column | None = None,
        sample: int | None = None,
        sample_seed: int = 0,
        every_n_steps: int = 10,
        members: int | None = None,
        selection: Selection = "split",
        auxiliary: Auxiliary = "reseed",
        auxiliary_signal: Signal | None = None,
        query_weighting: QueryWeighting = "noise",
        refresh_every: int = 20,
        seed: int = 0,
        batch_size: int | None = None,
        pool: int | None = None,
        target_members: int = 32,
        level: float = 0.95,
        layers: Sequence[str] | None = None,
        forward: Callable[[pl.LightningModule, Tensor], Tensor] | None = None,
        loss: Loss = F.cross_entropy,
    ) -> None:
        if target in ("queries", "validation_per_class"):
            raise UnsupportedProblemError(
                f"target={target!r} would need P and Q batches for every pair of subset and row; "
                'the paper\'s estimator serves "self" and "validation"'
            )
        choose(target, PaperTarget, "target")
        choose(observable, Observable, "observable")
        choose(selection, Selection, "selection")
        if auxiliary == "without_subset":
            raise NotImplementedError(
                'auxiliary="without_subset" needs one more training for every subset, on data '
                'without it, which no callback of this run can do; use auxiliary="reseed" (one '
                "more training for all subsets) or None"
            )
        if auxiliary not in ("reseed", None):
            raise ValueError(f'auxiliary must be "reseed" or None, got {auxiliary!r}')
        if auxiliary is None and auxiliary_signal is not None:
            raise ValueError('auxiliary_signal is given, but auxiliary=None; use "reseed"')
        check_weighting(query_weighting)
        if (queries is None) != (target == "self"):
            raise ValueError(
                f"target={target!r} "
                + ("takes no queries; leave them out" if target == "self" else "needs queries=…")
            )
        if queries is not None:
            dataset_size(queries, "queries")
        if subsets is None and groups is None and sample is None:
            raise ValueError(
                "nothing to watch: pass sample=300 for single examples, subsets={name: "
                "positions}, or groups=(one label a training example)"
            )
        for option, value, least in (
            ("every_n_steps", every_n_steps, 1),
            ("refresh_every", refresh_every, 1),
            ("target_members", target_members, 1),
            ("sample", 1 if sample is None else sample, 1),
            ("members", 1 if members is None else members, 1),
            ("batch_size", 2 if batch_size is None else batch_size, 2),
            ("pool", 1 if pool is None else pool, 1),
            ("seed", seed, 0),
            ("sample_seed", sample_seed, 0),
        ):
            if value < least:
                raise ValueError(f"{option} must be at least {least}, got {value}")
        if not 0.0 < level < 1.0:
            raise ValueError(f"level must lie strictly between 0 and 1, got {level}; try 0.95")
        self.target: PaperTarget = target
        self.observable: Observable = observable
        self.queries = queries
        self.subsets, self.groups = subsets, groups
        self.sample, self.sample_seed = sample, sample_seed
        self.every_n_steps = every_n_steps
        self.members = members
        self.selection: Selection = selection
        self.auxiliary_run: Auxiliary = auxiliary
        self.auxiliary_signal = auxiliary_signal
        self.query_weighting: QueryWeighting = query_weighting
        self.refresh_every = refresh_every
        self.seed = seed
        self.batch_size, self.pool, self.target_members = batch_size, pool, target_members
        self.level = level
        self.layers = layers
        self.forward = forward or (lambda module, x: module(x))
        self.loss = loss
        super().__init__(
            target=target, observable=observable, sample=sample, subsets=sorted(subsets or {})
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
        watched = self._watch(run.n_train, lambda: torch.zeros(run.n_train, dtype=torch.int64))
        members_per_batch(watched, self.batch_size or run.batch_size, self.members)

    def metrics(self) -> dict[str, float]:
        """``group/<name>/<number>``; ``index`` is the group's number in the scores' traces."""
        return {
            f"group/{line.name}/{name}": value
            for index, line in enumerate(self.group_results())
            for name, value in [("index", float(index)), *line.numbers().items()]
        }

    def auxiliary(self) -> bool:
        """Whether the signal of a second run is subtracted."""
        return self.auxiliary_run is not None

    def subtract(self, other: Self) -> None:
        """Subtract the signal that ``other`` saw in a second run."""
        self.auxiliary_signal = other.signal()

    def _watch(self, n_train: int, labels: Callable[[], Tensor]) -> Subsets:
        return watch(
            n_train,
            labels,
            subsets=self.subsets,
            groups=self.groups,
            sample=self.sample,
            sample_seed=self.sample_seed,
        )

    # ------------------------------------------------------------------ results

    def scores(self) -> InfluenceScores:
        """The sampled single examples, ``(1, n_train)``; see ``fine_paper.to_scores``."""
        return subset_test.to_scores(
            self._evaluated(), self._accumulator, self._subtracted(), target=self.target
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
        if self.auxiliary_run is not None and self.auxiliary_signal is None:
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
                selection=self.selection,
                auxiliary=auxiliary,
                level=self.level,
                seed=self.seed,
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
        loader, dataset = trainer.train_dataloader, training_set(trainer, "PaperFINECallback")
        n = dataset_size(dataset, "the training set")
        data = TrainingData(
            dataset,
            getattr(loader, "collate_fn", None),
            device=pl_module.device,
            dtype=parameter_dtype(pl_module),
        )
        size = self.batch_size or getattr(loader, "batch_size", None)
        if size is None:
            raise ValueError(
                "the training DataLoader has no batch_size; pass batch_size=… to PaperFINECallback"
            )
        m = size if self.batch_size else size * trainer.accumulate_grad_batches
        with isolate_rng():
            watched = self._watch(n, data.labels)
        members = members_per_batch(watched, m, self.members)
        queries = None
        if self.queries is not None:
            x, y = read_queries(self.queries, pl_module.device)
            queries = QueryDirections(x, y, "mean", self.query_weighting, self.observable)
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
            observable=self.observable,
            pool_size=self.pool or 4 * m,
            target_members=self.target_members,
            refresh_every=self.refresh_every,
            seed=self.seed,
        )
        self._start_with(PaperAccumulator(watched))
        self._last_step = trainer.global_step

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
        if step % self.every_n_steps:
            return
        assert self._sampler is not None
        with self._timed():
            if not accumulator.observe(step, self._sampler.measure(step)):
                self._warn_not_finite(step, "the f-INE samples")

    def state_dict(self) -> dict[str, Any]:
        """State for Lightning's checkpoints."""
        return {} if self._observed is None else {"accumulator": self._observed.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after an interruption."""
        super().load_state_dict(state_dict.get("accumulator", {}))

    def _make_engine(self, pl_module: pl.LightningModule) -> GradientEngine:
        """What takes the gradients of a model."""
        return GradientEngine(
            pl_module, self.loss, self.layers, lambda x: self.forward(pl_module, x)
        )

    def _close(self) -> None:
        if self._sampler is not None:
            self._sampler.passes.close()


__all__ = ["PaperFINECallback"]
