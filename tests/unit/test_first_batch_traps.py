"""Ordinary models in which something else than the layers' shapes decides whose row is whose."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import fine_bench
from baselines.influence_functions import InfluenceFunction
from fine_bench.estimator import replay
from fine_bench.gradients.recorded_call import Call
from fine_bench.gradients.recorder import LayerRecorder
from fine_bench.types import Checkpoint, Problem, UnsupportedProblemError

N, BATCH = 32, 8


class Sorted(nn.Module):
    """Sorts its batch by length, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.a, self.b = nn.Embedding(20, 6), nn.Linear(6, 7), nn.Linear(7, 3)
        self.sorts = True

    def forward(self, x: Tensor) -> Tensor:
        order = (x != 0).sum(1).argsort(descending=True, stable=True)
        if not self.sorts:
            order = torch.arange(len(x))
        h = torch.tanh(self.a(self.embedding(x[order]).mean(1)))[order.argsort()]
        return self.b(h)


def sentences() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randint(1, 20, (N, 6))
    x[torch.arange(6)[None] >= torch.randint(1, 7, (N, 1))] = 0
    return x, torch.randint(3, (N,))


def watched(net: nn.Module, x: Tensor, y: Tensor, n_epochs: int = 2, **options: Any) -> Any:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    with fine_bench.watch(net, optimizer=optimizer, train_size=len(x), **options) as fine:
        g = torch.Generator().manual_seed(1)
        for _ in range(n_epochs):
            for i in torch.randperm(len(x), generator=g).split(BATCH):
                fine.batch(i)
                fine.loss(F.cross_entropy(net(x[i]), y[i])).backward()
                optimizer.step()
                optimizer.zero_grad()
            if "train_set" in options:
                fine.epoch_ends()
    return fine.scores().values


@pytest.mark.any_trainer("a model that sorts its batch, by length for instance")
def test_a_model_that_sorts_its_batch_is_refused_and_the_remedy_works() -> None:
    x, y = sentences()
    net = Sorted().double()
    with pytest.raises(UnsupportedProblemError, match="another order than the batch"):
        watched(copy.deepcopy(net), x, y)
    found = []
    for sorts in (True, False):
        net.sorts = sorts
        options = {"schedule": "snapshot", "train_set": TensorDataset(x, y)}
        found.append(watched(copy.deepcopy(net), x, y, **options))
    assert torch.allclose(*found, rtol=1e-6)


class Scaled(nn.Module):
    """A layer of no known kind."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class SortedInside(nn.Module):
    """Only what has no factors gets the batch sorted: a free parameter, or a layer."""

    def __init__(self, kind: str, sorts: bool = True) -> None:
        super().__init__()
        self.embedding, self.head, self.sorts = nn.Embedding(20, 6), nn.Linear(6, 3), sorts
        self.free = nn.Parameter(torch.randn(6)) if "free" in kind else None
        self.layer = Scaled() if kind == "layer" else None
        self.by_index = kind == "free, by an index"

    def forward(self, x: Tensor) -> Tensor:
        length = (x != 0).sum(1)
        order = length.argsort(descending=True, stable=True)
        if not self.sorts:
            order = torch.arange(len(x))
        h = self.embedding(x).mean(1)[order]
        if self.layer is not None:
            h = self.layer(h)
        elif self.by_index:
            h = h * self.free[length[order] - 1][:, None]
        else:
            h = torch.tanh(h + self.free)
        return self.head(h[order.argsort()])


@pytest.mark.any_trainer("a model that sorts its batch, by length for instance")
@pytest.mark.parametrize("kind", ["free", "free, by an index", "layer"])
def test_parameters_behind_a_sorted_batch_are_refused_and_the_remedy_works(kind: str) -> None:
    x, y = sentences()
    torch.manual_seed(3)
    net = SortedInside(kind).double()
    with pytest.raises(UnsupportedProblemError, match=r"(free|scale).* in another order than"):
        watched(copy.deepcopy(net), x, y)
    options = {"schedule": "snapshot", "train_set": TensorDataset(x, y)}
    found = []
    for sorts in (True, False):
        net.sorts = sorts
        found.append(watched(copy.deepcopy(net), x, y, **options))
    assert torch.allclose(*found, rtol=1e-6)
    in_batch = watched(copy.deepcopy(net), x, y, observable="loss")  # not sorted: served
    assert float(in_batch.std()) > 0
    assert not [
        seen for _, pair in look_of(net, x) for part in pair for seen in part if seen.values
    ]


def look_of(net: nn.Module, x: Tensor) -> Any:
    """What a look at two batches leaves behind: no values."""
    recorder = LayerRecorder(net, tap=True)
    with torch.no_grad():
        recorder.find_layouts([(8, lambda: net(x[:8])), (4, lambda: net(x[:4]))])
    assert recorder._uncovered is not None
    looks = recorder._uncovered._looks
    recorder.close()
    return looks


class Counter(nn.Module):
    """A free parameter beside a count of passes."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(36))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x * self.scale


@pytest.mark.parametrize(
    "layers",
    [
        [nn.InstanceNorm2d(4, affine=True, track_running_stats=True), nn.Flatten()],
        [nn.Flatten(), Counter()],
    ],
    ids=["running statistics", "counter"],
)
def test_applying_a_layer_once_more_leaves_its_buffers(layers: list[nn.Module]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), *layers, nn.Linear(36, 3))
    x, y = torch.randn(BATCH, 2, 5, 5) + 1, torch.randint(3, (BATCH,))
    states = []
    for watches in (False, True):
        model = copy.deepcopy(net)
        recorder = LayerRecorder(model, tap=True) if watches else None
        for _ in range(3):
            if recorder is not None:
                recorder.start(BATCH)
            F.cross_entropy(model(x), y).backward()
            if recorder is not None:
                recorder.stop()
                recorder.blocks(BATCH, float(BATCH))
                recorder.clear()
            model.zero_grad()
        states.append(model.state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_nothing_of_earlier_batches_is_held() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(N, 6), torch.randint(3, (N,))
    layers = [part for _ in range(6) for part in (nn.Linear(6, 6), nn.Tanh())]
    gc.collect()
    before = sum(isinstance(part, Call) for part in gc.get_objects())
    watched(nn.Sequential(*layers, nn.Linear(6, 3)), x, y, n_epochs=20)
    gc.collect()
    assert sum(isinstance(part, Call) for part in gc.get_objects()) <= before + 8


def test_linear_is_put_back_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    plain = F.linear

    def another_library(*args: Any) -> Tensor:
        calls.append(1)
        return plain(*args)

    monkeypatch.setattr(F, "linear", another_library)
    attention = nn.MultiheadAttention(6, 2, batch_first=True)
    recorder = LayerRecorder(attention, tap=True)
    recorder.start(4)
    x = torch.randn(4, 3, 6)
    attention(x, x, x)[0].sum().backward()
    assert calls
    assert F.linear is another_library

    class Stop(KeyboardInterrupt):
        pass

    def interrupted(*_: Any, **__: Any) -> Tensor:
        raise Stop

    monkeypatch.setattr(F, "softmax", interrupted)
    monkeypatch.setattr(F, "scaled_dot_product_attention", interrupted)
    recorder.start(4)
    with pytest.raises(Stop):
        attention(x, x, x)
    recorder.close()
    assert F.linear is another_library


def test_a_loader_that_drops_its_last_batch_draws_nothing_twice() -> None:
    torch.manual_seed(0)
    n = 300
    x, y = torch.randn(n, 6), torch.randint(3, (n,))
    found = []
    for tells in (False, True):
        torch.manual_seed(1)
        net = nn.Linear(6, 3)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with fine_bench.watch(net, optimizer=optimizer, train_size=n) as fine:
            g = torch.Generator().manual_seed(2)
            for _ in range(6):
                for i in torch.randperm(n, generator=g)[: n - n % BATCH].split(BATCH):
                    fine.batch(i)
                    F.cross_entropy(net(x[i]), y[i]).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                if tells:
                    fine.epoch_ends()
        found.append(fine.scores().values)
    assert torch.allclose(*found, rtol=1e-6, atol=1e-8)


def test_a_pass_around_the_model_is_refused() -> None:
    net = nn.Sequential(nn.Linear(6, 3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    fine = fine_bench.watch(net, optimizer=optimizer, train_size=N)
    fine.batch(range(BATCH))
    F.cross_entropy(net.forward(torch.randn(BATCH, 6)), torch.zeros(BATCH).long()).backward()
    with pytest.raises(RuntimeError, match=r"write model\(x\)"):
        optimizer.step()
    fine.close()


def test_an_empty_example_and_a_scaled_input_are_no_mixture() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.last(x * 0.5)
            return logits

    torch.manual_seed(0)
    x, y = torch.randn(N, 6), torch.randint(3, (N,))
    x[::7] = 0.0
    assert watched(Scaled(), x, y, n_epochs=1).any()


def test_a_penalty_on_square_weights_compares_no_examples() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(5, BATCH), nn.Tanh(), nn.Linear(BATCH, BATCH), nn.Linear(BATCH, 1)
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    x, y = torch.randn(BATCH, 5), torch.randn(BATCH, 1)
    options = {"loss": F.mse_loss, "observable": "loss", "train_size": BATCH}
    with fine_bench.watch(net, optimizer=optimizer, **options) as fine:
        for _ in range(3):
            fine.batch(range(BATCH))
            penalty = sum((p.square().sum() for p in net.parameters()), torch.zeros(()))
            fine.loss(F.mse_loss(net(x), y) + 1e-4 * penalty).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert fine.scores().values.any()


class Conv1D(nn.Module):
    """As in GPT-2: the weight is stored the other way round."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.nf = linear.out_features
        self.weight = nn.Parameter(linear.weight.detach().T.clone())
        self.bias = nn.Parameter(linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def test_curvature_of_a_transposed_weight_is_that_of_the_weight() -> None:
    """The gradients stand in the place of the inputs, and differ from root to root."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 3)).double()
    plain[0] = nn.Linear(5, 4).double()
    turned = nn.Sequential(Conv1D(plain[0]), nn.Tanh(), plain[2]).double()  # type: ignore[arg-type]
    for net in (plain, turned):
        net[0].bias.requires_grad_(False)
    train = TensorDataset(torch.randn(20, 5).double(), torch.randint(3, (20,)))
    queries = TensorDataset(torch.randn(4, 5).double(), torch.randint(3, (4,)))
    found = []
    for net in (plain, turned):
        problem = Problem(model=net, loss=F.cross_entropy, train=train, queries=queries)
        found.append(
            replay(InfluenceFunction(), problem, [Checkpoint(net.state_dict(), 0.1)]).values
        )
    assert torch.allclose(*found, rtol=1e-9)
