"""Truths that are known of some examples: what is measured, and among whom."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fine_bench.leaderboard.consistency import Comparisons
from fine_bench.metrics.registry import Given, measure
from fine_bench.metrics.stable import stable_metrics
from fine_bench.runner.backends.trained import detected
from fine_bench.runner.recorded import cell_of
from fine_bench.store.plausibility import check_numbers
from fine_bench.store.records import RecordStore
from fine_bench.store.scores import asked_about, carried_truth, truth_extras
from fine_bench.types import GroundTruth, InfluenceScores
from support.records import digits_run, make_record

N = 120
BAD = torch.arange(N) % 12 == 5
REVIEWED = torch.arange(N) % 4 == 1
KNOWN = torch.arange(N) % 2 == 1
TRUTH = GroundTruth(BAD, "made up", KNOWN, REVIEWED)


def noisy(seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(1, N, generator=draw, dtype=torch.float64) + 1.5 * BAD


def average_precision(values: np.ndarray, bad: np.ndarray) -> float:
    """Mean over the bad of the precision down to each, values distinct."""
    order = bad[np.argsort(-values)]
    hits = np.flatnonzero(order)
    return float(np.mean([(i + 1) / (place + 1) for i, place in enumerate(hits)]))


def auroc(values: np.ndarray, bad: np.ndarray) -> float:
    return float(np.mean([a > b for a in values[bad] for b in values[~bad]]))


def test_numbers_among_the_reviewed_by_hand() -> None:
    values = noisy()
    found = measure(Given(values, "self", "high", BAD, reviewed=REVIEWED))
    some, bad = values[0, REVIEWED].numpy(), BAD[REVIEWED].numpy()
    assert found["n_reviewed"] == int(REVIEWED.sum())
    expected = average_precision(some, bad)
    assert found["reviewed_average_precision"] == pytest.approx(expected)
    assert found["reviewed_auroc"] == pytest.approx(auroc(some, bad))
    assert found["reviewed_auroc"] != found["auroc"]
    turned = measure(Given(-values, "validation", "low", BAD, reviewed=REVIEWED))
    assert turned["reviewed_average_precision"] == pytest.approx(expected)
    check_numbers(found)
    with pytest.raises(ValueError, match=r"reviewed_auroc = 1\.5, which is between 0 and 1"):
        check_numbers({"reviewed_auroc": 1.5})


def test_without_reviews_or_where_all_reviewed_are_alike() -> None:
    values = noisy()
    assert not [n for n in measure(Given(values, "self", "high", BAD)) if "reviewed" in n]
    found = measure(Given(values, "self", "high", BAD, reviewed=BAD))
    assert {n: x for n, x in found.items() if "reviewed" in n} == {"n_reviewed": BAD.sum()}
    assert "n_reviewed" not in measure(Given(values, "self", "high", None, reviewed=REVIEWED))


@pytest.fixture(scope="module")
def job() -> Any:
    estimator = {"_target_": "baselines.controls.MeanTrainingLoss"}
    config = {**digits_run(n_train=N), "estimator": estimator, "seed": 0}
    found = cell_of(make_record(estimator="mean_loss", config=config), Path("nowhere"))
    clean = replace(found.data, y=found.data.clean_y)
    return replace(found, data=replace(clean, truth=TRUTH))


@pytest.mark.parametrize("watched", [None, torch.arange(N)[torch.arange(N) % 5 > 0]])
def test_a_run_is_measured_on_the_examples_of_known_truth(
    job: Any, watched: torch.Tensor | None
) -> None:
    values = noisy()
    scores = InfluenceScores(values, "x", "self", watched=watched)
    found = detected(job, "self", scores, {})
    mask = KNOWN.clone()
    if watched is not None:
        mask &= torch.arange(N) % 5 > 0
        assert found["n_watched"] == len(watched)
    assert (found["n_known"], found["n_bad"]) == (int(mask.sum()), int((BAD & mask).sum()))
    some, bad = values[0, mask].numpy(), BAD[mask].numpy()
    assert found["auroc"] == pytest.approx(auroc(some, bad))
    both = mask & REVIEWED
    assert found["n_reviewed"] == int(both.sum())
    expected = average_precision(values[0, both].numpy(), BAD[both].numpy())
    assert found["reviewed_average_precision"] == pytest.approx(expected)


def test_where_all_is_known_nothing_changes(job: Any) -> None:
    values = noisy()
    plain = replace(job, data=replace(job.data, truth=GroundTruth(BAD, "made up")))
    found = detected(plain, "self", InfluenceScores(values, "x", "self"), {})
    assert not {"n_known", "n_watched", "n_reviewed"} & found.keys()
    assert found == {"n_bad": BAD.sum()} | measure(Given(values, "self", "high", BAD))


def test_runs_are_compared_on_the_examples_of_known_truth(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    found = {}
    for seed in range(3):
        scores = InfluenceScores(noisy(seed), "fine", "self", extras=truth_extras(TRUTH))
        found[seed] = store.save(make_record(seed=seed), scores)
    k = int(BAD.sum())
    compared, complaint = Comparisons(store, ()).of(found, k)
    assert complaint == ""
    assert compared is not None
    known, bad = [noisy(seed)[0, KNOWN].numpy() for seed in range(3)], BAD[KNOWN].numpy()
    expected = stable_metrics(known, bad, k)
    assert compared.variation["stable_recall"] == expected["stable_recall"]
    everything = stable_metrics([noisy(seed)[0].numpy() for seed in range(3)], BAD.numpy(), k)
    assert expected["stable_recall"] != everything["stable_recall"]
    first, second = (set(np.argsort(-run)[:k].tolist()) for run in known[:2])
    assert compared.pairs[0, 1]["jaccard"] == pytest.approx(
        len(first & second) / len(first | second)
    )


# --- the truth itself


def test_what_scores_carry_of_it_and_back() -> None:
    extras = {**truth_extras(TRUTH), "lower": torch.ones(3)}
    assert set(truth_extras(TRUTH)) == {"truth/is_bad", "truth/known", "truth/reviewed"}
    back = carried_truth(InfluenceScores(noisy(), "x", "self", extras=extras))
    assert back is not None
    for name in ("is_bad", "known", "reviewed"):
        assert torch.equal(getattr(back, name), getattr(TRUTH, name))
    assert list(truth_extras(GroundTruth(BAD, "x"))) == ["truth/is_bad"]
    assert carried_truth(InfluenceScores(noisy(), "x", "self")) is None


def test_of_whom_is_asked() -> None:
    some = torch.tensor([1, 2, 7, 8])
    for truth in (None, GroundTruth(BAD, "x")):
        assert asked_about(truth, None) is None
        assert asked_about(truth, some) is some
    for watched, expected in ((some, torch.tensor([1, 7])), (None, KNOWN.nonzero()[:, 0])):
        found = asked_about(TRUTH, watched)
        assert found is not None
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"known": KNOWN.int()}, "known must be a boolean vector"),
        ({"reviewed": REVIEWED[None]}, "reviewed must be a boolean vector"),
        ({"reviewed": REVIEWED[:-1]}, r"not all bad .* reviewed \(10 among 120, 30 among 119\)"),
        ({"known": KNOWN[:-1]}, r"not all reviewed .* known \(30 among 120, 59 among 119\)"),
        ({"reviewed": torch.zeros(N) > 0}, r"not all bad .* reviewed \(10 among 120, 0 among 12"),
        ({"known": REVIEWED, "reviewed": KNOWN}, "not all reviewed examples are known"),
        ({"known": torch.arange(N) > 5, "reviewed": None}, "not all bad examples are known"),
    ],
)
def test_a_truth_is_checked_at_birth(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TRUTH, **changes)
