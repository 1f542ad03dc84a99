"""Instruction data from JSONL files: one sample a line, in the Alpaca or the chat format.

    {"instruction": "…", "input": "…", "output": "…"}                              Alpaca
    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", …}]}     chat

``input`` may be missing. A chat may begin with a system message and have several turns; each turn
of the assistant is trained on. Further columns are ignored but for two that may be named: one with
the group (source) of a sample, one that says whether it is known to be bad.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fine_bench.errors import DataError
from fine_bench.llm.instructions import Sample, Turn
from fine_bench.store.guarded import NoJSONError, parse_json, read_bytes, reason_of

ROLES = ("system", "user", "assistant")
SHOWN = 5
"""Problems that a message spells out; the others are counted."""


class _LineError(ValueError):
    """What is wrong with one line."""


def digest_of_file(path: Path | str) -> str:
    """SHA-256 of a file's bytes, as ``sha256sum`` prints it.

    Args:
        path: of a file that ``read_jsonl`` has read.
    """
    return hashlib.sha256(read_bytes(Path(path).expanduser())).hexdigest()


def read_jsonl(
    path: Path | str,
    *,
    group_column: str | None = None,
    truth_column: str | None = None,
    option: str = "task.path",
) -> tuple[Sample, ...]:
    """The samples of a file, in order. Blank lines are skipped.

    Args:
        path: the file, UTF-8.
        group_column: key of the group, a string or an integer; null and missing mean no group.
        truth_column: key of the mark for bad samples, true or false in every line.
        option: what the file is called in the configuration.

    Raises:
        DataError: the file cannot be read, or some of its lines are no samples; with their numbers
            and what is wrong with each.
    """
    path = Path(path).expanduser()
    try:
        text = read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}; convert it") from error
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read ({reason_of(error)}); name a JSONL file with {option}=…"
        ) from error
    samples: list[Sample] = []
    problems: list[str] = []
    # only a line feed ends a line of JSONL; other separators may stand inside of strings
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            samples.append(_sample(line, number, group_column, truth_column))
        except _LineError as error:
            problems.append(f"line {number}: {error}")
    if problems:
        more = len(problems) - SHOWN
        shown = [*problems[:SHOWN], *([f"and {more} more"] if more > 0 else [])]
        raise DataError(
            f"{path}: {len(problems)} of its lines are no samples:\n  " + "\n  ".join(shown)
        )
    if not samples:
        raise DataError(f"{path} holds no sample; each line is a JSON object")
    if group_column is not None and all(s.group is None for s in samples):
        raise DataError(f"{path}: no line has the group column {group_column!r}; see task.group")
    return tuple(samples)


def write_jsonl(path: Path, samples: Sequence[Sample]) -> None:
    """Samples in the chat format, with the columns ``group`` and ``bad`` where they are known."""
    lines = []
    for s in samples:
        row: dict[str, Any] = {
            "messages": [{"role": t.role, "content": t.content} for t in s.turns]
        }
        if s.group is not None:
            row["group"] = s.group
        if s.is_bad is not None:
            row["bad"] = s.is_bad
        lines.append(json.dumps(row, ensure_ascii=False))
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")


def _sample(line: str, number: int, group_column: str | None, truth_column: str | None) -> Sample:
    try:
        row = parse_json(line)
    except NoJSONError as error:
        raise _LineError(f"not JSON: {error.msg} at column {error.colno}") from None
    except ValueError as error:
        raise _LineError(f"it {error}") from None
    if not isinstance(row, dict):
        raise _LineError(f"a JSON object was expected, got {type(row).__name__}")
    if "messages" in row:
        turns = _chat(row["messages"])
    elif "instruction" in row:
        turns = _alpaca(row)
    else:
        raise _LineError(
            'neither "instruction" and "output" (Alpaca) nor "messages" (chat); it has '
            + (", ".join(sorted(map(str, row))) or "no keys")
        )
    return Sample(turns, _group(row, group_column), _truth(row, truth_column), number)


def _alpaca(row: Mapping[str, Any]) -> tuple[Turn, ...]:
    instruction = _text(row, "instruction")
    extra = _text(row, "input") if row.get("input") is not None else ""
    if "output" not in row:
        raise _LineError('"output" is missing')
    output = _text(row, "output")
    if not instruction.strip() and not extra.strip():
        raise _LineError("the instruction is empty")
    if not output.strip():
        raise _LineError('the completion ("output") is empty')
    prompt = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    return (Turn("user", prompt), Turn("assistant", output))


def _chat(messages: Any) -> tuple[Turn, ...]:
    if not isinstance(messages, list) or not messages:
        raise _LineError('"messages" must be a list of messages')
    turns: list[Turn] = []
    for position, message in enumerate(messages, 1):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise _LineError(
                f'message {position} needs a "role", one of {", ".join(ROLES)}, and a "content"'
            )
        turn = Turn(message["role"], _text(message, "content", f" of message {position}"))
        before = turns[-1].role if turns else None
        if turn.role == "system" and turns:
            raise _LineError(f"message {position}: a system message can only stand first")
        if turn.role == "assistant" and before != "user":
            raise _LineError(f"message {position}: the assistant must answer a user's message")
        if turn.role == "user" and before == "user":
            raise _LineError(f"message {position}: two messages of the user follow each other")
        if not turn.content.strip():
            what = "completion" if turn.role == "assistant" else f"{turn.role}'s message"
            raise _LineError(f"message {position}: the {what} is empty")
        turns.append(turn)
    if turns[-1].role != "assistant":
        raise _LineError("the last message must be the assistant's: there is no completion")
    return tuple(turns)


def _text(row: Mapping[str, Any], key: str, where: str = "") -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise _LineError(f'"{key}"{where} must be a string, got {type(value).__name__}')
    return value


def _group(row: Mapping[str, Any], column: str | None) -> str | None:
    value = None if column is None else row.get(column)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise _LineError(f'"{column}" must be a string or an integer, got {type(value).__name__}')
    return str(value)


def _truth(row: Mapping[str, Any], column: str | None) -> bool | None:
    if column is None:
        return None
    value = row.get(column)
    if not isinstance(value, bool):
        raise _LineError(f'"{column}" must be true or false, got {json.dumps(value)}')
    return value
