"""Whether a training mixes examples before the model sees them: mixup, CutMix and their kin.

Row i of such a batch is a mixture, λ x_i + (1 − λ) x_j or pieces of both, and so is its label. The
loss is still one number a row, but a row is no example. It shows in what the model is given, beside
the examples themselves; where hidden layers are mixed, in the labels that the loss was taken of.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 32
"""Rows that are looked at."""

PIECE = 16
"""Numbers that a piece of another example has at least."""

FREE_FORM = 16
"""Numbers an example from which on a fit with three free coefficients says something."""


def mixed_inputs(given: Tensor, examples: Tensor) -> bool:
    """Whether rows are made of two examples.

    Args:
        given: what the model was given, ``(m, …)``.
        examples: the examples, same shape.

    A row is, if it is none but x_i + b (x_j − x_i) up to rounding, or (after a normalisation)
    a x_i + b x_j + c, or equal to x_i in some places and to x_j in all others.
    """
    u, v = given.double().flatten(1).cpu(), examples.double().flatten(1).cpu()
    m, size = u.shape
    if u.shape != v.shape or m < 2 or size < 3:
        return False
    rounding = 1e-5 if given.element_size() >= 4 else 1e-2
    scale = float(v.abs().mean())
    rows = [i for i in range(min(m, ROWS)) if _differ(u[i], v[i], rounding * scale)]
    hits = sum(_is_mixture(u[i], v, i, rounding, scale) for i in rows)
    return hits >= max(2, min(m, ROWS) // 4) or (m < 4 and hits >= 1)


def _differ(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool(((a - b).abs() > tolerance).any())


def _is_mixture(u: Tensor, v: Tensor, i: int, rounding: float, scale: float) -> bool:
    others = torch.cat([v[:i], v[i + 1 :]])
    moved = u - v[i]
    # x_i + b (x_j − x_i), where x_j itself is no mixture; a multiple of x_i, such as zeros, tells
    # nothing, since a model may scale its inputs
    along = (others @ v[i] / v[i].square().sum().clamp_min(1e-300))[:, None] * v[i]
    apart = (others - along).square().sum(1) > 1e-4 * others.square().sum(1)
    error, b, _ = _best_fit(moved, (others - v[i]) * apart[:, None])
    if error <= rounding**2 * float(moved.square().sum()) and 0.01 < b < 0.99:
        return True
    # pieces
    there = moved.abs() > rounding * scale
    if PIECE <= int(there.sum()) < len(u):
        pieces = others[:, there]
        equal = ((pieces - u[there]).abs() <= rounding * scale).all(1)
        if bool((equal & (pieces.std(1) > rounding * scale)).any()):
            return True
    if len(u) < FREE_FORM:
        return False
    # a x_i + b x_j + c: without what x_i and a constant explain
    basis = torch.linalg.qr(torch.stack([v[i], torch.ones_like(u)], 1)).Q
    left = u - basis @ (basis.T @ u)
    own = float((u - u.mean()).square().sum())
    if float(left.square().sum()) <= 1e-4 * own:
        return False
    rest = others - (others @ basis) @ basis.T
    error, b, j = _best_fit(left, rest)
    own_part = basis.T @ (u - b * others[j])  # nothing of x_i in it: the rows are shuffled
    kept = basis.T @ v[i]
    return error <= max(1e-6, rounding**2) * own and bool(
        (own_part @ kept).abs() > 0.01 * kept.square().sum()
    )


def _best_fit(target: Tensor, columns: Tensor) -> tuple[float, float, int]:
    """The least Σ (target − b column)² over columns and b, its b and column."""
    norms = columns.square().sum(1)
    b = torch.where(norms > 0, columns @ target / norms.clamp_min(1e-300), 0.0)
    errors = (target - b[:, None] * columns).square().sum(1)
    best = int(errors.argmin())
    return float(errors[best]), float(b[best]), best


def mixed_labels(logits: Tensor, grad: Tensor, labels: Tensor) -> bool:
    """Whether the softmax cross-entropy was taken of mixtures of the batch's labels.

    The gradient at the logits is p − q for a label distribution q. Mixtures have q in two classes,
    of which the second one is not told by the first (which excludes fixed distributions), and is
    another than the model's own favourite (which excludes bootstrapping); distillation and label
    smoothing fill all classes.

    Args:
        logits, grad: ``(m, classes)``, of each example's own loss; at least three classes.
        labels: of the batch, ``(m,)``.
    """
    if logits.ndim != 2 or logits.shape != grad.shape or logits.shape[1] < 3:
        return False
    p = torch.softmax(logits.double().cpu(), 1)
    q = p - grad.double().cpu()
    if labels.shape != (len(q),) or not bool(torch.isfinite(q).all()):
        return False
    if int(labels.min()) < 0 or int(labels.max()) >= q.shape[1]:
        return False
    label = labels.cpu().long()[:, None]
    first = q.gather(1, label)[:, 0]
    rest = q.scatter(1, label, 0.0)
    second, other = rest.max(1)
    two = (first > 0.02) & (first < 0.98) & ((1.0 - first - second).abs() < 1e-3)
    two &= rest.scatter(1, other[:, None], 0.0).abs().amax(1) < 1e-3
    two &= (other != p.argmax(1)) & torch.isin(other, label)
    pairs = {(int(a), int(b)) for a, b in zip(label[two, 0], other[two], strict=True)}
    ambiguous = len({a for a, _ in pairs}) < len(pairs)
    return ambiguous and int(two.sum()) >= max(2, len(q) // 4)


__all__ = ["mixed_inputs", "mixed_labels"]
