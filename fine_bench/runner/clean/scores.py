"""Scoring a user's own labelled data in one training run, and saying what the flags mean.

A model is trained once on all rows as they are, the trusted among them, and every row gets a
suspicion; ``error_rate`` turns it into flags. The command is in ``clean``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from baselines.controls import MeanTrainingLoss
from baselines.trajectory_controls import AUM
from fine_bench.callback import FINECallback
from fine_bench.data.batches import loader
from fine_bench.errors import ConfigError
from fine_bench.estimator import InfluenceEstimator, replay
from fine_bench.metrics.error_rate import Flags, Vector
from fine_bench.models.classifier import Classifier, DivergedError
from fine_bench.models.networks import cnn, mlp
from fine_bench.runner.clean.data_files import LabelledData
from fine_bench.runner.fit import fit
from fine_bench.seeds import derive, stream
from fine_bench.theory.false_discovery import trusted_size_needed
from fine_bench.types import Checkpoint, Problem

MODELS: Mapping[str, Callable[..., nn.Module]] = {"mlp": mlp, "cnn": cnn}
REPLAYED: Mapping[str, type[InfluenceEstimator]] = {"mean_loss": MeanTrainingLoss, "aum": AUM}
METHODS = ("fine", *REPLAYED)
_SMALLEST_IMAGE = 4


@dataclass(frozen=True, eq=False)
class Scored:
    """What one training run says of every row.

    Attributes:
        suspicion: ``(n,)``, high for suspicious.
        probabilities: ``(n, n_classes)``, mean over the ends of the epochs.
        accuracy: share of the given labels that the trained model predicts.
    """

    suspicion: Vector
    probabilities: NDArray[np.float64]
    accuracy: float


class _Epochs(pl.Callback):
    """Keeps the network's parameters at the end of every epoch."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self.checkpoints: list[Checkpoint] = []
        self.advance = advance

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Copy them."""
        assert isinstance(pl_module, Classifier)
        params = {k: v.detach().cpu().clone() for k, v in pl_module.net.state_dict().items()}
        lr = float(trainer.optimizers[0].param_groups[0]["lr"])
        self.checkpoints.append(Checkpoint(params, lr, trainer.global_step))
        self.advance(len(self.checkpoints))


def build_network(model: str, x: Tensor, n_classes: int) -> nn.Module:
    """A fresh network for inputs ``x (n, ...)``.

    Raises:
        ConfigError: a convolutional network for data that are not images.
    """
    shape = tuple(x.shape[1:])
    if model == "cnn":
        if len(shape) == 2:
            shape = (1, *shape)
        if len(shape) != 3 or min(shape[1:]) < _SMALLEST_IMAGE:
            raise ConfigError(
                f"--model cnn needs images (n, height, width) or (n, channels, height, width) of "
                f"at least {_SMALLEST_IMAGE} × {_SMALLEST_IMAGE} pixels, got inputs of shape "
                f"{tuple(x.shape)}; use --model mlp"
            )
    return MODELS[model](shape, n_classes)


def score(
    x: Tensor,
    y: Tensor,
    n_classes: int,
    *,
    method: str = "fine",
    model: str = "mlp",
    epochs: int = 30,
    batch_size: int = 64,
    lr: float = 0.05,
    seed: int = 0,
    advance: Callable[[int], None] = lambda _: None,
) -> Scored:
    """Train once on all rows and score each by how it went through training.

    Plain SGD on the mean cross-entropy. ``fine`` watches every step; the others read the network
    at the end of each epoch. The result depends on the arguments only.

    Args:
        x: ``(n, ...)`` float32, standardised.
        y: ``(n,)`` int64 in 0 … n_classes - 1.
        n_classes: number of classes.
        method: ``"fine"`` (f-INE of each row on itself), ``"mean_loss"`` or ``"aum"``.
        model: ``"mlp"`` or ``"cnn"``.
        epochs, batch_size, lr, seed: of the training.
        advance: called after each epoch with the number of epochs done.

    Raises:
        ConfigError: an impossible model, or a step size at which training diverges.
    """
    if model == "cnn" and x.ndim == 3:
        x = x[:, None]
    with torch.random.fork_rng():
        torch.manual_seed(derive(seed, "initialisation"))
        net = build_network(model, x, n_classes)
    keep = _Epochs(advance)
    callbacks: list[pl.Callback] = [keep]
    watcher = FINECallback(target="self")
    if method == "fine":
        callbacks.append(watcher)
    batches = loader(
        x, y, batch_size=min(batch_size, len(x)), generator=stream(seed, "order"), shuffle=True
    )
    try:
        module = Classifier(net, n_classes, lr=lr)
        fit(module, batches, epochs=epochs, seed=seed, callbacks=callbacks)
    except DivergedError as error:
        raise ConfigError(
            f"training diverged with --lr {lr:g}; use a smaller step, for instance --lr {lr / 10:g}"
        ) from error
    net = net.cpu()
    problem = Problem(net, F.cross_entropy, TensorDataset(x, y), "self")
    if method == "fine":
        scores = watcher.scores()
    else:
        scores = replay(REPLAYED[method](), problem, keep.checkpoints)
    total = torch.zeros(len(x), n_classes, dtype=torch.float64)
    net.eval()
    with torch.no_grad():
        for checkpoint in keep.checkpoints:
            net.load_state_dict(dict(checkpoint.params))
            logits = torch.cat([net(part).double() for _, part, _ in problem.batches("train")])
            total += torch.softmax(logits, 1)
    accuracy = float((logits.argmax(1) == y).double().mean())
    return Scored(
        scores.values[0].cpu().double().numpy(),
        (total / len(keep.checkpoints)).numpy(),
        accuracy,
    )


def suggestions(probabilities: NDArray[np.float64], y: NDArray[Any]) -> NDArray[np.int64]:
    """The most probable class besides the given one, ``(n,)``."""
    others = probabilities.copy()
    others[np.arange(len(y)), y] = -1.0
    return np.asarray(others.argmax(axis=1), dtype=np.int64)


def result(data: LabelledData, scored: Scored, flags: Flags, every: bool = False) -> pd.DataFrame:
    """The flagged rows (or every row) by p-value, the most suspicious first; trusted last.

    Columns: ``index`` (row, from 0), ``given_label``, ``score`` (high is suspicious),
    ``p_value``, ``adjusted_p`` (the smallest level at which the row would be flagged) and
    ``suggested_label``; with ``every`` also ``flagged`` and ``trusted``.
    """
    y = data.y.numpy()
    guess = suggestions(scored.probabilities, y)
    table = pd.DataFrame(
        {
            "index": np.arange(len(y)),
            "given_label": [data.classes[k] for k in y],
            "score": scored.suspicion,
            "p_value": flags.p_values,
            "adjusted_p": flags.adjusted,
            "suggested_label": [data.classes[k] for k in guess],
        }
    )
    if every:
        table["flagged"], table["trusted"] = flags.flagged, flags.trusted
    else:
        table = table[flags.flagged]
    return table.sort_values(
        ["p_value", "score", "index"], ascending=[True, False, True], na_position="last"
    )


def explain(flags: Flags) -> list[str]:
    """What the flags mean, in sentences."""
    n, m, level = flags.n_trusted, flags.n_tested, flags.level
    lines = []
    if flags.n_flagged:
        lines.append(
            f"Of rows flagged like this, at most {100 * level:g} % are right after all, on "
            "average over the choice of the trusted rows; a single use may do worse. It holds if "
            "the trusted rows are a random draw from the correct ones: hand-picked, typical rows "
            "make it flag more than it should."
        )
    else:
        lines.append(
            f"Nothing is flagged at level {level:g}: no row stands out enough from the trusted "
            f"ones. The smallest adjusted p-value is {np.nanmin(flags.adjusted):.3g}. This does "
            "not show that the labels are right."
        )
    few = max(m // 100, 1)
    if flags.least > few:
        lines.append(
            f"With {n} trusted rows at level {level:g}, either none or at least {flags.least} of "
            f"{m} rows can be flagged; to find as few as {few}, "
            f"{trusted_size_needed(level, m, few)} trusted rows are needed."
        )
    return lines


def warnings_of(data: LabelledData, scored: Scored) -> list[str]:
    """What the user should know about these data."""
    lines = []
    if data.single:
        names = ", ".join(map(str, data.single[:10]))
        lines.append(
            f"{len(data.single)} label(s) occur only once ({names}): a model cannot learn a class "
            "from one row, so such a row looks suspicious whether it is right or wrong. Add "
            "rows, or drop it."
        )
    y = data.y.numpy()
    odd = np.flatnonzero(data.trusted & (scored.probabilities.argmax(axis=1) != y))
    if len(odd):
        lines.append(
            f"{len(odd)} of {int(data.trusted.sum())} trusted rows look wrong to the model, the "
            f"first {', '.join(map(str, odd[:10]))}. Wrong trusted rows hide wrong rows "
            "elsewhere: look at them again. Take out only what is wrong, not what is merely "
            "unusual, or more is flagged than should be."
        )
    return lines
