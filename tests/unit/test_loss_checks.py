"""Losses that give an example no gradient of its own are refused in the first batch, others not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fine_bench.callback import BatchAdapter, FINECallback
from fine_bench.fine.loss_graph import LossGraph, Outputs, mixes
from fine_bench.fine.mixtures import mixed_inputs, mixed_labels
from fine_bench.types import UnsupportedProblemError
from support.training import QUIET

N, D, K = 24, 20, 4
Step = Callable[["Net", Tensor, Tensor], Tensor]


class Net(pl.LightningModule):
    """A network whose training step is the test's own."""

    def __init__(self, step: Step, outputs: int = K) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Linear(D, 8), nn.Tanh())
        self.head = nn.Linear(8, outputs)
        self.step = step
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: Any, _: int) -> Tensor:
        return self.step(self, batch[0], batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data(kind: str = "classes", n: int = N) -> TensorDataset:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(n, D, generator=draw, dtype=torch.float64)
    ys = {
        "classes": torch.randint(K, (n,), generator=draw),
        "two": torch.randint(2, (n,), generator=draw),
        "numbers": torch.randn(n, generator=draw, dtype=torch.float64),
        "column": torch.randn(n, 1, generator=draw, dtype=torch.float64),
        "many": torch.randint(2, (n, K), generator=draw).double(),
        "soft": torch.rand(n, K, generator=draw, dtype=torch.float64).softmax(1),
    }
    return TensorDataset(x, ys[kind], torch.arange(n))


def fit(
    callback: FINECallback, net: Net, dataset: Dataset[Any], batch: int = 8, **options: Any
) -> pl.Trainer:
    loader = DataLoader(dataset, batch_size=batch, collate_fn=options.pop("collate_fn", None))
    trainer = pl.Trainer(**QUIET, max_epochs=1, callbacks=[callback], **options)
    trainer.fit(net, loader)
    return trainer


def contrastive(net: Net, x: Tensor, y: Tensor) -> Tensor:
    z = F.normalize(net(x), dim=1)
    return F.cross_entropy(z @ F.normalize(net(x + 0.1), dim=1).T, torch.arange(len(x)))


def simclr(net: Net, x: Tensor, y: Tensor) -> Tensor:
    z = F.normalize(net(torch.cat([x, x + 0.1])), dim=1)
    m = len(x)
    like = (z @ z.T).masked_fill(torch.eye(2 * m, dtype=torch.bool), -1e9)
    return F.cross_entropy(like, (torch.arange(2 * m) + m) % (2 * m))


def variance(net: Net, x: Tensor, y: Tensor) -> Tensor:
    z = net(x)
    return F.cross_entropy(z, y) + 0.01 * z.var(0).sum()


def root(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(net(x)[:, 0], y.double()).sqrt()


def dice(net: Net, x: Tensor, y: Tensor) -> Tensor:
    p, t = net(x).sigmoid(), F.one_hot(y, K)
    return 1 - 2 * (p * t).sum() / (p + t).sum()


def triplet(net: Net, x: Tensor, y: Tensor) -> Tensor:
    z = net(x)
    return F.triplet_margin_loss(z, z.roll(1, 0), z.roll(2, 0))


@pytest.mark.any_trainer("a loss that compares the examples of a batch, or takes its statistics")
@pytest.mark.parametrize("step", [contrastive, simclr, variance, root, dice, triplet])
@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate_grad_batches": 2}, {"schedule": "snapshot"}, {"observe_every": 3}],
    ids=str,
)
def test_losses_that_mix_are_refused(step: Step, options: dict[str, Any]) -> None:
    own = {k: v for k, v in options.items() if k != "accumulate_grad_batches"}
    rest = {k: v for k, v in options.items() if k == "accumulate_grad_batches"}
    with pytest.raises(UnsupportedProblemError, match="the loss of the first batch mixes its"):
        fit(FINECallback(observable="loss", **own), Net(step), data(), **rest)


def weighted(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(net(x), y, weight=torch.arange(1.0, K + 1, dtype=torch.float64))


def smoothed(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(net(x), y, label_smoothing=0.1)


def ignored(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(net(x), y, ignore_index=1)


def focal(net: Net, x: Tensor, y: Tensor) -> Tensor:
    each = F.cross_entropy(net(x), y, reduction="none")
    return ((1 - (-each).exp()) ** 2 * each).mean()


def distilled(net: Net, x: Tensor, y: Tensor) -> Tensor:
    teacher = (3 * x[:, :K]).softmax(1)
    return F.kl_div(net(x).log_softmax(1), teacher, reduction="batchmean")


def bootstrapped(net: Net, x: Tensor, y: Tensor) -> Tensor:
    z = net(x)
    return 0.8 * F.cross_entropy(z, y) + 0.2 * F.cross_entropy(z, z.argmax(1))


def two_views(net: Net, x: Tensor, y: Tensor) -> Tensor:
    first, second = net(x), net(x + 0.1)
    return F.cross_entropy(first, y) - F.cosine_similarity(first, second.detach()).mean()


def thresholds(net: Net, x: Tensor, y: Tensor) -> Tensor:
    """As many thresholds as examples."""
    logits = net(x)[:, :1] - torch.linspace(-1, 1, len(x), dtype=x.dtype)
    return F.binary_cross_entropy_with_logits(logits, (y[:, None] > torch.arange(len(x))).double())


def noisy(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(net(x * 1.3 + 0.1 * torch.randn_like(x)), y)


def erased(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(net(torch.cat([x[:, :4], torch.zeros_like(x[:, 4:])], 1)), y)


def squared(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(net(x)[:, :1], y[:, None].double())


PLAIN = [
    weighted, smoothed, ignored, focal, distilled, bootstrapped, two_views, thresholds, noisy,
    erased, squared,
]  # fmt: skip


@pytest.mark.parametrize("step", PLAIN)
def test_no_false_alarm(step: Step) -> None:
    callback = FINECallback(observable="loss")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit(callback, Net(step), data())
    assert callback.scores().values.abs().sum() > 0


def test_examples_in_another_dimension() -> None:
    """Time first, T = B: the examples are where nothing mixes."""
    layer = nn.Linear(3, 2)
    heard = Outputs(layer)
    z = layer(torch.randn(5, 5, 3))
    along_time = z.cumsum(0).square().mean()
    assert not mixes(along_time, heard.heard, 5)
    assert mixes((z.sum(0).sum(0) ** 2).sum(), heard.heard, 5)
    flat = layer(torch.randn(10, 3))
    heard.heard = heard.heard[1:]
    assert not mixes(flat.view(5, 2, 2).sum(1).square().sum(), heard.heard, 5)
    assert not mixes(flat.view(2, 5, 2).sum(0).square().sum(), heard.heard, 5)
    assert mixes(flat.sum(0).square().sum(), heard.heard, 5)
    heard.close()


def test_a_loss_is_looked_at_in_every_precision() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        layer = nn.Linear(3, 2, dtype=dtype)
        heard = Outputs(layer)
        z = layer(torch.randn(6, 3, dtype=dtype))
        assert not mixes(F.cross_entropy(z, torch.ones(6, dtype=torch.int64)), heard.heard, 6)
        assert mixes(z.var(0).sum(), heard.heard, 6)
        heard.close()


@pytest.mark.any_trainer("an output `(B, 1)` against a target `(B,)`, or the other way")
@pytest.mark.parametrize("loss", [F.mse_loss, F.l1_loss, F.huber_loss])
@pytest.mark.parametrize("kind", ["numbers", "column"])
def test_broadcasting_is_refused_with_both_shapes(loss: Any, kind: str) -> None:
    def step(net: Net, x: Tensor, y: Tensor) -> Tensor:
        z = net(x)
        return loss(z if kind == "numbers" else z[:, 0], y)

    shapes = r"\(8, 1\) against the target \(8,\)"
    if kind == "column":
        shapes = r"\(8, 1\) against the target \(8, 1\)"  # the head's output, before it is squeezed
    with (
        pytest.warns(UserWarning, match="broadcasting"),
        pytest.raises(UnsupportedProblemError, match=shapes + r".*\(8, 8\)"),
    ):
        fit(FINECallback(observable="loss"), Net(step, 1), data(kind))


def mixup(net: Net, x: Tensor, y: Tensor) -> Tensor:
    order = torch.arange(len(x)).roll(1)
    z = net(0.7 * x + 0.3 * x[order])
    return 0.7 * F.cross_entropy(z, y) + 0.3 * F.cross_entropy(z, y[order])


def mixup_of_numbers(net: Net, x: Tensor, y: Tensor) -> Tensor:
    order = torch.arange(len(x)).roll(1)
    weight = torch.linspace(0.2, 0.8, len(x), dtype=x.dtype)[:, None]
    mean = net(weight * x + (1 - weight) * x[order])[:, 0]
    return F.mse_loss(mean, weight[:, 0] * y + (1 - weight[:, 0]) * y[order])


def normalised_mixup(net: Net, x: Tensor, y: Tensor) -> Tensor:
    x = (x - 0.3) / 1.7
    return mixup_of_numbers(net, x, y.double())


def cutmix(net: Net, x: Tensor, y: Tensor) -> Tensor:
    order = torch.arange(len(x)).roll(1)
    z = net(torch.cat([x[:, :4], x[order, 4:]], 1))
    return 0.2 * F.cross_entropy(z, y) + 0.8 * F.cross_entropy(z, y[order])


def hidden_mixup(net: Net, x: Tensor, y: Tensor) -> Tensor:
    order, h = torch.arange(len(x)).roll(1), net.body(x)
    z = net.head(0.6 * h + 0.4 * h[order])
    return 0.6 * F.cross_entropy(z, y) + 0.4 * F.cross_entropy(z, y[order])


@pytest.mark.any_trainer("mixup, CutMix, mixup of hidden layers")
@pytest.mark.parametrize(
    ("step", "kind"),
    [
        (mixup, "classes"),
        (mixup_of_numbers, "numbers"),
        (normalised_mixup, "two"),
        (cutmix, "classes"),
        (hidden_mixup, "classes"),
    ],
)
def test_mixtures_are_refused(step: Step, kind: str) -> None:
    with pytest.raises(UnsupportedProblemError, match="mixtures of the batch's"):
        fit(FINECallback(observable="loss"), Net(step), data(kind), batch=12)


@pytest.mark.any_trainer("mixup, CutMix, mixup of hidden layers")
def test_a_collate_function_that_mixes_is_refused() -> None:
    """The labels are mixed as well, so that only the data set knows better."""

    def collate(items: list[Any]) -> Any:
        x, y, index = torch.utils.data.default_collate(items)
        y = F.one_hot(y, K).double()
        return 0.7 * x + 0.3 * x.roll(1, 0), 0.7 * y + 0.3 * y.roll(1, 0), index

    def step(net: Net, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(net(x), y)

    with pytest.raises(UnsupportedProblemError, match="mixtures of the batch's examples"):
        fit(FINECallback(observable="loss"), Net(step), data(), collate_fn=collate)
    callback = FINECallback(observable="loss")
    fit(callback, Net(step), data("soft"))
    assert callback.scores().values.abs().sum() > 0


def test_what_is_no_mixture() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(10, 3, 8, 8, generator=draw)
    assert not mixed_inputs(x, x)
    assert not mixed_inputs(x.flip(3), x)
    assert not mixed_inputs(x.roll(2, 2), x)
    assert not mixed_inputs(x[torch.randperm(10, generator=draw)], x)
    assert not mixed_inputs((x - 0.5) / 0.2, x)
    assert not mixed_inputs(x * (torch.rand(x.shape, generator=draw) > 0.5), x)
    dark = x.clamp_min(0.0)  # pictures with black in them
    gone = dark.clone()
    gone[:, :, :4, :4] = 0.0
    assert not mixed_inputs(gone, dark)
    bits = (torch.rand(30, 12, generator=draw) > 0.5).float()
    assert not mixed_inputs(bits * (torch.rand(bits.shape, generator=draw) > 0.1), bits)
    assert mixed_inputs(0.4 * x + 0.6 * x.roll(1, 0), x)


def test_fixed_label_distributions_are_no_mixtures() -> None:
    draw = torch.Generator().manual_seed(0)
    z, y = torch.randn(40, 5, generator=draw), torch.randint(5, (40,), generator=draw)
    for partner, mixed in ((y.roll(1), True), ((y + 1) % 5, False), (z.argmax(1), False)):
        q = 0.7 * F.one_hot(y, 5) + 0.3 * F.one_hot(partner, 5)
        assert mixed_labels(z, z.softmax(1) - q, y) is mixed


class Queries:
    """A squared and two binary losses, asked by queries with the loss left at its default."""

    @staticmethod
    def mse(net: Net, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(net(x), y)

    @staticmethod
    def own(net: Net, x: Tensor, y: Tensor) -> Tensor:
        return (net(x) - y).square().mean()

    @staticmethod
    def binary(net: Net, x: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(net(x)[:, 0], y.double())

    @staticmethod
    def labels(net: Net, x: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(net(x), y)


@pytest.mark.any_trainer(
    "queries or snapshots of a run whose loss is no cross-entropy, `loss=` left out"
)
@pytest.mark.parametrize(
    ("step", "kind", "outputs", "name"),
    [
        (Queries.mse, "column", 1, "pass loss=torch.nn.functional.mse_loss, the training's own"),
        (Queries.own, "column", 1, "or whatever the training's loss is"),
        (Queries.binary, "two", 1, "binary_cross_entropy_with_logits, the training's own"),
        (Queries.labels, "many", K, "binary_cross_entropy_with_logits, the training's own"),
    ],
)
@pytest.mark.parametrize("snapshot", [False, True])
def test_the_loss_is_asked_for(
    step: Step, kind: str, outputs: int, name: str, snapshot: bool
) -> None:
    callback = FINECallback("validation", observable="loss", queries=data(kind, 5))
    if snapshot:
        callback = FINECallback(observable="loss", schedule="snapshot")
    with pytest.raises(UnsupportedProblemError, match=name):
        fit(callback, Net(step, outputs), data(kind))


@pytest.mark.any_trainer("`loss=F.mse_loss` and other losses of PyTorch, outputs `(B, 1)`")
def test_losses_of_one_output_need_no_wrapper() -> None:
    def mean(output: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        return F.mse_loss(output, y, reduction=reduction).mean(1)

    found = []
    for loss in (F.mse_loss, mean):
        for options in ({"schedule": "snapshot"}, {"target": "validation"}):
            queries = data("column", 5) if "target" in options else None
            callback = FINECallback(observable="loss", loss=loss, queries=queries, **options)  # type: ignore[arg-type]
            fit(callback, Net(Queries.mse, 1), data("column"))
            found.append(callback.scores().values)
    assert found[0].abs().min() > 0
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])


@pytest.mark.any_trainer("`loss=F.mse_loss`, several outputs an example")
def test_losses_of_several_outputs_are_told_how() -> None:
    with pytest.raises(UnsupportedProblemError, match=r"\.mean\(1\)"):
        fit(
            FINECallback(observable="loss", loss=F.mse_loss, schedule="snapshot"),
            Net(lambda net, x, y: F.mse_loss(net(x), y)),
            data("soft"),
        )


def test_watching_the_loss_changes_no_weight() -> None:
    weights = []
    for watched in (True, False):
        net = Net(noisy)
        torch.manual_seed(7)
        loader = DataLoader(data(), batch_size=8)
        callbacks: list[Any] = [FINECallback(observable="loss")] if watched else []
        pl.Trainer(**QUIET, max_epochs=1, callbacks=callbacks).fit(net, loader)
        weights.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert torch.equal(*weights)


def test_the_graph_ends_at_the_outputs_that_the_loss_is_made_of() -> None:
    net = Net(smoothed)
    heard = Outputs(net)
    x, y = data()[:8][:2]
    graph = LossGraph.of(F.cross_entropy(net(x), y), heard.heard)
    assert [end.name for end in graph.ends] == ["head"]
    graph = LossGraph.of(net(x).sum() + net.body(x).square().sum(), heard.heard)
    assert [end.name for end in graph.ends] == ["head", "body.0"]
    heard.close()
    assert heard.heard == []


def test_an_adapter_with_losses_is_looked_at_as_well() -> None:
    adapter = BatchAdapter(losses=lambda net, batch: (net(batch[0])[:, 0] - batch[1]).square())
    with pytest.raises(UnsupportedProblemError, match="mixes its examples"):
        fit(FINECallback(observable="loss", adapter=adapter), Net(root), data("numbers"))
