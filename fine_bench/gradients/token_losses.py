"""Sequences of tokens as a problem: padded ids in, one number a sequence out.

A sample is a pair of rows of integers, T of them:

    x   the token ids, padded on the right by ``PAD`` = −1, which is no token
    y   the same ids where something is trained on, ``IGNORED`` = −100 elsewhere

y_t is the token at position t; it is predicted from the positions before it, by the logits at
t − 1. The mean and the sum of a sample's losses over its n_i labelled tokens are

    mean_token_loss   ℓ_i = −(1/n_i) Σ_t log p(y_it | x_i,<t)
    sum_token_loss    ℓ_i = −Σ_t log p(y_it | x_i,<t)

and a batch's training loss is the mean of the ℓ_i: every *sample* counts the same. (The loss of
Transformers is the mean over the tokens of a batch, in which the weight of a sample depends on the
others.) Logits may have fewer columns than y where a model left out columns of padding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fine_bench.gradients.margin import negative_margin, one_minus_probability
from fine_bench.types import UnsupportedProblemError

PAD = -1
"""Stands in x where a row has no token. Not a token id: it does not matter whether a model has a
padding token."""

IGNORED = -100
"""Stands in y where nothing is trained on: prompts and padding."""


def lengths(x: Tensor) -> Tensor:
    """Number of tokens of each row of x, ``(B,)``."""
    return (x != PAD).sum(1)


def trimmed(x: Tensor) -> Tensor:
    """x without the columns in which every row is padding; at least one column."""
    return x[:, : max(1, int(lengths(x).max()))]


def targets(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and the tokens that they predict, ``(B, T − 1, V)`` and ``(B, T − 1)``.

    Logits of half precision are turned to float32: their differences matter.

    Raises:
        UnsupportedProblemError: logits or labels are not those of sequences.
    """
    if logits.ndim != 3 or y.ndim != 2:
        raise UnsupportedProblemError(
            "needs token sequences: logits (batch, length, vocabulary) and labels (batch, length), "
            f"got {tuple(logits.shape)} and {tuple(y.shape)}"
        )
    z = logits[:, :-1]
    if z.dtype in (torch.bfloat16, torch.float16):
        z = z.float()
    return z, y[:, 1 : logits.shape[1]].to(z.device)


def token_losses(logits: Tensor, y: Tensor) -> Tensor:
    """−log p of every labelled token, zero elsewhere, ``(B, T − 1)``."""
    z, target = targets(logits, y)
    # one row a token: with the vocabulary in the middle it takes three times as long on a CPU
    losses = F.cross_entropy(
        z.flatten(0, 1), target.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view(target.shape)


def sum_token_loss(logits: Tensor, y: Tensor, reduction: str = "none") -> Tensor:
    """The sum over each sample's labelled tokens, ``(B,)``; over samples the mean of that."""
    return _reduced(token_losses(logits, y).sum(1), reduction)


def mean_token_loss(logits: Tensor, y: Tensor, reduction: str = "none") -> Tensor:
    """The mean over each sample's labelled tokens, ``(B,)``; its mean over samples for ``"mean"``.

    A sample without any labelled token has the loss 0.
    """
    return _reduced(_mean(token_losses(logits, y), logits, y), reduction)


def negative_token_margin(logits: Tensor, y: Tensor, reduction: str = "none") -> Tensor:
    """Mean over each sample's labelled tokens of −log(p/(1 − p)), ``(B,)``; no cancellation."""
    z, target = targets(logits, y)
    values = torch.where(target != IGNORED, negative_margin(z, target.clamp_min(0)), 0.0)
    return _reduced(_mean(values, logits, y), reduction)


def mean_complement(logits: Tensor, y: Tensor) -> Tensor:
    """Mean over each sample's labelled tokens of 1 − p, ``(B,)``, without cancellation."""
    z, target = targets(logits, y)
    complement = one_minus_probability(z, target.clamp_min(0))
    return _mean(torch.where(target != IGNORED, complement, 0.0), logits, y)


def is_sequence_problem(x: Tensor, y: Tensor) -> bool:
    """Whether a batch is one of token sequences."""
    return (
        x.ndim == 2 and x.shape == y.shape and not (x.is_floating_point() or y.is_floating_point())
    )


def _mean(values: Tensor, logits: Tensor, y: Tensor) -> Tensor:
    """Sums over positions divided by the number of labelled tokens."""
    counted = (targets(logits, y)[1] != IGNORED).sum(1)
    return values.sum(1) / counted.clamp_min(1)


def labelled_positions(y: Tensor) -> tuple[Tensor, Tensor]:
    """Where labelled tokens are predicted, ``(B, K + 1)``, and the labels beside them.

    K is the largest number of labels of a row. The labels are those of a sequence of K + 1 tokens,
    the first of which nothing predicts; rows with fewer labels are filled by ``IGNORED``. The last
    position stands for the logits behind the last token, at which nobody looks.
    """
    marked = y[:, 1:] != IGNORED
    size = max(1, int(marked.sum(1).max()))
    positions = (~marked).long().argsort(dim=1, stable=True)[:, :size]
    labels = torch.where(marked.gather(1, positions), y[:, 1:].gather(1, positions), IGNORED)
    # what fills a row up must stand in front of its padding, which the model leaves out
    positions = torch.where(labels == IGNORED, 0, positions)
    return F.pad(positions, (0, 1)), F.pad(labels, (1, 0), value=IGNORED)


def _reduced(values: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return values
    if reduction == "mean":
        return values.mean()
    raise ValueError(f'reduction must be "none" or "mean", got {reduction!r}')
