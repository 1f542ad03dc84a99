"""What is measured where nobody says it: the margin under softmax cross-entropy, else the loss.

The margin h = −log(p/(1−p)) is the default of classification: its gradient does not vanish where
an example is fitted. It exists where the loss is −log p of a hard label, read off one output. Under
any other loss (smoothed, weighted, binary, squared, of several heads, of tokens) the observable is
the example's own loss. The first batch with finite gradients decides, for the whole run.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from fine_bench.fine.effects import Observable
from fine_bench.fine.options import Options
from fine_bench.types import UnsupportedProblemError


def chosen(options: Options, observable: Observable) -> Options:
    """The options with an observable, and a word where it is not the usual one."""
    if observable == "loss":
        say_loss()
    return replace(options, observable=observable)


def say_loss() -> None:
    """Say once that the loss was chosen."""
    warnings.warn(
        'f-INE measures observable="loss" in this run: its loss is no softmax cross-entropy of '
        "hard labels on one output, where the margin would be read off. Write observable="
        '"loss" to choose it yourself',
        stacklevel=2,
    )


def resumed(options: Options, state: Mapping[str, Any]) -> Options:
    """The options of a run that goes on: with what its beginning has chosen.

    Args:
        options: as they were asked for.
        state: of the schedule; those of earlier versions tell nothing, and measured the margin.
    """
    found = state.get("observable", "margin")
    if options.observable is not None or not found:
        return options
    return replace(options, observable=found)


def refuse_several_ends(ends: Sequence[str]) -> NoReturn:
    """Refuse the margin of a loss that is made of several outputs.

    Raises:
        UnsupportedProblemError: always.
    """
    raise UnsupportedProblemError(
        f'observable="margin" needs a loss of one output, but it is made of those of {list(ends)}'
        ", and an example's gradient is that of all of them, which 1 − p of one does not turn into "
        'the margin\'s. Use observable="loss", or train one output'
    )


__all__ = ["chosen", "refuse_several_ends", "resumed", "say_loss"]
