"""All ways of summing one trajectory, against the formulas written out."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from fine_bench.fine.accumulator import FineAccumulator
from fine_bench.fine.effects import direction_effects

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "summation_forms.py"
spec = importlib.util.spec_from_file_location("summation_forms", SCRIPT)
assert spec is not None
assert spec.loader is not None
summation_forms = importlib.util.module_from_spec(spec)
spec.loader.exec_module(summation_forms)
FormSums, set_row = summation_forms.FormSums, summation_forms.set_row


def test_every_form_against_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    n, m, steps = 7, 4, 5
    sums = FormSums(2, n)
    seen: list[list[tuple[np.ndarray, np.ndarray, np.ndarray, float, float]]] = [
        [] for _ in range(n)
    ]
    for t in range(steps):
        index = torch.randperm(n, generator=generator)[:m]
        c, centred = (torch.randn(2, m, generator=generator) for _ in range(2))
        sigma = torch.rand(2, m, generator=generator) + 0.1
        w, v = 0.5 + t, 0.3 * t + 0.1
        sums.visit(index, c, centred, sigma, w, v)
        for k, i in enumerate(index.tolist()):
            seen[i].append(
                (c[:, k].double().numpy(), centred[:, k].double().numpy(),
                 sigma[:, k].double().numpy(), w, v)
            )  # fmt: skip
    scores = sums.scores(scale=0.7)
    for i in range(n):
        if not seen[i]:
            continue
        raw = sum(w * c for c, _, _, w, _ in seen[i])
        weighted = sum(w * c / s for c, _, s, w, _ in seen[i])
        z = sum(d / s for _, d, s, _, _ in seen[i]) / np.sqrt(len(seen[i]))
        shift = sum(w * d for _, d, _, w, _ in seen[i])
        noise = np.sqrt(sum(v * s**2 for _, _, s, _, v in seen[i]))
        np.testing.assert_allclose(scores["raw"][:, i], raw, rtol=1e-12)
        np.testing.assert_allclose(scores["weighted"][:, i], weighted, rtol=1e-12)
        np.testing.assert_allclose(scores["standardised"][:, i], z, rtol=1e-12)
        np.testing.assert_allclose(scores["accumulated"][:, i], 0.7 * shift / noise, rtol=1e-12)


@pytest.mark.parametrize("composition", ["accumulated", "standardised"])
def test_in_batch_it_is_fine(composition: str) -> None:
    generator = torch.Generator().manual_seed(1)
    n, m = 9, 4
    fine = FineAccumulator(n, 1, composition)  # type: ignore[arg-type]
    sums = FormSums(1, n)
    for t in range(12):
        index = torch.randperm(n, generator=generator)[:m]
        c = torch.randn(1, m, generator=generator)
        effect, sigma = direction_effects(c)
        lr = 0.1 / (1 + t)
        fine.observe(index, effect, sigma, lr)
        sums.visit(index, c, effect, sigma, lr, lr**2)
    theirs = sums.scores(scale=n**-0.5)[composition]  # type: ignore[index]
    if composition == "standardised":
        theirs = theirs * m**-0.5
    torch.testing.assert_close(
        fine.scores("fine", "validation").values, theirs.float(), rtol=1e-6, atol=1e-7
    )


def test_whitened_takes_the_noise_of_the_geometry() -> None:
    sums = FormSums(1, 2)
    index, one = torch.tensor([1, 0]), torch.ones(1, 2)
    k = torch.tensor([[4.0, 9.0]])
    sums.visit(index, k, one, one, 0.5, 0.2, k.sqrt())
    sums.visit(index, 2 * k, one, one, 0.25, 0.3, (2 * k).sqrt())
    assert sums.scores(3.0)["whitened"][0].tolist() == pytest.approx(
        [3 * (0.5 * x + 0.25 * 2 * x) / np.sqrt(0.2 * x + 0.3 * 2 * x) for x in (9.0, 4.0)]
    )
    assert "whitened" not in FormSums(1, 2).scores(1.0)


def test_without_noise_nothing_is_added_and_nobody_divides_by_zero() -> None:
    sums = FormSums(1, 3)
    one = torch.ones(1, 2)
    sums.visit(torch.tensor([0, 1]), one, one, torch.tensor([[0.0, 2.0]]), 1.0, 1.0)
    scores = sums.scores(1.0)
    assert scores["weighted"].tolist() == [[0.0, 0.5, 0.0]]
    assert scores["accumulated"].tolist() == [[0.0, 0.5, 0.0]]
    assert scores["raw"].tolist() == [[1.0, 1.0, 0.0]]


def test_the_row_of_a_set() -> None:
    c = torch.tensor([[1.0, 3.0], [10.0, 20.0], [7.0, 7.0]])
    sigma = torch.tensor([1.0, 10.0, 0.0])
    assert set_row(c, sigma, weighted=False).tolist() == [[6.0, 10.0]]
    torch.testing.assert_close(set_row(c, sigma, weighted=True), torch.tensor([[2 / 3, 5 / 3]]))
