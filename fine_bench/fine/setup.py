"""What a run needs before its first step: passes, queries, and the look at its first batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map
from torch.utils.data import default_collate

from fine_bench.fine.distributed import Processes
from fine_bench.fine.first_batch import FirstBatch
from fine_bench.fine.geometry import Euclidean, Metric, Whitened
from fine_bench.fine.geometry_optimiser import Preconditioned
from fine_bench.fine.options import Options
from fine_bench.fine.passes import Aside, Passes, QueryDirections
from fine_bench.fine.training_data import TrainingData
from fine_bench.gradients.engine import GradientEngine
from fine_bench.gradients.recorder import LayerRecorder
from fine_bench.types import UnsupportedProblemError, dataset_size


def refuse_compiled(module: nn.Module, schedule: str) -> bool:
    """Whether the module or a part of it went through ``torch.compile``.

    Raises:
        UnsupportedProblemError: it did, and the schedule needs hooks in the training's own pass.
    """
    parts = [
        name or "the module"
        for name, part in module.named_modules()
        if type(part).__name__ == "OptimizedModule" or part._compiled_call_impl is not None
    ]
    if getattr(module, "_compiler_ctx", None) is not None:  # of torch.compile on a LightningModule
        parts.insert(0, "the module")
    if parts and schedule == "in_batch":
        raise UnsupportedProblemError(
            f"{', '.join(dict.fromkeys(parts))} went through torch.compile: hooks in its layers "
            "would cut the compiled code into pieces and so change the weights in their last "
            'digits. Use schedule="snapshot", whose passes run beside the training, or train '
            "without torch.compile"
        )
    return bool(parts)


def refuse_private(module: nn.Module, optimizers: Sequence[object]) -> None:
    """Refuse DP-SGD by Opacus, whose steps are not the gradients that are seen here.

    A step there is the sum of clipped gradients plus noise. The gradients that go backward are
    neither, and a score of them, read as what can be told of an example, says too much: with noise
    of four times the clipping norm, an audit's lower bound lay above the true ε in 54 % of cases
    (``benchmarks/known_epsilon.py``). Opacus marks each parameter with ``grad_sample``, however its
    hooks are attached.

    Args:
        module: in training.
        optimizers: of the run, wrapped or not.

    Raises:
        UnsupportedProblemError: it is such a training.
    """
    marked = any(hasattr(p, "grad_sample") for p in module.parameters())
    kinds = {kind for one in optimizers for kind in type(one).__mro__}
    if marked or any(kind.__module__.split(".")[0] == "opacus" for kind in kinds):
        raise UnsupportedProblemError(
            "the model or its optimizer is Opacus' (GradSampleModule, DPOptimizer): its steps are "
            "clipped and noisy, and f-INE sees the gradients before both, so that its scores would "
            "be those of another training, and what audit says at least no bound. Watch the same "
            "training without PrivacyEngine. Of the private run itself Opacus' accountant says ε, "
            "and fine_bench.theory.privacy.one_run_epsilon a lower bound by canaries; "
            "benchmarks/known_epsilon.py scores clipped and noisy steps by hand"
        )


def make_recorder(options: Options, module: nn.Module) -> LayerRecorder:
    """Hooks in the layers to watch."""
    return LayerRecorder(module, options.layers, tap=options.schedule == "in_batch")


def make_queries(
    options: Options, data: TrainingData, device: torch.device | str
) -> QueryDirections | None:
    """The queries on the model's device; None for the target ``self``."""
    if options.queries is None:
        return None
    n_query = dataset_size(options.queries, "queries")
    # made into a batch as the training's are, if those are of a make of their own
    collate = default_collate if options.adapter is None else data.collate
    x, y = data.adapter.inputs(collate([options.queries[i] for i in range(n_query)]))
    return QueryDirections(
        tree_map(lambda part: part.to(device) if isinstance(part, Tensor) else part, x),
        y.to(device),
        options.reduce,
        options.query_weighting,
        options.observable,
    )


def make_metric(
    options: Options, recorder: LayerRecorder, optimizers: Sequence[Optimizer]
) -> Metric:
    """The geometry.

    Args:
        options: what to measure.
        recorder: of the model; it knows the parameters of each block.
        optimizers: of the run.

    Raises:
        UnsupportedProblemError: a preconditioner that is not known.
    """
    if options.preconditioner is not None:
        return Preconditioned(optimizers[0], recorder.parameters())
    if options.geometry in ("euclidean", "kernel"):  # the kernel has products of its own
        return Euclidean()
    return Whitened(
        options.loss,
        relative_damping=options.relative_damping,
        refit_every=options.refit_every,
        fit_examples=options.fit_examples,
        seed=options.seed,
    )


def make_passes(
    options: Options,
    module: nn.Module,
    data: TrainingData,
    recorder: LayerRecorder,
    optimizers: Sequence[Optimizer],
    aside: Aside,
    processes: Processes,
) -> Passes:
    """Passes beside the training.

    Args:
        options: what to measure.
        module: the model.
        data: the training examples.
        recorder: of the model.
        optimizers: of the run.
        aside: see ``passes.Aside``.
        processes: of the run.

    Raises:
        UnsupportedProblemError: examples must be read by positions that the data set has not.
    """
    engine = None
    if options.schedule == "snapshot" or options.geometry == "ekfac":
        data.require_positions()
    if options.needs_engine:
        forward, loss = options.passes()
        engine = GradientEngine(module, loss, options.layers, lambda x: forward(module, x))
    metric = make_metric(options, recorder, optimizers)
    queries = make_queries(options, data, data.device)
    return Passes(engine, data, metric, queries, aside, processes)


def make_first_batch(
    options: Options,
    module: nn.Module,
    data: TrainingData,
    aside: Aside,
    recorder: LayerRecorder | None = None,
) -> FirstBatch:
    """The look at the first batch."""
    forward, loss = options.passes()
    return FirstBatch(
        module,
        data,
        lambda x: forward(module, x),
        loss,
        aside,
        recorder,
        stated=options.needs_engine or options.says_loss,
        default=options.needs_engine and not options.says_loss,
    )
