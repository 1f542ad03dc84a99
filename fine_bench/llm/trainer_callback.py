"""f-INE in a Transformers Trainer.

    callback = FINETrainerCallback()
    Trainer(model, args, train_dataset=train, callbacks=[callback]).train()
    callback.scores().values                               # (1, n_train)

Positions travel with the batches by themselves (``trainer_batches``); what divides a loss is read
off its gradient (``trainer_losses``); the rest is a watched loop (``fine_bench.fine.loop``).
"""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fine_bench.fine.loop import WatchedLoop
from fine_bench.fine.options import Options
from fine_bench.fine.short_steps import refuse_short_steps
from fine_bench.llm.trainer_batches import FIELD, LABELS_FIELD, TrainerAdapter, number
from fine_bench.llm.trainer_loop import TrainerLoop, logits_of
from fine_bench.llm.trainer_losses import ModelLoss
from fine_bench.store.files import write_atomic
from fine_bench.types import InfluenceScores, UnsupportedProblemError

if TYPE_CHECKING:
    TrainerCallback = Any
else:

    def _base() -> type:
        """``TrainerCallback`` of Transformers; without it this module can still be imported."""
        try:
            from transformers import TrainerCallback
        except ModuleNotFoundError:
            return object
        return TrainerCallback

    TrainerCallback = _base()


class FINETrainerCallback(TrainerCallback):  # type: ignore[misc]
    """Scores every training example while a Trainer trains; the weights stay bit-identical.

    An example's own loss is the sum over its labels (one for a classifier, its trained tokens for
    a language model), whatever the Trainer divides by: so it counts in the step. The state is kept
    in the Trainer's checkpoints, and found again in ``output_dir``.

    Args:
        target: as for ``FINECallback``.
        observable: ``"loss"``, or ``"margin"`` for a classifier whose last layer gives its logits.
        resume_from: the checkpoint's folder, where a run goes on from one outside of output_dir.
        options: further fields of ``fine_bench.fine.options.Options``; ``queries`` are items like
            those of ``train_dataset``.

    Raises:
        UnsupportedProblemError: several processes or devices; torch.compile; losses that are no sum
            over labels; otherwise as ``FINECallback``.
    """

    def __init__(
        self,
        target: Any = "self",
        observable: Any = "loss",
        *,
        resume_from: str | Path | None = None,
        **options: Any,
    ) -> None:
        if TrainerCallback is object:
            raise ModuleNotFoundError(
                "FINETrainerCallback goes into a Trainer of Transformers, which is not installed: "
                "pip install 'transformers>=5,<6' peft tokenizers"
            )
        self.options = Options(target, observable, **options)
        self.resume_from = resume_from
        self._loop: TrainerLoop | None = None
        self._handle: Any = None

    # ------------------------------------------------------------------ results

    @property
    def loop(self) -> WatchedLoop:
        """The watched loop.

        Raises:
            RuntimeError: nothing has been trained.
        """
        if self._loop is None:
            raise RuntimeError(
                "no run has been observed; pass the callback to Trainer(callbacks=[…]) and train"
            )
        return self._loop

    def scores(self) -> InfluenceScores:
        """The scores so far, ``(n_query, n_train)``; see ``FineAccumulator.scores``."""
        return self.loop.scores()

    @property
    def seconds(self) -> float:
        """Time spent in f-INE so far."""
        return self.loop.seconds

    @property
    def n_not_finite(self) -> int:
        """Steps, or snapshots, left out because of NaN or infinite gradients."""
        return self.loop.n_not_finite

    # ------------------------------------------------------------------ the Trainer's events

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the setting and attach the hooks."""
        self._close()
        model, loader, optimizer = (
            kwargs["model"],
            kwargs["train_dataloader"],
            kwargs["optimizer"],
        )
        refuse_setting(args)
        dataset, collate = number(loader)
        options = self._for_model(model, args)
        if options.schedule == "in_batch":
            n = options.train_size or len(dataset)
            refuse_short_steps(args.train_batch_size, args.gradient_accumulation_steps, n)
        # of several callbacks the first one runs last: it takes the positions out of the batch
        first = not any(isinstance(h, Announce) for h in model._forward_pre_hooks.values())
        announce = Announce(self, take=first)
        self._handle = model.register_forward_pre_hook(announce, with_kwargs=True, prepend=True)
        self._loop = TrainerLoop(
            model,
            options,
            low_precision=bool(args.bf16 or args.fp16),
            optimizer=getattr(optimizer, "optimizer", optimizer),
            train=dataset,
            collate=collate,
            accumulate=args.gradient_accumulation_steps,
            scaler=getattr(optimizer, "scaler", None),
            total_steps=state.max_steps,
        )
        if state.global_step:
            self._go_on(args, state)

    def _for_model(self, model: nn.Module, args: Any) -> Options:
        """The options, with what the model's kind says."""
        options = self.options
        named: dict[str, Any] = {}
        if options.adapter is None:
            named["adapter"] = TrainerAdapter()
        if options.forward is None:
            named["forward"] = lambda module, x: logits_of(module(**x))
        if options.loss is F.cross_entropy:
            base = getattr(model, "get_base_model", None)  # of PEFT
            inner = base() if callable(base) else model
            named["loss"] = ModelLoss(
                shifts=shifts_labels(inner),
                smoothing=float(args.label_smoothing_factor),
            )
        return replace(options, **named)

    def announce(self, index: Tensor, labels: Tensor | None) -> None:
        """A batch is about to go through the model."""
        loop = self._loop
        if loop is None or loop.busy:
            return
        if labels is None:
            raise UnsupportedProblemError(
                "the batch has no labels: f-INE reads them under the name 'labels' in what the "
                "Trainer's data_collator makes"
            )
        loop.labelled_batch(index.cpu(), labels)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The optimiser was asked to step; a scaler may have kept the step back."""
        if self._loop is not None:
            self._loop.step_is_over()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An epoch is over."""
        if self._loop is not None:
            self._loop.epoch_ends()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Account for what is left, and detach the hooks."""
        if self._loop is not None:
            self._loop.finish()
        self._close()

    # ------------------------------------------------------------------ checkpoints

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Lay the state beside the Trainer's own."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self._loop is None or not folder.is_dir() or not state.is_world_process_zero:
            return
        content = io.BytesIO()
        torch.save(self._loop.state_dict(), content)
        write_atomic(folder / self._file(), content.getvalue())

    def _file(self) -> str:
        """The name of the state's file: callbacks that ask something else keep theirs apart."""
        asked = json.dumps(self.loop.question, sort_keys=True, default=str)
        return f"fine-{hashlib.sha256(asked.encode()).hexdigest()[:12]}.pt"

    def _go_on(self, args: Any, state: Any) -> None:
        """Take up the state of an interrupted run."""
        assert self._loop is not None
        given = self.resume_from or args.resume_from_checkpoint
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if isinstance(given, str | Path):
            folder = Path(given)
        path = folder / self._file()
        if not path.is_file():
            warnings.warn(
                f"f-INE begins at step {state.global_step} of the run, since {folder} holds no "
                f"{path.name}, the state of a callback with these options: its scores count the "
                "steps from here on only. Resume from a checkpoint of a run with this callback; "
                "one that lies elsewhere is named by resume_from=…",
                stacklevel=2,
            )
            self._loop.step = state.global_step
            return
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"{path} is damaged, or no state of f-INE: {error}") from error
        self._loop.load_state_dict(saved)
        # a checkpoint that was written at an epoch's last step does not know of its end
        while self._loop.epoch < int(state.epoch + 1e-6):
            self._loop.epoch_ends()

    def _close(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        if self._loop is not None:
            self._loop.close()


def shifts_labels(model: Any) -> bool:
    """Whether the model's logits at t predict the label at t + 1, as causal language models do.

    Args:
        model: of Transformers, which takes the causal loss where a class's name says no other one;
            or any other module, which does not.
    """
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    if not hasattr(model, "loss_function") or getattr(model.config, "is_encoder_decoder", False):
        return False
    named = LOSS_MAPPING.get(getattr(model, "loss_type", None), ForCausalLMLoss)
    return named is ForCausalLMLoss


class Announce:
    """Reads a batch's positions before the model sees it.

    Args:
        callback: hears of them.
        take: whether to take them out.
    """

    fields = (FIELD, LABELS_FIELD)

    def __init__(self, callback: FINETrainerCallback, *, take: bool) -> None:
        self.callback = callback
        self.take = take

    def __call__(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if FIELD not in kwargs:
            return None  # a pass on other data
        self.callback.announce(kwargs[FIELD], kwargs[LABELS_FIELD])
        if not self.take:
            return None
        return args, {name: value for name, value in kwargs.items() if name not in self.fields}


def refuse_setting(args: Any) -> None:
    """Refuse settings in which no process holds a step's examples.

    Args:
        args: ``TrainingArguments``.

    Raises:
        UnsupportedProblemError: several devices or processes, or compiled code.
    """
    wrong = None
    if args.n_gpu > 1:
        wrong = f"{args.n_gpu} GPUs in one process (DataParallel): make one visible"
    elif args.world_size > 1:
        wrong = f"{args.world_size} processes: use one"
    elif args.deepspeed or args.fsdp:
        wrong = "parameters that are spread over processes (DeepSpeed, FSDP): use neither"
    elif args.torch_compile:
        wrong = "torch_compile=True, whose code hooks would cut into pieces: leave it out"
    if wrong is not None:
        raise UnsupportedProblemError(
            f"f-INE watches a Trainer in one process on one device, this one has {wrong}; "
            'FINECallback serves several processes under Lightning\'s strategy="ddp"'
        )


__all__ = ["FINETrainerCallback"]
