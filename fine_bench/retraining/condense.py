"""From a retraining bank to a ground truth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fine_bench.metrics.gaussianity import LEAST_FOR_NORMALITY, normality
from fine_bench.metrics.lds import LEAST_SUBSETS, SubsetMargins, by_subset, lds_ceiling
from fine_bench.metrics.reliability import (
    LEAST_FOR_CORRELATION,
    blocks_of,
    spearman,
    split_half,
)
from fine_bench.metrics.retraining import (
    effect,
    models_for_counts,
    out_of_sample,
    require_models,
    retraining_mu,
)
from fine_bench.retraining.bank import Bank
from fine_bench.retraining.definition import compare
from fine_bench.retraining.outputs import BankModels
from fine_bench.retraining.truth import HALVES, UNKNOWN, Half, HalfTruth, SubsetTruth, Truth


def truth_of(bank: Bank, name: str, version: int) -> Truth:
    """The ground truth of a bank's folder.

    Raises:
        StoreError: the bank is damaged.
        ValueError: too few models, or a bank whose models do not vary as the benchmark's runs do.
    """
    about = bank.manifest
    _require_both(bank)
    single = bank.part("single")
    if single is None:
        raise ValueError(
            f"{bank.folder} has no models of the part 'single'; train some with "
            "fine-bench bank bank.models=512"
        )
    return condense(
        single,
        bank.part("repeated"),
        bank.part("definition"),
        name=name,
        task=about["task"],
        version=version,
        data_sha256=about["data_sha256"],
        setting=about["setting"],
        is_bad=np.isin(np.arange(single.n_train), about["bad"]),
    )


def with_subsets(truth: Truth, bank: Bank, version: int) -> Truth:
    """A frozen truth that has no subsets, with those of a bank of the same task and recipe.

    The single models are not needed: all that the truth holds of them stays as it is, bit for bit.
    What is new are ``subsets`` and the halves' ``lds_ceiling``.

    Args:
        truth: what was frozen.
        bank: holds the part "repeated".
        version: of the result, above the truth's own.

    Raises:
        StoreError: the bank is damaged.
        ValueError: a truth with subsets, a bank of another task, recipe or share of examples, too
            few subsets, or a version that is not higher.
    """
    if truth.subsets is not None:
        raise ValueError(
            f"{truth.name} has {len(truth.subsets.members)} subsets already; freeze a bank that "
            "holds all of its models under another version"
        )
    if version <= truth.version:
        raise ValueError(
            f"{truth.name} is version {truth.version}, and with subsets another one: it needs "
            f"--version {truth.version + 1}"
        )
    _require_both(bank)
    about = bank.manifest
    found = {name: about[name] for name in ("task", "data_sha256", "setting", "n_train")}
    found["keep"] = round(bank.manifest["design"]["keep"], 6)
    wanted = {name: getattr(truth, name) for name in found} | {"keep": round(truth.keep, 6)}
    if found != wanted:
        other = ", ".join(
            f"{name} {found[name]} there, {wanted[name]} here"
            for name in found
            if found[name] != wanted[name]
        )
        raise ValueError(f"{bank.folder} is no bank of the truth {truth.name}: {other}")
    repeated = bank.part("repeated")
    if repeated is None:
        raise ValueError(
            f"{bank.folder} has no models of the part 'repeated'; train some with fine-bench bank "
            f"bank.subsets={2 * LEAST_SUBSETS} bank.seeds_per_subset=5"
        )
    subsets, ceilings = _subset_truth(repeated, truth.n_train)
    return replace(
        truth,
        version=version,
        singles=truth.singles or truth.version,
        subsets=subsets,
        development=replace(truth.development, lds_ceiling=ceilings["development"]),
        published=replace(truth.published, lds_ceiling=ceilings["published"]),
    )


def _require_both(bank: Bank) -> None:
    vary = bank.manifest.get("design", {}).get("vary", "both")
    if vary != "both":
        raise ValueError(
            f"the models of {bank.folder} differ in {vary} alone; the runs that are scored by a "
            "truth differ in initialisation and order. Train a bank with bank.vary=both"
        )


def condense(
    single: BankModels,
    repeated: BankModels | None = None,
    definition: BankModels | None = None,
    *,
    name: str,
    task: str,
    version: int,
    data_sha256: str,
    setting: str,
    is_bad: NDArray[np.bool_] | Tensor,
) -> Truth:
    """The ground truth that the models of a bank's parts give.

    Args:
        single: models with a subset of their own each.
        repeated: models with at least five seeds a subset, at least 20 subsets.
        definition: models on all data (subset 0) and without each of several sets.
        name, task, version, data_sha256, setting, is_bad: see ``Truth``.

    Raises:
        ValueError: too few models (with the number needed), or parts that do not fit.
    """
    bad = np.asarray(is_bad.numpy() if isinstance(is_bad, Tensor) else is_bad)
    if bad.shape != (single.n_train,):
        raise ValueError(f"is_bad has shape {bad.shape}, the bank {single.n_train} examples")
    if len(np.unique(single.subset)) < len(single):
        raise ValueError(
            "the single part must hold one model a subset; models that share a subset are not "
            "independent, and belong to the repeated part"
        )
    halves = _halves(single)
    for models in halves.values():
        _require_half(models, len(single))
    subsets, ceilings = (None, {}) if repeated is None else _subset_truth(repeated, single.n_train)
    made = {
        half: _half_truth(models, bad, ceilings.get(half, UNKNOWN))
        for half, models in halves.items()
    }
    return Truth(
        name=name,
        task=task,
        version=version,
        data_sha256=data_sha256,
        setting=setting,
        keep=float(single.members.mean()),
        is_bad=bad,
        development=made["development"],
        published=made["published"],
        subsets=subsets,
        facts=_facts(single, definition, made),
    )


def _halves(single: BankModels) -> dict[Half, BankModels]:
    """Even and odd subsets, by rising number; a subset and its complement are one."""
    order = np.argsort(single.subset, kind="stable")
    blocks = blocks_of(single.members[order])
    return {half: single.take(order[blocks % 2 == i]) for i, half in enumerate(HALVES)}


def _require_half(models: BankModels, n_models: int) -> None:
    try:
        require_models(models.members)
    except ValueError as error:
        keep = min(max(float(models.members.mean()), 0.05), 0.95)
        needed = 2 * models_for_counts(models.n_train, keep)
        raise ValueError(
            f"a truth is made of each half of the bank's {n_models} single models, and one half "
            f"has {error}; for both halves about {needed} models"
        ) from None


def _half_truth(models: BankModels, bad: NDArray[np.bool_], lds_ceiling: float) -> HalfTruth:
    members = models.members
    margin = retraining_mu(members, models.margin)
    clean = UNKNOWN
    if bad.any() and np.count_nonzero(~bad) >= LEAST_FOR_CORRELATION:
        clean = split_half(members, models.margin, examples=~bad).ceiling
    whole = split_half(members, models.margin).ceiling
    arrays = {
        "mu_margin": margin.mu,
        "mu_margin_se": margin.std_error,
        "mu_loss": retraining_mu(members, -models.loss).mu,
        "effect_margin": effect(members, models.margin),
        "effect_loss": effect(members, models.loss),
        "out_of_sample_margin": out_of_sample(members, models.margin),
    }
    return HalfTruth(
        **{name: array.astype(np.float32) for name, array in arrays.items()},
        n_models=len(models),
        ceiling=whole,
        ceiling_clean=clean if bad.any() else whole,
        lds_ceiling=lds_ceiling,
    )


def _subset_truth(repeated: BankModels, n_train: int) -> tuple[SubsetTruth, dict[Half, float]]:
    if repeated.n_train != n_train:
        raise ValueError(
            f"the repeated part has {repeated.n_train} examples, the single part {n_train}"
        )
    found = by_subset(repeated.members, repeated.subset, repeated.query_margin)
    if len(found.members) < 2 * LEAST_SUBSETS:
        raise ValueError(
            f"the repeated part has {len(found.members)} subsets; {LEAST_SUBSETS} are needed in "
            f"each half, {2 * LEAST_SUBSETS} in all"
        )
    truth = SubsetTruth(
        members=found.members,
        margin=found.mean.astype(np.float32),
        margin_first=found.margin[:, 0::2].mean(axis=1).astype(np.float32),
        margin_second=found.margin[:, 1::2].mean(axis=1).astype(np.float32),
        n_seeds=found.margin.shape[1],
    )
    return truth, {
        half: lds_ceiling(
            SubsetMargins(found.members[truth.of(half)], found.margin[truth.of(half)])
        ).ceiling
        for half in HALVES
    }


def _facts(
    single: BankModels, definition: BankModels | None, made: Mapping[Half, HalfTruth]
) -> dict[str, float]:
    """Numbers about the bank: how well it agrees with itself, how Gaussian, and the definition."""
    whole = split_half(single.members, single.margin)
    facts = {
        "n_models": float(len(single)),
        "halves_spearman": spearman(made["development"].mu_margin, made["published"].mu_margin),
        "ceiling_all_models": whole.ceiling,
        "models_for_ceiling_0.95": whole.models_for(0.95),
    }
    counts = single.members.sum(axis=0)
    if min(counts.min(), len(single) - counts.max()) >= LEAST_FOR_NORMALITY:
        for statistic in ("margin", "loss"):
            summary = normality(single.members, getattr(single, statistic)).summary()
            facts |= {f"normality/{statistic}/{key}": x for key, x in summary.items()}
    compared = None if definition is None else compare(single, definition)
    if compared is not None:
        facts |= {f"definition/{key}": value for key, value in compared.facts().items()}
    return facts
