"""Which model is trained, and how: one for each kind of data, or the user's own."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypeAlias

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from fine_bench.errors import ConfigError
from fine_bench.models.classifier import Classifier
from fine_bench.models.networks import cnn, gn_cnn, mlp
from fine_bench.runner.clean.inputs.items import Kind
from fine_bench.seeds import derive

_GN_SIDE = 16
"""From here on an image survives the three halvings of ``gn_cnn``."""
_CNN_SIDE = 4
_SMALL = 32
"""Rows of a step of the cheap models: half the epochs do, and the mean of the epoch is calm."""
OwnRows: TypeAlias = Literal["epochs", "best"]
MAKES = "(in_shape, n_classes) and returns a torch.nn.Module or a LightningModule"


def _linear(in_shape: Sequence[int], n_classes: int) -> nn.Module:
    return mlp(in_shape, n_classes, hidden=())


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Attributes:
        name: of the model, for people.
        make: ``make(in_shape, n_classes)`` gives a fresh one.
        lr, momentum: of SGD, where the model is no LightningModule.
        batch_size: rows of a step.
        epochs: at most so many; early stopping ends most trainings before.
        patience: epochs without a better held-out loss before training stops.
        folds: parts of a run, ≥ 2: each row is scored by the model that was trained on the others.
        own_rows: which words of a model on the rows that it was trained on count: ``"epochs"``,
            what it said in passing, mean over the epochs up to the best one; ``"best"``, what the
            model of the best epoch says, the one that scores the others.
        sketch: combinations that f-INE sketches convolutions with; None for exact products.
    """

    name: str
    make: Callable[[Sequence[int], int], nn.Module]
    lr: float = 0.05
    momentum: float = 0.0
    batch_size: int = 64
    epochs: int = 40
    patience: int = 3
    folds: int = 2
    own_rows: OwnRows = "epochs"
    sketch: int | None = None


def recipe_for(kind: Kind, in_shape: Sequence[int]) -> Recipe:
    """The model for a kind of data.

    Images: a convolutional network, with group normalisation from 16 pixels on. Tables and arrays:
    one hidden layer of 256. Texts: a linear layer on their TF–IDF vectors, or on an encoder's.

    A convolutional network learns from every further image, so its runs have three folds, in which
    a model trains on two thirds of the rows; one such run finds more than two of two folds, for
    about as much work. Its weights are shared between places, so that at the best epoch it has
    learnt hardly a row by heart, and what it says of its own rows then tells more of their labels
    than what it said on the way (``scoring`` has what was measured). The others have learnt some
    by heart: of them the mean over the epochs counts.
    """
    if kind == "text":
        return Recipe("linear", _linear, momentum=0.9, batch_size=_SMALL, patience=2)
    if kind == "images" and len(in_shape) == 3 and min(in_shape[1:]) >= _GN_SIDE:
        return Recipe("gn_cnn", gn_cnn, momentum=0.9, folds=3, own_rows="best", sketch=16)
    if kind == "images" and len(in_shape) == 3 and min(in_shape[1:]) >= _CNN_SIDE:
        return Recipe("cnn", cnn, folds=3, own_rows="best", sketch=16)
    return Recipe("mlp", mlp, batch_size=64 if kind == "images" else _SMALL)


NAMED: dict[str, Callable[[Sequence[int], int], nn.Module]] = {
    "linear": _linear, "mlp": mlp, "cnn": cnn, "gn_cnn": gn_cnn,
}  # fmt: skip


def own_recipe(base: Recipe, model: Any, x: Tensor, n_classes: int) -> Recipe:
    """The recipe with another model: one of ``NAMED``, an import path, or a function itself.

    The function is called once here, to see that it gives what is needed.

    Args:
        base: what it is changed from; optimiser and batches stay.
        model: ``"mlp"`` …, ``"package.module:name"``, or a function or class of
            ``(in_shape, n_classes)``.
        x: ``(n, ...)`` inputs.
        n_classes: number of classes.

    Raises:
        ConfigError: it cannot be imported or called, or gives no such model.
    """
    if isinstance(model, str):
        make, name = (NAMED[model] if model in NAMED else _imported(model)), model
    else:
        make, name = model, getattr(model, "__name__", type(model).__name__)
    if not callable(make):
        raise ConfigError(f"--model {name} is a {type(make).__name__}; name a function that takes "
                          f"{MAKES}")  # fmt: skip
    convolutional = name in ("cnn", "gn_cnn")
    recipe = replace(
        base,
        name=name,
        make=make,
        folds=3 if convolutional else 2,
        own_rows="best" if convolutional else "epochs",
        sketch=16 if convolutional else None,
    )
    try:
        probe = build(recipe, tuple(x.shape[1:]), n_classes, seed=0)
        probe.eval()
        with torch.no_grad():
            out = probe(x[:2])
    except ConfigError:
        raise
    except Exception as error:  # whatever somebody's model does
        raise ConfigError(
            f"--model {name} does not take inputs of shape {tuple(x.shape[1:])} and {n_classes} "
            f"classes ({type(error).__name__}: {error}); it is called with (in_shape, n_classes), "
            "and what it returns with a batch (m, …)"
        ) from error
    if not isinstance(out, Tensor) or tuple(out.shape) != (2, n_classes):
        shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ConfigError(
            f"--model {name} gives {shape} for two rows; its output must be logits of shape "
            f"(2, {n_classes})"
        )
    return recipe


def _imported(path: str) -> Any:
    module, colon, name = path.partition(":")
    if not colon or not name:
        raise ConfigError(
            f"--model {path} is neither one of {', '.join(NAMED)} nor an import path; type it as "
            "package.module:name"
        )
    if str(Path.cwd()) not in sys.path:  # as `python -m` does
        sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(import_module(module), name)
    except Exception as error:  # a module of the user's may fail in any way
        raise ConfigError(
            f"--model {path} cannot be imported ({type(error).__name__}: {error}); check that "
            f"{module} is installed or lies here"
        ) from error


def build(recipe: Recipe, in_shape: Sequence[int], n_classes: int, seed: int) -> pl.LightningModule:
    """A fresh module, initialised from the stream ``initialisation`` of the seed.

    Raises:
        ConfigError: the user's function returns something else.
    """
    with torch.random.fork_rng():
        torch.manual_seed(derive(seed, "initialisation"))
        keywords = _takes_names(recipe.make)
        made = (
            recipe.make(in_shape=in_shape, n_classes=n_classes)  # type: ignore[call-arg]
            if keywords
            else recipe.make(in_shape, n_classes)
        )
    if isinstance(made, pl.LightningModule):
        return made
    if not isinstance(made, nn.Module):
        raise ConfigError(
            f"--model {recipe.name} returns a {type(made).__name__}; it must be a function that "
            f"takes {MAKES}"
        )
    return Classifier(made, n_classes, lr=recipe.lr, momentum=recipe.momentum)


def _takes_names(make: Any) -> bool:
    try:
        return {"in_shape", "n_classes"} <= set(inspect.signature(make).parameters)
    except (TypeError, ValueError):
        return False
