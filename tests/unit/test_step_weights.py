"""benchmarks/step_weights.py: its forms are those of the accumulator, and by hand."""

from __future__ import annotations

import math
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from fine_bench.fine.accumulator import FineAccumulator
from fine_bench.fine.effects import margin_effects
from support.benchmarks import BENCHMARKS, loaded


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return loaded("step_weights")


def drawn(n: int, m: int, n_steps: int) -> list[dict[str, torch.Tensor]]:
    """Steps as a run would show them, each example once an epoch."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for step in range(n_steps):
        if step % (n // m) == 0:
            order = torch.randperm(n, generator=generator)
        start = step % (n // m) * m
        complement = torch.rand(m, generator=generator, dtype=torch.float64) * 0.9 + 0.05
        found.append(
            {
                "index": order[start : start + m],
                "effect": torch.randn(m, generator=generator, dtype=torch.float64),
                "sigma": torch.rand(m, generator=generator, dtype=torch.float64) + 0.1,
                "complement": complement,
                "lr": torch.full((m,), 0.1 / (1 + step), dtype=torch.float64),
                "uncertainty": complement.mean().expand(m),
            }
        )
    return found


def joined(steps: list[dict[str, torch.Tensor]]) -> dict[str, np.ndarray]:
    return {name: torch.cat([s[name] for s in steps]).double().numpy() for name in steps[0]}


@pytest.mark.parametrize(
    ("name", "margin", "weighted"),
    [
        ("accumulated, margin, η u (`fine`)", True, True),
        ("accumulated, margin, η (`fine_plain`)", True, False),
        ("accumulated, loss, η (`fine_loss`)", False, False),
        ("standardised, η u^1", True, True),  # ``fine_weighted``
    ],
)
def test_the_callback_s_own_forms(
    script: ModuleType, name: str, margin: bool, weighted: bool
) -> None:
    n, m = 12, 4
    steps = drawn(n, m, 9)
    accumulator = FineAccumulator(n, 1, "weighted" if "standardised" in name else "accumulated")
    for s in steps:
        w = float(s["lr"][0]) * (float(s["uncertainty"][0]) if weighted else 1.0)
        effects = margin_effects(s["effect"], s["sigma"], s["complement"] if margin else None)
        accumulator.observe(s["index"], *effects, w)
    expected = accumulator.mu()[0][0].numpy() * math.sqrt(n)  # a constant that ranks do not see
    np.testing.assert_allclose(script.forms(joined(steps), n)[name], expected, rtol=1e-9)


def test_standardised_drops_scales_and_weighs_by_uncertainty(script: ModuleType) -> None:
    steps = drawn(8, 4, 6)
    found = script.forms(joined(steps), 8)["standardised, u^2"]
    numerator, squares = np.zeros(8), np.zeros(8)
    for s in steps:
        for i, e, sigma in zip(s["index"], s["effect"], s["sigma"], strict=True):
            w = float(s["uncertainty"][0]) ** 2
            numerator[i] += w * e / sigma
            squares[i] += w * w
    np.testing.assert_allclose(found, numerator / np.sqrt(squares), rtol=1e-12)
    for s in steps:  # another scale of each step
        s["effect"], s["sigma"] = 7 * s["effect"], 7 * s["sigma"]
    again = script.forms(joined(steps), 8)
    np.testing.assert_allclose(again["standardised, u^2"], found, rtol=1e-12)


def test_an_example_without_noise_or_never_seen_adds_nothing(script: ModuleType) -> None:
    steps = drawn(8, 4, 1)
    steps[0]["sigma"][1] = 0.0
    found = script.forms(joined(steps), 8)
    silent = [int(steps[0]["index"][1]), *sorted({*range(8)} - set(steps[0]["index"].tolist()))]
    for name, values in found.items():
        assert np.isfinite(values).all(), name
        assert (values[silent] == 0).all(), name


def test_both_parts_of_mu_by_hand(script: ModuleType) -> None:
    steps = joined(drawn(12, 4, 9))
    steps |= {"batch": np.full(36, 4.0), "momentum": np.full(36, 0.5)}
    effect, noise = script.effect_and_noise(steps, 12)
    for i in range(12):
        of = [t for t in range(36) if steps["index"][t] == i]
        rate = [steps["lr"][t] / 0.5 / 4 / steps["complement"][t] for t in of]
        assert effect[i] == pytest.approx(
            sum(r * steps["effect"][t] for r, t in zip(rate, of, strict=True))
        )
        square = sum((r * steps["sigma"][t]) ** 2 for r, t in zip(rate, of, strict=True))
        assert noise[i] == pytest.approx(math.sqrt(12 * square))
    plain = script.forms(steps, 12)["accumulated, margin, η (`fine_plain`)"]
    np.testing.assert_allclose(effect / noise, plain / math.sqrt(12))
    assert script.slope(np.array([1.0, 2.0]), np.array([2.0, 4.0])) == pytest.approx(2.0)
    margins = np.array([[0.0, 1.0], [2.0, 1.0], [1.0, 1.0]])
    np.testing.assert_allclose(script.spread_between(margins) ** 2, [4.0 / 6.0, 2.0 / 6.0])


def test_page_of_both_parts(script: ModuleType) -> None:
    steps = joined(drawn(12, 4, 9)) | {"batch": np.full(36, 4.0), "momentum": np.zeros(36)}
    effect, noise = script.effect_and_noise(steps, 12)
    half = SimpleNamespace(mu_margin=0.5 * effect / noise, effect_margin=0.25 * effect, ceiling=1.0)
    truth = SimpleNamespace(development=half, n_train=12)
    line = script.parts(truth, [steps], np.empty((0, 12)))
    assert [line[k] for k in ("effect", "noise", "mu")] == pytest.approx([0.25, 0.5, 0.5])
    assert line["fidelity"] == pytest.approx(1.0)
    page = script.parts_page({"mnist_mlp": line})
    assert "(n = 1) | 0.250 | 0.500 | 0.50 | – | 1.000 / – |" in page
    runs = np.random.default_rng(0).normal(size=(3, 12))
    line = script.parts(truth, [steps], runs)
    between = script.spread_between(runs)
    assert line["true effect over it"] == pytest.approx(
        script.slope(half.effect_margin / between, half.mu_margin)
    )
    assert "(of 3 runs)" in script.parts_page({"mnist_mlp": line})
