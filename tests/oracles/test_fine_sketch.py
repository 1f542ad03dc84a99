"""Sketched gradients: QᵀGP of gradients from torch.func, and f-INE from their products."""

from __future__ import annotations

import time
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader, TensorDataset

from fine_bench.callback import FINECallback
from fine_bench.gradients.blocks.dense import DenseBlock
from fine_bench.gradients.blocks.embedding import TokenBlock
from fine_bench.gradients.blocks.linear import FactorBlock
from fine_bench.gradients.blocks.protocol import Block
from fine_bench.gradients.projection.sketch import REDRAW, Sketch
from fine_bench.gradients.recorder import LayerRecorder
from fine_bench.types import UnsupportedProblemError
from support.training import QUIET, Diary

CLASSES, N, BATCH, EPOCHS, LR, K = 3, 24, 6, 5, 0.2, 3


class Sentences(nn.Module):
    """Tokens, a linear layer that is used twice, a convolution over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(30, 10, padding_idx=0)
        self.norm = nn.LayerNorm(10)
        self.twice = nn.Linear(10, 10)
        self.narrow = nn.Linear(10, 4, bias=False)
        self.across = nn.Conv1d(4, 9, 3, padding=1)
        self.last = nn.Linear(9, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.tokens(x))
        h = self.narrow(torch.tanh(self.twice(torch.tanh(self.twice(h)))))
        logits: Tensor = self.last(torch.tanh(self.across(h.mT)).mean(2))
        return logits


class Images(nn.Module):
    """Convolutions of three makes: many inputs, few, with a stride."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 7, 2, padding=1), nn.Tanh(),
            nn.Conv2d(7, 8, 3, padding=1, padding_mode="circular"), nn.Tanh(),
            nn.Conv2d(8, 6, 3, stride=2, bias=False), nn.Tanh(),
            nn.Conv2d(6, 6, 1), nn.GroupNorm(2, 6),
        )  # fmt: skip
        self.last = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.layers(x).mean((2, 3)))
        return logits


def make(kind: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return (Sentences() if kind == "sentences" else Images()).double()


def data(kind: str) -> TensorDataset:
    g = torch.Generator().manual_seed(6)
    if kind == "sentences":
        x = torch.randint(0, 30, (N, 7), generator=g)
    else:
        x = torch.randn(N, 1, 6, 6, generator=g, dtype=torch.float64)
    return TensorDataset(x, torch.randint(CLASSES, (N,), generator=g), torch.arange(N))


def per_example(net: nn.Module, params: dict[str, Tensor], x: Tensor, y: Tensor) -> Any:
    def loss(p: dict[str, Tensor], xi: Tensor, yi: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, p, (xi[None],)), yi[None])

    return vmap(grad(loss), in_dims=(None, 0, 0))(params, x, y)


def full(net: nn.Module, x: Tensor, y: Tensor) -> list[Block]:
    """The blocks of one pass, not sketched."""
    recorder = LayerRecorder(net, tap=True)
    recorder.start()
    F.cross_entropy(net(x), y).backward()
    blocks = recorder.blocks(len(x), float(len(x)))
    recorder.close()
    return blocks


def expected(sketch: Sketch, block: Block, grads: dict[str, Tensor]) -> Tensor:
    """QᵀGP of a layer from the gradients of its parameters, ``(B, …)``."""
    weight, bias = grads.get(f"{block.name}.weight"), grads.get(f"{block.name}.bias")
    assert weight is not None
    if isinstance(block, DenseBlock) or block.b.shape[1] == 1:
        parts = [weight.flatten(1)] + ([] if bias is None else [bias])
        return torch.cat(parts, 1)
    p, q = sketch.matrices(block)
    if isinstance(block, TokenBlock):
        weight = weight.mT  # (O, I): from tokens to coordinates
    g = weight.flatten(2)
    p = torch.eye(g.shape[2]).double() if p is None else p
    q = torch.eye(g.shape[1]).double() if q is None else q
    parts = [torch.einsum("ko,boi,li->bkl", q, g, p).flatten(1)]
    if bias is not None:
        parts.append(bias @ q.T)
    return torch.cat(parts, 1)


def products(rows: Tensor) -> Tensor:
    return rows @ rows.T


@pytest.mark.parametrize("kind", ["sentences", "images"])
def test_a_sketch_is_that_of_the_gradients(kind: str) -> None:
    net = make(kind)
    x, y, _ = data(kind).tensors
    if kind == "sentences":
        assert bool((x == 0).any())  # the padding token occurs
    grads = per_example(net, {k: p.detach() for k, p in net.named_parameters()}, x, y)
    sketch, sketched = Sketch(K, 1), 0
    for block in full(net, x, y):
        found = sketch(block)
        want = products(expected(sketch, block, grads))
        have = found.gram(found)  # type: ignore[arg-type]
        assert float((have - want).abs().max()) <= 1e-10 * float(want.abs().max()), block.name
        if found is not block:
            sketched += 1
            assert found.n_params <= (K + 1) * max(2 * K, 10)
    assert sketched == 4


def test_signs_are_drawn_for_every_layer_and_every_few_steps() -> None:
    def block(name: str) -> FactorBlock:
        return FactorBlock(name, torch.zeros(2, 3, 40), torch.zeros(2, 3, 50), True, True)

    sketch = Sketch(16, 4)
    p, q = sketch.matrices(block("a"))
    assert p is not None
    assert q is not None
    assert p.shape == (16, 40)
    assert q.shape == (16, 50)
    assert torch.equal(p.abs().unique(), torch.tensor([0.25]))
    other, _ = sketch.matrices(block("b"))
    sketch.at_step(REDRAW)
    later, _ = sketch.matrices(block("a"))
    sketch.at_step(REDRAW - 1)
    again, _ = sketch.matrices(block("a"))
    assert torch.equal(p, again)
    for different in (other, later):
        assert 0.35 < float((p == different).double().mean()) < 0.65
    assert Sketch(21, 4).matrices(block("a"))[0] is None  # narrower than 2k
    assert not torch.equal(p, Sketch(16, 5).matrices(block("a"))[0])


def test_products_are_right_on_average_and_as_wrong_as_stated() -> None:
    g = torch.Generator().manual_seed(0)
    a = torch.randn(3, 2, 12, generator=g, dtype=torch.float64)
    b = torch.randn(3, 2, 14, generator=g, dtype=torch.float64)
    block = FactorBlock("layer", a, b, True, True)
    exact, k = block.gram(block), 4
    draws = torch.stack([(d := Sketch(k, seed)(block)).gram(d) for seed in range(3000)])  # type: ignore[arg-type]
    error = draws.std(0) / len(draws) ** 0.5
    assert bool(((draws.mean(0) - exact).abs() < 4 * error).all())
    # one position twice: G = 2 b aᵀ, of rank one
    one = FactorBlock("layer", a[:, :1].repeat(1, 2, 1), b[:, :1].repeat(1, 2, 1), True, False)
    norms = torch.stack([Sketch(k, seed)(one).norm2() for seed in range(3000)])
    relative = norms.std(0) / one.norm2()
    bound = ((1 + 2 / k) ** 2 - 1) ** 0.5
    assert bool((relative <= 1.05 * bound).all())
    assert bool((relative >= 0.5 * bound).all())  # or it would say little


class Module(pl.LightningModule):
    """A network in float64."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net = make(kind)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=LR)


def fit(kind: str, *callbacks: pl.Callback, batch: int = BATCH, **options: Any) -> Module:
    module = Module(kind)
    loader = DataLoader(
        data(kind), batch_size=batch, shuffle=True, generator=torch.Generator().manual_seed(2)
    )
    trainer = pl.Trainer(**{"max_epochs": EPOCHS, **QUIET, **options}, callbacks=[*callbacks])
    trainer.fit(module, loader)
    return module


def mu(callback: FINECallback) -> Tensor:
    callback.scores()
    assert callback._schedule is not None
    return callback._schedule.accumulator.mu()[0][0]


@pytest.mark.parametrize("kind", ["sentences", "images"])
def test_scores_are_the_formula_on_sketched_gradients(kind: str) -> None:
    """Over several draws; the first step is sketched after its check, the others in its pass."""
    callback, diary = FINECallback("self", "loss", sketch=K, seed=9), Diary()
    fit(kind, callback, diary)
    assert len(diary.steps) > 2 * REDRAW
    x, y, _ = data(kind).tensors
    net, sketch = make(kind), Sketch(K, 9)
    # only names and sizes are read off these; a recorder of the whole module says "net.…"
    layers = full(Module(kind), x[:2], y[:2])
    top, bottom = torch.zeros(N).double(), torch.zeros(N).double()
    for t, (params, index) in enumerate(diary.steps):
        grads = per_example(net, params, x[index], y[index])
        grads = {f"net.{name}": g for name, g in grads.items()}
        sketch.at_step(t)
        gram = sum(products(expected(sketch, block, grads)) for block in layers)
        for row, i in enumerate(index.tolist()):
            others = torch.cat([gram[row, :row], gram[row, row + 1 :]])
            top[i] += LR * (gram[row, row] - others.mean())
            bottom[i] += LR**2 * others.var()
    want = top / (N * bottom).sqrt()
    assert float((mu(callback) - want).abs().max()) <= 1e-9 * float(want.abs().max())
    exact = FINECallback("self", "loss")
    fit(kind, exact)
    assert not torch.allclose(mu(exact), want, rtol=1e-2)
    assert float(torch.corrcoef(torch.stack([mu(exact), want]))[0, 1]) > 0.5


def test_weights_are_those_of_a_plain_run() -> None:
    for kind in ("sentences", "images"):
        plain, watched = fit(kind), fit(kind, FINECallback(sketch=K))
        for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
            assert torch.equal(a, b)


def test_micro_batches_give_the_scores_of_one_large_batch() -> None:
    large, parts = FINECallback(sketch=K), FINECallback(sketch=K)
    fit("sentences", large, batch=12)
    fit("sentences", parts, batch=4, accumulate_grad_batches=3)
    assert float((mu(large) - mu(parts)).abs().max()) < 1e-9 * float(mu(large).abs().max())


def test_a_resumed_run_draws_alike(tmp_path: Any) -> None:
    def go(callback: FINECallback, epochs: int, resume: str | None) -> None:
        trainer = pl.Trainer(
            **{**QUIET, "enable_checkpointing": True},
            default_root_dir=tmp_path,
            max_epochs=epochs,
            callbacks=[callback],
        )
        loader = DataLoader(data("sentences"), batch_size=BATCH)
        trainer.fit(Module("sentences"), loader, ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / "run.ckpt")

    whole, first, second = (FINECallback(sketch=K) for _ in range(3))
    go(whole, 4, None)
    go(first, 1, None)  # four steps: in the middle of a draw
    go(second, 4, str(tmp_path / "run.ckpt"))
    assert torch.equal(mu(whole), mu(second))


def test_what_happens_within_the_backward_pass_is_counted(monkeypatch: Any) -> None:
    once = Sketch.__call__

    def slow(self: Sketch, block: Block) -> Block:
        time.sleep(0.01)
        return once(self, block)

    monkeypatch.setattr(Sketch, "__call__", slow)
    callback = FINECallback(sketch=K)
    fit("images", callback, max_epochs=2)
    steps, layers = 2 * N // BATCH, 6
    assert callback.seconds > 0.01 * steps * layers
    assert callback.seconds < 10 * 0.01 * steps * layers


def test_bad_values_are_refused() -> None:
    queries = TensorDataset(*data("images").tensors[:2])
    with pytest.raises(ValueError, match="sketch must be at least 2, got 1"):
        FINECallback(sketch=1)
    with pytest.raises(ValueError, match=r"sketch=16 .* schedule='snapshot'"):
        FINECallback(sketch=16, schedule="snapshot")
    with pytest.raises(ValueError, match=r"sketch=16 .* other geometries"):
        FINECallback(sketch=16, geometry="ekfac")
    with pytest.raises(UnsupportedProblemError, match=r"sketch=16 .* target='validation'"):
        FINECallback("validation", queries=queries, sketch=16)
    with pytest.raises(ValueError, match="size of a sketch must be at least 1, got 0"):
        Sketch(0, 0)
