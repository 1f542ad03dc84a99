"""Parameters that no layer of a known kind covers: in a training pass, in full."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

from baselines.influence_functions import InfluenceFunction
from baselines.tracin import TracIn
from fine_bench import Checkpoint, Problem, replay
from fine_bench.callback import FINECallback
from fine_bench.gradients import GradientEngine, LayerRecorder, PerExampleGradients
from fine_bench.gradients.curvature.products import parameter_names
from fine_bench.gradients.recurrent import unrolled_recurrence
from fine_bench.types import UnsupportedProblemError
from support.runs import Built, check_run, fit, mu_of_self, one_at_a_time, scores_of
from support.tensors import close

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")

CLASSES, WIDTH, LENGTH = 3, 4, 6


class Sequences(nn.Module):
    """Maps ``(B, 6, 4)`` to logits, with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.first(x))).mean(1))

    def body(self, x: Tensor) -> Tensor:
        raise NotImplementedError


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


class ClassToken(Sequences):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.positions = parameter(1, 1, WIDTH), parameter(1, LENGTH + 1, WIDTH)

    def body(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return torch.tanh(x[:, :1]) * x


class Positions(Sequences):
    """Cut to the length, without a dimension for examples, and written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = parameter(LENGTH + 3, WIDTH)

    def body(self, x: Tensor) -> Tensor:
        x = x.clone()
        x += self.positions[: x.shape[1]]
        return x


class LookedUp(Sequences):
    """By an index for the whole batch, and by one that is expanded."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.other = parameter(9, WIDTH), parameter(9, WIDTH)
        self.register_buffer("index", torch.arange(LENGTH))

    def body(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1]).unsqueeze(0).expand(len(x), -1)
        return x * self.table[self.index] + F.embedding(places, self.other)


class Scales(Sequences):
    """A scale behind a branch, a learned temperature, and one that is its exponential."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma, self.temperature = parameter(WIDTH), nn.Parameter(torch.tensor(1.3))
        self.log_scale = nn.Parameter(torch.tensor([0.3]))

    def body(self, x: Tensor) -> Tensor:
        x = x + self.gamma * torch.tanh(x) / self.temperature
        return self.log_scale.exp() * x


class ByHand(Sequences):
    """Matrices in operations of several kinds, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.vector = parameter(WIDTH, WIDTH), parameter(WIDTH)
        self.norm_weight, self.norm_bias = parameter(WIDTH), parameter(WIDTH)

    def body(self, x: Tensor) -> Tensor:
        x = torch.tanh(x @ self.matrix) + F.linear(x, self.matrix.T, self.vector)
        x = F.layer_norm(x, (WIDTH,), self.norm_weight, self.norm_bias)
        return x + torch.einsum("btd,d->bt", x, self.vector).unsqueeze(2)


class Queries(Sequences):
    """Learned queries that attend to the sequence, and a bias in the attention."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.bias = parameter(2, WIDTH), parameter(2, LENGTH)

    def body(self, x: Tensor) -> Tensor:
        q = self.queries.repeat(len(x), 1, 1)
        return F.scaled_dot_product_attention(q, x, x, attn_mask=self.bias)


class Prompts(Sequences):
    """Lists and mappings of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.prompts = nn.ParameterList([parameter(1, WIDTH), parameter(2, WIDTH)])
        self.scales = nn.ModuleDict({"all": nn.ParameterDict({"x": parameter(WIDTH)})})

    def body(self, x: Tensor) -> Tensor:
        prompts = torch.cat(list(self.prompts)).unsqueeze(0).expand(len(x), -1, -1)
        return torch.cat([prompts, x], 1) * self.scales["all"]["x"]


class Branch(nn.Module):
    """A residual branch with a scale, beside whose parameter stands a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.gamma = nn.Linear(WIDTH, WIDTH), parameter(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * torch.tanh(self.linear(x))


class Nested(ClassToken):
    """Modules with parameters of their own within one that has some too; one is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = Branch()

    def body(self, x: Tensor) -> Tensor:
        return self.branch(self.branch(super().body(x)))


class OfOnesOwn(nn.Module):
    """A layer of one's own: an RMS norm with a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.matrix = parameter(WIDTH), parameter(WIDTH, WIDTH)

    def forward(self, x: Tensor, *, eps: float) -> Tensor:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * self.scale
        return x @ self.matrix


class Within(Sequences):
    """A layer that knows nothing, applied twice."""

    def __init__(self, layer: nn.Module, **options: Any) -> None:
        super().__init__()
        self.layer = layer
        self.options = options

    def body(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x, **self.options)), **self.options)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight + weight.square()


def pruned() -> nn.Module:
    layer = nn.Linear(WIDTH, WIDTH)
    prune.random_unstructured(layer, "weight", 0.4)
    return layer


def parametrised() -> nn.Module:
    layer = nn.Linear(WIDTH, WIDTH)
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


class Two(Sequences):
    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Bilinear(WIDTH, WIDTH, 5)
        self.back = nn.Linear(5, WIDTH)

    def body(self, x: Tensor) -> Tensor:
        return self.back(self.pair(x, x.roll(1, 1)))


class Channels(Sequences):
    """As pixels or voxels: ``(B, 6, 4)`` becomes ``(B, 2, 3, 4)`` or ``(B, 2, 3, 2, 2)``."""

    def __init__(self, layer: nn.Module, *shape: int) -> None:
        super().__init__()
        self.layer, self.shape = layer, shape

    def body(self, x: Tensor) -> Tensor:
        z = self.layer(x.reshape(len(x), *self.shape))
        return z.flatten(1).unfold(1, WIDTH, WIDTH)


class Recurrent(Sequences):
    def __init__(self, layer: nn.Module, *, use_last: bool = False) -> None:
        super().__init__()
        self.layer = layer
        width = layer.hidden_size * (2 if layer.bidirectional else 1)  # type: ignore[operator]
        self.back, self.use_last = nn.Linear(width, WIDTH), use_last

    def body(self, x: Tensor) -> Tensor:
        first = x if self.layer.batch_first else x.transpose(0, 1)  # type: ignore[attr-defined]
        out, last = self.layer(first)
        out = out if self.layer.batch_first else out.transpose(0, 1)
        if self.use_last:
            last = last[0] if isinstance(last, tuple) else last
            return self.back(out) + last[-1][:, None, :1]
        return self.back(out)


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(9, WIDTH, mode="mean"), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.bag(x.detach()[:, :, 0].mul(3).long() % 9)))


class SequenceFirst(Sequences):
    """The sequence comes first, and positions are for its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.scale = parameter(LENGTH, 1, WIDTH), parameter(WIDTH)
        self.layer, self.recurrent = OfOnesOwn(), nn.GRU(WIDTH, WIDTH)

    def body(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1) + self.positions
        x = x + self.layer(x, eps=0.1) * self.scale
        return self.recurrent(x)[0].transpose(0, 1)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "class token": ClassToken,
    "positions": Positions,
    "looked up": LookedUp,
    "scales": Scales,
    "by hand": ByHand,
    "queries": Queries,
    "prompts": Prompts,
    "nested": Nested,
    "of one's own": lambda: Within(OfOnesOwn(), eps=0.1),
    "PReLU": lambda: Within(nn.PReLU(3 * 2)),
    "parametrised": lambda: Within(parametrised()),
    "orthogonal": lambda: Within(parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH))),
    "pruned": lambda: Within(pruned()),
    "norm along another dimension": lambda: Within(
        parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH), dim=1)
    ),
    "Bilinear": Two,
    "ConvTranspose1d": lambda: Channels(nn.ConvTranspose1d(6, 2, 3), 6, 4),
    "ConvTranspose2d": lambda: Channels(nn.ConvTranspose2d(2, 2, 2), 2, 3, 4),
    "Conv3d": lambda: Channels(nn.Conv3d(2, 4, 2, padding=1), 2, 3, 2, 2),
    "EmbeddingBag": Bags,
    "sequence first": SequenceFirst,
    "GRU": lambda: Recurrent(nn.GRU(WIDTH, 5, batch_first=True)),
    "LSTM": lambda: Recurrent(nn.LSTM(WIDTH, 5, 2, bidirectional=True)),
    "RNN": lambda: Recurrent(nn.RNN(WIDTH, 5), use_last=True),
}
FREE = (
    "class token",
    "positions",
    "looked up",
    "scales",
    "by hand",
    "queries",
    "prompts",
    "nested",
)


def build(name: str, n: int = 5, seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MODELS[name]().double()
        x = torch.randn(n, LENGTH, WIDTH).double()
    return model, x, torch.arange(n) % CLASSES


def fresh(make: Callable[[], nn.Module]) -> Built:
    """A network that is none of ``MODELS``, and examples for it."""
    torch.manual_seed(0)
    return make().double(), *build("GRU", 18)[1:]


def rows(model: nn.Module, x: Tensor, y: Tensor, names: list[str]) -> Tensor:
    params = dict(model.named_parameters())
    return one_at_a_time(model, {name: params[name] for name in names}, x, y, F.cross_entropy)


@pytest.mark.parametrize("n", [5, LENGTH])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "sequence first"])
def test_a_recorded_training_pass(name: str, n: int) -> None:
    """Also with as many examples as positions or coordinates."""
    model, x, y = build(name, n)
    recorder = LayerRecorder(model, tap=True)
    assert recorder.leftover
    names = parameter_names(recorder)
    for _ in range(2):
        recorder.start()
        F.cross_entropy(model(x), y).backward()
        recorder.stop()
        g = PerExampleGradients(recorder.blocks(n, scale=float(n)))
        close(g.dense(), rows(model, x, y, names))
        recorder.clear()
    recorder.close()
    if name != "pruned":  # which has hooks of its own
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(p._backward_hooks for p in model.parameters())


@pytest.mark.parametrize("n", [WIDTH, LENGTH])
@pytest.mark.parametrize("name", MODELS)
def test_after_a_look_at_fewer_examples(name: str, n: int) -> None:
    """Where the examples are does not have to be told from shapes then."""
    model, x, y = build(name, n)
    recorder = LayerRecorder(model, tap=True)
    looked_at(recorder, x)
    recorder.start()
    F.cross_entropy(model(x), y).backward()
    recorder.stop()
    assert recorder._uncovered is not None
    block = recorder._uncovered.block("", n, float(n), [], 1e-16)
    close(block.dense(), rows(model, x, y, recorder.leftover))


def looked_at(recorder: LayerRecorder, x: Tensor, fewer: int = 2) -> None:
    assert recorder._uncovered is not None
    model = recorder.model
    with torch.no_grad():
        for _, run in recorder._uncovered.look(
            [(len(x), lambda: model(x)), (fewer, lambda: model(x[:fewer]))]
        ):
            run()


def test_another_pass_than_was_looked_at() -> None:
    class Longer(Positions):
        twice = False

        def body(self, x: Tensor) -> Tensor:
            x = super().body(x)
            return super().body(x) if self.twice else x

    for n in (5, LENGTH):
        _, x, y = build("positions", n)
        model = Longer().double()
        recorder = LayerRecorder(model, tap=True)
        looked_at(recorder, x)
        model.twice = True
        recorder.start()
        F.cross_entropy(model(x), y).backward()
        recorder.stop()
        if n == 5:
            close(recorder.blocks(n, 5.0)[-1].dense(), rows(model, x, y, ["positions"]))
            continue
        with pytest.raises(UnsupportedProblemError, match="6 numbers in several dimensions"):
            recorder.blocks(n)


@pytest.mark.parametrize("name", MODELS)
def test_the_engine(name: str) -> None:
    model, x, y = build(name)
    engine = GradientEngine(model, F.cross_entropy)
    close(engine(x, y).dense(), rows(model, x, y, parameter_names(engine.recorder)))


FREE_PARAMETER = "a free `nn.Parameter`: class token, positions, scale, temperature"


@pytest.mark.any_trainer("a free `nn.Parameter`: class token, positions, scale, temperature")
@pytest.mark.parametrize("name", FREE)
def test_a_run_with_free_parameters(name: str) -> None:
    run_is_right(name)


@pytest.mark.any_trainer(
    "Bilinear, ConvTranspose, Conv3d, PReLU, EmbeddingBag, a layer of your own"
)
@pytest.mark.parametrize("name", ["of one's own", "PReLU", "Bilinear", "ConvTranspose2d", "Conv3d"])
def test_a_run_with_layers_of_no_known_kind(name: str) -> None:
    run_is_right(name)


@pytest.mark.any_trainer(
    "Bilinear, ConvTranspose, Conv3d, PReLU, EmbeddingBag, a layer of your own"
)
def test_a_run_with_bags() -> None:
    run_is_right("EmbeddingBag")


@pytest.mark.any_trainer("free parameters and unknown layers behind a sequence that comes first")
@pytest.mark.parametrize("batch", [4, LENGTH])
def test_a_run_with_the_sequence_first(batch: int) -> None:
    run_is_right("sequence first", batch=batch)


@pytest.mark.any_trainer("other parametrisations of a weight, pruning")
@pytest.mark.parametrize("name", ["parametrised", "orthogonal", "pruned"])
def test_a_run_with_parametrised_weights(name: str) -> None:
    run_is_right(name)


@pytest.mark.any_trainer("GRU, LSTM, RNN")
@pytest.mark.parametrize("name", ["GRU", "LSTM", "RNN"])
def test_a_run_with_recurrent_layers(name: str) -> None:
    run_is_right(name)


def run_is_right(name: str, **options: Any) -> None:
    check_run(lambda: build(name, 18), **options)


@pytest.mark.any_trainer("a free `nn.Parameter`: class token, positions, scale, temperature")
@pytest.mark.any_trainer("GRU, LSTM, RNN")
@pytest.mark.parametrize("name", ["nested", "GRU"])
@pytest.mark.parametrize(
    "options",
    [
        {"target": "validation", "refresh_every": 1},
        {"geometry": "ekfac", "noise": "model"},
        {"preconditioner": "optimiser"},
        {"sketch": 2},
        {"schedule": "snapshot"},
        {"schedule": "snapshot", "forward": lambda module, x: module.net(x)},
    ],
    ids=["validation", "ekfac", "optimiser", "sketch", "snapshot", "snapshot by forward"],
)
def test_other_questions(name: str, options: dict[str, Any]) -> None:
    assert float(scores_of(build(name, 18), **options).std()) > 0


@pytest.mark.any_trainer("a free `nn.Parameter`: class token, positions, scale, temperature")
def test_several_watch_one_run() -> None:
    def run(*which: int) -> list[Tensor]:
        model, x, y = build("nested", 18)
        queries = TensorDataset(x[:4], y[:4])
        every = [
            FINECallback(observable="loss"),
            FINECallback("validation", queries=queries, refresh_every=1),
            FINECallback(schedule="snapshot"),
        ]
        fit(model, x, y, F.cross_entropy, [every[k] for k in which])
        return [every[k].scores().values for k in which]

    together = run(0, 1, 2)
    for k, values in enumerate(together):
        assert torch.equal(values, run(k)[0])


@pytest.mark.any_trainer("a free `nn.Parameter`: class token, positions, scale, temperature")
def test_micro_batches_and_mixed_precision() -> None:
    def scores(**options: Any) -> Tensor:
        model, x, y = build("nested", 24)
        watched = FINECallback(observable="loss")
        fit(model, x, y, F.cross_entropy, [watched], **options)
        return watched.scores().values[0]

    close(scores(batch=4, accumulate_grad_batches=3).double(), scores(batch=12), 1e-5)
    model, x, y = build("nested", 18)
    model, x = model.float(), x.float()
    watched = FINECallback(observable="loss")
    diary = fit(model, x, y, F.cross_entropy, [watched], precision="bf16-mixed")
    expected = mu_of_self(model.double(), diary, x.double(), y, F.cross_entropy)
    close(watched.scores().values[0], expected, 0.1)


class Plain(Sequences):
    """Normalisations without parameters, and a backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.groups = nn.GroupNorm(2, LENGTH, affine=False)
        self.positions = parameter(1, LENGTH, WIDTH)

    def body(self, x: Tensor) -> Tensor:
        return self.norm(x) * torch.tanh(self.groups(x + self.positions))


MODELS["plain"] = Plain


@pytest.mark.any_trainer("LayerNorm, GroupNorm, RMSNorm without parameters")
def test_a_run_with_norms_without_parameters() -> None:
    run_is_right("plain")


@pytest.mark.any_trainer("a frozen backbone")
def test_a_run_with_a_frozen_backbone() -> None:
    model, x, y = build("plain", 18)
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("head"))
    watched, snapshots = FINECallback(observable="loss"), FINECallback(schedule="snapshot")
    diary = fit(model, x, y, F.cross_entropy, [watched, snapshots])
    close(
        watched.scores().values[0].double(), mu_of_self(model, diary, x, y, F.cross_entropy), 1e-5
    )
    assert float(snapshots.scores().values.std()) > 0


def test_nothing_but_layers_of_no_known_kind() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix, self.bias = parameter(WIDTH, CLASSES), parameter(CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return x.mean(1) @ self.matrix + self.bias

    def run(**options: Any) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.PReLU(LENGTH), Head()).double()
        _, x, y = build("GRU", 18)
        watched = FINECallback(**options)
        diary = fit(model, x, y, F.cross_entropy, [watched])
        return watched.scores().values[0], mu_of_self(model, diary, x, y, F.cross_entropy)

    for options in ({"observable": "loss"}, {}):
        found, expected = run(**options)
        close(found.double(), expected, 1e-5)
    with pytest.raises(UnsupportedProblemError, match='use observable="loss"'):
        run(observable="margin")


@pytest.mark.any_trainer("GRU, LSTM, RNN")
@pytest.mark.parametrize("name", ["GRU", "LSTM"])
@pytest.mark.parametrize(
    "method",
    [
        TracIn(),
        InfluenceFunction(solver="ekfac", damping=0.1),
        InfluenceFunction(solver="cg", curvature="ggn", damping=0.1),
        InfluenceFunction(solver="cg", curvature="hessian", damping=10.0),
    ],
    ids=["tracin", "ekfac", "ggn", "hessian"],
)
def test_post_hoc_methods_on_recurrent_layers(name: str, method: Any) -> None:
    """They see what a network does that is written without the fused layer."""

    class Unrolled(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            with unrolled_recurrence(self.model):
                return self.model(x)

    model, x, y = build(name, 12)
    found = []
    for net in (model, Unrolled(model)):
        state = {k: p.detach().clone() for k, p in net.state_dict().items()}
        data, queries = TensorDataset(x, y), TensorDataset(x[:3], y[:3])
        problem = Problem(net, F.cross_entropy, data, queries)
        found.append(replay(method, problem, [Checkpoint(params=state, lr=0.1)]).values)
    assert float(found[0].std()) > 0
    close(found[0], found[1], 1e-5)


class Checkpointed(Nested):
    """The branch is run again in the backward pass, each of its two times."""

    reentrant = False

    def body(self, x: Tensor) -> Tensor:
        x = ClassToken.body(self, x)
        for _ in range(2):
            x = checkpoint(self.branch, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.any_trainer("a free `nn.Parameter`: class token, positions, scale, temperature")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    plain, x, y = build("nested")
    model = Checkpointed().double()
    model.load_state_dict(plain.state_dict())
    model.reentrant = reentrant
    recorder = LayerRecorder(model, tap=True)
    for look in (False, True):
        if look:
            looked_at(recorder, x)
        recorder.start()
        F.cross_entropy(model(x), y).backward()
        recorder.stop()
        found = recorder.blocks(5, 5.0)[-1].dense()
        close(found, rows(plain, x, y, recorder.leftover))


# ---------------------------------------------------------------------------------- refused


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = parameter(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x * self.scale, 0.5, self.training)


class Packed(Recurrent):
    def __init__(self) -> None:
        super().__init__(nn.GRU(WIDTH, 5, batch_first=True))

    def body(self, x: Tensor) -> Tensor:
        lengths = 1 + (x.detach()[:, 0, 0] > 0).long().cpu() * (LENGTH - 1)
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out, _ = pad_packed_sequence(self.layer(packed)[0], True, total_length=LENGTH)
        return self.back(out)


class Mixing(Positions):
    """Positions for the examples of a batch."""

    def body(self, x: Tensor) -> Tensor:
        return super().body(x.transpose(0, 1)).transpose(0, 1)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "random": (lambda: Within(Noisy()), "there are random operations"),
    "packed": (Packed, "belong to no layer with per-example factors"),
    "mixing": (Mixing, "none of its inputs has the examples first"),
}


def remedies(message: str) -> list[dict[str, Any]]:
    """What a refusal says to type, as options."""
    found: list[dict[str, Any]] = []
    if 'schedule="snapshot"' in message:
        found.append({"schedule": "snapshot"})
    if "layers=" in message:
        names = message.split("layers=")[1].split("]")[0]
        found.append({"layers": [name.strip(" '[") for name in names.split(",")]})
    assert found, message
    return found


@pytest.mark.any_trainer("random operations within a layer of no known kind")
@pytest.mark.any_trainer("GRU, LSTM, RNN on packed sequences")
@pytest.mark.parametrize("name", ["random", "packed"])
def test_what_does_not_follow_is_refused_with_what_works(name: str) -> None:
    make, why = REFUSED[name]

    def run(**options: Any) -> Tensor:
        return scores_of(fresh(make), observable="loss", **options)

    with pytest.raises(UnsupportedProblemError, match=why) as refusal:
        run()
    given = remedies(str(refusal.value))
    assert len(given) == 2
    for options in given:
        assert options != {"layers": []}
        assert float(run(**options).std()) > 0


class Idle(Sequences):
    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(WIDTH, WIDTH)

    def body(self, x: Tensor) -> Tensor:
        return x


class Renormalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, WIDTH, max_norm=1.0), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table((x[:, :, 0].mul(3).long() % 9).detach()).mean(1))


@pytest.mark.any_trainer("a layer that takes no part in the loss")
@pytest.mark.any_trainer("Embedding with `max_norm`, `scale_grad_by_freq` or `sparse`")
@pytest.mark.parametrize(
    ("make", "message"), [(Idle, "'net.idle' took no part"), (Renormalised, "use max_norm=None")]
)
def test_what_can_be_left_out(make: Callable[[], nn.Module], message: str) -> None:
    def run(**options: Any) -> Tensor:
        return scores_of(fresh(make), observable="loss", **options)

    with pytest.raises(UnsupportedProblemError, match=message) as refusal:
        run()
    (given,) = remedies(str(refusal.value))
    assert float(run(**given).std()) > 0


def test_a_layer_without_a_part_can_be_frozen() -> None:
    model, x, y = fresh(Idle)
    model.idle.requires_grad_(False)
    assert float(scores_of((model, x, y), observable="loss").std()) > 0


def test_a_use_that_nobody_sees_is_noticed_in_every_pass() -> None:
    model, x, y = build("class token")
    recorder = LayerRecorder(model, tap=True)
    for unseen in (0.0, 0.1):
        recorder.start()
        (F.cross_entropy(model(x), y) + unseen * model.token.sum()).backward()
        recorder.stop()
        if not unseen:
            recorder.blocks(5)
    with pytest.raises(UnsupportedProblemError, match=r"\['token'\] belong.*not the sums"):
        recorder.blocks(5)


def test_positions_in_the_place_of_examples_are_refused() -> None:
    make, why = REFUSED["mixing"]
    model, (_, x, y) = make().double(), build("class token")
    recorder = LayerRecorder(model, tap=True)
    recorder.start()
    F.cross_entropy(model(x), y).backward()
    recorder.stop()
    with pytest.raises(UnsupportedProblemError, match=why):
        recorder.blocks(5)
