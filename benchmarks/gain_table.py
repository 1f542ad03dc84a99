"""The tables of ``gain.py``: what each step adds, in both regimes, against the ground truth."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import safetensors
import torch
from outputs import Outputs, add_force
from scipy.stats import spearmanr
from summation_forms import FORMS
from torch import Tensor

from fine_bench.metrics.consistency import pairwise_consistency
from fine_bench.metrics.detection import detection_metrics
from fine_bench.metrics.fidelity import fidelity
from fine_bench.metrics.intervals import mean_interval, paired_difference
from fine_bench.metrics.lds import lds
from fine_bench.retraining.truth import HALVES, Truth
from fine_bench.retraining.truth_files import folders, named
from fine_bench.store.spreadsheet import to_csv

OUTPUT = Path("results/gain")
FACTORS = ("schedule", "geometry", "observable", "weight", "form")
LEVELS = {
    "schedule": ("final", "epochs", "steps"),
    "geometry": ("euclidean", "ekfac"),
    "observable": ("loss", "margin"),
    "weight": ("lr", "uncertainty"),
    "form": FORMS,
}
METRICS = {
    "fidelity": "fidelity",
    "fidelity_of_ceiling": "of ceiling",
    "fidelity_clean": "clean",
    "calibration_error": "calibration error",
    "slope": "slope",
    "lds": "LDS",
    "auroc_self": "AUROC self",
    "ap_self": "AP self",
    "auroc_validation": "AUROC validation",
    "consistency_self": "ρ self",
    "jaccard_self": "Jaccard self",
    "consistency_validation": "ρ validation",
    "cost": "cost",
}
# one factor changed at a time, everything else alike and averaged over
STEPS = (
    ("form", "raw", "weighted"),
    ("form", "weighted", "accumulated"),
    ("form", "standardised", "accumulated"),
    ("form", "raw", "accumulated"),
    ("form", "raw", "whitened"),
    ("observable", "loss", "margin"),
    ("schedule", "final", "epochs"),
    ("schedule", "epochs", "steps"),
    ("geometry", "euclidean", "ekfac"),
    ("weight", "lr", "uncertainty"),
)
DEFAULT = {
    "schedule": "steps", "geometry": "euclidean", "observable": "margin", "weight": "lr",
    "form": "accumulated",
}  # fmt: skip
EK_FAC_SUM = {
    **DEFAULT,
    "schedule": "epochs",
    "geometry": "ekfac",
    "observable": "loss",
    "form": "raw",
}
TRACIN = {**DEFAULT, "schedule": "epochs", "observable": "loss", "form": "raw"}

CONTENDERS = (
    ("f-INE, steps", DEFAULT),
    ("f-INE, steps, uncertainty", {**DEFAULT, "weight": "uncertainty"}),
    ("f-INE, epochs", {**DEFAULT, "schedule": "epochs"}),
    ("f-INE, final", {**DEFAULT, "schedule": "final"}),
    ("f-INE whitened, steps", {**DEFAULT, "geometry": "ekfac", "form": "whitened"}),
    ("TracIn, epochs", TRACIN),
    ("EK-FAC, epochs", EK_FAC_SUM),
)


@dataclass(frozen=True, eq=False)
class Runs:
    """The scores of several seeds of one experiment.

    Attributes:
        scores: seed → name → ``(rows, n)``.
        facts: seed → name → number.
    """

    scores: Mapping[int, Mapping[str, Tensor]]
    facts: Mapping[int, Mapping[str, float]]


def load(folder: Path) -> Runs:
    """Everything that ``compute`` left for one experiment and source of randomness."""
    scores: dict[int, dict[str, Tensor]] = {}
    facts: dict[int, dict[str, float]] = {}
    for path in sorted(folder.glob("seed*.safetensors")):
        seed = int(path.stem.removeprefix("seed"))
        with safetensors.safe_open(path, framework="pt") as file:
            names = list(file.keys())
            scores[seed] = {name: file.get_tensor(name) for name in names}
            metadata = file.metadata()
        facts[seed] = {
            key: float(value)
            for key, value in metadata.items()
            if key not in ("task", "data_sha256", "setting")
        }
    if not scores:
        raise SystemExit(f"no runs in {folder}; run gain.py compute first")
    return Runs(scores, facts)


def key_of(target: str, cell: Mapping[str, str]) -> str:
    """Name of a cell's scores."""
    return "|".join([target, *(cell[factor] for factor in FACTORS)])


def cells() -> list[dict[str, str]]:
    """Every combination of the factors."""
    return [
        dict(zip(FACTORS, values, strict=True))
        for values in itertools.product(*(LEVELS[factor] for factor in FACTORS))
    ]


def of_self(values: Tensor, truth: Truth, half: str) -> dict[str, float]:
    """Metrics of one run's self-influence."""
    part = truth.half(half)  # type: ignore[arg-type]
    bad = torch.from_numpy(truth.is_bad)
    found = fidelity(values, part.mu_margin, part.ceiling, ~truth.is_bad, part.ceiling_clean)
    detected = detection_metrics(values, bad)
    return {
        "fidelity": found["fidelity"],
        "fidelity_of_ceiling": found["fidelity_of_ceiling"],
        "fidelity_clean": found["fidelity_clean"],
        "calibration_error": found["fidelity_log_linearity_error"],
        "slope": found["fidelity_slope"],
        "auroc_self": detected["auroc"],
        "ap_self": detected["average_precision"],
    }


def per_seed(runs: Runs, truth: Truth, half: str) -> pd.DataFrame:
    """One line a cell and seed."""
    bad = torch.from_numpy(truth.is_bad)
    lines = []
    for cell in cells():
        for seed, scores in runs.scores.items():
            if key_of("self", cell) not in scores:
                continue
            line: dict[str, object] = {**cell, "seed": seed}
            line |= of_self(scores[key_of("self", cell)][0], truth, half)
            queries = scores.get(key_of("queries", cell))
            if queries is not None and truth.subsets is not None:
                rows = truth.subsets.of(half)  # type: ignore[arg-type]
                line["lds"] = lds(
                    queries,
                    truth.subsets.members[rows],
                    truth.subsets.margin[rows, : len(queries)],
                ).mean
            validation = scores.get(key_of("validation", cell))
            if validation is not None:
                line["auroc_validation"] = detection_metrics(-validation[0], bad)["auroc"]
            facts = runs.facts[seed]
            line["cost"] = (
                facts[f"seconds {cell['schedule']}|{cell['geometry']}"] / facts["seconds"]
            )
            lines.append(line)
    return pd.DataFrame(lines)


def consistency(runs: Runs, cell: Mapping[str, str], k: int) -> dict[str, float]:
    """Mean agreement over all pairs of seeds."""
    found: dict[str, list[float]] = {}
    for target, end in (("self", "high"), ("validation", "low")):
        name = key_of(target, cell)
        rows = [scores[name][0] for scores in runs.scores.values() if name in scores]
        for a, b in itertools.combinations(rows, 2):
            pair = pairwise_consistency(a, b, k, end)  # type: ignore[arg-type]
            found.setdefault(f"consistency_{target}", []).append(pair["spearman"])
            found.setdefault(f"jaccard_{target}", []).append(pair["jaccard"])
    return {name: float(np.mean(values)) for name, values in found.items()}


def means(lines: pd.DataFrame, runs: Runs, k: int) -> pd.DataFrame:
    """One line a cell: means over seeds, and the consistency between them."""
    found = lines.drop(columns="seed").groupby(list(FACTORS), sort=False).mean().reset_index()
    between = pd.DataFrame(
        [consistency(runs, {f: row[f] for f in FACTORS}, k) for _, row in found.iterrows()]
    )
    return pd.concat([found, between], axis=1)


def steps(lines: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """What one step adds, paired by seed: at our default, and on average over everything else."""
    rows = []
    for factor, before, after in STEPS:
        others = [f for f in FACTORS if f != factor]
        for scope in ("default", "average"):
            row: dict[str, object] = {"factor": factor, "from": before, "to": after, "scope": scope}
            for metric in metrics:
                if metric not in lines:
                    continue
                table = lines.pivot_table(
                    index=[*others, "seed"], columns=factor, values=metric, observed=True
                )
                if before not in table or after not in table:
                    continue
                both = table[[before, after]].dropna()
                if scope == "default":
                    wanted = tuple(DEFAULT[f] for f in others)
                    if wanted not in both.index.droplevel("seed"):
                        continue
                    both = both.xs(wanted, level=others)
                else:
                    both = both.groupby("seed").mean()
                difference = paired_difference(both[after].to_dict(), both[before].to_dict())
                row[metric] = difference.mean
                row[f"{metric}_lower"], row[f"{metric}_upper"] = difference.lower, difference.upper
            rows.append(row)
    return pd.DataFrame(rows)


def averaged(runs: Runs, truth: Truth, half: str) -> pd.DataFrame:
    """Fidelity of scores averaged over s runs: the rival of a method that needs one."""
    rows = []
    seeds = sorted(runs.scores)
    for name, cell in CONTENDERS:
        key = key_of("self", cell)
        if any(key not in runs.scores[seed] for seed in seeds):
            continue
        for size in (1, 2, 3, 5):
            groups = [seeds[i : i + size] for i in range(0, len(seeds) - size + 1, size)]
            values = {}
            for number, group in enumerate(groups):
                score = torch.stack([runs.scores[seed][key][0] for seed in group]).mean(0)
                values[number] = of_self(score, truth, half)
            cost = np.mean(
                [
                    1 + runs.facts[s][f"seconds {cell['schedule']}|{cell['geometry']}"]
                    / runs.facts[s]["seconds"]
                    for s in seeds
                ]
            )  # fmt: skip
            interval = mean_interval({i: v["fidelity"] for i, v in values.items()})
            rows.append(
                {
                    "method": name, "runs": size, "trainings' worth of time": size * cost,
                    "fidelity": interval.mean, "lower": interval.lower, "upper": interval.upper,
                    "fidelity_clean": np.mean([v["fidelity_clean"] for v in values.values()]),
                    "groups": len(groups),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def by_source(work: Path, experiment: str) -> pd.DataFrame:
    """Agreement between runs that differ in one source of randomness, or in both."""
    rows = []
    for source in ("initialisation", "order", "both"):
        folder = work / experiment / source
        if not folder.exists():
            continue
        runs = load(folder)
        for name, cell in CONTENDERS:
            key = key_of("self", cell)
            if key_of("validation", cell) not in next(iter(runs.scores.values())):
                continue
            pairs = [
                float(spearmanr(a[key][0], b[key][0]).statistic)
                for a, b in itertools.combinations(runs.scores.values(), 2)
            ]
            validation = key_of("validation", cell)
            others = [
                float(spearmanr(a[validation][0], b[validation][0]).statistic)
                for a, b in itertools.combinations(runs.scores.values(), 2)
            ]
            rows.append(
                {
                    "randomness": source, "method": name, "runs": len(runs.scores),
                    "ρ self": np.mean(pairs), "ρ validation": np.mean(others),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def markdown(table: pd.DataFrame, digits: int = 3) -> str:
    """A table in Markdown."""

    def text(value: object) -> str:
        if isinstance(value, float):
            return "–" if np.isnan(value) else f"{value:.{digits}f}"
        return str(value)

    header = [str(column) for column in table.columns]
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
    lines += ["| " + " | ".join(map(text, row)) + " |" for row in table.itertuples(index=False)]
    return "\n".join(lines)


def with_intervals(table: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """``mean [lower, upper]`` in one column a metric."""
    shown = table[["factor", "from", "to", "scope"]].copy()
    for metric in metrics:
        if metric in table:
            shown[METRICS[metric]] = [
                "–" if np.isnan(m) else f"{m:+.3f} [{low:+.3f}, {high:+.3f}]"
                for m, low, high in zip(
                    table[metric], table[f"{metric}_lower"], table[f"{metric}_upper"], strict=True
                )
            ]
    return shown


def recipes(both: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """All cells by the worse of the two regimes' share of the ceiling."""
    joined = pd.concat(
        {name: t.set_index(list(FACTORS))["fidelity_of_ceiling"] for name, t in both.items()},
        axis=1,
    )
    joined["worst"] = joined.min(axis=1)
    return joined.sort_values("worst", ascending=False).reset_index()


def write(arguments: argparse.Namespace) -> None:
    """Compute all tables and write them."""
    output: Path = arguments.output
    names = [f"{e}{part}.csv" for e in arguments.experiments for part in ("", "_steps")]
    files = Outputs(
        [output / name for name in (*names, "recipes.csv", "gain.md")],
        default=output == OUTPUT, force=arguments.force,
    )  # fmt: skip
    text = [
        "# Where the gain comes from",
        "",
        f"Made by `python benchmarks/gain.py table --half {arguments.half}` from the runs of "
        "`python benchmarks/gain.py compute`. Means over seeds; fidelity is Spearman's correlation "
        f"of *self* scores with the μ of retraining ({arguments.half} half of the bank). "
        "*Calibration error*: relative RMS distance of decile means from proportionality. *Cost*: "
        "seconds of watching or scoring in units of the plain training.",
        "",
    ]
    both = {}
    metrics = [m for m in METRICS if m != "slope"]
    for experiment in arguments.experiments:
        truth = named(experiment, folders(arguments.results))
        runs = load(arguments.work / experiment / "both")
        lines = per_seed(runs, truth, arguments.half)
        table = means(lines, runs, int(truth.is_bad.sum()))
        both[experiment] = table
        files.write(output / f"{experiment}.csv", to_csv(table))
        changes = steps(lines, metrics)
        files.write(output / f"{experiment}_steps.csv", to_csv(changes))
        facts = pd.DataFrame(runs.facts.values()).mean()
        part = truth.half(arguments.half)
        shown = table.sort_values("fidelity", ascending=False)
        shown = shown.rename(columns=METRICS)[
            [*FACTORS, *(METRICS[m] for m in METRICS if m in table)]
        ]
        text += [
            f"## {experiment}",
            "",
            f"{len(runs.scores)} seeds; training accuracy on the given labels "
            f"{facts['train_accuracy']:.3f}, test accuracy {facts['test_accuracy']:.3f}. Noise "
            f"ceiling {part.ceiling:.3f}, within clean {part.ceiling_clean:.3f}, of the LDS "
            f"{part.lds_ceiling:.3f}.",
            "",
            "### What one step adds, paired by seed, with 95 % intervals",
            "",
            "*default*: the other factors at in-batch, Euclidean, margin, accumulated; *average*: "
            "over all their combinations.",
            "",
            markdown(
                with_intervals(
                    changes,
                    ["fidelity", "fidelity_clean", "calibration_error", "lds", "ap_self",
                     "auroc_validation"],
                )
            ),
            "",
            "### Averages over runs, at equal compute",
            "",
            markdown(averaged(runs, truth, arguments.half)),
            "",
            "### Consistency by source of randomness",
            "",
            markdown(by_source(arguments.work, experiment)),
            "",
            "### All combinations",
            "",
            markdown(shown),
            "",
        ]  # fmt: skip
    ranked = recipes(both)
    files.write(output / "recipes.csv", to_csv(ranked))
    text += [
        "## Both regimes",
        "",
        "Share of the noise ceiling; ordered by the worse of the two.",
        "",
        markdown(ranked.head(20)),
        "",
    ]
    files.write(output / "gain.md", "\n".join(text))
    print("\n".join(text))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``table``."""
    parser.add_argument("--half", choices=HALVES, default="published")
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--output", type=Path, default=OUTPUT)
    add_force(parser)
    parser.add_argument(
        "--experiments", nargs="+", default=["mnist_mlp", "mnist_mlp_interpolating"]
    )
    parser.set_defaults(call=write)
