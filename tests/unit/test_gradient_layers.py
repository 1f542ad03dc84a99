"""Every kind of layer against ``vmap(grad)`` in float64: all contractions and projections."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fine_bench.callback import FINECallback
from fine_bench.gradients import (
    DenseBlock,
    FactorBlock,
    GradientEngine,
    LayerRecorder,
    PerExampleGradients,
    TokenBlock,
    register_norm,
)
from fine_bench.gradients import layers as layers_module
from fine_bench.gradients.blocks import linear as factors_module
from fine_bench.gradients.blocks.protocol import Block
from fine_bench.gradients.curvature.products import Roots, parameter_names, root_gradients
from fine_bench.gradients.projection.random import make_projection, projection_matrix
from fine_bench.types import UnsupportedProblemError
from support.gradients import flat, reference, same
from support.tensors import close
from support.training import QUIET

pytestmark = pytest.mark.filterwarnings(
    "ignore:There is a performance drop",  # the reference maps attention over examples
    "ignore:Using padding='same' with even kernel",
    "ignore:`torch.nn.utils.weight_norm` is deprecated",
)

VOCABULARY, CLASSES = 11, 3


class Pooled(nn.Module):
    """One layer, a nonlinearity, a mean over positions and a linear head of fixed weights."""

    def __init__(self, layer: nn.Module, *, channels_last: bool) -> None:
        super().__init__()
        self.layer = layer
        self.channels_last = channels_last

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.layer(x))
        z = z if self.channels_last else z.movedim(1, -1)
        z = z * torch.linspace(0.5, 1.5, z[0].numel(), dtype=z.dtype).view(z.shape[1:])
        z = z.reshape(len(z), -1, z.shape[-1]).mean(1)
        weight = torch.cos(torch.arange(CLASSES * z.shape[1], dtype=z.dtype))
        return 3 * z @ weight.view(z.shape[1], CLASSES)


class Scale(nn.Module):
    """An RMS norm as language models write it, with the eps under another name."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size))
        self.variance_epsilon = 0.1

    def forward(self, x: Tensor) -> Tensor:
        return (1 + self.weight) * normalise(self, x)


def normalise(layer: nn.Module, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + layer.variance_epsilon)


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(width, width, bias=False), nn.Linear(width, width)
        self.v, self.out = nn.Linear(width, width), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(z.transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """Logits for every position; one attention block is applied twice."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.tok, self.pos = nn.Embedding(VOCABULARY, 6, padding_idx=2), nn.Embedding(9, 6)
        self.first, self.second = nn.LayerNorm(6), nn.RMSNorm(6)
        self.attention = Attention(6)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.norm, self.head = Scale(6), nn.Linear(6, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.tok.weight

    def forward(self, x: Tensor) -> Tensor:
        z = self.tok(x) + self.pos(torch.arange(x.shape[1]).expand(len(x), -1))
        for _ in range(2):
            z = z + self.attention(self.first(z))
            z = z + self.down(F.gelu(self.up(self.second(z))))
        return self.head(self.norm(z))


def token_loss(logits: Tensor, y: Tensor, reduction: str) -> Tensor:
    """The mean over a sequence's tokens, one number an example."""
    assert reduction == "none"
    return F.cross_entropy(logits.movedim(-1, 1), y, reduction="none").mean(1)


def convolution(dims: int, **options: Any) -> Pooled:
    kind = nn.Conv1d if dims == 1 else nn.Conv2d
    return Pooled(kind(4, 6, **{"kernel_size": 3, **options}), channels_last=False)


def last(layer: nn.Module) -> Pooled:
    return Pooled(layer, channels_last=True)


def first(layer: nn.Module) -> Pooled:
    return Pooled(layer, channels_last=False)


def batch_norm() -> nn.Module:
    norm = nn.BatchNorm1d(4)
    norm.running_mean, norm.running_var = torch.rand(4), torch.rand(4) + 0.5
    return Pooled(norm, channels_last=False).eval()


# name → model, shape of one input; integers for embeddings
Case = tuple[Callable[[], nn.Module], tuple[int, ...]]
CASES: dict[str, Case] = {
    "linear": (lambda: last(nn.Linear(5, 4)), (5,)),
    "linear no bias": (lambda: last(nn.Linear(5, 4, bias=False)), (5,)),
    "linear 3 dimensions": (lambda: last(nn.Linear(5, 4)), (3, 5)),
    "linear 4 dimensions": (lambda: last(nn.Linear(5, 4, bias=False)), (2, 3, 5)),
    "linear 5 dimensions": (lambda: last(nn.Linear(5, 4)), (2, 1, 3, 5)),
    "linear wide": (lambda: last(nn.Linear(40, 30)), (2, 40)),
    "linear narrow": (lambda: last(nn.Linear(2, 3)), (12, 2)),
    "conv1d": (lambda: convolution(1), (4, 9)),
    "conv1d no bias": (lambda: convolution(1, bias=False, kernel_size=2), (4, 9)),
    "conv1d stride": (lambda: convolution(1, stride=2, padding=2), (4, 9)),
    "conv1d dilation": (lambda: convolution(1, dilation=3, padding=1), (4, 9)),
    "conv1d same": (lambda: convolution(1, padding="same", kernel_size=4), (4, 7)),
    "conv1d same dilation": (lambda: convolution(1, padding="same", dilation=2), (4, 7)),
    "conv1d valid": (lambda: convolution(1, padding="valid"), (4, 7)),
    "conv1d groups": (lambda: convolution(1, groups=2), (4, 7)),
    "conv1d reflect": (lambda: convolution(1, padding=2, padding_mode="reflect"), (4, 7)),
    "conv1d circular": (lambda: convolution(1, padding=1, padding_mode="circular"), (4, 7)),
    "conv1d long": (lambda: convolution(1, kernel_size=1), (4, 40)),
    "conv2d": (lambda: convolution(2), (4, 6, 5)),
    "conv2d oblong": (lambda: convolution(2, kernel_size=(3, 1), stride=(1, 2)), (4, 6, 5)),
    "conv2d stride": (lambda: convolution(2, stride=2, padding=(1, 2)), (4, 6, 5)),
    "conv2d dilation": (lambda: convolution(2, dilation=(1, 2), padding=1), (4, 6, 5)),
    "conv2d same": (lambda: convolution(2, padding="same", kernel_size=(2, 3)), (4, 6, 5)),
    "conv2d groups": (lambda: convolution(2, groups=2, padding=1), (4, 6, 5)),
    "conv2d replicate": (lambda: convolution(2, padding=1, padding_mode="replicate"), (4, 6, 5)),
    "conv2d one pixel": (lambda: convolution(2, bias=False), (4, 3, 3)),
    "embedding": (lambda: last(nn.Embedding(VOCABULARY, 4)), (7,)),
    "embedding one token": (lambda: last(nn.Embedding(VOCABULARY, 4)), ()),
    "embedding 2 dimensions": (lambda: last(nn.Embedding(VOCABULARY, 4)), (2, 3)),
    "embedding padding": (lambda: last(nn.Embedding(VOCABULARY, 4, padding_idx=3)), (7,)),
    "embedding last padding": (lambda: last(nn.Embedding(VOCABULARY, 4, padding_idx=-1)), (5,)),
    "layer norm": (lambda: last(nn.LayerNorm(5)), (5,)),
    "layer norm positions": (lambda: last(nn.LayerNorm(5, eps=0.1)), (2, 3, 5)),
    "layer norm 2 dimensions": (lambda: last(nn.LayerNorm((3, 5))), (2, 3, 5)),
    "layer norm no bias": (lambda: last(nn.LayerNorm(5, bias=False)), (3, 5)),
    "group norm": (lambda: first(nn.GroupNorm(2, 4)), (4, 3, 5)),
    "group norm 1d": (lambda: first(nn.GroupNorm(4, 4, eps=0.1)), (4, 5)),
    "group norm no positions": (lambda: first(nn.GroupNorm(2, 4)), (4,)),
    "rms norm": (lambda: last(nn.RMSNorm(5)), (3, 5)),
    "rms norm eps": (lambda: last(nn.RMSNorm((3, 5), eps=0.1)), (2, 3, 5)),
    "registered norm": (lambda: last(Scale(5)), (3, 5)),
    "fixed batch norm": (batch_norm, (4, 5)),
    "transformer": (Transformer, (8,)),
}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register_norm(Scale, normalise)
    yield
    del layers_module._KINDS[Scale]


def data(model: nn.Module, shape: tuple[int, ...], n: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if any(isinstance(m, nn.Embedding) for m in model.modules()):
        # few distinct tokens, so that they repeat within and between examples
        x = torch.randint(1, 6, (n, *shape), generator=generator) * 2 - 1
        x = torch.where(torch.rand(x.shape, generator=generator) < 0.3, VOCABULARY - 1, x)
        if isinstance(model, Transformer):
            x = torch.where(x == 3, 2, x)  # its padding
            return x, x.roll(-1, 1)
    else:
        x = torch.randn(n, *shape, generator=generator, dtype=torch.float64) + 0.3
    return x, torch.randint(CLASSES, (n,), generator=generator)


def build(name: str, n: int) -> tuple[nn.Module, Tensor, Tensor, Any]:
    factory, shape = CASES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = factory().double()
        for p in model.parameters():  # away from ones and zeros
            p.data += 0.2 * torch.randn_like(p)
    x, y = data(model, shape, n)
    return model, x, y, token_loss if isinstance(model, Transformer) else F.cross_entropy


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("name", CASES)
def test_everything_equals_the_explicit_gradients(name: str, n: int) -> None:
    model, x, y, loss = build(name, n)
    engine = GradientEngine(model, loss)
    assert engine.recorder.leftover == []
    g = engine(x, y)
    assert engine.in_full == {}
    expected = flat(reference(model, x, y, loss), parameter_names(engine.recorder))
    assert float(expected.abs().max()) > 1e-3
    same(g, expected)
    same(engine(x, y), expected)  # the first batch is checked, later ones are not


@pytest.mark.parametrize("name", CASES)
def test_the_recorded_training_pass_gives_the_same(name: str) -> None:
    model, x, y, loss = build(name, 4)
    recorder = LayerRecorder(model, tap=True)
    for _ in range(2):
        model.zero_grad()
        recorder.start()
        loss(model(x), y, reduction="none").mean().backward()
        recorder.stop()
        blocks = recorder.blocks(4, scale=4.0)
        expected = flat(reference(model, x, y, loss), parameter_names(recorder))
        close(PerExampleGradients(blocks).dense(), expected)
    recorder.close()
    assert not any(p._backward_hooks for p in model.parameters())


@pytest.mark.parametrize(
    "name", ["linear 3 dimensions", "conv2d", "conv1d groups", "layer norm", "group norm"]
)
@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_frozen_parts_are_left_out(name: str, frozen: str) -> None:
    model, x, y, loss = build(name, 5)
    getattr(model.layer, frozen).requires_grad_(False)
    g = GradientEngine(model, loss)(x, y)
    same(g, flat(reference(model, x, y, loss)))


def test_a_frozen_table_and_frozen_norms_leave_no_block() -> None:
    model, x, y, loss = build("transformer", 5)
    for layer in (model.tok, model.first, model.norm, model.attention.k):
        layer.requires_grad_(False)
    engine = GradientEngine(model, loss)
    assert not {"tok", "first", "norm", "attention.k"} & set(engine.recorder.layers)
    expected = flat(reference(model, x, y, loss), parameter_names(engine.recorder))
    same(engine(x, y), expected)


def test_what_each_layer_is_kept_as() -> None:
    model, x, y, loss = build("transformer", 5)
    kinds = {block.name: type(block) for block in GradientEngine(model, loss)(x, y).blocks}
    assert kinds["tok"] is kinds["pos"] is TokenBlock
    assert kinds["first"] is kinds["second"] is kinds["norm"] is DenseBlock
    assert {kinds[name] for name in kinds if "." in name or name in ("up", "head")} == {FactorBlock}


# ------------------------------------------------------------------------- choices within a layer


@pytest.mark.parametrize("held", [1, 2**20])
@pytest.mark.parametrize(("t", "s"), [(1, 1), (4, 4), (3, 5), (1, 4)])
def test_both_ways_to_a_gram_matrix_of_factors_agree(
    t: int, s: int, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factors_module, "HELD_FLOATS", held)
    generator = torch.Generator().manual_seed(0)

    def block(n: int, positions: int) -> FactorBlock:
        a = torch.randn(n, positions, 7, generator=generator, dtype=torch.float64)
        b = torch.randn(n, positions, 70, generator=generator, dtype=torch.float64)
        return FactorBlock("x", a, b, True, True)

    x, y = block(3, t), block(5, s)
    close(x.gram(y), x.dense() @ y.dense().T)
    for left, right in ((x, y), (x, x)):
        expected = left.weight_gradients().flatten(1) @ right.weight_gradients().flatten(1).T
        close(left._gram_from_factors(right), expected)
        close(left._gram_from_matrices(right), expected)
    close(x.contract(y.weighted_sum(torch.eye(5).double())), y.dense() @ x.dense().T)


@pytest.mark.parametrize(
    ("t", "n_in", "n_out", "cheaper"),
    [(2, 50, 60, "factors"), (30, 50, 60, "matrices"), (30, 3, 4, "matrices")],
)
def test_the_cheaper_way_is_taken(
    t: int, n_in: int, n_out: int, cheaper: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []
    for way in ("factors", "matrices"):
        monkeypatch.setattr(
            FactorBlock,
            f"_gram_from_{way}",
            lambda x, y, way=way: taken.append(way) or torch.zeros(len(x), len(y)),
        )
    block = FactorBlock("x", torch.ones(6, t, n_in), torch.ones(6, t, n_out), True, False)
    block.gram(block)
    assert taken == [cheaper]


@pytest.mark.parametrize("held", [1, 2**20])
@pytest.mark.parametrize(("t", "s"), [(1, 1), (4, 4), (3, 9), (20, 20)])
def test_the_gram_matrix_of_tokens_is_that_of_the_table(
    t: int, s: int, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fine_bench.gradients.blocks.embedding.HELD_FLOATS", held)
    generator = torch.Generator().manual_seed(0)

    def block(n: int, positions: int, low: int) -> TokenBlock:
        tokens = torch.randint(low, low + 8, (n, positions), generator=generator)
        b = torch.randn(n, positions, 5, generator=generator, dtype=torch.float64)
        return TokenBlock("x", tokens, b, 12)

    x, y = block(3, t, 0), block(6, s, 4)  # tokens of one, of the other and of both
    for left, right in ((x, y), (y, x), (x, x), (x, block(2, t, 4).rows(slice(0, 1)))):
        close(left.gram(right), left.dense() @ right.dense().T)
    y.tokens[:] = 11
    x.tokens[:] = 3
    close(x.gram(y), torch.zeros(3, 6, dtype=torch.float64))  # no token is in both


def each_kind_of_block(n: int) -> dict[str, Block]:
    """Gradients of n examples as every kind of block, with every kind of contraction."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(n, *shape, generator=generator, dtype=torch.float64)

    blocks: dict[str, Block] = {"dense": DenseBlock("x", normal(7))}
    for t, n_in, n_out in ((1, 4, 3), (2, 40, 50), (9, 4, 3)):
        for weight, bias in ((True, True), (True, False), (False, True)):
            name = f"factors {t} {weight} {bias}"
            blocks[name] = FactorBlock(name, normal(t, n_in), normal(t, n_out), weight, bias)
    tokens = torch.randint(5, (n, 4), generator=generator)
    blocks["tokens"] = TokenBlock("x", tokens, normal(4, 3), 5)
    return blocks


@pytest.mark.parametrize("name", each_kind_of_block(1))
def test_norms_and_some_rows_of_the_gram_matrix_at_once(name: str) -> None:
    block = each_kind_of_block(6)[name]
    g, chosen = block.dense(), torch.tensor([4, 0, 3])
    own, rows = block.own_and_rows(chosen)
    close(own, g.square().sum(1))
    close(rows, g[chosen] @ g.T)


@pytest.mark.parametrize("name", each_kind_of_block(1))
def test_gram_matrices_of_groups(name: str) -> None:
    gradients = PerExampleGradients([each_kind_of_block(6)[name], each_kind_of_block(6)["dense"]])
    g = gradients.dense().unflatten(0, (3, 2))
    close(gradients.grams(3), g @ g.mT)
    rows = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1]])
    expected = torch.stack([g[k, rows[k]] @ g[k].T for k in range(3)])
    close(gradients.grams(3, rows), expected)


@pytest.mark.parametrize("name", each_kind_of_block(1))
def test_a_block_from_its_tensors(name: str) -> None:
    block = each_kind_of_block(6)[name]
    close(block.with_tensors(*(part[2:4] for part in block.tensors)).dense(), block.dense()[2:4])


def test_a_large_vocabulary_is_never_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(block: TokenBlock) -> Tensor:
        raise AssertionError("the table was formed for every example")

    model = last(nn.Embedding(300_000, 4)).double()
    x = torch.randint(300_000, (8, 6), generator=torch.Generator().manual_seed(0))
    x[:, 0] = 7
    y = torch.arange(8) % CLASSES
    monkeypatch.setattr(TokenBlock, "dense", refuse)
    g = GradientEngine(model, F.cross_entropy)(x, y)
    small = last(nn.Embedding(43, 4)).double()
    used, where = torch.unique(x, return_inverse=True)
    small.layer.weight.data[: len(used)] = model.layer.weight.data[used]
    expected = flat(reference(small, where, y, F.cross_entropy))
    close(g.gram(), expected @ expected.T)
    close(g.norm2(), expected.square().sum(1))
    weights = torch.ones(1, 8).double()
    close(g.contract(g.weighted_sum(weights)), weights @ expected @ expected.T)
    projection = make_projection("factorized", 4, 0)
    block = g.blocks[0]
    assert isinstance(block, TokenBlock)
    p_v, p_d = projection._factors(block, block.matrix_shape)  # type: ignore[attr-defined]
    kron = torch.einsum("vb,da->vdba", p_v[used].double(), p_d[:-1].double()).flatten(2) / 2
    close(projection.project(g), expected[:, : 4 * len(used)] @ kron.flatten(0, 1))


def test_one_row_of_a_table_at_a_time_draws_the_rows_that_belong_to_it() -> None:
    # present tokens far apart: P's rows between them are drawn and dropped
    tokens = torch.tensor([[3, 900], [3, 41]])
    block = TokenBlock("table", tokens, torch.randn(2, 2, 7, dtype=torch.float64), 1000)
    g = PerExampleGradients([block])
    for kind in ("gaussian", "rademacher", "sjlt"):
        projection = make_projection(kind, 8, 3)  # type: ignore[arg-type]
        close(projection.project(g), g.dense() @ projection_matrix(projection, g))


# --------------------------------------------------- weights and positions that serve several ends


class Shared(nn.Module):
    """Position embeddings looked up once for the whole batch, as most code has it."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.tok, self.pos = nn.Embedding(VOCABULARY, 4), nn.Embedding(length, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        z = self.tok(x) + self.pos(torch.arange(x.shape[1]))
        return self.head(torch.tanh(z).mean(1))


class TiedByHand(nn.Module):
    """The table also serves as the output layer, without a second module."""

    def __init__(self) -> None:
        super().__init__()
        self.tok, self.mix = nn.Embedding(VOCABULARY, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.mix(self.tok(x))) @ self.tok.weight.T


@pytest.mark.parametrize("n", [1, 6, 4])
def test_positions_that_all_examples_share(n: int) -> None:
    # with 6 positions and 6 examples the first dimension looks like the batch
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Shared(6).double()
    x, y = data(model, (6,), n)
    engine = GradientEngine(model, F.cross_entropy)
    for seed, size in ((1, n), (2, 5), (3, 6)):
        x, y = data(model, (6,), size, seed)
        g = engine(x, y)
        grads = reference(model, x, y, F.cross_entropy)
        same(g, flat(grads, parameter_names(engine.recorder)))
    assert engine.in_full == {}  # the passes tell that all examples share it
    assert [block.name for block in g.blocks] == ["tok", "pos", "head"]


@pytest.mark.parametrize("n", [6, 4])
def test_a_training_pass_with_shared_positions_is_refused(n: int) -> None:
    model = Shared(6)
    x, y = data(model, (6,), n)
    recorder = LayerRecorder(model, tap=True)
    recorder.start()
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(UnsupportedProblemError, match=r"'pos'.*\(6,\).*\.expand\(batch, -1\)"):
        recorder.blocks(n)


def test_a_table_that_two_modules_share() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Transformer(tied=True).double()
    x, y = data(model, (5,), 4)
    engine = GradientEngine(model, token_loss)
    assert engine.recorder.leftover == []
    names = parameter_names(engine.recorder)
    same(engine(x, y), flat(reference(model, x, y, token_loss), names))


def test_roots_at_the_output_take_the_same_ways() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Shared(6).double()
    x, y = data(model, (6,), 5)
    engine = GradientEngine(model, F.cross_entropy)
    roots = Roots("fisher", F.cross_entropy, torch.zeros(5, 1))
    p = torch.softmax(model(x), 1)
    for k, n_roots, blocks in root_gradients(engine, x, y, roots, slice(0, 5)):
        grads = reference(model, x, torch.full_like(y, k), F.cross_entropy)
        expected = flat(grads, parameter_names(engine.recorder)) * p[:, k, None].sqrt()
        same(PerExampleGradients(blocks), expected.detach())
        assert n_roots == CLASSES
    assert engine.in_full == {}  # the passes tell that all examples share it


def test_a_weight_used_outside_of_its_layer() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TiedByHand().double()
    x, y = data(model, (5,), 4)
    y = x.roll(-1, 1)
    engine = GradientEngine(model, token_loss)
    same(engine(x, y), flat(reference(model, x, y, token_loss)))
    assert list(engine.in_full) == ["tok"]
    assert "not the sum" in engine.in_full["tok"]
    recorder = LayerRecorder(model, tap=True)
    recorder.start()
    token_loss(model(x), y, "none").mean().backward()
    with pytest.raises(UnsupportedProblemError, match=r"\['tok'\] are not the sums.*tied"):
        recorder.blocks(4, scale=4.0)


def test_a_penalty_in_the_training_loss_is_refused() -> None:
    model, x, y, loss = build("linear", 4)
    recorder = LayerRecorder(model, tap=True)
    recorder.start()
    penalty = sum(p.square().sum() for p in model.parameters())
    (loss(model(x), y) + 0.01 * penalty).backward()
    with pytest.raises(UnsupportedProblemError, match="Weight decay belongs in the optimiser"):
        recorder.blocks(4, scale=4.0)


def test_a_pass_that_is_not_finite_is_not_the_one_that_counts() -> None:
    model, x, y, loss = build("linear", 4)
    engine, recorder = GradientEngine(model, loss), LayerRecorder(model, tap=True)

    def training_pass(batch: Tensor) -> None:
        recorder.start()
        loss(model(batch), y).backward()
        recorder.stop()
        recorder.blocks(4, scale=4.0)

    engine(x * float("nan"), y)
    training_pass(x * float("nan"))
    assert engine._checked == "no"
    assert recorder._unchecked
    same(engine(x, y), flat(reference(model, x, y, loss)))
    training_pass(x)
    assert engine._checked == "yes"
    assert not recorder._unchecked


def test_a_bias_whose_gradient_is_only_rounding_passes_the_check() -> None:
    # softmax over positions does not see a constant added to every key
    model, x, y, loss = build("transformer", 6)
    model.float().requires_grad_(False)
    for part in (model.attention.k.bias, model.attention.v.bias, model.up.bias):
        part.requires_grad_(True)
    engine = GradientEngine(model, loss)
    engine(x, y)
    assert engine.in_full == {}


@pytest.mark.parametrize("norm_first", [False, True])
def test_torchs_own_attention(norm_first: bool) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(
                4, 2, 8, dropout=0.0, batch_first=True, norm_first=norm_first
            )
            self.head = nn.Linear(4, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x).mean(1))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Encoder().double()
    x = torch.randn(5, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = torch.arange(5) % CLASSES
    engine = GradientEngine(model, F.cross_entropy)
    names = parameter_names(engine.recorder)  # fixed before the first batch
    same(engine(x, y), flat(reference(model, x, y, F.cross_entropy), names))
    assert engine.in_full == {}


def test_weight_normalisation_of_either_kind() -> None:
    for wrap in (nn.utils.parametrizations.weight_norm, nn.utils.weight_norm):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = last(wrap(nn.Linear(5, 4))).double()
        x, y = data(model, (3, 5), 4)
        engine = GradientEngine(model, F.cross_entropy)
        g = engine(x, y)
        names = parameter_names(engine.recorder)
        assert engine.recorder.leftover == []
        same(g, flat(reference(model, x, y, F.cross_entropy), names))


def test_keyword_arguments_and_another_forward() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.scale = nn.Linear(5, CLASSES), nn.Parameter(torch.rand(5))

        def logits(self, x: Tensor) -> Tensor:
            return self.layer(input=x * self.scale)

        def forward(self, x: Tensor) -> Tensor:
            return self.logits(x)

    model = Model().double()
    x, y = data(model, (5,), 4)
    engine = GradientEngine(model, F.cross_entropy, forward=lambda v: model.logits(2 * v))
    expected = reference(model, 2 * x, y, F.cross_entropy)
    same(engine(x, y), flat(expected, parameter_names(engine.recorder)))


def test_mixed_precision() -> None:
    model, x, y, loss = build("transformer", 4)
    model.float()
    recorder = LayerRecorder(model, tap=True)
    recorder.start()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(model(x), y, "none").mean()
    value.backward()
    got = PerExampleGradients(recorder.blocks(4, scale=4.0)).gram()
    expected = flat(reference(model, x, y, loss))
    close_enough = (got - expected @ expected.T).abs().max() / got.abs().max()
    assert float(close_enough) < 0.1


# ------------------------------------------------------------------------------- in a training run


class Reader(nn.Module):
    """A transformer that classifies a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Transformer()
        self.answer = nn.Linear(VOCABULARY, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.answer(self.body(x).mean(1))


def small_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * 3 * 3, CLASSES),
    )


class Run(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("net", [small_cnn, Reader])
def test_a_run_can_be_watched(net: Callable[[], nn.Module]) -> None:
    def fit(*callbacks: pl.Callback) -> Run:
        torch.manual_seed(0)
        run = Run(net())
        x, y = data(run, (1, 6, 6) if net is small_cnn else (5,), 24)
        x = x.float() if x.is_floating_point() else x
        loader = DataLoader(TensorDataset(x, y, torch.arange(24)), batch_size=8)
        pl.Trainer(**QUIET, max_epochs=2, callbacks=list(callbacks)).fit(run, loader)
        return run

    x, y = data(net(), (1, 6, 6) if net is small_cnn else (5,), 6, 2)
    queries = TensorDataset(x.float() if x.is_floating_point() else x, y)
    watchers = FINECallback("validation", queries=queries), FINECallback("self")
    watched, plain = fit(*watchers), fit()
    for p, q in zip(watched.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)
    for watcher in watchers:
        scores = watcher.scores()
        assert bool(torch.isfinite(scores.values).all())
        assert float(scores.values.std()) > 0
        assert scores.n_observations is not None
        assert scores.n_observations.tolist() == [2] * 24


# ---------------------------------------------------------------------------------------- refusals


class Mixing(nn.Module):
    """Mixes the examples of a batch in a way of its own."""

    def __init__(self, how: str, *, bare: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, CLASSES)
        self.scale = nn.Parameter(torch.ones(5)) if bare else 1.0
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.first(x * self.scale))
        if self.how == "statistics":
            z = z - z.mean(0)
        elif self.how == "attention":
            z = z + F.scaled_dot_product_attention(z, z, z)
        return self.last(z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("how", ["statistics", "attention"])
def test_models_that_mix_examples_are_refused(how: str, dtype: torch.dtype) -> None:
    model = Mixing(how).to(dtype)
    x, y = data(model, (5,), 64)
    with pytest.raises(UnsupportedProblemError, match="mixes the examples of a batch"):
        GradientEngine(model, F.cross_entropy)(x.to(dtype), y)
    model = Mixing(how, bare=True).to(dtype)
    with pytest.raises(UnsupportedProblemError, match="mixes the examples of a batch"):
        GradientEngine(model, F.cross_entropy)(x.to(dtype), y)
    # what comes after the mixing is each example's own
    GradientEngine(model, F.cross_entropy, layers=["last"])(x.to(dtype), y)


def test_a_loss_that_mixes_examples_is_refused() -> None:
    def contrastive(z: Tensor, y: Tensor, reduction: str) -> Tensor:
        return F.cross_entropy(
            z @ z.detach().T + z.T.sum(0), torch.arange(len(z)), reduction="none"
        ) + (z * z.flip(0)).sum(1)

    model, x, y, _ = build("linear", 6)
    with pytest.raises(UnsupportedProblemError, match="mixes the examples of a batch"):
        GradientEngine(model, contrastive)(x, y)


def test_batch_normalisation_without_running_statistics_is_refused_even_in_eval() -> None:
    model = first(nn.BatchNorm1d(4, track_running_stats=False)).double().eval()
    x, y = data(model, (4, 5), 6)
    with pytest.raises(UnsupportedProblemError, match=r"layer: .*give it running statistics"):
        GradientEngine(model, F.cross_entropy)(x, y)
    model = first(nn.BatchNorm1d(4)).double()
    recorder = LayerRecorder(model, tap=True)
    recorder.start()
    F.cross_entropy(model(x), y).backward()
    # in a training pass the rows of the batch add up to the step (batch_norm.py)
    (block,) = recorder.blocks(6)
    step = torch.cat([p.grad for p in model.parameters() if p.grad is not None])
    close(block.dense().sum(0), step)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_norm": 1.0}, "use max_norm=None"),
        ({"scale_grad_by_freq": True}, "use scale_grad_by_freq=False"),
        ({"sparse": True}, "use sparse=False"),
    ],
)
def test_tables_that_are_refused(options: dict[str, Any], message: str) -> None:
    model = last(nn.Embedding(VOCABULARY, 4, **options))
    with pytest.raises(UnsupportedProblemError, match=rf"'layer' \(Embedding\): .*{message}"):
        GradientEngine(model, F.cross_entropy)
    model.layer.requires_grad_(False)
    both = nn.Sequential(model, nn.Linear(CLASSES, 2))
    GradientEngine(both, F.cross_entropy)  # what is frozen is no matter


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(4, 4, 2), (4, 5, 5)),
        (nn.Conv1d(4, 4, 2), (4, 5)),
        (nn.Linear(4, 4), (4,)),
        (nn.LayerNorm((4, 5)), (4, 5)),
    ],
)
def test_inputs_without_a_batch_are_refused(layer: nn.Module, shape: tuple[int, ...]) -> None:
    # 4 channels that could be taken for 4 examples
    recorder = LayerRecorder(layer, tap=True)
    recorder.start()
    layer(torch.randn(shape)).square().sum().backward()
    with pytest.raises(UnsupportedProblemError, match="one unbatched input of shape"):
        recorder.blocks(4)


def test_register_norm_checks_what_it_gets() -> None:
    with pytest.raises(TypeError, match=r"pass type\(layer\), not the layer"):
        register_norm(Scale(4), normalise)  # type: ignore[arg-type]
    register_norm(Scale, lambda layer, x: x.mean(-1))
    model, x, y, loss = build("registered norm", 4)
    recorder = LayerRecorder(model, tap=True)
    recorder.start()
    loss(model(x), y).backward()
    with pytest.raises(UnsupportedProblemError, match="correct what was given to register_norm"):
        recorder.blocks(4)
    # of the right shape, but not what the layer does: the engine goes another way, a recorded
    # pass is refused
    register_norm(Scale, lambda layer, x: x)
    engine = GradientEngine(model, loss)
    same(engine(x, y), flat(reference(model, x, y, loss)))
    assert list(engine.in_full) == ["layer"]
    recorder = LayerRecorder(model, tap=True)
    recorder.start()
    loss(model(x), y).backward()
    with pytest.raises(UnsupportedProblemError, match="not the sums"):
        recorder.blocks(4, scale=4.0)


def test_a_subclass_with_its_own_forward_is_of_no_known_kind() -> None:
    class Doubled(Scale):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    engine = GradientEngine(last(Doubled(5)).double(), F.cross_entropy)
    assert engine.recorder.leftover == ["layer.weight"]


def test_random_operations_and_parameters_of_no_layer() -> None:
    model = Mixing("none", bare=True)
    noisy = nn.Sequential(nn.Dropout(0.5), model).train()
    x, y = torch.randn(4, 5), torch.arange(4) % CLASSES
    with pytest.raises(UnsupportedProblemError, match=r"1\.scale.*put the model in eval\(\)"):
        GradientEngine(noisy, F.cross_entropy)(x, y)
    GradientEngine(noisy.eval(), F.cross_entropy)(x, y)
