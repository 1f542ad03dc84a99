"""``fine-bench clean`` beside cleanlab's Datalab: what finds more, how stably, at which cost.

Both get the same model, trained in the same way (early stopping on a held-out tenth). Datalab gets
out-of-sample probabilities of five-fold cross-validation, as its documentation asks, and gives its
label score. We get 1, 2 and 3 runs of two folds, three where the network is convolutional, and give
the scores of ``fine_bench.runner.clean.scoring``; a fourth run says what repeats. Everything is
done ten times, with other seeds, on each set but the last, which is done once:

- ``table``: breast cancer of scikit-learn, 569 rows, 10 % of the labels flipped;
- ``text``: paragraphs of the docstrings of six packages that this project brings, 300 each; the
  label is the package, whose name is taken out of them; 10 % flipped to any other;
- ``uniform``: 2,000 images of MNIST, 10 % flipped to any other digit, one hidden layer (``mlp``);
- ``asymmetric``: 2,000 images of MNIST, 40 % of four digits flipped to the one that looks like it,
  ``mlp`` as well;
- ``cifar10n``: the first 4,000 images of CIFAR-10 with people's labels (majority of three), the
  default of images (``gn_cnn``).

Model, training and default score were chosen on other draws, rows and packages than these
(``scoring`` has the formula): 2,000 other images of MNIST, rows 6,000 to 9,999 of CIFAR-10N,
docstrings of NumPy, SciPy, pandas, scikit-learn, PyTorch and Matplotlib, and as tables the wines,
the diabetes patients, digits and simulated rows. CIFAR-10N had its part in the form of the score
and in what is a convolutional network's alone, three folds and the words of its best epoch; none in
the weight of 0.3, in the mean of parameters and in the 32 rows a step.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from outputs import Outputs, add_force
from sklearn.datasets import load_breast_cancer
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold

from fine_bench.metrics.error_rate import repeated
from fine_bench.runner.clean.features import features
from fine_bench.runner.clean.inputs.items import Items
from fine_bench.runner.clean.inputs.recognise import load
from fine_bench.runner.clean.recipe import Recipe, own_recipe, recipe_for
from fine_bench.runner.clean.repeats import chance_to_repeat, repeatable
from fine_bench.runner.clean.scoring import SCORES, Score, score_of, suspects
from fine_bench.runner.clean.training import Run, joined, train_model, train_run
from fine_bench.seeds import derive

OUTPUT = Path("results/clean.md")
CASES = ("table", "text", "uniform", "asymmetric", "cifar10n")
TIMES = {"cifar10n": 1}
"""Repetitions of a set; ten of the others."""
MODELS = {"uniform": "mlp", "asymmetric": "mlp"}
"""Models besides the defaults."""
RUNS = 3
FOLDS = 5
FLIPPED = 0.1
LEVEL = 0.1
TRUSTED = 200
PACKAGES = ("networkx", "pydantic", "pytorch_lightning", "sympy", "torchmetrics", "wandb")
PARAGRAPHS = 300
PAIRS = ((4, 9), (7, 1), (3, 8), (5, 6))


@dataclass(frozen=True, eq=False)
class Case:
    """A set with known wrong labels.

    Attributes:
        name: of ``CASES``.
        items: as ``clean`` reads them.
        bad: ``(n,)`` boolean.
    """

    name: str
    items: Items
    bad: NDArray[np.bool_]


@dataclass(frozen=True)
class Line:
    """A row of the table.

    Attributes:
        case, method: what.
        ap: average precision of each repetition.
        stable: share of the wrong rows that are among the K highest in every repetition, K being
            their number.
        work: epochs on all rows, mean over the repetitions.
        cpu: seconds of CPU, the same.
    """

    case: str
    method: str
    ap: tuple[float, ...]
    stable: float
    work: float
    cpu: float


# ------------------------------------------------------------------------------------------ sets


def flip(labels: NDArray[np.int64], n_classes: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """A tenth of the labels, each to any other class."""
    flipped = labels.copy()
    rows = rng.permutation(len(labels))[: round(FLIPPED * len(labels))]
    flipped[rows] = (labels[rows] + rng.integers(1, n_classes, len(rows))) % n_classes
    return flipped


def paragraphs(package: str) -> list[str]:
    """Paragraphs of 12 to 80 words from the docstrings of a package, its name taken out, sorted."""
    found = set()
    root = importlib.import_module(package)
    for thing in _public(root, package):
        text = inspect.getdoc(thing) or ""
        for part in re.split(r"\n\s*\n", text):
            words = part.split()
            if 12 <= len(words) <= 80 and ">>>" not in part:
                found.add(re.sub(package, "it", " ".join(words), flags=re.IGNORECASE))
    return sorted(found)


def _public(root: ModuleType, package: str) -> list[Any]:
    """Public functions, classes and methods that a package names at its top and below it."""
    modules = [root]
    for _, thing in sorted(inspect.getmembers(root, inspect.ismodule)):
        if thing.__name__.startswith(f"{package}."):
            modules.append(thing)
    found = []
    for module in modules:
        for name, thing in sorted(vars(module).items()):
            if name.startswith("_") or not (inspect.isclass(thing) or inspect.isroutine(thing)):
                continue
            if not str(getattr(thing, "__module__", "")).startswith(package):
                continue
            found.append(thing)
            if inspect.isclass(thing):
                found += [v for n, v in sorted(vars(thing).items()) if not n.startswith("_")]
    return found


def make(name: str) -> Case:
    """One of the sets."""
    rng = np.random.default_rng(derive(0, f"clean_against_cleanlab/{name}"))
    if name == "table":
        table = load_breast_cancer()
        right = table.target.astype(np.int64)
        given = flip(right, 2, rng)
        return _case(name, load((table.data, given)), right, given)
    if name == "text":
        import pandas as pd

        texts, classes = [], []
        for number, package in enumerate(PACKAGES):
            every = paragraphs(package)
            for k in rng.permutation(len(every))[:PARAGRAPHS]:
                texts.append(every[k])
                classes.append(number)
        right = np.array(classes, dtype=np.int64)
        given = flip(right, len(PACKAGES), rng)
        return _case(name, load(pd.DataFrame({"text": texts, "label": given})), right, given)
    if name == "uniform":
        from fine_bench.data.mnist import mnist_mislabel

        task = mnist_mislabel(seed=0, n_train=2000, noise_rate=FLIPPED)
    elif name == "asymmetric":
        from fine_bench.data.structured import asymmetric

        task = asymmetric(
            data="mnist", seed=0, confusions=PAIRS, n_train=2000, noise_rate=0.4,
            n_query=10,
        )  # fmt: skip
    else:
        from fine_bench.data.cifar10n import cifar10n

        task = cifar10n(seed=0, n_train=10_000)
    x = task.x.numpy()
    right, given = task.clean_y.numpy(), task.y.numpy()
    if name == "cifar10n":
        x, right, given = x[:4000], right[:4000], given[:4000]
    return _case(name, load((x, given)), right, given)


def _case(name: str, items: Items, right: NDArray[np.int64], given: NDArray[np.int64]) -> Case:
    assert len(items) == len(right), "rows were left out"
    return Case(name, items, right != given)


# --------------------------------------------------------------------------------------- methods


def cross_validated(
    x: torch.Tensor, y: torch.Tensor, n_classes: int, recipe: Recipe, seed: int
) -> tuple[NDArray[np.float64], int]:
    """Out-of-sample probabilities of five folds, and the rows that went through training steps."""
    p = np.zeros((len(x), n_classes))
    examples = 0
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    for number, (trained, left) in enumerate(folds.split(np.zeros(len(y)), y.numpy())):
        run = train_model(
            x, y, n_classes, trained, recipe, seed=derive(seed, f"fold/{number}"), influence=False
        )
        p[left] = run.probabilities[left]
        examples += run.examples
    return p, examples


def datalab(p: NDArray[np.float64], y: NDArray[np.int64]) -> tuple[NDArray[np.float64], Any]:
    """Datalab's label score, turned so that high is suspicious, and what it calls an issue."""
    import contextlib
    import io

    from cleanlab import Datalab

    with contextlib.redirect_stdout(io.StringIO()):
        lab = Datalab(data={"label": y}, label_name="label")
        lab.find_issues(pred_probs=p, issue_types={"label": {}})
    issues = lab.get_issues("label")
    return 1.0 - issues["label_score"].to_numpy(), issues["is_label_issue"].to_numpy()


def line(
    case: Case, method: str, scores: Sequence[NDArray[np.float64]], work: float, cpu: float
) -> Line:
    """A row from the scores of the repetitions."""
    k = int(case.bad.sum())
    top = np.zeros((len(scores), len(case.bad)), dtype=np.bool_)
    for number, score in enumerate(scores):
        top[number, np.argsort(-score, kind="stable")[:k]] = True
    stable = float((top.all(axis=0) & case.bad).sum() / k) if len(scores) > 1 else float("nan")
    ap = tuple(float(average_precision_score(case.bad, score)) for score in scores)
    return Line(case.name, method, ap, stable, work, cpu)


def compare(case: Case, times: int) -> tuple[list[Line], str, str]:
    """All rows of a set, and its rows of the tables on the error rate and on other runs."""
    x = features(case.items)
    y = torch.from_numpy(case.items.y)
    n, n_classes = len(y), len(case.items.classes)
    recipe = recipe_for(case.items.kind, tuple(x.shape[1:]))
    if case.name in MODELS:
        recipe = own_recipe(recipe, MODELS[case.name], x, n_classes)
    start = time.process_time()
    runs: list[list[Run]] = [
        [
            train_run(x, y, n_classes, recipe, seed=100 * t + r, influence=False)
            for r in range(RUNS + 1)
        ]
        for t in range(times)
    ]
    ours = (time.process_time() - start) / (times * (RUNS + 1))
    start = time.process_time()
    folds = [cross_validated(x, y, n_classes, recipe, seed) for seed in range(times)]
    theirs = (time.process_time() - start) / times
    work = float(np.mean([examples for _, examples in folds])) / n
    labs = [datalab(p, case.items.y) for p, _ in folds]
    lines = [line(case, "cleanlab, 5 folds", [score for score, _ in labs], work, theirs)]
    per_run = float(np.mean([run.examples for several in runs for run in several])) / n
    for count in range(1, RUNS + 1):
        for score in SCORES:
            if score == "mu" or (score != SCORES[0] and count != RUNS):
                continue
            scores = [ours_of(several[:count], case, score) for several in runs]
            name = f"{score}, {count} run{'s' if count > 1 else ''}"
            lines.append(line(case, name, scores, count * per_run, count * ours))
    scores = [ours_of(several[:RUNS], case, SCORES[0]) for several in runs]
    return lines, promised(case, scores, labs), repeating(case, runs)


def ours_of(runs: Sequence[Run], case: Case, score: Score) -> NDArray[np.float64]:
    """Scores of one call with these runs."""
    return score_of(joined(list(runs)), case.items.y, score)


def promised(
    case: Case, ours: Sequence[NDArray[np.float64]], labs: Sequence[tuple[Any, Any]]
) -> str:
    """What is flagged at a rate, beside what cleanlab calls an issue."""
    n_trusted = min(TRUSTED, int((~case.bad).sum()) // 3)
    (rate,) = repeated(
        dict(enumerate(ours)), case.bad, n_trusted=n_trusted, levels=(LEVEL,), n_draws=20
    )
    issue = [np.asarray(found, dtype=np.bool_) for _, found in labs]
    wrong = float(np.mean([(found & ~case.bad).sum() / max(found.sum(), 1) for found in issue]))
    found = float(np.mean([(one & case.bad).sum() / case.bad.sum() for one in issue]))
    flagged = float(np.mean([one.sum() for one in issue]))
    return (
        f"| {case.name} | {n_trusted} | {rate.flagged:.0f} | {rate.false_share.mean:.3f} "
        f"[{rate.false_share.lower:.3f}, {rate.false_share.upper:.3f}] | {rate.power:.2f} | "
        f"{flagged:.0f} | {wrong:.3f} | {found:.2f} |"
    )


def repeating(case: Case, runs: Sequence[Sequence[Run]]) -> str:
    """What of the suspects of each repetition is none in the runs that it has not seen."""
    y, score = case.items.y, SCORES[0]
    each = [np.stack([suspects(run, y, score) for run in several]) for several in runs]
    counts: list[tuple[int, float, int, float]] = []
    for number, several in enumerate(runs):
        others = [each[number][RUNS:], *(m for k, m in enumerate(each) if k != number)]
        lost = 1.0 - np.concatenate(others).mean(axis=0)
        found = each[number][:RUNS].sum(axis=0)
        most = 2 * found > RUNS
        kept = repeatable(chance_to_repeat(several[:RUNS], y, score), found, RUNS, LEVEL)
        share = lost[kept].mean() if kept.any() else 0.0
        counts.append((int(most.sum()), float(lost[most].mean()), int(kept.sum()), float(share)))
    n, lost_all, n_kept, lost_kept = np.mean(counts, axis=0)
    return f"| {case.name} | {n:.0f} | {lost_all:.3f} | {n_kept:.0f} | {lost_kept:.3f} |"


# ----------------------------------------------------------------------------------------- table


def to_markdown(
    lines: Sequence[Line], promises: Sequence[str], repeats: Sequence[str], call: str
) -> str:
    """The page."""
    import cleanlab

    said = [
        "# Cleaning: beside cleanlab",
        "",
        f"Made by `{call}`, with cleanlab {cleanlab.__version__}.",
        "",
        *(part for part in (__doc__ or "").split("\n\n", 1)[1].strip().splitlines()),
        "",
        "*AP*: average precision, mean of the repetitions (least – largest). *Stable recall*: "
        "share of the wrong labels that are among the K most suspicious in every repetition, K "
        "being their number. *Work*: rows that went through training steps, in passes over all, "
        "and its ratio to cleanlab's. *CPU*: seconds of one core a call, without reading the data.",
        "",
    ]
    for case in dict.fromkeys(one.case for one in lines):
        own = [one for one in lines if one.case == case]
        base = own[0]
        said += [
            f"## {case}",
            "",
            "| method | AP | stable recall | work | of cleanlab's | CPU |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        for one in own:
            of_theirs = one.work / base.work
            said.append(
                f"| {one.method} | {np.mean(one.ap):.3f} ({min(one.ap):.3f} – {max(one.ap):.3f}) | "
                f"{_dash(one.stable)} | {one.work:.1f} | {of_theirs:.2f} | {one.cpu:.0f} |"
            )
        said.append("")
    said += [
        "## The promise",
        "",
        f"Rows flagged by `doubt`, {RUNS} runs, at a rate of {LEVEL:g} with rows drawn at random "
        "and found right as trusted: mean over 20 draws, each with all repetitions, beside what "
        "Datalab calls a label issue, which promises no rate. *False*: share of the flagged that "
        "is right. *Found*: share of the wrong labels that is flagged.",
        "",
        "| set | trusted | flagged | false | found | issues | false | found |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *promises,
        "",
        "## Another run",
        "",
        f"Suspects of most of {RUNS} runs, and the share of them that a run which they have not "
        f"seen does not suspect; the same of those that the {RUNS} runs call *repeatable* at a "
        f"level of {LEVEL:g}: at most that share should be lost. Means over the repetitions and "
        "over the other runs.",
        "",
        "| set | suspects | lost | repeatable | lost |",
        "| --- | ---: | ---: | ---: | ---: |",
        *repeats,
        "",
    ]
    return "\n".join(said)


def _dash(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.3f}"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--times", type=int, help="repetitions (default: 10, of cifar10n 1)")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    add_force(parser)
    given = parser.parse_args(argv)
    outputs = Outputs([given.output], default=given.output == OUTPUT, force=given.force)
    call = "python benchmarks/clean_against_cleanlab.py"
    if given.cases != list(CASES):
        call += " --cases " + " ".join(given.cases)
    if given.times is not None:
        call += f" --times {given.times}"
    lines: list[Line] = []
    promises: list[str] = []
    repeats: list[str] = []
    for name in given.cases:
        found, promise, repeat = compare(make(name), given.times or TIMES.get(name, 10))
        lines += found
        promises.append(promise)
        repeats.append(repeat)
        for one in found:
            print(f"{one.case:10} {one.method:18} AP {np.mean(one.ap):.3f} stable {one.stable:.3f} "
                  f"work {one.work:.1f} CPU {one.cpu:.0f}", flush=True)  # fmt: skip
        outputs.write(given.output, to_markdown(lines, promises, repeats, call))


if __name__ == "__main__":
    main()
