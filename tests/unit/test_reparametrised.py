"""Layers whose weight is computed from other parameters: the chain rule, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.data import TensorDataset

from fine_bench.callback import FINECallback
from fine_bench.gradients import GradientEngine, LayerRecorder, PerExampleGradients
from fine_bench.gradients.blocks.reparametrised import ReparametrisedBlock
from fine_bench.gradients.curvature.products import parameter_names
from fine_bench.gradients.diagonal import diagonal_gram, diagonal_norm2
from fine_bench.gradients.per_example import stack_examples
from support.gradients import flat, reference, same
from support.runs import fit, mu_of_self
from support.tensors import close

pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")

CLASSES = 3

WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight norm": parametrizations.weight_norm,
    "weight norm of the whole": lambda layer: parametrizations.weight_norm(layer, dim=None),
    "older weight norm": nn.utils.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "older spectral norm": nn.utils.spectral_norm,
}


class Net(nn.Module):
    """A convolution, a linear layer on several positions that is used twice, and a head."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module], *, strided: bool = False) -> None:
        super().__init__()
        self.conv = wrap(nn.Conv2d(2, 4, 3, stride=2 if strided else 1, padding=1))
        self.mix = wrap(nn.Linear(4, 4, bias=False))
        self.head = wrap(nn.Linear(4, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.conv(x)).flatten(2).mT
        z = torch.tanh(self.mix(z))
        return self.head(torch.tanh(self.mix(z)).mean(1))


def build(how: str, n: int = 5, **options: Any) -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net(WRAPS[how], **options).double()
        x = torch.randn(n, 2, 5, 4).double()
        for p in model.parameters():
            p.data += 0.2 * torch.randn_like(p)
    return model, x, torch.arange(n) % CLASSES


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def again(how: str, state: dict[str, Tensor]) -> nn.Module:
    """A network in that state; the older normalisations cannot be copied after a pass."""
    model, _, _ = build(how)
    model.load_state_dict(state)
    return model


def rows_of(how: str, state: dict[str, Tensor], x: Tensor, y: Tensor, names: Any) -> Tensor:
    """Gradients of each example's loss within the pass of the whole batch."""
    rows = []
    for i in range(len(x)):
        model = again(how, state)  # the pass moves the vectors of spectral normalisation
        loss = F.cross_entropy(model(x), y, reduction="none")[i]
        named = dict(model.named_parameters())
        grads = torch.autograd.grad(loss, [named[name] for name in names or named])
        rows.append(torch.cat([part.flatten() for part in grads]))
    return torch.stack(rows)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("how", WRAPS)
def test_the_chain_rule(how: str, strided: bool) -> None:
    model, x, y = build(how, strided=strided)
    model.eval()  # spectral normalisation holds its vectors
    engine = GradientEngine(model, F.cross_entropy)
    assert engine.recorder.leftover == []
    names = parameter_names(engine.recorder)
    assert sorted(names) == sorted(dict(model.named_parameters()))
    g = engine(x, y)
    assert engine.in_full == {}
    assert all(isinstance(block, ReparametrisedBlock) for block in g.blocks)
    expected = flat(reference(model, x, y, F.cross_entropy), names)
    same(g, expected)
    close(stack_examples([g, g.rows(slice(0, 2))]).dense(), torch.cat([expected, expected[:2]]))
    parameters = [
        [1.0 + torch.rand_like(p) for p in own] for own in engine.recorder.parameters().values()
    ]
    d = [b.diagonal_weights(p) for b, p in zip(g.blocks, parameters, strict=True)]
    every = torch.cat([p.flatten() for own in parameters for p in own])
    close(diagonal_gram(g, g, d), (expected * every) @ expected.T)
    close(diagonal_norm2(g, d), expected.square() @ every)
    factors = [2.0, 3.0, 4.0][: len(parameters[0])]
    scaled = g.blocks[0].by_parameter(factors, [p.numel() for p in parameters[0]])
    assert scaled is not None
    parts = [torch.full_like(p, f).flatten() for p, f in zip(parameters[0], factors, strict=True)]
    close(scaled.dense(), g.blocks[0].dense() * torch.cat(parts))


@pytest.mark.parametrize("how", ["spectral norm", "older spectral norm"])
def test_spectral_normalisation_moves_from_call_to_call(how: str) -> None:
    model, x, y = build(how)
    recorder = LayerRecorder(model, tap=True)
    kept = []
    for _ in range(2):
        before = state_of(model)
        recorder.start()
        F.cross_entropy(model(x), y).backward()
        recorder.stop()
        g = PerExampleGradients(recorder.blocks(5, scale=5.0))
        expected = rows_of(how, before, x, y, parameter_names(recorder))
        close(g.dense(), expected)
        close(g.gram(), expected @ expected.T)
        kept.append((g, expected))
    # two steps have different weights: side by side only in full
    (first, a), (second, b) = kept
    both = stack_examples([first, second])
    close(both.dense(), torch.cat([a, b]))
    close(first.gram(second), a @ b.T)


@pytest.mark.any_trainer("weight normalisation, of both kinds")
@pytest.mark.parametrize("how", ["weight norm", "weight norm of the whole", "older weight norm"])
def test_a_run_with_weight_normalisation(how: str) -> None:
    model, x, y = build(how, 18)
    watched = FINECallback(observable="loss")
    diary = fit(model, x, y, F.cross_entropy, [watched])
    close(
        watched.scores().values[0].double(), mu_of_self(model, diary, x, y, F.cross_entropy), 1e-5
    )


@pytest.mark.any_trainer("spectral normalisation, of both kinds")
@pytest.mark.any_trainer("weight normalisation, of both kinds")
@pytest.mark.parametrize("how", WRAPS)
@pytest.mark.parametrize(
    "options",
    [{}, {"target": "validation"}, {"preconditioner": "optimiser"}, {"schedule": "snapshot"}],
    ids=str,
)
def test_runs_are_not_changed(how: str, options: dict[str, Any]) -> None:
    model, x, y = build(how, 18)
    queries = TensorDataset(x[:4], y[:4]) if "target" in options else None
    watched, started = FINECallback(queries=queries, **options), again(how, state_of(model))
    fit(model, x, y, F.cross_entropy, [watched])
    assert float(watched.scores().values.std()) > 0
    fit(started, x, y, F.cross_entropy, [])
    ended, alone = model.state_dict(), started.state_dict()
    assert all(torch.equal(ended[name], value) for name, value in alone.items())


def test_steps_with_different_weights_do_not_wait_for_each_other() -> None:
    # spectral scores of a whole run: each step's gradients at its own vectors
    model, x, y = build("spectral norm", 18)
    watched, states = FINECallback(observable="loss"), []
    model.register_forward_pre_hook(
        lambda module, _: states.append(state_of(module)) if module.training else None
    )
    diary = fit(model, x, y, F.cross_entropy, [watched], epochs=3)
    numerator, denominator = torch.zeros(2, 18).double()
    for state, (_, index) in zip(states, diary.steps, strict=True):
        rows = rows_of("spectral norm", state, x[index], y[index], None)
        gram = rows @ rows.T
        for k, i in enumerate(index.tolist()):
            others = torch.cat([gram[k, :k], gram[k, k + 1 :]])
            numerator[i] += gram[k, k] - others.mean()
            denominator[i] += others.var()
    close(watched.scores().values[0].double(), numerator / (18 * denominator).sqrt(), 1e-5)


def test_other_computations_are_left_to_torch_func() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    layer = nn.Linear(4, CLASSES)
    parametrize.register_parametrization(layer, "weight", Doubled())
    recorder = LayerRecorder(nn.Sequential(layer))
    assert recorder.leftover == ["0.parametrizations.weight.original"]
    halves = parametrizations.weight_norm(nn.Linear(4, CLASSES))
    halves.parametrizations.weight.original0.requires_grad_(False)
    recorder = LayerRecorder(nn.Sequential(halves))
    assert recorder.leftover == ["0.parametrizations.weight.original1"]
