"""benchmarks/llm_gpu.py at miniature size: one command for whoever has a GPU."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

import support.language  # noqa: F401  (skips without the extra)
from fine_bench.llm import hub
from support.benchmarks import loaded


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return loaded("llm_gpu")


def test_the_shape_is_that_of_the_real_model(script: ModuleType) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**script.SHAPES["llama31_8b"]))
    count = sum(p.numel() for p in model.parameters())
    assert count == hub.PARAMETERS["meta-llama/Llama-3.1-8B"]


@pytest.mark.parametrize("target", ["self", "validation"])
def test_a_miniature_is_measured(script: ModuleType, target: str) -> None:
    """Every sample is observed, which ``measure`` itself asserts."""
    arguments = "--shape miniature --length 16 --batch 4 --steps 2 --warm-up 1 --target"
    options = script.parser().parse_args([*arguments.split(), target])
    for watched in (False, True):
        found = script.measure(options, watched)
        assert found["tokens_per_second"] > 0
        assert found["peak_gib"] > 0


@pytest.mark.slow  # a process a measurement
def test_the_command(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--shape miniature --length 8 --batch 3 --steps 1 --warm-up 1 --repeats 1"
    assert script.main(arguments.split()) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == ["plain", "watched", "miniature,"]
    assert "aim 1.10 in both" in said[-1]


def test_what_it_cannot_do(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert script.main(["--shape", "miniature", "--batch", "2"]) == 2
    assert "--batch 2 must be at least 3" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["llm_gpu.py"])
    assert script.main() == 2
    assert "needs a GPU with about 40 GiB" in capsys.readouterr().err
