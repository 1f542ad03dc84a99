"""The Lightning adapter: it watches, changes nothing, and refuses what it cannot do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fine_bench.callback import FINECallback
from fine_bench.fine.training_data import complement_from_logit_gradients
from fine_bench.types import UnsupportedProblemError
from support.training import QUIET

N = 26


class Module(pl.LightningModule):
    """A user's own module: mapping batches, dropout, its own names."""

    def __init__(self, loss: str = "mean", norm: bool = False, smoothing: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Linear(6, 8)]
        if norm:
            layers.append(nn.BatchNorm1d(8))
        self.body = nn.Sequential(*layers, nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(8, 3)
        self.kind, self.smoothing = loss, smoothing

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: Any, _: int) -> Tensor:
        logits = self(batch["x"])
        return F.cross_entropy(
            logits, batch["y"], reduction=self.kind, label_smoothing=self.smoothing
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Mapped(Dataset[Any]):
    def __init__(
        self, n: int = N, shift: int = 0, repeat: bool = False, index: bool = True
    ) -> None:
        g = torch.Generator().manual_seed(1)
        self.x, self.y = torch.randn(n, 6, generator=g), torch.randint(3, (n,), generator=g)
        self.shift, self.repeat, self.index = shift, repeat, index

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, Any]:
        item = {"x": self.x[i], "y": self.y[i]}
        return item | ({"index": 0 if self.repeat else i + self.shift} if self.index else {})


def queries() -> TensorDataset:
    g = torch.Generator().manual_seed(2)
    return TensorDataset(torch.randn(5, 6, generator=g), torch.randint(3, (5,), generator=g))


def fit(
    callbacks: list[pl.Callback],
    module: pl.LightningModule | None = None,
    dataset: Dataset[Any] | None = None,
    **options: Any,
) -> pl.LightningModule:
    torch.manual_seed(4)  # dropout
    module = module or Module()
    loader = DataLoader(
        dataset or Mapped(),
        batch_size=8,
        shuffle=True,
        generator=torch.Generator().manual_seed(3),
    )
    trainer = pl.Trainer(
        **{
            "max_epochs": 3,
            **QUIET,
            **options,
        },
        callbacks=callbacks,
    )
    trainer.fit(module, loader, ckpt_path=options.get("resume"))
    return module


def test_watching_changes_no_weight() -> None:
    plain = fit([])
    state = torch.get_rng_state()
    watched = fit([FINECallback("self"), FINECallback("validation", queries=queries())])
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(state, torch.get_rng_state())


def test_the_same_run_gives_the_same_scores_bit_for_bit() -> None:
    first, second = (FINECallback("self") for _ in range(2))
    fit([first])
    fit([second])
    assert torch.equal(first.scores().values, second.scores().values)


@pytest.mark.parametrize("target", ["self", "queries", "validation"])
def test_a_default_that_is_chosen_gives_what_is_asked_for_by_name_bit_for_bit(target: Any) -> None:
    options: dict[str, Any] = {} if target == "self" else {"queries": queries()}
    chosen = FINECallback(target, **options)
    named = FINECallback(target, observable="margin", **options)
    for callback in (chosen, named):
        fit([callback])
    assert torch.equal(chosen.scores().values, named.scores().values)
    assert torch.equal(chosen.scores().std_error, named.scores().std_error)


def test_callbacks_do_not_see_each_others_queries() -> None:
    alone, beside = FINECallback("self"), FINECallback("self")
    fit([alone])
    fit([FINECallback("validation", queries=queries(), refresh_every=1), beside])
    assert torch.equal(alone.scores().values, beside.scores().values)


def test_every_example_is_observed_once_an_epoch_and_short_batches_are_counted() -> None:
    callback = FINECallback("self")
    fit([callback])  # 26 = 3 · 8 + 2: the last batch has no σ
    counts = callback.scores().n_observations
    assert counts is not None
    assert int(counts.sum()) == 3 * 24
    assert callback._schedule is not None
    assert callback._schedule.accumulator.n_short_batches == 3


def test_hooks_are_removed() -> None:
    callback = FINECallback("validation", queries=queries())
    module = fit([callback])
    assert not any(m._forward_hooks for m in module.modules())
    assert callback.scores().values.shape == (1, N)


def test_the_module_keeps_its_modes_and_no_gradient_of_the_queries() -> None:
    modes: list[bool] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            modes.extend(m.training for m in pl_module.modules())

    fit([FINECallback("queries", queries=queries(), refresh_every=1), Watch()])
    assert all(modes)


@pytest.mark.parametrize("target", ["self", "validation"])
def test_a_resumed_run_gives_the_scores_of_an_uninterrupted_one(
    tmp_path: Path, target: Any
) -> None:
    class Plain(Module):
        def __init__(self) -> None:
            super().__init__()
            self.body[-1] = nn.Identity()  # dropout's random state is not in a checkpoint

    def callback() -> FINECallback:
        return FINECallback(
            target, queries=None if target == "self" else queries(), refresh_every=1
        )

    def loader() -> DataLoader[Any]:
        return DataLoader(Mapped(), batch_size=8)

    def trainer(epochs: int, *callbacks: pl.Callback) -> pl.Trainer:
        return pl.Trainer(
            max_epochs=epochs,
            **QUIET,
            callbacks=list(callbacks),
        )

    whole = callback()
    trainer(4, whole).fit(Plain(), loader())
    first = trainer(2, callback())
    first.fit(Plain(), loader())
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = callback()
    trainer(4, resumed).fit(Plain(), loader(), ckpt_path=tmp_path / "half.ckpt")
    assert torch.equal(whole.scores().values, resumed.scores().values)


def test_complement_without_cancellation() -> None:
    logits = torch.tensor([[30.0, 0.0, 1.0], [0.1, 0.2, 0.3]], requires_grad=True)
    F.cross_entropy(logits, torch.tensor([0, 2]), reduction="sum").backward()
    assert logits.grad is not None
    got = complement_from_logit_gradients(logits.grad).double()
    z = logits.detach().double()
    expected = torch.stack([z[0, 1:].exp().sum(), z[1, :2].exp().sum()]) / z.exp().sum(1)
    assert torch.allclose(got, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "everything"}, "target must be one of"),
        ({"observable": "accuracy"}, "observable must be one of 'margin', 'loss'"),
        ({"composition": "sum"}, "composition must be one of"),
        ({"contrast": "both"}, "contrast must be one of"),
        ({"target": "validation"}, "needs queries="),
        ({"queries": TensorDataset(torch.zeros(2, 6), torch.zeros(2))}, "takes no queries"),
        ({"refresh_every": 0}, "at least 1"),
        ({"query_weighting": "max"}, 'must be None, "norm" or "noise"'),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FINECallback(**options)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Mapped(index=False), "carries no example indices"),
        (Mapped(shift=3), "but the training set has 26"),
        (Mapped(repeat=True), "twice with different labels"),
    ],
)
def test_bad_indices(dataset: Dataset[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit([FINECallback("self")], dataset=dataset)


def test_batch_coupling_is_refused_where_it_is_asked_for() -> None:
    with pytest.raises(UnsupportedProblemError, match="GroupNorm"):
        fit([FINECallback("self", layers=["head"], batch_norm="refuse")], Module(norm=True))


def test_layers_without_factors_are_refused_by_name() -> None:
    class Noisy(nn.PReLU):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.randn_like(x)

    class WithSlopes(Module):
        def __init__(self) -> None:
            super().__init__()
            self.body[1] = Noisy(8)

    with pytest.raises(
        UnsupportedProblemError, match=r"body\.1\.weight.*layers=\['body\.0', 'head'"
    ):
        fit([FINECallback("self")], WithSlopes())
    callback = FINECallback("self", layers=["body.0", "head"])
    fit([callback], WithSlopes())
    assert callback.scores().values.abs().sum() > 0


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Module(loss="sum"), "is the sum of the losses of the batch's 8 examples"),
        (Module(smoothing=0.2), 'Use observable="loss"'),
    ],
)
def test_the_margin_needs_the_mean_cross_entropy_of_hard_labels(
    module: Module, message: str
) -> None:
    with pytest.raises(UnsupportedProblemError, match=message):
        fit([FINECallback("self", "margin")], module)


def test_two_step_sizes_are_served() -> None:
    """What comes out: ``tests/oracles/test_fine_step_sizes.py``."""

    class TwoRates(Module):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(
                [
                    {"params": self.body.parameters(), "lr": 0.1},
                    {"params": self.head.parameters(), "lr": 0.2},
                ]
            )

    plain = fit([], TwoRates())
    callback = FINECallback("self")
    watched = fit([callback], TwoRates())
    assert bool((callback.scores().values != 0).all())
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a, b)


def test_steps_without_finite_gradients_are_left_out_and_reported() -> None:
    class Broken(Module):
        def training_step(self, batch: Any, i: int) -> Tensor:
            loss = super().training_step(batch, i)
            return loss * float("nan") if self.global_step == 4 else loss

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            if self.global_step == 4:
                self.zero_grad()

    callback = FINECallback("self", observable="loss")
    with pytest.warns(UserWarning, match="NaN or infinite gradients at step 4"):
        fit([callback], Broken())
    assert callback.n_not_finite == 1
    assert torch.isfinite(callback.scores().values).all()


def test_scores_before_a_run() -> None:
    with pytest.raises(RuntimeError, match="pass the callback to Trainer"):
        FINECallback("self").scores()
