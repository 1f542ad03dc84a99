"""Coverage of the intervals of ``fine_paper`` when the samples of a run go together.

    python benchmarks/correlated_steps.py [--repetitions 500] [--seed 0] [--out DIR]

Gaussian P and Q samples with a known μ (0 and 1), n of each, in the order of a run. Their
correlation at lag k is ρ_k, in one of these ways:

- *own*: ρ_k = r^k, the arms independent of each other;
- *common*: the same, half of the variance common to both arms, as of steps at the same parameters;
- *hidden*: r^k for half of the variance, independent noise for the other half;
- *two*: (0.5^k + 0.95^k)/2, a memory that the models of ``fine_bench.theory.serial`` do not list
  exactly.

Each cell is a share of given intervals / the share of the *given* ones that hold the true μ, the
lower of that of μ = 0 and 1; a one-sided interval counts as not given. *Length*: median length of
the moment interval over that of the one which takes samples as independent. Writes
``correlated_steps.md`` and ``.csv``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from outputs import add_out, number_text, table_files
from scipy.signal import lfilter

from fine_bench.theory.estimation import Method, estimate_mu

Array: TypeAlias = NDArray[np.float64]
SAMPLES = (30, 60, 120, 300)
CASES = (
    ("own", 0.0), ("common", 0.0), ("own", 0.5), ("common", 0.5), ("own", 0.9), ("common", 0.9),
    ("hidden", 0.9), ("two", 0.95), ("own", 0.97),
)  # fmt: skip
METHODS: tuple[Method, ...] = ("moment", "rank", "two_stage")
OUT = Path("results")
_BURN_IN = 300


def series(rng: np.random.Generator, runs: int, n: int, r: float) -> Array:
    """Stationary Gaussian series of variance 1 whose neighbours correlate by r, ``(runs, n)``."""
    noise = rng.normal(size=(runs, n + _BURN_IN)) * np.sqrt(1.0 - r**2)
    return np.asarray(lfilter([1.0], [1.0, -r], noise, axis=-1)[:, _BURN_IN:])


def arms(rng: np.random.Generator, runs: int, n: int, kind: str, r: float) -> tuple[Array, Array]:
    """P and Q samples of variance 1 at μ = 0, ``(runs, n)`` each."""
    p, q = (series(rng, runs, n, r) for _ in range(2))
    if kind == "common":
        both = series(rng, runs, n, r)
        p, q = p + both, q + both
    elif kind == "hidden":
        p, q = (x + rng.normal(size=x.shape) for x in (p, q))
    elif kind == "two":
        p, q = (x + series(rng, runs, n, 0.5) for x in (p, q))
    share = 1.0 if kind == "own" else 0.5
    return share**0.5 * p, share**0.5 * q


def rows(repetitions: int, seed: int) -> Iterator[dict[str, object]]:
    """One line a number of samples and case."""
    for n in SAMPLES:
        for kind, r in CASES:
            p, q = arms(np.random.default_rng([seed, n]), repetitions, n, kind, r)
            line: dict[str, object] = {"samples": n, "kind": kind, "correlation": r}
            for method in METHODS:
                given, held = [], []
                for mu in (0.0, 1.0):
                    found = estimate_mu(p + mu, q, method, correlated=True)
                    closed = np.isfinite(found.lower) & np.isfinite(found.upper)
                    inside = (found.lower <= mu) & (mu <= found.upper)
                    given.append(float(closed.mean()))
                    held.append(float(inside[closed].mean()) if closed.any() else np.nan)
                    if method == "moment" and mu == 0.0:
                        short = estimate_mu(p, q, method)
                        length = (found.upper - found.lower)[closed]
                        line["length"] = float(
                            np.median(length) / np.median(short.upper - short.lower)
                        )
                        line["independent"] = float(
                            np.mean((short.lower <= 0) & (short.upper >= 0))
                        )
                line[f"{method}_given"], line[f"{method}_held"] = min(given), min(held)
            yield line


def page(frame: pd.DataFrame, repetitions: int) -> str:
    """The table in Markdown."""
    lines = [
        "# Intervals when the samples of a run go together",
        "",
        f"Made by `python benchmarks/correlated_steps.py`, {repetitions} simulated runs a cell, "
        "level 95 %. Share of given intervals / share of the *given* ones that hold the true μ, "
        "the lower of that of μ = 0 and 1. *own*: arms independent of each other; *common*: half "
        "of the variance common to both arms; *hidden*: independent noise of the same variance on "
        "top; *two*: memories of 0.5 and 0.95 half and half. *length*: of the moment interval in "
        "units of that which takes samples as independent, and (*independent*) how often that one "
        "holds μ = 0. `fine_bench.theory.serial` averages over models that list *own*, *common* "
        "and *hidden* up to a correlation of 0.97.",
        "",
        "| samples | correlation | moment | rank | two-stage | length | independent |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in frame.to_dict("records"):
        cells = " | ".join(
            f"{r[f'{m}_given']:.2f} / **{number_text(r[f'{m}_held'])}**" for m in METHODS
        )
        lines.append(
            f"| {r['samples']} | {r['correlation']:g}, {r['kind']} | {cells} | "
            f"{r['length']:.2f} | {r['independent']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    add_out(parser, OUT)
    arguments = parser.parse_args(argv)
    files, csv, md = table_files("correlated_steps", arguments.out, OUT, force=arguments.force)
    frame = pd.DataFrame(list(rows(arguments.repetitions, arguments.seed)))
    files.write(csv, frame)
    files.write(md, page(frame, arguments.repetitions))
    print(frame.to_string(index=False))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
