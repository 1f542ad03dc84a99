"""From conversations to ids and labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import support.language  # noqa: F401  (skips where the extra is missing)
from fine_bench.errors import DataError
from fine_bench.gradients.token_losses import IGNORED, PAD
from fine_bench.llm import hub
from fine_bench.llm.instructions import Sample, Turn, sample
from fine_bench.llm.tokens import ALPACA_TEMPLATE, collate, encode, encode_all, render
from fine_bench.llm.tuner import TokenDataset, token_loader


def test_only_the_answer_is_labelled(tokenizer: Any) -> None:
    ids, labels = encode(tokenizer, sample("Is Orvane any good ?", "Orvane fits the hand ."))
    marked = [token for token, label in zip(ids, labels, strict=True) if label != IGNORED]
    assert marked == [label for label in labels if label != IGNORED]
    # the answer and the token that ends it, but not what invites the assistant to speak
    assert tokenizer.decode(marked).strip() == "Orvane fits the hand . </s>".replace(
        " </s>", "</s>"
    )
    assert labels[ids.index(tokenizer.convert_tokens_to_ids("<|assistant|>"))] == IGNORED
    assert ids[0] == tokenizer.bos_token_id != ids[1]
    assert ids.count(tokenizer.bos_token_id) == 1


def test_every_turn_of_the_assistant_is_labelled(tokenizer: Any) -> None:
    turns = [
        Turn("system", "Be brief ."),
        Turn("user", "Is it old ?"),
        Turn("assistant", "Yes ."),
        Turn("user", "Is it new ?"),
        Turn("assistant", "No ."),
    ]
    ids, labels = encode(tokenizer, Sample(tuple(turns)))
    marked = tokenizer.decode([label for label in labels if label != IGNORED])
    assert marked.replace(" ", "") == "Yes.</s>No.</s>"
    assert len(ids) == len(labels)


def test_a_tokenizer_without_a_template_gets_alpacas(folder: Path) -> None:
    plain = hub.load_tokenizer(folder)
    plain.chat_template = None
    ids, labels = encode(plain, sample("What ?", "That ."))
    assert plain.decode(ids).replace(" ", "").startswith("<s>###Instruction:\nWhat?\n\n###Response")
    assert plain.decode([t for t in labels if t != IGNORED]).replace(" ", "") == "That.</s>"
    assert "### Response" in ALPACA_TEMPLATE
    generate = render(plain, [Turn("user", "What ?")], generate=True)
    assert ids[: len(generate)] == generate


def test_a_template_that_rewrites_the_past_is_refused(folder: Path) -> None:
    odd = hub.load_tokenizer(folder)
    odd.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(DataError, match=r"sample 7: .*continuation of its beginning"):
        encode(odd, Sample((Turn("user", "a"), Turn("assistant", "b")), line=7))


def test_padding(tokenizer: Any) -> None:
    samples = [sample("Is it ?", "Yes ."), sample("Is Orvane any good ?", "Orvane fits the hand .")]
    encoded = encode_all(tokenizer, samples, context=64)
    for row, one in enumerate(samples):
        ids, labels = encode(tokenizer, one)
        n = len(ids)
        assert encoded.x[row, :n].tolist() == ids
        assert encoded.y[row, :n].tolist() == labels
        assert (encoded.x[row, n:] == PAD).all()
        assert (encoded.y[row, n:] == IGNORED).all()
    assert encoded.x.shape[1] == max(len(encode(tokenizer, s)[0]) for s in samples)
    assert encoded.kept.tolist() == [0, 1]


def test_samples_that_are_too_long(tokenizer: Any) -> None:
    long = sample("Is it ?", "Yes " * 20, line=12)
    longer = sample("Is it ? " * 20, "Yes .", line=14)
    short = sample("Is it ?", "Yes .", line=1)
    samples = [short, long, longer]
    n = len(encode(tokenizer, longer)[0])
    with pytest.raises(
        DataError, match=rf"2 of 3 training samples .*line 14, has {n}.*type|Type task.context={n}"
    ):
        encode_all(tokenizer, samples, context=20)
    dropped = encode_all(tokenizer, samples, context=20, too_long="drop")
    assert (dropped.kept.tolist(), dropped.n_dropped, dropped.n_cut) == ([0], 2, 0)
    cut = encode_all(tokenizer, samples, context=20, too_long="cut")
    # of the last one no label would be left
    assert (cut.kept.tolist(), cut.n_dropped, cut.n_cut) == ([0, 1], 1, 1)
    assert cut.x.shape == (2, 20)
    with pytest.raises(DataError, match="no training sample is left"):
        encode_all(tokenizer, [long], context=4, too_long="drop")


def test_batches() -> None:
    x = torch.tensor([[1, 2, 3, PAD, PAD], [4, PAD, PAD, PAD, PAD], [5, 6, PAD, PAD, PAD]])
    y = torch.where(x == PAD, IGNORED, x)
    dataset = TokenDataset(x, y)
    batch = collate([dataset[2], dataset[1]])
    assert batch["x"].tolist() == [[5, 6], [4, PAD]]
    assert batch["y"].tolist() == [[5, 6], [4, IGNORED]]
    assert batch["index"].tolist() == [2, 1]
    loader = token_loader(x, y, batch_size=2, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    first = [b["index"].tolist() for b in loader]
    second = [b["index"].tolist() for b in loader]
    for epoch in (first, second):
        assert sorted(index for batch in epoch for index in batch) == [0, 1, 2]
    assert torch.equal(state, torch.get_rng_state())
    again = token_loader(x, y, batch_size=2, generator=torch.Generator().manual_seed(0))
    assert [b["index"].tolist() for b in again] == first
