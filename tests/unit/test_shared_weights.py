"""One weight behind several layers: its uses add up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fine_bench.callback import FINECallback
from fine_bench.gradients import GradientEngine, LayerRecorder, PerExampleGradients
from fine_bench.gradients.blocks import tied as tied_module
from fine_bench.gradients.blocks.tied import TiedBlock
from fine_bench.gradients.curvature.ekfac import fit_ekfac
from fine_bench.gradients.curvature.products import Roots, parameter_names
from fine_bench.gradients.diagonal import diagonal_gram, diagonal_norm2
from fine_bench.gradients.per_example import stack_examples
from fine_bench.gradients.projection.sketch import Sketch
from fine_bench.types import UnsupportedProblemError
from support.gradients import flat, reference, same
from support.runs import fit, mu_of_self
from support.tensors import close

VOCABULARY, WIDTH = 11, 4


class Language(nn.Module):
    """Next tokens, from a table that is also the head's weight."""

    def __init__(self, *, bias: bool = False, padding: int | None = None) -> None:
        super().__init__()
        self.tok = nn.Embedding(VOCABULARY, WIDTH, padding_idx=padding)
        self.mix, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=bias)
        self.head.weight = self.tok.weight

    def forward(self, x: Tensor) -> Tensor:
        z = self.tok(x)
        z = self.norm(z + torch.tanh(self.mix(z.cumsum(1))))
        return self.head(z)


class TwoTables(nn.Module):
    """Two lookups with one table: of a word, and of its neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.word, self.around = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(VOCABULARY, WIDTH)
        self.around.weight = self.word.weight
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        around = self.around(x.roll(1, 1)).sum(1, keepdim=True)
        return self.head(torch.tanh(self.word(x) * around))


class TwoLinears(nn.Module):
    """Two layers with one weight, each with a bias of its own; the second is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.tok = nn.Embedding(VOCABULARY, WIDTH)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.second.weight = self.first.weight
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.first(self.tok(x)))
        return self.head(torch.tanh(self.second(torch.tanh(self.second(z)))))


def token_loss(logits: Tensor, y: Tensor, reduction: str) -> Tensor:
    return F.cross_entropy(logits.movedim(-1, 1), y, reduction="none").mean(1)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "table and head": Language,
    "head with bias": lambda: Language(bias=True),
    "padding": lambda: Language(padding=2),
    "two tables": TwoTables,
    "two linears": TwoLinears,
}


def build(name: str, n: int = 5, length: int = 6) -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[name]().double()
        for p in model.parameters():
            p.data += 0.2 * torch.randn_like(p)
    x = torch.randint(1, 6, (n, length), generator=torch.Generator().manual_seed(1)) * 2 - 1
    x[:, -1] = 2
    return model, x, x.roll(-1, 1)


@pytest.mark.parametrize("name", MODELS)
def test_the_uses_of_a_weight_add_up(name: str) -> None:
    model, x, y = build(name)
    engine = GradientEngine(model, token_loss)
    names = parameter_names(engine.recorder)
    expected = flat(reference(model, x, y, token_loss), names)
    assert sorted(names) == sorted(dict(model.named_parameters()))
    g = engine(x, y)
    assert engine.in_full == {}
    assert any(isinstance(block, TiedBlock) for block in g.blocks)
    same(g, expected)


@pytest.mark.parametrize("name", MODELS)
def test_the_recorded_training_pass_gives_the_same(name: str) -> None:
    model, x, y = build(name)
    recorder = LayerRecorder(model, tap=True)
    for _ in range(2):
        recorder.start()
        token_loss(model(x), y, "none").mean().backward()
        recorder.stop()
        g = PerExampleGradients(recorder.blocks(5, scale=5.0))
        expected = flat(reference(model, x, y, token_loss), parameter_names(recorder))
        same(g, expected)
    close(stack_examples([g, g.rows(slice(0, 2))]).dense(), torch.cat([expected, expected[:2]]))


@pytest.mark.parametrize("held", [1, 2**20])
@pytest.mark.parametrize("name", MODELS)
def test_every_way_through_the_products(
    name: str, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tied_module, "HELD_FLOATS", held)
    monkeypatch.setattr(tied_module, "COLUMNS", held)
    model, x, y = build(name)
    engine = GradientEngine(model, token_loss)
    g = engine(x, y)
    same(g, flat(reference(model, x, y, token_loss), parameter_names(engine.recorder)))
    parameters = [
        [1.0 + torch.rand_like(p) for p in own] for own in engine.recorder.parameters().values()
    ]
    d = [b.diagonal_weights(p) for b, p in zip(g.blocks, parameters, strict=True)]
    every = torch.cat([p.flatten() for own in parameters for p in own])
    full = g.dense()
    close(diagonal_gram(g, g, d), (full * every) @ full.T)
    close(diagonal_gram(g, g.rows(slice(1, 3)), d), (full * every) @ full[1:3].T)
    close(diagonal_norm2(g, d), (full.square() * every).sum(1))


def test_sketches_add_up_too() -> None:
    model, x, y = build("table and head")
    block = next(b for b in GradientEngine(model, token_loss)(x, y).blocks if b.n_positions > 6)
    assert isinstance(block, TiedBlock)
    exact = Sketch(8, 0).dense(block)  # both sides are narrower
    close(exact.gram(exact), block.gram(block))
    sketch = Sketch(2, 0)
    p, q = sketch.matrices(block)
    assert p is not None
    assert q is not None
    wanted = torch.einsum("kv,bvd,ld->bkl", q, block.dense().view(5, VOCABULARY, WIDTH), p)
    close(sketch.dense(block).g, wanted.flatten(1))
    # application by application, as a pass has them
    parts = [TiedBlock(block.name, (use,)) for use in block.uses]
    close(sketch.sum(parts).g, wanted.flatten(1))


def test_a_curvature_follows() -> None:
    model, x, y = build("two tables")
    engine = GradientEngine(model, token_loss)
    roots = Roots("empirical_fisher", token_loss, torch.rand(5, 1))
    fitted = fit_ekfac(engine, lambda: iter([(slice(0, 5), x, y)]), roots, 5)
    fitted.damp(None, 0.1)
    g = engine(x, y)
    close(fitted.quadratic(g), fitted.gram(g).diagonal())
    assert len(fitted.blocks[0].eigenvalues) == VOCABULARY * WIDTH


@pytest.mark.any_trainer("tied weights")
@pytest.mark.parametrize("name", ["table and head", "head with bias", "two linears"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_with_tied_weights(name: str, accumulate: int) -> None:
    model, x, y = build(name, 20)
    started = {k: p.detach().clone() for k, p in model.named_parameters()}
    watched = FINECallback(observable="loss", loss=token_loss)
    diary = fit(model, x, y, token_loss, [watched], accumulate_grad_batches=accumulate)
    found = watched.scores().values[0]
    if accumulate == 1:
        close(found.double(), mu_of_self(model, diary, x, y, token_loss), 1e-5)
    assert float(found.std()) > 0
    ended = {k: p.detach().clone() for k, p in model.named_parameters()}
    model.load_state_dict(started, strict=False)
    fit(model, x, y, token_loss, [], accumulate_grad_batches=accumulate)
    assert all(torch.equal(ended[k], p) for k, p in model.named_parameters())


@pytest.mark.any_trainer("tied weights")
@pytest.mark.parametrize(
    "options",
    [
        {"sketch": 2},
        {"preconditioner": "optimiser"},
        {"target": "validation"},
        {"target": "queries", "refresh_every": 2},
    ],
    ids=str,
)
def test_other_questions_to_a_run_with_tied_weights(options: dict[str, Any]) -> None:
    model, x, y = build("table and head", 20)
    queries = TensorDataset(x[:4], y[:4]) if "target" in options else None
    watched = FINECallback(observable="loss", loss=token_loss, queries=queries, **options)
    fit(model, x, y, token_loss, [watched])
    assert float(watched.scores().values.std()) > 0


@pytest.mark.any_trainer("a weight that also acts outside of its layer")
def test_a_weight_by_hand_is_refused_with_what_works() -> None:
    class ByHand(Language):
        def __init__(self) -> None:
            super().__init__()
            del self.head, self.norm

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.mix(self.tok(x))) @ self.tok.weight.T

    model, x, y = build("table and head", 20)
    model = ByHand().double()
    with pytest.raises(UnsupportedProblemError, match='schedule="snapshot"'):
        fit(model, x, y, token_loss, [FINECallback(observable="loss", loss=token_loss)])
    watched = FINECallback(observable="loss", loss=token_loss, schedule="snapshot")
    fit(model, x, y, token_loss, [watched])
    assert float(watched.scores().values.std()) > 0
