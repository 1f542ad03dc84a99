"""``observe_every``: the observed steps, straight from the formulas, and what they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader, TensorDataset

from fine_bench.callback import FINECallback
from fine_bench.fine.standard_error import INFLATION
from fine_bench.models.classifier import Classifier
from support.training import QUIET

N, BATCH, EPOCHS, LR, CLASSES = 48, 12, 6, 0.2, 3


def data() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    return torch.randn(N, 5, generator=g), torch.randint(CLASSES, (N,), generator=g)


def queries() -> TensorDataset:
    g = torch.Generator().manual_seed(4)
    return TensorDataset(torch.randn(7, 5, generator=g), torch.randint(CLASSES, (7,), generator=g))


class Diary(pl.Callback):
    """Parameters, batch and epoch of every step."""

    def __init__(self) -> None:
        self.steps: list[tuple[dict[str, Tensor], Tensor, int]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any) -> None:
        state = {k: v.detach().clone().double() for k, v in pl_module.net.named_parameters()}
        self.steps.append((state, batch[2], trainer.current_epoch))


def fit(*callbacks: pl.Callback, shuffle: bool = True, **options: Any) -> tuple[nn.Module, Diary]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, CLASSES))
    x, y = data()
    loader = DataLoader(
        TensorDataset(x, y, torch.arange(N)),
        batch_size=BATCH,
        shuffle=shuffle,
        generator=torch.Generator().manual_seed(11),
    )
    diary = Diary()
    pl.Trainer(
        max_epochs=EPOCHS,
        **QUIET,
        callbacks=[*callbacks, diary],
        **options,
    ).fit(Classifier(net, CLASSES, lr=LR), loader)
    return net, diary


@pytest.mark.parametrize("composition", ["accumulated", "weighted", "standardised"])
@pytest.mark.parametrize("every", [2, 3])
def test_self_loss_is_the_formula_over_the_observed_steps(every: int, composition: str) -> None:
    callback = FINECallback(
        "self",
        "loss",
        composition,  # type: ignore[arg-type]
        observe_every=every,
    )
    net, diary = fit(callback)
    net = net.double()
    x, y = data()

    def one(params: dict[str, Tensor], xi: Tensor, yi: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, params, (xi[None],)), yi[None])

    shift, variance, total, squares = (torch.zeros(N).double() for _ in range(4))
    seen, times = torch.zeros(N).double(), torch.zeros(N).double()
    blocks: list[list[tuple[float, float]]] = [[] for _ in range(N)]
    for t, (params, index, epoch) in enumerate(diary.steps):
        times[index] += 1
        if (t + epoch) % every:
            continue
        grads = vmap(grad(one), in_dims=(None, 0, 0))(params, x[index].double(), y[index])
        gram = (g := torch.cat([p.flatten(1) for p in grads.values()], 1)) @ g.T
        for row, i in enumerate(index.tolist()):
            others = torch.cat([gram[row, :row], gram[row, row + 1 :]])
            effect, sigma = gram[row, row] - others.mean(), others.std()
            if composition == "weighted":
                effect, sigma = effect / sigma, torch.ones(()).double()
            blocks[i].append((float(LR * effect), float((LR * sigma) ** 2)))
            shift[i] += LR * effect
            variance[i] += (LR * sigma) ** 2
            total[i] += effect / (BATCH**0.5 * sigma)
            squares[i] += (effect / (BATCH**0.5 * sigma)) ** 2
            seen[i] += 1
    ratio = times / seen.clamp_min(1)
    if composition != "standardised":
        expected = ratio * shift / (N * ratio * variance).sqrt()
    else:
        expected = ratio * total / times.sqrt()
    expected[seen == 0] = 0.0
    scores = callback.scores()
    assert torch.equal(scores.n_observations, seen.long())
    assert 0 < float(seen.sum()) < EPOCHS * N
    torch.testing.assert_close(scores.values[0].double(), expected, rtol=1e-4, atol=1e-5)
    if composition != "standardised":
        # the linear jackknife over an example's observations, each standing for ``ratio`` of them
        for i in range(N):
            k, found = len(blocks[i]), float(scores.std_error[0, i])
            if k < 2:
                assert found == float("inf")
                continue
            u, v = (ratio[i] * torch.tensor(part).double() for part in zip(*blocks[i], strict=True))
            z = u / (N * v.sum()).sqrt() - expected[i] * v / (2 * v.sum())
            error = INFLATION * float((k / (k - 1) * (z - z.mean()).square().sum()).sqrt())
            assert abs(found - error) <= 1e-3 * error + 1e-4
    bound = (ratio * squares).sqrt()
    torch.testing.assert_close(scores.extras["bound"][0].double(), bound, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", ["self", "validation"])
def test_half_of_the_steps_stand_for_all(target: Any) -> None:
    """μ keeps its size, where counting the observed steps alone would lose a factor of √2."""
    asked = None if target == "self" else queries()
    whole = FINECallback(target, queries=asked)
    half = FINECallback(target, queries=asked, observe_every=2)
    fit(whole, half)
    a, b = whole.scores().values[0], half.scores().values[0]
    seen = half.scores().n_observations > 0
    assert 0.85 < float(b[seen].std() / a[seen].std()) < 1.18
    assert float(torch.corrcoef(torch.stack([a[seen], b[seen]]))[0, 1]) > 0.8


def test_without_shuffling_every_batch_has_its_turn() -> None:
    callback = FINECallback("self", observe_every=2)  # an even number of steps an epoch
    fit(callback, shuffle=False)
    assert bool((callback.scores().n_observations == EPOCHS // 2).all())


def test_weights_are_those_of_a_plain_run() -> None:
    plain, _ = fit()
    watched, _ = fit(FINECallback("self", observe_every=3))
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a, b)


def test_micro_batches_of_a_step_are_passed_over_together() -> None:
    once = FINECallback("self", observe_every=2)
    fit(once, shuffle=False, accumulate_grad_batches=2)
    seen = once.scores().n_observations
    assert torch.equal(seen.unique(), torch.tensor([EPOCHS // 2]))


def test_it_goes_on_after_an_interruption() -> None:
    callback = FINECallback("self", observe_every=2)
    fit(callback)
    state = callback.state_dict()
    again = FINECallback("self", observe_every=2)
    again.load_state_dict(state)
    fit(again)  # its sums begin with those of the state
    assert torch.equal(again.scores().n_observations, 2 * callback.scores().n_observations)


def test_bad_values_are_refused() -> None:
    with pytest.raises(ValueError, match="observe_every must be at least 1, got 0"):
        FINECallback("self", observe_every=0)
    with pytest.raises(ValueError, match="every_n_steps"):
        FINECallback("self", schedule="snapshot", observe_every=2)
