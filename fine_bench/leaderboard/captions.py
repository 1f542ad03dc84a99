"""The words of a leaderboard: names of rows, descriptions of settings, how to read the numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fine_bench.clock import CPU
from fine_bench.leaderboard.sheet import in_words, number
from fine_bench.leaderboard.tables import Table, TableKey, shows
from fine_bench.metrics.fidelity import VERSION
from fine_bench.metrics.intervals import MIN_SEEDS_FOR_SIGNIFICANCE
from fine_bench.metrics.registry import Metric
from fine_bench.store.plausibility import FILES
from fine_bench.types import RunRecord

DIRTY = "†"
MADE_DIRTY = "made by code with uncommitted changes"
TIED = "="
BY_RETRAINING = ", by retraining"
"""Behind the target of lines that no method has, below those of all methods."""

TOOK = "steering_took"
# name among the facts of training, label, unit
TRAINING_FACTS = (
    ("test_accuracy", "test accuracy", ""),
    ("seconds", "plain training", " s a seed"),
    ("steering_rate", "steering rate", ""),
    ("steering_rate_reference", "of the reference", ""),
    ("steering_rate_others", "on others", ""),
    (TOOK, "the poison took", " of the seeds"),
)
KINDS = {
    "digits": "Flipped labels",
    "mnist": "Flipped labels",
    "cifar": "Flipped labels",
    "structured": "Structured label noise",
    "cifar10n": "Human errors",
    "natural": "Human errors",
    "backdoor": "Poison",
    "duplicates": "Duplicates",
    "memorisation": "Atypical and rare examples",
    "task": "Poison in language",
}
"""What is bad in a task, by the module of the function that made its data; see ``kind_of``."""
OTHER = "Other tasks"

CPU_SECONDS = "seconds_cpu"
"""``seconds`` of the runs that were timed by the CPU: a mean over both clocks is of neither."""


# ----------------------------------------------------------------- names of rows and settings


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(config, Mapping):
        return {prefix: config}
    return {k: v for key in config for k, v in _flat(config[key], f"{prefix}.{key}").items()}


def _differences(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Dotted names of the options in which the configurations differ."""
    keys = sorted({key for config in configs for key in config})
    absent = object()
    return [k for k in keys if any(c.get(k, absent) != configs[0].get(k, absent) for c in configs)]


def variants_of(records: Sequence[RunRecord]) -> dict[tuple[str, str], str]:
    """For every (estimator, hash) the options that tell it from its namesakes, or nothing.

    An option that is null in one of them and has a value in another is named in the latter alone:
    ``tracin`` beside ``tracin (query_weighting=noise)``.
    """
    by_name: dict[str, dict[str, dict[str, Any]]] = {}
    for r in records:
        own = _flat(r.config.get("estimator", {}))
        by_name.setdefault(r.estimator, {})[r.estimator_hash] = own
    labels = {}
    for name, configs in by_name.items():
        keys, several = _differences(list(configs.values())), len(configs) > 1
        for sha, config in configs.items():
            # what is not set needs no words: the other row says what it has set
            named = [key for key in keys if config.get(key, "-") is not None]
            options = (f"{key.rpartition('.')[2]}={config.get(key, '-')}" for key in named)
            labels[name, sha] = (", ".join(options) if keys else sha[:8]) if several else ""
    # options may look alike while their hashes differ
    alike = Counter((name, text) for (name, _), text in labels.items())
    for (name, sha), text in list(labels.items()):
        if alike[name, text] > 1:  # the last of them keeps its name
            alike[name, text] -= 1
            labels[name, sha] = f"{text}, {sha[:8]}".removeprefix(", ")
    return labels


DESCRIBING = (
    ("task", "n_train"),
    ("task", "noise_rate"),
    ("task", "n_query"),
    ("model", "name"),
    ("trainer", "max_epochs"),
    ("trainer", "batch_size"),
    ("trainer", "lr"),
)


SIZES = {"n_train": "path", "n_query": "queries_path"}
"""Options of generated data that say nothing of the user's own, and the file that does."""


def _sizes(record: RunRecord) -> dict[str, Any]:
    """Numbers of training samples and queries of data from the user's own files; else nothing."""
    files = record.training.get(FILES)
    if not isinstance(files, Mapping):
        return {}
    given = {name: files.get(option) for name, option in SIZES.items()}
    return {
        f".task.{name}": file["samples"]
        for name, file in given.items()
        if isinstance(file, Mapping) and isinstance(file.get("samples"), int)
    }


def options_of(
    groups: Mapping[TableKey, Sequence[RunRecord]],
) -> dict[TableKey, dict[str, Any]]:
    """What describes each setting: the usual options, and those that tell it from its siblings."""

    def setting_of(record: RunRecord) -> dict[str, Any]:
        sections = {name: record.config.get(name, {}) for name in ("task", "model", "trainer")}
        return _flat(sections) | _sizes(record)

    # a record that failed early may have no configuration
    settings = {
        key: setting_of(next((r for r in group if r.config), group[0]))
        for key, group in groups.items()
    }
    of_task: dict[str, list[dict[str, Any]]] = {}
    data = Counter(key[:2] for key in groups)
    for key, config in settings.items():
        of_task.setdefault(key[0], []).append(config)
    others = {task: _differences(configs) for task, configs in of_task.items()}
    usual = [f".{section}.{name}" for section, name in DESCRIBING]
    found: dict[TableKey, dict[str, Any]] = {}
    for key, config in settings.items():
        options = {
            ("model" if name == ".model.name" else name.rpartition(".")[2]): config[name]
            for name in usual
            if name in config
        }
        options |= {name[1:]: config.get(name) for name in others[key[0]] if name not in usual}
        if data[key[:2]] > 1:
            options["data"] = key[2][:8]
        found[key] = options
    return found


# ------------------------------------------------------------------------- captions and notes


def kind_of(table: Table) -> str:
    """What is bad in a table's task, in words: the heading under which a summary shows it."""
    parts = table.made_by.split(".")
    ours = parts[0] == "fine_bench" and len(parts) > 2
    return KINDS.get(parts[-2], OTHER) if ours else OTHER


def title(table: Table) -> str:
    """Task and digest of the setting."""
    return f"{table.task} · setting {table.setting[:8]}"


_WORDS = {
    "n_train": "{} training examples",
    "noise_rate": "noise rate {}",
    "n_query": "{} queries",
    "model": "{}",
    "max_epochs": "{} epochs",
    "batch_size": "batch {}",
}


def _value(name: str, value: Any) -> str:
    if value is None:
        value = "all" if name == "n_train" else "none"
    elif isinstance(value, int) and not isinstance(value, bool):
        value = f"{value:,}"
    return _WORDS.get(name, f"{name} {{}}").format(value)


def caption(table: Table) -> list[str]:
    """The setting in words, and what plain training gave."""
    lines = [" · ".join(_value(name, value) for name, value in table.options.items())]
    facts = []
    by_cpu = (CPU_SECONDS, "plain training, of the CPU,", " s a seed")
    for name, label, unit in (*TRAINING_FACTS[:2], by_cpu, *TRAINING_FACTS[2:]):
        stat = table.training.get(name)
        if stat is not None and name != TOOK:
            entry = number(stat.mean, stat.lower, stat.upper, None if unit else 3)
            facts.append(f"{label} {in_words(entry)}{unit} (n = {stat.n})")
    lines.append(" · ".join(facts))
    return [line for line in lines if line]


def notes(table: Table, columns: Sequence[Metric]) -> list[str]:
    """What the reader must know to read the numbers and marks of a table."""
    lines = ["Mean over n run seeds with its 95 % interval (bootstrap over seeds)."]
    if any(row.ties for row in table.rows):
        lines.append(
            f"{TIED} tie in the table's first column with the best of its target: the 95 % "
            "interval of the difference, paired by seed, holds 0, or from six seeds on a sign-flip "
            "test does not find it significant."
        )
    if max((len(row.seeds) for row in table.rows), default=0) < MIN_SEEDS_FOR_SIGNIFICANCE:
        lines[0] += (
            f" Fewer than six seeds: a row without {TIED} is not thereby significantly worse."
        )
    if table.k:
        lines.append(
            f"Jaccard@k: k = {table.k:,}, the number of bad examples; corrected: for chance."
        )
    took = table.training.get(TOOK)
    if took is not None:
        many = round(took.mean * took.n)
        lines.append(
            f"Whether the poison took was measured on held-out prompts: it did in {many} of "
            f"{took.n} seeds."
            + (" No detection is reported for the others." if many < took.n else "")
        )
    lines += [c.note for c in columns if c.note and any(shows(row, c) for row in table.rows)]
    if any(row.watched is not None for row in table.rows):
        lines.append(
            "(… examples): scores a sample of the training examples; all of its numbers, and its "
            "k, are of that sample."
        )
    stats = [row.stats[VERSION] for row in table.rows if VERSION in row.stats]
    versions = sorted({stat.mean for stat in stats})
    if versions:
        lines.append(
            "Fidelity: Spearman with the influence that retraining shows (ground truth version "
            f"{', '.join(f'{x:g}' for x in versions)}); of ceiling: divided by the highest value "
            "that the noise of that truth allows; LDS: prediction of models trained on subsets."
        )
        lines += _ceilings(table)
    if any(
        math.isnan(stat.mean)
        for row in table.rows
        for key, stat in row.stats.items()
        if key.startswith(("consistency_", "fidelity", "lds"))
    ):
        lines.append("undefined: a score that is constant over the examples ranks nothing.")
    if table.limits:
        lines.append(
            "By retraining: what hundreds of retrained models say, of one half of them, compared "
            "with the other half; no method, and the limit for scores that measure the same. "
            "retraining_effect is Data Banzhaf of an example's own margin, retraining_banzhaf "
            "(few models) of the queries' margin."
        )
    timed = sorted({row.label for row in table.rows if row.clock == CPU})
    if timed:
        lines.append(f"Cost in CPU seconds, of all threads, not in wall time: {', '.join(timed)}.")
    mixed = sorted({row.label for row in table.rows if row.clock not in ("", CPU)})
    if mixed:
        lines.append(
            "Cost partly in CPU seconds and partly in wall time, so its mean says nothing: "
            f"{', '.join(mixed)}."
        )
    if any(row.dirty for row in table.rows):
        lines.append(f"{DIRTY} {MADE_DIRTY}.")
    if table.superseded:
        lines.append(
            "Left out, since a newer version of the method has been run: "
            f"{'; '.join(table.superseded)}."
        )
    return lines


def _ceilings(table: Table) -> list[str]:
    """What the truth's noise allows, read off the rows: a number over its share of the ceiling."""
    named = {"fidelity": "fidelity", "fidelity_clean": "within clean examples", "lds": "LDS",
             "outcome_spread": "spread over runs"}  # fmt: skip
    found = []
    for name, label in named.items():
        pairs = [
            (row.stats[name].mean, row.stats[f"{name}_of_ceiling"].mean)
            for row in table.rows
            if row.watched is None and {name, f"{name}_of_ceiling"} <= set(row.stats)
        ]
        pairs = [pair for pair in pairs if math.isfinite(pair[0]) and math.isfinite(pair[1])]
        # the largest number: the least rounding
        value, share = max(pairs, key=lambda pair: abs(pair[1]), default=(0.0, 0.0))
        if share:
            found.append(f"{label} {value / share:.3f}")
    return [f"The noise of the truth allows: {', '.join(found)}."] if found else []


def one_line(text: str, limit: int = 300) -> str:
    """``text`` without line breaks, cut at ``limit`` characters."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def cell_lines(table: Table) -> list[str]:
    """``failed: fine · self · seeds 1, 2: why``, cells that share a reason together."""
    by_name: dict[tuple[str, ...], list[int]] = {}
    for cell in table.cells:
        name = f"{cell.estimator} ({cell.variant})" if cell.variant else cell.estimator
        key = (cell.state, cell.target, one_line(cell.reason), name)
        by_name.setdefault(key, []).append(cell.seed)
    together: dict[tuple[str, str, str, tuple[int, ...]], list[str]] = {}
    for (state, target, reason, name), seeds in by_name.items():
        together.setdefault((state, target, reason, tuple(seeds)), []).append(name)
    lines = []
    for (state, target, reason, runs), names in together.items():
        numbers = ", ".join(map(str, runs))
        word = "seed" if len(runs) == 1 else "seeds"
        lines.append(f"{state}: {', '.join(names)} · {target} · {word} {numbers}: {reason}")
    return lines
