"""Where f-INE's noise comes from in the EK-FAC geometry, and what it does to the ranking.

    FINE_BENCH_DATA=… python -m fine_bench +experiment=mnist_cnn 'estimator=[tracin]' seed=0
    FINE_BENCH_DATA=… python benchmarks/ekfac_noise.py --experiment mnist_cnn --layers 7

At checkpoints of a finished run the training examples are cut into random batches, and *self* is
scored in each batch as ``fine`` and ``fine_ekfac`` do it in one step: the effect alone, μ with the
spread over the batch mates (``noise="sample"``), and μ with the noise that the geometry states
(``noise="model"``, σ_i² = K_ii). *Mates* says how many of the batch's products make that spread:
with d_j their deviations from their mean, the median over i of (Σ_j d_j²)²/Σ_j d_j⁴. The other
numbers are Spearman's correlations with the *development* half of the ground truth. Writes
``ekfac_noise--EXPERIMENT.md`` into the results folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from outputs import Outputs, add_results
from seed_files import job_of
from torch import Tensor

from fine_bench.fine.effects import self_effects, whitened_effects
from fine_bench.gradients.curvature.ekfac import EKFAC, fit_ekfac
from fine_bench.gradients.curvature.products import Roots
from fine_bench.gradients.engine import GradientEngine
from fine_bench.gradients.per_example import PerExampleGradients
from fine_bench.metrics.reliability import spearman
from fine_bench.retraining.truth_files import folders, named
from fine_bench.runner.backends import images
from fine_bench.seeds import stream

BATCH, FIT_BATCH, FIT_EXAMPLES = 64, 250, 2000
GEOMETRIES = ("euclidean", "ekfac")
FORMS = ("effect", "sample", "model")
"""Of a score, in the order of the table's columns."""


def fitted(engine: GradientEngine, x: Tensor, y: Tensor, damping: float) -> EKFAC:
    """The model's own Fisher matrix on some of the examples, damped."""
    draw = stream(0, "ekfac_noise/fit")
    chosen = torch.randperm(len(x), generator=draw)[:FIT_EXAMPLES].sort().values
    uniforms = torch.rand(len(chosen), 1, generator=draw, dtype=torch.float64)

    def batches() -> Iterator[tuple[slice, Tensor, Tensor]]:
        for start in range(0, len(chosen), FIT_BATCH):
            part = slice(start, start + FIT_BATCH)
            yield part, x[chosen[part]], y[chosen[part]]

    found = fit_ekfac(engine, batches, Roots("fisher", F.cross_entropy, uniforms), len(chosen))
    found.damp(None, damping)
    return found


def scores(
    engine: GradientEngine,
    x: Tensor,
    y: Tensor,
    gram: Callable[[PerExampleGradients], Tensor],
) -> dict[str, Tensor]:
    """Every example's score in its batch, by form, and ``mates``; each ``(n,)``."""
    found = {form: torch.zeros(len(x), dtype=torch.float64) for form in (*FORMS, "mates")}
    order = torch.randperm(len(x), generator=stream(0, "ekfac_noise/batches"))
    for rows in torch.split(order, BATCH):
        gradients = engine(x[rows], y[rows], "loss")
        products, complement = gram(gradients), gradients.one_minus_p
        effect, sigma = self_effects(products, complement)
        own, total = products.diagonal(), products.sum(1)
        stated, implied = whitened_effects(own, total, complement)
        found["effect"][rows] = effect
        found["sample"][rows] = effect / sigma
        found["model"][rows] = stated / implied
        found["mates"][rows] = mates(products)
    return found


def mates(gram: Tensor) -> Tensor:
    """Effective number of the m − 1 products K_ij, j ≠ i, that make their spread, ``(m,)``."""
    m = len(gram)
    others = gram.double()[~torch.eye(m, dtype=torch.bool)].view(m, m - 1)
    squares = (others - others.mean(1, keepdim=True)).square()
    return squares.sum(1).square() / squares.square().sum(1)


def main() -> None:
    """Score the checkpoints and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experiment", default="mnist_cnn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, nargs="+", default=[5, 15], help="counted from 1")
    parser.add_argument("--layers", nargs="+", help="names of modules; default: all")
    parser.add_argument(
        "--damping", type=float, default=0.1, help="of each layer's mean eigenvalue"
    )
    add_results(parser)
    arguments = parser.parse_args()
    folder = arguments.out or arguments.results
    page = folder / f"ekfac_noise--{arguments.experiment}.md"
    outputs = Outputs([page], default=arguments.out is None, force=arguments.force)
    job = job_of(arguments.experiment, arguments.seed, ["targets=[self]"], arguments.results)
    run = images.stored(job, print)
    if run is None:
        raise SystemExit(
            f"no finished run of seed {arguments.seed} below {arguments.results / 'checkpoints'}; "
            f"run python -m fine_bench +experiment={arguments.experiment} 'estimator=[tracin]' "
            f"'targets=[self]' seed={arguments.seed} results_dir={arguments.results}"
        )
    truth = named(arguments.experiment, folders(arguments.results)).development.mu_margin
    data, model = images.images_of(job), run.model.eval()
    engine = GradientEngine(model, F.cross_entropy, arguments.layers)
    lines = [
        "# The noise of one step in two geometries",
        "",
        "Made by `python benchmarks/ekfac_noise.py"
        + f" --experiment {arguments.experiment}"
        + f" --layers {' '.join(arguments.layers)}" * bool(arguments.layers)
        + "`.",
        "",
        f"`{arguments.experiment}`, run seed {arguments.seed}, layers "
        f"{', '.join(arguments.layers or ['all'])}, batches of {BATCH}, relative damping "
        f"{arguments.damping:g}; Spearman with μ of retraining, development half.",
        "",
        "| after epoch | geometry | effect alone "
        '| μ, `noise="sample"` | μ, `noise="model"` | mates |',
        "| ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for epoch in arguments.epochs:
        model.load_state_dict(dict(run.checkpoints[epoch - 1].params))
        ekfac = fitted(engine, data.x, data.y, arguments.damping)
        for geometry in GEOMETRIES:
            gram = ekfac.gram if geometry == "ekfac" else PerExampleGradients.gram
            found = scores(engine, data.x, data.y, gram)
            cells = [f"{spearman(found[form].numpy(), truth):.3f}" for form in FORMS]
            cells.append(f"{float(found['mates'].median()):.1f}")
            lines.append(f"| {epoch} | {geometry} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    outputs.write(page, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
