"""f-INE in the kernel geometry: against the formula from per-example gradients in float64, against
refitted regressions, and against repeated runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from scipy.special import stdtr
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fine_bench
from baselines.fine_kernel import FINEKernel
from fine_bench import Checkpoint, Problem, replay
from fine_bench.callback import FINECallback
from fine_bench.fine import kernel_snapshot, kernel_states
from fine_bench.fine.batch_adapter import BatchAdapter
from fine_bench.fine.kernel_scores import (
    LEAST_RIDGE,
    MOST_RIDGE,
    KernelAccumulator,
    jackknife,
    matched_ridge,
    regression,
    rows_of,
)
from fine_bench.fine.kernel_states import fresh, is_due, state_of
from fine_bench.fine.standard_error import KERNEL_INFLATION
from fine_bench.gradients.landmark_kernel import JITTER
from fine_bench.gradients.tangent_kernel import Probe
from fine_bench.models.classifier import Classifier
from fine_bench.seeds import stream
from fine_bench.types import TrainingSteps, UnsupportedProblemError
from support.networks import CLASSES, models
from support.tensors import close
from support.training import QUIET

N, V, EPOCHS, LR, FRESH = 20, 5, 5, 0.1, 3


def data(shape: tuple[int, ...]) -> tuple[TensorDataset, TensorDataset]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(N + V, *shape, generator=g, dtype=torch.float64)
    y = torch.randint(CLASSES, (N + V,), generator=g)
    return TensorDataset(x[:N], y[:N], torch.arange(N)), TensorDataset(x[N:], y[N:])


class Epochs(pl.Callback):
    """Parameters before the first step and at the end of every epoch."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.states.append(self.copy(pl_module))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.states.append(self.copy(pl_module))

    @staticmethod
    def copy(module: Any) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in module.net.state_dict().items()}


def watch(target: Any = "queries", name: str = "relu", **options: Any) -> FINECallback:
    options = {"queries": data(models()[name][1])[1], "n_initialisations": FRESH, **options}
    return FINECallback(target, schedule="snapshot", geometry="kernel", **options)


class ByAdam(Classifier):
    """The same network, trained by another optimiser."""

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=LR)


def fit(
    *callbacks: pl.Callback,
    name: str = "relu",
    resume: Path | None = None,
    kind: type[Classifier] = Classifier,
    momentum: float = 0.0,
    **options: Any,
) -> Classifier:
    torch.manual_seed(5)
    net, shape = models()[name]
    module = kind(net, CLASSES, lr=LR, momentum=momentum).double()
    loader: Any = DataLoader(
        data(shape)[0], 4, shuffle=resume is None and "max_epochs" not in options,
        generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    trainer = pl.Trainer(**{"max_epochs": EPOCHS, "callbacks": list(callbacks), **QUIET, **options})
    trainer.fit(module, loader, ckpt_path=resume)
    return module


# ------------------------------------------------------------------------------------ the slow twin


def slow_kernel(net: nn.Module, probe: Tensor, x: Tensor, own: Tensor) -> tuple[Tensor, float]:
    """One (N + V, N + V) kernel from the gradients of each example alone, of mean diagonal 1 at
    ``own``, and the scale that it had."""
    rows = []
    for xi in x:
        grads = torch.autograd.grad((net(xi[None])[0] * probe).sum(), list(net.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]))
    gram = torch.stack(rows) @ torch.stack(rows).T
    scale = gram.diagonal()[own].mean()
    return gram / scale, float(scale / (probe @ probe))


def slow(
    name: str,
    states: list[dict[str, Tensor]],
    target: str,
    contrast: str,
    momentum: float | None,
    landmarks: int | None = None,
    inputs: float = 0.0,
) -> dict[str, Any]:
    """μ and its jackknife, formula by formula, with inverses; ``momentum`` None for no SGD."""
    own_rows = torch.arange(N)
    if landmarks is not None:
        order = torch.randperm(N, generator=stream(0, "fine/kernel/landmarks"))
        own_rows = order[:landmarks].sort().values
    chosen = torch.cat([own_rows, torch.arange(N, N + V)])
    net, shape = models()[name]
    net = net.double()
    train, asked = data(shape)
    x, y = torch.cat([train.tensors[0], asked.tensors[0]]), train.tensors[1]
    kernels: list[tuple[int, Tensor]] = []
    raw: list[Tensor] = []
    after = [k for k in range(len(states)) if k in (0, 1, 2, 4)]
    for number in range(FRESH + len(after)):
        if number < FRESH:
            generator = stream(0, f"fine/kernel/initialisation {number}")
            state = {}
            for key, value in states[0].items():
                order = torch.randperm(value.numel(), generator=generator)
                state[key] = value.flatten()[order].reshape(value.shape)
        else:
            state = states[after[number - FRESH]]
        net.load_state_dict(state)
        probe = Probe()
        probe.draw(CLASSES, stream(0, f"fine/kernel/probe {number}"))
        own = number - FRESH if number >= FRESH else number
        share = 0.5 / FRESH if number < FRESH else 0.5 / len(after)
        kernel, scale = slow_kernel(net, probe.weights, x, own_rows)
        kernels.append((own % 4, (1 - inputs) * share * kernel))
        if number >= FRESH:
            raw.append((scale * kernel)[own_rows, :N])
    flat = x.flatten(1)
    variance = (flat[:N] - flat[:N].mean(0)).square().sum() / N
    distance = (flat[:, None] - flat[None]).square().sum(2)
    kernels += [(block, inputs / 4 * torch.exp(-distance / 2 / variance)) for block in range(4)]
    average = torch.stack([kernel for _, kernel in kernels]).sum(0)[own_rows, :N]
    scales = [float((one * average).sum() / (average * average).sum()) for one in raw]
    seen, time = [], 0.0
    for number, state in enumerate(states[1:]):
        net.load_state_dict(state)
        z = net(x).detach()
        p = z[:N].softmax(1)
        residual = F.one_hot(y, CLASSES) - p
        q = z[N:].softmax(1)
        label = F.one_hot(asked.tensors[1], CLASSES)
        slope = torch.where(label > 0, 1.0, -q / (1 - (q * label).sum(1, keepdim=True)))
        if momentum is not None:
            hessians = p[:, :, None] * torch.eye(CLASSES) - p[:, :, None] * p[:, None, :]
            h = hessians.diagonal(dim1=1, dim2=2).sum(1).mean() / (CLASSES - 1)
            later = after.index(number) if number in after else after.index(number - 1)
            ends = [scales[min(later + j, len(scales) - 1)] for j in (0, 1)]
            if number == 2:  # from after 2 to after 3 of 4 snapshots
                ends[1] = (ends[0] + ends[1]) / 2
            if number == 3:
                ends = [(ends[0] + ends[1]) / 2, ends[1]]
            kappa = (ends[0] + ends[1]) / 2
            time += kappa / N * LR / (1 - momentum) * N / 4 * float(h)
        weight = LR * N / 4 * float((1 - (p * F.one_hot(y, CLASSES)).sum(1)).mean())
        seen.append((number % 4, weight, residual, slope))
    targets = F.one_hot(y, CLASSES) - 1 / CLASSES

    def mu(without: int | None, ridge: float | None) -> tuple[Tensor, float, Tensor]:
        k = torch.stack([k for block, k in kernels if block != without]).sum(0)
        k = exact = k / k.diagonal()[own_rows].mean()
        if landmarks is not None:  # what the rows of the landmarks say of all others
            small = k[chosen][:, chosen] + JITTER * torch.eye(len(chosen))
            k = k[:, chosen] @ torch.linalg.solve(small, k[chosen])
        total = sum(w for block, w, _, _ in seen if block != without)
        r: Any = sum(w * r for block, w, r, _ in seen if block != without) / total
        s: Any = sum(w * s for block, w, _, s in seen if block != without) / total
        if time:
            ridge = 4 / time
        if ridge is None:
            low, high = 1e-6, 1e6
            for _ in range(200):
                ridge = (low * high) ** 0.5
                left = ridge * torch.linalg.solve(k[:N, :N] + ridge * torch.eye(N), targets)
                low, high = (ridge, high) if left.norm() < r.norm() else (low, ridge)
        assert ridge is not None
        inverse = (k[:N, :N] + ridge * torch.eye(N)).inverse()
        if time and landmarks is not None:  # the same steps, of a kernel without an inverse
            powers = [inverse]
            for _ in range(3):
                powers.append(ridge * inverse @ powers[-1])
            inverse = torch.stack(powers).sum(0)
        elif time:  # four implicit steps from f = 0, each with the same step of time
            whole = torch.zeros(N, N)
            for _ in range(4):
                whole = ridge * inverse @ whole + (torch.eye(N) - ridge * inverse)
            inverse = torch.linalg.solve(k[:N, :N], whole)
        smoother = k[N:, :N] @ inverse
        prior = (targets * (inverse @ targets)).sum() / (N * (CLASSES - 1))
        covariance = prior * (exact[N:, N:] - smoother @ exact[:N, N:]) * (s @ s.T)
        effect = smoother * (s @ r.T)
        if target == "validation":
            weights = 1 / covariance.diagonal().sqrt() / V
            effect = (weights[:, None] * effect).sum(0, keepdim=True)
            sigma = (weights @ covariance @ weights).sqrt()[None]
        else:
            sigma = covariance.diagonal().sqrt()
        if contrast == "substitution":
            others = (effect.sum(1, keepdim=True) - effect) / (N - 1)
            effect = effect - others
        z = net(x[:N]).detach()  # of the last snapshot
        z = z - z.mean(1, keepdim=True)
        f = k[:N, :N] @ inverse @ targets
        return effect / sigma[:, None], ridge, sigma * (z * f).sum() / f.square().sum()

    full, ridge, spread = mu(None, None)
    parts = torch.stack([mu(block, ridge)[0] for block in range(4)])
    error = (3 / 4 * (parts - parts.mean(0)).square().sum(0)).sqrt()
    return {"mu": full, "error": error, "ridge": 1 / time if time else ridge, "spread": spread}


@pytest.mark.parametrize(
    ("name", "target", "contrast", "momentum", "landmarks", "inputs"),
    [
        ("relu", "queries", "substitution", 0.0, None, 0.0),
        ("cnn", "queries", "removal", 0.5, None, 0.0),
        ("tanh, no bias", "validation", "substitution", 0.0, None, 0.0),
        ("relu", "queries", "substitution", None, None, 0.0),
        ("tanh, no bias", "validation", "removal", None, None, 0.0),
        ("relu", "queries", "substitution", 0.0, 8, 0.0),
        ("cnn", "validation", "removal", 0.5, 8, 0.7),
        ("relu", "queries", "removal", None, 8, 0.0),
        ("relu", "queries", "substitution", 0.0, None, 0.7),
    ],
)
def test_callback_and_estimator_are_the_twin(
    name: str,
    target: Any,
    contrast: Any,
    momentum: float | None,
    landmarks: int | None,
    inputs: float,
) -> None:
    epochs = Epochs()
    callback = watch(target, name, contrast=contrast, n_landmarks=landmarks, input_share=inputs)
    kind = ByAdam if momentum is None else Classifier
    fit(epochs, callback, name=name, kind=kind, momentum=momentum or 0.0)
    torch.set_default_dtype(torch.float64)
    try:
        expected = slow(name, epochs.states, target, contrast, momentum, landmarks, inputs)
    finally:
        torch.set_default_dtype(torch.float32)
    scores = callback.scores()
    assert LEAST_RIDGE < expected["ridge"] < MOST_RIDGE
    # a ridge is matched to one part in a thousand of its odds
    near = 3e-3 if momentum is None else 1e-6
    close(scores.values, expected["mu"], near)
    assert scores.std_error is not None
    close(scores.std_error / KERNEL_INFLATION, expected["error"], 4 * near)
    close(scores.extras["spread"], expected["spread"], near)
    assert scores.observable == "margin"
    assert scores.n_observations is not None
    assert scores.n_observations.tolist() == [EPOCHS] * N

    net, shape = models()[name]
    train, asked = data(shape)
    each = N // 4
    steps = TrainingSteps(
        epochs.states[0],
        [torch.arange(4)] * each * EPOCHS,
        [LR] * each * EPOCHS,
        "Adam" if momentum is None else "SGD",
        {} if momentum is None else {"momentum": momentum},
    )
    problem = Problem(
        net.double(), F.cross_entropy, train, asked,
        "mean" if target == "validation" else None, steps=steps,
    )  # fmt: skip
    found = replay(
        FINEKernel(
            n_initialisations=FRESH, contrast=contrast, n_landmarks=landmarks, input_share=inputs
        ),
        problem,
        [Checkpoint(state, LR, each * (e + 1)) for e, state in enumerate(epochs.states[1:])],
    )
    close(found.values, scores.values, 1e-6)
    assert found.std_error is not None
    close(found.std_error, scores.std_error, 1e-6)


def test_without_errors_the_values_are_the_same() -> None:
    with_errors, without = watch(), watch(errors=False)
    fit(with_errors)
    fit(without)
    assert torch.equal(without.scores().values, with_errors.scores().values)
    assert without.scores().std_error is None


def test_inputs_without_a_distance() -> None:
    """Tokens, for instance."""
    train, asked = data(models()["relu"][1])
    whole = [TensorDataset(x.long(), y) for x, y, *_ in (train.tensors, asked.tensors)]
    problem = Problem(nn.Identity(), F.cross_entropy, *whole)
    assert "real-valued" in str(FINEKernel(input_share=0.5).unsupported(problem))
    tokens = TensorDataset(torch.randint(9, (V, 3)), asked.tensors[1])
    texts = TensorDataset(torch.randint(9, (N, 3)), train.tensors[1], torch.arange(N))
    callback = FINECallback(
        "queries", queries=tokens, schedule="snapshot", geometry="kernel", input_share=0.5
    )
    net = nn.Sequential(nn.Embedding(9, 2), nn.Flatten(), nn.Linear(6, CLASSES))
    trainer = pl.Trainer(max_epochs=1, callbacks=[callback], **QUIET)
    with pytest.raises(UnsupportedProblemError, match=r"input_share=0\.5 takes distances"):
        trainer.fit(Classifier(net, CLASSES, lr=LR), DataLoader(texts, 4))


def test_a_given_ridge_is_taken_to_the_last_digit() -> None:
    """Without the search for λ nothing is approximate."""
    epochs, callback = Epochs(), watch(ridge=0.7, contrast="removal")
    fit(epochs, callback)
    sums = callback._schedule.accumulator
    found: Any = sums.found
    assert found[0].ridge == 0.7
    kernels = callback._schedule  # the kernels are taken again, at the same places
    kernels.accumulator.found = None
    kernels.flush()
    close(kernels.accumulator.found[0].mu, found[0].mu, 1e-12)


# ------------------------------------------------------------------------------- what it stands for


def features(seed: int, n: int = 30, dim: int = 12) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n + V, dim, generator=g, dtype=torch.float64)


def labelled(n: int, k: int = 3) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(7)
    y = torch.randint(k, (n,), generator=g)
    slope = torch.randn(V, k, generator=g, dtype=torch.float64)
    return F.one_hot(y, k).double() - 1 / k, slope - slope.mean(1, keepdim=True)


def single(groups: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return rows_of(groups, None)


def test_a_linear_model_left_out_exactly() -> None:
    """With the residuals of the regressions without i, Δ is what refitting them changes."""
    x, (targets, slope), ridge = features(0), labelled(30), 0.8
    kernel = x @ x.T / (x[:30] ** 2).sum(1).mean()
    train, cross = kernel[:30, :30], kernel[30:, :30]
    effects, residual = torch.zeros(V, 30).double(), torch.zeros(30, 3).double()
    whole = cross @ torch.linalg.solve(train + ridge * torch.eye(30).double(), targets)
    for i in range(30):
        rest = [j for j in range(30) if j != i]
        inverse = (train[rest][:, rest] + ridge * torch.eye(29).double()).inverse()
        effects[:, i] = ((whole - cross[:, rest] @ inverse @ targets[rest]) * slope).sum(1)
        residual[i] = targets[i] - train[i, rest] @ inverse @ targets[rest]
    found = regression(kernel, residual, slope, targets, single(torch.eye(V)), ridge)
    close(found.mu * found.sigma[:, None], effects, 1e-9)


def test_the_spread_is_that_of_runs_that_start_at_random() -> None:
    """Linear models that start at prior weights and fit noisy labels to the end, many of them."""
    x, (targets, slope), ridge, runs = features(1), labelled(30), 0.5, 20_000
    scale = (x[:30] ** 2).sum(1).mean().sqrt()
    phi, asked = x[:30] / scale, x[30:] / scale
    kernel = x @ x.T
    found = regression(kernel, targets, slope, targets, single(torch.eye(V)), ridge)
    gram = phi @ phi.T + ridge * torch.eye(30).double()
    s2 = float((targets * torch.linalg.solve(gram, targets)).sum()) / (30 * 2)
    g = torch.Generator().manual_seed(0)
    start = s2**0.5 * torch.randn(runs, 12, 3, generator=g, dtype=torch.float64)
    noise = (ridge * s2) ** 0.5 * torch.randn(runs, 30, 3, generator=g, dtype=torch.float64)
    end = start + phi.T @ torch.linalg.solve(gram, targets + noise - phi @ start)
    spread = ((asked @ end) * slope).sum(2).std(0)
    torch.testing.assert_close(found.sigma, spread, rtol=0.03, atol=0)


def test_the_ridge_fits_the_labels_as_well_as_the_run() -> None:
    x, (targets, _) = features(2, dim=60), labelled(30)
    kernel = x[:30] @ x[:30].T / (x[:30] ** 2).sum(1).mean()
    for ridge in (0.05, 1.7, 40.0):
        left = ridge * torch.linalg.solve(kernel + ridge * torch.eye(30).double(), targets)
        level = float(left.square().sum()) / 30
        assert matched_ridge(kernel, targets, level) == pytest.approx(ridge, rel=0.01)
    assert matched_ridge(kernel, targets, 0.0) == pytest.approx(LEAST_RIDGE)
    assert matched_ridge(kernel, targets, 5.0) == pytest.approx(MOST_RIDGE)


def test_intervals_cover_the_mean_of_other_runs() -> None:
    """Runs whose kernels come from random features: 16 in four blocks each, as in a real run."""
    n, runs, (targets, slope) = 30, 40, labelled(30)
    inputs = features(3, n)
    mus, errors = [], []
    for run in range(runs):
        g = torch.Generator().manual_seed(100 + run)
        sums = KernelAccumulator(n, torch.eye(V), contrast="removal", ridge=0.5)
        logits = torch.zeros(n, 3).double()
        for _ in range(4):
            sums.observe(1.0, targets, slope, logits, targets.argmax(1))
        blocks = []
        for _ in range(4):
            h = (inputs @ torch.randn(12, 4 * 25, generator=g, dtype=torch.float64)).relu()
            blocks.append(h @ h.T)
        sums.solve(blocks)
        scores = sums.scores("fine", "queries", 1.0)
        assert scores.std_error is not None
        mus.append(scores.values)
        errors.append(scores.std_error)
    mu, error = torch.stack(mus).double(), torch.stack(errors).double()
    gap = (mu - (mu.sum(0) - mu) / (runs - 1)).abs()
    covered = float((gap <= 1.96 * error).double().mean())
    # four blocks: Student's t with three degrees of freedom
    assert covered == pytest.approx(float(1 - 2 * stdtr(3, -1.96)), abs=0.04)
    halved = float((gap <= 0.98 * error).double().mean())
    assert halved == pytest.approx(float(1 - 2 * stdtr(3, -0.98)), abs=0.06)


def test_the_jackknife_needs_two_blocks() -> None:
    full = torch.ones(2, 3)
    assert bool(torch.isinf(jackknife([full], full)).all())
    parts = [full, 3 * full]
    close(jackknife(parts, full), full.double())  # sqrt(1/2 · (1 + 1))


# ------------------------------------------------------------------------------------ in the run


def test_fresh_initialisations_are_the_same_entries() -> None:
    state = {"w": torch.arange(12.0).reshape(3, 4), "frozen": torch.arange(5.0)}
    one, two = (fresh(state, ["w"], 0, number) for number in range(2))
    for found in (one, two):
        assert sorted(found["w"].flatten().tolist()) == list(range(12))
        assert torch.equal(found["frozen"], state["frozen"])
    assert not torch.equal(one["w"], two["w"])
    assert torch.equal(fresh(state, ["w"], 0, 1)["w"], two["w"])
    assert not torch.equal(fresh(state, ["w"], 1, 1)["w"], two["w"])
    assert [k for k in range(1, 20) if is_due(k)] == [1, 2, 4, 8, 16]


def test_watching_changes_nothing() -> None:
    plain = fit()
    state = torch.get_rng_state()
    callback = watch()
    watched = fit(callback)
    assert torch.equal(torch.get_rng_state(), state)
    places = {name: p.data_ptr() for name, p in watched.named_parameters()}
    callback._schedule.accumulator.found = None
    callback.scores()
    assert places == {name: p.data_ptr() for name, p in watched.named_parameters()}
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a, b)


def test_scores_do_not_depend_on_how_much_is_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = watch(), watch()
    fit(one)
    monkeypatch.setattr(kernel_snapshot, "READ_AT_ONCE", 3)
    fit(other)
    close(other.scores().values, one.scores().values, 1e-6)


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    whole, first, then = watch(), watch(), watch()
    fit(whole, max_epochs=4)
    options: Any = {"enable_checkpointing": True, "default_root_dir": tmp_path}
    keep = pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit(first, keep, max_epochs=2, **options)
    fit(then, max_epochs=4, resume=tmp_path / "epoch=1.ckpt")
    assert torch.equal(then.scores().values, whole.scores().values)
    assert torch.equal(then.scores().std_error, whole.scores().std_error)  # type: ignore[arg-type]


def test_a_loop_in_plain_pytorch() -> None:
    net, shape = models()["relu"]
    train, asked = data(shape)
    net = net.double()
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    options: Any = {"queries": asked, "geometry": "kernel", "schedule": "snapshot"}
    with fine_bench.watch(
        net, optimizer=optimizer, train_set=train, target="validation_per_class", **options
    ) as watched:
        for _ in range(3):
            for x, y, index in DataLoader(train, 5):
                watched.batch(index)
                watched.loss(F.cross_entropy(net(x), y)).backward()
                optimizer.step()
                optimizer.zero_grad()
            watched.epoch_ends()
    scores = watched.scores()
    assert scores.values.shape == (len(torch.unique(asked.tensors[1])), N)
    assert bool((scores.values != 0).all())


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "in_batch"}, 'use schedule="snapshot"'),
        ({"composition": "standardised"}, 'use composition="accumulated"'),
        ({"group_errors": True}, "keeps no parts of epochs"),
        ({"watched": [1, 2]}, "leave that out"),
        ({"ridge": 0.0}, "ridge must be a finite number > 0"),
        ({"ridge": 1.0, "geometry": "ekfac"}, 'ridge=1.0 is that of geometry="kernel"'),
        ({"n_initialisations": -1}, "n_initialisations must be at least 0"),
        ({"n_landmarks": 1}, "n_landmarks must be at least 2"),
        ({"n_landmarks": 5, "geometry": "ekfac"}, 'n_landmarks=5 is that of geometry="kernel"'),
        ({"errors": False, "geometry": "ekfac"}, 'errors=False is that of geometry="kernel"'),
        ({"input_share": 1.0}, r"input_share must be in \[0, 1\), got 1.0"),
        ({"adapter": BatchAdapter(losses=lambda m, b: m(b))}, "kernel.* needs class logits"),
        ({"target": "self", "queries": None}, "says what trained a prediction"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    asked: dict[str, Any] = {"queries": data((6,))[1], "schedule": "snapshot", **options}
    with pytest.raises(ValueError, match=message):
        FINECallback(**{"target": "queries", "geometry": "kernel", **asked})


def test_what_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_states, "MOST_EXAMPLES", 10)
    with pytest.raises(UnsupportedProblemError, match="20 training examples and 5 queries"):
        fit(watch())
    net, shape = models()["relu"]
    train, asked = data(shape)
    problem = Problem(net.double(), F.cross_entropy, train, asked)
    with pytest.raises(UnsupportedProblemError, match="ask fewer queries"):
        replay(FINEKernel(), problem, [Checkpoint(net.state_dict(), LR)])
    monkeypatch.undo()
    soft = TensorDataset(asked.tensors[0], torch.full((V, CLASSES), 0.25).double())
    with pytest.raises(UnsupportedProblemError, match="needs class logits"):
        fit(watch(queries=soft))


def test_a_network_without_gradients() -> None:
    net, shape = models()["relu"]
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    train, asked = data(shape)
    problem = Problem(net.double(), F.cross_entropy, train, asked)
    frozen = [p for name, p in net.named_parameters() if not name.endswith("2.bias")]
    for p in frozen:
        p.requires_grad_(False)
    estimator = FINEKernel(layers=["0"])
    net[0].requires_grad_(True)
    with pytest.raises(UnsupportedProblemError, match="gradients of the outputs vanish"):
        replay(estimator, problem, [Checkpoint(net.state_dict(), LR)])


def test_estimator_options() -> None:
    with pytest.raises(ValueError, match="n_initialisations must be at least 0, got -1"):
        FINEKernel(n_initialisations=-1)
    with pytest.raises(ValueError, match="n_landmarks must be at least 2, got 1"):
        FINEKernel(n_landmarks=1)
    with pytest.raises(ValueError, match=r"input_share must be in \[0, 1\), got -0.1"):
        FINEKernel(input_share=-0.1)
    with pytest.raises(ValueError, match="ridge must be a finite number > 0 or None, got -1"):
        FINEKernel(ridge=-1.0)


def test_a_state_of_another_geometry() -> None:
    callback, euclidean = watch(), FINECallback("queries", queries=data((6,))[1],
                                                schedule="snapshot")  # fmt: skip
    fit(callback, euclidean, max_epochs=1)
    sums = callback._schedule.accumulator
    with pytest.raises(ValueError, match="another geometry than the kernel"):
        sums.load_state_dict(euclidean._schedule.accumulator.state_dict())
    other = KernelAccumulator(N + 1, torch.eye(V))
    with pytest.raises(ValueError, match=f"is for {N} training examples"):
        other.load_state_dict(sums.state_dict())


def test_a_saved_state_goes_on_where_the_model_is() -> None:
    """A state is saved on the CPU; the next snapshot may be of a model on another device."""
    sums, other = KernelAccumulator(N, torch.eye(V)), KernelAccumulator(N, torch.eye(V))
    labels = torch.zeros(N, dtype=torch.int64)
    sums.observe(0.5, torch.ones(N, 3), torch.ones(V, 3), torch.zeros(N, 3), labels)
    other.load_state_dict(sums.state_dict())
    other.observe(
        0.5,
        *(torch.ones(size, 3, device="meta") for size in (N, V, N)),
        labels.to("meta"),
    )
    assert other.residual is not None
    assert other.slope is not None
    assert other.residual.device.type == other.slope.device.type == "meta"


def test_a_snapshot_that_is_not_finite_is_left_out() -> None:
    callback = watch()

    class Breaks(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 0:
                self.kept = state_of(pl_module)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.current_epoch == EPOCHS - 1 and trainer.is_last_batch:
                with torch.no_grad():
                    next(pl_module.parameters()).fill_(float("nan"))

    with pytest.warns(UserWarning, match="this snapshot and later ones"):
        fit(Breaks(), callback)
    assert callback.n_not_finite == 1
    assert bool(torch.isfinite(callback.scores().values).all())
    assert callback.scores().n_observations.tolist() == [EPOCHS - 1] * N  # type: ignore[union-attr]
