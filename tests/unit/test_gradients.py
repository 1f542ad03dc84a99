"""The gradient engine against ``vmap(grad)`` in float64, for every kind of layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fine_bench.gradients import GradientEngine, LayerRecorder, one_minus_probability
from fine_bench.types import UnsupportedProblemError
from support.tensors import close


class TwiceUsed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.last = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(torch.tanh(self.first(x)))))


class Sequence(nn.Module):
    """A linear layer on two leading dimensions, then a mean over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Linear(6, 5)
        self.last = nn.Linear(5, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.token(x)).mean(1))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(6, 6)
        self.two = nn.Linear(6, 6)
        self.two.weight = self.one.weight
        self.last = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.two(torch.tanh(self.one(x)))))


class BareParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(6))
        self.norm = nn.LayerNorm(6)
        self.last = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(x * self.scale))


def conv(**options: object) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, **options),  # type: ignore[arg-type]
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 3, 2),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(12, 4),
    )


IMAGE = (2, 9, 8)
CASES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {}


def cases() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {
            "mlp": (nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 4)), (6,)),
            "mlp in-place": (
                nn.Sequential(nn.Linear(6, 7), nn.ReLU(inplace=True), nn.Linear(7, 4)),
                (6,),
            ),
            "no bias": (
                nn.Sequential(nn.Linear(6, 7, bias=False), nn.Tanh(), nn.Linear(7, 4)),
                (6,),
            ),
            "positions": (Sequence(), (3, 6)),
            "twice": (TwiceUsed(), (6,)),
            "tied": (Tied(), (6,)),
            "bare": (BareParameter(), (6,)),
            "conv": (conv(), IMAGE),
            "conv stride": (conv(stride=2, padding=1), IMAGE),
            "conv dilation": (conv(dilation=(2, 1), padding=(2, 0)), IMAGE),
            "conv groups": (conv(groups=2, bias=False), IMAGE),
            "conv same reflect": (conv(padding="same", padding_mode="reflect"), IMAGE),
        }


NAMES = list(cases())


def problem(name: str, n: int = 5) -> tuple[nn.Module, Tensor, Tensor]:
    model, shape = cases()[name]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, *shape, generator=generator, dtype=torch.float64)
    y = torch.randint(4, (n,), generator=generator)
    return model.double(), x, y


def reference(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Per-example gradients by name, straight from the definition."""
    params = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}

    def one(values: dict[str, Tensor], xi: Tensor, yi: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, values, (xi[None],)), yi[None])

    return vmap(grad(one), in_dims=(None, 0, 0))(params, x, y)


def flat(grads: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten(1) for g in grads.values()], 1)


@pytest.mark.parametrize("name", NAMES)
def test_every_contraction_equals_the_dense_one(name: str) -> None:
    model, x, y = problem(name)
    expected = flat(reference(model, x, y))
    engine = GradientEngine(model, F.cross_entropy)
    g = engine(x, y)
    # the dense form may order parameters by block; dot products do not care
    close(g.gram(), expected @ expected.T)
    close(g.norm2(), expected.square().sum(1))
    assert g.n_params == expected.shape[1]
    weights = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    directions = weights @ expected
    close(g.contract(g.weighted_sum(weights)), directions @ expected.T)
    close(g.contract(g.weighted_sum(weights[:1])), directions[:1] @ expected.T)
    close(g.dense().square().sum(1), expected.square().sum(1))
    factor = torch.rand(5, dtype=torch.float64)
    close(
        g.scaled(factor).rows(slice(1, 4)).norm2(),
        (expected * factor[:, None])[1:4].square().sum(1),
    )
    close(g.gram(g.rows(slice(0, 2))), expected @ expected[:2].T)


@pytest.mark.parametrize("name", ["conv", "positions", "twice"])
@pytest.mark.parametrize("n", [1, 40])
def test_both_contractions_of_a_layer_with_positions_agree(name: str, n: int) -> None:
    # 1 and 40 examples lie on different sides of the choice by shape
    model, x, y = problem(name, n)
    expected = flat(reference(model, x, y))
    g = GradientEngine(model, F.cross_entropy)(x, y)
    close(g.gram(), expected @ expected.T)
    close(g.norm2(), expected.square().sum(1))


def test_the_dense_form_is_in_the_order_of_the_parameters() -> None:
    model, x, y = problem("conv")
    g = GradientEngine(model, F.cross_entropy)(x, y)
    close(g.dense(), flat(reference(model, x, y)))


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_named_layers_only(name: str) -> None:
    model, x, y = problem(name)
    last = str(len(model) - 1)  # type: ignore[arg-type]
    grads = reference(model, x, y)
    chosen = flat({k: g for k, g in grads.items() if k.startswith(last + ".")})
    g = GradientEngine(model, F.cross_entropy, layers=[last])(x, y)
    close(g.gram(), chosen @ chosen.T)


def test_frozen_parameters_do_not_count() -> None:
    model, x, y = problem("mlp")
    model[0].weight.requires_grad_(False)  # type: ignore[index]
    expected = flat(reference(model, x, y))
    g = GradientEngine(model, F.cross_entropy)(x, y)
    close(g.gram(), expected @ expected.T)
    close(g.dense(), expected)


def test_the_recorded_training_pass_gives_the_same_factors() -> None:
    model, x, y = problem("conv")
    expected = flat(reference(model, x, y))
    recorder = LayerRecorder(model, tap=True)
    recorder.start()
    F.cross_entropy(model(x), y).backward()
    recorder.stop()
    blocks = recorder.blocks(5, scale=5.0)
    close(torch.cat([b.dense() for b in blocks], 1), expected)
    recorder.close()
    model(x)
    assert recorder.calls == []


def test_the_model_is_left_as_found() -> None:
    model, x, y = problem("conv")
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    engine = GradientEngine(model, F.cross_entropy)
    engine(x, y)
    engine.close()
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert not any(m._forward_hooks for m in model.modules())


def test_margin_gradient_is_the_gradient_of_the_margin() -> None:
    model, x, y = problem("mlp")
    params = {k: p.detach() for k, p in model.named_parameters()}

    def negative_margin(values: dict[str, Tensor], xi: Tensor, yi: Tensor) -> Tensor:
        log_p = F.log_softmax(functional_call(model, values, (xi[None],))[0], 0)
        p = log_p.exp().gather(0, yi[None])[0]
        return -(p.log() - torch.log1p(-p))

    expected = flat(vmap(grad(negative_margin), in_dims=(None, 0, 0))(params, x, y))
    close(GradientEngine(model, F.cross_entropy)(x, y, "margin").dense(), expected)


def test_one_minus_p_keeps_its_precision_where_p_rounds_to_one() -> None:
    logits = torch.tensor([[40.0, 0.0, 1.0], [0.3, 0.1, -2.0]])
    y = torch.tensor([0, 2])
    z = logits.double()
    others = F.one_hot(y, 3) == 0
    expected = (z.exp() * others).sum(1) / z.exp().sum(1)
    got = one_minus_probability(logits, y).double()
    assert float(1 - F.softmax(logits, 1)[0, 0]) == 0.0  # the naive way loses it
    assert torch.allclose(got, expected, rtol=1e-5, atol=0)


def test_refusals() -> None:
    model, x, y = problem("mlp")
    with pytest.raises(ValueError, match=r"layers \['9'\] are not in the model; it has: 0, 1, 2"):
        GradientEngine(model, F.cross_entropy, layers=["9"])
    with pytest.raises(TypeError, match="list of names"):
        GradientEngine(model, F.cross_entropy, layers="0")
    with pytest.raises(UnsupportedProblemError, match="no trained parameters"):
        GradientEngine(model, F.cross_entropy, layers=["1"])
    with pytest.raises(TypeError, match="wrap it in a function of that signature"):
        GradientEngine(model, lambda z, t: F.cross_entropy(z, t))(x, y)
    with pytest.raises(UnsupportedProblemError, match="one loss an example"):
        GradientEngine(model, lambda z, t, reduction: F.cross_entropy(z, t))(x, y)
    with pytest.raises(UnsupportedProblemError, match="needs class logits"):
        GradientEngine(model, lambda z, t, reduction: (z - t).square().sum(1))(
            x, torch.zeros(5, 4), "margin"
        )
    norm = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).double()
    with pytest.raises(UnsupportedProblemError, match="GroupNorm"):
        GradientEngine(norm, F.cross_entropy)(x, y)
    norm.eval()
    expected = flat(reference(norm, x, y))
    close(GradientEngine(norm, F.cross_entropy)(x, y).gram(), expected @ expected.T)


def test_a_layer_outside_of_the_loss_is_named() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Linear(6, 4)
            self.idle = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    _, x, y = problem("mlp")
    with pytest.raises(UnsupportedProblemError, match="'idle' took no part in the loss"):
        GradientEngine(Idle().double(), F.cross_entropy)(x, y)


def test_examples_must_come_first() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.T)

    x = torch.randn(5, 6)
    with pytest.raises(UnsupportedProblemError, match="first dimension must be the examples"):
        GradientEngine(Turned(), lambda z, t, reduction: z.sum(1)[:5])(x, torch.zeros(5))


def test_margin_gradient_keeps_its_precision_where_p_rounds_to_one() -> None:
    model = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.eye(3) * 12)
    x, y = torch.tensor([[1.5, 0.1, -0.2], [0.2, 1.0, -0.5]]), torch.tensor([0, 1])
    got = GradientEngine(model, F.cross_entropy)(x, y, "margin").dense().double()
    exact = GradientEngine(model.double(), F.cross_entropy)(x.double(), y, "margin").dense()
    assert float((got - exact).abs().max() / exact.abs().max()) < 1e-5


@pytest.mark.parametrize("name", ["bare", "tied"])
def test_margin_of_parameters_without_factors(name: str) -> None:
    model, x, y = problem(name)
    g = GradientEngine(model, F.cross_entropy)(x, y)
    assert g.one_minus_p is not None
    h = GradientEngine(model, F.cross_entropy)(x, y, "margin")
    close(h.norm2(), g.norm2() / g.one_minus_p**2)
