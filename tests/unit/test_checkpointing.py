"""Gradient checkpointing: layers run again in the backward pass, some recorded only there."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

from fine_bench.callback import FINECallback
from support.runs import fit, mu_of_self

N, D, CLASSES = 15, 4, 3


class Checkpointed(nn.Module):
    """Three parts of which the last, with the head, may be checkpointed too; one runs twice."""

    def __init__(self, reentrant: bool | None, whole: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, D), nn.Linear(D, D)
        self.attention = nn.MultiheadAttention(D, 2)
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, CLASSES)
        self.reentrant, self.whole = reentrant, whole

    def part(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(torch.tanh(self.first(x))))

    def mixed(self, x: Tensor) -> Tensor:
        return self.norm(x + self.attention(x, x, x, need_weights=False)[0])

    def last(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(x).mean(0))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x.transpose(0, 1)))
        if self.reentrant is None or not torch.is_grad_enabled():
            return self.last(self.part(self.mixed(self.part(x))))
        for part in (self.part, self.mixed, self.part):
            x = checkpoint(part, x, use_reentrant=self.reentrant)
        return (
            checkpoint(self.last, x, use_reentrant=self.reentrant) if self.whole else self.last(x)
        )


def build(reentrant: bool | None, whole: bool) -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Checkpointed(reentrant, whole).double()
        return net, torch.randn(N, 6, D).double(), torch.arange(N) % CLASSES


@pytest.mark.any_trainer("gradient checkpointing")
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("sketch", [None, 2])
def test_scores_of_a_checkpointed_run(reentrant: bool, whole: bool, sketch: int | None) -> None:
    """Equal to those without it, on the margin and on the loss; weights are the same, too."""
    results = []
    for how in (None, reentrant):
        for observable in ("margin", "loss"):
            net, x, y = build(how, whole)
            watched = FINECallback(observable=observable, sketch=sketch)  # type: ignore[arg-type]
            diary = fit(net, x, y, F.cross_entropy, [watched], epochs=1)
            results.append((watched.scores().values[0].double(), net, diary))
    for (plain, net, _), (found, other, _) in zip(results[:2], results[2:], strict=True):
        assert float((plain - found).abs().max()) <= 1e-6 * float(plain.abs().max())
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            assert torch.allclose(p, q, atol=1e-12)
    if sketch is None:
        expected = mu_of_self(
            build(None, whole)[0], diary, *build(None, whole)[1:], F.cross_entropy
        )
        assert float((results[3][0] - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    net, x, y = build(reentrant, whole)
    fit(net, x, y, F.cross_entropy, [], epochs=1)
    for p, q in zip(net.parameters(), results[3][1].parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.any_trainer("gradient checkpointing")
def test_passes_beside_the_training_need_the_form_that_is_not_reentrant() -> None:
    def run(reentrant: bool) -> Tensor:
        net, x, y = build(reentrant, whole=False)
        watched = FINECallback("validation", queries=TensorDataset(x[:4], y[:4]))
        fit(net, x, y, F.cross_entropy, [watched], epochs=1)
        return watched.scores().values

    with pytest.raises(RuntimeError, match="set use_reentrant=False"):
        run(reentrant=True)
    assert float(run(reentrant=False).std()) > 0
