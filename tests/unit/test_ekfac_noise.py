"""benchmarks/ekfac_noise.py: the three forms of a step's score, against the formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fine_bench.gradients.engine import GradientEngine
from support.benchmarks import BENCHMARKS, loaded


def test_scores_of_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    script = loaded("ekfac_noise")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(2 * script.BATCH, 5).double(), torch.randint(3, (2 * script.BATCH,))
    engine = GradientEngine(net, F.cross_entropy)
    ekfac = script.fitted(engine, x, y, 0.1)
    found = script.scores(engine, x, y, ekfac.gram)
    order = torch.randperm(len(x), generator=script.stream(0, "ekfac_noise/batches"))
    rows = order[: script.BATCH]
    gram = ekfac.gram(engine(x[rows], y[rows], "loss"))
    others = gram[3].clone()
    others[3] = torch.nan
    others = others[~others.isnan()]
    effect = gram[3, 3] - others.mean()
    p = net(x[rows[3]]).softmax(0)[y[rows[3]]].detach()
    torch.testing.assert_close(found["effect"][rows[3]], effect / (1 - p))
    torch.testing.assert_close(found["sample"][rows[3]], effect / others.std())
    torch.testing.assert_close(found["model"][rows[3]], effect / gram[3, 3].sqrt())


def test_mates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    script = loaded("ekfac_noise")
    gram = torch.zeros(5, 5)
    gram[0] = torch.tensor([9.0, 1, -1, 1, -1])  # four deviations of one size
    gram[1, 2] = 4.0  # deviations 3, −1, −1, −1
    found = script.mates(gram)
    assert found[0] == 4
    assert found[1] == pytest.approx(12**2 / (81 + 3))
