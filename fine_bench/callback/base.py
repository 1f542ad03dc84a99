"""In-run methods: callbacks that score training examples while a Lightning Trainer trains.

A further method is a class below ``InRunMethod`` in a file of its own. It translates Lightning's
events into calls of plain functions; what all of them share stands here: the name under which
Lightning keeps the state, going on after an interruption, the time, and what a run that trains
models for many methods asks of each.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Concatenate,
    ParamSpec,
    Protocol,
    Self,
    TypeVar,
)

from torch import Tensor
from torch.utils.data import Dataset

from fine_bench import clock
from fine_bench.callback.packages import Callback
from fine_bench.fine.question import digest
from fine_bench.types import InfluenceScores, Target

if TYPE_CHECKING:
    import pytorch_lightning as pl

MARK = " #"
"""Stands in a state's key before the digest of what is asked about."""


@dataclass(frozen=True, eq=False)
class WatchedRun:
    """What a run tells an in-run method before it starts.

    Attributes:
        n_train: training examples.
        batch_size: examples of a batch.
        optimizer: the optimiser's name, ``"sgd"`` or ``"adamw"``.
        momentum, weight_decay: of the optimiser, ≥ 0.
        queries: dataset of ``(x, y)``; None for the target ``"self"``.
        groups: the task's named groups of training examples, as positions or
            as a mask ``(n_train,)``.
    """

    n_train: int
    batch_size: int
    optimizer: str
    momentum: float
    weight_decay: float
    queries: Dataset[Any] | None
    groups: Mapping[str, Sequence[int] | Tensor]


@dataclass(frozen=True, eq=False)
class Progress:
    """What a method has found before the run is over.

    Attributes:
        values: scores so far, ``(n_query, n_train)``.
        n_steps: training steps that they account for.
    """

    values: Tensor
    n_steps: int


class Resumable(Protocol):
    """What a method knows of the run so far."""

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on after an interruption."""
        ...

    def load_state_dict(self, state: Mapping[str, Any], /) -> object:
        """Go on from ``state_dict()``."""
        ...


P = ParamSpec("P")
Given = TypeVar("Given")
Method = TypeVar("Method", bound="InRunMethod")


def built_from(
    options: Callable[P, Given],
) -> Callable[[Callable[[Method, Given], None]], Callable[Concatenate[Method, P], None]]:
    """Let a method be built by naming the fields of a dataclass of options.

    The decorated ``__init__`` takes the options; whoever calls it gives their fields. Signature,
    annotations and defaults are those of the dataclass, and so are declared once.

    Args:
        options: the dataclass.
    """

    def decorate(init: Callable[[Method, Given], None]) -> Callable[Concatenate[Method, P], None]:
        @wraps(vars(options)["__init__"])
        def from_fields(self: Method, /, *args: P.args, **named: P.kwargs) -> None:
            init(self, options(*args, **named))

        return from_fields

    return decorate


class InRunMethod(Callback):
    """Scores training examples while the model trains; the run itself stays what it is.

    Args:
        about: what the options name but a word cannot tell: queries, layers; None where left out.
            Its digest joins the key and the state.
        asked: plain options by which Lightning keeps the states of several callbacks apart.

    Attributes:
        name, version: of the method; the version is raised when scores may change.
        all_examples: whether it estimates, for every training example and from the run's own
            batches, the influence that the paper's estimator tests: that one is compared with it.
        seconds: time in this callback so far.
        gradient_evaluations: per-example gradients so far beyond those of the training itself.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    all_examples: ClassVar[bool] = False

    def __init__(self, *, about: Mapping[str, Any] | None = None, **asked: object) -> None:
        self._plain_key = self._generate_state_key(**asked)
        self._about = {k: v for k, v in (about or {}).items() if v is not None}
        self._state_key = "" if self._about else self._plain_key
        self._question = ""
        self.seconds = 0.0
        self._evaluations = 0
        self._observed: Resumable | None = None
        self._saved: Mapping[str, Any] | None = None
        self._earlier: Resumable | None = None
        self._trainer: Any = None  # during a fit
        self._ended: tuple[int, int] | None = None  # which Trainer's last fit, after which step
        self._warned = False
        self._said_nothing_seen = False

    @property
    def gradient_evaluations(self) -> int:
        """Per-example gradients taken beside those of the training."""
        return self._evaluations

    # ------------------------------------------------------------------ what a run asks

    @classmethod
    def needs(cls, target: Target, options: Mapping[str, Any], run: WatchedRun) -> dict[str, Any]:
        """Keyword arguments to build the method with, besides its options and the target.

        Args:
            target: what is asked of it.
            options: its options, as they are configured.
            run: the run that it will watch.

        Raises:
            UnsupportedProblemError: the method does not serve such a run.
        """
        return {} if run.queries is None else {"queries": run.queries}

    def check(self, run: WatchedRun) -> None:
        """Refuse, before anything is trained, what the run's data make impossible.

        Raises:
            ValueError: with what cannot be.
        """

    def scores(self) -> InfluenceScores:
        """The scores so far, ``(n_query, n_train)``."""
        raise NotImplementedError

    def so_far(self) -> Progress | None:
        """What there is to see while the model still trains; looking at it changes nothing.

        None where a method has nothing to show before the end.
        """
        return None

    def metrics(self) -> dict[str, float]:
        """Further numbers for the record of the run, by name."""
        return {}

    def auxiliary(self) -> bool:
        """Whether a second run with other randomness must be watched; see ``subtract``."""
        return False

    def subtract(self, other: Self) -> None:
        """Take what ``other``, of the same options, saw of the second run."""
        raise NotImplementedError(f"{self.name} takes nothing from a second run")

    # ------------------------------------------------------------------ Lightning events

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Note whose fit it is."""
        self._trainer = trainer if stage == "fit" else None

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Detach the hooks."""
        self._end(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Detach the hooks; what was seen so far stays."""
        self._end(trainer)

    def _end(self, trainer: pl.Trainer) -> None:
        self._close()
        if self._observed is None:  # nothing was trained: what was seen before stays
            self._observed = self._earlier
        self._trainer, self._ended = None, (id(trainer), trainer.global_step)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say why, where a whole epoch gave nothing to observe."""
        reason = self._nothing_seen(trainer)
        if reason and not self._said_nothing_seen:
            self._said_nothing_seen = True
            warnings.warn(
                f"{self.name} observed nothing in epoch {trainer.current_epoch}, or not all of it: "
                f"{reason}",
                stacklevel=2,
            )

    @property
    def state_key(self) -> str:
        """Callbacks that ask something else keep their states apart."""
        if not self._state_key:
            self._state_key = f"{self._plain_key}{MARK}{self.question[:16]}"
        return self._state_key  # Lightning asks for it around every event: many times a step

    @property
    def _legacy_state_key(self) -> str:  # type: ignore[override]
        """The key of states that were saved before queries and layers were told apart."""
        return self._plain_key

    @property
    def question(self) -> str:
        """SHA-256 of what is asked about, beside the plain options; queries by their content."""
        if not self._question:
            self._question = digest(self._about)
        return self._question

    def state_dict(self) -> dict[str, Any]:
        """State for Lightning's checkpoints."""
        if self._observed is None:
            return {}
        return {**self._observed.state_dict(), "question": self.question}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after an interruption.

        Raises:
            ValueError: the state belongs to another question.
        """
        state = dict(state_dict)
        # states of earlier versions do not say
        if state.pop("question", self.question) != self.question:
            raise self._other_question()
        self._saved = state or None

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse a checkpoint in which this method asked about something else.

        Raises:
            ValueError: it did.
        """
        states = checkpoint.get("callbacks") or {}
        if self.state_key in states:
            return
        claimed = {callback.state_key for callback in trainer.callbacks}  # type: ignore[attr-defined]
        for key in states:
            plain = str(key).partition(MARK)[0]
            if key not in claimed and key != self._plain_key and plain == self._plain_key:
                raise self._other_question()

    def _other_question(self) -> ValueError:
        about = " and ".join(self._about) or "neither queries nor layers"
        return ValueError(
            f"the checkpoint's state of {type(self).__name__} was saved for other queries or "
            f"layers than this callback has ({about} given here): going on would add up two "
            "different questions. Resume with the queries and layers of the checkpoint, or begin "
            "a run of its own (without ckpt_path)"
        )

    # ------------------------------------------------------------------ for the methods

    def _forget(self) -> None:
        """A run begins: nothing has been seen, nothing spent."""
        self._close()
        self._earlier, self._observed = self._observed, None
        self.seconds, self._evaluations = 0.0, 0
        self._warned = self._said_nothing_seen = False

    def _start_with(self, observed: Resumable) -> None:
        """The sums of this run; they go on where an interrupted run stopped.

        They also go on where the same Trainer fits once more; another Trainer's run begins anew.
        """
        self._observed = observed
        saved, self._saved, earlier, self._earlier = self._saved, None, self._earlier, None
        step = 0 if self._trainer is None else self._trainer.global_step
        if saved is not None:
            observed.load_state_dict(saved)
        elif step and earlier is not None and self._ended == (id(self._trainer), step):
            observed.load_state_dict(earlier.state_dict())
        elif step:
            warnings.warn(
                f"{self.name} begins at step {step} of the run, since what the run goes on from "
                "holds no state of a callback with these options: its scores count the steps from "
                "here on only. For those of the whole run resume from a checkpoint of a run with "
                "this callback and the same options",
                stacklevel=3,
            )

    def _require(self) -> Any:
        """What was given to ``_start_with``.

        Raises:
            RuntimeError: no run has been observed.
        """
        if self._observed is None:
            raise RuntimeError(
                "no run has been observed; pass the callback to Trainer(callbacks=[…]) and fit"
            )
        return self._observed

    def _close(self) -> None:
        """Detach every hook; what was seen stays."""

    def _nothing_seen(self, trainer: pl.Trainer) -> str:
        """Why the epoch that ends gave nothing to observe; empty where it did, or was to."""
        return ""

    def _timed(self) -> Timed:
        """A context whose time counts as the method's, unless it ends in an error."""
        return Timed(self)

    def _warn_not_finite(self, step: int, left_out: str) -> None:
        """Say once a run that a step is left out.

        Args:
            step: its number.
            left_out: of what, in the user's words.
        """
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"NaN or infinite gradients at step {step}: this step and later ones like it are "
                f"left out of {left_out}; lower the learning rate",
                stacklevel=3,
            )


class Timed:
    """See ``InRunMethod._timed``. It is entered several times a step; a generator costs more."""

    __slots__ = ("method", "start")

    def __init__(self, method: InRunMethod) -> None:
        self.method = method

    def __enter__(self) -> None:
        self.start = clock.now()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.method.seconds += clock.now() - self.start


__all__ = ["InRunMethod", "Progress", "WatchedRun", "built_from"]
