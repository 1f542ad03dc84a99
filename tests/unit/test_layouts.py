"""Layers whose inputs have the examples elsewhere than first, or that all examples share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fine_bench.callback import FINECallback
from fine_bench.gradients.layout import FIRST, SHARED, Layout, layout_of
from fine_bench.types import UnsupportedProblemError
from support.runs import check_engine, check_run, fit, mu_of_self, scores_of

N, BATCH, T, D, CLASSES = 15, 6, 6, 4, 3  # T = BATCH; the last batch has three examples


class SequenceFirst(nn.Module):
    """(B, T, D) as (T, B, D)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(D, D), nn.LayerNorm(D)
        self.second, self.head = nn.Linear(D, D), nn.Linear(D, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.first(x.transpose(0, 1)))
        z = torch.tanh(self.second(self.norm(z)) * z.roll(1, 0))
        return self.head(z.mean(0))


class TokensFirst(nn.Module):
    """Tokens as (T, B)."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(9, D), nn.Linear(D, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        z = self.tokens((x[:, :, 0] * 3).long().abs().clamp(max=8).T)
        return self.head((z * z.roll(1, 0)).mean(0))


class Folded(nn.Module):
    """Examples and positions in one dimension: example after example, and the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, D), nn.Linear(D, D)
        self.pixels, self.head = nn.Conv2d(1, 2, 2), nn.Linear(D, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        b = len(x)
        z = torch.tanh(self.first(x.flatten(0, 1)).view(x.shape))
        z = torch.tanh(self.second(z.transpose(0, 1).flatten(0, 1)).view(-1, b, D)).transpose(0, 1)
        frames = self.pixels(z.reshape(b * T // 2, 1, 2, D)).view(b, -1)
        return self.head(z.mean(1)) + frames[:, :CLASSES] * frames[:, -CLASSES:]


class Positions(nn.Module):
    """Positions that all examples share, ``(T,)`` or ``(1, T)``, and what is made of them."""

    def __init__(self, one: bool, first: int = 0) -> None:
        super().__init__()
        self.places, self.head = nn.Embedding(T + first, D), nn.Linear(D, CLASSES)
        self.one, self.start = one, first

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(T) + self.start
        z = self.places(places[None] if self.one else places)
        return self.head((torch.tanh(x + z) * x).mean(1))


class Unsqueezed(Positions):
    """What follows adds a dimension for the examples by itself."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.places(torch.arange(T)).unsqueeze(0)
        return self.head(torch.tanh(x + z).mean(1))


class Twice(Positions):
    """Two sums over the examples, in another order if it is one sum for each of them."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.places(torch.arange(T)[None])
        return self.head(torch.tanh(x * z + z).mean(1))


class Dropped(Positions):
    """Dropout on what all examples share: another one an example would be another training."""

    def forward(self, x: Tensor) -> Tensor:
        z = F.dropout(self.places(torch.arange(T)[None]), 0.5, self.training)
        return self.head(torch.tanh(x + z).mean(1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "sequence first": SequenceFirst,
    "tokens first": TokensFirst,
    "folded": Folded,
    "(T,)": lambda: Positions(False),
    "(1, T)": lambda: Positions(True),
    "(1, T) from 2 on": lambda: Positions(True, first=2),
    "(T,) from 2 on": lambda: Positions(False, first=2),
}


def build(make: Callable[[], nn.Module], n: int = N) -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = make().double()
        return net, torch.randn(n, T, D).double(), torch.arange(n) % CLASSES


@pytest.mark.any_trainer("layers that get the sequence first, `(T, B, D)`")
@pytest.mark.parametrize("batch", [BATCH, BATCH - 2])
@pytest.mark.parametrize("name", ["sequence first", "tokens first"])
def test_sequence_first(name: str, batch: int) -> None:
    check_run(lambda: build(MODELS[name]), batch=batch)


@pytest.mark.any_trainer("examples and positions in one dimension, `(B·T, D)`")
@pytest.mark.parametrize("batch", [BATCH, BATCH - 2])
def test_folded(batch: int) -> None:
    check_run(lambda: build(Folded), batch=batch)


@pytest.mark.any_trainer("positions that all examples share, `(T,)` or `(1, T)`")
@pytest.mark.parametrize("batch", [BATCH, BATCH - 2])
@pytest.mark.parametrize("name", ["(T,)", "(1, T)", "(1, T) from 2 on", "(T,) from 2 on"])
def test_shared_positions(name: str, batch: int) -> None:
    check_run(lambda: build(MODELS[name]), batch=batch)


@pytest.mark.any_trainer("positions that all examples share, `(T,)` or `(1, T)`")
@pytest.mark.parametrize("make", [Unsqueezed, Dropped, Twice])
def test_positions_that_cannot_be_repeated_are_refused(make: type[Positions]) -> None:
    """With advice that works."""

    class Expanded(make):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor) -> Tensor:
            z = self.places(torch.arange(T).expand(len(x), -1))
            return self.head(torch.tanh(x + z).mean(1))

    net, x, y = build(lambda: make(False))
    with pytest.raises(UnsupportedProblemError, match=r"'net.places'.*\.expand\(batch, -1\)"):
        fit(net, x, y, F.cross_entropy, [FINECallback(observable="loss")])
    snapshot = scores_of(build(lambda: make(False)), observable="loss", schedule="snapshot")
    assert float(snapshot.std()) > 0
    assert float(scores_of(build(lambda: Expanded(False)), observable="loss").std()) > 0


@pytest.mark.parametrize("n", [T, 5, 1])
@pytest.mark.parametrize("name", MODELS)
def test_the_engine(name: str, n: int) -> None:
    assert not check_engine(build(MODELS[name], n)).in_full


@pytest.mark.any_trainer("layers that get the sequence first, `(T, B, D)`")
@pytest.mark.any_trainer("positions that all examples share, `(T,)` or `(1, T)`")
@pytest.mark.parametrize("name", ["sequence first", "(1, T)"])
@pytest.mark.parametrize(
    "options",
    [
        {"target": "validation", "refresh_every": 1},
        {"geometry": "ekfac", "noise": "model"},
        {"sketch": 2},
        {"schedule": "snapshot"},
    ],
    ids=["validation", "ekfac", "sketch", "snapshot"],
)
def test_other_questions(name: str, options: dict[str, Any]) -> None:
    assert float(scores_of(build(MODELS[name], 12), n_query=T, **options).std()) > 0


@pytest.mark.any_trainer("positions that all examples share, `(T,)` or `(1, T)`")
def test_several_at_once() -> None:
    net, x, y = build(MODELS["(1, T)"])
    watched = [FINECallback(observable="loss"), FINECallback(observable="loss", sketch=2)]
    diary = fit(net, x, y, F.cross_entropy, watched)
    expected = mu_of_self(net, diary, x, y, F.cross_entropy)
    got = watched[0].scores().values[0].double()
    assert float((got - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.any_trainer("layers that get the sequence first, `(T, B, D)`")
def test_where_nobody_can_look_the_ambiguous_is_refused() -> None:
    net, x, y = build(SequenceFirst)

    def forward(module: Any, x: Tensor) -> Tensor:
        raise RuntimeError("not like this")

    def run(batch: int) -> None:
        watched = FINECallback(observable="loss", forward=forward)
        fit(net, x, y, F.cross_entropy, [watched], batch=batch)

    with (
        pytest.warns(UserWarning, match="could not look"),
        pytest.raises(UnsupportedProblemError, match="several dimensions could be the examples"),
    ):
        run(T)
    with (
        pytest.warns(UserWarning, match="could not look"),
        pytest.raises(UnsupportedProblemError, match=r"must be the examples.*snapshot"),
    ):
        run(T - 2)


def test_layout_of() -> None:
    x = torch.randn(4, 6, 3)
    whole, half = x.flatten(0, 1), x[:2].flatten(0, 1)
    assert layout_of(x, x[:2], (4, 2), FIRST) == FIRST
    assert layout_of(x.transpose(0, 1), x[:2].transpose(0, 1), (4, 2), FIRST) == Layout(1)
    assert layout_of(x, x, (4, 2), FIRST) is SHARED
    assert layout_of(whole, half, (4, 2), FIRST) == Layout(0, 1, None)
    other, part = x.transpose(0, 1).flatten(0, 1), x[:2].transpose(0, 1).flatten(0, 1)
    assert layout_of(other, part, (4, 2), FIRST) == Layout(0, None, 1)
    halves, of_two = (t.reshape(-1, 2, 3, 3).transpose(0, 1).flatten(0, 2) for t in (x, x[:2]))
    found = layout_of(halves, of_two, (4, 2), FIRST)
    assert found == Layout(0, None, 3)
    assert torch.equal(found.examples_first(halves, 4), whole)
    # nothing tells them apart: the likeliest, if there is one
    ones = torch.ones(24, 3), torch.ones(12, 3)
    assert layout_of(*ones, (4, 2), FIRST) is None
    assert layout_of(*ones, (4, 2), Layout(0, None, 1)) == Layout(0, None, 1)
    # something else changes too
    assert layout_of(torch.ones(4, 8), torch.ones(2, 4), (4, 2), FIRST) is None
    assert layout_of(torch.ones(4, 8), torch.ones(2, 5), (4, 2), FIRST) == FIRST
