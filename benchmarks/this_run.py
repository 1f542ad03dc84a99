"""This run and the average run: which of the two do a method's scores foretell?

    FINE_BENCH_DATA=… python benchmarks/this_run.py truth --seeds 0
    FINE_BENCH_DATA=… python benchmarks/this_run.py scores --seeds 0 1 2 3
    python benchmarks/this_run.py table

``truth`` repeats the run of each seed without each of ``--sets`` random sets of 1 % and of 5 % of
the examples, with the run's own initialisation and order (``fine_bench.retraining.same_seed``), at
batch size 64 as in the task's recipe, at 64 with GELU for ReLU, and at 256 (``--batch``), and
writes ``results/ground_truth/same_seed/``.
``scores`` scores the same runs by every method that serves single queries, for the task's first
``--queries`` queries. ``table`` compares both on the published half of the sets, and with the
frozen truth of the average run (``results/ground_truth/mnist_mlp.safetensors``, LDS), and writes
``results/this_run.md``, ``results/this_run.csv`` and a figure.

Methods that read checkpoints are asked as in ``conf/estimator``. Two rows are made here: EK-FAC
influence averaged over the checkpoints of every epoch, and means over several runs' scores.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from hydra import compose, initialize_config_dir
from matplotlib.figure import Figure
from numpy.typing import NDArray
from outputs import Outputs, add_results, interval_text
from safetensors.torch import load_file, save_file
from scipy.optimize import isotonic_regression
from torch import Tensor

from baselines.influence_functions import InfluenceFunction
from fine_bench.estimator import replay
from fine_bench.metrics.lds import LDS, lds
from fine_bench.metrics.reliability import ceiling_of, spearman_brown, spearman_rows
from fine_bench.report.figures.style import (
    BLACK,
    BLUE,
    GREY,
    VERMILLION,
    canvas,
    styled,
    to_bytes,
)
from fine_bench.retraining import same_seed
from fine_bench.retraining.same_seed import draw_sets, measure, save
from fine_bench.retraining.truth import HALVES, Half, Truth
from fine_bench.retraining.truth_files import folders, named
from fine_bench.runner.backends import images
from fine_bench.runner.backends.trained import TrainedRun
from fine_bench.runner.cells import outcomes, problem_of
from fine_bench.runner.config import check
from fine_bench.runner.plan import Job, plan
from fine_bench.runner.schema import config_folder, register
from fine_bench.seeds import derive

EXPERIMENT = "mnist_mlp"
SETTINGS = {
    "64": [],
    "64-gelu": ["model.activation=gelu"],
    "256": ["trainer.batch_size=256"],
}
"""Overrides of the recipe by the name of a setting."""
TITLES = {
    "64": "Batch size 64, the task's recipe",
    "64-gelu": "Batch size 64, GELU in the place of ReLU",
    "256": "Batch size 256",
}
SHARES = (0.01, 0.05)
TRUTHS = Path("ground_truth") / "same_seed"

AVERAGE, BETWEEN = "average run", "scores of two runs, rank correlation"
RESAMPLES = 2000
AVERAGED = "influence_function, epochs"
ROWS = (
    "unrolled", "unrolled_gauss_newton", AVERAGED, "influence_function", "kfac", "source",
    "arnoldi", "lissa", "datainf", "relatif_theta", "relatif_loss", "trak", "tracin", "grad_dot",
    "grad_cos", "in_run_shapley", "knn_shapley", "tangent_kernel", "gaussian_kernel",
    "gaussian_kernel_run", "fine", "fine_ekfac", "fine_snapshot", "fine_queries",
    "fine_queries_fast",
)  # fmt: skip


def job_of(batch: str, seed: int, rows: Sequence[str], work: Path) -> Job:
    """The run of a seed, with the rows as its cells."""
    register()
    with initialize_config_dir(config_dir=str(config_folder()), version_base="1.3"):
        config = compose(
            "config",
            [
                f"+experiment={EXPERIMENT}", f"estimator=[{','.join(rows)}]", "targets=[queries]",
                f"seed={seed}", f"results_dir={work / 'runs'}", "trainer.progress=false",
                *SETTINGS[batch],
            ],
        )  # fmt: skip
    return plan(check(config))


def run_of(job: Job) -> TrainedRun:
    """The job's run, trained once."""
    found = images.stored(job, print)
    return images.train(job, [], None) if found is None else found


def truth_path(results: Path, batch: str, seed: int, share: float) -> Path:
    """Where the truth of a run lies."""
    return results / TRUTHS / f"{EXPERIMENT}--batch{batch}--seed{seed}--share{share:g}.safetensors"


def truth(arguments: argparse.Namespace) -> None:
    """Train without the sets, where no file says what comes of it."""
    for batch, seed in ((b, s) for s in arguments.seeds for b in arguments.batch):
        job = job_of(batch, seed, ["random"], arguments.work)
        run, data = run_of(job), job.data
        assert run.steps is not None
        for share in SHARES:
            path = truth_path(arguments.results, batch, seed, share)
            if path.exists():
                continue
            start = time.perf_counter()
            found = measure(
                run.model,
                run.steps,
                (data.x, data.y),
                (data.query_x, data.query_y),
                draw_sets(data.n_train, share, arguments.sets, seed),
                arguments.repeats,
                {
                    "task": data.name, "data_sha256": data.sha256, "setting": job.setting,
                    "seed": seed, "batch_size": job.config.trainer.batch_size,
                },
            )  # fmt: skip
            path.parent.mkdir(parents=True, exist_ok=True)
            save(found, path)
            seconds = time.perf_counter() - start
            print(f"{path.name}: ceiling {found.ceiling():.3f}, {seconds:.0f} s", flush=True)


# ------------------------------------------------------------------------------------------ scores


def scoring_job(batch: str, seed: int, queries: int, rows: Sequence[str], work: Path) -> Job:
    """The run of a seed with the task's first queries, and the rows as its cells."""
    job = job_of(batch, seed, rows, work)
    data = images.images_of(job)
    few = replace(data, query_x=data.query_x[:queries], query_y=data.query_y[:queries])
    return replace(job, data=few, truth=None, todo=job.cells)


def score_path(work: Path, batch: str, seed: int, row: str) -> Path:
    """Where a row's scores of a run are kept."""
    return work / "scores" / f"batch{batch}--seed{seed}--{row}.safetensors"


def keep(path: Path, values: Tensor, seconds: float) -> None:
    """Write scores ``(q, n)`` and what they cost."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file({"values": values.contiguous()}, temporary, {"seconds": f"{seconds:.3f}"})
    temporary.rename(path)
    print(f"{path.name}: {tuple(values.shape)}, {seconds:.1f} s", flush=True)


def scores(arguments: argparse.Namespace) -> None:
    """Score the runs by every row that has no file yet."""
    for batch, seed in ((b, s) for s in arguments.seeds for b in arguments.batch):
        paths = {row: score_path(arguments.work, batch, seed, row) for row in arguments.rows}
        paths = {row: path for row, path in paths.items() if not path.exists()}
        if not paths:
            continue
        rows = [row for row in paths if row != AVERAGED] or ["random"]
        job = scoring_job(batch, seed, arguments.queries, rows, arguments.work)
        for outcome in outcomes(job):
            row = outcome.cell.estimator
            if row not in paths:
                continue
            if outcome.scores is None:
                print(f"{row} at batch {batch}: {outcome.status}, {outcome.reason}", flush=True)
                continue
            keep(paths[row], outcome.scores.values, outcome.cost["seconds"])
        if AVERAGED in paths:
            keep(paths[AVERAGED], *averaged(job))


def averaged(job: Job) -> tuple[Tensor, float]:
    """EK-FAC influence, the mean over the run's checkpoints; and its seconds."""
    run = run_of(job)
    problem = problem_of(job, "queries", run.model)
    start = time.perf_counter()
    parts = [replay(InfluenceFunction(), problem, [point]).values for point in run.checkpoints]
    return torch.stack(parts).mean(0), time.perf_counter() - start


# ------------------------------------------------------------------------------------------- table


def stored_scores(work: Path, batch: str, row: str) -> dict[int, NDArray[np.float64]]:
    """Scores ``(q, n)`` of a row by seed."""
    found = {}
    for path in sorted((work / "scores").glob(f"batch{batch}--seed*--{row}.safetensors")):
        seed = int(path.stem.split("--")[1].removeprefix("seed"))
        found[seed] = load_file(path)["values"].double().numpy()
    return found


def interval(per_query: Sequence[NDArray[np.float64]]) -> tuple[float, float, float]:
    """Mean, and its 95 % bootstrap interval over the queries; several runs are averaged first."""
    values = np.mean(per_query, axis=0)
    rng = np.random.default_rng(derive(0, "this_run/queries"))
    drawn = values[rng.integers(len(values), size=(RESAMPLES, len(values)))].mean(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def lines_of(
    work: Path, results: Path, batch: str, rows: Sequence[str], average: Truth | None, half: Half
) -> list[dict[str, object]]:
    """One line for every row and truth: mean, interval, runs."""
    lines: list[dict[str, object]] = []

    def add(row: str, truth: str, runs: int, found: Sequence[LDS]) -> None:
        mean, low, high = interval([one.per_query for one in found])
        lines.append(
            {
                "batch": batch, "method": row, "truth": truth, "runs": runs,
                "queries": len(found[0].per_query), "lds": mean, "lower": low, "upper": high,
            }
        )  # fmt: skip

    for row in rows:
        by_seed = stored_scores(work, batch, row)
        for share in SHARES:
            known = {
                seed: same_seed.load(path)
                for seed in by_seed
                if (path := truth_path(results, batch, seed, share)).is_file()
            }
            if known:
                found = [truth.agreement(by_seed[seed], half) for seed, truth in known.items()]
                add(row, f"this run, {share:.0%} left out", len(found), found)
        if average is None or average.subsets is None or not by_seed:
            continue
        own = average.subsets.of(half)
        members, margin = average.subsets.members[own], average.subsets.margin[own]

        def on_average(values: NDArray[np.float64]) -> LDS:
            return lds(values, members, margin[:, : len(values)])  # noqa: B023

        add(row, AVERAGE, len(by_seed), [on_average(values) for values in by_seed.values()])
        if len(by_seed) > 1:
            mean = np.mean([*by_seed.values()], axis=0)
            add(row, f"{AVERAGE}, by the mean of the runs", len(by_seed), [on_average(mean)])
            add(row, BETWEEN, len(by_seed), between(by_seed))
    return lines


def between(by_seed: Mapping[int, NDArray[np.float64]]) -> list[LDS]:
    """Spearman's correlation over the examples between the scores of every two runs."""
    pairs = combinations(by_seed.values(), 2)
    found = [np.nan_to_num(spearman_rows(a, b)) for a, b in pairs]
    return [LDS(float(one.mean()), one, 0) for one in found]


def smoothness(results: Path, half: Half, queries: int) -> list[dict[str, object]]:
    """What rounding does to each run, beside what leaving examples out does; and the ceiling."""
    lines: list[dict[str, object]] = []
    for path in sorted((results / TRUTHS).glob(f"{EXPERIMENT}--batch*.safetensors")):
        truth = same_seed.load(path)
        margin, whole = truth.margin[..., :queries], truth.whole[:, :queries]
        effect = (margin - whole[:, None])[0]
        rounding = (margin[1] - margin[0]) / math.sqrt(2)
        lines.append(
            {
                "batch": path.name.split("--")[1].removeprefix("batch"),
                "seed": truth.about["seed"],
                "left_out": truth.left_out.shape[1], "sets": truth.margin.shape[1],
                "effect": float(np.sqrt(np.mean(effect**2))),
                "rounding": float(np.sqrt(np.mean(rounding**2))),
                "ceiling": truth.ceiling(half, queries),
            }
        )  # fmt: skip
    names = [*SETTINGS]
    return sorted(lines, key=lambda line: names.index(str(line["batch"])))


def average_ceiling(average: Truth, half: Half, queries: int) -> float:
    """The most that scores of the first queries can reach against the average run."""
    assert average.subsets is not None
    own = average.subsets.of(half)
    first, second = average.subsets.margin_first[own], average.subsets.margin_second[own]
    found = spearman_rows(first[:, :queries].T, second[:, :queries].T).mean()
    return ceiling_of(spearman_brown(float(found)))


def page(frame: pd.DataFrame, smooth: pd.DataFrame, ceiling: float, command: str) -> str:
    """The tables, with what is to be known about them."""
    queries = int(frame.queries.max())
    text = [
        "# This run and the average run",
        "",
        f"Made by `{command}` from stored scores; {EXPERIMENT}, the task's first {queries} "
        "queries, published half of every truth.",
        "",
        "*This run*: the run that was scored, repeated with its own initialisation and order while "
        "random sets of examples have weight 0 (`fine_bench.retraining.same_seed`). *Average run*: "
        "models on random halves of the examples, each with an initialisation and order of its "
        f"own, six a subset (the frozen truth; its noise allows {ceiling:.3f}). Numbers are linear "
        "datamodeling scores, the mean over the queries with its 95 % interval over them. *Runs*: "
        "how many were scored; the numbers for this run are of those that have such a truth.",
        "",
        "## How smooth the run is",
        "",
        "Every set is trained twice, from initial weights that differ in their last digit. "
        "*Rounding* is what that does to a margin (logits, root mean square), *effect* what "
        "leaving the set out does; *ceiling* is the most that any scores can reach against the "
        "mean of the two.",
        "",
        "| setting | seed | left out | sets | effect | rounding | ceiling |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for line in smooth.to_dict("records"):
        text.append(
            f"| {line['batch']} | {line['seed']} | {line['left_out']} | {line['sets']} | "
            f"{line['effect']:.3f} | {line['rounding']:.1e} | {line['ceiling']:.3f} |"
        )
    for batch, part in frame.groupby("batch", sort=False):
        truths = list(dict.fromkeys(part.truth))
        wide = {(line.method, line.truth): line for line in part.itertuples()}
        first = truths[0]
        methods = sorted(
            dict.fromkeys(part.method),
            key=lambda m: -wide[m, first].lds if (m, first) in wide else 2.0,
        )
        text += [
            "",
            f"## {TITLES[str(batch)]}",
            "",
            f"| method | {' | '.join(truths)} | runs |",
            f"| --- | {' | '.join('---:' for _ in truths)} | ---: |",
        ]
        for method in methods:
            cells = [
                interval_text(*(getattr(line, part) for part in ("lds", "lower", "upper")))
                if (line := wide.get((method, truth))) is not None
                else "–"
                for truth in truths
            ]
            runs = int(part[part.method == method].runs.max())
            text.append(f"| {method} | {' | '.join(cells)} | {runs} |")
        missing = [row for row in ROWS if row not in methods]
        if missing:
            text += ["", f"Not scored: {'; '.join(missing)}."]
    return "\n".join(text) + "\n"


def apart(heights: NDArray[np.float64], space: float) -> NDArray[np.float64]:
    """The places nearest to ascending ``heights``, squared, that are ``space`` apart."""
    # less a step a place, they only have to ascend: an isotonic regression
    steps = space * np.arange(len(heights))
    return np.asarray(isotonic_regression(heights - steps).x) + steps


@styled
def draw(frame: pd.DataFrame, ceilings: tuple[float, float]) -> Figure:
    """Each method: agreement with this run, and with the average run."""
    part = frame[frame.batch == "64"]
    first = f"this run, {SHARES[0]:.0%} left out"
    x = part[part.truth == first].set_index("method")
    y = part[part.truth == AVERAGE].set_index("method")
    figure = canvas(6.4, 5.2)
    axes = figure.subplots()
    for value, line in zip(ceilings, (axes.axvline, axes.axhline), strict=True):
        line(value, color=GREY, linestyle=":", linewidth=1.0)
    both = y.loc[x.index.intersection(y.index)].sort_values("lds")
    # names stand right of the points of about their height; the exact derivatives are farther right
    # than all others
    far = x.lds[both.index] > 0.6
    for _, near in both.groupby(far):
        heights = apart(near.lds.to_numpy(), 0.026)
        for method, height in zip(near.index, heights, strict=True):
            one, other = x.loc[method], y.loc[method]
            beside = near.index[(near.lds - height).abs() < 0.06].union([method])
            column = float(x.upper[beside].max()) + 0.03
            exact = method.startswith("unrolled")
            colour = VERMILLION if exact else BLUE if method.startswith("fine") else BLACK
            axes.errorbar(
                one.lds, other.lds,
                xerr=[[one.lds - one.lower], [one.upper - one.lds]],
                yerr=[[other.lds - other.lower], [other.upper - other.lds]],
                color=colour, marker="o", markersize=4, elinewidth=0.5,
            )  # fmt: skip
            axes.annotate(
                method, (one.lds, other.lds), xytext=(column, height), va="center", fontsize=7,
                color=colour, arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.4},
            )  # fmt: skip
    axes.margins(y=0.08)
    axes.set_xlabel("agreement with this run, 1 % left out (LDS; dotted: ceiling)")
    axes.set_ylabel("agreement with the average run (LDS)")
    figure.suptitle(f"{EXPERIMENT}, {int(part.queries.max())} queries")
    return figure


def table(arguments: argparse.Namespace) -> None:
    """Compare the scores with both truths and write."""
    out, half = arguments.out or arguments.results, arguments.half
    picture = (arguments.out or arguments.results / "images") / "this_run.png"
    paths = (out / "this_run.md", out / "this_run.csv", picture)
    files = Outputs(paths, default=arguments.out is None, force=arguments.force)
    average = named(EXPERIMENT, folders(arguments.results))
    lines = []
    for batch in SETTINGS:
        own = average if batch == "64" else None
        lines += lines_of(arguments.work, arguments.results, batch, ROWS, own, half)
    if not lines:
        raise SystemExit(f"no scores below {arguments.work}; run the commands truth and scores")
    frame = pd.DataFrame(lines)
    queries = int(frame.queries.max())
    smooth = pd.DataFrame(smoothness(arguments.results, half, queries))
    ceiling = average_ceiling(average, half, queries)
    command = "python benchmarks/this_run.py table"
    files.write(paths[0], page(frame, smooth, ceiling, command))
    files.write(paths[1], frame)
    first = smooth[(smooth.batch == "64") & (smooth.left_out == smooth.left_out.min())]
    files.write(picture, to_bytes(draw(frame, (float(first.ceiling.mean()), ceiling)), "png"))
    print(f"written: {', '.join(map(str, paths))}")


def main() -> None:
    """Parse arguments and do one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["truth", "scores", "table"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--batch", nargs="+", default=[*SETTINGS], choices=[*SETTINGS])
    parser.add_argument("--sets", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--queries", type=int, default=48)
    parser.add_argument("--rows", nargs="+", default=[*ROWS])
    parser.add_argument("--work", type=Path, default=Path("results") / "this_run")
    parser.add_argument("--half", choices=[*HALVES], default="published")
    add_results(parser)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    {"truth": truth, "scores": scores, "table": table}[arguments.command](arguments)


if __name__ == "__main__":
    main()
