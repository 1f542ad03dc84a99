"""Training M models at once is training them one after the other."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fine_bench.data.digits import digits_mislabel
from fine_bench.gradients.batch_products import is_dense
from fine_bench.gradients.margin import margins
from fine_bench.models.networks import cnn, mlp
from fine_bench.retraining.train import (
    DivergedModelError,
    Recipe,
    default_stack,
    epoch_order,
    evaluate,
    train_one,
    train_stack,
)
from fine_bench.retraining.train_dense import DenseStack
from fine_bench.retraining.train_mapped import ModuleStack
from fine_bench.runner.backends import images
from fine_bench.runner.plan import Job
from fine_bench.runner.schema import RunConfig, TrainerConfig
from fine_bench.seeds import derive, stream
from fine_bench.types import UnsupportedProblemError

N, D, C = 23, 6, 4
PLAIN = Recipe(max_epochs=3, batch_size=5, lr=0.3)
RECIPES = {
    "plain": PLAIN,
    "momentum": replace(PLAIN, momentum=0.9, lr=0.05),
    "weight decay": replace(PLAIN, weight_decay=0.1),
    "cosine": replace(PLAIN, lr_schedule="cosine"),
    "all of them": replace(
        PLAIN, momentum=0.8, weight_decay=0.05, lr_schedule="cosine", batch_size=7
    ),
}


def data(n: int = N, shape: tuple[int, ...] = (D,), dtype: Any = torch.float64) -> Any:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, *shape, generator=g, dtype=torch.float64).to(dtype)
    return x, torch.randint(C, (n,), generator=g)


def networks(make: Any, count: int, dtype: Any = torch.float64) -> list[nn.Module]:
    found = []
    for seed in range(count):
        torch.manual_seed(seed)
        found.append(make().to(dtype))
    return found


def dense(**options: Any) -> nn.Module:
    return mlp((D,), C, **{"hidden": (7,), **options})


def subsets_of(size: int, count: int, n: int = N) -> Tensor:
    return torch.stack(
        [
            torch.randperm(n, generator=stream(k, "subset"))[:size].sort().values
            for k in range(count)
        ]
    )


def orders(count: int) -> list[torch.Generator]:
    return [stream(k, "order") for k in range(count)]


def compare(make: Any, recipe: Recipe, x: Tensor, y: Tensor, size: int, tolerance: float) -> Any:
    """Train three models both ways; the weights and outputs must agree, and have moved."""
    count = 3
    nets = networks(make, count, x.dtype)
    before = [{k: v.clone() for k, v in net.state_dict().items()} for net in nets]
    subsets = subsets_of(size, count, len(x))
    stack = train_stack(nets, x, y, subsets, orders(count), recipe)
    loss, margin = evaluate(stack, x, y)
    for k, net in enumerate(nets):
        assert all(torch.equal(v, before[k][name]) for name, v in net.state_dict().items())
        train_one(net, x, y, subsets[k], orders(count)[k], recipe)
        found = stack.parameters(k)
        for name, expected in net.named_parameters():
            moved = (expected - before[k][name]).abs().max()
            assert moved > 1e-3
            assert (found[name] - expected).abs().max() <= tolerance * moved, name
        logits = net.eval()(x).detach()
        scale = logits.abs().max()
        p = logits.double().softmax(-1)[torch.arange(len(y)), y]
        assert (margin[k] - (p / (1 - p)).log()).abs().max() <= 10 * tolerance * scale
        assert (loss[k] + p.log()).abs().max() <= 10 * tolerance * scale
    return stack


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("kind", [DenseStack, ModuleStack])
def test_a_stack_trains_as_one_at_a_time(
    kind: Any, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind is ModuleStack:
        monkeypatch.setattr("fine_bench.retraining.train.is_dense", lambda net, x: False)
    # 13 examples: the last batch of each epoch is a short one
    assert isinstance(compare(dense, recipe, *data(), 13, 1e-10), kind)


@pytest.mark.parametrize(
    "options",
    [
        {"activation": "tanh"},
        {"activation": "gelu"},
        {"bias": False},
        {"hidden": ()},
        {"hidden": (7, 5, 6)},
        {"hidden": (7, 5), "activation": "gelu", "bias": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("recipe", ["plain", "all of them"])
def test_every_fully_connected_network(options: dict[str, Any], recipe: str) -> None:
    stack = compare(lambda: dense(**options), RECIPES[recipe], *data(), 13, 1e-10)
    assert isinstance(stack, DenseStack)


def test_approximate_gelu_is_another_activation() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(D, 7), nn.GELU("tanh"), nn.Linear(7, C))

    assert isinstance(compare(make, PLAIN, *data(), 13, 1e-10), DenseStack)


@pytest.mark.parametrize("size", [15, 13, 5])
def test_full_and_short_last_batches(size: int) -> None:
    compare(dense, RECIPES["momentum"], *data(), size, 1e-10)


@pytest.mark.parametrize("recipe", ["plain", "all of them"])
def test_single_precision(recipe: str) -> None:
    x, y = data(dtype=torch.float32)
    compare(dense, RECIPES[recipe], x, y, 13, 1e-4)


@pytest.mark.parametrize("recipe", ["plain", "all of them"])
def test_a_convolutional_network(recipe: str) -> None:
    def make() -> nn.Module:
        return cnn((1, 6, 6), C, channels=(2,), hidden=5)

    x, y = data(shape=(1, 6, 6))
    assert isinstance(compare(make, RECIPES[recipe], x, y, 13, 1e-10), ModuleStack)


def test_frozen_parameters_stay() -> None:
    def make() -> nn.Module:
        net = dense()
        net[1].requires_grad_(False)  # type: ignore[index]
        return net

    x, y = data()
    nets = networks(make, 2)
    stack = train_stack(nets, x, y, subsets_of(13, 2), orders(2), PLAIN)
    for k, net in enumerate(nets):
        first = net[1].weight.clone()  # type: ignore[index]
        train_one(net, x, y, subsets_of(13, 2)[k], orders(2)[k], PLAIN)
        torch.testing.assert_close(stack.parameters(k)["1.weight"], first, rtol=0, atol=0)
        torch.testing.assert_close(stack.parameters(k)["3.weight"], net[3].weight.detach())  # type: ignore[index]


def test_models_do_not_depend_on_their_company() -> None:
    x, y = data(dtype=torch.float32)
    nets, subsets = networks(dense, 5, torch.float32), subsets_of(13, 5)
    together = train_stack(nets, x, y, subsets, orders(5), PLAIN)
    other = x.clone()
    for k in (0, 3):
        outside = torch.ones(N, dtype=torch.bool)
        outside[subsets[k]] = False
        other = x.clone()
        other[outside] = 100.0  # what is outside of its subset does not matter either
        alone = train_stack(
            nets[k : k + 1], other, y, subsets[k : k + 1], orders(5)[k : k + 1], PLAIN
        )
        for name, value in alone.parameters(0).items():
            torch.testing.assert_close(value, together.parameters(k)[name])


@pytest.mark.parametrize(
    ("n", "changes"),
    [
        (100, {"momentum": 0.9, "lr_schedule": "cosine", "lr": 0.02}),
        (96, {"weight_decay": 0.01}),  # a multiple of the batch: no short batch, other draws
        (100, {"order_seed": 5}),
    ],
    ids=["short last batch", "full last batch", "fixed order"],
)
def test_a_model_on_all_examples_is_the_benchmarks_own_run(
    n: int, changes: dict[str, Any], tmp_path: Path
) -> None:
    trainer = TrainerConfig(max_epochs=3, batch_size=16, lr=0.1, progress=False)
    trainer = replace(trainer, **changes)
    config = RunConfig(
        seed=3,
        model={"_target_": "fine_bench.models.networks.mlp", "hidden": [12]},
        trainer=trainer,
        results_dir=str(tmp_path),
    )
    job = Job(config, digits_mislabel(seed=0, n_train=n, n_query=20), "0" * 64, ())
    expected = images.train(job, [], None).checkpoints[-1].params
    recipe = Recipe(
        trainer.max_epochs,
        trainer.batch_size,
        trainer.lr,
        trainer.momentum,
        trainer.weight_decay,
        trainer.lr_schedule,  # type: ignore[arg-type]
    )
    net = images.build_model(job).net
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    seed = 3 if trainer.order_seed is None else trainer.order_seed
    order = torch.Generator().manual_seed(derive(seed, "order"))
    stack = train_stack([net], job.data.x, job.data.y, torch.arange(n)[None], [order], recipe)
    for name, value in stack.parameters(0).items():
        moved = (expected[name] - start[name]).abs().max()
        assert (value - expected[name]).abs().max() < 1e-3 * moved


def test_an_order_is_a_permutation_and_epochs_differ() -> None:
    g = stream(0, "order")
    first, second = epoch_order(20, 7, g), epoch_order(20, 7, g)
    assert torch.equal(first.sort().values, torch.arange(20))
    assert not torch.equal(first, second)


def test_the_margin_keeps_its_digits_where_the_probability_is_one() -> None:
    logits = torch.tensor([[60.0, 0.0, 1.0], [0.0, 60.0, 59.0], [2.0, 2.0, 2.0]])
    y = torch.tensor([0, 0, 2])
    expected = [
        60.0 - math.log(1 + math.e),
        -math.log(math.exp(60.0) + math.exp(59.0)),
        -math.log(2.0),
    ]
    torch.testing.assert_close(margins(logits, y), torch.tensor(expected))
    many = margins(logits[None].expand(4, 3, 3), y.expand(4, 3))
    assert many.shape == (4, 3)


class Known:
    """Models whose logits are known."""

    def __init__(self, logits: Tensor) -> None:
        self.values = logits

    def __len__(self) -> int:
        return len(self.values)

    def logits(self, x: Tensor) -> Tensor:
        return self.values[:, x[:, 0].long()]


def test_losses_of_fitted_examples_do_not_vanish() -> None:
    n = 40
    logits = torch.zeros(2, n, 3, dtype=torch.float32)
    logits[0, :, 1] = torch.arange(n, dtype=torch.float32)
    logits[1, :, 2] = -torch.arange(n, dtype=torch.float32)
    x = torch.arange(n, dtype=torch.float32)[:, None].expand(n, 2**18)  # many chunks
    y = torch.ones(n, dtype=torch.int64)
    loss, margin = evaluate(Known(logits), x, y)  # type: ignore[arg-type]
    z = logits.double()
    exact = torch.log1p((z[:, :, [0, 2]] - z[:, :, 1:2]).exp().sum(-1))
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(margin[0], torch.arange(n) - math.log(2.0))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (dense, True),
        (lambda: dense(hidden=()), True),
        (lambda: nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, C)), True),
        (lambda: nn.Sequential(nn.Linear(D, 5), nn.ReLU(inplace=True), nn.Linear(5, C)), True),
        (lambda: nn.Linear(D, C), False),
        (lambda: nn.Sequential(nn.Flatten(0), nn.Linear(D, C)), False),
        (lambda: nn.Sequential(nn.Linear(D, 5), nn.Sigmoid(), nn.Linear(5, C)), False),
        (lambda: nn.Sequential(nn.Linear(D, 5), nn.ReLU()), False),
        (
            lambda: nn.Sequential(
                nn.Linear(D, 5), nn.ReLU(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, C)
            ),
            False,
        ),
        (lambda: tied(), False),
    ],
)
def test_which_networks_go_the_fast_way(make: Any, expected: bool) -> None:
    assert is_dense(make(), torch.zeros(1, D)) is expected


def tied() -> nn.Module:
    square = nn.Linear(D, D)
    return nn.Sequential(square, nn.ReLU(), square, nn.ReLU(), nn.Linear(D, C))


def test_images_without_a_flatten_and_hooked_networks_go_the_general_way() -> None:
    net = nn.Sequential(nn.Linear(D, C))
    assert not is_dense(net, torch.zeros(1, 2, D))
    net[0].register_forward_hook(lambda *_: None)
    assert not is_dense(net, torch.zeros(1, D))


class Tied(nn.Module):
    """Two modules with one weight; or, besides, one module used twice."""

    def __init__(self, twice: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, C)
        self.b.weight = self.a.weight
        if twice:
            self.again = self.a

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.c(self.b(self.a(x).tanh()).tanh())
        return logits


@pytest.mark.parametrize("make", [tied, Tied])
def test_shared_weights_are_trained_as_one(make: Any) -> None:
    assert isinstance(compare(make, PLAIN, *data(), 13, 1e-10), ModuleStack)


def test_how_many_at_once() -> None:
    assert default_stack(cnn((1, 6, 6), C, channels=(2,))) == 1
    few = default_stack(mlp((1, 6, 6), C))
    assert 1 < few < default_stack(mlp((1, 6, 6), C), "cuda")


@pytest.mark.parametrize("general", [False, True])
def test_a_diverged_model_is_named(general: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if general:
        monkeypatch.setattr("fine_bench.retraining.train.is_dense", lambda net, x: False)
    x, y = data(dtype=torch.float32)
    subsets = subsets_of(13, 3)
    only = next(
        i for i in subsets[1].tolist() if i not in {*subsets[0].tolist(), *subsets[2].tolist()}
    )
    x[only] = 1e38
    names = ["first", "second", "third"]
    with pytest.raises(DivergedModelError, match=r"^second diverged.*trainer\.lr=0\.03"):
        train_stack(networks(dense, 3, torch.float32), x, y, subsets, orders(3), PLAIN, names)


def test_outputs_that_overflow_are_named_too() -> None:
    logits = torch.zeros(2, 3, 3)
    logits[1, 2, 0] = math.inf
    x = torch.arange(3.0)[:, None]
    with pytest.raises(DivergedModelError, match="model 1 diverged"):
        evaluate(Known(logits), x, torch.zeros(3, dtype=torch.int64))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (nn.BatchNorm1d(5, track_running_stats=False), "mixes the examples of a batch"),
        (nn.InstanceNorm1d(5), "use GroupNorm, LayerNorm"),
        (nn.AlphaDropout(0.1), "draws from the global random state"),
        (nn.Dropout(0.1), "this training has no stream for it"),
    ],
)
def test_networks_that_cannot_be_stacked(part: nn.Module, message: str) -> None:
    net = nn.Sequential(nn.Linear(D, 5), part, nn.Linear(5, C)).double()
    with pytest.raises(UnsupportedProblemError, match=message):
        train_stack([net], *data(), subsets_of(13, 1), orders(1), PLAIN)


class FromStream(nn.Module):
    """Dropout by a generator, as torch writes it: the plain twin of what a stack does."""

    def __init__(self, p: float, generator: torch.Generator) -> None:
        super().__init__()
        self.p, self.generator = p, generator

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = torch.empty_like(x).bernoulli_(1 - self.p, generator=self.generator)
        return x * kept / (1 - self.p)


@pytest.mark.parametrize("count", [1, 3])
def test_dropout_draws_from_each_models_own_stream(count: int) -> None:
    x, y = data()
    nets = networks(lambda: dense(hidden=(7, 5), dropout=0.4), count)
    subsets = subsets_of(13, count)  # the last batch of an epoch is a short one
    draws = [stream(k, "dropout") for k in range(count)]
    stack = train_stack(nets, x, y, subsets, orders(count), PLAIN, draws=draws)
    assert isinstance(stack, ModuleStack)
    undropped = train_stack(
        networks(lambda: dense(hidden=(7, 5)), count), x, y, subsets, orders(count), PLAIN
    )
    for k, net in enumerate(networks(lambda: dense(hidden=(7, 5), dropout=0.4), count)):
        generator = stream(k, "dropout")
        parts = [FromStream(p.p, generator) if isinstance(p, nn.Dropout) else p for p in net]
        twin = train_one(nn.Sequential(*parts), x, y, subsets[k], orders(count)[k], PLAIN)
        found = stack.parameters(k)
        for name, expected in twin.named_parameters():
            assert (found[name] - expected).abs().max() < 1e-12
        # what is evaluated drops nothing
        assert (stack.logits(x)[k] - twin.eval()(x)).abs().max() < 1e-12
        assert (stack.logits(x)[k] - undropped.logits(x)[k]).abs().max() > 0.01


def test_a_dropout_that_is_used_twice_is_refused() -> None:
    same = nn.Dropout(0.1)
    net = nn.Sequential(nn.Linear(D, 5), same, nn.ReLU(), same, nn.Linear(5, C)).double()
    draws = [stream(0, "dropout")]
    with pytest.raises(UnsupportedProblemError, match=r"is called 2 times in a pass.*of its own"):
        train_stack([net], *data(), subsets_of(13, 1), orders(1), PLAIN, draws=draws)


def normalised_dense() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 5, bias=False), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, C))


def test_batch_normalisation_has_statistics_of_each_models_own() -> None:
    x, y = data()
    stack = compare(normalised_dense, PLAIN, x, y, 13, 1e-10)
    assert isinstance(stack, ModuleStack)
    assert default_stack(normalised_dense()) > 1
    with pytest.raises(UnsupportedProblemError, match="still acts on the others"):
        stack.step(x.expand(3, *x.shape), y.expand(3, -1), 0.1, torch.ones(3, len(y)))


def test_sharing_in_both_ways_is_refused() -> None:
    with pytest.raises(UnsupportedProblemError, match="the same module twice"):
        train_stack([Tied(twice=True)], *data(), subsets_of(13, 1), orders(1), PLAIN)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_epochs": 0}, "max_epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be a positive number"),
        ({"lr": math.nan}, "lr must be a positive number"),
        ({"momentum": -0.1}, "momentum must not be negative"),
        ({"weight_decay": math.inf}, "weight_decay must not be negative"),
        ({"lr_schedule": "linear"}, "lr_schedule must be one of"),
    ],
)
def test_impossible_recipes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(PLAIN, **changes)


def test_arguments_that_do_not_match() -> None:
    x, y = data()
    with pytest.raises(ValueError, match="1 networks, 2 subsets and 2 orders"):
        train_stack(networks(dense, 1), x, y, subsets_of(13, 2), orders(2), PLAIN)
    with pytest.raises(ValueError, match="batch_size=5 is larger than a subset of 4"):
        train_stack(networks(dense, 2), x, y, subsets_of(4, 2), orders(2), PLAIN)


def test_the_reference_itself_is_gradient_descent_on_the_mean_loss() -> None:
    """By hand: one full-batch step of softmax regression, with weight decay."""
    x, y = data()
    recipe = Recipe(max_epochs=1, batch_size=N, lr=0.3, weight_decay=0.2)
    net = nn.Linear(D, C, bias=False).double()
    start = net.weight.detach().clone()
    p = (x @ start.T).softmax(-1)
    gradient = (p - F.one_hot(y, C)).T @ x / N
    train_one(net, x, y, torch.arange(N), stream(0, "order"), recipe)
    expected = start - 0.3 * (gradient + 0.2 * start)
    torch.testing.assert_close(net.weight.detach(), expected)
