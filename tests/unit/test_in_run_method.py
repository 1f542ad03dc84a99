"""What a run asks of an in-run method before, during and after the training."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from baselines.in_run_shapley import InRunShapleyCallback
from fine_bench.callback import FINECallback, PaperFINECallback
from fine_bench.callback.base import InRunMethod, WatchedRun
from fine_bench.fine.options import Options
from fine_bench.fine.subset_options import SubsetOptions
from fine_bench.types import UnsupportedProblemError

QUERIES = TensorDataset(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64))


def run(**given: Any) -> WatchedRun:
    plain: dict[str, Any] = {
        "n_train": 40,
        "batch_size": 8,
        "optimizer": "sgd",
        "momentum": 0.0,
        "weight_decay": 0.0,
        "queries": None,
        "groups": {},
    }
    return WatchedRun(**plain | given)


class Silent(InRunMethod):
    """A method that adds nothing of its own."""

    name, version = "silent", 1


def test_a_method_needs_the_queries_and_nothing_else() -> None:
    assert Silent.needs("self", {}, run()) == {}
    assert Silent.needs("validation", {}, run(queries=QUERIES)) == {"queries": QUERIES}
    assert FINECallback.needs("queries", {}, run(queries=QUERIES)) == {"queries": QUERIES}


def test_a_method_without_a_second_run() -> None:
    method = Silent(target="self")
    method.check(run())
    assert method.metrics() == {}
    assert not method.auxiliary()
    with pytest.raises(NotImplementedError, match="silent takes nothing from a second run"):
        method.subtract(method)
    with pytest.raises(NotImplementedError):
        method.scores()
    assert (method.seconds, method.gradient_evaluations) == (0.0, 0)
    assert method.state_dict() == {}
    assert method.state_key == "Silent{'target': 'self'}"


def test_only_f_ine_of_all_examples_is_compared_with_the_papers() -> None:
    methods: list[type[InRunMethod]] = [FINECallback, PaperFINECallback, InRunShapleyCallback]
    assert [method.all_examples for method in methods] == [True, False, False]


def test_the_papers_estimator_watches_the_tasks_groups_beside_its_own() -> None:
    options = {"subsets": {"own": [1], "both": [2]}}
    needed = PaperFINECallback.needs("self", options, run(groups={"task": [3], "both": [4]}))
    assert needed == {"subsets": {"task": [3], "both": [2], "own": [1]}}
    assert PaperFINECallback.needs("self", {}, run()) == {"subsets": {}}


def test_the_papers_estimator_asks_for_a_second_run() -> None:
    assert PaperFINECallback(sample=3).auxiliary()
    assert not PaperFINECallback(sample=3, auxiliary=None).auxiliary()


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"momentum": 0.9}, "momentum=0.9"),
        ({"weight_decay": 0.1}, "weight_decay=0.1"),
        ({"optimizer": "adamw"}, "optimiser AdamW"),
    ],
)
def test_in_run_shapley_refuses_a_run_before_it_starts(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedProblemError, match=reason):
        InRunShapleyCallback.needs("validation", {}, run(queries=QUERIES, **given))
    plain = InRunShapleyCallback.needs("validation", {}, run(queries=QUERIES))
    assert plain == {"queries": QUERIES}


@pytest.mark.parametrize(
    ("method", "options"), [(FINECallback, Options), (PaperFINECallback, SubsetOptions)]
)
def test_the_signature_is_that_of_the_options(
    method: Callable[..., Any], options: type[Any]
) -> None:
    parameters = inspect.signature(method).parameters
    declared = {field.name: field.default for field in fields(options)}
    assert {name: p.default for name, p in parameters.items()} == declared
    positional = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == list(declared)[: len(positional)]
    assert positional[:2] == ["target", "observable"]
    hints = typing.get_type_hints(method.__init__)  # type: ignore[misc]
    assert set(hints) == {*declared, "return"}
    with pytest.raises(TypeError, match="unexpected keyword argument 'refresh'"):
        method(refresh=3)
