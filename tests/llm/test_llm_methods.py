"""Every method on LoRA matrices and token sequences against its formula, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from baselines.datainf import DataInf
from baselines.gradient_similarity import GradCos
from baselines.influence_functions import InfluenceFunction
from baselines.less import LESS
from baselines.sequence_ekfac import SequenceEKFAC
from baselines.sequence_trak import SequenceTRAK
from baselines.text_controls import BM25, Length, Perplexity, RepresentationSimilarity
from baselines.tracin import TracIn
from fine_bench import Checkpoint, replay
from fine_bench.gradients.adam import AdamCheckpoint, adam_direction
from fine_bench.gradients.cache import GradientMemory
from fine_bench.gradients.token_losses import IGNORED, PAD, mean_token_loss, negative_token_margin
from fine_bench.llm.net import CausalNet
from fine_bench.types import UnsupportedProblemError
from support.language import one_at_a_time, question

BETAS, EPSILON = (0.8, 0.95), 1e-3


@pytest.fixture
def checkpoints(net: CausalNet) -> list[AdamCheckpoint]:
    """Two checkpoints with different parameters, moments of their size, and step counts."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for step, scale, lr in ((3, 1.0, 0.2), (7, 0.6, 0.05)):
        params = {name: scale * p.detach().clone() for name, p in net.trained().items()}
        mean = {
            n: 0.02 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
            for n, p in params.items()
        }
        square = {
            n: 1e-3 * torch.rand(p.shape, generator=generator, dtype=p.dtype)
            for n, p in params.items()
        }
        found.append(
            AdamCheckpoint(
                params,
                lr,
                step,
                mean=mean,
                square=square,
                betas=BETAS,
                epsilon=EPSILON,
                updates=step,
            )
        )
    return found


def at(net: CausalNet, checkpoint: Checkpoint, data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Gradients of training samples and queries, one at a time."""
    net.load_state_dict(dict(checkpoint.params))
    return (
        one_at_a_time(net, data["x"], data["y"]),
        one_at_a_time(net, data["query_x"], data["query_y"]),
    )


def close(actual: Tensor, expected: Tensor) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(actual.double(), expected, rtol=1e-7, atol=1e-9 * scale)


def less_directly(
    net: CausalNet, found: list[AdamCheckpoint], data: dict[str, Tensor], project: Any
) -> Tensor:
    """LESS with Adam's step written out parameter by parameter, as the optimiser does it."""
    total = torch.zeros(len(data["query_x"]), len(data["x"]), dtype=torch.float64)
    for checkpoint in found:
        train, queries = at(net, checkpoint, data)
        m = torch.cat([v.flatten() for v in checkpoint.mean.values()])
        v = torch.cat([v.flatten() for v in checkpoint.square.values()])
        t = checkpoint.updates + 1
        steps = []
        for g in train:
            m1 = (BETAS[0] * m + (1 - BETAS[0]) * g) / (1 - BETAS[0] ** t)
            v1 = (BETAS[1] * v + (1 - BETAS[1]) * g * g) / (1 - BETAS[1] ** t)
            steps.append(m1 / (v1.sqrt() + EPSILON))
        a, b = project(queries), project(torch.stack(steps))
        for q in range(len(a)):
            for i in range(len(b)):
                total[q, i] += checkpoint.lr * (a[q] @ b[i]) / (a[q].norm() * b[i].norm())
    return total


def test_less(net: CausalNet, data: dict[str, Tensor], checkpoints: list[AdamCheckpoint]) -> None:
    expected = less_directly(net, checkpoints, data, lambda rows: rows)
    method = LESS(projection=None)
    found = replay(method, question(net, data, "queries"), checkpoints)
    close(found.values, expected)
    assert found.extras["preconditioned"].tolist() == [True, True]
    assert method.gradient_evaluations == 2 * (14 + 3)
    mean = replay(LESS(projection=None), question(net, data, "validation"), checkpoints)
    close(mean.values, expected.mean(0, keepdim=True))
    weighted = replay(
        LESS(projection=None, query_weighting="noise"),
        question(net, data, "validation"),
        checkpoints[:1],
    )
    one = less_directly(net, checkpoints[:1], data, lambda rows: rows) / checkpoints[0].lr
    weights = 1 / one.std(1, keepdim=True) / len(one)
    close(weighted.values, checkpoints[0].lr * (weights * one).sum(0, keepdim=True))


def test_less_projects_queries_and_steps_by_the_same_matrix(
    net: CausalNet, data: dict[str, Tensor], checkpoints: list[AdamCheckpoint]
) -> None:
    from fine_bench.gradients import GradientEngine
    from fine_bench.gradients.projection.random import make_projection, projection_matrix

    engine = GradientEngine(net, mean_token_loss)
    p = projection_matrix(make_projection("rademacher", 24, 3), engine(data["x"], data["y"]))
    engine.close()
    expected = less_directly(net, checkpoints, data, lambda rows: rows @ p)
    found = replay(
        LESS("rademacher", 24, seed=3), question(net, data, "queries"), checkpoints
    ).values
    close(found, expected)
    pieces = question(net, data, "queries", batch_size=5)
    close(replay(LESS("rademacher", 24, seed=3), pieces, checkpoints).values, expected)


def test_less_without_adam(
    net: CausalNet, data: dict[str, Tensor], checkpoints: list[AdamCheckpoint]
) -> None:
    plain = [Checkpoint(c.params, c.lr, c.step) for c in checkpoints]
    expected = torch.zeros(3, 14, dtype=torch.float64)
    for c in plain:
        train, queries = at(net, c, data)
        expected += c.lr * nn.functional.cosine_similarity(queries[:, None], train[None], dim=2)
    found = replay(LESS(projection=None), question(net, data, "queries"), plain)
    close(found.values, expected)
    assert found.extras["preconditioned"].tolist() == [False, False]
    with pytest.raises(UnsupportedProblemError, match=r"no state of Adam.*adam=False"):
        replay(LESS(projection=None, adam=True), question(net, data, "queries"), plain)
    with pytest.raises(UnsupportedProblemError, match="queries from elsewhere"):
        replay(LESS(), question(net, data, "self"), plain)
    with pytest.raises(ValueError, match="projection must be"):
        LESS(projection="factorized")  # type: ignore[arg-type]
    first = next(iter(checkpoints[0].mean))
    part = AdamCheckpoint(
        checkpoints[0].params,
        0.1,
        mean={first: checkpoints[0].mean[first]},
        square={first: checkpoints[0].square[first]},
    )
    with pytest.raises(ValueError, match="no Adam state of"):
        replay(LESS(projection=None), question(net, data, "queries"), [part])


def test_the_adam_direction_is_the_optimisers_step() -> None:
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(5, generator=generator, dtype=torch.float64))
    optimizer = torch.optim.AdamW([p], lr=0.1, betas=BETAS, eps=EPSILON, weight_decay=0.0)
    for _ in range(4):
        p.grad = torch.randn(5, generator=generator, dtype=torch.float64)
        optimizer.step()
    state = {k: v.clone() for k, v in optimizer.state[p].items()}
    before = p.detach().clone()
    g = torch.randn(5, generator=generator, dtype=torch.float64)
    p.grad = g.clone()
    optimizer.step()
    direction = adam_direction(
        g[None],
        state["exp_avg"],
        state["exp_avg_sq"],
        betas=BETAS,
        epsilon=EPSILON,
        updates=int(state["step"]),
    )
    torch.testing.assert_close(before - 0.1 * direction[0], p.detach())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": {}}, "same parameters"),
        ({"square": {"w": torch.ones(3)}}, "shape of that parameter"),
        ({"betas": (1.0, 0.9)}, "betas must lie"),
        ({"epsilon": 0.0}, "epsilon must be"),
        ({"updates": 0}, "updates must be"),
    ],
)
def test_a_bad_adam_checkpoint_is_refused(change: dict[str, Any], message: str) -> None:
    options = {"mean": {"w": torch.zeros(2)}, "square": {"w": torch.ones(2)}}
    with pytest.raises(ValueError, match=message):
        AdamCheckpoint({"w": torch.zeros(2)}, 0.1, **{**options, **change})


def layers(net: CausalNet) -> list[slice]:
    """Columns of each LoRA matrix."""
    found, start = [], 0
    for p in net.trained().values():
        found.append(slice(start, start + p.numel()))
        start += p.numel()
    return found


def datainf_directly(
    train: Tensor, queries: Tensor, columns: list[slice], damping: float | None
) -> tuple[Tensor, list[float]]:
    """The mean of explicit inverses, layer by layer."""
    total = torch.zeros(len(queries), len(train), dtype=torch.float64)
    used = []
    for part in columns:
        g, v = train[:, part], queries[:, part]
        lam = 0.1 * float(g.square().mean()) if damping is None else damping
        used.append(lam)
        eye = torch.eye(g.shape[1], dtype=torch.float64)
        inverses = [torch.linalg.inv(torch.outer(gj, gj) + lam * eye) for gj in g]
        total += v @ torch.stack(inverses).mean(0) @ g.T
    return total, used


@pytest.mark.parametrize("damping", [None, 0.3])
def test_datainf(
    net: CausalNet,
    data: dict[str, Tensor],
    checkpoints: list[AdamCheckpoint],
    damping: float | None,
) -> None:
    train, queries = at(net, checkpoints[-1], data)
    expected, used = datainf_directly(train, queries, layers(net), damping)
    found = replay(DataInf(damping), question(net, data, "queries"), checkpoints)
    close(found.values, expected)
    torch.testing.assert_close(
        found.extras["damping"], torch.tensor(used, dtype=torch.float64), rtol=1e-9, atol=0
    )
    pieces = question(net, data, "queries", batch_size=2)
    close(replay(DataInf(damping), pieces, checkpoints).values, expected)
    own = datainf_directly(train, train, layers(net), damping)[0].diagonal()[None]
    close(replay(DataInf(damping), question(net, data, "self"), checkpoints).values, own)
    for weighting, weights in (
        (None, torch.ones(3, dtype=torch.float64)),
        ("norm", 1 / queries.norm(dim=1)),
        ("noise", 1 / expected.std(1)),
    ):
        mean = replay(
            DataInf(damping, query_weighting=weighting),  # type: ignore[arg-type]
            question(net, data, "validation"),
            checkpoints,
        )
        close(mean.values, (weights[:, None] * expected).mean(0, keepdim=True))


def test_datainf_computes_again_what_it_cannot_hold(
    net: CausalNet,
    data: dict[str, Tensor],
    checkpoints: list[AdamCheckpoint],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for target in ("queries", "self"):
        held = DataInf()
        expected = replay(held, question(net, data, target), checkpoints).values
        with monkeypatch.context() as patch:
            patch.setattr("baselines.datainf.HELD_FLOATS", 10)
            again = DataInf()
            close(replay(again, question(net, data, target), checkpoints).values, expected)
        assert again.gradient_evaluations > held.gradient_evaluations


def test_datainf_refuses_what_has_no_scale(
    net: CausalNet, data: dict[str, Tensor], checkpoints: list[AdamCheckpoint]
) -> None:
    for options in ({"damping": 0.0}, {"relative_damping": -1.0}):
        with pytest.raises(ValueError, match="finite number > 0"):
            DataInf(**options)
    nothing = {**data, "y": torch.full_like(data["y"], IGNORED)}
    with pytest.raises(ValueError, match=r"all training gradients of layer .* are zero"):
        replay(DataInf(), question(net, nothing, "queries"), checkpoints)


def test_tracin_gradcos_and_influence_functions(
    net: CausalNet, data: dict[str, Tensor], checkpoints: list[AdamCheckpoint]
) -> None:
    tracin = torch.zeros(3, 14, dtype=torch.float64)
    for c in checkpoints:
        train, queries = at(net, c, data)
        tracin += c.lr * queries @ train.T
    cosine = nn.functional.cosine_similarity(queries[:, None], train[None], dim=2)
    fisher = train.T @ train / len(train) + 0.2 * torch.eye(train.shape[1], dtype=torch.float64)
    exact = queries @ torch.linalg.solve(fisher, train.T)
    for method, expected in (
        (TracIn(), tracin),
        (GradCos(), cosine),
        (
            InfluenceFunction(solver="exact", curvature="empirical_fisher", damping=0.2),
            exact,
        ),
    ):
        close(replay(method, question(net, data, "queries"), checkpoints).values, expected)


def test_ekfac_of_sequences(
    net: CausalNet, data: dict[str, Tensor], checkpoints: list[AdamCheckpoint]
) -> None:
    """Layer by layer from explicit matrices: factors, their eigenvectors, second moments."""
    from fine_bench.gradients import FactorBlock, GradientEngine

    train, queries = at(net, checkpoints[-1], data)
    engine = GradientEngine(net, mean_token_loss)
    blocks = engine(data["x"], data["y"]).blocks
    engine.close()
    expected = torch.zeros(3, 14, dtype=torch.float64)
    for block, part in zip(blocks, layers(net), strict=True):
        assert isinstance(block, FactorBlock)
        a, b = block.a.flatten(0, 1), block.b.flatten(0, 1)
        q_a, q_b = torch.linalg.eigh(a.T @ a)[1], torch.linalg.eigh(b.T @ b)[1]
        basis = torch.kron(q_b, q_a)  # row-major [W]
        turned = train[:, part] @ basis
        s = turned.square().mean(0)
        lam = 0.1 * float(s.mean())
        expected += (queries[:, part] @ basis / (s + lam)) @ turned.T
    found = replay(
        InfluenceFunction(solver="ekfac", curvature="empirical_fisher"),
        question(net, data, "queries"),
        checkpoints,
    ).values
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def test_ekfac_of_sequences_without_their_padding(
    net: CausalNet, data: dict[str, Tensor], checkpoints: list[AdamCheckpoint]
) -> None:
    """Layer by layer, the factors from one sample at a time; more padding changes nothing."""
    from fine_bench.gradients import FactorBlock, GradientEngine

    train, queries = at(net, checkpoints[-1], data)
    engine = GradientEngine(net, mean_token_loss)
    inner, outer = [0.0] * 12, [0.0] * 12
    for ids, labels in zip(data["x"], data["y"], strict=True):
        n = int((ids != PAD).sum())
        for k, block in enumerate(engine(ids[None, :n], labels[None, :n]).blocks):
            assert isinstance(block, FactorBlock)
            inner[k] = inner[k] + block.a[0].T @ block.a[0]
            outer[k] = outer[k] + block.b[0].T @ block.b[0]
    engine.close()
    expected = torch.zeros(3, 14, dtype=torch.float64)
    for a, b, part in zip(inner, outer, layers(net), strict=True):
        basis = torch.kron(torch.linalg.eigh(b)[1], torch.linalg.eigh(a)[1])
        turned = train[:, part] @ basis
        s = turned.square().mean(0)
        expected += (queries[:, part] @ basis / (s + 0.1 * float(s.mean()))) @ turned.T
    wide = {
        name: nn.functional.pad(value, (0, 7), value=PAD if name.endswith("x") else IGNORED)
        for name, value in data.items()
    }
    for given, size in ((data, 64), (data, 5), (wide, 5)):
        asked = question(net, given, "queries", batch_size=size)
        found = replay(SequenceEKFAC(), asked, checkpoints).values
        scale = float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("target", ["self", "queries", "validation"])
@pytest.mark.parametrize("weighting", [None, "norm", "noise"])
def test_held_ekfac_is_the_general_one(
    net: CausalNet,
    data: dict[str, Tensor],
    checkpoints: list[AdamCheckpoint],
    target: str,
    weighting: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The numbers of ``InfluenceFunction`` without padding, which it is where it holds nothing."""
    size = int((data["x"] != PAD).sum(1).min())
    for which in ("", "query_"):
        x = data[f"{which}x"][:, :size]
        full = torch.where(torch.arange(size) < 4, IGNORED, x)
        data = {**data, f"{which}x": x, f"{which}y": full}
    general = InfluenceFunction(
        solver="ekfac", curvature="empirical_fisher", damping=0.01, query_weighting=weighting
    )
    expected = replay(general, question(net, data, target, batch_size=5), checkpoints)
    held = SequenceEKFAC(damping=0.01, query_weighting=weighting)
    found = replay(held, question(net, data, target, batch_size=5), checkpoints)
    assert held.held
    close(found.values, expected.values)
    assert torch.equal(found.extras["damping"], expected.extras["damping"])
    net.memory = GradientMemory()
    again = replay(held, question(net, data, target, batch_size=5), checkpoints)
    close(again.values, expected.values)
    monkeypatch.setattr("baselines.sequence_ekfac.HELD_FLOATS", 10)
    plain = replay(held, question(net, data, target, batch_size=5), checkpoints)
    assert not held.held
    assert torch.equal(plain.values, expected.values)


def test_trak_of_sequences(
    net: CausalNet, data: dict[str, Tensor], checkpoints: list[AdamCheckpoint]
) -> None:
    kernel, residual = torch.zeros(3, 14, dtype=torch.float64), torch.zeros(14).double()
    for c in checkpoints:
        net.load_state_dict(dict(c.params))
        phi = one_at_a_time(net, data["x"], data["y"], negative_token_margin)
        phi_q = one_at_a_time(net, data["query_x"], data["query_y"], negative_token_margin)
        gram = phi.T @ phi + 0.5 * torch.eye(phi.shape[1], dtype=torch.float64)
        kernel += phi_q @ torch.linalg.solve(gram, phi.T) / 2
        for i, (ids, labels) in enumerate(zip(data["x"], data["y"], strict=True)):
            n = int((ids != PAD).sum())
            p = torch.softmax(net(ids[None, :n])[0].detach(), 1)
            chosen = [float(p[t - 1, labels[t]]) for t in range(1, n) if labels[t] != IGNORED]
            residual[i] += sum(1 - value for value in chosen) / len(chosen) / 2
    method = SequenceTRAK(ridge=0.5)
    found = replay(method, question(net, data, "queries"), checkpoints)
    close(found.values, kernel * residual)
    for option, message in (
        ({}, "ridge > 0"),
        ({"projection": "rademacher", "dim": 500}, "singular"),
    ):
        with pytest.raises(UnsupportedProblemError, match=message):
            replay(SequenceTRAK(**option), question(net, data, "queries"), checkpoints)


def test_controls(
    net: CausalNet, data: dict[str, Tensor], checkpoints: list[AdamCheckpoint]
) -> None:
    x, y = data["x"], data["y"]
    own = question(net, data, "self", batch_size=4)
    length = replay(Length(), own, checkpoints).values[0]
    assert length.tolist() == [int((row != IGNORED).sum()) for row in y]
    with net.untuned(), torch.no_grad():
        expected = mean_token_loss(net(x), y).exp()
    found = replay(Perplexity(), own, checkpoints).values[0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    net.load_state_dict(dict(checkpoints[-1].params))
    states = []
    for ids in (*data["query_x"], *x):
        n = int((ids != PAD).sum())
        with torch.no_grad():
            states.append(net.hidden(ids[None, :n])[0].mean(0))
    h = torch.stack(states)
    expected = nn.functional.cosine_similarity(h[:3, None], h[None, 3:], dim=2)
    asked = question(net, data, "queries", batch_size=4)
    found = replay(RepresentationSimilarity(), asked, checkpoints).values
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    for method in (BM25(), RepresentationSimilarity(), LESS()):
        with pytest.raises(UnsupportedProblemError, match="elsewhere"):
            replay(method, own, checkpoints)
    for part in ("prompt", "completion"):
        values = replay(RepresentationSimilarity(part), asked, checkpoints).values
        assert not torch.allclose(values.double(), expected, atol=1e-4)
    for kind in (BM25, RepresentationSimilarity):
        with pytest.raises(ValueError, match="part must be"):
            kind(part="words")
    with pytest.raises(ValueError, match="k1 must be"):
        BM25(k1=-1.0)


@pytest.mark.parametrize("part", ["all", "prompt", "completion"])
def test_bm25_counts_words(
    net: CausalNet, data: dict[str, Tensor], checkpoints: list[AdamCheckpoint], part: str
) -> None:
    from math import log

    def words(ids: Tensor, labels: Tensor) -> list[int]:
        return [
            int(w)
            for w, label in zip(ids, labels, strict=True)
            if w != PAD and (part == "all" or (label != IGNORED) == (part == "completion"))
        ]

    texts = [words(*pair) for pair in zip(data["x"], data["y"], strict=True)]
    mean = sum(map(len, texts)) / len(texts)
    expected = torch.zeros(3, 14, dtype=torch.float64)
    for q, pair in enumerate(zip(data["query_x"], data["query_y"], strict=True)):
        for w in set(words(*pair)):
            n_w = sum(w in text for text in texts)
            rarity = log(1 + (len(texts) - n_w + 0.5) / (n_w + 0.5))
            for i, text in enumerate(texts):
                tf = text.count(w)
                norm = 1.2 * (1 - 0.6 + 0.6 * len(text) / mean)
                expected[q, i] += rarity * tf * 2.2 / (tf + norm)
    found = replay(
        BM25(part, k1=1.2, b=0.6),  # type: ignore[arg-type]
        question(net, data, "queries", batch_size=4),
        checkpoints,
    ).values
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_methods_of_sequences_refuse_classes() -> None:
    from torch.utils.data import TensorDataset

    from fine_bench import Problem

    classes = TensorDataset(torch.randn(6, 4), torch.arange(6) % 2)
    for method, target in (
        (Length(), "self"),
        (Perplexity(), "self"),
        (BM25(), classes),
        (SequenceTRAK(ridge=1.0), classes),
    ):
        problem = Problem(nn.Linear(4, 2), nn.functional.cross_entropy, classes, target)
        reason = method.unsupported(problem)
        assert reason is not None
        assert "token ids" in reason
    problem = Problem(nn.Linear(4, 2), nn.functional.cross_entropy, classes, classes)
    assert "hidden(x)" in str(RepresentationSimilarity().unsupported(problem))
