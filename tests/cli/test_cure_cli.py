"""Touch the most suspicious examples and train again: the seam, the experiment, the command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import cos, pi
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import RandomSampler

from fine_bench.commands.cure import main
from fine_bench.errors import ConfigError, DataError
from fine_bench.metrics.cure import ORACLE, RANDOM, removal_area, removals
from fine_bench.models.classifier import DivergedError
from fine_bench.report.cure import markdown
from fine_bench.runner.backends import images
from fine_bench.runner.cure import FIRST_SEED, cure, guesses, treat
from fine_bench.runner.cure_orders import oracle_order, order_of, random_order
from fine_bench.runner.plan import Job
from fine_bench.runner.recorded import job_of
from fine_bench.runner.retrain import epochs, mean_probabilities, retrain
from fine_bench.seeds import stream
from fine_bench.store.records import RecordStore
from fine_bench.types import InfluenceScores, RunRecord
from support.records import digits_run, make_record


def record(**trainer: Any) -> RunRecord:
    """What a run on 120 digits leaves, but for its scores."""
    return make_record(
        task="digits_mislabel",
        setting="a1" * 8,
        estimator_hash="e" * 8,
        metrics={},
        data_sha256="",
        config=digits_run(**trainer),
    )


@pytest.fixture(scope="module")
def job() -> Job:
    return job_of(record())


def ones(job: Job) -> Tensor:
    return torch.ones(job.data.n_train)


# ----------------------------------------------------------------------------------- retraining


@pytest.mark.parametrize(
    "trainer",
    [
        {},  # 120 = 7 · 16 + 8
        {"batch_size": 20},  # no short batch, where the order's draws differ
        {"momentum": 0.9, "weight_decay": 0.01, "lr_schedule": "cosine", "max_epochs": 3},
        {"order_seed": 7, "init_seed": 8},
    ],
)
def test_untreated_retraining_is_the_benchmarks_own_run(
    trainer: dict[str, Any], tmp_path: Path
) -> None:
    job = job_of(record(**trainer))
    under_lightning = images.train(
        replace(job, config=replace(job.config, seed=3, results_dir=str(tmp_path))), [], None
    )
    *_, net = epochs(job, job.data.y, ones(job), 3)
    for name, value in under_lightning.model.state_dict().items():
        assert torch.equal(net.state_dict()[name], value)
    (accuracy,) = retrain(job, job.data.y[None], ones(job)[None], [3])
    assert accuracy == pytest.approx(under_lightning.facts["test_accuracy"])
    # the mean over the epochs' ends, from the checkpoints
    total = torch.zeros(120, 10, dtype=torch.float64)
    for checkpoint in under_lightning.checkpoints:
        under_lightning.model.load_state_dict(dict(checkpoint.params))
        total += torch.softmax(under_lightning.model(job.data.x).double(), 1).detach()
    expected = total / len(under_lightning.checkpoints)
    assert torch.allclose(mean_probabilities(job, 3), expected, atol=1e-12)


def test_weights_and_labels_are_the_formula() -> None:
    """w_i · cross-entropy, summed over the batch and divided by its size; weight 0 is left out."""
    job = job_of(record(lr_schedule="cosine", momentum=0.5))
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(10, (120,), generator=generator)
    w = torch.rand(120, generator=generator) * (torch.arange(120) % 3 > 0)
    *_, net = epochs(job, y, w, 5)

    fresh = images.build_model(replace(job, config=replace(job.config, seed=5))).net
    parameters = list(fresh.parameters())
    velocity = [torch.zeros_like(p) for p in parameters]
    kept = [i for i in range(120) if w[i] > 0]
    order, t = RandomSampler(kept, generator=stream(5, "order")), 0
    for _ in range(2):
        drawn = list(order)
        for start in range(0, 80, 16):
            rows = [kept[i] for i in drawn[start : start + 16]]
            loss = torch.stack(
                [w[i] * F.cross_entropy(fresh(job.data.x[i : i + 1]), y[i : i + 1]) for i in rows]
            ).sum() / len(rows)
            gradients = torch.autograd.grad(loss, parameters)
            for p, v, g in zip(parameters, velocity, gradients, strict=True):
                v.mul_(0.5).add_(g)
                p.data -= 0.05 * (1 + cos(pi * t / 10)) / 2 * v
            t += 1
        # the sampler's end draws once more, which training under Lightning never reaches when
        # the last batch is full: start the second epoch where it does
        order.generator = _after_one_order(80, 5)
    for name, value in fresh.state_dict().items():
        assert torch.allclose(net.state_dict()[name], value, atol=1e-6)


def _after_one_order(n: int, seed: int) -> torch.Generator:
    generator = stream(seed, "order")
    torch.randperm(n, generator=generator)
    return generator


def test_retraining_many_is_retraining_each(job: Job) -> None:
    labels = torch.stack([job.data.y, job.data.clean_y])
    weights = torch.stack([ones(job), 0.5 * ones(job)])
    both = retrain(job, labels, weights, [0, 1])
    each = [retrain(job, labels[k, None], weights[k, None], [k])[0] for k in (0, 1)]
    assert both == each
    assert both[0] != both[1]


def test_what_cannot_be_retrained(job: Job) -> None:
    y, w = job.data.y[None], ones(job)[None]
    for labels, weights, message in (
        (y[:, :9], w, r"shape \(1, 120\), got \(1, 9\)"),
        (y, -w, "not negative"),
        (y, w * float("nan"), "finite"),
        (y, 0 * w, "no example is left"),
    ):
        with pytest.raises(ValueError, match=message):
            retrain(job, labels, weights, [0])
    wild = job_of(record(lr=1e30))
    with pytest.raises(DivergedError, match="lower the step size"):
        retrain(wild, y, w, [0])
    strange = replace(job, config=replace(job.config, trainer=replace(job.config.trainer)))
    strange.config.trainer.lr_schedule = "zigzag"
    with pytest.raises(ConfigError, match="cannot be trained again"):
        retrain(strange, y, w, [0])


def test_records_that_cannot_be_loaded_again() -> None:
    good = record()
    with pytest.raises(DataError, match="no longer those of the records"):
        job_of(replace(good, data_sha256="0" * 64))
    with pytest.raises(ConfigError, match="no full configuration"):
        job_of(replace(good, config={}))
    foreign = {**good.config, "model": {"_target_": "os.getcwd"}}
    with pytest.raises(ConfigError, match="add --allow-packages os"):
        job_of(replace(good, config=foreign))
    with pytest.raises(ConfigError, match=r"trainer\.max_epochs"):
        job_of(record(max_epochs=0))


# ----------------------------------------------------------------------------------- experiment


def scores_of(values: Sequence[float] | Tensor, target: Any = "self") -> InfluenceScores:
    return InfluenceScores(torch.as_tensor(values)[None], "m", target)


def test_orders_and_treatments() -> None:
    assert order_of(scores_of([0.1, 0.9, 0.9, 0.5]), "high").tolist() == [1, 2, 3, 0]
    assert order_of(scores_of([0.1, 0.9, 0.9, 0.5], "validation"), "low").tolist() == [0, 3, 1, 2]
    bad = np.array([False, True, False, True, False])
    first = oracle_order(bad, 0)
    assert set(first[:2]) == {1, 3}
    assert sorted(first) == sorted(random_order(5, 0)) == [0, 1, 2, 3, 4]
    assert len({tuple(oracle_order(bad, s)) for s in range(9)}) > 3
    y, new = torch.tensor([0, 1, 2]), torch.tensor([2, 2, 0])
    rows = np.array([2, 0])
    cases: list[tuple[Any, list[int], list[float]]] = [
        ("remove", [0, 1, 2], [0.0, 1.0, 0.0]),
        ("relabel", [2, 1, 0], [1.0, 1.0, 1.0]),
        ("downweight", [0, 1, 2], [0.25, 1.0, 0.25]),
        ("remove_best", [0, 1, 2], [0.0, 1.0, 0.0]),
    ]
    for treatment, labels, weights in cases:
        found = treat(treatment, rows, y, new, 0.25)
        assert found[0].tolist() == labels
        assert found[1].tolist() == weights
    p = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3]])
    assert guesses(p, torch.tensor([0, 0])).tolist() == [1, 1]


def test_the_experiment_with_a_trainer_that_can_be_computed_by_hand(job: Job) -> None:
    """ "Accuracy" is the weight of the rightly labelled examples plus noise that a seed has."""
    data = job.data
    noise = {FIRST_SEED + j: 0.01 * j**2 for j in range(6)}
    asked = []

    def train(job: Job, labels: Tensor, weights: Tensor, seeds: Sequence[int]) -> list[float]:
        asked.append(len(seeds))
        right = (weights * (labels == data.clean_y)).sum(1) / 120
        return [float(r) + noise[s] for r, s in zip(right, seeds, strict=True)]

    def probabilities(job: Job, seed: int) -> Tensor:
        # its best guess is right for even seeds, and one class off for odd ones
        return F.one_hot((data.clean_y + seed % 2) % 10, 10).double()

    bad = data.truth.is_bad.double()
    points = cure(
        job,
        {"seer": [scores_of(bad)], "two": [scores_of(bad), scores_of(-bad)]},
        shares=[0.2, 0.1, 0.1],
        n_seeds=6,
        weight=0.25,
        train=train,
        probabilities=probabilities,
    )
    assert sum(asked) == 6 * (1 + 4 * 3 * 2)
    at = {(p.method, p.treatment, p.touched): p for p in points}
    n_bad = int(bad.sum())
    assert (n_bad, len(at)) == (24, 1 + 4 * 3 * 2)
    plain = at["", "none", 0]
    mean_noise = sum(noise.values()) / 6
    assert plain.accuracy.mean == pytest.approx(96 / 120 + mean_noise)
    assert plain.accuracy.lower < plain.accuracy.mean < plain.accuracy.upper
    assert plain.gain == (0.0, 0.0, 0.0)
    for method in ("seer", ORACLE):
        for k in (12, 24):
            assert at[method, "remove", k].bad_touched == k
            # only bad ones are touched, which count nothing
            assert at[method, "remove", k].gain.mean == pytest.approx(0.0)
            assert at[method, "downweight", k].gain.mean == pytest.approx(0.0)
    # the oracle knows the right label, the others guess it with half of the seeds
    assert at[ORACLE, "relabel", 24].gain.mean == pytest.approx(24 / 120)
    assert at["seer", "relabel", 24].gain.mean == pytest.approx(24 / 120 / 2)
    assert at["seer", "relabel", 24].gain.upper > at["seer", "relabel", 24].gain.lower
    assert at["seer", "relabel", 24].share == pytest.approx(0.2)
    # the two runs take turns: one touches bad examples only, the other good ones only
    assert at["two", "remove", 12].bad_touched == pytest.approx(6)
    assert at["two", "remove", 12].gain.mean == pytest.approx(-0.1 / 2)
    assert at["two", "downweight", 12].gain.mean == pytest.approx(-0.75 * 0.1 / 2)
    assert at[RANDOM, "remove", 24].gain.mean < -0.05


def test_removal_from_both_ends_and_its_areas(job: Job) -> None:
    """ "Accuracy" is the share of the weight on good examples, so removal is arithmetic."""
    bad = job.data.truth.is_bad.float()

    def train(job: Job, labels: Tensor, weights: Tensor, seeds: Sequence[int]) -> list[float]:
        return [
            1 - float(w @ bad / w.sum()) + 0.001 * s for w, s in zip(weights, seeds, strict=True)
        ]

    points = cure(
        job,
        {"seer": [scores_of(bad)]},
        shares=[0.1, 0.2],
        treatments=["remove", "remove_best"],
        train=train,
    )
    at = {(p.method, p.treatment, p.touched): p for p in points}
    assert at["seer", "remove", 24].bad_touched == 24
    assert at["seer", "remove_best", 24].bad_touched == 0
    noise = 0.001 * (FIRST_SEED + 2)
    worst = [0.8, 1 - 12 / 108, 1.0]
    best = [0.8, 1 - 24 / 108, 1 - 24 / 96]
    found = {one.method: one for one in removals(points)}
    seer = found["seer"]
    assert seer.worst_first is not None
    assert seer.best_first is not None
    assert seer.gap is not None
    expected = [(y[0] + 2 * y[1] + y[2]) / 4 for y in (worst, best)]
    assert seer.worst_first.mean == pytest.approx(expected[0] + noise)
    assert seer.best_first.mean == pytest.approx(expected[1] + noise)
    assert seer.gap == pytest.approx((expected[0] - expected[1],) * 3)  # paired by seed
    assert found[ORACLE].gap == pytest.approx(seer.gap)
    random = found[RANDOM].gap
    assert random is not None
    assert abs(random.mean) < 0.5 * seer.gap.mean
    text = markdown(points, "", [])
    assert "## removed, least suspicious first" in text
    line = next(x for x in text.splitlines() if x.startswith("| seer | 1."))
    assert f"{seer.gap.mean:.3f}" in line
    alone = [p for p in points if p.treatment != "remove_best"]
    assert removals(alone)[0].gap is None
    assert "areas" not in markdown(alone, "", [])
    with pytest.raises(ValueError, match="shares must ascend from 0, with an accuracy each"):
        removal_area([0.1, 0.2], [1.0, 1.0])


def test_refused_experiments(job: Job) -> None:
    fine = scores_of(torch.zeros(120))
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"m": [fine]}, {"shares": [0.0]}, "shares must lie between 0 and 1"),
        ({"m": [fine]}, {"shares": []}, "shares must lie"),
        ({"m": [fine]}, {"n_seeds": 4}, "at least 5 seeds"),
        ({"m": [fine]}, {"weight": 1.0}, "weight must lie between 0 and 1"),
        ({"m": [fine]}, {"treatments": []}, "no treatment"),
        ({"m": [fine]}, {"treatments": ["burn"]}, "got 'burn'"),
        ({"m": []}, {}, "m has no scores"),
        ({ORACLE: [fine]}, {}, "must not be called"),
        ({"m": [scores_of(torch.zeros(9))]}, {}, "does not score all 120"),
        ({"m": [replace(fine, watched=torch.arange(9))]}, {}, "does not score all 120"),
    ]
    for scores, options, message in cases:
        with pytest.raises(ValueError, match=message):
            cure(job, scores, **options)


# -------------------------------------------------------------------------------------- command


@pytest.fixture
def results(tmp_path: Path, job: Job) -> Path:
    store = RecordStore(tmp_path)
    bad = job.data.truth.is_bad.float()
    for seed in (0, 1):
        noise = torch.rand(120, generator=torch.Generator().manual_seed(seed))
        for name, values in (("fine", bad + 0.1 * noise), ("mean_loss", noise)):
            entry = replace(record(), estimator=name, seed=seed, data_sha256=job.data.sha256)
            store.save(entry, InfluenceScores(values[None], name, "self"))
    return tmp_path


def test_the_command(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--results", str(results), "--task", "digits_mislabel"]
    arguments += ["--shares", "0.1", "0.2", "--treatments", "remove", "relabel"]
    assert main(arguments) == 0
    written = [
        results / "cure.csv",
        results / "cure.md",
        results / "figures" / "cure--digits_mislabel.png",
        results / "figures" / "cure--digits_mislabel.svg",
    ]
    shown = capsys.readouterr().out
    assert all(f"written: {path}" in shown for path in written)
    table = pd.read_csv(written[0], keep_default_na=False)
    assert len(table) == 1 + 4 * 2 * 2
    assert set(table["method"]) == {"", "fine", "mean_loss", ORACLE, RANDOM}
    assert (table["n_seeds"] == 5).all()
    for name in ("accuracy", "gain"):
        assert (table[f"{name}_lower"] <= table[name]).all()
        assert (table[name] <= table[f"{name}_upper"]).all()
    text = written[1].read_text()
    assert "120 training examples, 24 of them bad" in text
    assert "| 12 (10%) |" in text
    assert "fine: 0, 1; mean_loss: 0, 1" in text
    assert "## relabelled" in text
    assert "weighted down" not in text.split("## removed")[1]
    before = [path.read_bytes() for path in written]
    assert main(arguments) == 0
    assert [path.read_bytes() for path in written] == before


def test_the_command_refuses(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: str, task: str = "digits_mislabel") -> str:
        assert main(["--results", str(results), "--task", task, *arguments]) == 2
        return capsys.readouterr().err

    assert "of task 'other'; there are: digits_mislabel" in refused(task="other")
    message = refused("--methods", "aum")
    assert "no finished scores of 'aum' for target self; there are: fine, mean_loss" in message
    assert "no finished scores of 'fine' for target validation" in refused("--target", "validation")
    assert "at least 5 seeds" in refused("--seeds", "2")
    assert "no finished records of task 'digits_mislabel' and setting 'ff'" in refused(
        "--setting", "ff"
    )
    store = RecordStore(results)
    scores = scores_of(torch.zeros(120))
    entry = replace(record(), estimator_hash="f" * 8, seed=9)
    data = next(r for r in store.scan().records).data_sha256
    store.save(replace(entry, data_sha256=data), scores)
    assert "several configurations" in refused()
    store.save(replace(entry, setting="b2" * 8, data_sha256=data), scores)
    assert "several settings: a1a1a1a1, b2b2b2b2; choose one" in refused()
    assert main(["--results", str(results / "no"), "--task", "x"]) == 2
    assert "make some with `fine-bench run`" in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "fine-bench cure --task digits_mislabel" in shown
    assert "(default: 0.05 0.1 0.2 0.3)" in shown
