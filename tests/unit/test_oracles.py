"""What retraining says as rows of a table: formulas, and that no method is ranked with them."""

from __future__ import annotations

import io
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy import stats

from fine_bench.leaderboard import render
from fine_bench.leaderboard.build import build
from fine_bench.leaderboard.summary import summarise
from fine_bench.leaderboard.tables import Leaderboard
from fine_bench.metrics.detection import detection_metrics
from fine_bench.metrics.out_of_sample import out_of_sample_fidelity
from fine_bench.metrics.retraining import effect
from fine_bench.report.html.tables import target_tables
from fine_bench.retraining.oracles import limits_in, limits_of, self_scores, validation_banzhaf
from fine_bench.retraining.truth import HalfTruth, SubsetTruth, Truth
from fine_bench.retraining.truth_files import save
from fine_bench.store.records import RecordStore
from fine_bench.types import InfluenceScores
from support.records import make_record

N, Q = 50, 6
BAD = np.arange(N) < 10
DATA, SETTING = "da7a" * 16, "5e77" * 16


def half(seed: int) -> HalfTruth:
    draw = np.random.default_rng(seed)
    base = np.random.default_rng(99).standard_normal(N) + 1.5 * BAD

    def near(x: Any) -> Any:
        return (x + 0.3 * draw.standard_normal(N)).astype(np.float32)

    return HalfTruth(
        mu_margin=near(base),
        mu_margin_se=near(1.0),
        mu_loss=near(base),
        effect_margin=near(2 * base),
        effect_loss=near(-base),
        out_of_sample_margin=near(-1.3 * base),
        n_models=64,
        ceiling=0.95,
        ceiling_clean=0.9,
        lds_ceiling=0.8,
    )


def truth(**changes: Any) -> Truth:
    draw = np.random.default_rng(5)
    members = draw.random((20, N)) < 0.5
    margin = (members @ draw.standard_normal((N, Q))).astype(np.float32)
    subsets = SubsetTruth(members, margin, margin, margin, n_seeds=5)
    made = Truth(
        name="small", task="digits", version=1, data_sha256=DATA, setting=SETTING, keep=0.5,
        is_bad=BAD, development=half(0), published=half(1), subsets=subsets,
    )  # fmt: skip
    return replace(made, **changes)


# ------------------------------------------------------------------------------------- formulas


def test_the_mean_effect_is_data_banzhaf() -> None:
    """The definition, summed over all subsets of six examples, and every subset as a model."""
    n, draw = 6, np.random.default_rng(0)
    utility = {frozenset(s): draw.standard_normal(n)
               for k in range(n + 1) for s in combinations(range(n), k)}  # fmt: skip
    expected = np.zeros(n)
    for i in range(n):
        for s in utility:
            if i not in s:
                expected[i] += (utility[s | {i}][i] - utility[s][i]) / 2 ** (n - 1)
    members = np.array([[i in s for i in range(n)] for s in utility])
    found = effect(members, np.stack(list(utility.values())))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_banzhaf_of_queries_is_a_difference_of_means() -> None:
    subsets = truth().subsets
    assert subsets is not None
    found = validation_banzhaf(subsets)
    members, margin = subsets.members[0::2], subsets.margin[0::2].astype(np.float64)
    for i in (0, 7, 49):
        inside = members[:, i]
        expected = margin[inside].mean() - margin[~inside].mean()
        assert found[i] == pytest.approx(expected)


def test_out_of_sample_fidelity_and_its_ceiling() -> None:
    made = truth()
    scores = np.random.default_rng(3).standard_normal(N) - made.published.out_of_sample_margin
    found = made.metrics(scores[None], "self")
    value = stats.spearmanr(scores, -made.published.out_of_sample_margin).statistic
    both = (made.development.out_of_sample_margin, made.published.out_of_sample_margin)
    reliability = stats.spearmanr(*both).statistic
    assert found["fidelity_out_of_sample"] == pytest.approx(value)
    ceiling = np.sqrt(reliability)
    assert found["fidelity_out_of_sample_of_ceiling"] == pytest.approx(value / ceiling)
    watched = np.arange(0, N, 2)
    part = made.metrics(scores[None], "self", watched=watched)
    own = stats.spearmanr(scores[watched], -made.published.out_of_sample_margin[watched]).statistic
    assert part["fidelity_out_of_sample"] == pytest.approx(own)
    assert np.isnan(made.metrics(np.ones((1, N)), "self")["fidelity_out_of_sample"])


def test_out_of_sample_refusals() -> None:
    margin = np.arange(12.0)
    with pytest.raises(ValueError, match="scores has 11 examples, margin 12; they must be those"):
        out_of_sample_fidelity(np.arange(11.0), margin, 0.9)
    with pytest.raises(ValueError, match="needs at least 10 examples, got 3; score more"):
        out_of_sample_fidelity(margin[:3], margin[:3], 0.9)
    with pytest.raises(ValueError, match=r"ceiling must lie in \(0, 1\] .* got 1.2"):
        out_of_sample_fidelity(margin, margin, 1.2)


def test_one_half_is_scored_by_the_other() -> None:
    made = truth()
    found = {(limit.name, limit.target): limit for limit in limits_of(made)}
    assert set(found) == {
        ("retraining_mu", "self"),
        ("retraining_effect", "self"),
        ("retraining_out_of_sample", "self"),
        ("retraining_banzhaf", "validation"),
    }
    own = found["retraining_mu", "self"]
    assert own.made_of == "64 models"
    expected = stats.spearmanr(made.development.mu_margin, made.published.mu_margin).statistic
    assert own.numbers["fidelity"] == pytest.approx(expected)
    for name, values in self_scores(made.development).items():
        numbers = found[name, "self"].numbers
        detected = detection_metrics(values, BAD)
        assert numbers.items() >= detected.items()
        assert detected["auroc"] > 0.7  # high is suspicious for each of them
    banzhaf = found["retraining_banzhaf", "validation"]
    assert banzhaf.made_of == "10 subsets"
    assert made.subsets is not None
    detected = detection_metrics(-validation_banzhaf(made.subsets), BAD)
    assert banzhaf.numbers["average_precision"] == pytest.approx(detected["average_precision"])
    assert not any(limit.target == "validation" for limit in limits_of(truth(subsets=None)))
    always = made.subsets.members.copy()
    always[:, 3] = True  # without it no subset says anything
    few = truth(subsets=replace(made.subsets, members=always))
    assert few.subsets is not None
    assert np.flatnonzero(~np.isfinite(validation_banzhaf(few.subsets))).tolist() == [3]
    assert not any(limit.target == "validation" for limit in limits_of(few))


# ---------------------------------------------------------------------------------------- tables


def board_of(root: Path, targets: tuple[str, ...] = ("self",)) -> Leaderboard:
    store = RecordStore(root)
    save(truth(), root / "ground_truth")
    draw = torch.Generator().manual_seed(0)
    for target in targets:
        for seed in range(3):
            values = torch.randn(1, N, generator=draw)
            metrics = detection_metrics(values[0], torch.from_numpy(BAD)) | {"n_bad": 10.0}
            metrics |= truth().metrics(values, target)
            record = make_record(
                target=target, seed=seed, setting=SETTING, data_sha256=DATA, metrics=metrics
            )
            store.save(record, InfluenceScores(values, "fine", target))  # type: ignore[arg-type]
    return build(store, limits=limits_in(root))


def test_tables_show_limits_below_the_methods_and_rank_none(tmp_path: Path) -> None:
    board = board_of(tmp_path)
    (table,) = board.tables
    assert [row.estimator for row in table.rows] == ["fine"]
    assert [row.estimator for row in table.limits] == [
        "retraining_mu", "retraining_effect", "retraining_out_of_sample",
    ]  # fmt: skip
    text = render.to_markdown(board)
    lines = [line for line in text.splitlines() if line.startswith("| self")]
    assert lines[0].startswith("| self | fine | 3 |")
    assert lines[1].startswith("| self, by retraining | retraining_mu (64 models) | – | ")
    assert "By retraining: what hundreds of retrained models say" in text
    # below every table that has a number of theirs, so not in the one of consistency and cost
    parts = text.split("### ")
    assert [part.count("by retraining |") for part in parts[1:]] == [3, 0, 3]
    # a method that no limit outranks: the tie marks and the summary know methods alone
    assert not any(row.ties for row in table.limits)
    assert summarise(board, "auroc", "self").labels == ("fine",)
    frame = render.frame(board)
    assert set(frame.loc[frame.limit, "estimator"]) == {row.estimator for row in table.limits}
    assert set(frame.loc[~frame.limit, "estimator"]) == {"fine"}
    out = io.StringIO()
    render.show(board, Console(file=out, width=100))
    assert "self, by retraining" in out.getvalue()
    page = str(target_tables(table, board.columns))
    assert page.count("<table") == 2
    assert "By retraining" in page


def test_limits_answer_the_targets_that_the_table_has(tmp_path: Path) -> None:
    both = board_of(tmp_path / "both", ("self", "validation")).tables[0].limits
    assert "retraining_banzhaf" in [row.estimator for row in both]
    (table,) = build(RecordStore(tmp_path / "both")).tables  # nobody asked for them
    assert table.limits == ()
    other = limits_in(tmp_path)
    assert other("0" * 64, SETTING) == ()
