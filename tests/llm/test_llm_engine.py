"""The engine of token sequences: labelled positions only, by length, in full, remembered."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from baselines.controls import MeanTrainingLoss
from baselines.gradient_similarity import GradCos
from baselines.sequence_trak import SequenceTRAK
from baselines.tracin import TracIn
from fine_bench import Checkpoint, replay
from fine_bench.gradients import DenseBlock, FactorBlock, GradientEngine
from fine_bench.gradients.cache import GradientMemory, engine_of, fingerprint
from fine_bench.gradients.per_example import PerExampleGradients
from fine_bench.gradients.token_losses import (
    IGNORED,
    PAD,
    labelled_positions,
    mean_complement,
    mean_token_loss,
    negative_token_margin,
    sum_token_loss,
)
from fine_bench.llm import engine as module
from fine_bench.llm.engine import SequenceEngine
from fine_bench.llm.net import CausalNet
from fine_bench.types import UnsupportedProblemError
from support.language import build, one_at_a_time, question

LOSSES = (mean_token_loss, sum_token_loss, negative_token_margin)


def close(actual: Tensor, expected: Tensor) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11 * scale)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dense", [True, False])
def test_gradients_are_those_of_each_sample_alone(
    net: CausalNet, data: dict[str, Tensor], loss: Any, dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE", 3)
    engine = SequenceEngine(net, loss, dense=dense, complement=True)
    found = engine(data["x"], data["y"])
    engine.close()
    assert all(isinstance(b, DenseBlock if dense else FactorBlock) for b in found.blocks)
    close(found.dense(), one_at_a_time(net, data["x"], data["y"], loss))
    with torch.no_grad():
        logits = net(data["x"])
    assert found.loss is not None
    assert found.one_minus_p is not None
    close(found.loss, loss(logits, data["y"]))
    close(found.one_minus_p, mean_complement(logits, data["y"]))


def test_labelled_logits_have_every_loss(net: CausalNet, data: dict[str, Tensor]) -> None:
    """Rows with labels in several places, in the last column, and without any."""
    x, y = data["x"][:5].clone(), data["y"][:5].clone()
    y[0, 4:7] = x[0, 4:7]
    y[1] = IGNORED
    y[2, : int((x[2] != PAD).sum())] = x[2, : int((x[2] != PAD).sum())]
    with torch.no_grad():
        few, labels = net.labelled(x, y)
        logits = net(x)
        for loss in (*LOSSES, mean_complement):
            close(loss(few, labels), loss(logits, y))
    k = int((y[:, 1:] != IGNORED).sum(1).max())
    assert few.shape == (5, k + 1, logits.shape[2])
    positions, _ = labelled_positions(y)
    assert int(positions.max()) < logits.shape[1]


def test_a_model_that_does_not_name_its_last_layer(
    net: CausalNet, data: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    few, _ = net.labelled(data["x"], data["y"])
    monkeypatch.setattr(type(net.model), "get_output_embeddings", lambda self: None, raising=False)
    again, _ = net.labelled(data["x"], data["y"])
    close(again, few)


def test_large_models_keep_factors(
    net: CausalNet, data: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DENSE_PARAMETERS", 10)
    net.memory = GradientMemory()
    engine = engine_of(net, mean_token_loss)
    assert isinstance(engine, SequenceEngine)
    assert all(isinstance(b, FactorBlock) for b in engine(data["x"], data["y"]).blocks)
    assert len(net.memory) == 0
    with pytest.raises(UnsupportedProblemError, match="no margin"):
        engine(data["x"], data["y"], "margin")


def test_other_models_have_the_general_engine() -> None:
    engine = engine_of(nn.Linear(2, 2), nn.functional.cross_entropy)
    assert type(engine) is GradientEngine


def checkpoints(net: CausalNet) -> list[Checkpoint]:
    return [
        Checkpoint({n: s * p.detach().clone() for n, p in net.trained().items()}, lr)
        for s, lr in ((1.0, 0.2), (0.6, 0.05))
    ]


@pytest.mark.parametrize("target", ["self", "validation", "queries"])
def test_a_memory_changes_no_score(
    net: CausalNet, data: dict[str, Tensor], target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the reference examples are asked for in one batch and the others are not."""
    monkeypatch.setattr(module, "CHUNK", 4)
    found = checkpoints(net)
    methods: list[Any] = [
        lambda: TracIn(query_weighting="noise"),
        lambda: SequenceTRAK("rademacher", 6, query_weighting="noise"),
    ]
    methods += [] if target == "self" else [lambda: GradCos(query_weighting="noise")]
    expected = [replay(m(), question(net, data, target, batch_size=4), found) for m in methods]
    net.memory = GradientMemory()
    for _ in range(2):
        for make, before in zip(methods, expected, strict=True):
            method = make()
            asked = question(net, data, target, batch_size=4)
            close(replay(method, asked, found).values, before.values)
            assert method.model.memory is net.memory
    pieces = 4 + (target != "self")  # 14 samples in fours, and the queries
    # the loss and the margin at two checkpoints
    assert len(net.memory) == 2 * 2 * pieces
    assert net.memory.saved > 0


def test_what_is_remembered_depends_on_everything(net: CausalNet, data: dict[str, Tensor]) -> None:
    net.memory = GradientMemory()
    x, y = data["x"][:4], data["y"][:4]
    layer = next(iter(SequenceEngine(net, mean_token_loss).recorder.layers))

    def asked(model: CausalNet, loss: Any = mean_token_loss, **options: Any) -> Tensor:
        engine = SequenceEngine(model, loss, **options)
        try:
            return engine(x, y).dense()
        finally:
            engine.close()

    first = asked(net)
    assert len(net.memory) == 1
    assert torch.equal(asked(copy.deepcopy(net)), first)
    assert len(net.memory) == 1
    asked(net, sum_token_loss)
    asked(net, layers=[layer])
    asked(net, complement=True)
    assert asked(copy.deepcopy(net).float()).dtype == torch.float32
    with torch.no_grad():
        next(iter(net.trained().values())).mul_(1.5)
    changed = asked(net)
    assert not torch.allclose(changed, first)
    assert len(net.memory) == 6
    y = torch.where(y == int(y.max()), IGNORED, y)
    asked(net)
    assert len(net.memory) == 7


def test_the_longest_unused_goes_first() -> None:
    def gradients(value: float) -> PerExampleGradients:
        return PerExampleGradients([DenseBlock("w", torch.full((2, 8), value))])

    memory = GradientMemory(n_bytes=128)  # two of them
    for key in "ab":
        memory(key, lambda: gradients(1.0))
    memory("a", lambda: pytest.fail("it is held"))
    memory("c", lambda: gradients(2.0))
    assert len(memory) == 2
    again = memory("b", lambda: gradients(3.0))
    assert float(again.dense()[0, 0]) == 3.0
    big = PerExampleGradients([DenseBlock("w", torch.zeros(2, 100))])
    assert memory("d", lambda: big) is big
    assert len(memory) == 2
    with pytest.raises(ValueError, match="n_bytes must be at least 0"):
        GradientMemory(-1)


def test_a_fingerprint_tells_types_and_shapes_apart() -> None:
    zeros = [torch.zeros(4), torch.zeros(2, 2), torch.zeros(4, dtype=torch.int32), torch.ones(4)]
    found = {fingerprint([value]) for value in zeros}
    assert len(found | {fingerprint([zeros[0]], "further")}) == 5
    assert fingerprint([torch.arange(6).view(2, 3).T]) == fingerprint(
        [torch.arange(6).view(2, 3).T.contiguous()]
    )
    half = torch.ones(3, dtype=torch.bfloat16)
    assert fingerprint([half]) != fingerprint([half.half()])


def test_mean_loss_of_labelled_tokens(net: CausalNet, data: dict[str, Tensor]) -> None:
    found = checkpoints(net)
    expected = torch.zeros(len(data["x"])).double()
    for c in found:
        net.load_state_dict(dict(c.params))
        with torch.no_grad():
            expected += mean_token_loss(net(data["x"]), data["y"]) / 2
    close(replay(MeanTrainingLoss(), question(net, data, "self"), found).values[0], expected)


def test_padding_changes_nothing(folder: Path, exact_norm: None, data: dict[str, Tensor]) -> None:
    """More padding, other company: the same gradients in float64."""
    net = build(folder)
    wide_x = nn.functional.pad(data["x"], (0, 9), value=PAD)
    wide_y = nn.functional.pad(data["y"], (0, 9), value=IGNORED)
    engine = SequenceEngine(net, mean_token_loss)
    close(engine(wide_x, wide_y).dense(), engine(data["x"], data["y"]).dense())
    close(engine(wide_x[2:3], wide_y[2:3]).dense(), engine(data["x"], data["y"]).dense()[2:3])
