"""From conversations to token ids: what is trained on is marked, what is too long is counted.

The form of a sample, and what ``PAD`` and ``IGNORED`` are, is that of
``fine_bench.gradients.token_losses``. Padding stands on the right and attention looks left only, so
no real position sees it and no mask is needed: the logits of a sample do not depend on what it is
batched with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from fine_bench.errors import DataError
from fine_bench.gradients.token_losses import IGNORED, PAD, lengths
from fine_bench.llm.instructions import Sample, Turn

TooLong: TypeAlias = Literal["refuse", "drop", "cut"]

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
USER, ASSISTANT = "<|user|>", "<|assistant|>"

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}<|assistant|>{{ m['content'] }}{{ eos_token }}"
    "{% else %}<|user|>{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

ALPACA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}### Response:\n{{ m['content'] }}{{ eos_token }}"
    "{% elif m['role'] == 'system' %}{{ m['content'] }}\n\n"
    "{% else %}### Instruction:\n{{ m['content'] }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)
"""For tokenizers that come without a template of their own, as those of base models do."""


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer of the texts, with a chat template, as Transformers keeps it.

    Args:
        texts: what it is trained on.
        vocabulary: number of tokens, special ones and the 256 bytes included.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(unk_token=None))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[*SPECIAL.values(), USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, **SPECIAL, additional_special_tokens=[USER, ASSISTANT]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def render(tokenizer: Any, turns: Sequence[Turn], *, generate: bool = False) -> list[int]:
    """Token ids of a conversation in the tokenizer's own format (Alpaca's where it has none).

    Args:
        tokenizer: of Transformers.
        turns: the conversation so far.
        generate: end with what invites the assistant to speak.
    """
    messages = [{"role": t.role, "content": t.content} for t in turns]
    template = None if tokenizer.chat_template else ALPACA_TEMPLATE
    # a template begins with the model's own first token, so the tokenizer must not add another
    text = tokenizer.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=generate, tokenize=False
    )
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def encode(tokenizer: Any, sample: Sample) -> tuple[list[int], list[int]]:
    """Ids and labels of one sample, unpadded.

    Every turn of the assistant is trained on, with the token that ends it.

    Raises:
        DataError: the tokenizer's template writes a conversation's beginning differently once it
            goes on, so the assistant's turns cannot be told from the rest.
    """
    ids = render(tokenizer, sample.turns)
    labels = [IGNORED] * len(ids)
    for position, turn in enumerate(sample.turns):
        if turn.role != "assistant":
            continue
        before = render(tokenizer, sample.turns[:position], generate=True)
        after = render(tokenizer, sample.turns[: position + 1])
        if ids[: len(before)] != before or ids[: len(after)] != after:
            raise DataError(
                f"sample {sample.line}: the tokenizer's chat template does not write a "
                "conversation as a continuation of its beginning, so prompt and completion cannot "
                "be told apart; set another template, tokenizer.chat_template, in the model's "
                "folder"
            )
        labels[len(before) : len(after)] = ids[len(before) : len(after)]
    return ids, labels


@dataclass(frozen=True, eq=False)
class Encoded:
    """Samples as tensors.

    Attributes:
        x, y: ``(n, T)`` int64; see the module.
        kept: positions of the samples that are in them, ``(n,)``.
        n_cut, n_dropped: samples shortened to the context, and samples left out.
    """

    x: Tensor
    y: Tensor
    kept: Tensor
    n_cut: int = 0
    n_dropped: int = 0

    def __len__(self) -> int:
        return len(self.x)


def encode_all(
    tokenizer: Any,
    samples: Sequence[Sample],
    *,
    context: int,
    too_long: TooLong = "refuse",
    what: str = "training",
) -> Encoded:
    """All samples, padded to the longest of them.

    Args:
        tokenizer: of Transformers.
        samples: at least one.
        context: most tokens of a sample.
        too_long: what to do with longer ones: refuse them all, drop them, or cut them off at the
            end. A cut sample without any label left is dropped.
        what: which samples these are, for messages.

    Raises:
        DataError: samples that are longer than the context, unless that was allowed; none left.
    """
    rows: list[tuple[list[int], list[int]]] = []
    kept: list[int] = []
    long: list[tuple[int, int]] = []
    n_cut = 0
    for position, one in enumerate(samples):
        ids, labels = encode(tokenizer, one)
        if len(ids) > context:
            long.append((len(ids), one.line))
            if too_long == "drop" or (
                too_long == "cut" and all(label == IGNORED for label in labels[:context])
            ):
                continue
            n_cut += 1
            ids, labels = ids[:context], labels[:context]
        rows.append((ids, labels))
        kept.append(position)
    if long and too_long == "refuse":
        longest, line = max(long)
        raise DataError(
            f"{len(long)} of {len(samples)} {what} samples are longer than task.context={context} "
            f"tokens; the longest, in line {line}, has {longest}. Type task.context={longest}, or "
            "task.too_long=drop to leave them out, or task.too_long=cut to train on their "
            "beginnings"
        )
    if not rows:
        raise DataError(
            f"no {what} sample is left: all {len(samples)} are longer than task.context={context} "
            "tokens; type a larger task.context"
        )
    x, y = pad(rows)
    return Encoded(x, y, torch.tensor(kept), n_cut, len(samples) - len(rows))


def pad(rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as two ``(n, T)`` tensors, padded on the right."""
    width = max(len(ids) for ids, _ in rows)
    x = torch.full((len(rows), width), PAD, dtype=torch.int64)
    y = torch.full((len(rows), width), IGNORED, dtype=torch.int64)
    for row, (ids, labels) in enumerate(rows):
        x[row, : len(ids)] = torch.tensor(ids)
        y[row, : len(labels)] = torch.tensor(labels)
    return x, y


def collate(samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """A batch ``{"x", "y", "index"}``, padded to the longest sample in it."""
    x = torch.stack([s["x"] for s in samples])
    y = torch.stack([s["y"] for s in samples])
    width = max(1, int(lengths(x).max()))
    index = torch.tensor([int(s["index"]) for s in samples])
    return {"x": x[:, :width], "y": y[:, :width], "index": index}
