"""What a task hands to the rest of the benchmark."""

from __future__ import annotations

import hashlib
import inspect
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fine_bench.types import TARGETS, End, GroundTruth, Loss


@dataclass(frozen=True, eq=False, kw_only=True)
class Task:
    """The data of a task: fixed by ``task.seed``, shared by all run seeds. Checked at birth.

    What all kinds of tasks share; ``TaskData`` holds examples with one class label each,
    ``fine_bench.llm.task.LanguageTask`` sequences of tokens.

    Attributes:
        kind: ``"images"`` or ``"language"``: how its models are trained.
        optimizer: of that training.
        model_kind, models_to_type: what a model for it is, and which are to be had.
        name: name of the task.
        x, y: ``(n_train, ...)`` training inputs and labels as given, some of them bad.
        truth: which training examples are bad.
        query_x, query_y: what targets other than ``self`` ask about, ``(n_query, ...)`` each.
        test_x, test_y: held out to measure the trained model.
        n_classes: labels lie in 0 … n_classes - 1.
        train_ids: ``(n_train,)`` int64, distinct positions in the source data set.
        loss: one loss an example.
        batch_size: examples that post-hoc methods hold at once.
        groups: name → ascending positions of training examples worth an influence of their own;
            no part of ``sha256``.
        suspicious: target → which end of a score is suspicious, where this task's queries ask
            something else than clean ones: a backdoor's queries carry the attacker's label, and
            what *helps* them is suspicious. A target that is not named here keeps the end that
            ``fine_bench.types.SUSPICIOUS_END`` declares. Written in the task's code, never chosen
            by the truth.
        files: what the data were read from, where those are files of the user's own: the option
            that names the file → ``sha256`` of its bytes and number of ``samples`` taken from it;
            no part of ``sha256``. Records carry it, since they say nothing of where files lie.
    """

    kind: ClassVar[Literal["images", "language"]]
    optimizer: ClassVar[Literal["sgd", "adamw"]]
    model_kind: ClassVar[type]
    models_to_type: ClassVar[str]
    same_ends: ClassVar[bool] = False
    """Whether all tasks of the kind have the same suspicious ends: then no part of ``sha256``."""

    name: str
    x: Tensor
    y: Tensor
    truth: GroundTruth
    query_x: Tensor
    query_y: Tensor
    test_x: Tensor
    test_y: Tensor
    n_classes: int
    train_ids: Tensor
    loss: Loss
    batch_size: int
    groups: Mapping[str, Tensor] = field(default_factory=dict)
    suspicious: Mapping[str, End] = field(default_factory=dict)
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("name is empty; give the task a name")
        n = self.n_train
        if len(self.truth.is_bad) != n:
            raise ValueError(
                f"truth.is_bad has {len(self.truth.is_bad)} entries for {n} training examples"
            )
        if self.train_ids.dtype != torch.int64 or self.train_ids.shape != (n,):
            raise ValueError(
                f"train_ids must be int64 of shape ({n},), got {self.train_ids.dtype} of shape "
                f"{tuple(self.train_ids.shape)}"
            )
        if len(torch.unique(self.train_ids)) != n:
            raise ValueError("train_ids repeat; every training example has its own position")
        for name, group in self.groups.items():
            if group.dtype != torch.int64 or group.ndim != 1 or not 0 < len(group) < n:
                raise ValueError(
                    f"group {name!r} must hold int64 positions of some of the {n} training "
                    f"examples, got {group.dtype} of shape {tuple(group.shape)}"
                )
            if int(group[0]) < 0 or int(group[-1]) >= n or bool((group.diff() <= 0).any()):
                raise ValueError(
                    f"group {name!r} must ascend within 0 … {n - 1}, each position once"
                )
        for target, end in self.suspicious.items():
            if target not in TARGETS or end not in get_args(End):
                raise ValueError(
                    f"suspicious={{{target!r}: {end!r}}} must map one of {TARGETS} to one of "
                    f"{get_args(End)}"
                )

    @property
    def n_train(self) -> int:
        """Number of training examples."""
        return len(self.x)

    @property
    def n_query(self) -> int:
        """Number of query examples."""
        return len(self.query_x)

    def prepare(self) -> None:
        """Make what a run starts from and no setting says to the bit; nothing, as a rule."""

    @property
    def start_sha256(self) -> str | None:
        """Digest of what ``prepare`` makes, empty before it is made; None where that is nothing."""
        return None

    @property
    def record_sha256(self) -> str:
        """What a record of now has as digest of its data: with that of what the run starts from."""
        start = self.start_sha256
        return (
            hashlib.sha256(f"{self.sha256} {start}".encode()).hexdigest() if start else self.sha256
        )

    @cached_property
    def sha256(self) -> str:
        """Digest of everything that can change a score or its evaluation.

        Training inputs and given labels, queries, and the truth, each with its type and shape;
        the test part and the name cannot. Values are hashed as little-endian bytes. The suspicious
        ends are part of it where a task declares its own, as is of whom the truth is known.
        """
        digest = hashlib.sha256()
        for part, tensor in (
            ("x", self.x),
            ("y", self.y),
            ("query_x", self.query_x),
            ("query_y", self.query_y),
            ("is_bad", self.truth.is_bad),
        ):
            array = np.ascontiguousarray(tensor.numpy())
            array = array.astype(array.dtype.newbyteorder("<"), copy=False)
            digest.update(f"{part} {array.dtype.name} {array.shape}\0".encode())
            digest.update(array.data)
        for part in ("known", "reviewed"):
            mask = getattr(self.truth, part)
            if mask is not None:
                digest.update(f"{part} {tuple(mask.shape)}\0".encode() + mask.numpy().tobytes())
        for target, end in () if self.same_ends else sorted(self.suspicious.items()):
            digest.update(f"suspicious {target} {end}\0".encode())
        return digest.hexdigest()


@dataclass(frozen=True, eq=False, kw_only=True)
class TaskData(Task):
    """A task whose examples have one class label each: images, or rows of numbers.

    Attributes (besides those of ``Task``):
        x: ``(n_train, ...)`` float32, finite.
        y: ``(n_train,)`` int64, the labels as given to training, some of them corrupted.
        clean_y: ``(n_train,)`` int64, the labels before corruption; where they differ, ``truth``
            must say bad.
        query_x, query_y: ``(n_query, ...)`` and ``(n_query,)``: clean, unless the task says what
            else they ask.
        test_x, test_y: clean, and disjoint from the queries.
    """

    kind: ClassVar[Literal["images", "language"]] = "images"
    optimizer: ClassVar[Literal["sgd", "adamw"]] = "sgd"
    model_kind: ClassVar[type] = nn.Module
    models_to_type: ClassVar[str] = (
        "model=mlp, or task=llm_poison trainer=adamw for a language model"
    )

    clean_y: Tensor
    loss: Loss = F.cross_entropy
    batch_size: int = 512

    def __post_init__(self) -> None:
        if self.n_classes < 2:
            raise ValueError(f"n_classes must be at least 2, got {self.n_classes}")
        for part, x, y in (
            ("training", self.x, self.y),
            ("query", self.query_x, self.query_y),
            ("test", self.test_x, self.test_y),
        ):
            self._check_inputs(part, x)
            self._check_labels(part, y, len(x))
        self._check_labels("clean training", self.clean_y, len(self.x))
        super().__post_init__()
        unmarked = (self.y != self.clean_y) & ~self.truth.is_bad
        if bool(unmarked.any()):
            raise ValueError(
                f"{int(unmarked.sum())} examples have a corrupted label but truth.is_bad is False, "
                f"the first at {int(unmarked.nonzero()[0])}"
            )

    def _check_inputs(self, part: str, x: Tensor) -> None:
        if x.dtype != torch.float32 or x.ndim < 2:
            raise ValueError(
                f"{part} inputs must be float32 of shape (n, ...), got {x.dtype} of shape "
                f"{tuple(x.shape)}"
            )
        if len(x) == 0:
            raise ValueError(f"there are no {part} inputs; a task needs at least one")
        if x.shape[1:] != self.x.shape[1:]:
            raise ValueError(
                f"{part} inputs have shape {tuple(x.shape[1:])} each, training inputs "
                f"{tuple(self.x.shape[1:])}"
            )
        # the extremes carry any NaN or infinity, without a copy of the data set
        if not all(bool(torch.isfinite(extreme)) for extreme in x.aminmax()):
            raise ValueError(f"{part} inputs contain values that are not finite")

    def _check_labels(self, part: str, y: Tensor, n: int) -> None:
        if y.dtype != torch.int64 or y.shape != (n,):
            raise ValueError(
                f"{part} labels must be int64 of shape ({n},), got {y.dtype} of shape "
                f"{tuple(y.shape)}"
            )
        if int(y.min()) < 0 or int(y.max()) >= self.n_classes:
            raise ValueError(
                f"{part} labels must lie in 0 … {self.n_classes - 1}, got {int(y.min())} … "
                f"{int(y.max())}"
            )


def promised(function: Any) -> type | None:
    """The class of what a function says it returns; None where it says nothing, or of no class.

    What a file names is called only if it promises the right thing: anything else could do
    anything.
    """
    if not inspect.isfunction(function):
        return None
    try:
        said = typing.get_type_hints(function).get("return")
    except Exception:  # annotations are code of whoever wrote them
        return None
    return said if inspect.isclass(said) and said is not Any else None


def makes_task(function: Any) -> bool:
    """Whether it is a public function, not one inside of another, that promises a task."""
    made = promised(function)
    named = getattr(function, "__qualname__", "_")
    return made is not None and issubclass(made, Task) and named.isidentifier() and named[0] != "_"
