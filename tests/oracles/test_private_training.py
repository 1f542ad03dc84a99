"""Beside Opacus: the true ε of DP-SGD by its accountants, a step by its optimiser; no watching."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fine_bench
from baselines.in_run_shapley import InRunShapleyCallback
from fine_bench.callback import FINECallback, PaperFINECallback
from fine_bench.theory.composition import compose
from fine_bench.theory.families import GaussianTradeOff
from fine_bench.theory.subsampling import mix
from fine_bench.types import UnsupportedProblemError
from support.benchmarks import BENCHMARKS, loaded
from support.training import QUIET

opacus = pytest.importorskip("opacus", reason="not installed; it is in the extra dev")

pytestmark = pytest.mark.filterwarnings("ignore")

LOWER = 0.01
"""Opacus' PRV accountant states ε plus this much, its ``eps_error``."""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return loaded("known_epsilon")


# ----------------------------------------------------------------------------------------- ε


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "delta"),
    [
        (1.0, 0.05, 400, 1e-5),
        (2.0, 0.05, 400, 1e-5),
        (4.0, 0.05, 400, 1e-5),
        (1.0, 0.01, 1000, 1e-6),
        (1.0, 0.01, 1000, 1e-3),
        (2.0, 1.0, 10, 1e-5),
    ],
)
def test_epsilon_is_that_of_the_accountants(
    noise: float, rate: float, steps: int, delta: float
) -> None:
    """PRV is tight but for its stated error; Rényi's is an upper bound, here by 8 to 19 %."""
    one = compose(mix(GaussianTradeOff(1.0 / noise), rate), steps).trade_off
    ours = one.symmetrize().epsilon(delta)
    tight, bound = opacus.accountants.PRVAccountant(), opacus.accountants.RDPAccountant()
    tight.history = bound.history = [(noise, rate, steps)]
    assert tight.get_epsilon(delta) - LOWER == pytest.approx(ours, abs=1e-3)
    assert ours < bound.get_epsilon(delta) < 1.2 * ours


def test_the_epsilon_of_the_benchmark_is_that_of_the_accountant(script: ModuleType) -> None:
    """With as many steps as make a test quick."""
    accountant = opacus.accountants.PRVAccountant()
    for noise in script.NOISES[1:]:
        accountant.history = [(noise, script.RATE, 50)]
        expected = accountant.get_epsilon(script.DELTA) - LOWER
        assert script.true_epsilon(noise, 50) == pytest.approx(expected, abs=1e-3)


# --------------------------------------------------------------------------------------- steps


def test_a_step_by_hand_is_that_of_opacus(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One noiseless step of the benchmark: clip, sum, divide by the expected size, descend."""
    sizes: list[int] = []
    monkeypatch.setattr(script, "STEPS", 1)
    plain = script.softmax

    def notes(logits: Any) -> Any:
        sizes.append(len(logits))
        return plain(logits)

    monkeypatch.setattr(script, "softmax", notes)
    _, losses, member = script.train(3, 0.0)
    x, y, again = script.data(3)
    assert (again == member).all()
    inside = np.flatnonzero(member)
    rng = np.random.default_rng([3, 2])
    rows = inside[np.flatnonzero(rng.uniform(size=len(inside)) < script.RATE)]
    assert len(rows) == sizes[0]

    net = nn.Linear(x.shape[1], 10, bias=False).double()
    nn.init.zeros_(net.weight)
    model = opacus.GradSampleModule(net)
    optimizer = opacus.optimizers.DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=script.LR), noise_multiplier=0.0,
        max_grad_norm=script.CLIP, expected_batch_size=script.RATE * len(inside),
    )  # fmt: skip
    F.cross_entropy(model(torch.from_numpy(x[rows])), torch.from_numpy(y[rows])).backward()
    norms = net.weight.grad_sample.flatten(1).norm(dim=1)
    assert float((norms > script.CLIP).double().mean()) > 0.5  # so that clipping is at work
    optimizer.step()
    found = F.cross_entropy(net(torch.from_numpy(x)), torch.from_numpy(y), reduction="none")
    # theirs divides by the norm plus 1e-6
    np.testing.assert_allclose(losses, found.detach().numpy(), rtol=0, atol=2e-6)


# ---------------------------------------------------------------------------------- no watching

N = 24
DATA = TensorDataset(
    torch.randn(N, 5, generator=torch.Generator().manual_seed(0)),
    torch.arange(N) % 3,
    torch.arange(N),
)


def private(net: nn.Module) -> tuple[Any, Any, Any]:
    """Model, optimiser and loader as ``PrivacyEngine.make_private`` makes them."""
    made = opacus.PrivacyEngine(accountant="rdp").make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data_loader=DataLoader(DATA, batch_size=8),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    model, optimizer, loader = made
    return model, optimizer, loader


def refused() -> Any:
    """What is said: why, and what to do."""
    return pytest.raises(
        UnsupportedProblemError, match=r"is Opacus'.*before both.*without PrivacyEngine.*canaries"
    )


@pytest.mark.any_trainer("DP-SGD by Opacus")
def test_a_private_loop_is_refused() -> None:
    net = nn.Linear(5, 3)
    before = net.weight.detach().clone()
    model, optimizer, _ = private(net)
    pairs: Sequence[tuple[Any, Any]] = (
        (model, optimizer),
        (model, optimizer.original_optimizer),
        (net, optimizer.original_optimizer),  # the hooks are in its layers all the same
    )
    for watched, steps in pairs:
        with refused():
            fine_bench.watch(watched, optimizer=steps, train_size=N)
    assert torch.equal(net.weight, before)
    # what is no longer private is watched
    plain = model.to_standard_module()
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1)
    with fine_bench.watch(plain, optimizer=sgd, train_size=N) as fine:
        for x, y, index in DataLoader(DATA, batch_size=8):
            fine.batch(index)
            F.cross_entropy(plain(x), y).backward()
            sgd.step()
            sgd.zero_grad()
    assert bool((fine.scores().n_observations == 1).all())


class Private(pl.LightningModule):
    """Made private where Lightning asks for the optimiser, as Opacus' examples do."""

    def __init__(self) -> None:
        super().__init__()
        self.net: Any = nn.Linear(5, 3)

    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        self.net, optimizer, _ = private(self.net)
        return optimizer


@pytest.mark.any_trainer("DP-SGD by Opacus")
@pytest.mark.parametrize(
    "callback",
    [
        lambda: FINECallback(),
        lambda: FINECallback(schedule="snapshot"),
        lambda: PaperFINECallback("self", sample=5, auxiliary=None),
        lambda: InRunShapleyCallback(queries=TensorDataset(*DATA.tensors[:2])),
    ],
    ids=["in batch", "snapshot", "paper", "shapley"],
)
def test_a_private_fit_is_refused(callback: Any) -> None:
    trainer = pl.Trainer(max_epochs=1, callbacks=[callback()], **QUIET)
    with refused():
        trainer.fit(Private(), DataLoader(DATA, batch_size=8))
    assert trainer.global_step == 0
