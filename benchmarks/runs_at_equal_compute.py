"""Averages over runs: LDS against the number of trainings, and against the time they take.

    python -m fine_bench +experiment=mnist_mlp 'targets=[queries]' clock=cpu -m \
        seed=0,1,2,3,4,5,6,7,8,9,10,11 'estimator=[fine_queries,fine_queries_fast,tangent_kernel,'\
        'gaussian_kernel_run,kfac,influence_function,trak,tracin]'
    FINE_BENCH_DATA=… python benchmarks/runs_at_equal_compute.py terms --seeds 0 1 2 3 4 5 6 7 8 9 \
        10 11
    python benchmarks/runs_at_equal_compute.py table

``fine_queries_fast`` is f-INE's way for queries in its cheap form, chosen on the development halves
(``docs/methods.md``).

All rows of a table come from one such sweep, by one clock: what a training costs, and a method
beside it, depends on what else the machine does.

What R runs say together is the mean of their scores, read off the score files of a method's
records, whatever the method. ``trak over models`` is TRAK as its paper has it, the product of two
means over the last checkpoints of R models, each with a projection of its own; ``terms`` computes
what each model adds to these means, from the checkpoints that the runs have kept.

``table`` measures the LDS of the groups of R of the N seeds that all rows have, on the published
half of the frozen truth. The groups share runs, so intervals over seeds come from the jackknife:

    θ the mean over all groups of R, θ_i the mean over those without seed i,
    SE² = (N − 1)/N · Σ_i (θ_i − mean θ_i)²,      θ ± t_{N−1, 0.975} SE,

where R ≤ (N + 1)/2. A difference of two methods is jackknifed as one number: the same seeds move
both. Beside it stands its bootstrap interval over the queries.

Time is counted in trainings: a run costs 1 + extra/training, where extra is what the method takes
beyond plain training in the same record, both by the record's clock; the median over the seeds.
Rows by different clocks are refused. Within a budget of B trainings'
time a method has as many runs as fit, and one that a single run does not fit into is not compared.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import seed_files
import torch
from matplotlib.figure import Figure
from outputs import Outputs, add_results
from outputs import interval_text as shown
from run_groups import RUNS, Array, Predict, Row, curves, differences, runs_within
from safetensors import safe_open

from baselines.trak import TRAK
from fine_bench import clock
from fine_bench.estimator import replay
from fine_bench.report.figures.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    VERMILLION,
    canvas,
    styled,
    to_bytes,
)
from fine_bench.retraining.truth import HALVES, Half, Truth
from fine_bench.retraining.truth_files import folders, named
from fine_bench.runner.backends import images
from fine_bench.runner.cells import problem_of
from fine_bench.store.plausibility import CLOCK
from fine_bench.store.records import RecordStore, newest
from fine_bench.types import RunRecord

MODELS = "trak over models"
COLOURS = (BLACK, BLUE, VERMILLION, GREEN, GREY)
MARKS = "os^Dv<>P*X"
BUDGETS = (1.5, 2, 3, 4, 5)
"""Trainings' times in which methods are compared."""
DIM = 512
"""Of the projections, as in ``conf/estimator/trak.yaml``."""


# -------------------------------------------------------------------------------- rows from files


def rows_of(
    store: RecordStore, truth: Truth, half: Half, names: Sequence[str]
) -> tuple[list[Row], str]:
    """A row for each method that has scores of single queries of the truth's task, and the clock.

    Raises:
        SystemExit: costs by different clocks; says what to do.
    """
    assert truth.subsets is not None
    members = truth.subsets.members[truth.subsets.of(half)].astype(np.float64)
    found: dict[str, dict[int, RunRecord]] = {}
    for record in newest(store.scan().records):
        same = (record.data_sha256, record.setting) == (truth.data_sha256, truth.setting)
        wanted = record.target == "queries" and record.status == "finished" and not record.varies
        if same and wanted and (not names or record.estimator in names):
            found.setdefault(record.estimator, {})[record.seed] = record
    rows, clocks = [], dict[str, list[str]]()
    for name, by_seed in sorted(found.items()):
        kept = {seed: r for seed, r in sorted(by_seed.items()) if store.has_scores(r)}
        if kept:
            each = [store.load_scores(r).values.double().numpy() @ members.T for r in kept.values()]
            shares = [r.cost["seconds"] / r.training["seconds"] for r in kept.values()]
            rows.append(Row(name, tuple(kept), mean_of(each), 1 + float(np.median(shares))))
            for used in {str(r.training.get(CLOCK, clock.WALL)) for r in kept.values()}:
                clocks.setdefault(used, []).append(name)
    if len(clocks) > 1:
        by = "; ".join(f"{used}: {', '.join(names)}" for used, names in sorted(clocks.items()))
        raise SystemExit(
            f"costs by different clocks cannot be compared ({by}): run all in one sweep with "
            "clock=cpu force=true, or name rows of one clock with --rows"
        )
    return rows, next(iter(clocks), clock.CPU)


def mean_of(each: Sequence[Array]) -> Predict:
    """The mean of the runs' predictions, which is the prediction of the mean of their scores."""
    stacked = np.stack(each)
    return lambda group: np.asarray(stacked[list(group)].mean(axis=0))


def models_row(work: Path, truth: Truth, half: Half) -> Row | None:
    """TRAK over models, from the terms that ``terms`` has left; None without any."""
    assert truth.subsets is not None
    members = truth.subsets.members[truth.subsets.of(half)].astype(np.float64)
    seeds, kernels, residuals, costs = [], [], [], []
    for path in seed_files.paths(work):
        with safe_open(path, framework="np") as file:
            about = file.metadata()
            if (about["data_sha256"], about["setting"]) != (truth.data_sha256, truth.setting):
                continue
            kernels.append(file.get_tensor("kernel").astype(np.float64))
            residuals.append(file.get_tensor("residual"))
        seeds.append(seed_files.seed_of(path))
        costs.append(1 + float(about["seconds"]) / float(about["training_seconds"]))
    if not seeds:
        return None

    def predict(group: Sequence[int]) -> Array:
        kernel = sum(kernels[i] for i in group) / len(group)
        residual = np.mean([residuals[i] for i in group], axis=0)
        return np.asarray((kernel * residual) @ members.T)

    return Row(MODELS, tuple(seeds), predict, float(np.median(costs)))


def terms(arguments: argparse.Namespace) -> None:
    """What each model adds to TRAK's two means, for the seeds that have no file yet."""
    for seed, path in seed_files.missing(arguments.work, arguments.seeds):
        job = seed_files.job_of(
            arguments.experiment, seed, ["targets=[queries]"], arguments.results
        )
        run = images.stored(job, print)
        if run is None:
            raise SystemExit(
                f"no finished run of seed {seed} below {arguments.results / 'checkpoints'}; run "
                f"python -m fine_bench +experiment={arguments.experiment} 'targets=[queries]' "
                f"'estimator=[trak]' seed={seed} results_dir={arguments.results}"
            )
        trak = TRAK("factorized", DIM, seed=seed)
        read = clock.CLOCKS[str(run.facts.get(CLOCK, clock.WALL))]
        start = read()
        replay(trak, problem_of(job, "queries", run.model), run.checkpoints[-1:])
        seconds = read() - start
        kernel, residual = trak.means()
        about = {
            "data_sha256": job.data.sha256, "setting": job.setting, "seconds": f"{seconds:.3f}",
            "training_seconds": f"{run.facts['seconds']:.3f}",
        }  # fmt: skip
        seed_files.save(path, {"kernel": kernel.float(), "residual": residual}, about)
        print(f"{path.name}: {seconds:.1f} s", flush=True)


# ------------------------------------------------------------------------------------------ files


def page(
    experiment: str,
    rows: Sequence[Row],
    shared: Sequence[Row],
    frame: pd.DataFrame,
    compared: Sequence[tuple[str, pd.DataFrame]],
    ceiling: float,
    used: str,
) -> str:
    """The tables, with what is to be known about them."""
    runs = [r for r in RUNS if r in set(frame.runs)]
    q, seeds = rows[0].predict([0]).shape[0], ", ".join(map(str, shared[0].seeds))
    text = [
        "# Averages over runs",
        "",
        f"Made by `python benchmarks/runs_at_equal_compute.py table` from stored scores; "
        f"{experiment}, {q} queries, published half of the truth, whose noise allows "
        f"{ceiling:.3f}.",
        "",
        "LDS of the mean of R runs' scores: mean over the groups of R of a method's runs, with its "
        "95 % jackknife interval over the runs where R is at most about half of them. *Cost*: one "
        f"run with its scores, in trainings' time ({used} clock).",
        "",
        f"| method | runs | cost | {' | '.join(f'R = {r}' for r in runs)} |",
        f"| --- | ---: | ---: | {' | '.join('---:' for _ in runs)} |",
    ]
    place = {(line.method, line.runs): line for line in frame.itertuples()}
    order = sorted(rows, key=lambda row: -place[row.name, 1].lds)
    for row in order:
        cells = [place.get((row.name, r)) for r in runs]
        texts = ["–" if c is None else shown(c.lds, c.lower, c.upper) for c in cells]
        row_text = f"| {row.name} | {len(row.seeds)} | {row.cost:.2f} | {' | '.join(texts)} |"
        text.append(row_text)
    for title, part in compared:
        text += [
            "",
            f"## {title}",
            "",
            f"LDS of the best less that of the others on the runs of seeds {seeds}, paired; 95 % "
            "intervals over the runs (jackknife) and over the queries (bootstrap).",
            "",
            "| best (runs) | other (runs) | difference, over runs | over queries |",
            "| --- | --- | ---: | ---: |",
        ]
        for line in part.itertuples():
            text.append(
                f"| {line.best} ({line.best_runs}) | {line.other} ({line.other_runs}) | "
                f"{shown(line.difference, line.lower, line.upper)} | "
                f"[{line.queries_lower:.3f}, {line.queries_upper:.3f}] |"
            )
    return "\n".join(text) + "\n"


@styled
def draw(experiment: str, frame: pd.DataFrame, ceiling: float) -> Figure:
    """LDS against the time of all trainings and scores."""
    figure = canvas(5.6, 4.0)
    axes = figure.subplots()
    axes.axhline(ceiling, color=GREY, linestyle=":", linewidth=1.0)
    first = frame[frame.runs == 1].sort_values("lds", ascending=False)
    for number, method in enumerate(first.method):
        part = frame[frame.method == method].sort_values("runs")
        error = np.nan_to_num([part.lds - part.lower, part.upper - part.lds])
        axes.errorbar(
            part.trainings, part.lds, yerr=error, label=method, markersize=4, linewidth=1.0,
            color=COLOURS[number % len(COLOURS)], marker=MARKS[number % len(MARKS)],
            elinewidth=0.6,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks([1, 2, 5, 10, 20], labels=["1", "2", "5", "10", "20"])
    axes.minorticks_off()
    axes.set_xlabel("time of all trainings and scores (trainings)")
    axes.set_ylabel("LDS (dotted: ceiling)")
    axes.legend(fontsize=7)
    figure.suptitle(f"{experiment}: averages over runs")
    return figure


def table(arguments: argparse.Namespace) -> None:
    """Measure, compare and write."""
    out, half = arguments.out or arguments.results, arguments.half
    name = f"runs_at_equal_compute--{arguments.experiment}"
    picture = (arguments.out or arguments.results / "images") / f"{name}.png"
    paths = (out / f"{name}.md", out / f"{name}.csv", picture)
    files = Outputs(paths, default=arguments.out is None, force=arguments.force)
    truth = named(arguments.experiment, folders(arguments.results))
    if truth.subsets is None:
        raise SystemExit(
            f"the ground truth {arguments.experiment} has no subsets with several seeds, so there "
            "is no LDS; take mnist_mlp or mnist_mlp_interpolating"
        )
    rows, used = rows_of(RecordStore(arguments.results), truth, half, arguments.rows)
    models = models_row(arguments.work, truth, half)
    rows += [] if models is None else [models]
    rows, shared = common(rows, arguments.least)
    margin = truth.subsets.margin[truth.subsets.of(half)].astype(np.float64)
    frame, ceiling = curves(rows, margin), truth.half(half).lds_ceiling
    n = len(shared[0].seeds)
    # as many as still leave an interval over the runs
    several = min(5, (n + 1) // 2)
    choices = {
        "One run each": dict.fromkeys((row.name for row in shared), 1),
        f"Means of {several} runs each": dict.fromkeys((row.name for row in shared), several),
    }
    for budget in BUDGETS:
        within = {r.name: runs_within(budget, r.cost, n) for r in shared if r.cost <= budget}
        choices[f"Within the time of {budget:g} trainings"] = within
    compared = [
        (title, differences([row for row in shared if row.name in runs], runs, margin))
        for title, runs in choices.items()
        if len(runs) > 1
    ]
    files.write(paths[0], page(arguments.experiment, rows, shared, frame, compared, ceiling, used))
    files.write(paths[1], frame)
    files.write(paths[2], to_bytes(draw(arguments.experiment, frame, ceiling), "png"))
    print(f"written: {', '.join(map(str, paths))}")


def common(rows: Sequence[Row], least: int) -> tuple[list[Row], list[Row]]:
    """The rows with at least so many seeds; and the same on the seeds that all of them have.

    Raises:
        SystemExit: no row, or fewer seeds in common; says what to run.
    """
    enough = [row for row in rows if len(row.seeds) >= least]
    for row in rows:
        if row not in enough:
            print(f"{row.name}: scores of {len(row.seeds)} seeds, fewer than --least {least}")
    shared = sorted(set.intersection(*(set(row.seeds) for row in enough))) if enough else []
    if len(shared) < max(2, least):
        names = ", ".join(row.name for row in enough) or "no row"
        raise SystemExit(
            f"{len(shared)} seeds have scores of all of {names}, and --least is {least}; compute "
            "more (python -m fine_bench +experiment=… 'targets=[queries]' -m seed=0,1,2,…), or "
            "name fewer rows with --rows"
        )

    def on_shared(row: Row) -> Row:
        where = [row.seeds.index(seed) for seed in shared]
        return Row(
            row.name, tuple(shared), lambda group: row.predict([where[i] for i in group]), row.cost
        )

    return enough, [on_shared(row) for row in enough]


def main() -> None:
    """Parse arguments and do one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["terms", "table"])
    parser.add_argument("--experiment", default="mnist_mlp")
    parser.add_argument("--seeds", type=int, nargs="+", default=[*range(10)])
    parser.add_argument("--rows", nargs="+", default=[], help="methods; all that have scores")
    parser.add_argument("--least", type=int, default=6, help="seeds that a row must have")
    parser.add_argument("--work", type=Path, default=Path("results") / "trak_terms")
    parser.add_argument("--half", choices=[*HALVES], default="published")
    add_results(parser)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    {"terms": terms, "table": table}[arguments.command](arguments)


if __name__ == "__main__":
    main()
