"""What one run says of the next: intervals of groups, and flags that repeat.

    FINE_BENCH_DATA=… python benchmarks/next_run.py compute --experiment digits_mislabel
    FINE_BENCH_DATA=… python benchmarks/next_run.py compute --experiment mnist_mlp \\
        --name mnist_2000 --override task.n_train=2000 trainer.max_epochs=10
    python benchmarks/next_run.py groups
    python benchmarks/next_run.py repeats

``compute`` trains each seed once, watched by f-INE on *self* and on *validation*, the latter with
``group_errors=True``. ``groups`` asks of groups of several kinds and sizes how often the interval
of one run holds the mean μ_S of the other runs (``results/group_coverage.md``, ``.csv``); no
truth is used but for naming a kind of group *flipped*. ``repeats`` flags the most suspicious
examples of each run, keeps those of which at most α should not repeat
(``fine_bench.theory.repeats``), and counts in each other run how many did not
(``results/decisions.md``, ``.csv``).
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import seed_files
import torch
from outputs import add_out, table_files
from torch import Tensor
from torch.utils.data import TensorDataset

from fine_bench.callback import FINECallback
from fine_bench.metrics.groups import group_influence
from fine_bench.runner.backends import images
from fine_bench.theory.false_discovery import benjamini_hochberg
from fine_bench.theory.repeats import at_most, repeat_p_values, repeat_probability
from fine_bench.types import InfluenceScores

OUT = Path("results")
SIZES = (1, 8, 30, 300)
KINDS = ("random", "one class", "flipped", "flipped, one class")
N_GROUPS = 200
LEVELS = (0.05, 0.1, 0.2)
SHARES = (0.05, 0.1, 0.2)
Z = 1.959963984540054

Run = dict[str, Tensor]
Positions = npt.NDArray[np.int64]


def compute(arguments: argparse.Namespace) -> None:
    """Train and watch the seeds that have no file yet."""
    torch.set_num_threads(1)
    name = arguments.name or arguments.experiment
    for seed, path in seed_files.missing(arguments.work / name, arguments.seeds):
        job = seed_files.job_of(
            arguments.experiment, seed, arguments.override, arguments.work / "runs"
        )
        data = job.data
        watchers = {
            "self": FINECallback("self", step_weight="uncertainty"),
            "validation": FINECallback(
                "validation",
                queries=TensorDataset(data.query_x, data.query_y),
                step_weight="uncertainty",
                group_errors=True,
            ),
        }
        run = images.train(job, list(watchers.values()), None)
        found: Run = {"y": data.y.clone(), "is_bad": data.truth.is_bad.clone()}
        for target, watcher in watchers.items():
            scores = watcher.scores()
            assert scores.std_error is not None
            assert scores.n_observations is not None
            found |= {
                f"{target}|mu": scores.values[0],
                f"{target}|error": scores.std_error[0],
                f"{target}|seen": scores.n_observations,
            }
            if "group_parts" in scores.extras:
                found[f"{target}|parts"] = scores.extras["group_parts"]
        found |= {f"group|{name}": members for name, members in data.groups.items()}
        seed_files.save(path, found)
        print(f"{name} seed {seed}: test accuracy {run.facts['test_accuracy']:.4f}", flush=True)


def load(work: Path) -> dict[str, list[Run]]:
    """Task → its runs, by seed."""
    tasks = seed_files.load(work, "next_run.py")
    return {task: list(runs.values()) for task, runs in tasks.items()}


def drawn(run: Mapping[str, Tensor], kind: str, size: int, seed: int) -> list[Positions]:
    """Groups of a kind, from a stream of their own; none where there are too few members."""
    rng = np.random.default_rng([seed, KINDS.index(kind), size])
    y, bad = run["y"].numpy(), run["is_bad"].numpy()
    found = []
    for _ in range(N_GROUPS):
        pool = np.ones(len(y), dtype=bool)
        if "class" in kind:
            pool &= y == rng.choice(np.unique(y))
        if "flipped" in kind:
            pool &= bad
        rows = np.flatnonzero(pool)
        if size <= len(rows) - 1:
            found.append(rng.choice(rows, size, replace=False))
    return found


def scores_of(run: Mapping[str, Tensor]) -> InfluenceScores:
    """The scores of *validation* as the callback gave them."""
    return InfluenceScores(
        run["validation|mu"][None],
        "fine",
        "validation",
        std_error=run["validation|error"][None],
        extras={"group_parts": run["validation|parts"]},
    )


def held(totals: npt.NDArray[np.float64], errors: npt.NDArray[np.float64]) -> float:
    """Share of (run, group) in which ± z error holds the mean of the other runs, ``(S, G)``."""
    runs = len(totals)
    others = (totals.sum(0) - totals) / (runs - 1)
    # the mean of S − 1 runs is itself uncertain
    gap = np.abs(totals - others) / (1.0 + 1.0 / (runs - 1)) ** 0.5
    return float((gap <= Z * errors).mean())


def group_rows(task: str, runs: Sequence[Run]) -> Iterator[dict[str, object]]:
    """Coverage of groups of each kind and size."""
    scores = [scores_of(run) for run in runs]
    for kind, size in itertools.product(KINDS, SIZES):
        groups = drawn(runs[0], kind, size, seed=0)
        if len(groups) < N_GROUPS // 4:
            continue
        found = [[group_influence(s, group.tolist()) for group in groups] for s in scores]
        totals = np.array([[f.mu for f in of_run] for of_run in found])
        measured = np.array([[f.std_error for f in of_run] for of_run in found])
        single = [np.array([s.std_error[0, g].double().numpy() for g in groups]) for s in scores]  # type: ignore[index]
        bound = np.array([errors.sum(1) for errors in single])
        independent = np.array([np.sqrt((errors**2).sum(1)) for errors in single])
        spread = totals.std(0, ddof=1)
        correlations = [f.correlation for of_run in found for f in of_run]
        yield {
            "task": task,
            "kind": kind,
            "size": size,
            "groups": len(groups),
            "runs": len(runs),
            "bound": held(totals, bound),
            "independent": held(totals, independent),
            "measured": held(totals, measured),
            "bound_excludes_0": float((np.abs(totals) > Z * bound).mean()),
            "measured_excludes_0": float((np.abs(totals) > Z * measured).mean()),
            "bound_width": float(np.median(bound) / np.median(spread)),
            "measured_width": float(np.median(measured) / np.median(spread)),
            "correlation": float("nan") if size == 1 else float(np.median(correlations)),  # type: ignore[arg-type]
        }


def named_rows(task: str, runs: Sequence[Run]) -> Iterator[dict[str, object]]:
    """The groups that a task names, by its first run."""
    scores = scores_of(runs[0])
    bare = InfluenceScores(scores.values, "fine", "validation", std_error=scores.std_error)
    for key in sorted(k for k in runs[0] if k.startswith("group|")):
        members = runs[0][key]
        found, bound = group_influence(scores, members), group_influence(bare, members)
        yield {
            "task": task, "group": key.removeprefix("group|"), "size": len(members),
            "mu": found.mu, "lower": found.lower, "upper": found.upper,
            "bound_lower": bound.lower, "bound_upper": bound.upper,
            "correlation": found.correlation,
        }  # fmt: skip


def groups(arguments: argparse.Namespace) -> None:
    """Write the tables of groups."""
    files, csv, page = table_files("group_coverage", arguments.out, OUT, force=arguments.force)
    tasks = load(arguments.work)
    many = {task: runs for task, runs in tasks.items() if len(runs) >= 5}
    frame = pd.DataFrame([row for task, runs in many.items() for row in group_rows(task, runs)])
    named = [row for task, runs in tasks.items() for row in named_rows(task, runs)]
    files.write(csv, frame)
    text = [
        "# Intervals of groups from one run",
        "",
        f"Made by `{arguments.command}` from the runs of `next_run.py compute`. Target "
        "*validation*, row `fine`. Share of (run, group) pairs in which the 95 % interval of one "
        "run holds the mean μ_S of the other runs of the same task, whose own uncertainty is taken "
        "out (the gap is divided by sqrt(1 + 1/(S − 1)), S runs): how often it holds the mean over "
        "many runs; runs differ in initialisation and order. *bound*: members' errors added up, "
        "which holds whatever they have in common. "
        "*independent*: their squares added up. *measured*: over epochs, `group_errors=True`. "
        "*excludes 0*: share of intervals without 0, by the bound and measured. *width*: median "
        "error over the median spread of μ_S between runs; 1 is right. *correlation*: median over "
        "groups of the mean correlation between two members' errors. Groups are drawn anew for "
        "each kind and size; *flipped* ones are of wrong labels, *one class* of one given label. "
        "The factor on the jackknife (`INFLATION`) is that of single examples, learnt from other "
        "runs; nothing was fitted here.",
        "",
        "| task | group | size | groups | runs | bound | independent | measured | excludes 0 | "
        "width | correlation |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in frame.to_dict("records"):
        correlation = "–" if r["size"] == 1 else f"{r['correlation']:.3f}"
        text.append(
            f"| {r['task']} | {r['kind']} | {r['size']} | {r['groups']} | {r['runs']} | "
            f"{r['bound']:.3f} | {r['independent']:.3f} | **{r['measured']:.3f}** | "
            f"{r['bound_excludes_0']:.2f}, {r['measured_excludes_0']:.2f} | "
            f"{r['bound_width']:.2f}, {r['measured_width']:.2f} | {correlation} |"
        )
    if named:
        text += [
            "", "## Groups that a task names, by its first run alone", "",
            "| task | group | size | μ | measured | bound | correlation |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
        ]  # fmt: skip
        text += [
            f"| {r['task']} | {r['group']} | {r['size']} | {r['mu']:.2f} | [{r['lower']:.2f}, "
            f"{r['upper']:.2f}] | [{r['bound_lower']:.2f}, {r['bound_upper']:.2f}] | "
            f"{r['correlation']:.2f} |"
            for r in named
        ]
    files.write(page, "\n".join(text) + "\n")
    print(frame.to_string(index=False))


def repeat_rows(task: str, target: str, runs: Sequence[Run]) -> Iterator[dict[str, object]]:
    """Of the flagged of each run, the share that another run does not flag."""
    sign = 1.0 if target == "self" else -1.0
    bad = runs[0]["is_bad"].numpy()
    values = [sign * run[f"{target}|mu"].double().numpy() for run in runs]
    for share in SHARES:
        thresholds = [float(np.quantile(v, 1.0 - share)) for v in values]
        asked = []
        for run, v, tau in zip(runs, values, thresholds, strict=True):
            error, seen = run[f"{target}|error"].numpy(), run[f"{target}|seen"].numpy()
            asked.append(
                (
                    repeat_probability(v, error, tau, "high", seen),
                    repeat_p_values(v, error, tau, "high", seen),
                )
            )
        for level in LEVELS:
            names = ("all", "prior", "none")
            rules: dict[str, list[tuple[float, int, float]]] = {name: [] for name in names}
            for s, (chance, p) in enumerate(asked):
                candidates = values[s] >= thresholds[s]
                chosen = {
                    "all": candidates,
                    "prior": at_most(chance, candidates, level),
                    "none": benjamini_hochberg(p, level).rejected,
                }
                for rule, flagged in chosen.items():
                    right = float(bad[flagged].mean()) if flagged.any() else float("nan")
                    for r in range(len(runs)):
                        if r != s:
                            again = values[r][flagged] >= thresholds[s]
                            lost = float((~again).mean()) if flagged.any() else 0.0
                            rules[rule].append((lost, int(flagged.sum()), right))
            line: dict[str, object] = {
                "task": task, "target": target, "flagged_share": share, "alpha": level,
                "runs": len(runs), "examples": len(bad),
            }  # fmt: skip
            for rule, outcomes in rules.items():
                table = np.array(outcomes)
                line |= {
                    f"{rule}_lost": float(table[:, 0].mean()),
                    f"{rule}_flagged": float(table[:, 1].mean()),
                    f"{rule}_wrong_labels": float(np.nanmean(table[:, 2]))
                    if np.isfinite(table[:, 2]).any()
                    else float("nan"),
                }
            yield line


BINS = (0.0, 0.05, 0.2, 0.4, 0.6, 0.8, 0.95, 1.0)


def calibration(target: str, runs: Sequence[Run]) -> list[tuple[float, float, int]]:
    """(mean probability, share that another run flagged, examples) by bins, a fifth flagged."""
    sign = 1.0 if target == "self" else -1.0
    said, came = [], []
    for s, run in enumerate(runs):
        v = sign * run[f"{target}|mu"].double().numpy()
        tau = float(np.quantile(v, 0.8))
        said.append(
            repeat_probability(
                v, run[f"{target}|error"].numpy(), tau, "high", run[f"{target}|seen"].numpy()
            )
        )
        others = [
            sign * o[f"{target}|mu"].double().numpy() >= tau for o in runs[:s] + runs[s + 1 :]
        ]  # type: ignore[operator]
        came.append(np.mean(others, 0))
    chance, share = np.concatenate(said), np.concatenate(came)
    place = np.clip(np.digitize(chance, BINS) - 1, 0, len(BINS) - 2)
    return [
        (float(chance[place == b].mean()), float(share[place == b].mean()), int((place == b).sum()))
        for b in range(len(BINS) - 1)
        if (place == b).any()
    ]


def repeats(arguments: argparse.Namespace) -> None:
    """Write the tables of flags that repeat."""
    files, csv, page = table_files("decisions", arguments.out, OUT, force=arguments.force)
    tasks = {task: runs for task, runs in load(arguments.work).items() if len(runs) >= 5}
    pairs = list(itertools.product(tasks, ("self", "validation")))
    frame = pd.DataFrame([row for t, target in pairs for row in repeat_rows(t, target, tasks[t])])
    files.write(csv, frame)
    text = [
        "# Of the flagged, how many would another run not flag?",
        "",
        f"Made by `{arguments.command}` from the runs of `next_run.py compute`. Row `fine`; the "
        "most suspicious share of the examples of a run are its candidates, and the score of the "
        "last of them is the threshold τ. *all*: the candidates. *prior*: those of which "
        "`fine_bench.theory.repeats.at_most` says that at most α will not repeat, from this run "
        "alone. *no prior*: Benjamini–Hochberg on `repeat_p_values`. *lost*: share of the flagged "
        "whose score lies below τ in another run, mean over all ordered pairs of runs (a run that "
        "flags none loses none). *n*: flagged, mean over runs. *wrong*: share of wrong labels "
        "among them, known here because the flips were planted; no rule saw it.",
        "",
        "| task | target | candidates | α | all: lost | n | wrong | prior: lost | n | wrong | "
        "no prior: lost | n |",
        f"| --- | --- |{' ---: |' * 10}",
    ]
    for r in frame.to_dict("records"):
        wrong = [f"{r[f'{k}_wrong_labels']:.2f}".replace("nan", "–") for k in ("all", "prior")]
        text.append(
            f"| {r['task']} | {r['target']} | {r['flagged_share']:.0%} | {r['alpha']:.2f} | "
            f"{r['all_lost']:.3f} | {r['all_flagged']:.0f} | {wrong[0]} | "
            f"**{r['prior_lost']:.3f}** | {r['prior_flagged']:.1f} | {wrong[1]} | "
            f"{r['none_lost']:.3f} | {r['none_flagged']:.1f} |"
        )
    text += [
        "", "## Is the probability one?", "",
        "A fifth flagged. Said: mean probability of the examples in a bin; came: share of the "
        "other runs that flagged them.", "",
        "| task | target | said / came (examples) |", "| --- | --- | --- |",
    ]  # fmt: skip
    for task, target in pairs:
        bins = calibration(target, tasks[task])
        cells = ", ".join(f"{said:.2f} / {came:.2f} ({n})" for said, came, n in bins)
        text.append(f"| {task} | {target} | {cells} |")
    files.write(page, "\n".join(text) + "\n")
    print(frame.to_string(index=False))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("results/next_run/work"))
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("compute", help="train and watch")
    seed_files.add_compute(one, range(10))
    one.set_defaults(call=compute)
    for name, call in (("groups", groups), ("repeats", repeats)):
        more = commands.add_parser(name)
        add_out(more, OUT)
        more.set_defaults(call=call, command=f"python benchmarks/next_run.py {name}")
    arguments = parser.parse_args(argv)
    arguments.call(arguments)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
