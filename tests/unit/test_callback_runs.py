"""Ways of running a Trainer: scores are those of the steps that were taken, or a word is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

from fine_bench.callback import BatchAdapter, FINECallback
from support.trainer_setting import BATCHES, N, Net, data, sums
from support.training import QUIET

PLAIN = {"max_epochs": 2}


class Sgd(Net):
    """Without momentum or schedule, so that a run that goes on takes the same steps."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(data(), **{"batch_size": BATCHES, **options})


def fit(*callbacks: pl.Callback, module: Any = None, **options: Any) -> pl.Trainer:
    trainer = pl.Trainer(**{**PLAIN, **QUIET, **options}, callbacks=list(callbacks))
    trainer.fit(Net() if module is None else module, loader())
    return trainer


def questions() -> list[FINECallback]:
    return [
        FINECallback(),
        FINECallback("validation", queries=data(5, 2), refresh_every=2),
        FINECallback(schedule="snapshot"),
    ]


@pytest.mark.any_trainer("several runs with one callback")
def test_a_further_run_begins_anew() -> None:
    fresh, used = FINECallback(), FINECallback()
    fit(used, module=Sgd())
    fit(fresh)
    fit(used)
    assert torch.equal(sums(fresh), sums(used))


@pytest.mark.any_trainer("a Trainer that fits once more")
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_trainer_that_goes_on_adds_up(which: int) -> None:
    whole, parts = questions()[which], questions()[which]
    fit(whole, module=Sgd(), max_epochs=4)
    module = Sgd()
    trainer = fit(parts, module=module)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, loader())
    assert torch.equal(sums(whole), sums(parts))
    trainer.fit(module, loader())  # there is nothing left to train
    assert torch.equal(sums(whole), sums(parts))


@pytest.mark.any_trainer("a checkpoint of a run without the callback, or with other options")
@pytest.mark.parametrize("other", [None, {"contrast": "removal"}], ids=str)
def test_what_a_checkpoint_does_not_hold_is_said(other: Any, tmp_path: Path) -> None:
    first = fit(*([] if other is None else [FINECallback(**other)]))
    first.save_checkpoint(tmp_path / "other.ckpt")
    callback = FINECallback()
    trainer = pl.Trainer(**{**PLAIN, **QUIET, "max_epochs": 4}, callbacks=[callback])
    with pytest.warns(UserWarning, match="fine begins at step 12 of the run"):
        trainer.fit(Net(), loader(), ckpt_path=tmp_path / "other.ckpt")
    counts = callback.scores().n_observations
    assert counts is not None
    assert counts.tolist() == [2] * N


@pytest.mark.any_trainer("a checkpoint of a run on other data")
def test_a_checkpoint_of_other_data_is_refused(tmp_path: Path) -> None:
    fit(FINECallback()).save_checkpoint(tmp_path / "other.ckpt")

    def resume(train: Dataset[Any]) -> None:
        trainer = pl.Trainer(**{**PLAIN, **QUIET, "max_epochs": 4}, callbacks=[FINECallback()])
        batches = DataLoader(train, batch_size=BATCHES)
        trainer.fit(Net(), batches, ckpt_path=tmp_path / "other.ckpt")

    with pytest.raises(ValueError, match="resume with the same data and queries"):
        resume(data(N - 4))
    with pytest.raises(ValueError, match="a run that is resumed needs the data of its checkpoint"):
        resume(data(seed=5))


@pytest.mark.any_trainer("`overfit_batches`, `limit_train_batches`")
@pytest.mark.parametrize("name", ["overfit_batches", "limit_train_batches"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_fewer_batches(name: str, accumulate: int) -> None:
    """Three batches of six an epoch: as if the others were not there, but for n in the formula."""
    options = {"accumulate_grad_batches": accumulate}
    limited, small = FINECallback(), FINECallback(train_size=N)
    fit(limited, **{name: 3}, **options)
    trainer = pl.Trainer(**PLAIN, **QUIET, **options, callbacks=[small])
    trainer.fit(Net(), DataLoader(TensorDataset(*(t[:24] for t in data().tensors)), 8))
    assert torch.equal(sums(limited), sums(small))
    scores = limited.scores()
    assert scores.n_observations is not None
    assert scores.n_observations.tolist() == [2] * 24 + [0] * (N - 24)
    assert not scores.values[:, 24:].any()
    assert scores.std_error is not None
    assert torch.isinf(scores.std_error[:, 24:]).all()


@pytest.mark.any_trainer("`max_steps`, `fast_dev_run`")
def test_runs_that_end_early() -> None:
    stopped, tried, whole = FINECallback(), FINECallback(), FINECallback()
    assert fit(stopped, max_steps=3, max_epochs=-1).global_step == 3
    assert fit(tried, fast_dev_run=3).global_step == 3
    fit(whole, max_epochs=1, limit_train_batches=3)
    assert torch.equal(sums(stopped), sums(whole))
    assert torch.equal(sums(tried), sums(whole))


@pytest.mark.any_trainer("`max_steps`, `fast_dev_run`")
def test_a_run_that_ends_between_two_steps_counts_whole_steps_only() -> None:
    """A stop after five of six micro-batches: the fifth is part of no step."""
    stopped, whole = FINECallback(), FINECallback()
    fit(stopped, max_steps=2, max_epochs=-1, accumulate_grad_batches=2)
    fit(whole, max_epochs=1, limit_train_batches=4, accumulate_grad_batches=2)
    assert torch.equal(sums(stopped), sums(whole))


@pytest.mark.any_trainer("`max_steps`, `fast_dev_run`")
@pytest.mark.parametrize("options", [{"max_steps": 7, "max_epochs": -1}, {"fast_dev_run": 3}])
def test_snapshots_are_taken_over_what_is_run(options: Any) -> None:
    callback = FINECallback(schedule="snapshot", n_snapshots=2)
    trainer = fit(callback, **options)
    schedule = callback._schedule
    assert trainer.global_step == schedule.accumulator.n_steps
    counts = callback.scores().n_observations
    assert counts is not None
    assert counts.tolist() == [2] * N


@pytest.mark.any_trainer("several callbacks at once")
def test_callbacks_side_by_side_are_as_alone() -> None:
    alone, together = questions(), questions()
    for callback in alone:
        fit(callback)
    fit(*together)
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(sums(one), sums(other))


@pytest.mark.any_trainer("two callbacks with the same options")
def test_two_of_a_kind_are_refused() -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        fit(FINECallback(), FINECallback())


@pytest.mark.any_trainer("several workers of a loader, persistent or not")
@pytest.mark.parametrize("persistent", [False, True])
def test_workers_do_not_matter(persistent: bool) -> None:
    found = []
    for options in ({}, {"num_workers": 2, "persistent_workers": persistent}):
        callback = FINECallback()
        order = RandomSampler(data(), generator=torch.Generator().manual_seed(1))
        trainer = pl.Trainer(**PLAIN, **QUIET, callbacks=[callback])
        trainer.fit(Net(), loader(sampler=order, **options))
        found.append(sums(callback))
    assert torch.equal(*found)


class Words(Dataset[dict[str, Any]]):
    """Sequences of their own lengths, as a collate function of one's own pads them."""

    def __init__(self, n: int, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        self.words = [torch.randint(1, 9, (3 + i % 4,), generator=g) for i in range(n)]
        self.kinds = torch.randint(3, (n,), generator=g)

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"words": self.words[i], "kind": self.kinds[i], "row": i}


def to_length(items: list[dict[str, Any]], length: int = 0) -> dict[str, Tensor]:
    length = length or max(len(item["words"]) for item in items)
    return {
        "words": torch.stack([F.pad(i["words"], (0, length - len(i["words"]))) for i in items]),
        "kind": torch.stack([item["kind"] for item in items]),
        "row": torch.tensor([item["row"] for item in items]),
    }


class Bag(pl.LightningModule):
    """The mean over words that are there."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed, self.head = nn.Embedding(9, 5).double(), nn.Linear(5, 3).double()

    def forward(self, words: Tensor) -> Tensor:
        there = (words > 0)[..., None].double()
        logits: Tensor = self.head((self.embed(words) * there).sum(1) / there.sum(1))
        return logits

    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.cross_entropy(self(batch["words"]), batch["kind"])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


@pytest.mark.any_trainer("a collate function of one's own")
@pytest.mark.parametrize("schedule", ["in_batch", "snapshot"])
def test_batches_are_read_as_they_are_collated(schedule: Any) -> None:
    """Padded to the longest of the batch, or of all: the same scores."""
    found = []
    for collate in (to_length, lambda items: to_length(items, 9)):
        adapter = BatchAdapter(index="row", x="words", y="kind")
        callback = FINECallback(
            "validation", schedule=schedule, queries=Words(6, 2), adapter=adapter
        )
        trainer = pl.Trainer(**PLAIN, **QUIET, callbacks=[callback])
        trainer.fit(Bag(), DataLoader(Words(24, 1), batch_size=8, collate_fn=collate))
        found.append(sums(callback))
    assert found[0].abs().max() > 0.01
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)


class Outputs(Net):
    """Gives its hidden states as well."""

    def forward(self, x: Tensor) -> Any:
        hidden = self.net[:3](x)
        return self.net[3](hidden), hidden

    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.cross_entropy(self(batch[0])[0], batch[1])


@pytest.mark.any_trainer("a model with several outputs")
def test_several_outputs() -> None:
    queries = data(5, 2)
    for options in ({}, {"target": "validation", "queries": queries}):
        plain, several = (
            FINECallback(**options),
            FINECallback(**options, forward=lambda module, x: module(x)[0]),
        )
        fit(plain)
        fit(several, module=Outputs())
        assert torch.equal(sums(plain), sums(several))
    alone = FINECallback()
    fit(alone, module=Outputs())  # nothing but the training's own passes: nothing needs be said
    with pytest.raises(TypeError, match=r"returns a tuple.*say what its output is by forward="):
        fit(FINECallback("validation", queries=queries), module=Outputs())
