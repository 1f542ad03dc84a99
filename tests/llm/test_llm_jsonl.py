"""JSONL: both formats, and what is wrong with which line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fine_bench.errors import DataError
from fine_bench.llm.instructions import InstructionSet
from fine_bench.llm.jsonl import read_jsonl, write_jsonl


def write(path: Path, *rows: Any) -> Path:
    file = path / "data.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def alpaca(output: Any = "Yes.", **further: Any) -> dict[str, Any]:
    return {"instruction": "Is it?", "output": output, **further}


def chat(*contents: str) -> dict[str, Any]:
    roles = ["user", "assistant"] * len(contents)
    return {"messages": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]}


def test_both_formats(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    long = chat("a", "b", "c", "d")
    long["messages"].insert(0, system)
    file = write(
        tmp_path,
        alpaca(input="this\u2028thing", source="web", bad=True),
        "",
        {**long, "source": 3, "bad": False},
        {**alpaca(), "bad": False},
    )
    first, second, third = read_jsonl(file, group_column="source", truth_column="bad")
    assert (first.prompt, first.completion) == ("Is it?\n\nthis\u2028thing", "Yes.")
    assert (first.group, first.is_bad, first.line) == ("web", True, 1)
    assert [t.role for t in second.turns] == ["system", "user", "assistant", "user", "assistant"]
    assert (second.completion, second.group, second.line) == ("b\nd", "3", 3)
    assert third.group is None
    assert read_jsonl(file)[0].is_bad is None


def test_what_is_written_can_be_read(tmp_path: Path, texts: InstructionSet) -> None:
    write_jsonl(tmp_path / "out.jsonl", texts.train)
    again = read_jsonl(tmp_path / "out.jsonl", group_column="group", truth_column="bad")
    assert again == texts.train


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"instruction": "a", "output": ', r"line 2: not JSON: .* at column 3\d"),
        ("[1, 2]", "a JSON object was expected, got list"),
        ({"text": "a"}, r'neither "instruction".*it has text'),
        ({}, "it has no keys"),
        ({"instruction": "a"}, '"output" is missing'),
        (alpaca(output="  \n"), r'the completion \("output"\) is empty'),
        (alpaca(output=3), '"output" must be a string, got int'),
        ({"instruction": " ", "output": "a"}, "the instruction is empty"),
        ({"messages": []}, "must be a list of messages"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "message 1 needs a .role."),
        ({"messages": [{"role": "user"}]}, '"content" of message 1 must be a string'),
        (chat("a"), "the last message must be the assistant's"),
        (chat("a", ""), "message 2: the completion is empty"),
        (chat("", "a"), "message 1: the user's message is empty"),
        ({"messages": chat("a", "b")["messages"][1:]}, "must answer a user's message"),
        ({"messages": chat("a", "b")["messages"][:1] * 2}, "two messages of the user"),
        (
            {"messages": [*chat("a", "b")["messages"], {"role": "system", "content": "c"}]},
            "can only stand first",
        ),
        (alpaca(source=1.5), '"source" must be a string or an integer, got float'),
        (alpaca(source=True), '"source" must be a string or an integer, got bool'),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, row: Any, message: str) -> None:
    file = write(tmp_path, alpaca(source="a"), row)
    with pytest.raises(DataError, match=message) as caught:
        read_jsonl(file, group_column="source")
    assert "line 2" in str(caught.value)
    assert str(file) in str(caught.value)


def test_many_bad_lines_are_counted(tmp_path: Path) -> None:
    file = write(tmp_path, *["{"] * 9)
    with pytest.raises(DataError, match=r"(?s)9 of its lines .*line 5: .*and 4 more"):
        read_jsonl(file)


def test_truth_must_be_said(tmp_path: Path) -> None:
    for value in ("yes", 1, None):
        with pytest.raises(DataError, match='"bad" must be true or false'):
            read_jsonl(write(tmp_path, alpaca(bad=value)), truth_column="bad")


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be read .*with task.path="):
        read_jsonl(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match=r"with task.test_path="):
        read_jsonl(tmp_path / "missing.jsonl", option="task.test_path")
    (tmp_path / "latin.jsonl").write_bytes(b'{"instruction": "caf\xe9"}')
    with pytest.raises(DataError, match="not UTF-8"):
        read_jsonl(tmp_path / "latin.jsonl")
    with pytest.raises(DataError, match="holds no sample"):
        read_jsonl(write(tmp_path, "", " "))
    with pytest.raises(DataError, match="no line has the group column 'source'"):
        read_jsonl(write(tmp_path, alpaca()), group_column="source")
