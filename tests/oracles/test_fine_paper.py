"""The paper's estimator against loops in float64, fed the recorded batches and parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fine_bench.callback import FINECallback
from fine_bench.callback.base import WatchedRun
from fine_bench.callback.paper import PaperFINECallback
from fine_bench.fine.subset_samples import PaperAccumulator, Signal
from fine_bench.fine.subset_test import evaluate, extremes, to_scores
from fine_bench.fine.subsets import (
    Draw,
    Subsets,
    draw_batches,
    members_per_batch,
    stratified_sample,
    watch,
)
from fine_bench.models.classifier import Classifier
from fine_bench.seeds import stream
from fine_bench.theory.estimation import estimate_mu
from fine_bench.types import UnsupportedProblemError
from support.tensors import observable_gradients
from support.training import QUIET

N, N_QUERY, CLASSES, BATCH = 40, 7, 3, 6
GROUPS = {"low": list(range(5)), "wide": list(range(10, 26))}


class Recording(PaperFINECallback):
    """Keeps the draws that it makes."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.draws: dict[int, Draw] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        assert self._sampler is not None
        draw = self._sampler.draw

        def noted(step: int) -> Draw:
            self.draws[step] = draw(step)
            return self.draws[step]

        self._sampler.draw = noted  # type: ignore[method-assign]


class Diary(pl.Callback):
    """Keeps the parameters after each step."""

    def __init__(self) -> None:
        self.params: dict[int, dict[str, Tensor]] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        named = pl_module.net.named_parameters()
        self.params[trainer.global_step] = {k: v.detach().clone().double() for k, v in named}


def network(dropout: float = 0.0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, CLASSES))


def data() -> tuple[Tensor, Tensor, TensorDataset]:
    g = torch.Generator().manual_seed(7)
    x, xq = torch.randn(N, 5, generator=g), torch.randn(N_QUERY, 5, generator=g)
    y = torch.randint(CLASSES, (N,), generator=g)
    yq = torch.randint(CLASSES, (N_QUERY,), generator=g)
    return x, y, TensorDataset(xq, yq)


def fit(
    callbacks: list[pl.Callback],
    *,
    epochs: int = 4,
    order: int = 11,
    dropout: float = 0.0,
    lr: float = 0.2,
    dataset: Any = None,
    resume: Path | None = None,
) -> tuple[Classifier, pl.Trainer]:
    torch.manual_seed(4)
    x, y, _ = data()
    module = Classifier(network(dropout), CLASSES, lr=lr)
    loader = DataLoader(
        dataset or TensorDataset(x, y, torch.arange(N)),
        batch_size=BATCH,
        shuffle=order > 0,
        generator=torch.Generator().manual_seed(order),
    )
    trainer = pl.Trainer(
        max_epochs=epochs,
        **QUIET,
        callbacks=callbacks,
    )
    trainer.fit(module, loader, ckpt_path=resume)
    return module, trainer


def options(target: str) -> dict[str, Any]:
    base: dict[str, Any] = {"target": target, "sample": 9, "subsets": GROUPS, "every_n_steps": 2}
    return base if target == "self" else base | {"queries": data()[2]}


def per_example(params: dict[str, Tensor], x: Tensor, y: Tensor, observable: str) -> Tensor:
    return observable_gradients(network().eval(), params, x, y, observable)


def twin(callback: Recording, diary: Diary, weighting: str | None) -> Tensor:
    """(steps, 3, subsets): P, Q and level, batch by batch and example by example."""
    x, y, queries = data()
    xq, yq = queries.tensors
    rows, direction, refreshed = [], torch.zeros(0), 0
    for step, draw in callback.draws.items():
        params = diary.params[step]
        g = per_example(params, x, y, "loss")
        own = per_example(params, x, y, callback.options.observable)
        if callback.options.target == "validation" and (
            not len(direction) or step - refreshed >= callback.options.refresh_every
        ):
            refreshed = step
            direction = torch.zeros(g.shape[1], dtype=torch.float64)
            for h in per_example(params, xq, yq, callback.options.observable):
                scale = 1.0
                if weighting == "norm":
                    scale = float(h.norm())
                elif weighting == "noise":
                    scale = float((g[draw.pool] @ h).std())
                direction += h / scale / N_QUERY
        columns = []
        for s in range(len(draw.outside)):
            p, q, targets = draw.batches(s)
            h = direction
            if callback.options.target == "self":
                h = torch.stack([own[i] for i in targets.tolist()]).mean(0)
            x_p = sum(float(g[i] @ h) for i in p.tolist()) / BATCH
            x_q = sum(float(g[i] @ h) for i in q.tolist()) / BATCH
            members = GROUPS[list(GROUPS)[s - 9]] if s >= 9 else [int(draw.singles[s])]
            outside = [i for i in draw.pool.tolist() if i not in members]
            columns.append([x_p, x_q, float(np.mean([float(g[i] @ h) for i in outside]))])
        rows.append(torch.tensor(columns, dtype=torch.float64).T)
    return torch.stack(rows)


@pytest.mark.parametrize("observable", ["margin", "loss"])
@pytest.mark.parametrize(
    ("target", "more"),
    [
        ("self", {}),
        ("self", {"members": 3, "target_members": 2, "pool": 13}),
        ("validation", {"refresh_every": 1}),
        ("validation", {"refresh_every": 4, "query_weighting": "norm"}),
        ("validation", {"refresh_every": 1, "query_weighting": None, "members": 2}),
    ],
)
def test_samples_and_influences_against_loops(
    target: str, more: dict[str, Any], observable: Any
) -> None:
    callback = Recording(**options(target), observable=observable, auxiliary=None, **more)
    diary = Diary()
    fit([callback, diary])
    expected = twin(callback, diary, more.get("query_weighting", "noise"))
    assert callback._accumulator is not None
    got = callback._accumulator.stacked()
    assert got.shape == expected.shape == (14, 3, 11)
    scale = expected.abs().amax((0, 1))
    assert float(((got - expected).abs() / scale).max()) < 1e-5

    p, q = expected[:, 0].T.numpy(), expected[:, 1].T.numpy()
    split, moment = estimate_mu(p, q, "two_stage"), estimate_mu(p, q, "moment")
    for line, mu, plain in zip(callback.results(), split.mu, moment.mu, strict=True):
        assert line.mu == pytest.approx(mu, rel=1e-4, nan_ok=True)
        assert line.moment == pytest.approx(plain, rel=1e-4)
        assert line.mu_run == pytest.approx(mu * 28**0.5, rel=1e-4, nan_ok=True)
        assert line.n_samples == 14
    scores = callback.scores()
    assert scores.watched is not None
    assert torch.allclose(scores.extras["moment"].double(), torch.tensor(moment.mu[:9]), rtol=1e-4)


# ------------------------------------------------------------------------------------- batches


def drawn(subsets: Subsets, m: int, seed: int, pool: int = 1, members: int | None = None) -> Draw:
    k = members_per_batch(subsets, m, members)
    return draw_batches(subsets, k, m, stream(seed, "t"), pool_size=pool, target_members=4)


def test_every_batch_is_what_it_says() -> None:
    subsets = watch(
        40, lambda: torch.arange(40) % 3, sample=6, subsets=GROUPS | {"half": list(range(20))}
    )
    for seed in range(20):
        for members in (None, 1, 3):
            draw = drawn(subsets, 8, seed, members=members)
            for s in range(len(subsets)):
                p, q, targets = (set(b.tolist()) for b in draw.batches(s))
                own = set(subsets.groups[s - 6].tolist() if s >= 6 else [int(subsets.singles[s])])
                assert len(p) == len(q) == len(draw.batches(s)[0]) == 8
                expected = members or max(1, round(8 * len(own) / 40))
                assert len(p & own) == min(expected, len(own))
                assert not q & own
                assert not (p - own) & q
                assert targets <= own
                assert len(targets) == min(4, len(own))


def test_others_are_uniform_and_members_too() -> None:
    """Each outsider stands in Q with probability m/(n − |S|), each member in P with k/|S|."""
    subsets = watch(12, lambda: torch.zeros(12), subsets={"s": [1, 4, 8, 9]})
    in_p, in_q = torch.zeros(12), torch.zeros(12)
    runs = 4000
    for seed in range(runs):
        p, q, _ = drawn(subsets, 3, seed).batches(0)
        in_p[p] += 1
        in_q[q] += 1
    outside = [0, 2, 3, 5, 6, 7, 10, 11]
    tolerance = 4 * (0.25 / runs) ** 0.5
    assert in_q[[1, 4, 8, 9]].sum() == 0
    assert torch.allclose(in_q[outside] / runs, torch.tensor(3 / 8), atol=tolerance, rtol=0)
    assert torch.allclose(in_p[outside] / runs, torch.tensor(2 / 8), atol=tolerance, rtol=0)
    assert torch.allclose(in_p[[1, 4, 8, 9]] / runs, torch.tensor(1 / 4), atol=tolerance, rtol=0)


def test_a_stratified_sample() -> None:
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)[torch.randperm(100)]
    sample = stratified_sample(labels, 10, torch.Generator().manual_seed(1))
    assert torch.bincount(labels[sample]).tolist() == [5, 3, 2]
    assert bool((sample.diff() > 0).all())
    assert len(stratified_sample(labels, 7, torch.Generator().manual_seed(1))) == 7
    assert torch.equal(
        stratified_sample(labels, 100, torch.Generator().manual_seed(1)), torch.arange(100)
    )
    assert len(stratified_sample(torch.rand(20), 5, torch.Generator().manual_seed(1))) == 5


# -------------------------------------------------------------------------------------- truths


def test_planted_influence_is_recovered() -> None:
    """At parameters that stand still, P and Q are what the gradients of all examples say."""
    callback = PaperFINECallback(
        **{**options("validation"), "every_n_steps": 1, "sample": 12},
        query_weighting=None,
        members=3,
        auxiliary=None,
    )
    module, _ = fit([callback], epochs=120, lr=1e-9)
    x, y, queries = data()
    params = {k: v.detach().double() for k, v in module.net.named_parameters()}
    direction = per_example(params, *queries.tensors, "margin").mean(0)
    c = per_example(params, x, y, "loss") @ direction
    subsets = callback._accumulator.subsets
    members = [[i] for i in subsets.singles.tolist()] + [g.tolist() for g in subsets.groups]
    for line, own in zip(callback.results(), members, strict=True):
        outside = c[[i for i in range(N) if i not in own]]
        k = min(3, len(own))
        shift = k / BATCH * float(c[own].mean() - outside.mean())
        finite = 1 - (BATCH - 1) / (len(outside) - 1)  # drawn without replacement
        expected = shift / (float(outside.std()) * (finite / BATCH) ** 0.5)
        # in a P batch the members' own spread replaces that of k outsiders: half of the variance
        assert line.moment == pytest.approx(expected, rel=0.35, abs=0.15)
        if np.isfinite(line.std_error):
            assert abs(line.mu - line.moment) < 5 * line.std_error
    assert max(abs(line.moment) for line in callback.results()) > 0.5


def planted(shift: float, trend: float, n: int = 400) -> tuple[PaperAccumulator, Signal]:
    """One group whose P lies `shift` above Q, on a trend that an auxiliary run shares."""
    rng = np.random.default_rng(5)
    accumulator = PaperAccumulator(watch(10, lambda: torch.zeros(10), subsets={"s": [1]}))
    levels = trend * np.cos(np.arange(n) / 40.0)
    for t in range(n):
        noise = rng.standard_normal(2)
        row = [[levels[t] + shift + noise[0]], [levels[t] + noise[1]], [levels[t]]]
        accumulator.observe(t + 1, torch.tensor(row))
    accumulator.n_steps = n
    return accumulator, accumulator.signal()


def test_difference_in_differences_removes_the_trend() -> None:
    accumulator, signal = planted(shift=1.0, trend=5.0)
    found = {
        use: evaluate(
            accumulator, selection="split", auxiliary=signal if use else None, level=0.95, seed=0
        ).subsets[0]
        for use in (True, False)
    }
    assert found[True].lower < 1.0 < found[True].upper
    assert found[True].moment == pytest.approx(1.0, abs=0.2)
    assert found[False].moment < 0.5  # the trend hides it
    p_value = found[True].p_value
    assert p_value is not None
    assert p_value < 0.01
    # exchanging P and Q within a step is immune to the trend in any case
    assert found[False].p_value == p_value


def test_the_published_rule_is_biased_away_from_zero() -> None:
    accumulator, signal = planted(shift=0.0, trend=0.0)
    by_rule = {
        rule: evaluate(accumulator, selection=rule, auxiliary=signal, level=0.95, seed=0).subsets[0]  # type: ignore[arg-type]
        for rule in ("split", "max")
    }
    assert abs(by_rule["max"].mu) > 0.15
    assert abs(by_rule["split"].mu) < abs(by_rule["max"].mu)
    assert by_rule["max"].mu == by_rule["split"].maximum


def test_auxiliary_steps_are_matched() -> None:
    accumulator, signal = planted(shift=1.0, trend=0.0, n=30)
    half = Signal(signal.steps[::2], signal.values[::2], signal.keys)
    result = evaluate(accumulator, selection="split", auxiliary=half, level=0.95, seed=0)
    assert result.steps.tolist() == list(range(1, 31, 2))
    again = Signal.from_state_dict(half.state_dict())
    assert torch.equal(again.values, half.values)
    assert again.keys == half.keys
    few = Signal(signal.steps[:3], signal.values[:3], signal.keys)
    with pytest.raises(ValueError, match="3 samples of P and of Q were taken that the auxiliary"):
        evaluate(accumulator, selection="split", auxiliary=few, level=0.95, seed=0)
    other = Signal(signal.steps, signal.values, ("another",))
    with pytest.raises(ValueError, match="measure both runs with the same subsets"):
        evaluate(accumulator, selection="split", auxiliary=other, level=0.95, seed=0)


# ---------------------------------------------------------------------------------- in Lightning


def test_two_runs_through_the_users_own_trainer() -> None:
    helper = PaperFINECallback(**options("self"), seed=1)
    fit([helper], order=5)
    signal = helper.signal()
    callback = PaperFINECallback(**options("self"), auxiliary_signal=signal)
    fit([callback])
    accumulator = callback._accumulator
    raw, result = accumulator.stacked(), callback._evaluated()
    for t in range(len(result.steps)):
        for s in range(len(accumulator.subsets)):
            o_p, o_q, o_hat = raw[t, 0, s], raw[t, 1, s], signal.values[t, s]
            assert float(result.p[s, t]) == pytest.approx(float(o_p - o_hat))
            assert float(result.q[s, t]) == pytest.approx(float(o_q - o_hat))
    traces = callback.scores().extras
    assert traces["trace/auxiliary"].shape == traces["trace/p"].shape == (11, 14)
    chosen = traces["trace/subset"].tolist()
    assert chosen[-2:] == [-1, -2]
    row = accumulator.subsets.singles.tolist().index(chosen[0])
    assert torch.allclose(traces["trace/p"][0].double(), raw[:, 0, row], rtol=1e-6)
    assert torch.allclose(traces["trace/auxiliary"][0].double(), signal.values[:, row], rtol=1e-4)


def test_watching_changes_no_weight_and_no_random_state() -> None:
    plain, _ = fit([], dropout=0.3)
    state = torch.get_rng_state()
    watching: list[pl.Callback] = [
        PaperFINECallback(**options("self")),
        FINECallback("self"),
        PaperFINECallback(**options("validation")),
        FINECallback("validation", queries=data()[2]),
    ]
    watched, _ = fit(watching, dropout=0.3)
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(state, torch.get_rng_state())
    assert not any(m._forward_hooks for m in watched.modules())
    alone = FINECallback("self")
    fit([alone], dropout=0.3)
    beside = watching[1]
    assert isinstance(beside, FINECallback)
    assert torch.equal(alone.scores().values, beside.scores().values)


def test_reproducible_and_its_own_seed() -> None:
    runs = [PaperFINECallback(**options("self"), auxiliary=None, seed=s) for s in (0, 0, 1)]
    for callback in runs:
        fit([callback])
    samples = [callback._accumulator.stacked() for callback in runs]
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])
    assert torch.equal(runs[0].scores().values, runs[1].scores().values)


def test_scores_are_of_the_sample_alone() -> None:
    callback = PaperFINECallback(**options("self"), auxiliary=None)
    fit([callback])
    scores = callback.scores()
    assert scores.watched is not None
    assert scores.std_error is not None
    assert scores.n_observations is not None
    rest = torch.ones(N, dtype=torch.bool)
    rest[scores.watched] = False
    assert len(scores.watched) == 9
    assert not scores.values[0, rest].any()
    assert torch.isinf(scores.std_error[0, rest]).all()
    assert not scores.n_observations[rest].any()
    assert (scores.n_observations[scores.watched] == 14).all()
    assert [line.name for line in callback.group_results()] == ["low", "wide"]
    assert all(line.p_value is not None for line in callback.group_results())


def test_a_resumed_run_gives_the_results_of_an_uninterrupted_one(tmp_path: Path) -> None:
    def callback() -> PaperFINECallback:
        return PaperFINECallback(**options("self"), auxiliary=None)

    whole = callback()
    fit([whole], epochs=4, order=0)
    _, first = fit([callback()], epochs=2, order=0)
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = callback()
    fit([resumed], epochs=4, order=0, resume=tmp_path / "half.ckpt")
    assert torch.equal(whole._accumulator.stacked(), resumed._accumulator.stacked())
    assert whole.results()[0].mu_run == resumed.results()[0].mu_run


def test_masks_columns_and_lists_are_the_same_subsets() -> None:
    mask = torch.zeros(N, dtype=torch.bool)
    mask[:5] = True
    column = ["low" if i < 5 else None for i in range(N)]
    by = [
        watch(N, lambda: torch.zeros(N), subsets={"s": list(range(5))}),
        watch(N, lambda: torch.zeros(N), subsets={"s": mask}),
        watch(N, lambda: torch.zeros(N), subsets={"s": mask.tolist()}),
        watch(N, lambda: torch.zeros(N), groups=column),
    ]
    assert all(torch.equal(subsets.groups[0], torch.arange(5)) for subsets in by)
    assert by[3].names == ("group low",)
    both = watch(N, lambda: torch.zeros(N), groups=torch.arange(N) % 2)
    assert both.names == ("group 0", "group 1")


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"subsets": {"s": []}}, "subset 's' is empty"),
        ({"subsets": {"s": [False] * N}}, "no entry of its mask is True"),
        ({"subsets": {"s": range(N)}}, "is the whole training set"),
        ({"subsets": {"s": [True] * N}}, "is the whole training set"),
        ({"subsets": {"s": [0, N]}}, f"from 0 to {N}, but the training set has {N}"),
        ({"subsets": {"s": [-1, 2]}}, "from -1 to 2"),
        ({"subsets": {"s": [1, 1]}}, "names an example twice"),
        ({"subsets": {"s": [0.5]}}, "integer positions or a boolean mask"),
        ({"subsets": {"s": ["a"]}}, "must be positions or a boolean mask"),
        ({"subsets": {"s": [True, False]}}, f"mask of 2 entries for {N}"),
        ({"subsets": {"s": list(range(35))}}, "leaves 5 training examples, but a P and a Q batch"),
        ({"groups": [0, 1]}, f"groups has 2 entries for {N}"),
        ({"groups": [0.5] * N}, "holds fractions"),
        ({"groups": [None] * N}, "names no group"),
        ({"groups": [0] * N}, "is the whole training set"),
        ({"groups": [0, *[1] * (N - 1)], "subsets": {"group 0": [1]}}, "both define 'group 0'"),
        ({"sample": N + 1}, f"sample={N + 1}, but the training set has {N}"),
        ({"sample": 3, "members": 9}, "members=9 must lie between 1 and the batch size 6"),
        ({"sample": 3, "batch_size": 21}, "pass a smaller batch_size"),
    ],
)
def test_impossible_subsets(given: dict[str, Any], message: str) -> None:
    callback = PaperFINECallback("self", **given)
    with pytest.raises(ValueError, match=message):
        callback.check(WatchedRun(N, BATCH, "sgd", 0.0, 0.0, None, {}))
    with pytest.raises(ValueError, match=message):
        fit([callback], epochs=1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "nothing to watch"),
        ({"target": "everything", "sample": 3}, "target must be one of"),
        ({"observable": "accuracy", "sample": 3}, "observable must be one of"),
        ({"selection": "best", "sample": 3}, "selection must be one of"),
        ({"auxiliary": "twice", "sample": 3}, 'auxiliary must be "reseed" or None'),
        ({"target": "validation", "sample": 3}, "needs queries="),
        ({"sample": 3, "queries": data()[2]}, "takes no queries"),
        ({"sample": 0}, "sample must be at least 1"),
        ({"sample": 3, "every_n_steps": 0}, "every_n_steps must be at least 1"),
        ({"sample": 3, "batch_size": 1}, "batch_size must be at least 2"),
        ({"sample": 3, "level": 1.0}, "level must lie strictly between"),
        ({"sample": 3, "query_weighting": "max"}, 'must be None, "norm" or "noise"'),
    ],
)
def test_bad_arguments(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PaperFINECallback(**given)


def test_what_is_not_served_says_why() -> None:
    with pytest.raises(NotImplementedError, match="one more training for every subset"):
        PaperFINECallback(sample=3, auxiliary="without_subset")
    for target in ("queries", "validation_per_class"):
        with pytest.raises(UnsupportedProblemError, match='serves "self" and "validation"'):
            PaperFINECallback(target, sample=3, queries=data()[2])  # type: ignore[arg-type]
    signal = Signal(torch.arange(1), torch.zeros(1, 1), ("a",))
    with pytest.raises(ValueError, match="auxiliary_signal is given, but auxiliary=None"):
        PaperFINECallback(sample=3, auxiliary=None, auxiliary_signal=signal)
    with pytest.raises(ValueError, match="a signal of 1 steps and 2 subsets"):
        Signal(torch.arange(1), torch.zeros(1, 1), ("a", "b"))


def test_results_before_they_exist() -> None:
    with pytest.raises(RuntimeError, match="no run has been observed"):
        PaperFINECallback(sample=3, auxiliary=None).scores()
    callback = PaperFINECallback(**options("self"))
    fit([callback], epochs=1)
    with pytest.raises(RuntimeError, match=r"helper\.signal"):
        callback.scores()
    rare = PaperFINECallback(sample=3, auxiliary=None, every_n_steps=5)
    fit([rare], epochs=1)
    with pytest.raises(ValueError, match="1 samples of P and of Q were taken; a test needs at "):
        rare.results()


def test_few_samples_have_an_open_interval_and_a_reason() -> None:
    callback = PaperFINECallback(sample=3, auxiliary=None, every_n_steps=1)
    fit([callback], epochs=1)
    for line in callback.results():
        open_ended = np.isinf(line.lower) or np.isinf(line.upper)
        assert open_ended == bool(line.reason)
        assert line.mu != 0.0 or np.isinf(line.std_error)


def test_constant_samples_are_no_silent_zero() -> None:
    accumulator = PaperAccumulator(watch(10, lambda: torch.zeros(10), sample=2))
    for t in range(20):
        row = torch.randn(3, 2, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
        row[:, 0] = 1.0
        accumulator.observe(t, row)
    result = evaluate(accumulator, selection="split", auxiliary=None, level=0.95, seed=0)
    assert np.isnan(result.subsets[0].mu)
    assert result.subsets[0].reason == "all choosing samples are equal: no threshold separates"
    with pytest.warns(UserWarning, match="1 of 2 watched examples cannot be told.*no threshold"):
        scores = to_scores(result, accumulator, None, "self")
    assert scores.watched is not None
    assert scores.std_error is not None
    assert torch.isinf(scores.std_error[0, scores.watched]).tolist() == [True, False]


def test_steps_that_are_not_finite_are_left_out() -> None:
    accumulator = PaperAccumulator(watch(10, lambda: torch.zeros(10), sample=2))
    for t in range(3):
        assert accumulator.observe(t, torch.ones(3, 2))
        assert not accumulator.observe(t, torch.tensor([[1.0, np.nan]] * 3))
    with pytest.raises(ValueError, match=r"3 samples .* 3 more were not finite"):
        evaluate(accumulator, selection="split", auxiliary=None, level=0.95, seed=0)

    class Broken(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 3:
                pl_module.net[0].weight.data.fill_(float("nan"))

    callback = PaperFINECallback(sample=3, auxiliary=None, every_n_steps=1)
    with (
        pytest.warns(UserWarning, match="NaN or infinite gradients at step 3"),
        pytest.raises(RuntimeError, match="training loss became nan"),
    ):
        fit([Broken(), callback], epochs=1)
    assert callback._accumulator.steps == [1, 2]


def test_saved_state_of_other_subsets_is_refused() -> None:
    accumulator, _ = planted(1.0, 0.0, n=5)
    other = PaperAccumulator(watch(10, lambda: torch.zeros(10), sample=2))
    with pytest.raises(ValueError, match="resume with the same data and subsets"):
        other.load_state_dict(accumulator.state_dict())


def test_data_that_do_not_keep_their_places_are_refused() -> None:
    x, y, _ = data()
    shifted = TensorDataset(x, y, torch.arange(N) + 1)
    with pytest.raises(ValueError, match="is not the position it was asked for"):
        fit([PaperFINECallback(sample=3)], dataset=shifted, epochs=1)


def test_extremes() -> None:
    assert list(extremes(torch.tensor([3.0, 1.0, 2.0]))) == [1, 2, 0]
    chosen = list(extremes(torch.arange(100.0)))
    assert chosen == [0, 1, 2, 48, 49, 50, 97, 98, 99]
