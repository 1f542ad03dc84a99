"""``lightning`` and ``pytorch_lightning``: one callback serves both, and needs only one of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as other
import pytest
import pytorch_lightning as usual
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fine_bench.callback import FINECallback, PaperFINECallback
from fine_bench.types import UnsupportedProblemError
from support.commands import environment
from support.trainer_setting import data
from support.training import QUIET

PACKAGES = {"pytorch_lightning": usual, "lightning": other}


def module_of(package: Any) -> Any:
    class Net(package.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.net(x)
            return logits

        def training_step(self, batch: Any, _: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.01)

    return Net()


def fit(package: Any, *callbacks: Any, resume: Path | None = None, **options: Any) -> Any:
    trainer = package.Trainer(**{"max_epochs": 2, **QUIET, **options}, callbacks=list(callbacks))
    trainer.fit(module_of(package), DataLoader(data(), batch_size=8), ckpt_path=resume)
    return trainer


def callbacks() -> list[Any]:
    return [
        FINECallback(),
        FINECallback("validation", queries=data(5, 2)),
        FINECallback(schedule="snapshot", n_snapshots=2),
        PaperFINECallback(sample=4, batch_size=8, every_n_steps=1, auxiliary=None),
    ]


@pytest.mark.any_trainer("`import lightning as L` or `import pytorch_lightning as pl`")
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1}])
def test_both_packages_give_the_same_scores(options: Any) -> None:
    found = []
    for package in PACKAGES.values():
        asked = callbacks()
        fit(package, *asked, **options)
        found.append([callback.scores().values for callback in asked])
    for one, another in zip(*found, strict=True):
        assert torch.equal(one, another)


@pytest.mark.any_trainer("`import lightning as L` or `import pytorch_lightning as pl`")
@pytest.mark.parametrize("name", PACKAGES)
def test_a_run_resumes_in_both(name: str, tmp_path: Path) -> None:
    package = PACKAGES[name]
    whole, again = FINECallback(), FINECallback()
    fit(package, whole, max_epochs=4)
    fit(package, FINECallback()).save_checkpoint(tmp_path / "half.ckpt")
    fit(package, again, max_epochs=4, resume=tmp_path / "half.ckpt")
    assert torch.equal(whole.scores().values, again.scores().values)


@pytest.mark.parametrize("name", PACKAGES)
def test_strategies_of_both_are_known_by_name(name: str) -> None:
    from fine_bench.callback.trainer import refuse_strategy

    class Trainer:
        def __init__(self, strategy: Any) -> None:
            self.strategy = strategy

    strategies = PACKAGES[name].strategies
    refuse_strategy(Trainer(strategies.SingleDeviceStrategy()))  # type: ignore[arg-type]
    refuse_strategy(Trainer(strategies.DDPStrategy()))  # type: ignore[arg-type]
    fsdp = strategies.FSDPStrategy.__new__(strategies.FSDPStrategy)
    with pytest.raises(UnsupportedProblemError, match="FSDPStrategy is not supported"):
        refuse_strategy(Trainer(fsdp))  # type: ignore[arg-type]


ALONE = """
import sys
sys.modules[{blocked!r}] = None
import torch
import {package} as pl
from fine_bench.callback import FINECallback
from torch.utils.data import DataLoader, TensorDataset

class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)
    def training_step(self, batch, _):
        return torch.nn.functional.cross_entropy(self.layer(batch[0]), batch[1])
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

callback = FINECallback()
assert isinstance(callback, pl.Callback)
trainer = pl.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
                     enable_progress_bar=False, enable_model_summary=False, callbacks=callback)
train = TensorDataset(torch.randn(8, 3), torch.tensor([0, 1] * 4), torch.arange(8))
trainer.fit(Net(), DataLoader(train, batch_size=4))
assert callback.scores().values.abs().max() > 0
assert not any(name.split(".")[0] == {blocked!r} for name, m in sys.modules.items() if m)
"""


@pytest.mark.any_trainer("`import lightning as L` or `import pytorch_lightning as pl`")
@pytest.mark.parametrize(
    ("package", "blocked"),
    [("lightning.pytorch", "pytorch_lightning"), ("pytorch_lightning", "lightning")],
)
def test_either_package_is_enough(package: str, blocked: str) -> None:
    code = ALONE.format(package=package, blocked=blocked)
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())


def test_without_either_it_is_said() -> None:
    code = """
import sys
sys.modules["pytorch_lightning"] = sys.modules["lightning"] = None
try:
    import fine_bench.callback
except ModuleNotFoundError as error:
    assert "pip install pytorch-lightning, or lightning" in str(error), error
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())
