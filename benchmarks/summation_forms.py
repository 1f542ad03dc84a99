"""Every way of summing one trajectory's gradient similarities, side by side.

f-INE differs from TracIn in several steps at once. Let c_i,t be an example's similarity with the
target at time t, c̄ and σ its mean and standard deviation over reference examples, w_t the weight
of that time. The forms add one step at a time:

    raw           Σ_t w_t c_i,t                                  (TracIn, with w_t = η_t)
    weighted      Σ_t w_t c_i,t / σ_t                            (each query scaled by its noise)
    standardised  Σ_t (c_i,t − c̄_t)/σ_t / √(observations)        (a z-score a step)
    accumulated   Σ_t w_t (c_i,t − c̄_t) · scale / sqrt(Σ_t v_t σ_t²)   (the test on X = Σ_t w_t x_t)

In the geometry of the inverse curvature the noise need not be estimated. With C the second moment
of the gradients, K_ij = g_iᵀC⁻¹g_j has the variance g_iᵀC⁻¹CC⁻¹g_i = K_ii over j, so

    whitened      Σ_t w_t c_i,t · scale / sqrt(Σ_t v_t σ_t²),  σ_t = sqrt(K_ii,t), times 1/(1 − p_i)
                  for the margin                      (*self* in that geometry only)

v_t is the part of the variance of X that the time stands for: w_t² where it is one step. ``scale``
makes the last one a μ: 1/√n_train for a run observed in its own batches.

For a set of queries with directions ∇h_q the rows are summed beforehand: ``raw`` takes the plain
mean of the queries' similarities, the other forms the mean of c_q/σ_q (``set_row``).
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

Form: TypeAlias = Literal["raw", "weighted", "standardised", "accumulated", "whitened"]

FORMS: tuple[Form, ...] = get_args(Form)


class FormSums:
    """Running sums of all forms for R rows and n examples, in float64.

    Args:
        n_rows, n_train: R and n.
    """

    def __init__(self, n_rows: int, n_train: int) -> None:
        self._sums = {
            name: torch.zeros(n_rows, n_train, dtype=torch.float64)
            for name in ("raw", "weighted", "shift", "variance", "z", "model variance")
        }
        self._count = torch.zeros(n_train, dtype=torch.float64)

    def visit(
        self,
        index: Tensor,
        c: Tensor,
        centred: Tensor,
        sigma: Tensor,
        w: float,
        v: float,
        model_sigma: Tensor | None = None,
    ) -> None:
        """Take in one time.

        Args:
            index: which examples, ``(m,)``, no repeats.
            c, centred, sigma: c_i, c_i − c̄ and σ, ``(R, m)``; σ = 0 adds nothing to the forms
                that divide by it.
            w, v: weight and variance weight of this time, ≥ 0.
            model_sigma: the noise that the geometry implies, ``(R, m)``; None where it implies
                none, and then there is no ``whitened`` form.
        """
        c, centred, sigma = c.double(), centred.double(), sigma.double()
        inverse = torch.where(sigma > 0, 1.0 / sigma.clamp_min(torch.finfo(sigma.dtype).tiny), 0.0)
        terms = {
            "raw": w * c,
            "weighted": w * c * inverse,
            "shift": w * centred,
            "variance": v * sigma.square(),
            "z": centred * inverse,
        }
        if model_sigma is not None:
            terms["model variance"] = v * model_sigma.double().square()
        for name, term in terms.items():
            self._sums[name].index_add_(1, index, term.expand(len(self._sums[name]), -1))
        self._count.index_add_(0, index, torch.ones(len(index), dtype=torch.float64))

    def scores(self, scale: float) -> dict[Form, Tensor]:
        """All forms, ``(R, n)`` each; 0 for an example that was never visited."""
        s = self._sums
        found: dict[Form, Tensor] = {
            "raw": s["raw"].clone(),
            "weighted": s["weighted"].clone(),
            "standardised": s["z"] / self._count.clamp_min(1).sqrt(),
            "accumulated": _ratio(s["shift"] * scale, s["variance"]),
        }
        if bool(s["model variance"].any()):
            found["whitened"] = _ratio(s["raw"] * scale, s["model variance"])
        return found


def _ratio(shift: Tensor, variance: Tensor) -> Tensor:
    """Shift over standard deviation, 0 where there is no noise."""
    known = variance > 0
    return torch.where(known, shift / torch.where(known, variance, 1.0).sqrt(), 0.0)


def set_row(c: Tensor, sigma: Tensor, *, weighted: bool) -> Tensor:
    """One row for a set of queries: the mean of c_q, or of c_q/σ_q; ``(Q, m)`` → ``(1, m)``.

    Args:
        c: similarities with every query, ``(Q, m)``.
        sigma: the spread of each query's similarity over reference examples, ``(Q,)``; a query
            without spread says nothing and gets the weight 0.
        weighted: which mean.
    """
    if not weighted:
        return c.mean(0, keepdim=True)
    inverse = torch.where(sigma > 0, 1.0 / sigma.clamp_min(torch.finfo(sigma.dtype).tiny), 0.0)
    return (c * inverse[:, None]).mean(0, keepdim=True)
