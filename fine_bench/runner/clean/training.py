"""One run: the rows in k folds, a model on all but each, every row scored by one that has not seen
it.

A run trains k − 1 times as many rows as one training on all of them (``Recipe.folds``). The folds
are drawn anew for each run, class by class. The model that scores is the mean of the parameters
after each step of an epoch: at a constant step size that takes the noise of the last steps away
(Polyak and Juditsky 1992). A tenth of what a model may see is held out: training stops when the
mean's loss there has not fallen for some epochs, and the epoch of the lowest loss counts.
Meanwhile f-INE watches, so that a row has probabilities from the model of its own fold, and μ from
the k − 1 others, their mean. Where a model holds it out, it gives probabilities and no μ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call

from fine_bench.callback import FINECallback
from fine_bench.data.batches import loader
from fine_bench.errors import ConfigError
from fine_bench.models.classifier import DivergedError
from fine_bench.runner.clean.recipe import Recipe, build
from fine_bench.runner.fit import fit
from fine_bench.seeds import derive, stream
from fine_bench.types import UnsupportedProblemError

HELD_OUT = 0.1
_ROWS = 1024
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Run:
    """What one run says of ``n`` rows.

    Attributes:
        probabilities: ``(n, n_classes)``, of models that have not been trained on the row.
        own: ``(n, n_classes)``, of models that were trained on it, in passing or at the best epoch
            (``Recipe.own_rows``); NaN for rows that none was trained on.
        mu, std_error: ``(n,)`` f-INE on itself; NaN for the same rows, or for all.
        epochs: of each model, as trained.
        examples: rows that went through training steps, all epochs together.
        trouble: why there is no μ, or "".
    """

    probabilities: Floats
    own: Floats
    mu: Floats
    std_error: Floats
    epochs: tuple[int, ...]
    examples: int
    trouble: str = ""


def folds_of(y: NDArray[np.int64], folds: int, seed: int) -> NDArray[np.int64]:
    """0 … ``folds`` − 1 for each row, ``(n,)``, as many of each class in each as can be.

    Args:
        y: ``(n,)`` labels.
        folds: ≥ 2.
        seed: of the run; drawn from ``clean/halves``.
    """
    # the streams' names are from when all runs had two folds: those are as they were
    rng = np.random.default_rng(derive(seed, "clean/halves"))
    fold = np.zeros(len(y), dtype=np.int64)
    for label in np.unique(y):
        rows = rng.permutation(np.flatnonzero(y == label))
        fold[rows] = (np.arange(len(rows)) + rng.integers(folds)) % folds
    return fold


def whole_batches(n: int, asked: int) -> int:
    """The largest batch size up to ``asked`` that leaves no last batch of one or two rows.

    f-INE compares a row with two others of its batch at least. Without such a size, ``asked``.
    """
    sizes = (size for size in range(min(asked, n), 2, -1) if n % size not in (1, 2))
    return next(sizes, min(asked, n))


class _Watch(pl.Callback):
    """Stops early, keeps the best epoch's mean and what the model said of its own rows until then.

    The training itself goes on from its last step, as if nobody looked.
    """

    def __init__(
        self, x: Tensor, y: Tensor, said: Tensor, patience: int, advance: Callable[[], None]
    ) -> None:
        self.x, self.y, self.patience, self.advance = x, y, patience, advance
        self.said = said
        self.epochs = self.waited = 0
        self.lowest = float("inf")
        self.best: dict[str, Tensor] = {}
        self.during = self.said
        self.mean: dict[str, Tensor] = {}
        self.steps = 0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A new mean."""
        self.mean, self.steps = {}, 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the parameters after this step, and buffers, into the mean."""
        self.steps += 1
        for name, value in pl_module.state_dict().items():
            if name in self.mean and value.is_floating_point():
                self.mean[name].lerp_(value, 1.0 / self.steps)
            else:
                self.mean[name] = value.detach().clone()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the held-out rows."""
        self.epochs += 1
        loss = float(F.cross_entropy(logits_of(pl_module, self.x, self.mean), self.y))
        if not np.isfinite(loss) and not self.best:
            raise DivergedError(f"the held-out loss became {loss} in epoch {self.epochs}")
        if loss < self.lowest:
            self.lowest, self.waited = loss, 0
            self.best = self.mean
            self.during = self.said / self.epochs
        else:
            self.waited += 1
            trainer.should_stop = self.waited >= self.patience
        self.advance()


class _Hear:
    """A forward hook: the logits of training batches, which cost nothing."""

    def __init__(self) -> None:
        self.heard: Tensor | None = None

    def __call__(self, module: Any, inputs: Any, output: Any) -> None:
        if module.training and isinstance(output, Tensor):
            self.heard = output.detach()


class _Collect(pl.Callback):
    """Adds the probabilities of each training batch to its rows."""

    def __init__(self, hear: _Hear, said: Tensor) -> None:
        self.hear, self.said = hear, said

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take what was heard."""
        if self.hear.heard is not None and len(self.hear.heard) == len(batch[2]):
            self.said[batch[2].cpu()] += torch.softmax(self.hear.heard.double().cpu(), 1)
        self.hear.heard = None


def logits_of(
    module: pl.LightningModule, x: Tensor, state: Mapping[str, Tensor] | None = None
) -> Tensor:
    """Logits ``(n, n_classes)`` in evaluation mode, on the CPU; the mode stays as it was.

    Args:
        module: the model.
        x: ``(n, ...)`` inputs.
        state: parameters and buffers in the place of the module's own.
    """
    training = module.training
    module.eval()
    with torch.no_grad():
        parts = [
            _call(module, part.to(module.device), state).float().cpu()
            for part in torch.split(x, _ROWS)
        ]
    module.train(training)
    return torch.cat(parts)


def _call(module: pl.LightningModule, x: Tensor, state: Mapping[str, Tensor] | None) -> Tensor:
    if state is None:
        out: Tensor = module(x)
        return out
    # the state names a shared parameter once a place, with equal values in tensors of their own
    out = functional_call(module, dict(state), (x,), tie_weights=False)
    return out


def train_model(
    x: Tensor,
    y: Tensor,
    n_classes: int,
    trained: NDArray[np.int64],
    recipe: Recipe,
    *,
    seed: int,
    influence: bool = True,
    advance: Callable[[], None] = lambda: None,
) -> Run:
    """Train on the rows ``trained`` and score all; see ``Run``.

    Rows outside of ``trained``, and its held-out tenth, get probabilities; the others get NaN
    there, and ``own``.

    Raises:
        ConfigError: training diverges.
    """
    n = len(x)
    rng = np.random.default_rng(derive(seed, "clean/held_out"))
    order = rng.permutation(trained)
    n_held = min(max(round(HELD_OUT * len(order)), min(20, len(order) // 4), 1), len(order) - 3)
    held, seen = order[:n_held], np.sort(order[n_held:])
    said = torch.zeros(len(seen), n_classes, dtype=torch.float64)
    watch = _Watch(x[held], y[held], said, recipe.patience, advance)
    hear = _Hear()
    module = build(recipe, tuple(x.shape[1:]), n_classes, seed)
    module.register_forward_hook(hear)
    fine = FINECallback(target="self", step_weight="uncertainty", sketch=recipe.sketch)
    batches = loader(
        x[seen],
        y[seen],
        batch_size=whole_batches(len(seen), recipe.batch_size),
        generator=stream(seed, "order"),
        shuffle=True,
    )
    callbacks = [_Collect(hear, said), watch, *([fine] if influence else [])]
    try:
        fit(module, batches, epochs=recipe.epochs, seed=seed, callbacks=callbacks)
    except DivergedError as error:
        raise ConfigError(
            f"training diverged with --lr {recipe.lr:g}; use a smaller step, for instance --lr "
            f"{recipe.lr / 10:g}"
        ) from error
    module.load_state_dict(watch.best)
    unseen = np.setdiff1d(np.arange(n), seen)
    probabilities = np.full((n, n_classes), np.nan)
    probabilities[unseen] = torch.softmax(logits_of(module.cpu(), x[unseen]).double(), 1).numpy()
    own = np.full((n, n_classes), np.nan)
    own[seen] = (
        watch.during.numpy()
        if recipe.own_rows == "epochs"
        else torch.softmax(logits_of(module, x[seen]).double(), 1).numpy()
    )
    mu, uncertain = np.full(n, np.nan), np.full(n, np.nan)
    if influence:
        scores = fine.scores()
        mu[seen] = scores.values[0].double().numpy()
        if scores.std_error is not None:
            uncertain[seen] = scores.std_error[0].double().numpy()
    return Run(probabilities, own, mu, uncertain, (watch.epochs,), watch.epochs * len(seen))


def train_run(
    x: Tensor,
    y: Tensor,
    n_classes: int,
    recipe: Recipe,
    *,
    seed: int,
    influence: bool = True,
    keep: Callable[[int, Callable[[], Run]], Run] = lambda number, make: make(),
    advance: Callable[[], None] = lambda: None,
) -> Run:
    """One run on all rows; deterministic in ``seed``.

    Args:
        x, y: ``(n, ...)`` inputs and ``(n,)`` labels.
        n_classes: number of classes.
        recipe: what is trained.
        seed: of the run; each model draws from streams of its own.
        influence: whether f-INE watches.
        keep: ``keep(number, make)`` gives what ``make()`` would: a place for finished models'
            words.
        advance: called at the end of each epoch.
    """
    fold = folds_of(y.numpy(), recipe.folds, seed)

    def scored(number: int) -> Run:
        trained = np.flatnonzero(fold != (number + 1) % recipe.folds)
        own = derive(seed, f"clean/half/{number}")

        def train(watched: bool) -> Run:
            return train_model(
                x, y, n_classes, trained, recipe, seed=own, influence=watched, advance=advance
            )

        return _without_mu_if_need_be(train, influence)

    found = [keep(number, partial(scored, number)) for number in range(recipe.folds)]
    whole = joined(found)
    if whole.trouble:  # with one, so the others' μ would be of the same model
        nothing = np.full(len(x), np.nan)
        return replace(whole, mu=nothing, std_error=nothing)
    return whole


def _without_mu_if_need_be(train: Callable[[bool], Run], influence: bool) -> Run:
    """A model of the user's may have no per-example gradients: then all but μ is measured.

    Args:
        train: trains, with f-INE or without.
        influence: whether it is asked for.
    """
    try:
        return train(influence)
    except UnsupportedProblemError as error:
        if not influence:
            raise
        return replace(train(False), trouble=str(error))


def joined(parts: list[Run]) -> Run:
    """Several as one run: where more than one has something to say of a row, their mean."""

    def mean(arrays: list[Floats]) -> Floats:
        stacked = np.stack(arrays)
        known = ~np.isnan(stacked)
        count = known.sum(axis=0)
        total = np.where(known, stacked, 0.0).sum(axis=0)
        return np.asarray(np.where(count > 0, total / np.maximum(count, 1), np.nan))

    return Run(
        mean([part.probabilities for part in parts]),
        mean([part.own for part in parts]),
        mean([part.mu for part in parts]),
        mean([part.std_error for part in parts]),
        tuple(n for part in parts for n in part.epochs),
        sum(part.examples for part in parts),
        next((part.trouble for part in parts if part.trouble), ""),
    )
