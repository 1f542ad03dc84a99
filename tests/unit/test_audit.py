"""The auditor's command: bounds come from ends of intervals, and what has none is unknown."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm

from fine_bench.commands import audit
from fine_bench.report.audit import AS_STORED, EPSILONS, Audit, Evidence
from fine_bench.store.record_json import PENDING
from fine_bench.store.records import RecordStore
from fine_bench.theory.estimation import estimate_mu
from fine_bench.types import InfluenceScores, RunRecord

STEPS = 4.0
Z95, Z99 = 1.959963984540054, 2.5758293035489004


def metrics(**groups: tuple[float, float, float]) -> dict[str, float]:
    found = {}
    for index, (name, (mu, lower, upper)) in enumerate(groups.items()):
        numbers = {"index": index, "mu": mu, "lower": lower, "upper": upper, "mu_run": mu * 2}
        found |= {f"group/{name}/{key}": float(value) for key, value in numbers.items()}
    return found


def samples(seed: int) -> dict[str, torch.Tensor]:
    """Traces of one single example and of the first group, as ``fine_paper`` keeps them."""
    generator = torch.Generator().manual_seed(seed)
    p, q, other = (torch.randn(2, 80, generator=generator) for _ in range(3))
    return {
        "trace/subset": torch.tensor([5, -1]),
        "trace/p": p + 1.0 + other,
        "trace/q": q + other,
        "trace/auxiliary": other,
    }


def save(root: Path, estimator: str, seed: int, **parts: Any) -> None:
    scores = {key: parts.pop(key) for key in ("std_error", "extras") if parts.get(key) is not None}
    record = RunRecord(
        "toy", "s" * 8, estimator, "e" * 8, 1, "self", seed, "finished",
        scores_sha256=PENDING, data_sha256="d" * 8, **parts,
    )  # fmt: skip
    values = torch.tensor([[0.1, -0.8, 0.3]])
    RecordStore(root).save(record, InfluenceScores(values, estimator, "self", **scores))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for seed in (0, 1):
        shown = metrics(
            flips=(1.2, 0.7 - seed, 1.7), wide=(0.0, -4.14, 4.14), open=(1.0, 0.5, math.inf)
        )
        save(tmp_path, "fine_paper", seed, metrics=shown)
        save(tmp_path, "sampled", seed, metrics=shown, extras=samples(seed))
        save(
            tmp_path,
            "fine",
            seed,
            std_error=torch.tensor([[0.1, 0.2, math.inf]]),
            extras={"bound": torch.tensor([[0.5, 3.0, 117.0]])},
        )
    save(tmp_path, "bare", 0, extras={"bound": torch.tensor([[0.5, 3.0, 1.0]])})
    return tmp_path


def asked(results: Path, *more: str) -> list[str]:
    return ["--results", str(results), "--task", "toy", *more]


def printed(results: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    assert audit.main(asked(results, *more)) == 0
    return capsys.readouterr().out


def loaded(results: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(printed(results, capsys, *more, "--format", "json"))
    return found


def delta_of(mu: float, epsilon: float) -> float:
    return float(
        norm.cdf(-epsilon / mu + mu / 2) - np.exp(epsilon) * norm.cdf(-epsilon / mu - mu / 2)
    )


def test_a_group_is_bounded_by_the_ends_of_its_interval(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = printed(results, capsys, "--group", "flips", "--alpha", "0.1")
    first, second = shown.split("seed 1")
    assert "group flips of toy, target self, by fine_paper, at 95 % confidence" in first
    assert "seed 0: mu = 1.2 [0.7, 1.7]" in first
    assert "at least: |mu| >= 0.7" in first
    assert "at most: |mu| <= 1.7" in first
    assert "all steps, at most: mu <= 3.4, the farther end times sqrt(4 steps)" in first
    for mu in (0.7, 1.7, 3.4):
        assert f"{delta_of(mu, 1.0):.4e}" in first
        assert f"{norm.cdf(norm.ppf(0.9) - mu):.4g}" in first
        assert f"{norm.cdf(-mu / 2):.4g}" in first
    # seed 1's interval holds 0: nothing is shown for sure, and δ = 0 is not said
    assert "at least: unknown: the interval holds 0" in second
    assert f"{delta_of(1.2, 1.0):.4e}" not in shown  # the estimate bounds nothing


def test_a_wide_interval_around_nothing_bounds_nothing_from_below(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = loaded(results, capsys, "--group", "wide")
    least, most, steps = found["runs"][0]["bounds"]
    assert least["mu"] is None
    assert "holds 0" in least["sentence"]
    assert most["mu"] == 4.14
    assert most["deltas"][3] == pytest.approx(delta_of(4.14, 1.0))
    # μ is 0, so the number of steps is told by another group of the record
    assert "mu <= 8.28 lets delta be 0.99" in steps["sentence"]


def test_an_open_end_is_unknown(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = printed(results, capsys, "--group", "open")
    assert "at least: |mu| >= 0.5" in shown
    assert "at most: unknown: the run's samples leave this end" in shown
    assert "all steps, at most: unknown: there is no farther end to compose" in shown


def test_an_example_is_bounded_by_its_standard_error(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = loaded(results, capsys, "--example", "1")
    least, most, steps = found["runs"][0]["bounds"]
    assert least["mu"] == pytest.approx(0.8 - Z95 * 0.2)
    assert most["mu"] == pytest.approx(0.8 + Z95 * 0.2)
    assert least["epsilon"] < most["epsilon"]
    assert steps["mu"] is None
    assert "compose to mu = 3, an estimate of which no error is known" in steps["sentence"]
    surer = loaded(results, capsys, "--example", "1", "--confidence", "0.99")
    assert surer["runs"][0]["bounds"][0]["mu"] == pytest.approx(0.8 - Z99 * 0.2)
    # 0.1 ± 1.96 · 0.1 holds 0
    held = loaded(results, capsys, "--example", "0")["runs"][0]["bounds"][0]
    assert held["mu"] is None
    never = printed(results, capsys, "--example", "2")
    assert "mu = 0.3, no interval" in never
    assert never.count("unknown: its standard error is infinite") == 4  # two bounds, two seeds
    assert "delta at epsilon" not in never


def test_an_example_that_was_not_watched_has_no_mu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = RunRecord(
        "toy", "s" * 8, "fine", "e" * 8, 1, "self", 0, "finished",
        scores_sha256=PENDING, data_sha256="d" * 8,
    )  # fmt: skip
    scores = InfluenceScores(
        torch.tensor([[0.0, -0.8, 0.0]]), "fine", "self",
        std_error=torch.tensor([[math.inf, 0.2, math.inf]]), watched=torch.tensor([1]),
        extras={"bound": torch.tensor([[0.0, 3.0, 0.0]])},
    )  # fmt: skip
    RecordStore(tmp_path).save(record, scores)
    never = printed(tmp_path, capsys, "--example", "2")
    assert "seed 0: mu cannot be told" in never
    assert never.count("unknown: this run watched 1 examples, and not this one") == 2
    assert "mu = 0" not in never
    assert "seed 0: mu = -0.8 [" in printed(tmp_path, capsys, "--example", "1")


def test_without_a_standard_error_nothing_is_bounded(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = printed(results, capsys, "--example", "1", "--estimator", "bare")
    assert shown.count("unknown: no standard error is stored; mu alone is an estimate") == 2
    assert "delta at epsilon" not in shown


def test_the_samples_give_an_interval_at_any_confidence(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for level in (0.9, 0.99):
        more = ("--group", "flips", "--estimator", "sampled", "--confidence", str(level))
        for seed, run in enumerate(loaded(results, capsys, *more)["runs"]):
            kept = samples(seed)
            p, q = (
                (kept[f"trace/{arm}"][1].double() - kept["trace/auxiliary"][1].double()).numpy()
                for arm in "pq"
            )
            expected = estimate_mu(p, q, "two_stage", level, correlated=True)
            assert run["lower"] == pytest.approx(float(expected.lower))
            assert run["upper"] == pytest.approx(float(expected.upper))
    # of this group no samples were kept
    shown = printed(results, capsys, "--group", "wide", "--confidence", "0.9")
    assert "the record holds an interval of 95 %" in shown
    assert "type --confidence 0.95" in shown


def test_a_bound_that_lets_everything_be_told_says_so(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = Audit({"kind": "group"} | dict.fromkeys(("name", "task", "target", "estimator"), "x"),
                  [Evidence(0, 1.0, 0.5, 4.14, root=28.3)])  # fmt: skip
    least, most, steps = found.bounds(found.evidence[0])
    assert steps.told is None
    assert steps.sentence.startswith("says nothing: mu <= 117.2 lets delta be 1 at epsilon = 8")
    assert least.told is not None
    assert most.told is not None
    # a strong lower bound is no such thing: it says a great deal
    strong = found.bounds(Evidence(0, 50.0, 40.0, 60.0))
    assert strong[0].told is not None
    assert strong[1].told is None
    assert strong[2].sentence == "unknown: the record does not tell the number of steps"
    untold = Audit(found.subject, [Evidence(0, math.nan, -math.inf, math.inf, "no noise")])
    assert "mu cannot be told" in untold.to_text()
    assert "unknown: no noise" in untold.to_text()
    assert json.loads(untold.to_json())["runs"][0]["mu"] is None


@pytest.mark.parametrize("which", [("--group", "flips"), ("--group", "open"), ("--example", "1")])
def test_terminal_markdown_and_json_agree(
    results: Path, which: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(results, capsys, *which)
    page = printed(results, capsys, *which, "--format", "md")
    found = loaded(results, capsys, *which)
    assert len(found["epsilons"]) == len(EPSILONS)
    for run in found["runs"]:
        for bound in run["bounds"]:
            for shown in (text, page):
                assert bound["sentence"] in shown
            for value in bound["deltas"] or []:
                assert f"{value:.4e}" in text
                assert f"| {value:.4e} " in page
            for name in ("type_2", "equal_errors", "epsilon"):
                if bound[name] is not None:
                    assert f"{bound[name]:.4g}" in text
                    assert f"| {bound[name]:.4g} " in page
    numbers = r"\d\.\d{4}e[+-]\d\d"
    assert re.findall(numbers, text) == re.findall(numbers, page)


def test_an_interval_that_cannot_be_computed_again_is_said_to_be_the_records(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may be of before correlated steps were measured; one from samples or an error is not."""
    group = ("--group", "flips")
    for shown in (
        printed(results, capsys, *group),
        printed(results, capsys, *group, "--format", "md"),
    ):
        assert shown.count(AS_STORED) == 2  # once a seed
    notes = [run["note"] for run in loaded(results, capsys, *group)["runs"]]
    assert notes == [AS_STORED] * 2
    for more in ((*group, "--estimator", "sampled"), ("--example", "0")):
        assert all(run["note"] == "" for run in loaded(results, capsys, *more)["runs"])
        assert "note" not in printed(results, capsys, *more)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "toy", "--group", "none"], "there are: flips, open, wide"),
        (["--task", "toy", "--example", "7"], "out of range; the task has 0 … 2"),
        (["--task", "other", "--group", "flips"], "no finished record of fine_paper"),
        (["--task", "toy", "--group", "x", "--estimator", "bare"], "run estimator=fine_paper"),
        (["--task", "toy", "--example", "0", "--estimator", "fine_paper"], "run estimator=fine"),
    ],
)
def test_refusals(
    results: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert audit.main(["--results", str(results), *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("value", ["1", "95", "x", "nan"])
def test_a_confidence_lies_between_0_and_1(
    results: Path, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        audit.main(asked(results, "--example", "1", "--confidence", value))
    assert refused.value.code == 2
    assert "strictly between 0 and 1; type, for instance, 0.95" in capsys.readouterr().err
