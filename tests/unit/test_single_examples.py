"""Directions that are single examples' gradients, held by their factors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fine_bench.gradients.blocks.single_examples import SingleExamples
from fine_bench.gradients.curvature.ekfac import SolvedExamples, fit_ekfac
from fine_bench.gradients.curvature.products import Roots
from fine_bench.gradients.engine import GradientEngine
from support.tensors import close


def made() -> tuple[nn.Module, Tensor, Tensor]:
    """A convolution, a linear layer without a bias and one with it; 9 examples."""
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv1d(1, 2, 3),
        nn.Flatten(),
        nn.Linear(8, 5, bias=False),
        nn.Tanh(),
        nn.Linear(5, 3),
    ).double()
    return net, torch.randn(9, 1, 6, dtype=torch.float64), torch.randint(3, (9,))


def test_products_are_those_of_the_formed_directions() -> None:
    net, x, y = made()
    engine = GradientEngine(net, F.cross_entropy)
    queries, train = engine(x[:4], y[:4]), engine(x[4:], y[4:])
    weights = torch.tensor([0.5, 2.0, -1.0, 3.0], dtype=torch.float64)
    found = queries.each(weights)
    assert [isinstance(part, SingleExamples) for part in found] == [False, True, True]
    expected = weights[:, None] * queries.dense() @ train.dense().T
    close(train.contract(found), expected)
    formed = queries.weighted_sum(torch.diag(weights))
    for part, whole in zip(found, formed, strict=True):
        for mine, theirs in ((part.weight, whole.weight), (part.bias, whole.bias)):
            assert (mine is None) == (theirs is None)
            if mine is not None and theirs is not None:
                close(mine, theirs)


def test_parameters_that_the_optimiser_does_not_move_have_no_part_in_products() -> None:
    net, x, y = made()
    engine = GradientEngine(net, F.cross_entropy)
    queries, train = engine(x[:4], y[:4]), engine(x[4:], y[4:])
    weights = torch.tensor([0.5, 2.0, -1.0, 3.0], dtype=torch.float64)
    last = train.blocks[-1]
    sizes = [15, 3]  # of the weight and the bias
    for factors in ([1.0, 0.0], [0.0, 1.0], [2.0, 0.5]):
        moved = last.by_parameter(factors, sizes)
        assert moved is not None
        direction = queries.each(weights)[-1]
        assert isinstance(direction, SingleExamples)
        each = torch.repeat_interleave(torch.tensor(factors).double(), torch.tensor(sizes))
        own = weights[:, None] * queries.blocks[-1].dense()
        close(direction.products(moved), own * each @ last.dense().T)


def test_solved_directions_stay_in_the_eigenbasis() -> None:
    net, x, y = made()
    engine = GradientEngine(net, F.cross_entropy)
    roots = Roots("fisher", F.cross_entropy, torch.rand(9, 1, dtype=torch.float64))
    fitted = fit_ekfac(engine, lambda: iter([(slice(0, 9), x, y)]), roots, 9)
    fitted.damp(None, 0.3)
    queries, train = engine(x[:4], y[:4]), engine(x[4:], y[4:])
    weights = torch.tensor([0.5, 2.0, -1.0, 3.0], dtype=torch.float64)
    found = fitted.solve(queries.each(weights))
    assert [isinstance(part, SolvedExamples) for part in found] == [False, True, True]
    formed = fitted.solve(queries.weighted_sum(torch.diag(weights)))
    expected = train.contract(formed)
    close(train.contract(found), expected)
    # damping anew belongs to the next directions
    fitted.damp(None, 5.0)
    close(train.contract(found), expected)
    for part, whole in zip(found, formed, strict=True):
        assert part.weight is not None
        assert whole.weight is not None
        close(part.weight, whole.weight)
