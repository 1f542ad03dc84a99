"""f-INE under every kind of Trainer: it changes no weight, resumes, and refuses by reason."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from pytorch_lightning.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    SingleDeviceStrategy,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fine_bench.callback import FINECallback
from fine_bench.callback.trainer import refuse_strategy
from fine_bench.types import UnsupportedProblemError
from support import trainer_setting
from support.commands import environment
from support.trainer_setting import BATCHES, Net, data, sums, train, watchers
from support.training import QUIET

SCRIPT = str(trainer_setting.__file__)
F32 = torch.float32
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"accumulate_grad_batches": 4},
    "clipped by norm": {"gradient_clip_val": 0.05},
    "clipped by value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "Adam, accumulated": {"optimizer": "Adam", "accumulate_grad_batches": 3},
    "AdamW": {"optimizer": "AdamW"},
    "bf16-mixed": {"precision": "bf16-mixed", "dtype": F32},
    "bf16-mixed, Adam": {"precision": "bf16-mixed", "dtype": F32, "optimizer": "Adam"},
    "16-mixed": {"scale": 2.0**10, "dtype": F32},
}


def fit(
    callbacks: list[pl.Callback],
    *,
    optimizer: str = "SGD",
    dtype: torch.dtype = torch.float64,
    compiled: str = "",
    scale: float | None = None,
    resume: Path | None = None,
    module: pl.LightningModule | None = None,
    **options: Any,
) -> pl.Trainer:
    if scale is not None:
        # Lightning refuses the name "16-mixed" on a CPU; the plugin itself works there
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
        options["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler)]
    trainer = pl.Trainer(**{"max_epochs": 2, **QUIET, **options}, callbacks=callbacks)
    trainer.fit(
        Net(optimizer, dtype, compiled) if module is None else module,
        DataLoader(data(dtype=dtype), batch_size=BATCHES),
        ckpt_path=resume,
    )
    return trainer


def weights(trainer: pl.Trainer) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.lightning_module.parameters()])


@pytest.mark.parametrize("name", SETTINGS)
def test_watching_changes_no_weight(name: str) -> None:
    setting = SETTINGS[name]
    plain = fit([], **setting)
    callbacks = watchers(setting.get("dtype", torch.float64))
    watched = fit(list(callbacks.values()), **setting)
    assert torch.equal(weights(plain), weights(watched))
    for callback in callbacks.values():
        found = sums(callback)
        assert torch.isfinite(found).all()
        assert found.abs().max() > 1e-3


@pytest.mark.parametrize("name", SETTINGS)
def test_a_resumed_run_gives_the_scores_of_an_uninterrupted_one(name: str, tmp_path: Path) -> None:
    setting = SETTINGS[name]
    dtype = setting.get("dtype", torch.float64)

    def make() -> dict[str, FINECallback]:
        # directions of single queries are not in a checkpoint unless computed at every step
        return watchers(dtype)

    whole = make()
    end = fit(list(whole.values()), **setting, max_epochs=4)
    first = fit(list(make().values()), **setting)
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = make()
    again = fit(list(resumed.values()), **setting, max_epochs=4, resume=tmp_path / "half.ckpt")
    assert torch.equal(weights(end), weights(again))
    for key, callback in whole.items():
        assert torch.equal(sums(callback), sums(resumed[key])), key


@pytest.mark.any_trainer("gradient clipping")
@pytest.mark.parametrize("setting", [{"gradient_clip_val": 1e-3}, {"optimizer": "Adam"}], ids=str)
def test_one_step_is_scored_alike_whatever_the_optimiser_makes_of_it(setting: Any) -> None:
    """Gradients are those of the backward pass, before clipping and before momentum."""
    found = []
    for options in ({}, setting):
        callback = FINECallback(composition="standardised")
        fit([callback], **options, max_steps=1)
        found.append(sums(callback))
    assert torch.equal(found[0], found[1])
    assert found[0].abs().max() > 0.1


@pytest.mark.any_trainer("mixed precision")
@pytest.mark.parametrize(
    "setting",
    [{"precision": "bf16-mixed"}, {"scale": 2.0**6}, {"scale": 2.0**12}],
    ids=str,
)
def test_mixed_precision_rounds_and_nothing_else(setting: Any) -> None:
    exact, rounded = watchers(F32), watchers(F32)
    del exact["optimiser"], rounded["optimiser"]  # knows nothing yet after one step
    fit(list(exact.values()), dtype=F32, max_steps=2)
    fit(list(rounded.values()), dtype=F32, max_steps=2, **setting)
    for key, callback in exact.items():
        a, b = sums(callback), sums(rounded[key])
        assert not torch.equal(a, b) or key == "snapshot"
        assert float((a - b).norm() / a.norm()) < 0.08, key


def test_a_step_that_16_bit_precision_leaves_out_is_reported() -> None:
    callback, snapshots = FINECallback(), FINECallback(schedule="snapshot")
    with pytest.warns(UserWarning, match="NaN or infinite gradients at step 0"):
        fit([callback, snapshots], scale=2.0**24, dtype=F32, max_epochs=3)
    assert 0 < callback.n_not_finite < 3 * 6
    assert torch.isfinite(sums(callback)).all()
    assert snapshots._schedule is not None
    taken = snapshots._schedule.accumulator.n_steps
    assert taken + callback.n_not_finite == 3 * 6


def test_16_mixed_is_lightnings_to_replace_on_a_cpu() -> None:
    named, meant = FINECallback(), FINECallback()
    with pytest.warns(UserWarning, match="is not supported on CPU"):
        fit([named], precision="16-mixed", dtype=F32)
    fit([meant], precision="bf16-mixed", dtype=F32)
    assert torch.equal(sums(named), sums(meant))


def launch(out: Path, *numbers: int) -> list[dict[str, Any]]:
    """As ``train`` takes them: processes, micro-batches of a step, their length, examples."""
    processes, *_ = numbers
    command = [sys.executable, SCRIPT, str(out), *map(str, numbers)]
    alone = environment()
    for name in ("LOCAL_RANK", "MASTER_PORT", "NODE_RANK", "WORLD_SIZE"):
        alone.pop(name, None)
    done = subprocess.run(command, capture_output=True, text=True, env=alone, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(f"{out}.{rank}", weights_only=True) for rank in range(processes)]


@pytest.mark.any_trainer("several processes (DDP)")
@pytest.mark.parametrize("n", [44, 43])
def test_two_processes_agree_with_one(tmp_path: Path, n: int) -> None:
    """The same global batches, of two micro-batches, the last one of an epoch short and uneven.

    Of 43 examples one comes twice, so that each process has as many.
    """
    _, alone = train(1, 2, 8, n)
    both = launch(tmp_path / "two", 2, 2, 4, n)
    for each in both:
        assert torch.allclose(each["weights"], alone["weights"], rtol=1e-9, atol=1e-12)
        for name, expected in alone["scores"].items():
            assert float(expected.abs().max()) > 1e-3
            difference = float((each["scores"][name] - expected).abs().max())
            assert difference < 1e-7 * float(expected.abs().max()), name


@pytest.mark.any_trainer("`torch.compile`")
def test_a_compiled_module_is_scored_in_snapshots_and_refused_in_batch() -> None:
    options = {"schedule": "snapshot", "every_n_steps": 3}
    plain = fit([], compiled="eager", max_epochs=1)
    callback, uncompiled = FINECallback(**options), FINECallback(**options)  # type: ignore[arg-type]
    watched = fit([callback], compiled="eager", max_epochs=1)
    assert torch.equal(weights(plain), weights(watched))
    fit([uncompiled], max_epochs=1)
    assert torch.allclose(sums(callback), sums(uncompiled), rtol=1e-9)
    with pytest.raises(UnsupportedProblemError, match=r"net went through torch\.compile"):
        fit([FINECallback()], compiled="eager")
    whole = torch.compile(Net(), backend="eager")
    with pytest.raises(UnsupportedProblemError, match=r"the module went through torch\.compile"):
        fit([FINECallback()], module=whole)  # type: ignore[arg-type]


@pytest.mark.any_trainer("FSDP, DeepSpeed, model parallelism")
@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_spread_parameters_are_refused(strategy: Any) -> None:
    # made without its __init__: the libraries and devices that it asks for are not at hand
    spread: Any = SimpleNamespace(strategy=strategy.__new__(strategy))
    with pytest.raises(UnsupportedProblemError, match=f"{strategy.__name__} is not supported"):
        refuse_strategy(spread)
    for known in (DDPStrategy, SingleDeviceStrategy):
        refuse_strategy(SimpleNamespace(strategy=known.__new__(known)))  # type: ignore[arg-type]


@pytest.mark.any_trainer("several optimisers, several backward passes on a batch")
def test_several_optimisers_and_several_passes_are_refused() -> None:
    class Two(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, i: int) -> None:  # type: ignore[override]
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, i))

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD([p], lr=0.1) for p in self.parameters()][:2]

    class Searching(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

    with pytest.raises(UnsupportedProblemError, match="this run has 2"):
        fit([FINECallback()], module=Two())
    callback = FINECallback()
    with pytest.raises(UnsupportedProblemError, match="more than one backward pass on one batch"):
        fit([callback], module=Searching())


@pytest.mark.any_trainer("a batch on which no backward pass runs")
def test_a_batch_without_backward_pass_is_left_out() -> None:
    class Skips(Net):
        def training_step(self, batch: Any, i: int) -> Any:
            loss = super().training_step(batch, i)
            return None if i == 2 else loss

    for options in ({}, {"accumulate_grad_batches": 2}):
        callback, snapshots = FINECallback(), FINECallback(schedule="snapshot")
        fit([callback, snapshots], module=Skips(), max_epochs=1, **options)
        counts = callback.scores().n_observations
        assert counts is not None
        assert counts.tolist() == [0 if 16 <= i < 24 else 1 for i in range(44)]
        for watcher in (callback, snapshots):
            assert watcher._schedule is not None
            assert watcher._schedule.n_without_backward == 1


class Mixing(nn.Module):
    """Takes the mean over the batch away: a batch normalisation of somebody's own."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


@pytest.mark.any_trainer("layers that mix the examples of a batch")
@pytest.mark.parametrize("schedule", ["in_batch", "snapshot"])
def test_examples_that_mix_are_refused(schedule: Any) -> None:
    module = Net()
    module.net = nn.Sequential(nn.Linear(6, 8), Mixing(), nn.Linear(8, 3)).double()
    callback = FINECallback(schedule=schedule)
    with pytest.raises(UnsupportedProblemError, match="depends on who else is in its batch"):
        fit([callback], module=module)


@pytest.mark.any_trainer("a loss that is a sum over the batch")
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}], ids=str)
def test_a_sum_over_examples_is_refused(options: Any) -> None:
    class Sum(Net):
        def training_step(self, batch: Any, i: int) -> Tensor:
            return super().training_step(batch, i) * len(batch[0])

    class Penalty(Net):
        def training_step(self, batch: Any, i: int) -> Tensor:
            return super().training_step(batch, i) + 0.3

    with pytest.raises(UnsupportedProblemError, match="is the sum of the losses of the batch's 8"):
        fit([FINECallback(observable="loss")], module=Sum(), **options)
    queries = data(5, 2)
    watcher = FINECallback("validation", queries=queries)
    with pytest.warns(UserWarning, match="the run minimises something else"):
        fit([watcher], module=Penalty(), **options)


@pytest.mark.parametrize("schedule", ["in_batch", "snapshot"])
def test_scores_so_far_outlive_a_failure(schedule: Any) -> None:
    class Fails(Net):
        def training_step(self, batch: Any, i: int) -> Tensor:
            if self.global_step == 9:
                raise RuntimeError("the disk is full")
            return super().training_step(batch, i)

    callback = FINECallback(schedule=schedule, every_n_steps=2 if schedule == "snapshot" else None)
    module = Fails()
    with pytest.raises(RuntimeError, match="the disk is full"):
        fit([callback], module=module)
    scores = callback.scores()
    assert scores.values.abs().max() > 1e-3
    assert not any(part._forward_hooks for part in module.modules())
