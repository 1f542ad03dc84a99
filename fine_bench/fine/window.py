"""The micro-batches between two optimiser steps, as far as anybody tells of the steps.

Lightning announces a step before it is taken. A step that goes around it (an optimiser without
Lightning's wrapper, an update written by hand, an ``optimizer_step`` of the user's own) is not
announced, so what waits for it would wait for ever. Such a step shows in what comes after it: with
automatic optimisation in more micro-batches than a step has, with manual optimisation in
parameters that have moved between two backward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Part = TypeVar("Part")


class Window(Generic[Part]):
    """Holds parts until their step, and lets go of those whose step has passed unannounced.

    Args:
        parameters: the trained parameters of a run with manual optimisation; None for a run in
            which Lightning says how many micro-batches a step has.

    Attributes:
        n_around: steps so far that were not announced.
    """

    def __init__(self, parameters: Callable[[], Iterable[nn.Parameter]] | None = None) -> None:
        self.parameters = parameters
        self.n_around = 0
        self._parts: list[Part] = []
        self._watched: tuple[nn.Parameter, Tensor] | None = None

    def add(self, part: Part, accumulates: float) -> None:
        """One more backward pass.

        Args:
            part: what to hold.
            accumulates: micro-batches of a step, ≥ 1; not asked for under manual optimisation.
        """
        if self._parts and self._has_passed(accumulates):
            self._parts.clear()
            self.n_around += 1
        if not self._parts and self.parameters is not None:
            self._watched = _smallest_moving(self.parameters())
        self._parts.append(part)

    @property
    def waits(self) -> bool:
        """Whether anything waits for its step."""
        return bool(self._parts)

    def take(self) -> list[Part]:
        """What a step that is announced is put together from."""
        parts, self._parts = self._parts, []
        return parts

    def drop(self) -> None:
        """Let go of what waits at the end of an epoch: under manual optimisation, of all of it."""
        if self.parameters is not None and self._parts:
            self._parts.clear()
            self.n_around += 1

    def _has_passed(self, accumulates: float) -> bool:
        if self.parameters is None:
            return len(self._parts) >= accumulates
        if self._watched is None:
            return False
        parameter, before = self._watched
        return not torch.equal(parameter.detach(), before)


def _smallest_moving(parameters: Iterable[nn.Parameter]) -> tuple[nn.Parameter, Tensor] | None:
    """The smallest parameter that the next step will move, and a copy of its value."""
    having = [p for p in parameters if p.grad is not None and bool(p.grad.any())]
    if not having:
        return None
    smallest = min(having, key=lambda p: p.numel())
    return smallest, smallest.detach().clone()


__all__ = ["Window"]
