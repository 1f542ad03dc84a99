"""Ground-truth files: one safetensors file a truth, its facts as JSON in the header.

The header also holds a digest of everything in the file, so a changed byte is noticed. Files are
written whole under a temporary name and renamed. The same truth always gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from fine_bench.errors import UserError
from fine_bench.retraining.truth import ARRAYS, HALVES, UNKNOWN, HalfTruth, SubsetTruth, Truth
from fine_bench.store.files import StoreError, write_atomic
from fine_bench.store.guarded import is_file, parse_json

FORMAT = 1
KEY = "fine_bench_truth"
SUFFIX = ".safetensors"

_SUBSET_ARRAYS = ("margin", "margin_first", "margin_second")
_PLAIN = ("name", "task", "version", "data_sha256", "setting", "keep")
_NUMBERS = ("n_models", "ceiling", "ceiling_clean", "lds_ceiling")


class TruthError(UserError, ValueError):
    """A ground-truth file is missing, damaged, or must not be replaced. The message names it."""


def save(
    truth: Truth, folder: Path | str, write: Callable[[Path, bytes], None] = write_atomic
) -> Path:
    """Write ``<folder>/<name>.safetensors``; an equal file that is there already stays.

    Args:
        truth: what is written.
        folder: made if it is not there.
        write: how. A results folder may be another's, so by default no link is followed; for a
            folder that the user names, ``write_output`` with ``force``: the version was asked for.

    Raises:
        TruthError: another truth of the same or a higher version is there, or a file that cannot
            be read, or the file cannot be written.
    """
    path = Path(folder) / f"{truth.name}{SUFFIX}"
    about, arrays = _pack(truth)
    if path.exists():
        old = _header(path)
        if old == about:
            load(path)  # whole, or it says how to mend it
            return path
        if old["version"] >= truth.version:
            raise TruthError(
                f"{path} holds version {old['version']} with other content; a published truth is "
                f"not changed: save this one with --version {old['version'] + 1}"
            )
    header = {KEY: json.dumps(about, sort_keys=True, ensure_ascii=False)}
    try:
        write(path, safetensors.numpy.save(arrays, metadata=header))
    except StoreError as error:
        raise TruthError(str(error)) from error
    return path


def load(path: Path | str) -> Truth:
    """Read a ground truth, verified byte for byte.

    Raises:
        TruthError: no such file, no ground truth, another format, or damaged.
    """
    path = Path(path)
    about = _header(path)
    try:
        with safetensors.safe_open(path, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if _digest(about, arrays) != about["sha256"]:
            raise ValueError("its content is not what was written")
        return _unpack(about, arrays)
    except (safetensors.SafetensorError, OSError, LookupError, TypeError, ValueError) as error:
        raise TruthError(_damaged(path, error)) from error


def find(folder: Path | str | Iterable[Path | str], data_sha256: str, setting: str) -> Truth | None:
    """The truth of exactly these data and this setting; ``None`` when there is none.

    Args:
        folder: a folder, or several in order of precedence; those that do not exist are passed.
        data_sha256, setting: digests as in the records.

    Raises:
        TruthError: a file in a folder that cannot be read, or two truths that fit.
    """
    places = [folder] if isinstance(folder, Path | str) else list(folder)
    for place in map(Path, places):
        fits = []
        for path in sorted(place.glob(f"*{SUFFIX}")):
            about = _header(path)
            if (about["data_sha256"], about["setting"]) == (data_sha256, setting):
                fits.append(path)
        if len(fits) > 1:
            raise TruthError(
                f"{' and '.join(map(str, fits))} are truths of the same data and setting; keep one"
            )
        if fits:
            return load(fits[0])
    return None


def folders(results: Path | str | None = None) -> list[Path]:
    """Where ground truths lie: below ``results``, in the checkout, in the installed package."""
    package = Path(__file__).resolve().parents[1]
    own = [] if results is None else [Path(results) / "ground_truth"]
    return [*own, package.parent / "results" / "ground_truth", package / "ground_truth"]


def known(places: Iterable[Path]) -> list[str]:
    """Names of the truths in some folders, sorted."""
    return sorted({path.stem for place in places for path in place.glob(f"*{SUFFIX}")})


def named(name: str, places: Iterable[Path]) -> Truth:
    """The truth of a name, from the first folder that has it.

    Raises:
        TruthError: no folder has it (the message lists those that exist), or it is damaged.
    """
    places = list(places)
    for place in places:
        path = place / f"{name}{SUFFIX}"
        if os.path.lexists(path):
            return load(path)
    there = known(places)
    raise TruthError(
        f"no ground truth {name!r}; "
        + (f"there are: {', '.join(there)}" if there else "there is none at all")
        + ". Name a file with --truth FILE, or make one with fine-bench truth"
    )


def _damaged(path: Path, error: object) -> str:
    return (
        f"{path} is damaged ({error}); restore it from where it came from, or freeze the bank again"
    )


def _header(path: Path) -> dict[str, Any]:
    """The facts of a file, without its arrays."""
    if not is_file(path):
        if os.path.lexists(path):
            raise TruthError(_damaged(path, "it is no regular file"))
        raise TruthError(f"there is no ground-truth file {path}")
    try:
        with safetensors.safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
        text = metadata.get(KEY)
        about = None if text is None else parse_json(text)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise TruthError(_damaged(path, error)) from error
    if about is None:
        raise TruthError(f"{path} is no ground truth of fine_bench; make one with fine-bench truth")
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        found = about.get("format") if isinstance(about, dict) else about
        raise TruthError(
            f"{path} has format {found!r}, this fine_bench reads format {FORMAT}; install the "
            "version that wrote it, or freeze the bank again"
        )
    missing = sorted({*_PLAIN, "sha256"} - set(about))
    if missing or not isinstance(about["version"], int):
        raise TruthError(_damaged(path, f"the header lacks {', '.join(missing) or 'a version'}"))
    return about


def _number(value: float) -> float | None:
    """NaN, an unknown number, is null in JSON."""
    return value if math.isfinite(value) else None


def _pack(truth: Truth) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    about: dict[str, Any] = {name: getattr(truth, name) for name in _PLAIN}
    about["format"] = FORMAT
    about["facts"] = {name: _number(value) for name, value in sorted(truth.facts.items())}
    arrays: dict[str, NDArray[Any]] = {"is_bad": np.packbits(truth.is_bad)}
    if truth.singles is not None:
        about["singles"] = truth.singles
    about["n"] = truth.n_train
    for half in HALVES:
        part = truth.half(half)
        about[half] = {name: _number(getattr(part, name)) for name in _NUMBERS}
        arrays |= {f"{half}.{name}": getattr(part, name) for name in ARRAYS}
    if truth.subsets is not None:
        about["n_seeds"] = truth.subsets.n_seeds
        arrays["subsets.members"] = np.packbits(truth.subsets.members, axis=1)
        arrays |= {f"subsets.{name}": getattr(truth.subsets, name) for name in _SUBSET_ARRAYS}
    # little-endian and contiguous, as safetensors keeps them
    arrays = {name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)}
    about["sha256"] = _digest(about, arrays)
    return about, arrays


def _unpack(about: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Truth:
    n = about["n"]

    def real(value: float | None) -> float:
        return UNKNOWN if value is None else float(value)

    halves = {}
    for half in HALVES:
        numbers = {name: real(about[half][name]) for name in _NUMBERS}
        numbers["n_models"] = int(numbers["n_models"])
        halves[half] = HalfTruth(**{name: arrays[f"{half}.{name}"] for name in ARRAYS}, **numbers)  # type: ignore[arg-type]
    subsets = None
    if "subsets.members" in arrays:
        members = np.unpackbits(arrays["subsets.members"], axis=1, count=n).astype(np.bool_)
        margins = {name: arrays[f"subsets.{name}"] for name in _SUBSET_ARRAYS}
        subsets = SubsetTruth(members, **margins, n_seeds=about["n_seeds"])
    return Truth(
        **{name: about[name] for name in _PLAIN},
        is_bad=np.unpackbits(arrays["is_bad"], count=n).astype(np.bool_),
        development=halves["development"],
        published=halves["published"],
        subsets=subsets,
        facts={name: real(value) for name, value in about["facts"].items()},
        singles=about.get("singles"),
    )


def _digest(about: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> str:
    """SHA-256 of the facts and of every array with its name, type and shape."""
    facts = {key: value for key, value in about.items() if key != "sha256"}
    state = hashlib.sha256(json.dumps(facts, sort_keys=True, ensure_ascii=False).encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        state.update(f"\0{name} {array.dtype.name} {array.shape}\0".encode())
        state.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return state.hexdigest()
