"""A language model as the rest of the project wants it: logits from padded token ids."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fine_bench.gradients.token_losses import labelled_positions, trimmed
from fine_bench.llm.engine import SequenceEngine, SequenceModel
from fine_bench.types import Loss


class CausalNet(SequenceModel):
    """Logits ``(B, T', V)`` from ids ``(B, T)`` padded by ``PAD`` on the right.

    Only the trained parameters (the LoRA matrices) are state: ``state_dict`` holds nothing else,
    and copies share the frozen ones, so that checkpoints and the copies that methods make of a
    model of many gigabytes stay small.

    Args:
        model: a causal language model of Transformers, with or without PEFT around it.

    T' is the length of the longest row of the batch: columns that are padding throughout are left
    out, which changes no logit.

    Attributes:
        memory: where gradients are kept for further methods; None keeps nothing. Copies share it.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        """Logits. No attention mask is needed: see ``fine_bench.llm.tokens``."""
        logits: Tensor = self.model(input_ids=self._tokens(ids), use_cache=False).logits
        return logits

    def at(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Logits at some positions of each row, ``(B, K, V)``, without computing the others.

        The model's last layer, from states to logits, is given these states only; a model that does
        not say which layer that is computes all logits.

        Args:
            ids: ``(B, T)``.
            positions: ``(B, K)``, each below T.
        """
        head = self.model.get_output_embeddings()
        if head is None:
            return _taken(self(ids), positions)
        hook = head.register_forward_pre_hook(
            lambda _, inputs: (_taken(inputs[0], positions), *inputs[1:])
        )
        try:
            logits: Tensor = self(ids)
        finally:
            hook.remove()
        return logits

    def labelled(self, ids: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Logits that predict labelled tokens, and these, as sequences of their own.

        Every function of a sample's labelled tokens (``fine_bench.gradients.token_losses``) has the
        same value for the result, ``(B, K + 1, V)`` and ``(B, K + 1)``, as for all logits and
        ``y``.
        """
        positions, labels = labelled_positions(y)
        return self.at(ids, positions), labels

    def gradient_engine(
        self, loss: Loss, layers: Sequence[str] | None = None, **options: Any
    ) -> SequenceEngine:
        """Its own kind of engine; see ``fine_bench.gradients.cache.engine_of``."""
        return SequenceEngine(self, loss, layers, **options)

    def hidden(self, ids: Tensor) -> Tensor:
        """The last layer's hidden states, ``(B, T', d)``."""
        output = self.model(input_ids=self._tokens(ids), use_cache=False, output_hidden_states=True)
        states: Tensor = output.hidden_states[-1]
        return states

    def _tokens(self, ids: Tensor) -> Tensor:
        """Real token ids on the model's device; what stands in for padding is seen by nobody."""
        return trimmed(ids).clamp_min(0).to(next(self.parameters()).device)

    @contextmanager
    def untuned(self) -> Iterator[None]:
        """Inside, the model speaks as it did before tuning."""
        disable = getattr(self.model, "disable_adapter", None)
        if disable is None:
            raise RuntimeError("the model has no adapter that could be switched off")
        with disable():
            yield

    def state_dict(  # type: ignore[override]
        self, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """The trained parameters alone."""
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        destination = kwargs.get("destination", args[0] if args else None)
        keep = kwargs.get("keep_vars", args[2] if len(args) > 2 else False)
        result: dict[str, Any] = {} if destination is None else destination
        for name, p in self.trained().items():
            result[prefix + name] = p if keep else p.detach()
        return result

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Take over the trained parameters.

        Raises:
            RuntimeError: names or shapes do not fit.
        """
        del assign
        mine = self.trained()
        missing, unexpected = mine.keys() - state_dict.keys(), state_dict.keys() - mine.keys()
        wrong = [n for n in mine.keys() & state_dict.keys() if mine[n].shape != state_dict[n].shape]
        if wrong or (strict and (missing or unexpected)):
            raise RuntimeError(
                f"the trained parameters do not fit: missing {sorted(missing)[:3]}, unexpected "
                f"{sorted(unexpected)[:3]}, of another shape {sorted(wrong)[:3]}"
            )
        with torch.no_grad():
            for name, value in state_dict.items():
                if name in mine:
                    mine[name].copy_(value)
        return nn.modules.module._IncompatibleKeys(list(missing), list(unexpected))

    def __deepcopy__(self, memo: dict[int, Any]) -> CausalNet:
        """A copy with trained parameters of its own and the frozen ones shared."""
        for p in self.parameters():
            if not p.requires_grad:
                # a parameter of its own around the same numbers: a copy that is turned to another
                # precision leaves the original alone. Quantised parameters are of a class of
                # their own and are shared as they are.
                memo[id(p)] = nn.Parameter(p.detach(), False) if type(p) is nn.Parameter else p
        result = type(self).__new__(type(self))
        memo[id(self)] = result
        memo[id(self.memory)] = self.memory
        for name, value in self.__dict__.items():
            result.__dict__[name] = copy.deepcopy(value, memo)
        return result


def _taken(values: Tensor, positions: Tensor) -> Tensor:
    """The rows ``(B, K, d)`` of values ``(B, T, d)`` at some positions of each sample."""
    index = positions.to(values.device)[:, :, None].expand(-1, -1, values.shape[2])
    return values.gather(1, index)
