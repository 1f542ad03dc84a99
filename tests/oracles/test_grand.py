"""GraNd against norms of gradients taken one example after the other."""

from __future__ import annotations

import pytest
import torch
from test_controls import make  # type: ignore[import-not-found]
from torch import Tensor

from baselines.controls import GradientNorm
from baselines.grand import GraNd
from fine_bench import Checkpoint, Problem, replay


def norms(task: Problem, checkpoint: Checkpoint) -> Tensor:
    model = task.model
    model.load_state_dict(dict(checkpoint.params))
    x, y = task.train.tensors  # type: ignore[attr-defined]
    result = []
    for i in range(len(x)):
        loss = task.loss(model(x[i : i + 1]), y[i : i + 1], reduction="none").sum()
        grads = torch.autograd.grad(loss, list(model.parameters()))
        result.append(torch.cat([g.flatten() for g in grads]).norm())
    return torch.stack(result)


@pytest.mark.parametrize("first", [1, 3, 9, None])
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_the_mean_norm_over_the_first_checkpoints(kind: str, first: int | None) -> None:
    task, checkpoints = make(kind)
    estimator = GraNd(first=first)
    found = replay(estimator, task, checkpoints)
    used = checkpoints[:first]
    expected = torch.stack([norms(task, c) for c in used]).mean(0)
    assert float((found.values[0] - expected).abs().max()) <= 1e-12 * float(expected.max())
    # later checkpoints are not even looked at
    assert estimator.gradient_evaluations == len(used) * len(expected)


def test_at_one_checkpoint_it_is_the_gradient_norm() -> None:
    task, checkpoints = make("mlp")
    one = replay(GraNd(), task, checkpoints[-1:])
    assert torch.allclose(one.values, replay(GradientNorm(), task, checkpoints).values, rtol=1e-12)
    assert one.method == "grand"


def test_named_layers_only() -> None:
    task, checkpoints = make("mlp")
    some = replay(GraNd(layers=["2"]), task, checkpoints).values
    assert bool((some < replay(GraNd(), task, checkpoints).values).all())


def test_no_checkpoint_at_all_is_refused() -> None:
    with pytest.raises(
        ValueError, match="first must be at least 1, or None for all checkpoints, got 0"
    ):
        GraNd(first=0)
