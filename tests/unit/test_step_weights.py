"""benchmarks/step_weights.py: its forms are those of the accumulator, and by hand."""

from __future__ import annotations

import math
from types import ModuleType

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
