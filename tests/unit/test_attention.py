"""``nn.MultiheadAttention`` and Transformer layers, whose projections no module is called for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fine_bench.callback import FINECallback
from fine_bench.gradients import GradientEngine
from support.runs import check_engine, check_run, fit, scores_of

N, BATCH, T, D, CLASSES = 15, 6, 6, 4, 3
SLOW = F.linear


class Attends(nn.Module):
    """Self- and cross-attention by one or by several modules."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.kind = kind
        first = options.get("batch_first", False)
        self.attention = nn.MultiheadAttention(D, 2, **options)
        self.head = nn.Linear(D, CLASSES)
        self.turn: Callable[[Tensor], Tensor] = (
            (lambda x: x) if first else (lambda x: x.transpose(0, 1))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.turn(x)
        other = torch.tanh(x.roll(1, -1) * 2)
        if self.kind == "self":
            z = self.attention(x, x, x)[0]
        elif self.kind == "no weights":
            z = self.attention(x, x, x, need_weights=False)[0]
        elif self.kind == "cross":
            z = self.attention(x, other, other)[0]
        elif self.kind == "three":
            z = self.attention(x, other, other * x, need_weights=False)[0]
        elif self.kind == "widths":
            z = self.attention(x, other[..., :3], other[..., :2])[0]
        else:  # twice, in two ways
            z = self.attention(x, x, x)[0]
            z = self.attention(torch.tanh(z), other, other, need_weights=False)[0]
        return self.head(torch.tanh(self.turn(z)).mean(1))


class Padded(Attends):
    """Keys beyond an example's own length are masked, and left out of the mean."""

    def forward(self, x: Tensor) -> Tensor:
        length = 3 + (x[:, 0, 0] > 0).long() * 2
        absent = torch.arange(x.shape[1]) >= length[:, None]
        z = self.attention(x, x, x, key_padding_mask=absent)[0]
        z = torch.tanh(z).masked_fill(absent[:, :, None], 0.0)
        return self.head(z.sum(1) / length[:, None])


class Encodes(nn.Module):
    """PyTorch's encoder layers."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(D, 2, 5, **{"dropout": 0.0, **options})
        first = options.get("batch_first", False)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(D, CLASSES)
        self.turn: Callable[[Tensor], Tensor] = (
            (lambda x: x) if first else (lambda x: x.transpose(0, 1))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.turn(self.encoder(self.turn(x))).mean(1))


class Decodes(nn.Module):
    """PyTorch's decoder layer at its defaults, without dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.TransformerDecoderLayer(D, 2, 5, dropout=0.0)
        self.head = nn.Linear(D, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        return self.head(self.decoder(x, torch.tanh(x[:4] * 2)).mean(0))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "self": lambda: Attends("self"),
    "self, batch first": lambda: Attends("self", batch_first=True),
    "no weights": lambda: Attends("no weights", batch_first=True, bias=False),
    "cross": lambda: Attends("cross"),
    "three": lambda: Attends("three", batch_first=True),
    "widths": lambda: Attends("widths", kdim=3, vdim=2),
    "widths, no bias": lambda: Attends("widths", kdim=3, vdim=2, batch_first=True, bias=False),
    "twice": lambda: Attends("twice"),
    "bias of keys": lambda: Attends("self", add_bias_kv=True),
    "padded": lambda: Padded("padded", batch_first=True),
    "encoder": Encodes,
    "encoder, batch first": lambda: Encodes(batch_first=True, norm_first=True),
    "decoder": Decodes,
}


def build(name: str, n: int = N) -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = MODELS[name]().double()
        for p in net.parameters():  # biases begin at zero
            p.data.add_(0.2 * torch.randn_like(p))
        return net, torch.randn(n, T, D).double(), torch.arange(n) % CLASSES


@pytest.mark.parametrize("n", [T, 5])
@pytest.mark.parametrize("name", MODELS)
def test_the_engine(name: str, n: int) -> None:
    assert not check_engine(build(name, n)).in_full
    assert F.linear is SLOW


def run_is_right(name: str, batch: int = BATCH) -> None:
    check_run(lambda: build(name), batch=batch, epochs=1)
    assert F.linear is SLOW


@pytest.mark.any_trainer("`nn.MultiheadAttention`")
@pytest.mark.parametrize(
    "name", ["self", "self, batch first", "no weights", "cross", "three", "widths", "twice"]
)
def test_runs_with_attention(name: str) -> None:
    run_is_right(name)


@pytest.mark.any_trainer("padded sequences")
def test_runs_with_padding() -> None:
    run_is_right("padded")


@pytest.mark.any_trainer("`nn.TransformerEncoderLayer`, `nn.TransformerDecoderLayer`")
@pytest.mark.parametrize("batch", [BATCH, 4])
@pytest.mark.parametrize("name", ["encoder", "encoder, batch first", "decoder"])
def test_runs_with_the_transformers_layers(name: str, batch: int) -> None:
    run_is_right(name, batch)


@pytest.mark.any_trainer("`nn.TransformerEncoderLayer`, `nn.TransformerDecoderLayer`")
def test_a_transformer_with_dropout() -> None:
    """Its gradients are those of the training's own pass: they add up to the step."""
    torch.manual_seed(0)
    net = Encodes(dropout=0.3).double()
    x, y = torch.randn(N, T, D).double(), torch.arange(N) % CLASSES
    watched = FINECallback(observable="loss")
    fit(net, x, y, F.cross_entropy, [watched])
    assert float(watched.scores().values.std()) > 0


@pytest.mark.any_trainer("`nn.MultiheadAttention`")
@pytest.mark.parametrize("name", ["self", "widths"])
@pytest.mark.parametrize(
    "options",
    [
        {"target": "validation", "refresh_every": 1},
        {"geometry": "ekfac", "noise": "model"},
        {"sketch": 2},
        {"schedule": "snapshot"},
        {"layers": ["net.attention"], "observable": "loss"},
        {"layers": ["net.attention.out_proj", "net.head"]},
    ],
    ids=["validation", "ekfac", "sketch", "snapshot", "layers", "out_proj"],
)
def test_other_questions(name: str, options: dict[str, Any]) -> None:
    assert float(scores_of(build(name, 12), epochs=1, n_query=T, **options).std()) > 0
    assert F.linear is SLOW


def test_an_attention_that_fails_leaves_nothing_behind() -> None:
    net, x, _ = build("self")
    engine = GradientEngine(net, F.cross_entropy)
    with pytest.raises(AssertionError, match="embedding dimension"):
        engine(x[:, :, :3], torch.zeros(N).long())
    assert F.linear is SLOW
