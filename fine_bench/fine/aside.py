"""Passes beside the training: they leave every mode and every random state as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import nn


@contextmanager
def own_randomness() -> Iterator[None]:
    """Inside, random numbers may be drawn; afterwards every global random state is as it was.

    Those of Python, NumPy, PyTorch and of every CUDA device.
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  the global one
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def beside_training(module: nn.Module, compiled: bool = False) -> Iterator[None]:
    """A pass beside the training: evaluation mode, and every random state and mode afterwards.

    A compiled module's own code knows nothing of hooks, so its layers run as they were written.
    """
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with (
            own_randomness(),
            torch.compiler.set_stance("force_eager") if compiled else nullcontext(),
        ):
            yield
    finally:
        for part, mode in modes:
            part.training = mode


__all__ = ["beside_training", "own_randomness"]
