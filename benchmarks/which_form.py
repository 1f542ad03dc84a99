"""Which form of f-INE agrees best with retraining: every form on every bank, and the worst case.

    python -m fine_bench +experiment=mnist_mlp 'targets=[self]' -m seed=0,1,2,3,4,5
    (likewise the other experiments with a bank, then ``fine-bench publish``)
    python benchmarks/which_form.py [--results results] [--output DIR]

Reads ``published/leaderboard.csv``: target *self*, rows of f-INE with default options, and the
controls and baselines they have to be held beside. For each task with a ground truth:

- of ceiling    fidelity (Spearman's correlation with the μ of retraining, published half of the
                bank) over the noise ceiling of the truth;
- slope         true μ in one predicted unit, through the origin: 1 where μ is a number;
- Jaccard       agreement of two runs on their 20 % largest scores.

*Shortfall* of a form is the most that it stays behind the best *form* of any bank, in shares of the
ceiling: the form with the smallest is the default to choose where nothing is known about a task. It
is given for forms that have a row on every bank.

Writes ``which_form.md``. Exit status: 0, or 2 where a table has no such row.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from outputs import Outputs, add_force

BANKS = {
    "mnist_mlp": "MLP, flips not fitted",
    "mnist_mlp_interpolating": "MLP, flips fitted",
    "mnist_cnn": "CNN",
    "mnist_atypical": "no wrong labels",
    "cifar10n_small": "human errors",
}
"""Tasks with a ground truth that have *self* scores, easy ones first."""

FORMS = ("fine", "fine_weighted", "fine_plain", "fine_loss", "fine_standardised", "fine_ekfac")
OTHERS = ("trak", "tracin", "influence_function", "mean_loss", "el2n", "aum")
METRICS = {
    "fidelity_of_ceiling": "of ceiling ↑",
    "fidelity_slope": "slope",
    "consistency_jaccard_top_20": "Jaccard, top 20 % ↑",
}
_BAD_INPUT = 2


def read(path: Path) -> pd.DataFrame:
    """One line a (task, estimator, metric) with ``mean``, ``lower``, ``upper`` and ``n``.

    Raises:
        SystemExit: no table there, or a row that stands in it under two settings.
    """
    if not path.is_file():
        raise SystemExit(f"{path} is not there; make it by fine-bench publish")
    rows = pd.read_csv(path, low_memory=False)
    rows = rows[
        (rows["target"] == "self")
        & rows["task"].isin(BANKS)
        & rows["estimator"].isin([*FORMS, *OTHERS])
        & rows["metric"].isin(METRICS)
        & rows["options"].isna()
        & ~rows["limit"].astype(bool)
        & rows["mean"].notna()
    ]
    twice = rows[rows.duplicated(["task", "estimator", "metric"])]
    if len(twice):
        first = twice.iloc[0]
        raise SystemExit(
            f"{path} has several rows {first['estimator']} for {first['task']}; expected one a "
            "task. Publish the experiment as it stands in conf/experiment only"
        )
    return rows


def shortfalls(fidelity: pd.DataFrame) -> pd.Series:
    """Largest distance to the best form of any task.

    Args:
        fidelity: a row a form, a column a task; NaN where a form has no row.

    Returns:
        by form; NaN where one is missing.
    """
    behind = fidelity.max() - fidelity
    return behind.max(axis=1, skipna=False)


def cell(rows: pd.DataFrame, digits: int) -> str:
    """Mean with its interval, where there is one; a dash where there is no row."""
    if not len(rows):
        return "–"
    mean, lower, upper = (float(rows.iloc[0][name]) for name in ("mean", "lower", "upper"))
    text = f"{mean:.{digits}f}"
    return text if lower != lower else f"{text} [{lower:.{digits}f}, {upper:.{digits}f}]"


def markdown(rows: pd.DataFrame) -> str:
    """The page."""
    tasks = [task for task in BANKS if task in set(rows["task"])]
    known = [name for name in (*FORMS, *OTHERS) if name in set(rows["estimator"])]
    runs = rows.groupby("task")["n"].max()
    lines = [
        "# Which form of f-INE",
        "",
        "Made by `python benchmarks/which_form.py` from the published tables: target *self*, "
        "published half of each bank, means over run seeds with 95 % intervals; Jaccard is the "
        "mean over pairs of runs. –: no row.",
        "",
    ]
    for metric, label in METRICS.items():
        lines += [
            f"## {label}",
            "",
            "| method | "
            + " | ".join(f"{BANKS[t]} (`{t}`, n = {runs[t]:.0f})" for t in tasks)
            + " |",
            "| --- |" + " ---: |" * len(tasks),
        ]
        for name in known:
            part = rows[(rows["estimator"] == name) & (rows["metric"] == metric)]
            # scores of other methods are in units of their own
            if metric == "fidelity_slope" and name not in FORMS:
                continue
            cells = [cell(part[part["task"] == task], 3) for task in tasks]
            lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
        lines.append("")
    of_ceiling = rows[rows["metric"] == "fidelity_of_ceiling"]
    table = of_ceiling.pivot_table(index="estimator", columns="task", values="mean")
    table = table.reindex(index=list(FORMS), columns=tasks)
    worst = shortfalls(table)
    lines += [
        "## Largest shortfall",
        "",
        "How far a form stays behind the best form of a bank, at most, in shares of the ceiling:",
        "",
        "| form | shortfall | where |",
        "| --- | ---: | --- |",
    ]
    behind = table.max() - table
    for name in worst.dropna().sort_values(kind="stable").index:
        lines.append(f"| `{name}` | {worst[name]:.3f} | `{behind.loc[name].idxmax()}` |")
    missing = [name for name in FORMS if worst.isna()[name]]
    if missing:
        lines += ["", f"Not on every bank: {', '.join(f'`{name}`' for name in missing)}."]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Read, compare, write; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--output", metavar="DIR", type=Path, help="default: the results folder")
    add_force(parser)
    arguments = parser.parse_args(argv)
    folder = arguments.output or arguments.results
    path = folder / "which_form.md"
    outputs = Outputs([path], default=arguments.output is None, force=arguments.force)
    rows = read(arguments.results / "published" / "leaderboard.csv")
    if not len(rows):
        print(
            f"no fidelity of {', '.join(FORMS)} on {', '.join(BANKS)} in {arguments.results}; run "
            "the experiments and publish them",
            file=sys.stderr,
        )
        return _BAD_INPUT
    outputs.write(path, markdown(rows))
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
