"""Attacks on ``clean``: damaged archives and tables, numbers without a square, evil labels."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fine_bench.commands import clean
from fine_bench.errors import DataError, UserError
from fine_bench.runner.clean.data_files import read, standardise


def archive(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return path


def npy(header: str, rest: bytes = b"") -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + rest


def plain(array: object) -> bytes:
    out = io.BytesIO()
    np.save(out, np.asarray(array))
    return out.getvalue()


GOOD = plain(np.zeros(10, dtype=np.int64))
HEADERS = {
    "4 PB": "{'descr': '<f8', 'fortran_order': False, 'shape': (562949953421312, 1), }",
    "no end": "{'descr': '<f8', 'fortran_order': False, 'shape': (10, 1",
    "rubbish": "\x00\x01{{{(((",
    "nested": "(" * 5000,
    "negative": "{'descr': '<f8', 'fortran_order': False, 'shape': (-5, 2), }",
    "no type": "{'descr': 'nope', 'fortran_order': False, 'shape': (10, 1), }",
    "too long": "{'descr': '<f8', 'fortran_order': False, 'shape': (10, 1), }" + " " * 60000,
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_damaged_headers_are_named(tmp_path: Path, header: str) -> None:
    path = archive(tmp_path / "data.npz", x=npy(header, b"\0" * 8), y=GOOD)
    with pytest.raises(DataError, match=r"data\.npz cannot be read as plain arrays"):
        read(path, "trusted.txt", None)


def test_flipped_bits_and_cuts_are_named(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(40, 3))
    whole = archive(tmp_path / "good.npz", x=plain(x), y=plain(np.arange(40) % 2)).read_bytes()
    (tmp_path / "trusted.txt").write_text("\n".join(map(str, range(10))))
    draw = np.random.default_rng(1)
    path = tmp_path / "data.npz"
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[int(draw.integers(len(whole)))] ^= 1 << int(draw.integers(8))
        path.write_bytes(bytes(damaged[: int(draw.integers(len(whole)))] if draw.random() < 0.3
                               else damaged))  # fmt: skip
        try:
            read(path, str(tmp_path / "trusted.txt"), None)
        except DataError:
            continue  # its message names the file: no other error may come out


@pytest.mark.parametrize("content", [b"", b"\0" * 50, b"\xff\xfe\x00a,b\n", b'a,"b\n1,2\n', b"a\n"])
def test_damaged_tables_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"data\.csv"):
        read(path, "trusted.txt", "a")


@pytest.mark.parametrize("shape", [(10, 2), (10, 4, 4)])
def test_numbers_without_a_square_are_refused(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).normal(size=shape)
    x[3] = 1e200
    with pytest.raises(DataError, match=r"reach 1e\+200.*divide them"):
        standardise(x)
    assert np.isfinite(standardise(np.where(x > 1e100, 1e100, x)).numpy()).all()


def test_labels_are_text_to_the_terminal_and_to_spreadsheets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = np.random.default_rng(0)
    evil, other = "=1+1[/b]\x1b[31m\nx", "[link]"
    y = np.array([evil, other])[np.arange(60) % 2]
    x = draw.normal(size=(60, 2)) + 4.0 * (np.arange(60) % 2)[:, None]
    folder = tmp_path / "[red]"
    folder.mkdir()
    table = pd.DataFrame({"a": x[:, 0], "b": x[:, 1], "label": y, "sure": np.arange(60) < 30})
    table.to_csv(folder / "data.csv", index=False)
    out = folder / "flagged.csv"
    data = str(folder / "data.csv")
    status = clean.main(
        ["--data", data, "--label", "label", "--trusted", "sure", "--out", str(out), "--all",
         "--epochs", "2", "--level", "0.9", "--method", "mean_loss"]
    )  # fmt: skip
    captured = capsys.readouterr()
    assert status == 0
    assert "\x1b" not in captured.out + captured.err
    assert "[red]" in captured.out
    assert not any(line.startswith("=") for line in out.read_text().split(","))
