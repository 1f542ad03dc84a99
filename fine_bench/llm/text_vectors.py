"""Texts as vectors: the mean of a pretrained network's last hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fine_bench.errors import ConfigError

_TEXTS = 32
LONGEST = 256
"""Tokens of a text that count."""


def text_vectors(texts: Sequence[str], folder: Path) -> NDArray[np.float64]:
    """Mean over a text's tokens of the last hidden states, ``(n, width)``; padding does not count.

    Args:
        texts: of any length; what is beyond 256 tokens is cut off.
        folder: in the hub's format, with weights as safetensors and a tokenizer. Nothing is
            downloaded and no code of the folder is run.

    Raises:
        ConfigError: the extra ``llm`` is not installed, or there is no such network in the folder.
    """
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise ConfigError(
            f"--encoder {folder} needs the package transformers; type: pip install "
            "'fine_bench[llm]'"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except Exception as error:  # the library's many
        raise ConfigError(
            f"--encoder {folder} holds no network in the hub's format ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}); it needs config.json, "
            "model.safetensors and a tokenizer"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    model.eval()
    found = []
    with torch.no_grad():
        for start in range(0, len(texts), _TEXTS):
            batch = tokenizer(
                list(texts[start : start + _TEXTS]), return_tensors="pt", padding=True,
                truncation=True, max_length=LONGEST,
            )  # fmt: skip
            mask = batch["attention_mask"]
            inputs = {"input_ids": batch["input_ids"], "attention_mask": mask}
            hidden = model(**inputs).last_hidden_state.double()
            weight = mask[..., None].double()
            found.append((hidden * weight).sum(1) / weight.sum(1).clamp(min=1))
    return np.asarray(torch.cat(found).numpy(), dtype=np.float64)
