"""A record and its JSON: identity, address, writing and reading."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from fine_bench.store.comparisons import Consistency, consistency_from
from fine_bench.store.digest import FORMAT, decode, digest, encode, number, to_json
from fine_bench.store.files import slug
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
PENDING = "pending"
"""May stand for ``scores_sha256`` in a finished record that ``RecordStore.save`` will fill."""


def record_json(record: RunRecord) -> bytes:
    """The file of a record."""
    payload = {f.name: getattr(record, f.name) for f in fields(record)}
    # words stay as they are: a reason may well be "NaN", and only mappings are decoded
    return to_json({k: v if isinstance(v, str) else encode(v, k) for k, v in payload.items()})


def record_from(payload: Mapping[str, Any]) -> RunRecord:
    """The record that a JSON object describes; ``ValueError`` says what is wrong with it."""
    kinds = {"str": str, "Status": str, "int": int}  # annotations of RunRecord; the rest: mappings
    known = {f.name: kinds.get(str(f.type), dict) for f in fields(RunRecord)}
    unknown = sorted(set(payload) - set(known))
    if unknown:
        raise ValueError(f"unknown fields {', '.join(unknown)}")
    values: dict[str, Any] = {}
    for name, value in payload.items():
        kind = known[name]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ValueError(f"{name} must be {kind.__name__}, got {value!r:.60}")
        values[name] = decode(value) if kind is dict else value
    for name in ("metrics", "cost"):
        values[name] = {key: number(item) for key, item in values.get(name, {}).items()}
    try:
        return RunRecord(**values)
    except TypeError as error:
        raise ValueError(str(error).replace("RunRecord.__init__()", "a record")) from None


def parse(text: bytes) -> RunRecord | Consistency:
    """What a JSON text of the store says; ``ValueError`` says why it cannot be used."""
    try:
        payload = json.loads(text.decode())
    except ValueError as error:
        raise ValueError(f"is not whole JSON ({error})") from None
    if not isinstance(payload, dict):
        raise ValueError("is not a record")
    if payload.get("format") != FORMAT:
        raise ValueError(
            f"has format {payload.get('format')!r}, this fine_bench reads format {FORMAT}; read "
            "it with the version that wrote it"
        )
    if payload.get("kind") == "consistency":
        return consistency_from(payload)
    return record_from(payload)


def read(path: Path) -> RunRecord | Consistency:
    """One file below ``records/``; ``ValueError`` says why it cannot be used."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error
    return parse(text)


def key_of(record: RunRecord, names: Sequence[str] = IDENTITY) -> tuple[Any, ...]:
    """These fields of a record, its identity by default."""
    return tuple(getattr(record, name) for name in names)


def table_folder(task: str, setting: str) -> Path:
    """The folder of a table below ``records/`` and ``scores/``."""
    return Path(slug(task)) / slug(setting[:8])


def file_stem(record: RunRecord) -> str:
    """The name of a record's file up to its revision."""
    short = digest([getattr(record, name) for name in IDENTITY])[:8]
    row = f"{slug(record.estimator)}--{slug(record.target)}"
    return f"{row}--seed{record.seed}--{short}"


def record_file(record: RunRecord) -> Path:
    """Where a record's file lies below ``records/``."""
    name = f"{file_stem(record)}--r{record.revision}.json"
    return table_folder(record.task, record.setting) / name


def comparison_file(found: Consistency) -> Path:
    """Where the file of a comparison lies below ``records/``."""
    name = f"consistency--{slug(found.estimator)}--{slug(found.target)}--{found.digest[:8]}.json"
    return table_folder(found.task, found.setting) / name
