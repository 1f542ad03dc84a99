"""The exact derivative of a run against ``torch.func`` through the unrolled training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vjp
from torch.utils.data import TensorDataset

import baselines.unrolled as module
from baselines.unrolled import Unrolled
from fine_bench import Checkpoint, InfluenceScores, Problem, TrainingSteps, replay
from fine_bench.gradients.batch_products import (
    DenseProducts,
    MappedProducts,
    Matrix,
    batch_products,
)
from fine_bench.gradients.margin import margins
from fine_bench.gradients.update_rules import rule_of
from support.tensors import close

N, V, CLASSES, SIZE, EPOCHS = 11, 4, 3, 4, 3


def tanh() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4, bias=False), nn.Tanh(), nn.Linear(4, CLASSES)
    )


def relu() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, CLASSES))


def gelu() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6, bias=False), nn.GELU(), nn.Linear(6, CLASSES))


def convolution() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 3, 2), nn.Softplus(), nn.Flatten(),
        nn.LayerNorm(12), nn.Linear(12, CLASSES),
    )  # fmt: skip


NETS = [tanh, relu, gelu, convolution]
SGD: dict[str, Any] = {"momentum": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False}
OPTIMIZERS: dict[str, tuple[str, float, dict[str, Any]]] = {
    "plain": ("SGD", 0.3, {}),
    "decay": ("SGD", 0.3, {"weight_decay": 0.2}),
    "strong decay": ("SGD", 0.3, {"weight_decay": 5.0}),
    "momentum": ("SGD", 0.2, {"momentum": 0.8, "weight_decay": 0.1}),
    "adam": ("Adam", 0.03, {"betas": (0.7, 0.9), "weight_decay": 0.1}),
    "adamw": ("AdamW", 0.03, {"eps": 1e-3}),
}


def data() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(N + V, 5, generator=g, dtype=torch.float64) + 0.2
    return x, torch.randint(CLASSES, (N + V,), generator=g)


def made(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return make().double()


def batches() -> list[Tensor]:
    """Orders of a few epochs, the last batch of each a short one."""
    g = torch.Generator().manual_seed(1)
    return [part for _ in range(EPOCHS) for part in torch.randperm(N, generator=g).split(SIZE)]


def rates(lr: float) -> list[float]:
    """A schedule that ends at 0."""
    count = len(batches())
    return [lr * (1 - t / (count - 1)) for t in range(count)]


def problem(
    make: Callable[[], nn.Module] = tanh, optimizer: str = "plain", **options: Any
) -> tuple[Problem, list[Checkpoint]]:
    """A run with ``torch.optim``, its checkpoints, and the question."""
    kind, lr, chosen = OPTIMIZERS[optimizer]
    model, (x, y) = made(make), data()
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    trained = getattr(torch.optim, kind)(model.parameters(), lr=lr, **chosen)
    kept = []
    for t, (rows, rate) in enumerate(zip(batches(), rates(lr), strict=True)):
        trained.param_groups[0]["lr"] = rate
        trained.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        trained.step()
        if t in (3, len(batches()) - 1):
            state = {name: value.clone() for name, value in model.state_dict().items()}
            kept.append(Checkpoint(state, lr=lr, step=t + 1))
    steps = TrainingSteps(initial, batches(), rates(lr), kind, trained.defaults)
    options = {"queries": TensorDataset(x[N:], y[N:]), "steps": steps, **options}
    return Problem(model, F.cross_entropy, TensorDataset(x[:N], y[:N]), **options), kept


# ---------------------------------------------------------------------------------------- the twin


def train(
    model: nn.Module, optimizer: str, weights: Tensor, length: int | None = None
) -> dict[str, Tensor]:
    """The parameters after the weighted training, as a function of the weights alone."""
    kind, lr, chosen = OPTIMIZERS[optimizer]
    x, y = data()
    values = {name: p.detach() for name, p in model.named_parameters()}
    decay = chosen.get("weight_decay", 0.01 if kind == "AdamW" else 0.0)
    beta1, beta2 = chosen.get("betas", (0.9, 0.999))
    first = {name: torch.zeros_like(p) for name, p in values.items()}
    second = {name: torch.zeros_like(p) for name, p in values.items()}
    steps = [*zip(batches(), rates(lr), strict=True)][:length]
    for t, (rows, rate) in enumerate(steps, 1):

        def loss(values: dict[str, Tensor], rows: Tensor = rows) -> Tensor:
            losses = F.cross_entropy(
                functional_call(model, values, (x[rows],)), y[rows], reduction="none"
            )
            return (losses * weights[rows]).sum() / len(rows)

        slope = grad(loss)(values)
        if kind == "AdamW":
            values = {name: p * (1 - rate * decay) for name, p in values.items()}
        else:
            slope = {name: g + decay * values[name] for name, g in slope.items()}
        if kind == "SGD":
            first = {n: chosen.get("momentum", 0.0) * v + slope[n] for n, v in first.items()}
            values = {n: p - rate * first[n] for n, p in values.items()}
            continue
        first = {n: beta1 * m + (1 - beta1) * slope[n] for n, m in first.items()}
        second = {n: beta2 * v + (1 - beta2) * slope[n] ** 2 for n, v in second.items()}
        eps = chosen.get("eps", 1e-8)
        values = {
            n: p
            - rate
            * (first[n] / (1 - beta1**t))
            / ((second[n] / (1 - beta2**t)).clamp_min(1e-300).sqrt() + eps)
            for n, p in values.items()
        }
    return values


def outcome(
    make: Callable[[], nn.Module],
    optimizer: str,
    observable: str = "margin",
    length: int | None = None,
) -> Any:
    """w ↦ f_q(θ_T(w)), ``(V,)``."""
    model, (x, y) = made(make), data()

    def f(weights: Tensor) -> Tensor:
        logits = functional_call(model, train(model, optimizer, weights, length), (x[N:],))
        if observable == "margin":
            return margins(logits, y[N:])
        return -F.cross_entropy(logits, y[N:], reduction="none")

    return f


def twin(make: Callable[[], nn.Module], optimizer: str, observable: str = "margin") -> Tensor:
    jacobian: Tensor = jacrev(outcome(make, optimizer, observable))(
        torch.ones(N, dtype=torch.float64)
    )
    return jacobian


def scores(question: tuple[Problem, list[Checkpoint]], **options: Any) -> InfluenceScores:
    return replay(Unrolled(**options), *question)


# --------------------------------------------------------------------------------------- the scores


@pytest.mark.parametrize("make", NETS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_derivative_of_the_run(make: Callable[[], nn.Module], optimizer: str) -> None:
    found = scores(problem(make, optimizer))
    close(found.values, twin(make, optimizer), 1e-8)
    assert float(found.extras["replay_gap"]) < 1e-10


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_finite_differences(optimizer: str) -> None:
    f, h = outcome(tanh, optimizer), 1e-4
    one = torch.ones(N, dtype=torch.float64)
    slopes = [(f(one + h * e) - f(one - h * e)) / (2 * h) for e in torch.eye(N).double()]
    close(scores(problem(tanh, optimizer)).values, torch.stack(slopes, 1), 1e-6)


@pytest.mark.parametrize("every", [1, 4, 100])
def test_moments_kept_change_nothing(every: int) -> None:
    close(scores(problem(relu, "momentum"), every=every).values, twin(relu, "momentum"), 1e-8)


def test_the_loss_as_observable() -> None:
    close(scores(problem(), observable="loss").values, twin(tanh, "plain", "loss"), 1e-8)


def test_means_of_queries() -> None:
    each = twin(tanh, "momentum")
    mean = scores(problem(tanh, "momentum", reduce="mean")).values
    close(mean, each.mean(0, keepdim=True), 1e-8)
    y = data()[1][N:]
    of_class = torch.stack([each[y == k].mean(0) for k in y.unique()])
    close(scores(problem(tanh, "momentum", reduce="class")).values, of_class, 1e-8)


def test_chunks_of_queries_and_the_examples_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, (x, y) = scores(problem()).values, data()
    examples = TensorDataset(x[:N], y[:N])
    own = scores(problem(queries=examples)).values.diagonal()[None]
    monkeypatch.setattr(module, "QUERY_FLOATS", 200)
    close(scores(problem()).values, whole, 1e-12)
    close(scores(problem(queries="self")).values, own, 1e-12)


def test_up_to_an_earlier_checkpoint() -> None:
    """The derivative of what was kept last, whatever was trained afterwards."""
    question, kept = problem(tanh, "momentum")
    jacobian = jacrev(outcome(tanh, "momentum", length=4))(torch.ones(N, dtype=torch.float64))
    close(replay(Unrolled(), question, kept[:1]).values, jacobian, 1e-8)


def test_float32_agrees_with_float64() -> None:
    question, kept = problem(relu, "momentum")
    x, y = data()
    single = Problem(
        made(relu).float(),
        F.cross_entropy,
        TensorDataset(x[:N].float(), y[:N]),
        TensorDataset(x[N:].float(), y[N:]),
        steps=TrainingSteps(
            {name: value.float() for name, value in question.steps.initial.items()},  # type: ignore[union-attr]
            batches(), rates(0.2), "SGD", {"momentum": 0.8, "weight_decay": 0.1},
        ),
    )  # fmt: skip
    points = [Checkpoint({k: v.float() for k, v in c.params.items()}, c.lr, c.step) for c in kept]
    close(replay(Unrolled(), single, points).values.double(), twin(relu, "momentum"), 1e-4)


# ------------------------------------------------------------------------------------- the products


@pytest.mark.parametrize("matrix", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("make", NETS)
def test_products_against_explicit_derivatives(
    make: Callable[[], nn.Module], matrix: Matrix
) -> None:
    model, (x, y) = made(make), data()
    x, y = x[:6], y[:6]
    params = {name: p.detach() for name, p in model.named_parameters()}
    g = torch.Generator().manual_seed(2)
    k = 3
    vectors = {n: torch.randn(k, *p.shape, generator=g).double() for n, p in params.items()}

    def output(values: dict[str, Tensor]) -> Tensor:
        z: Tensor = functional_call(model, values, (x,))
        return z

    def losses(values: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(output(values), y, reduction="none")

    def one(v: dict[str, Tensor]) -> dict[str, Tensor]:
        if matrix == "hessian":
            result: dict[str, Tensor] = jvp(
                grad(lambda values: losses(values).mean()), (params,), (v,)
            )[1]
            return result
        z, dz = jvp(output, (params,), (v,))
        p = torch.softmax(z, 1)
        bent = p * dz - p * (p * dz).sum(1, keepdim=True)
        pulled: dict[str, Tensor] = vjp(output, params)[1](bent / len(y))[0]
        return pulled

    expected = [one({n: v[i] for n, v in vectors.items()}) for i in range(k)]
    slopes = torch.stack(
        [jvp(losses, (params,), ({n: v[i] for n, v in vectors.items()},))[1] for i in range(k)]
    )
    ways = [MappedProducts(model, F.cross_entropy, matrix)]
    chosen = batch_products(model, F.cross_entropy, matrix, x)
    assert isinstance(chosen, DenseProducts) == (make is not convolution)
    for way in [*ways, chosen]:
        for alias in (False, True):
            into = [v.clone() for v in vectors.values()]
            along = into if alias else [v.clone() for v in vectors.values()]
            found = way.at(list(params.values()), x, y)(along, into, -0.7)
            close(found, slopes, 1e-10)
            for name, value in zip(params, into, strict=True):
                right = torch.stack([e[name] for e in expected])
                close(value, vectors[name] - 0.7 * right, 1e-10)


def test_gauss_newton_is_another_matrix() -> None:
    exact = scores(problem(tanh, "momentum"))
    other = scores(problem(tanh, "momentum"), matrix="gauss_newton")
    assert not torch.allclose(exact.values, other.values, rtol=1e-3)
    assert torch.isfinite(other.values).all()


# ----------------------------------------------------------------------------------------- refusals


def refused(question: tuple[Problem, list[Checkpoint]]) -> str:
    with pytest.raises(ValueError, match=r"\w") as error:
        scores(question)
    return str(error.value)


def test_a_run_whose_order_was_not_kept_is_refused() -> None:
    message = refused(problem(steps=None))
    assert "not kept" in message
    assert "TrainingSteps(initial, batches, lr" in message


def test_another_order_is_refused() -> None:
    question, kept = problem()
    steps = question.steps
    assert steps is not None
    other = TrainingSteps(steps.initial, list(steps.batches)[::-1], steps.lr, "SGD")
    message = refused(problem(steps=other))
    assert "does not lead to the checkpoint after step 4" in message
    assert "pass the initial parameters, batches" in message
    del kept


@pytest.mark.parametrize(
    ("optimizer", "options", "match"),
    [
        ("RMSprop", {}, "SGD, Adam and AdamW are"),
        ("SGD", {"nesterov": True}, "nesterov=True is not known; train without"),
        ("AdamW", {"amsgrad": True}, "amsgrad=True is not known"),
        ("SGD", {"betas": (0.9, 0.99)}, "leave them out"),
    ],
)
def test_an_unknown_update_is_refused(optimizer: str, options: dict[str, Any], match: str) -> None:
    steps = problem()[0].steps
    assert steps is not None
    other = TrainingSteps(steps.initial, steps.batches, steps.lr, optimizer, options)
    assert match in refused(problem(steps=other))
    with pytest.raises(ValueError, match=match):
        rule_of(optimizer, options)


def test_what_drew_at_random_is_refused() -> None:
    def dropout() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5), nn.Linear(6, CLASSES))

    assert "1 (Dropout) drew at random" in refused(problem(dropout))


def test_positions_that_do_not_exist_are_refused() -> None:
    steps = problem()[0].steps
    assert steps is not None
    other = TrainingSteps(steps.initial, [b + 5 for b in steps.batches], steps.lr, "SGD")
    assert f"there are {N} training examples" in refused(problem(steps=other))
    few = TrainingSteps(steps.initial, steps.batches[:5], steps.lr[:5], "SGD")
    assert "left after step 9, but steps= knows 5" in refused(problem(steps=few))
    nameless = TrainingSteps({"w": torch.zeros(1)}, steps.batches, steps.lr, "SGD")
    assert "steps.initial has no parameter '0.weight'" in refused(problem(steps=nameless))


def test_self_of_much_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SELF_FLOATS", 10)
    assert "ask about single queries or their mean" in refused(problem(queries="self"))


def test_steps_check_themselves() -> None:
    one = {"w": torch.zeros(1)}
    rows = torch.arange(3)
    with pytest.raises(ValueError, match="initial is empty"):
        TrainingSteps({}, [rows], [0.1])
    with pytest.raises(ValueError, match="2 batches and 1 step sizes"):
        TrainingSteps(one, [rows, rows], [0.1])
    with pytest.raises(ValueError, match="finite numbers ≥ 0"):
        TrainingSteps(one, [rows], [-0.1])
    with pytest.raises(ValueError, match=r"batches\[0\] must be positions"):
        TrainingSteps(one, [rows.float()], [0.1])


def test_options_are_checked() -> None:
    for wrong in ({"observable": "logit"}, {"matrix": "fisher"}, {"every": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Unrolled(**wrong)  # type: ignore[arg-type]
