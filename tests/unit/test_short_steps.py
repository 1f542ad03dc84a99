"""Steps of fewer than three examples, in which nothing can be compared."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import GradientAccumulationScheduler
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from fine_bench.callback import FINECallback
from fine_bench.models.classifier import Classifier
from fine_bench.types import UnsupportedProblemError
from support.training import QUIET


def fit(n: int, batch: int | None, *callbacks: pl.Callback, **options: Any) -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 4, generator=g), torch.randint(3, (n,), generator=g)
    dataset = TensorDataset(x, y, torch.arange(n))
    sampler = options.pop("sampler", None)
    loader: dict[str, Any] = (
        {"batch_size": batch} if sampler is None else {"batch_sampler": sampler}
    )
    torch.manual_seed(0)
    trainer = pl.Trainer(**(QUIET | {"max_epochs": 2} | options), callbacks=list(callbacks))
    trainer.fit(Classifier(nn.Linear(4, 3), 3, lr=0.1), DataLoader(dataset, **loader))


@pytest.mark.any_trainer("a run whose steps all have fewer than three examples")
@pytest.mark.parametrize("batch", [1, 2])
def test_a_run_in_which_nothing_can_be_observed_is_refused(batch: int) -> None:
    with pytest.raises(UnsupportedProblemError, match=f"batch_size={batch} gives steps of {batch}"):
        fit(6, batch, FINECallback("self"))
    sampler = BatchSampler(RandomSampler(range(6)), batch, drop_last=False)
    with pytest.raises(UnsupportedProblemError, match="accumulated over several batches"):
        fit(6, None, FINECallback("self"), sampler=sampler)


@pytest.mark.any_trainer("a run whose steps all have fewer than three examples")
def test_each_remedy_works() -> None:
    for callbacks, options in (
        ([FINECallback("self")], {"accumulate_grad_batches": 3}),
        ([FINECallback("self"), GradientAccumulationScheduler({0: 3})], {}),
        ([FINECallback("self", schedule="snapshot")], {}),
    ):
        fit(6, 1, *callbacks, **options)
        assert bool((callbacks[0].scores().values != 0).all())
    callback = FINECallback("self")
    fit(6, 3, callback)
    assert bool((callback.scores().values != 0).all())


@pytest.mark.any_trainer("a run whose steps all have fewer than three examples")
def test_two_examples_are_too_few() -> None:
    with pytest.raises(UnsupportedProblemError, match="it needs three"):
        fit(2, 4, FINECallback("self"))


@pytest.mark.any_trainer("batches of fewer than three examples")
@pytest.mark.parametrize("rest", [1, 2])
def test_a_short_last_batch_is_said(rest: int) -> None:
    callback = FINECallback("self")
    with pytest.warns(UserWarning, match="fewer than 3") as seen:
        fit(6 + rest, 3, callback)
    said = [str(w.message) for w in seen if "fewer than 3" in str(w.message)]
    assert len(said) == 2
    assert f"step 2 has {rest} different example" in said[0]
    assert f"{rest} of their {rest} examples were never observed" in said[1]
    scores = callback.scores()
    assert scores.n_observations.tolist() == [2] * 6 + [0] * rest
    assert bool(torch.isinf(scores.std_error[0, 6:]).all())
    assert bool((scores.values[0, 6:] == 0).all())


@pytest.mark.any_trainer("batches of fewer than three examples")
def test_enough_examples_are_no_reason_for_a_word() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*fewer than.*")
        fit(9, 3, FINECallback("self"))
        fit(7, 3, FINECallback("self", schedule="snapshot"))
