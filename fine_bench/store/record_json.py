"""A record and its JSON: identity, address, writing and reading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from fine_bench.store.comparisons import Consistency, consistency_from
from fine_bench.store.digest import FORMAT, decode, digest, encode, number, to_json
from fine_bench.store.files import slug
from fine_bench.store.guarded import parse_json, read_bytes, reason_of
from fine_bench.store.plausibility import check_numbers
from fine_bench.types import RunRecord

IDENTITY = (
    "task",
    "setting",
    "estimator",
    "estimator_hash",
    "version",
    "target",
    "seed",
    "data_sha256",
)
CELL = ("task", "setting", "estimator", "target", "seed", "estimator_hash")
_GROUPS = ("task", "model", "trainer", "estimator")
# by the annotations of RunRecord; the rest are mappings
_KINDS: dict[str, type] = {
    f.name: {"str": str, "Status": str, "int": int}.get(str(f.type), dict)
    for f in fields(RunRecord)
}
# without these bytes a text says none of the words for numbers that are not finite
_WORDS = (b'"NaN"', b'Infinity"', b"\\")
PENDING = "pending"
"""May stand for ``scores_sha256`` in a finished record that ``RecordStore.save`` will fill."""


def record_json(record: RunRecord) -> bytes:
    """The file of a record."""
    payload = {f.name: getattr(record, f.name) for f in fields(record)}
    # words stay as they are: a reason may well be "NaN", and only mappings are decoded
    return to_json({k: v if isinstance(v, str) else encode(v, k) for k, v in payload.items()})


def record_from(payload: Mapping[str, Any], finite: bool = False) -> RunRecord:
    """The record that a JSON object describes; ``ValueError`` says what is wrong with it.

    Args:
        payload: the object.
        finite: that it holds none of the words that stand for NaN and infinities is known.
    """
    unknown = sorted(set(payload) - set(_KINDS))
    if unknown:
        raise ValueError(f"unknown fields {', '.join(unknown)}")
    values: dict[str, Any] = {}
    for name, value in payload.items():
        kind = _KINDS[name]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ValueError(f"{name} must be {kind.__name__}, got {value!r:.60}")
        values[name] = decode(value) if kind is dict and not finite else value
    for name in _GROUPS:  # tables and figures look into them
        if not isinstance(values.get("config", {}).get(name, {}), dict):
            raise ValueError(f"config.{name} must be a mapping")
    for name in ("metrics", "cost"):
        values[name] = {key: number(item) for key, item in values.get(name, {}).items()}
    check_numbers(values["metrics"])
    try:
        record = RunRecord(**values)
    except TypeError as error:
        raise ValueError(str(error).replace("RunRecord.__init__()", "a record")) from None
    if record.scores_file not in ("", own := score_file(record)):
        raise ValueError(
            f"names the scores {record.scores_file!r:.120}, its own would be {own}: it was edited, "
            "or points at the scores of another record"
        )
    return record


def parse(text: bytes) -> RunRecord | Consistency:
    """What a JSON text of the store says; ``ValueError`` says why it cannot be used."""
    payload = parse_json(text)
    if not isinstance(payload, dict):
        raise ValueError("is not a record")
    if payload.get("format") != FORMAT:
        raise ValueError(
            f"has format {payload.get('format')!r}, this fine_bench reads format {FORMAT}; read "
            "it with the version that wrote it"
        )
    if payload.get("kind") == "consistency":
        return consistency_from(payload)
    return record_from(payload, finite=not any(word in text for word in _WORDS))


def read(path: Path) -> RunRecord | Consistency:
    """One file below ``records/``; ``ValueError`` says why it cannot be used."""
    try:
        text = read_bytes(path)
    except OSError as error:
        raise ValueError(f"cannot be read ({reason_of(error)})") from error
    return parse(text)


def key_of(record: RunRecord, names: Sequence[str] = IDENTITY) -> tuple[Any, ...]:
    """These fields of a record, its identity by default."""
    return tuple(getattr(record, name) for name in names)


def table_folder(task: str, setting: str) -> Path:
    """The folder of a table below ``records/`` and ``scores/``."""
    return Path(slug(task)) / slug(setting[:8])


def file_stem(record: RunRecord) -> str:
    """The name of a record's file up to its revision."""
    return _address(*key_of(record))[1]


@lru_cache(maxsize=1024, typed=True)  # reading a record asks twice
def _address(
    task: str, setting: str, estimator: str, estimator_hash: str,
    version: int, target: str, seed: int, data_sha256: str,
) -> tuple[str, str]:  # fmt: skip
    """Folder and stem; the arguments are ``IDENTITY``."""
    identity = [task, setting, estimator, estimator_hash, version, target, seed, data_sha256]
    stem = f"{slug(estimator)}--{slug(target)}--seed{seed}--{digest(identity)[:8]}"
    return table_folder(task, setting).as_posix(), stem


def _name(record: RunRecord, ending: str) -> str:
    folder, stem = _address(*key_of(record))
    return f"{folder}/{stem}--r{record.revision}.{ending}"


def record_file(record: RunRecord) -> Path:
    """Where a record's file lies below ``records/``."""
    return Path(_name(record, "json"))


def score_file(record: RunRecord) -> str:
    """Where the scores of a record lie below ``scores/``."""
    return _name(record, "safetensors")


def address_of(found: RunRecord | Consistency) -> str:
    """Where its file lies below ``records/``, with slashes."""
    if isinstance(found, RunRecord):
        return _name(found, "json")
    return comparison_file(found).as_posix()


def check_address(name: str, found: RunRecord | Consistency) -> None:
    """Hold a file's address below ``records/`` against its content, whose digest it carries.

    Raises:
        ValueError: the content belongs to another address: one of the two was changed.
    """
    own = address_of(found)
    if name != own:
        raise ValueError(
            f"does not say what its name says; such content would lie at records/{own}. "
            "It was edited or copied: move it away, and recompute with force=true"
        )


def comparison_file(found: Consistency) -> Path:
    """Where the file of a comparison lies below ``records/``."""
    name = f"consistency--{slug(found.estimator)}--{slug(found.target)}--{found.digest[:8]}.json"
    return table_folder(found.task, found.setting) / name
