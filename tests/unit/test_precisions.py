"""Forms of tensors and of modules' uses that change nothing: what a run has is what is scored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fine_bench.callback import FINECallback
from support.runs import fit, mu_of_self

N, BATCH, CLASSES = 15, 6, 3


class Images(nn.Module):
    """Convolutions of every kind, and one layer that is used twice."""

    def __init__(self, *, channels_last: bool = False) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.twice = nn.Conv2d(4, 4, 2, padding=1, stride=2)
        self.grouped, self.point = nn.Conv2d(4, 4, 3, groups=2, padding=1), nn.Conv2d(4, 4, 1)
        self.same, self.head = nn.Linear(4, 4), nn.Linear(4, CLASSES)
        self.channels_last = channels_last
        if channels_last:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        x = torch.tanh(self.norm(self.first(x)))
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        x = torch.tanh(self.point(torch.tanh(self.grouped(x)))).mean((2, 3))
        return self.head(torch.tanh(self.same(torch.tanh(self.same(x)))))


def build(**options: Any) -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Images(**options), torch.randn(N, 3, 5, 5), torch.arange(N) % CLASSES


def check_run(*, tolerance: float, dtype: torch.dtype, **options: Any) -> None:
    net, x, y = build(**options)
    net, x = net.to(dtype), x.to(dtype)
    watched = FINECallback(observable="loss")
    diary = fit(net, x, y, F.cross_entropy, [watched], batch=BATCH)
    exact, _, _ = build()
    expected = mu_of_self(exact.double(), diary, x.double(), y, F.cross_entropy)
    got = watched.scores().values[0].double()
    assert float((got - expected).abs().max()) <= tolerance * float(expected.abs().max())
    again, x, y = build(**options)
    again, x = again.to(dtype), x.to(dtype)
    fit(again, x, y, F.cross_entropy, [], batch=BATCH)
    for p, q in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.any_trainer("float64")
@pytest.mark.any_trainer("a module that is used twice")
def test_float64() -> None:
    check_run(tolerance=1e-6, dtype=torch.float64)


@pytest.mark.any_trainer("channels-last")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_channels_last(dtype: torch.dtype) -> None:
    tolerance = 1e-6 if dtype == torch.float64 else 1e-3
    check_run(tolerance=tolerance, dtype=dtype, channels_last=True)


@pytest.mark.any_trainer("parameters in bfloat16")
def test_bfloat16() -> None:
    check_run(tolerance=0.2, dtype=torch.bfloat16)
