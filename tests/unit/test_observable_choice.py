"""What is measured where nobody says it, and what its scores are: one example at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from fine_bench.callback import BatchAdapter, FINECallback
from fine_bench.fine.head_gradients import ends_of
from fine_bench.gradients.recorded_call import Call
from fine_bench.types import UnsupportedProblemError
from support.tensors import close
from support.training import QUIET, Diary

N, D, K, LR = 18, 5, 4, 0.1
WEIGHT = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
PER_EXAMPLE = Callable[[Any, Tensor], Tensor]


class Heads(nn.Module):
    """A body and two heads, of which the second one runs last."""

    def __init__(self, outputs: int = K) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.body = nn.Linear(D, 6)
        self.first = nn.Linear(6, outputs)
        self.second = nn.Linear(6, 2)
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.body(x))
        return self.first(h), self.second(h)


class Run(pl.LightningModule):
    def __init__(self, mean: Callable[[Any, Tensor], Tensor], outputs: int = K) -> None:
        super().__init__()
        self.net = Heads(outputs)
        self.mean = mean

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[0]

    def training_step(self, batch: Any, _: int) -> Tensor:
        return self.mean(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=LR)


def data(kind: str = "classes", n: int = N, seed: int = 1) -> TensorDataset:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, D, generator=draw, dtype=torch.float64)
    y = {
        "classes": torch.arange(n) % K,
        "column": torch.randn(n, 1, generator=draw, dtype=torch.float64),
        "many": torch.randint(2, (n, K), generator=draw).double(),
        "tokens": torch.randint(2, (n, 3), generator=draw),
    }[kind]
    return TensorDataset(x, y, torch.arange(n))


def fit(
    callbacks: list[Any], mean: Any, dataset: TensorDataset, outputs: int = K, **options: Any
) -> None:
    loader = DataLoader(
        dataset, batch_size=6, shuffle=True, generator=torch.Generator().manual_seed(2)
    )
    resume = options.pop("resume", None)
    pl.Trainer(**{**QUIET, "max_epochs": 2, **options}, callbacks=callbacks).fit(
        Run(mean, outputs), loader, ckpt_path=resume
    )


def expected(
    diary: Diary, dataset: TensorDataset, each: PER_EXAMPLE, outputs: int, margin: bool = False
) -> Tensor:
    """μ of self from its formula, an example at a time; ``each`` may depend on the batch's y."""
    net, (x, y) = Heads(outputs), dataset.tensors[:2]
    up, down = torch.zeros(2, N, dtype=torch.float64)
    for params, index in diary.steps:
        rows, own = [], []
        for i in index.tolist():
            values = {k: p.detach().requires_grad_() for k, p in params.items()}
            loss = each(functional_call(net, values, (x[i : i + 1],)), y[[i]]).sum()
            if each is weighted_each:
                loss = loss * len(index) / WEIGHT[y[index]].sum()
            grads = torch.autograd.grad(loss, list(values.values()), allow_unused=True)
            parts = [
                torch.zeros_like(p).flatten() if g is None else g.flatten()
                for g, p in zip(grads, values.values(), strict=True)
            ]
            rows.append(torch.cat(parts))
            own.append(1 - (-loss.detach()).exp() if margin else torch.ones(()))
        g = torch.stack(rows)
        gram = g @ g.T / torch.stack(own)[:, None]
        for place, i in enumerate(index.tolist()):
            others = torch.cat([gram[place, :place], gram[place, place + 1 :]])
            up[i] += LR * (gram[place, place] - others.mean())
            down[i] += (LR * others.std()).square()
    return up / (N * down).sqrt()


def smoothed(out: Any, y: Tensor) -> Tensor:
    return F.cross_entropy(out[0], y, label_smoothing=0.1, reduction="none")


def weighted_each(out: Any, y: Tensor) -> Tensor:
    return F.cross_entropy(out[0], y, weight=WEIGHT, reduction="none")


def squared(out: Any, y: Tensor) -> Tensor:
    return F.mse_loss(out[0], y, reduction="none").mean(1)


def several_labels(out: Any, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(out[0], y, reduction="none").mean(1)


def focal(out: Any, y: Tensor) -> Tensor:
    each = F.cross_entropy(out[0], y, reduction="none")
    return (1 - (-each).exp()).square() * each


def distilled(out: Any, y: Tensor) -> Tensor:
    teacher = F.one_hot(y, K) * 0.7 + 0.3 * torch.linspace(0.1, 0.4, K, dtype=torch.float64)
    return F.kl_div(out[0].log_softmax(1), teacher, reduction="none").sum(1)


def tokens(out: Any, y: Tensor) -> Tensor:
    logits = out[0].view(len(y), 3, 2)
    return F.cross_entropy(logits.transpose(1, 2), y, reduction="none").mean(1)


def both_heads(out: Any, y: Tensor) -> Tensor:
    return F.cross_entropy(out[0], y, reduction="none") + 0.5 * F.cross_entropy(
        out[1], y % 2, reduction="none"
    )


def penalised(out: Any, y: Tensor) -> Tensor:
    return F.cross_entropy(out[0], y, reduction="none") + 0.1 * out[1].square().mean(1)


def confident(out: Any, y: Tensor) -> Tensor:
    p = out[0].softmax(1)
    return F.cross_entropy(out[0], y, reduction="none") + 0.1 * (p * p.log()).sum(1)


LOSSES: list[Any] = [
    (smoothed, "classes", K),
    (weighted_each, "classes", K),
    (squared, "column", 1),
    (several_labels, "many", K),
    (focal, "classes", K),
    (distilled, "classes", K),
    (tokens, "tokens", 6),
    (both_heads, "classes", K),
    (penalised, "classes", K),
    (confident, "classes", K),
]


def mean_of(each: PER_EXAMPLE) -> Callable[[Any, Tensor], Tensor]:
    if each is weighted_each:
        return lambda out, y: F.cross_entropy(out[0], y, weight=WEIGHT)
    return lambda out, y: each(out, y).mean()


@pytest.mark.any_trainer("label smoothing, focal loss, distillation, penalties on outputs")
@pytest.mark.any_trainer("class weights, labels that are left out (`ignore_index`)")
@pytest.mark.any_trainer("regression and multi-label losses, losses of tokens")
@pytest.mark.any_trainer("two heads that are both trained")
@pytest.mark.parametrize(("each", "kind", "outputs"), LOSSES)
def test_the_loss_is_chosen_and_right(each: Any, kind: str, outputs: int) -> None:
    dataset, diary = data(kind), Diary()
    layers = None if each in (both_heads, penalised) else ["net.body", "net.first"]
    chosen, said = FINECallback(layers=layers), FINECallback(observable="loss", layers=layers)
    with pytest.warns(UserWarning, match='f-INE measures observable="loss" in this run'):
        fit([chosen, said, diary], mean_of(each), dataset, outputs)
    scores = chosen.scores()
    assert scores.observable == "loss"
    assert torch.equal(scores.values, said.scores().values)
    close(scores.values[0].double(), expected(diary, dataset, each, outputs), 1e-6)


@pytest.mark.any_trainer("class weights, labels that are left out (`ignore_index`)")
def test_labels_that_are_left_out_have_no_gradient() -> None:
    def mean(out: Any, y: Tensor) -> Tensor:
        return F.cross_entropy(out[0], y, ignore_index=0)

    dataset, callback = data(), FINECallback(contrast="removal", layers=["net.body", "net.first"])
    with pytest.warns(UserWarning, match='observable="loss" in this run'):
        fit([callback], mean, dataset)
    zero = callback.scores().values[0] == 0
    assert torch.equal(zero, dataset.tensors[1] == 0)


def plain(out: Any, y: Tensor) -> Tensor:
    return F.cross_entropy(out[0], y, reduction="none")


@pytest.mark.any_trainer("softmax cross-entropy, NLL of a log-softmax")
@pytest.mark.parametrize("nll", [False, True])
def test_the_margin_is_chosen_where_it_exists(nll: bool) -> None:
    def mean(out: Any, y: Tensor) -> Tensor:
        if nll:
            return F.nll_loss(out[0].log_softmax(1), y)
        return F.cross_entropy(out[0], y)

    dataset, diary, layers = data(), Diary(), ["net.body", "net.first"]
    chosen, said = FINECallback(layers=layers), FINECallback(observable="margin", layers=layers)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit([chosen, diary], mean, dataset)
    fit([said], mean, dataset)
    assert chosen.scores().observable == "margin"
    assert torch.equal(chosen.scores().values, said.scores().values)
    assert chosen.state_key == said.state_key
    close(chosen.scores().values[0].double(), expected(diary, dataset, plain, K, True), 1e-6)


@pytest.mark.any_trainer("two heads, one of them trained")
def test_the_margin_is_that_of_the_head_that_is_trained() -> None:
    """The other head runs last, on features that it does not change."""

    def mean(out: Any, y: Tensor) -> Tensor:
        return F.cross_entropy(out[0], y)

    dataset, diary = data(), Diary()
    callback = FINECallback("self", "margin", layers=["net.body", "net.first"])
    fit([callback, diary], mean, dataset)
    close(callback.scores().values[0].double(), expected(diary, dataset, plain, K, True), 1e-6)


def test_ends_of_a_pass() -> None:
    """Layers that are heard twice, at one output, are one."""

    def call(name: str, output: Tensor) -> Call:
        made = Call(name, nn.Identity(), None, None)
        made.edge, made.grad = get_gradient_edge(output), output.detach()
        return made

    x = torch.ones(3, 2, requires_grad=True)
    body = x * 2
    head, other = body.exp(), body.sin()
    calls = [call("weight", body), call("bias", body), call("head", head)]
    assert [c.name for c in ends_of(calls)] == ["head"]
    assert [c.name for c in ends_of(calls[:2])] == ["bias"]
    assert [c.name for c in ends_of([*calls, call("other", other)])] == ["head", "other"]
    calls[2].grad = None
    assert [c.name for c in ends_of([*calls, call("other", other)])] == ["other"]


@pytest.mark.any_trainer("two heads that are both trained")
@pytest.mark.parametrize("each", [both_heads, penalised])
def test_the_margin_of_two_heads_is_refused_by_name(each: Any) -> None:
    with pytest.raises(
        UnsupportedProblemError, match=r'\[\'net.first\', \'net.second\'\].*observable="loss"'
    ):
        fit([FINECallback("self", "margin")], mean_of(each), data())


def test_a_penalty_on_features_further_up_is_seen_in_the_graph() -> None:
    class Penalised(Run):
        def training_step(self, batch: Any, _: int) -> Tensor:
            h = torch.tanh(self.net.body(batch[0]))
            return F.cross_entropy(self.net.first(h), batch[1]) + 0.1 * h.square().mean()

    loader = DataLoader(data(), batch_size=6)
    callback = FINECallback("self", "margin", layers=["net.body", "net.first"])
    with pytest.raises(UnsupportedProblemError, match=r"\['net.body', 'net.first'\]"):
        pl.Trainer(**QUIET, max_epochs=1, callbacks=[callback]).fit(
            Penalised(mean_of(plain)), loader
        )


@pytest.mark.any_trainer("a loss that is a sum over the batch")
def test_a_sum_is_refused_before_anything_is_chosen() -> None:
    adapter = BatchAdapter(x=lambda batch: None)  # the model cannot be asked by itself
    with (
        pytest.warns(UserWarning, match="cannot be asked by itself"),
        pytest.raises(UnsupportedProblemError, match="is the sum of the losses of the batch"),
    ):
        fit(
            [FINECallback(adapter=adapter, layers=["net.body", "net.first"])],
            lambda out, y: F.cross_entropy(out[0], y, reduction="sum"),
            data(),
        )


@pytest.mark.any_trainer("queries and snapshots, `observable` left out")
@pytest.mark.parametrize("schedule", ["in_batch", "snapshot"])
@pytest.mark.parametrize("target", ["self", "validation", "queries"])
def test_queries_and_snapshots_choose_as_well(target: Any, schedule: Any) -> None:
    if (target, schedule) == ("self", "in_batch"):
        return
    options: dict[str, Any] = {"schedule": schedule, "layers": ["net.body", "net.first"]}
    for kind, each, outputs, name in (
        ("classes", plain, K, "margin"),
        ("column", squared, 1, "loss"),
    ):
        options["queries"] = data(kind, 5, 3) if target != "self" else None
        options["loss"] = F.mse_loss if kind == "column" else F.cross_entropy
        chosen = FINECallback(target, **options)
        said = FINECallback(target, name, **options)  # type: ignore[arg-type]
        fit([chosen], mean_of(each), data(kind), outputs)
        fit([said], mean_of(each), data(kind), outputs)
        assert chosen.scores().observable == name
        assert torch.equal(chosen.scores().values, said.scores().values)
        assert bool(chosen.scores().values.any())


@pytest.mark.parametrize("each", [plain, smoothed])
def test_a_run_that_goes_on_keeps_its_choice(each: Any, tmp_path: Path) -> None:
    layers = ["net.body", "net.first"]
    whole, first, second = (FINECallback(layers=layers) for _ in range(3))
    name = "margin" if each is plain else "loss"
    fit([whole], mean_of(each), data())
    keeps = pl.callbacks.ModelCheckpoint(tmp_path, filename="one", every_n_epochs=1)
    fit([first, keeps], mean_of(each), data(), enable_checkpointing=True, max_epochs=1)
    saved = torch.load(keeps.best_model_path, weights_only=False)
    assert any(
        "observable" in str(state) for key, state in saved["callbacks"].items() if "FINE" in key
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit([second], mean_of(each), data(), resume=keeps.best_model_path)
    assert second.scores().observable == whole.scores().observable == name


@pytest.mark.any_trainer("a run whose loss is NaN from the first step")
@pytest.mark.parametrize("options", [{}, {"observable": "loss"}, {"schedule": "snapshot"}], ids=str)
def test_a_run_without_a_finite_gradient_has_no_scores(options: dict[str, Any]) -> None:
    callback = FINECallback(layers=["net.body", "net.first"], **options)

    class Broken(Run):
        def training_step(self, batch: Any, i: int) -> Tensor:
            return super().training_step(batch, i) * float("nan")

    with pytest.warns(UserWarning, match="NaN or infinite"):
        pl.Trainer(**QUIET, max_epochs=2, callbacks=[callback]).fit(
            Broken(mean_of(plain)), DataLoader(data(), batch_size=6)
        )
    with pytest.warns(UserWarning, match="no example has a score"):
        scores = callback.scores()
    assert bool(torch.isinf(scores.std_error).all())
    assert scores.n_observations is not None
    assert not scores.n_observations.any()
    assert not scores.values.any()
