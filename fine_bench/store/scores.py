"""Scores as safetensors: data, never code, with a digest of every tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fine_bench.store.digest import digest
from fine_bench.store.guarded import is_file
from fine_bench.types import GroundTruth, InfluenceScores, Target


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 over dtype, shape and bytes."""
    data = tensor.detach().cpu().contiguous()
    name = str(data.dtype).removeprefix("torch.")
    state = hashlib.sha256(f"{name} {tuple(data.shape)} ".encode())
    state.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def scores_digest(scores: InfluenceScores) -> str:
    """SHA-256 over dtype, shape and bytes of ``scores.values``: equal only when bit-identical.

    Scores of some examples only: over that and over which ones they are.
    """
    values = tensor_digest(scores.values)
    if scores.watched is None:
        return values
    return digest([values, tensor_digest(scores.watched)])


def tensors_of(scores: InfluenceScores) -> dict[str, Tensor]:
    """The tensors of ``scores`` by their names in a file, in order."""
    tensors = {"values": scores.values}
    if scores.std_error is not None:
        tensors["std_error"] = scores.std_error
    if scores.n_observations is not None:
        tensors["n_observations"] = scores.n_observations
    if scores.watched is not None:
        tensors["watched"] = scores.watched
    tensors |= {f"extra.{name}": tensor for name, tensor in scores.extras.items()}
    return dict(sorted(tensors.items()))


def from_tensors(
    tensors: Mapping[str, Tensor], method: str, target: Target, version: int
) -> InfluenceScores:
    """Inverse of ``tensors_of``.

    Raises:
        KeyError, ValueError: tensors that are no scores.
    """
    if not tensors["values"].is_floating_point():
        raise ValueError(f"its scores are {tensors['values'].dtype} and no floating-point numbers")
    return InfluenceScores(
        values=tensors["values"],
        method=method,
        target=target,
        std_error=tensors.get("std_error"),
        n_observations=tensors.get("n_observations"),
        version=version,
        extras={k.removeprefix("extra."): v for k, v in tensors.items() if k.startswith("extra.")},
        watched=tensors.get("watched"),
    )


def pack(scores: InfluenceScores) -> bytes:
    """The safetensors file of ``scores``; the same scores always give the same bytes."""
    # cloned, because safetensors refuses tensors that share memory
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors_of(scores).items()}
    about = {"method": scores.method, "target": scores.target, "version": str(scores.version)}
    about |= {f"sha256.{name}": tensor_digest(tensor) for name, tensor in tensors.items()}
    blob = safetensors.torch.save(tensors, metadata=about)
    # safetensors orders the metadata by a hash that differs between processes: sort it
    end = 8 + int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + blob[end:]


def unpack(path: Path) -> InfluenceScores:
    """The scores of a file, each tensor held against its digest."""
    if not is_file(path):  # a pipe is not waited for
        raise ValueError("is no regular file")
    with safetensors.safe_open(path, framework="pt") as file:
        about = file.metadata() or {}
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, tensor in tensors.items():
        if about.get(f"sha256.{name}") != tensor_digest(tensor):
            raise ValueError(f"{name} is not what was written")
    return from_tensors(
        tensors, about["method"], cast(Target, about["target"]), int(about["version"])
    )


_TRUTH = ("is_bad", "known", "reviewed")


def truth_extras(truth: GroundTruth) -> dict[str, Tensor]:
    """What scores carry of the truth, so that files alone tell what their numbers are about."""
    masks = {name: getattr(truth, name) for name in _TRUTH}
    return {f"truth/{name}": mask for name, mask in masks.items() if mask is not None}


def carried_truth(scores: InfluenceScores) -> GroundTruth | None:
    """Inverse of ``truth_extras``; None for scores that carry none."""
    found = {name: scores.extras.get(f"truth/{name}") for name in _TRUTH}
    masks = {name: mask.bool() for name, mask in found.items() if mask is not None}
    return GroundTruth(kind="", **masks) if "is_bad" in masks else None


def asked_about(truth: GroundTruth | None, watched: Tensor | None) -> Tensor | None:
    """Ascending positions of the watched examples of which the truth is known; None for all.

    Args:
        truth: about the training examples; None where nothing is known of any.
        watched: positions of the examples that have a score, ascending; None for all of them.
    """
    if truth is None or truth.known is None:
        return watched
    rows = torch.arange(len(truth.is_bad)) if watched is None else watched
    return rows[truth.known[rows]]
