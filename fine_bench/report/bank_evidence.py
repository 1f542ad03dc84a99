"""What a bank shows beyond its frozen truth: the definition set by set, and error curves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fine_bench.metrics.gaussianity import curve_fit
from fine_bench.metrics.retraining import retraining_mu
from fine_bench.report.figures.retraining import Pairs, Seen, definition_figure, retraining_curves
from fine_bench.report.figures.style import FORMATS, to_bytes
from fine_bench.retraining.bank import Bank
from fine_bench.retraining.definition import Compared, compare
from fine_bench.retraining.outputs import BankModels
from fine_bench.store import spreadsheet
from fine_bench.store.files import write_atomic

RANKS = (
    ("largest μ", 1.0),
    ("99th percentile", 0.99),
    ("90th percentile", 0.9),
    ("median", 0.5),
    ("smallest μ", 0.0),
)
"""The examples whose curves are drawn: by their place in the order of the bank's μ alone."""


def write_evidence(bank: Bank, name: str, results: Path) -> list[Path]:
    """``ground_truth/definition--NAME.csv`` and the figures of a bank, below a results folder.

    The definition's two files are left out where the bank has no models for it.

    Returns:
        what was written.

    Raises:
        StoreError: the bank is damaged, or a file cannot be written.
        ValueError: no single models, or too few.
    """
    single, definition = bank.part("single"), bank.part("definition")
    if single is None:
        raise ValueError(f"{bank.folder} has no models of the part 'single'; train some first")
    is_bad = np.isin(np.arange(single.n_train), bank.manifest["bad"])
    files = _curves(single, is_bad, name, results)
    compared = None if definition is None else compare(single, definition)
    if compared is not None:
        files |= _definition(compared, bank, is_bad, name, results)
    for path, content in files.items():
        write_atomic(path, content)
    return list(files)


def _curves(
    single: BankModels, is_bad: NDArray[np.bool_], name: str, results: Path
) -> dict[Path, bytes]:
    mu = retraining_mu(single.members, single.margin).mu
    order = np.argsort(mu, kind="stable")
    seen = []
    for label, share in RANKS:
        i = int(order[round(share * (len(order) - 1))])
        inside, margin = single.members[:, i], single.margin[:, i].astype(np.float64)
        kind = "known bad" if is_bad[i] else "clean"
        fit = curve_fit(single.members, single.margin, i)
        seen.append(Seen(f"{label}\nexample {i}, {kind}", margin[inside], margin[~inside], fit))
    keep = single.members.mean()
    size = f"{name}: {len(single):,} models, each on a random {keep:.0%} of {single.n_train:,}"
    figure = retraining_curves(seen, size=size)
    folder = results / "figures"
    return {
        folder / f"retraining_curves--{name}.{kind}": to_bytes(figure, kind) for kind in FORMATS
    }


def _definition(
    compared: Compared,
    bank: Bank,
    is_bad: NDArray[np.bool_],
    name: str,
    results: Path,
) -> dict[Path, bytes]:
    names = {positions: key for key, positions in bank.sets().items()}
    table = spreadsheet.to_csv(compared.table(names, is_bad), float_format="%.5g")
    files = {results / "ground_truth" / f"definition--{name}.csv": table.encode()}
    facts = compared.facts()
    if "examples/spearman" not in facts:
        return files
    one, exact = compared.single, compared.exact
    first = np.array([positions[0] for positions in compared.sets])
    pairs = Pairs(
        compared.bank[one],
        exact.mu[one],
        exact.lower[one],
        exact.upper[one],
        is_bad[first[one]],
    )
    rho, low, high, ceiling = (
        facts[f"examples/{key}"]
        for key in ("spearman", "spearman/lower", "spearman/upper", "ceiling")
    )
    runs = sorted(set(compared.runs_without[one].tolist()))
    figure = definition_figure(
        pairs,
        slope=facts["examples/slope_through_origin"],
        text=f"Spearman {rho:.2f} [{low:.2f}, {high:.2f}],\nceiling {ceiling:.2f}",
        size=f"{name}: {one.sum()} examples, {compared.runs_with} runs on all data, "
        f"{'–'.join(map(str, dict.fromkeys((runs[0], runs[-1]))))} without each",
    )
    for kind in FORMATS:
        files[results / "figures" / f"definition--{name}.{kind}"] = to_bytes(figure, kind)
    return files
