"""Curvature of the mean training loss: products with it, and its square roots at the output.

Four matrices, each a mean over the training examples i (z the model's output, J_i = ∂z_i/∂θ):

    hessian            ∇²ℓ_i
    ggn                J_iᵀ (∇²_z ℓ_i) J_i
    fisher             E_{y ~ p_i} [∇ℓ(z_i, y) ∇ℓ(z_i, y)ᵀ]    p_i = softmax(z_i), the model's own
    empirical_fisher   ∇ℓ(z_i, y_i) ∇ℓ(z_i, y_i)ᵀ

The last three are J_iᵀ M_i J_i with M_i = Σ_k s_ik s_ikᵀ a sum of *roots* at the output: EK-FAC and
the traces pull the roots back, products apply M_i between a Jacobian-vector and a vector-Jacobian
product (Schraudolph, *Fast curvature matrix-vector products*, Neural Computation 14(7), 2002; for
the Hessian Pearlmutter, Neural Computation 6(1), 1994). For softmax cross-entropy ``ggn`` and
``fisher`` are the same matrix (Martens 2020, arXiv:1412.1193).

Shapes: B examples, M roots, K vectors, P parameters, c classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jvp, vjp, vmap

from fine_bench.gradients.blocks.direction import BlockDirection, Direction
from fine_bench.gradients.blocks.protocol import Block
from fine_bench.gradients.engine import GradientEngine
from fine_bench.gradients.recorder import LayerRecorder
from fine_bench.gradients.recurrent import unrolled_recurrence
from fine_bench.gradients.reevaluation import each_example
from fine_bench.types import Loss, UnsupportedProblemError

Curvature: TypeAlias = Literal["hessian", "ggn", "fisher", "empirical_fisher"]
CURVATURES: tuple[Curvature, ...] = get_args(Curvature)

Batches: TypeAlias = Callable[[], Iterator[tuple[slice, Tensor, Tensor]]]
"""``(positions, x, y)`` of every training example, anew at each call."""

MAX_EXACT_CLASSES = 100
"""Up to so many classes the Fisher's expectation is exact, one root a class; beyond, sampled."""

CHUNK = 32
"""Vectors that share one vectorised product; bounds the memory for their activations."""


def parameter_names(recorder: LayerRecorder) -> list[str]:
    """Trained parameters in the order in which ``PerExampleGradients.dense`` lays them out."""
    names = [name for layer in recorder.layers for name in recorder.parameter_names(layer)]
    return names + recorder.leftover


def count_parameters(model: nn.Module, layers: Sequence[str] | None) -> int:
    """Number of trained parameters in the named layers (all by default)."""
    recorder = LayerRecorder(model, layers)
    recorder.close()
    params = dict(model.named_parameters())
    return sum(params[name].numel() for name in parameter_names(recorder))


def as_direction(flat: Tensor, like: Direction) -> Direction:
    """Rows ``(R, P)`` in the order of ``dense`` as directions of the pattern ``like``."""
    shapes = [part.shape[1:] for d in like for part in (d.weight, d.bias) if part is not None]
    parts = iter(torch.split(flat, [shape.numel() for shape in shapes], 1))
    shape = iter(shapes)

    def take(present: Tensor | None) -> Tensor | None:
        return None if present is None else next(parts).reshape(-1, *next(shape))

    return [BlockDirection(take(d.weight), take(d.bias)) for d in like]


def as_rows(direction: Direction) -> Tensor:
    """The inverse of ``as_direction``: ``(R, P)``."""
    parts = [part.flatten(1) for d in direction for part in (d.weight, d.bias) if part is not None]
    return torch.cat(parts, 1)


class Roots:
    """The roots s_ik of M_i, with Σ_k s_ik s_ikᵀ = M_i.

    Args:
        kind: ``"ggn"``, ``"fisher"`` or ``"empirical_fisher"``.
        loss: ``loss(logits, y, reduction="none") -> (batch,)``.
        uniforms: ``(n, S)`` uniform numbers in [0, 1), S for each training example: the labels
            that stand for the Fisher's expectation where there are more than
            ``MAX_EXACT_CLASSES`` classes. Fixed beforehand, so that a label belongs to an example
            and not to a batch.
    """

    def __init__(self, kind: Curvature, loss: Loss, uniforms: Tensor) -> None:
        self.kind = kind
        self.loss = loss
        self.uniforms = uniforms

    def __call__(self, logits: Tensor, y: Tensor, rows: slice) -> Tensor:
        """``(M, *logits.shape)`` for the examples at positions ``rows``."""
        if self.kind == "empirical_fisher":
            return output_gradient(self.loss, logits, y)[None]
        if self.kind == "fisher":
            return fisher_roots(self.loss, logits, y, self.uniforms[rows])
        if self.kind == "ggn":
            return hessian_roots(self.loss, logits, y)
        raise ValueError(f"the {self.kind} is not a sum of squares at the output: it has no roots")


def output_gradient(loss: Loss, logits: Tensor, y: Tensor) -> Tensor:
    """∂ℓ_i/∂z_i, the shape of ``logits``."""

    def total(z: Tensor) -> Tensor:
        value: Tensor = loss(z, y, reduction="none")
        return value.sum()

    gradient: Tensor = grad(total)(logits)
    return gradient


def fisher_roots(loss: Loss, logits: Tensor, y: Tensor, uniforms: Tensor) -> Tensor:
    """sqrt(p_k) ∂ℓ(z, k)/∂z for every class, or ∂ℓ(z, y')/∂z / sqrt(S) for S sampled labels y'.

    Raises:
        UnsupportedProblemError: without class logits the model states no distribution of labels.
    """
    if logits.ndim != 2 or y.ndim != 1 or y.is_floating_point():
        raise UnsupportedProblemError(
            'curvature="fisher" needs class logits (batch, classes) and integer labels (batch,), '
            f"got shapes {tuple(logits.shape)} and {tuple(y.shape)} ({y.dtype}); use "
            'curvature="ggn" or "empirical_fisher"'
        )
    p = torch.softmax(logits, 1)
    n_classes = logits.shape[1]
    if n_classes <= MAX_EXACT_CLASSES:
        labels = torch.arange(n_classes)[:, None].expand(-1, len(y)).to(y)
        weights = p.T.sqrt()
    else:
        # inverse of the distribution function; rounding can leave its end a little below one
        cdf = p.double().cumsum(1)
        labels = torch.searchsorted(cdf, uniforms.to(cdf)).clamp_max(n_classes - 1).T.to(y)
        weights = p.new_full((len(labels), 1), len(labels) ** -0.5)
    roots = [output_gradient(loss, logits, label) for label in labels]
    result: Tensor = torch.stack(roots) * weights[:, :, None]
    return result


def hessian_roots(loss: Loss, logits: Tensor, y: Tensor) -> Tensor:
    """Eigenvectors of ∇²_z ℓ_i times the square roots of their eigenvalues.

    Raises:
        UnsupportedProblemError: the loss is not convex in the output, or the output is large.
    """
    c = logits[0].numel()
    if c > MAX_EXACT_CLASSES:
        raise UnsupportedProblemError(
            f'curvature="ggn" takes the roots of a {c} × {c} matrix for every example, more than '
            f'the limit of {MAX_EXACT_CLASSES}; use curvature="fisher", which samples labels, or '
            'for solver="cg" give damping= itself'
        )

    def one(z: Tensor, yi: Tensor) -> Tensor:
        value: Tensor = loss(z[None], yi[None], reduction="none")
        return value.sum()

    matrices = vmap(hessian(one))(logits, y).reshape(len(y), c, c).double()
    values, vectors = torch.linalg.eigh(matrices)
    slack = 1e-6 if logits.dtype == torch.float32 else 1e-12
    # where p approaches one, p − p² holds the rounding of p, however small it is itself
    rounding = 64 * torch.finfo(logits.dtype).eps
    if bool((values[:, 0] < -slack * values.abs().amax(1) - rounding).any()):
        raise UnsupportedProblemError(
            f"the loss is not convex in the model's output (eigenvalue {float(values.min()):.3g} "
            'of its Hessian there), so the ggn is not a sum of squares; use curvature="hessian"'
        )
    roots: Tensor = vectors * values.clamp_min(0).sqrt()[:, None, :]
    return roots.permute(2, 0, 1).reshape(c, *logits.shape).to(logits)


def root_gradients(
    engine: GradientEngine, x: Tensor, y: Tensor, roots: Roots, rows: slice
) -> Iterator[tuple[int, int, list[Block]]]:
    """(k, M, J_iᵀ s_ik as blocks) for k = 0 … M − 1, from one forward pass.

    The inputs of a layer are prepared once for all k.
    """
    engine.ensure_checked(x, y)
    recorder = engine.recorder
    with torch.enable_grad(), recorder.exclusively(len(x)):
        logits = engine.forward(x)
    calls, edges = list(recorder.calls), recorder.edges()
    vectors = roots(logits.detach(), y, rows)
    names = engine.names_in_full
    with recorder.alone(), engine.explained(names):
        in_full = _in_full(engine, names, x, vectors) if names else {}
    for k, vector in enumerate(vectors):
        if edges:
            grads = torch.autograd.grad(
                logits,
                edges,
                grad_outputs=vector,
                retain_graph=k + 1 < len(vectors),
                allow_unused=True,
            )
            recorder.calls = calls
            for call, value in zip(calls, grads, strict=True):
                call.grad = value
        blocks = engine.blocks(len(x), {name: value[k] for name, value in in_full.items()})
        recorder.clear()
        yield k, len(vectors), blocks


def _in_full(
    engine: GradientEngine, names: Sequence[str], x: Tensor, vectors: Tensor
) -> dict[str, Tensor]:
    """J_iᵀ s_ik for the parameters that ``torch.func`` takes, ``(M, B, *shape)`` each."""
    fixed = {name: p.detach() for name, p in engine.model.named_parameters()}
    chosen = {name: fixed[name] for name in names}

    def output(xi: Tensor, values: dict[str, Tensor]) -> Tensor:
        return engine.functional(fixed | values, xi[None])[0]

    def one(xi: Tensor, roots: Tensor) -> dict[str, Tensor]:
        pull = vjp(partial(output, xi), chosen)[1]
        pulled: dict[str, Tensor] = vmap(pull)(roots)[0]
        return pulled

    def mapped() -> dict[str, Tensor]:
        found: dict[str, Tensor] = vmap(one, in_dims=(0, 1), out_dims=1)(x, vectors)
        return found

    with unrolled_recurrence(engine.model):
        result = each_example(mapped, lambda i, values: output(x[i], values), chosen, vectors)
    return {name: value.detach() for name, value in result.items()}


class CurvatureProducts:
    """v ↦ C v, C the mean curvature over the training examples, one pass over the data a call.

    Nothing is retained between calls: Jacobian-vector products run forward, and all vectors of a
    call share each batch's forward pass.

    Args:
        model: the network at its present parameters; read anew at each call.
        loss: ``loss(logits, y, reduction="none") -> (batch,)``.
        names: parameters, in the order of the vectors' coordinates.
        kind: which curvature.
        batches: the training examples.
        n: their number.
        uniforms: see ``Roots``.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        names: Sequence[str],
        kind: Curvature,
        batches: Batches,
        n: int,
        uniforms: Tensor,
    ) -> None:
        self.model = model
        self.loss = loss
        self.names = list(names)
        self.kind = kind
        self.batches = batches
        self.n = n
        self.roots = Roots(kind, loss, uniforms)
        self.products = 0

    def __call__(self, vectors: Tensor) -> Tensor:
        """``(K, P)`` → ``(K, P)``."""
        # all of them detached, also those that have no coordinates: no graph may start there
        fixed = {name: p.detach() for name, p in self.model.named_parameters()}
        params = {name: fixed[name] for name in self.names}
        sizes = [p.numel() for p in params.values()]
        tangents = {
            name: part.reshape(-1, *p.shape)
            for (name, p), part in zip(params.items(), torch.split(vectors, sizes, 1), strict=True)
        }
        total = torch.zeros_like(vectors)
        for rows, x, y in self.batches():
            product = self._batch(fixed, params, x, y, rows)
            with unrolled_recurrence(self.model):
                result = vmap(product, chunk_size=CHUNK)(tangents)
            total += torch.cat([result[name].flatten(1) for name in self.names], 1)
        self.products += len(vectors)
        return total / self.n

    def _batch(
        self,
        fixed: dict[str, Tensor],
        params: dict[str, Tensor],
        x: Tensor,
        y: Tensor,
        rows: slice,
    ) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
        """The sum over a batch of curvature times vector, as a function of one vector."""

        def output(values: dict[str, Tensor]) -> Tensor:
            z: Tensor = functional_call(self.model, fixed | values, (x,))
            return z

        def total(values: dict[str, Tensor]) -> Tensor:
            value: Tensor = self.loss(output(values), y, reduction="none")
            return value.sum()

        if self.kind == "hessian":

            def hessian_product(tangent: dict[str, Tensor]) -> dict[str, Tensor]:
                result: dict[str, Tensor] = jvp(grad(total), (params,), (tangent,))[1]
                return result

            return hessian_product

        metric = self._metric(output(params), y, rows)

        def product(tangent: dict[str, Tensor]) -> dict[str, Tensor]:
            dz = jvp(output, (params,), (tangent,))[1]
            pull = vjp(output, params)[1]
            result: dict[str, Tensor] = pull(metric(dz))[0]
            return result

        return product

    def _metric(self, logits: Tensor, y: Tensor, rows: slice) -> Callable[[Tensor], Tensor]:
        """u ↦ M_i u at the output, for a batch."""
        if self.kind == "ggn":

            def slope(z: Tensor) -> Tensor:
                return output_gradient(self.loss, z, y)

            def second_derivative(u: Tensor) -> Tensor:
                result: Tensor = jvp(slope, (logits,), (u,))[1]
                return result

            return second_derivative
        roots = self.roots(logits, y, rows).flatten(2)

        def sum_of_squares(u: Tensor) -> Tensor:
            along = torch.einsum("kbc,bc->kb", roots, u.flatten(1))
            return torch.einsum("kbc,kb->bc", roots, along).reshape(u.shape)

        return sum_of_squares


def curvature_matrix(products: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """C itself, ``(P, P)``, column by column from products with the unit vectors."""
    n_params = like.shape[1]
    result = like.new_empty(n_params, n_params)
    for start in range(0, n_params, 4 * CHUNK):
        stop = min(start + 4 * CHUNK, n_params)
        unit = like.new_zeros(stop - start, n_params)
        unit[torch.arange(stop - start), torch.arange(start, stop)] = 1.0
        result[start:stop] = products(unit)
    return (result + result.T) / 2


def sum_of_squares_trace(engine: GradientEngine, batches: Batches, roots: Roots, n: int) -> float:
    """tr C of a curvature that has roots: the mean over examples of Σ_k ‖J_iᵀ s_ik‖²."""
    total = 0.0
    for rows, x, y in batches():
        for _, _, blocks in root_gradients(engine, x, y, roots, rows):
            total += float(sum(block.norm2().double().sum() for block in blocks))
    return total / n
