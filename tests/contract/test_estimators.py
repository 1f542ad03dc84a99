"""What every post-hoc method must do, whichever it is: methods are found, not listed."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import baselines
from fine_bench import Checkpoint, InfluenceEstimator, Problem, replay

N, N_QUERY, CLASSES = 30, 8, 3


def found() -> list[type[InfluenceEstimator]]:
    classes = set()
    for info in pkgutil.iter_modules(baselines.__path__):
        module = importlib.import_module(f"baselines.{info.name}")
        for _, kind in inspect.getmembers(module, inspect.isclass):
            own = kind.__module__ == module.__name__ and "name" in vars(kind)
            if own and issubclass(kind, InfluenceEstimator) and not inspect.isabstract(kind):
                classes.add(kind)
    return sorted(classes, key=lambda kind: kind.__name__)


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, CLASSES))


def tensors(n: int, seed: int) -> TensorDataset:
    g = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, 4, generator=g), torch.arange(n) % CLASSES)


QUESTIONS: dict[str, dict[str, Any]] = {
    "self": {"queries": "self"},
    "queries": {"queries": tensors(N_QUERY, 2)},
    "validation": {"queries": tensors(N_QUERY, 2), "reduce": "mean"},
    "validation_per_class": {"queries": tensors(N_QUERY, 2), "reduce": "class"},
}
ROWS = {"self": 1, "queries": N_QUERY, "validation": 1, "validation_per_class": CLASSES}

# dim > n is refused by TRAK without a ridge, and SOURCE counts steps, which the checkpoints below
# do not state: the smallest changes that let them answer here
OPTIONS: dict[str, dict[str, Any]] = {
    "TRAK": {"ridge": 0.1},
    "SOURCE": {"steps_per_checkpoint": 10},
}


def question(target: str, model: nn.Module | None = None, **options: Any) -> Problem:
    return Problem(
        model=model or net(),
        loss=F.cross_entropy,
        **{"train": tensors(N, 1), **QUESTIONS[target], **options},
    )


def checkpoints() -> list[Checkpoint]:
    one, two = net(), net()
    with torch.no_grad():
        for p in two.parameters():
            p.mul_(1.1)
    return [Checkpoint(one.state_dict(), 0.1), Checkpoint(two.state_dict(), 0.05)]


def make(kind: type[InfluenceEstimator]) -> InfluenceEstimator:
    return kind(**OPTIONS.get(kind.__name__, {}))


def answer(kind: type[InfluenceEstimator], problem: Problem) -> Tensor:
    estimator = make(kind)
    reason = estimator.unsupported(problem)
    if reason is not None:
        assert len(reason) > 10
        pytest.skip(f"{kind.__name__}: {reason}")
    return replay(estimator, problem, checkpoints()).values


KINDS = found()
CASES = [(kind, target) for kind in KINDS for target in QUESTIONS]


def test_methods_are_found() -> None:
    assert {"TracIn", "RandomScores", "MeanTrainingLoss"} <= {kind.__name__ for kind in KINDS}
    assert len({kind.name for kind in KINDS}) == len(KINDS)


@pytest.mark.parametrize(("kind", "target"), CASES)
def test_shape_and_finiteness(kind: type[InfluenceEstimator], target: str) -> None:
    problem = question(target)
    values = answer(kind, problem)
    assert values.shape == (ROWS[target], N)
    assert torch.isfinite(values).all()


@pytest.mark.parametrize(("kind", "target"), CASES)
def test_scores_do_not_depend_on_how_data_are_read(
    kind: type[InfluenceEstimator], target: str
) -> None:
    whole = answer(kind, question(target, net().double(), **double(target)))
    pieces = answer(kind, question(target, net().double(), **double(target), batch_size=7))
    assert torch.allclose(whole, pieces, rtol=1e-9, atol=1e-12 * float(whole.abs().max()))

    class Items(Dataset[Any]):
        """Not a TensorDataset: read through a DataLoader."""

        def __init__(self, source: Dataset[Any]) -> None:
            self.source = source

        def __len__(self) -> int:
            return len(self.source)  # type: ignore[arg-type]

        def __getitem__(self, i: int) -> Any:
            return self.source[i]

    options = double(target)
    options["train"] = Items(options["train"])
    read = answer(kind, question(target, net().double(), **options))
    assert torch.allclose(whole, read, rtol=1e-9, atol=1e-12 * float(whole.abs().max()))


def double(target: str) -> dict[str, Any]:
    def cast(data: TensorDataset) -> TensorDataset:
        return TensorDataset(data.tensors[0].double(), data.tensors[1])

    options: dict[str, Any] = {"train": cast(tensors(N, 1))}
    if target != "self":
        options["queries"] = cast(tensors(N_QUERY, 2))
    return options


@pytest.mark.parametrize("kind", KINDS)
def test_the_problem_is_left_as_found(kind: type[InfluenceEstimator]) -> None:
    model = net()
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    for target in ("self", "validation"):
        problem = question(target, model)
        if make(kind).unsupported(problem) is None:
            replay(make(kind), problem, checkpoints())
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("kind", KINDS)
def test_one_estimator_can_serve_one_problem_after_another(kind: type[InfluenceEstimator]) -> None:
    estimator = make(kind)
    if estimator.unsupported(question("self")) is not None:
        pytest.skip("does not serve self")
    first = replay(estimator, question("self"), checkpoints()).values
    assert torch.equal(first, replay(estimator, question("self"), checkpoints()).values)


@pytest.mark.parametrize("kind", KINDS)
def test_misuse_is_refused(kind: type[InfluenceEstimator]) -> None:
    estimator = make(kind)
    if estimator.unsupported(question("self")) is not None:
        pytest.skip("does not serve self")
    with pytest.raises(ValueError, match="at least one checkpoint"):
        replay(estimator, question("self"), [])
    estimator.setup(question("self"))
    with pytest.raises(RuntimeError, match="before update"):
        estimator.compute()


def test_a_checkpoint_of_another_model_is_refused() -> None:
    from baselines.tracin import TracIn

    other = Checkpoint(nn.Linear(2, 2).state_dict(), 0.1)
    with pytest.raises(ValueError, match="does not fit the model"):
        replay(TracIn(), question("self"), [other])


def test_a_loader_leaves_the_global_random_state_alone() -> None:
    assert isinstance(DataLoader(tensors(3, 0)), DataLoader)
    problem = question("self", num_workers=1)
    state = torch.get_rng_state()
    list(problem.batches("train"))
    assert torch.equal(state, torch.get_rng_state())
