"""Texts as vectors of a network in the hub's format, made here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from fine_bench.errors import ConfigError
from fine_bench.runner.clean.features import features
from fine_bench.runner.clean.inputs.recognise import load

transformers = pytest.importorskip("transformers", reason="the extra llm is not installed")
tokenizers = pytest.importorskip("tokenizers")

from fine_bench.llm.text_vectors import LONGEST, text_vectors  # noqa: E402

WORDS = ["[PAD]", "[UNK]", "a", "good", "poor", "film", "seen"]
TEXTS = ["a good film", "poor", "a film seen a film seen good poor", "a good film"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers with random weights, and a tokenizer of seven words."""
    place = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    model = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=LONGEST,
        )
    )  # fmt: skip
    model.save_pretrained(place)
    plain = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: k for k, w in enumerate(WORDS)}, unk_token="[UNK]")
    )
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="[UNK]", pad_token="[PAD]"
    )
    fast.save_pretrained(place)
    return place


def test_a_vector_is_the_mean_over_tokens_and_padding_changes_nothing(folder: Path) -> None:
    found = text_vectors(TEXTS, folder)
    assert found.shape == (4, 16)
    model = transformers.AutoModel.from_pretrained(folder)
    model.eval()
    for text, vector in zip(TEXTS, found, strict=True):
        ids = torch.tensor([[WORDS.index(word) for word in text.split()]])
        with torch.no_grad():
            twin = model(input_ids=ids).last_hidden_state[0].double().mean(0)
        assert vector == pytest.approx(twin.numpy(), abs=1e-5)
    assert found[0] == pytest.approx(found[3])
    long = text_vectors(["good " * 2 * LONGEST], folder)
    assert np.isfinite(long).all()


def test_clean_takes_such_a_folder(folder: Path) -> None:
    table = pd.DataFrame({"text": TEXTS * 4, "label": [0, 1, 0, 1] * 4})
    x = features(load(table, kind="text", text="text"), encoder=str(folder))
    assert x.shape == (16, 16)
    assert x.double().mean(0).numpy() == pytest.approx(0.0, abs=1e-6)


def test_folders_without_a_network_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no network in the hub's format"):
        text_vectors(["a"], tmp_path)
    table = pd.DataFrame({"text": TEXTS * 4, "label": [0, 1, 0, 1] * 4})
    items = load(table, kind="text", text="text")
    with pytest.raises(ConfigError, match="which needs the package sentence_transformers"):
        features(items, encoder="no-folder-here")
