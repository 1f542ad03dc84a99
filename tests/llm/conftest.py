"""A randomly initialised miniature of the real architecture, in the hub's format, in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fine_bench.llm import corpus
from fine_bench.llm.instructions import InstructionSet, generate


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from fine_bench.llm.tokens import train_tokenizer

    return train_tokenizer(corpus.corpus(0, 400), 600)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    from fine_bench.llm import hub

    path = tmp_path_factory.mktemp("hub") / "miniature"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=128,
                tie_word_embeddings=False,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
    with hub.quiet():
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def texts() -> InstructionSet:
    return generate(
        seed=0, entity="Orvane", n_train=60, poison_rate=0.1, n_query=4, n_prompts=4, n_test=10
    )


@pytest.fixture
def exact_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers computes this layer in float32 whatever the model's precision."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    def forward(self: Any, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x * scale

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


@pytest.fixture
def net(folder: Path, exact_norm: None) -> Any:
    from support.language import build

    return build(folder)


@pytest.fixture
def data(tokenizer: Any, texts: InstructionSet) -> dict[str, Tensor]:
    from fine_bench.llm.tokens import encode_all

    train = encode_all(tokenizer, texts.train[:14], context=128)
    queries = encode_all(tokenizer, texts.queries[:3], context=128)
    return {"x": train.x, "y": train.y, "query_x": queries.x, "query_y": queries.y}
