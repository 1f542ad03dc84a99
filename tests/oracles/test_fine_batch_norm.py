"""Batch normalisation by rows, against rows that have parameters of their own (float64).

The twin is the definition itself: every row of the batch gets a copy of the parameters, the batch
is normalised by its own mean and variance, and the whole loss is differentiated by each copy.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fine_bench
from baselines.in_run_shapley import InRunShapleyCallback
from fine_bench.callback import FINECallback
from fine_bench.fine.options import Options
from fine_bench.gradients.batch_norm import refuse_synchronised
from fine_bench.gradients.recorder import LayerRecorder
from fine_bench.models.classifier import Classifier
from fine_bench.types import UnsupportedProblemError
from support.tensors import close, observable_gradients
from support.training import QUIET

N, N_QUERY, CLASSES, LR, BATCH = 22, 7, 3, 0.3, 6  # 22 = 3 · 6 + 4: the last batch is shorter
EPS = 1e-5


def network(kind: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        if kind == "mlp":
            net = nn.Sequential(
                nn.Linear(5, 8), nn.BatchNorm1d(8, momentum=0.3), nn.Tanh(), nn.Linear(8, CLASSES)
            )
        else:
            net = nn.Sequential(
                nn.Conv2d(1, 3, 3, padding=1, bias=False),
                nn.BatchNorm2d(3),
                nn.Tanh(),
                nn.Flatten(),
                nn.Linear(3 * 16, CLASSES),
            )
        for norm in (part for part in net if isinstance(part, nn.modules.batchnorm._BatchNorm)):
            nn.init.normal_(norm.weight, 1.0, 0.3)
            nn.init.normal_(norm.bias, 0.0, 0.3)
    return net.double()


def data(kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(7)
    shape = (5,) if kind == "mlp" else (1, 4, 4)
    x, xq = (torch.randn(k, *shape, generator=g).double() for k in (N, N_QUERY))
    y = torch.randint(CLASSES, (N,), generator=g)
    return x, y, xq, torch.arange(N_QUERY) % CLASSES


class States(pl.Callback):
    """Parameters and buffers when each step's gradient is complete, and who is in the batch."""

    def __init__(self) -> None:
        self.steps: list[tuple[dict[str, Tensor], dict[str, Tensor], Tensor]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any) -> None:
        self.index = batch[2].clone()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        params = {k: v.detach().clone() for k, v in pl_module.net.named_parameters()}
        buffers = {k: v.clone() for k, v in pl_module.net.named_buffers()}
        self.steps.append((params, buffers, self.index))


def loader(kind: str) -> DataLoader[Any]:
    x, y, _, _ = data(kind)
    return DataLoader(
        TensorDataset(x, y, torch.arange(N)),
        batch_size=BATCH,
        shuffle=True,
        generator=torch.Generator().manual_seed(11),
    )


def fit(net: nn.Module, kind: str, *callbacks: pl.Callback, **options: Any) -> Classifier:
    module = Classifier(net, CLASSES, lr=LR).double()
    trainer = pl.Trainer(
        **{"max_epochs": 2, **options}, **QUIET, precision="64-true", callbacks=[*callbacks]
    )
    trainer.fit(module, loader(kind))
    return module


def normalised(h: Tensor) -> Tensor:
    """x̂ by the batch's own statistics, from the formula; channels are dimension 1."""
    over = [d for d in range(h.ndim) if d != 1]
    mean = h.mean(over, keepdim=True)
    return (h - mean) / ((h - mean).square().mean(over, keepdim=True) + EPS).sqrt()


def rows(kind: str, params: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """m ∂L/∂θ_i, (m, P), where row i acts through its own copy θ_i, and 1 − p_i."""
    m = len(x)
    own = {k: v.expand(m, *v.shape).clone().requires_grad_() for k, v in params.items()}
    if kind == "mlp":
        h = torch.einsum("moi,mi->mo", own["0.weight"], x) + own["0.bias"]
        h = torch.tanh(normalised(h) * own["1.weight"] + own["1.bias"])
        last = "3"
    else:
        kernels = own["0.weight"].flatten(0, 1)
        h = F.conv2d(x.flatten(0, 1)[None], kernels, padding=1, groups=m).reshape(m, 3, 4, 4)
        scale, shift = (own[f"1.{part}"][:, :, None, None] for part in ("weight", "bias"))
        h = torch.tanh(normalised(h) * scale + shift).flatten(1)
        last = "4"
    logits = torch.einsum("moi,mi->mo", own[f"{last}.weight"], h) + own[f"{last}.bias"]
    grads = torch.autograd.grad(F.cross_entropy(logits, y), list(own.values()))
    complement = 1 - logits.softmax(1)[range(m), y].detach()
    return m * torch.cat([g.flatten(1) for g in grads], 1), complement


def twin(kind: str, states: States, target: str, observable: str = "margin") -> Tensor:
    """The accumulated μ, example by example."""
    x, y, xq, yq = data(kind)
    net = network(kind).eval()
    numerator, denominator = (torch.zeros(N).double() for _ in range(2))
    for params, buffers, index in states.steps:
        m = len(index)
        g, complement = rows(kind, params, x[index], y[index])
        own = g / complement[:, None] if observable == "margin" else g
        if target == "validation":
            net.load_state_dict({**params, **buffers})
            h = observable_gradients(net, params, xq, yq, observable)
            direction = torch.stack([v / float((g @ v).std()) for v in h]).mean(0)
        for position, i in enumerate(index.tolist()):
            h_i = own[position] if target == "self" else direction
            c = torch.stack([g[j] @ h_i for j in range(m) if j != position])
            numerator[i] += LR * (g[position] @ h_i - c.mean())
            denominator[i] += (LR * c.std()) ** 2
    return (numerator / (N * denominator).sqrt())[None]


def queries(kind: str) -> TensorDataset:
    _, _, xq, yq = data(kind)
    return TensorDataset(xq, yq)


@pytest.mark.any_trainer("batch normalisation")
@pytest.mark.parametrize("observable", ["margin", "loss"])
@pytest.mark.parametrize("target", ["self", "validation"])
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_scores_are_those_of_rows(kind: str, target: Any, observable: Any) -> None:
    asked = {} if target == "self" else {"queries": queries(kind), "refresh_every": 1}
    callback, states = FINECallback(target, observable, **asked), States()
    fit(network(kind), kind, callback, states)
    expected = twin(kind, states, target, observable)
    found = callback._schedule.accumulator.scores("fine", target, 1.0).values  # type: ignore[union-attr]
    close(found, expected, 2e-6)  # scores are float32
    assert float(expected.abs().max()) > 0.1


@pytest.mark.parametrize("options", [{"sketch": 64}, {"geometry": "ekfac"}, {"observe_every": 2}])
def test_with_other_options(options: dict[str, Any]) -> None:
    callback = FINECallback("self", "loss", **options)
    fit(network("cnn"), "cnn", callback)
    assert bool(callback.scores().values.isfinite().all())
    assert float(callback.scores().values.abs().max()) > 0


def test_accumulated_batches_are_one_sum_of_rows() -> None:
    callback, states = FINECallback("self", "loss"), Parts()
    fit(network("mlp"), "mlp", callback, states, accumulate_grad_batches=2, max_epochs=1)
    x, y, _, _ = data("mlp")
    numerator, denominator = (torch.zeros(N).double() for _ in range(2))
    for params, parts in states.steps:
        # each micro-batch has statistics of its own
        g = torch.cat([rows("mlp", params, x[i], y[i])[0] for i in parts])
        index = torch.cat(parts)
        if len({len(i) for i in parts}) > 1:
            continue  # of weights that differ, see test_fine_window
        for position, i in enumerate(index.tolist()):
            c = torch.stack([g[j] @ g[position] for j in range(len(g)) if j != position])
            numerator[i] += LR * (g[position] @ g[position] - c.mean())
            denominator[i] += (LR * c.std()) ** 2
    expected = numerator / (N * denominator).sqrt()
    seen = denominator > 0
    assert int(seen.sum()) == 2 * BATCH
    close(callback.scores().values[0, seen], expected[seen], 2e-6)


class Parts(pl.Callback):
    """Parameters of each step and the examples of its micro-batches."""

    def __init__(self) -> None:
        self.steps: list[tuple[dict[str, Tensor], list[Tensor]]] = []
        self.parts: list[Tensor] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any) -> None:
        self.parts.append(batch[2].clone())

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        params = {k: v.detach().clone() for k, v in pl_module.net.named_parameters()}
        self.steps.append((params, self.parts))
        self.parts = []


def test_in_run_shapley_shares_the_step_among_rows() -> None:
    callback, states = InRunShapleyCallback("validation", queries=queries("mlp"), order=1), States()
    fit(network("mlp"), "mlp", callback, states)
    x, y, xq, yq = data("mlp")
    net = network("mlp").eval()
    expected = torch.zeros(1, N).double()
    for params, buffers, index in states.steps:
        net.load_state_dict({**params, **buffers})
        direction = observable_gradients(net, params, xq, yq, "loss").mean(0)
        g, _ = rows("mlp", params, x[index], y[index])
        expected[0, index] += LR * (g @ direction) / len(index)
    close(callback._accumulator._values, expected, 1e-9)


# ------------------------------------------------------------------ rows add up to the step


class Deep(nn.Module):
    """Whatever follows from ``(B, 12)`` by the given layers, and a head."""

    def __init__(self, *layers: nn.Module, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers, nn.Tanh(), nn.Flatten())
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


KINDS: dict[str, Any] = {
    "BatchNorm1d": lambda: Deep(nn.Linear(12, 4), nn.BatchNorm1d(4), width=4),
    "BatchNorm1d on sequences": lambda: Deep(
        nn.Unflatten(1, (3, 4)), nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), width=16
    ),
    "BatchNorm2d": lambda: Deep(
        nn.Unflatten(1, (1, 3, 4)), nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), width=8
    ),
    "BatchNorm3d": lambda: Deep(nn.Unflatten(1, (3, 2, 2, 1)), nn.BatchNorm3d(3), width=12),
    "SyncBatchNorm in one process": lambda: Deep(nn.Linear(12, 4), nn.SyncBatchNorm(4), width=4),
    "affine=False": lambda: Deep(nn.Linear(12, 4), nn.BatchNorm1d(4, affine=False), width=4),
    "track_running_stats=False": lambda: Deep(
        nn.Linear(12, 4), nn.BatchNorm1d(4, track_running_stats=False), width=4
    ),
    "momentum=None": lambda: Deep(nn.Linear(12, 4), nn.BatchNorm1d(4, momentum=None), width=4),
    "used twice": lambda: Deep(
        nn.Linear(12, 12), *([nn.BatchNorm1d(12), nn.Tanh()] * 2), nn.Linear(12, 4), width=4
    ),
}


@pytest.mark.any_trainer("batch normalisation")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_add_up_to_the_step(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    model = KINDS[kind]().to(dtype)
    twice = kind == "used twice"
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.0 if parameter.ndim > 1 else 0.7, 0.4)
    x, y = torch.randn(9, 12, dtype=dtype), torch.randint(CLASSES, (9,))
    recorder = LayerRecorder(model, tap=True)
    recorder.start(9)
    F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
    blocks = recorder.blocks(9)
    recorder.close()
    assert len(recorder.parameters()) == (4 if twice else 3 - ("affine" in kind) - ("3d" in kind))
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    for block, parameters in zip(blocks, recorder.parameters().values(), strict=True):
        total = block.weighted_sum(torch.ones(1, 9, dtype=dtype))
        found = [part.flatten() for part in (total.weight, total.bias) if part is not None]
        expected = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        # a bias before the normalisation has no gradient: sums are compared with their terms
        size = block.norm2().sqrt().sum()
        assert float((torch.cat(found) - expected).abs().max()) <= tolerance * float(size)


# ------------------------------------------------------------------ the run stays what it is


@pytest.mark.any_trainer("batch normalisation")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"schedule": "snapshot"},
        {"geometry": "ekfac"},
        {"target": "validation", "refresh_every": 1},
    ],
)
def test_weights_and_running_statistics_are_those_of_the_plain_run(options: dict[str, Any]) -> None:
    asked = {"queries": queries("cnn")} if "target" in options else {}
    watched = fit(network("cnn"), "cnn", FINECallback(**options, **asked)).state_dict()
    plain = fit(network("cnn"), "cnn").state_dict()
    assert int(plain["net.1.num_batches_tracked"]) == 8
    assert all(torch.equal(value, watched[name]) for name, value in plain.items())


def test_the_plain_loop_gives_the_scores_of_the_callback() -> None:
    callback = FINECallback("self")
    fit(network("mlp"), "mlp", callback)
    net = network("mlp")
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    with fine_bench.watch(net, loss=F.cross_entropy, optimizer=optimizer, train_size=N) as fine:
        batches = loader("mlp")
        for _ in range(2):
            for x, y, index in batches:
                fine.batch(index)
                optimizer.zero_grad()
                F.cross_entropy(net(x), y).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    close(fine.scores().values, callback.scores().values, 1e-12)


@pytest.mark.any_trainer("batch normalisation that is frozen with `.eval()`")
def test_frozen_statistics_leave_an_example_its_own_gradient() -> None:
    net = network("mlp")
    net[1].running_mean.normal_(0.0, 0.5, generator=torch.Generator().manual_seed(2))
    frozen, states = copy.deepcopy(net), States()
    callback = FINECallback("self", "loss")

    class Frozen(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.net[1].eval()

    fit(net, "mlp", Frozen(), callback, states)
    x, y, _, _ = data("mlp")
    numerator, denominator = (torch.zeros(N).double() for _ in range(2))
    for params, _, index in states.steps:
        g = observable_gradients(frozen.eval(), params, x[index], y[index], "loss")
        for position, i in enumerate(index.tolist()):
            c = torch.stack([g[j] @ g[position] for j in range(len(g)) if j != position])
            numerator[i] += LR * (g[position] @ g[position] - c.mean())
            denominator[i] += (LR * c.std()) ** 2
    close(callback.scores().values, (numerator / (N * denominator).sqrt())[None], 2e-6)
    assert torch.equal(net[1].running_mean, frozen[1].running_mean)


# ------------------------------------------------------------------ what is said, what is refused


@pytest.mark.any_trainer("batch normalisation")
def test_one_line_says_what_is_computed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fine_bench"):
        fit(network("mlp"), "mlp", FINECallback("self"))
    (line,) = [r.getMessage() for r in caplog.records if "normalisation" in r.getMessage()]
    assert line.startswith("f-INE: batch normalisation in net.1: an example counts with what its")
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="fine_bench"):
        fit(network("mlp"), "mlp", FINECallback("self", schedule="snapshot"))
    (line,) = [r.getMessage() for r in caplog.records if "normalisation" in r.getMessage()]
    assert line.endswith("snapshots are read with the running statistics")


@pytest.mark.any_trainer('batch normalisation under `batch_norm="refuse"`')
@pytest.mark.parametrize("schedule", ["in_batch", "snapshot"])
def test_it_may_be_refused(schedule: Any) -> None:
    callback = FINECallback("self", schedule=schedule, batch_norm="refuse")
    with pytest.raises(UnsupportedProblemError, match=r"net\.1: BatchNorm1d mixes the examples"):
        fit(network("mlp"), "mlp", callback)


def untracked() -> nn.Module:
    net: Any = network("mlp")
    net[1] = nn.BatchNorm1d(8, track_running_stats=False).double()
    return net  # type: ignore[no-any-return]


@pytest.mark.any_trainer("batch normalisation with `track_running_stats=False`")
def test_without_running_statistics_self_is_right() -> None:
    with_statistics: Any = network("mlp")
    nn.init.ones_(with_statistics[1].weight)
    nn.init.zeros_(with_statistics[1].bias)
    scores = []
    for net in (with_statistics, untracked()):
        callback = FINECallback("self")
        fit(net, "mlp", callback)
        scores.append(callback.scores().values)
    close(scores[1], scores[0], 1e-12)


@pytest.mark.any_trainer("batch normalisation with `track_running_stats=False`")
@pytest.mark.parametrize(
    "options", [{"target": "validation"}, {"schedule": "snapshot"}, {"geometry": "ekfac"}]
)
def test_without_running_statistics_queries_are_refused(options: dict[str, Any]) -> None:
    asked = {"queries": queries("mlp")} if "target" in options else {}
    with pytest.raises(UnsupportedProblemError, match=r"net\.1: BatchNorm1d has no running stat"):
        fit(untracked(), "mlp", FINECallback(**options, **asked))


@pytest.mark.any_trainer("`SyncBatchNorm` over several processes")
def test_statistics_over_several_processes_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.SyncBatchNorm(2))
    refuse_synchronised(model, 1)
    refuse_synchronised(nn.Sequential(nn.BatchNorm1d(2)), 2)
    refuse_synchronised(copy.deepcopy(model).eval(), 2)
    with pytest.raises(UnsupportedProblemError, match="sync_batchnorm=False"):
        refuse_synchronised(model, 2)


class Centred(nn.Module):
    """Takes the mean over the batch away."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def test_other_mixing_beside_it_is_refused() -> None:
    for norm in (nn.BatchNorm1d(8), nn.BatchNorm1d(8, track_running_stats=False)):
        net = nn.Sequential(nn.Linear(5, 8), norm, Centred(), nn.Linear(8, CLASSES)).double()
        with pytest.raises(UnsupportedProblemError, match="who else is in its batch"):
            fit(net, "mlp", FINECallback("self"))


def test_a_sum_is_still_told_from_a_mean() -> None:
    class Summed(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1], reduction="sum")

    trainer = pl.Trainer(
        max_epochs=1, **QUIET, precision="64-true", callbacks=[FINECallback("self", "loss")]
    )
    with pytest.raises(UnsupportedProblemError, match="is the sum of the losses"):
        trainer.fit(Summed(network("mlp"), CLASSES, lr=LR).double(), loader("mlp"))


def test_the_look_at_the_first_batch_warns_of_nothing(recwarn: pytest.WarningsRecorder) -> None:
    callback = FINECallback("validation", queries=queries("mlp"))
    fit(network("mlp"), "mlp", callback)
    assert not [w for w in recwarn if "f-INE" in str(w.message) or "loss" in str(w.message)]


def test_the_option_is_checked() -> None:
    with pytest.raises(ValueError, match="batch_norm"):
        Options(batch_norm="columns")  # type: ignore[arg-type]
    assert Options().batch_norm == "rows"
