"""What f-INE is asked about, as a digest: queries by their content, names as they are."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fine_bench.fine.aside import own_randomness
from fine_bench.fine.options import Options


def digest(about: Mapping[str, Any]) -> str:
    """SHA-256 of names and of the items of data sets, 64 hex digits.

    Reading changes no random state. Items that are drawn anew at each reading are read from one
    fixed state, so that the same data set has the same digest in every process.

    Args:
        about: a data set of ``(x, y)`` or a sequence of names by what it is called.
    """
    found = hashlib.sha256()
    with own_randomness():
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002  that is the state which data sets read
        torch.manual_seed(0)
        for name in sorted(about):
            found.update(f"{name}:{len(about[name])};".encode())
            for i in range(len(about[name])):
                for leaf in tree_leaves(about[name][i]):
                    found.update(_bytes_of(leaf))
    return found.hexdigest()


def _bytes_of(leaf: Any) -> bytes:
    if isinstance(leaf, Tensor):
        leaf = leaf.detach().cpu()
        leaf = (leaf.float() if leaf.dtype == torch.bfloat16 else leaf).numpy()
    if isinstance(leaf, bool | int | float | np.generic):
        leaf = np.asarray(leaf)
    if isinstance(leaf, np.ndarray) and leaf.dtype != object:
        return f"{leaf.dtype}{leaf.shape};".encode() + np.ascontiguousarray(leaf).tobytes()
    if isinstance(leaf, str):
        return f"{leaf!r};".encode()
    return f"{type(leaf).__name__};".encode()  # other objects have no bytes that stay


def distinguishing(options: Options) -> dict[str, Any]:
    """The plain options that differ from their defaults, and those that every state names."""
    always = {name: getattr(options, name) for name in ("target", "observable", "composition")}
    # the name that states had before the loss could choose; theirs tell what it has chosen
    always["observable"] = options.observable or "margin"
    named: dict[str, Any] = {}
    for field in fields(options):
        value = getattr(options, field.name)
        plain = value is None or isinstance(value, str | int | float)
        if plain and value != field.default:
            named[field.name] = value
    return always | named


__all__ = ["digest", "distinguishing"]
