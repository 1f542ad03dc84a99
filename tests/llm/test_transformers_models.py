"""Models of Transformers at random initialisation, in anybody's training, without a word more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fine_bench.callback import FINECallback
from support.runs import check_engine, check_run, fit

transformers = pytest.importorskip("transformers")

N, BATCH, T, CLASSES = 12, 6, 6, 3  # T = BATCH
SIZES: dict[str, Any] = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "num_labels": CLASSES,
}
TOKENS: dict[str, Any] = {"vocab_size": 30, "max_position_embeddings": 16}
IMAGES: dict[str, Any] = {"image_size": 8, "patch_size": 4, "num_channels": 1}


class Logits(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(x).logits
        return logits


def bert(drop: float) -> nn.Module:
    both = {"hidden_dropout_prob": drop, "attention_probs_dropout_prob": drop}
    config = transformers.BertConfig(**SIZES, **TOKENS, **both)
    return transformers.BertForSequenceClassification(config)


def distilbert(drop: float) -> nn.Module:
    sizes = {"dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 12, "num_labels": CLASSES}
    drops = {"dropout": drop, "attention_dropout": drop, "seq_classif_dropout": drop}
    config = transformers.DistilBertConfig(**sizes, **TOKENS, **drops)
    return transformers.DistilBertForSequenceClassification(config)


def gpt2(drop: float) -> nn.Module:
    sizes = {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_inner": 12, "num_labels": CLASSES}
    drops = {"resid_pdrop": drop, "embd_pdrop": drop, "attn_pdrop": drop}
    tokens = {"vocab_size": 30, "n_positions": 16, "pad_token_id": 0}
    config = transformers.GPT2Config(**sizes, **tokens, **drops)
    return transformers.GPT2ForSequenceClassification(config)


def vit(drop: float) -> nn.Module:
    both = {"hidden_dropout_prob": drop, "attention_probs_dropout_prob": drop}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, **IMAGES, **both))


MODELS: dict[str, Callable[[float], nn.Module]] = {
    "BERT": bert,
    "DistilBERT": distilbert,
    "GPT-2": gpt2,
    "ViT": vit,
}


def build(name: str, drop: float = 0.0, n: int = N) -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Logits(MODELS[name](drop)).double()
        images = torch.randn(n, 1, 8, 8).double()
        x = images if name == "ViT" else torch.randint(1, 30, (n, T))
        return net, x, torch.arange(n) % CLASSES


@pytest.mark.any_trainer("BERT, DistilBERT, GPT-2, ViT of Transformers")
@pytest.mark.parametrize("name", MODELS)
def test_a_run(name: str) -> None:
    check_run(lambda: build(name), batch=BATCH, epochs=1)


@pytest.mark.any_trainer("BERT, DistilBERT, GPT-2, ViT of Transformers")
@pytest.mark.parametrize("name", MODELS)
def test_a_run_with_dropout(name: str) -> None:
    """As they are, with nothing but ``FINECallback()``."""
    net, x, y = build(name, drop=0.1)
    watched, (again, _, _) = FINECallback(), build(name, drop=0.1)
    torch.manual_seed(1)
    fit(net, x, y, F.cross_entropy, [watched], batch=5, epochs=1)
    assert float(watched.scores().values.std()) > 0
    torch.manual_seed(1)
    fit(again, x, y, F.cross_entropy, [], batch=5, epochs=1)
    for p, q in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.any_trainer("BERT, DistilBERT, GPT-2, ViT of Transformers")
@pytest.mark.parametrize("name", MODELS)
def test_the_engine(name: str) -> None:
    net, x, y = build(name, n=T)
    net.eval()
    engine = check_engine((net, x, y))
    assert name == "ViT" or not engine.recorder.leftover
    assert not engine.in_full


@pytest.mark.any_trainer("BERT, DistilBERT, GPT-2, ViT of Transformers")
@pytest.mark.parametrize("name", MODELS)
def test_other_questions(name: str) -> None:
    net, x, y = build(name)
    queries = TensorDataset(x[:T], y[:T])
    watched = [
        FINECallback("validation", queries=queries),
        FINECallback(schedule="snapshot"),
        FINECallback(sketch=2),
    ]
    if name in ("BERT", "GPT-2"):
        watched.append(FINECallback(geometry="ekfac", noise="model"))
    fit(net, x, y, F.cross_entropy, watched, batch=BATCH, epochs=1)
    for callback in watched:
        assert float(callback.scores().values.std()) > 0
