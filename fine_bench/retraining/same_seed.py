"""What this one run would have become without some examples: same initialisation, same order.

The bank (``fine_bench.retraining.bank``) says what examples do to *a* run of a recipe, whatever its
randomness. Here the randomness is held: the run is repeated step by step, with the same batches,
and the losses of the examples of a set S have weight 0 in the mean that each step goes down (its
divisor stays the size of the batch). S is a random share of the examples, 1 % or 5 %.

For query q a method foretells the margin without S up to a constant by

    f_q(all) − Σ_{i ∈ S} score[q, i],

so its agreement with the run is Spearman's correlation of −Σ_S score with the margins over the
sets, averaged over the queries: a linear datamodeling score whose truth has no random part. What
an exact derivative (``baselines.unrolled``) lacks to 1 is that the run does not answer to a set as
it answers to an infinitesimal weight.

How far it can answer smoothly at all is measured too. Where an activation has a kink, a difference
of rounding flips units of single examples and grows from there. So each set is trained several
times, each time with every initial weight moved by at most one unit in its last place, and the
agreement of the repeats with each other is the most that any method can reach (``ceiling``).

Even sets are the development half, odd ones the published half, as in ``Truth``.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fine_bench.gradients.batch_products import is_dense
from fine_bench.metrics._arrays import ArrayLike, as_array
from fine_bench.metrics.lds import LDS, lds
from fine_bench.metrics.reliability import ceiling_of, spearman_brown, spearman_rows
from fine_bench.retraining.train import Stack, default_stack, evaluate
from fine_bench.retraining.train_dense import DenseStack
from fine_bench.retraining.train_mapped import ModuleStack
from fine_bench.retraining.truth import HALVES, UNKNOWN, Half
from fine_bench.retraining.truth_files import TruthError
from fine_bench.seeds import stream
from fine_bench.store.files import write_atomic
from fine_bench.types import TrainingSteps

KEY = "fine_bench_same_seed"
FORMAT = 1


@dataclass(frozen=True, eq=False)
class SameSeed:
    """The margins of one run's queries without each of several sets. Checked at birth.

    Attributes:
        left_out: ``(sets, size)`` int32, positions that each set leaves out, ascending.
        margin: ``(repeats, sets, q)`` float32, margins of the queries at the end. The first
            repeat starts where the run did, the others at a neighbouring floating-point number.
        whole: ``(repeats, q)`` float32, the same with nothing left out.
        n_train: number of training examples.
        about: which run: task, digests, seed, whatever tells it from others.
    """

    left_out: NDArray[np.int32]
    margin: NDArray[np.float32]
    whole: NDArray[np.float32]
    n_train: int
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = self.margin.shape
        fits = len(shape) == 3 and self.whole.shape == (shape[0], shape[2])
        if not fits or self.left_out.shape[:1] != shape[1:2]:
            raise ValueError(
                f"left_out {self.left_out.shape}, margin {shape} and whole {self.whole.shape} must "
                "be (sets, size), (repeats, sets, q) and (repeats, q)"
            )
        if self.left_out.min() < 0 or self.left_out.max() >= self.n_train:
            raise ValueError(f"left_out names positions outside 0 … {self.n_train - 1}")
        if not (np.isfinite(self.margin).all() and np.isfinite(self.whole).all()):
            raise ValueError("margins must be finite numbers")

    @property
    def share(self) -> float:
        """Share of the examples that a set leaves out."""
        return float(self.left_out.shape[1] / self.n_train)

    def kept(self, half: Half) -> NDArray[np.bool_]:
        """``(sets, n)``, which examples the models of a half were trained on."""
        own = self.left_out[HALVES.index(half) :: 2]
        inside = np.ones((len(own), self.n_train), dtype=np.bool_)
        np.put_along_axis(inside, own.astype(np.int64), False, axis=1)
        return inside

    def ceiling(self, half: Half = "published", queries: int | None = None) -> float:
        """The most that scores can reach against the mean of the repeats; NaN with one of them.

        sqrt of the reliability of that mean: Spearman's correlation over the sets between two
        repeats, averaged over the first so many queries and pairs, by Spearman and Brown.
        """
        own = self.margin[:, HALVES.index(half) :: 2, :queries]
        pairs = list(combinations(own, 2))
        if not pairs:
            return UNKNOWN
        found = [np.nanmean(spearman_rows(a.T, b.T)) for a, b in pairs]
        return ceiling_of(spearman_brown(float(np.mean(found)), len(own)))

    def agreement(self, scores: ArrayLike | Tensor, half: Half = "published") -> LDS:
        """How well scores foretell this run without the sets; see the module's text.

        Args:
            scores: ``(q', n)`` for the first q' queries, positive where an example helps.
            half: which sets.

        Raises:
            ValueError: shapes that do not fit.
        """
        values = as_array(scores, "scores")
        most = self.whole.shape[1]
        if values.ndim != 2 or not 1 <= len(values) <= most or values.shape[1] != self.n_train:
            raise ValueError(
                f"scores must be (queries, {self.n_train}) with 1 to {most} queries, the first of "
                f"the task, got {values.shape}"
            )
        margin = self.margin.mean(0)[HALVES.index(half) :: 2, : len(values)]
        # summed over those that stay: the sum over the others but for its sign and a constant
        return lds(values, self.kept(half), margin)


def draw_sets(n: int, share: float, count: int, seed: int) -> Tensor:
    """Random sets to leave out, ``(count, round(share · n))`` int64, ascending each.

    Set k depends on seed, share and k alone: more sets only append.
    """
    size = round(share * n)
    if not 1 <= size < n:
        raise ValueError(
            f"share={share} of {n} examples is {size}; leave out at least one, and not all"
        )
    names = [f"same-seed/share {share:g}/set {k}" for k in range(count)]
    drawn = [torch.randperm(n, generator=stream(seed, name))[:size] for name in names]
    return torch.stack(drawn).sort(1).values


def train_without(
    net: nn.Module, steps: TrainingSteps, x: Tensor, y: Tensor, left_out: Tensor
) -> Stack:
    """Repeat a run without each of M sets, all M at once.

    Args:
        net: of the architecture; its values are not read.
        steps: what the run did, by SGD.
        x, y: ``(n, ...)``, ``(n,)``, all its training examples.
        left_out: ``(M, size)`` int64.

    Raises:
        ValueError: a run by another optimiser than SGD, or with other options than momentum and
            weight decay.
    """
    options = {name: value for name, value in steps.options.items() if value}
    known = {name: options.pop(name, 0.0) for name in ("momentum", "weight_decay")}
    if steps.optimizer.lower() != "sgd" or set(options) - {"lr", "foreach", "fused"}:
        raise ValueError(
            f"a run by {steps.optimizer} with {options} cannot be repeated here; only one by SGD "
            "with momentum and weight_decay can"
        )
    start = _loaded(net, steps.initial)
    kind = DenseStack if is_dense(start, x) else ModuleStack
    stack: Stack = kind([start] * len(left_out), x.device, **known)
    weights = x.new_ones(len(left_out), len(x)).scatter_(1, left_out.to(x.device), 0.0)
    for rows, lr in zip(steps.batches, steps.lr, strict=True):
        batch = x[rows].expand(len(left_out), *([-1] * x.ndim))
        labels = y[rows].expand(len(left_out), -1)
        stack.step(batch, labels, lr, weights[:, rows])
    return stack


def neighbouring(steps: TrainingSteps, seed: int) -> TrainingSteps:
    """The same steps from another start: every parameter moved by one unit in its last place.

    Up, down or not at all, drawn from a stream of ``seed``.
    """
    generator = stream(seed, "same-seed/neighbour")
    moved = {}
    for name, value in steps.initial.items():
        way = torch.randint(-1, 2, value.shape, generator=generator)
        aim = torch.where(way == 0, value, torch.full_like(value, torch.inf) * way)
        moved[name] = torch.nextafter(value, aim) if value.is_floating_point() else value
    return replace(steps, initial=moved)


def measure(
    net: nn.Module,
    steps: TrainingSteps,
    data: tuple[Tensor, Tensor],
    queries: tuple[Tensor, Tensor],
    left_out: Tensor,
    repeats: int = 2,
    about: Mapping[str, Any] | None = None,
) -> SameSeed:
    """The margins of the queries without each set and with everything; see ``train_without``.

    Args:
        net, steps, left_out: see ``train_without``.
        data, queries: ``(x, y)`` each, ``(n, ...)`` and ``(q, ...)``.
        repeats: trainings of each set, ≥ 1; the first from the run's own initial parameters.
        about: see ``SameSeed``.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    parts = [left_out[:0, :0].new_zeros(1, 0), *torch.split(left_out, default_stack(net))]
    found = []
    for repeat in range(repeats):
        start = neighbouring(steps, repeat) if repeat else steps
        stacks = (train_without(net, start, *data, part) for part in parts)
        found.append(torch.cat([evaluate(stack, *queries)[1] for stack in stacks]))
    margin = torch.stack(found).numpy().astype(np.float32)
    return SameSeed(
        left_out=left_out.numpy().astype(np.int32),
        margin=margin[:, 1:],
        whole=margin[:, 0],
        n_train=len(data[0]),
        about=dict(about or {}),
    )


def _loaded(net: nn.Module, initial: Mapping[str, Tensor]) -> nn.Module:
    start = copy.deepcopy(net)
    start.load_state_dict(dict(initial))
    return start


# ------------------------------------------------------------------------------------------- files


def save(truth: SameSeed, path: Path | str) -> None:
    """Write a safetensors file with its digest; whole or absent."""
    arrays = _arrays(truth)
    about = {"format": FORMAT, "n_train": truth.n_train, "about": dict(truth.about)}
    header = {KEY: json.dumps({**about, "sha256": _digest(about, arrays)}, sort_keys=True)}
    write_atomic(Path(path), safetensors.numpy.save(arrays, metadata=header))


def load(path: Path | str) -> SameSeed:
    """Read what ``save`` wrote, verified byte for byte.

    Raises:
        TruthError: no such file, another file, or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise TruthError(f"there is no file {path}; make it with benchmarks/this_run.py truth")
    try:
        with safetensors.safe_open(path, framework="np") as file:
            about = json.loads((file.metadata() or {})[KEY])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        wanted = about.pop("sha256")
        if about["format"] != FORMAT or _digest(about, arrays) != wanted:
            raise ValueError("its content is not what was written")
        return SameSeed(**arrays, n_train=about["n_train"], about=about["about"])
    except (safetensors.SafetensorError, OSError, LookupError, TypeError, ValueError) as error:
        raise TruthError(
            f"{path} is no same-seed truth, or damaged ({error}); restore it, or make it again "
            "with benchmarks/this_run.py truth"
        ) from error


def _arrays(truth: SameSeed) -> dict[str, NDArray[Any]]:
    return {
        name: np.ascontiguousarray(getattr(truth, name)) for name in ("left_out", "margin", "whole")
    }


def _digest(about: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> str:
    state = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(arrays):
        state.update(f"\0{name} {arrays[name].dtype} {arrays[name].shape}\0".encode())
        state.update(arrays[name].tobytes())
    return state.hexdigest()
