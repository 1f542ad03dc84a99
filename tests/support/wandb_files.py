"""Offline W&B runs read back from their files, record by record."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as pb


@dataclass
class OfflineRun:
    """What a run has told W&B."""

    folder: Path
    name: str = ""
    group: str = ""
    job_type: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    axes: dict[str, str] = field(default_factory=dict)
    artifacts: list[str] = field(default_factory=list)
    files: dict[str, Path] = field(default_factory=dict)

    def column(self, key: str) -> list[Any]:
        """The logged values of a name, in order."""
        return [row[key] for row in self.history if key in row]

    def table(self, key: str) -> tuple[list[str], list[list[Any]]]:
        """Columns and rows of a logged table, as its artifact holds it: pictures have paths."""
        content = json.loads(self.files[f"{key}.table.json"].read_text())
        return content["columns"], content["data"]


def _key(item: Any) -> str:
    return str(item.key or ".".join(item.nested_key))


def _records(content: bytes) -> Iterator[bytes]:
    """The records of an offline run file: LevelDB's log format after a header of seven bytes."""
    position, block, parts = 7, 32768, b""
    while position < len(content):
        left = block - position % block
        if left < 7:  # the rest of a block that cannot hold a header is padding
            position += left
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield parts
            parts = b""


def read_runs(results: Path) -> list[OfflineRun]:
    """Every run below a results folder."""
    runs = []
    for path in sorted(results.glob("wandb/**/*.wandb")):
        run = OfflineRun(path.parent)
        for data in _records(path.read_bytes()):
            record = pb.Record()
            record.ParseFromString(data)
            kind = record.WhichOneof("record_type")
            if kind == "run" and record.run.display_name:
                run.name, run.group = record.run.display_name, record.run.run_group
                run.job_type, run.tags = record.run.job_type, list(record.run.tags)
                for item in record.run.config.update:
                    run.config[_key(item)] = json.loads(item.value_json)
            elif kind == "summary":
                for item in record.summary.update:
                    run.summary[_key(item)] = json.loads(item.value_json)
            elif kind == "history":
                row: dict[str, Any] = {}
                for item in record.history.item:
                    value = json.loads(item.value_json)
                    if len(item.nested_key) > 1:
                        row.setdefault(item.nested_key[0], {})[item.nested_key[-1]] = value
                    else:
                        row[_key(item)] = value
                run.history.append(row)
            elif kind == "metric" and record.metric.step_metric:
                run.axes[record.metric.glob_name or record.metric.name] = record.metric.step_metric
            elif kind == "artifact":
                run.artifacts.append(record.artifact.name)
                for entry in record.artifact.manifest.contents:
                    run.files[entry.path] = Path(entry.local_path)
        runs.append(run)
    return runs
