"""What the tests of language tasks share; importing it skips them where the extra is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

pytest.importorskip("transformers", reason="the extra llm is not installed: transformers")
pytest.importorskip("peft", reason="the extra llm is not installed: peft")

from fine_bench import Problem
from fine_bench.gradients.token_losses import mean_token_loss
from fine_bench.llm import hub
from fine_bench.llm.models import Lora, with_lora
from fine_bench.llm.net import CausalNet


def build(folder: Path, *, rank: int = 2, double: bool = True, randomise: bool = True) -> CausalNet:
    """The miniature with LoRA matrices, both of them random: B = 0 would hide mistakes."""
    model = hub.load_model(folder, dtype=torch.float32, four_bit=False, device="cpu")
    net = with_lora(model, Lora(rank, 2 * rank, ("q_proj", "v_proj", "down_proj")), seed=0)
    if double:
        net.double()
    if randomise:
        generator = torch.Generator().manual_seed(1)
        for p in net.trained().values():
            p.data = 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
    return net.eval()


def question(net: CausalNet, data: dict[str, Tensor], target: str, **options: Any) -> Problem:
    queries: Any = "self"
    if target != "self":
        queries = TensorDataset(data["query_x"], data["query_y"])
    return Problem(
        model=net,
        loss=options.pop("loss", mean_token_loss),
        train=TensorDataset(data["x"], data["y"]),
        queries=queries,
        reduce="mean" if target == "validation" else None,
        **options,
    )


def one_at_a_time(net: CausalNet, x: Tensor, y: Tensor, loss: Any = mean_token_loss) -> Tensor:
    """Gradients ``(n, P)`` of each sample alone, without its padding, by plain autograd."""
    rows = []
    for ids, labels in zip(x, y, strict=True):
        length = int((ids >= 0).sum())
        value = loss(net(ids[None, :length]), labels[None, :length])[0]
        grads = torch.autograd.grad(value, list(net.trained().values()))
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)
