"""The tiny Llama: pretrained once on the generated corpus, then read from the cache."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fine_bench.data.downloads import cache_directory
from fine_bench.errors import ConfigError, DataError
from fine_bench.llm import corpus, hub
from fine_bench.llm.tokens import train_tokenizer
from fine_bench.models.lr_schedule import cosine
from fine_bench.seeds import derive, stream
from fine_bench.store.digest import digest

VERSION = 1
"""Raised when the same options may give other weights."""

BLOCK = 64
"""Tokens in a row of a pretraining batch."""

WARM_UP = 50
TOKENIZER_DOCUMENTS = 2000


@dataclass(frozen=True)
class Tiny:
    """Size and pretraining of the tiny Llama; see ``fine_bench.llm.models.tiny_llama``."""

    hidden: int = 64
    inner: int = 160
    layers: int = 2
    heads: int = 4
    vocabulary: int = 1024
    documents: int = 20_000
    steps: int = 1500
    batch: int = 24
    lr: float = 6e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("hidden", 2),
            ("inner", 1),
            ("layers", 1),
            ("heads", 1),
            ("vocabulary", 300),
            ("documents", 100),
            ("steps", 1),
            ("batch", 1),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if value < least:
                raise ConfigError(f"model: {name}={value} must be at least {least}")
        if self.hidden % (2 * self.heads):
            raise ConfigError(
                f"model.hidden={self.hidden} must be a multiple of twice model.heads={self.heads}; "
                f"type model.hidden={2 * self.heads * max(1, self.hidden // (2 * self.heads))}"
            )
        if not 0 < self.lr < float("inf"):
            raise ConfigError(f"model.pretraining_lr={self.lr} must be a positive number")


def place(tiny: Tiny, cache: Path | None = None) -> Path:
    """Where the pretrained model lies, or will lie.

    Args:
        tiny: what it is.
        cache: folder of the cache; None for the user's.
    """
    root = cache if cache is not None else cache_directory() / "llm"
    return root / f"tiny-llama-{digest(_options(tiny))[:16]}"


def _options(tiny: Tiny) -> dict[str, Any]:
    return {**asdict(tiny), "corpus": corpus.VERSION, "version": VERSION}


def digest_of(tiny: Tiny, cache: Path | None = None) -> str:
    """SHA-256 of the pretrained weights; empty while there are none.

    The same options give other bits on another kind of processor.
    """
    folder = place(tiny, cache)
    state = hashlib.sha256()
    try:
        for path in sorted(folder.glob("*.safetensors")):
            state.update(path.read_bytes())
    except OSError as error:
        raise DataError(f"the pretrained model in {folder} cannot be read: {error}") from error
    return state.hexdigest() if (folder / "config.json").is_file() else ""


def tokenizer_of(tiny: Tiny, cache: Path | None = None) -> Any:
    """The tokenizer alone, without pretraining anything: it takes a second or two."""
    folder = place(tiny, cache)
    if (folder / "config.json").is_file():
        return hub.load_tokenizer(folder)
    documents = corpus.corpus(tiny.seed, min(TOKENIZER_DOCUMENTS, tiny.documents))
    return train_tokenizer(documents, tiny.vocabulary)


def folder_of(tiny: Tiny, cache: Path | None = None) -> Path:
    """The pretrained model's folder; made the first time, whole or not at all."""
    final = place(tiny, cache)
    if (final / "config.json").is_file():
        return final
    temporary = final.with_name(f"{final.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise DataError(
            f"the pretrained model cannot be kept in {final.parent} ({error.strerror}); make it "
            "writable, or name another cache with the environment variable XDG_CACHE_HOME"
        ) from error
    try:
        model, tokenizer, facts = pretrain(tiny)
        with hub.quiet():
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        (temporary / "pretraining.json").write_text(
            json.dumps({**_options(tiny), **facts}, indent=1)
        )
        # another process may have been faster: its model is the same
        if not final.exists():
            temporary.rename(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def pretrain(tiny: Tiny) -> tuple[Any, Any, dict[str, float]]:
    """Model, tokenizer and the last training loss (nats a token)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    documents = corpus.corpus(tiny.seed, tiny.documents)
    tokenizer = tokenizer_of(tiny)
    stream_of_ids = _ids(tokenizer, documents)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=tiny.hidden,
        intermediate_size=tiny.inner,
        num_hidden_layers=tiny.layers,
        num_attention_heads=tiny.heads,
        num_key_value_heads=tiny.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(derive(tiny.seed, "llm/pretraining/initialisation"))
        model = LlamaForCausalLM(config)
    loss = _fit(model, stream_of_ids, tiny)
    return model.eval(), tokenizer, {"loss": loss, "tokens": float(len(stream_of_ids))}


def _ids(tokenizer: Any, documents: list[str]) -> Tensor:
    """All documents in a row, each between the tokens for beginning and end."""
    rows = tokenizer(documents, add_special_tokens=False)["input_ids"]
    first, last = tokenizer.bos_token_id, tokenizer.eos_token_id
    return torch.tensor([token for row in rows for token in (first, *row, last)])


def _fit(model: Any, ids: Tensor, tiny: Tiny) -> float:
    generator = stream(tiny.seed, "llm/pretraining/order")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=tiny.lr, betas=(0.9, 0.95), weight_decay=0.01
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda t: min(1.0, (t + 1) / WARM_UP) * cosine(t, tiny.steps),
    )
    average = 0.0
    model.train()
    for step in range(tiny.steps):
        starts = torch.randint(len(ids) - BLOCK - 1, (tiny.batch,), generator=generator)
        rows = ids[starts[:, None] + torch.arange(BLOCK + 1)]
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        scheduler.step()
        average = loss.item() if step == 0 else 0.98 * average + 0.02 * loss.item()
    if not math.isfinite(average):
        raise ConfigError(
            f"pretraining diverged at model.pretraining_lr={tiny.lr}; type "
            f"model.pretraining_lr={tiny.lr / 4:g}"
        )
    return average
