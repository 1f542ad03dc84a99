"""What ``clean`` reads: every form, what is left out of it by name, and what is refused."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fine_bench.data.views import ImageView, RowView, TextView
from fine_bench.errors import UserError
from fine_bench.runner.clean.features import encoded_table, features, neighbour_vectors, tf_idf
from fine_bench.runner.clean.inputs.arrays import as_images
from fine_bench.runner.clean.inputs.csv_files import CsvForm, csv_form
from fine_bench.runner.clean.inputs.images import read_image_folder
from fine_bench.runner.clean.inputs.items import Items
from fine_bench.runner.clean.inputs.recognise import load
from fine_bench.runner.clean.inputs.tables import is_text, read_table
from fine_bench.runner.clean.inputs.trusted import trusted_items, without_trusted

RNG = np.random.default_rng(0)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes of seven, of two sizes and modes, with what people have lying about."""
    home = tmp_path / "photos"
    for label in ("cat", "dog"):
        (home / label).mkdir(parents=True)
        for k in range(7):
            size = (20, 24) if k % 2 else (40, 30)
            array = RNG.integers(0, 255, (*size, 3)).astype(np.uint8)
            Image.fromarray(array).save(home / label / f"{k}.{'png' if k % 2 else 'jpg'}")
    (home / "cat" / "damaged.png").write_bytes(b"no image at all")
    whole = (home / "cat" / "0.jpg").read_bytes()
    (home / "dog" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (home / "dog" / "readme.txt").write_text("x")
    (home / "dog" / ".hidden.png").write_text("x")
    (home / "loose.png").write_bytes(whole)
    (home / "owl").mkdir()
    Image.fromarray(array).save(home / "owl" / "only.png")
    return home


def test_a_folder_of_images(images: Path) -> None:
    items = load(images)
    assert items.kind == "images"
    assert items.classes == ["cat", "dog"]
    assert len(items) == 14
    assert items.n_source == 17
    assert items.content.shape == (14, 32, 32, 3)
    reasons = {one.name: one.reason for one in items.left_out}
    assert reasons["cat/damaged.png"] == "cannot be read: no image"
    assert reasons["dog/cut.jpg"].startswith("cannot be read: OSError")
    assert "occurs once" in reasons["owl/only.png"]
    assert any("1 .txt" in note for note in items.notes)
    assert any("loose.png" in note for note in items.notes)
    # rows are those of all files by path, the damaged ones counted
    assert [one.row for one in items.left_out] == [7, 15, 16]
    assert 7 not in items.rows
    assert features(items).shape == (14, 3, 32, 32)
    view = items.origin.view(int(items.rows[3]))
    assert isinstance(view, ImageView)


def test_images_of_one_small_size_and_grey_ones_stay(tmp_path: Path) -> None:
    arrays = RNG.integers(0, 255, (12, 9, 11)).astype(np.uint8)
    for k, array in enumerate(arrays):
        folder = tmp_path / "ab"[k % 2]
        folder.mkdir(exist_ok=True)
        Image.fromarray(array).save(folder / f"{k:02d}.png")
    items = load(tmp_path)
    assert items.content.shape == (12, 9, 11, 1)
    assert (items.content[0, ..., 0] == arrays[0]).all()
    assert read_image_folder(tmp_path, image_size=8).content.shape == (12, 8, 8, 1)
    sixteen = arrays[0].astype(np.uint16) * 257
    Image.fromarray(sixteen).save(tmp_path / "a" / "00.png")
    assert load(tmp_path).content.shape == (12, 9, 11, 1)


def table(n: int = 40) -> pd.DataFrame:
    made = pd.DataFrame(
        {
            "id": [f"r{k}" for k in range(n)],
            "size": np.arange(n, dtype=float),
            "colour": np.array(["red", "green", "=blue"])[np.arange(n) % 3],
            "ripe": np.arange(n) % 2 == 0,
            "day": pd.date_range("2024-01-01", periods=n),
            "always": 1,
            "label": np.array(["apple", "plum"])[np.arange(n) % 2],
        }
    )
    made.loc[3, "size"] = np.nan
    made.loc[4, "size"] = np.inf
    made.loc[5, "colour"] = None
    made.loc[6, "label"] = None
    return made


def test_a_table_of_numbers_and_categories(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    table().to_csv(path, index=False)
    items = load(path)
    assert items.kind == "table"
    assert list(items.content.columns) == ["size", "colour", "ripe"]  # days are text in a csv
    assert [(one.row, one.reason) for one in items.left_out] == [(6, "no label")]
    said = " ".join(items.notes)
    assert "id" in said
    assert "differ in nearly every row" in said
    assert "always" in said
    assert "1 infinite value(s) of column size" in said
    assert "missing values in column(s) size (2), colour (1), the first in row 3" in said
    x = features(items)
    # size and its mark of what is missing, four colours (one is *missing*), two truth values
    assert x.shape == (39, 2 + 4 + 2)
    assert np.isfinite(x.numpy()).all()
    assert isinstance(items.origin.view(0), RowView)
    named = load(path, name="id", drop=["colour"])
    assert named.names[0] == "r0"
    assert list(named.content.columns) == ["size", "ripe"]
    frame = load(table())
    assert "day" in frame.content.columns
    assert frame.content["day"].iloc[7] == 8.0  # row 6 has no label


def test_a_table_without_labels_of_usual_name_and_whole_labels(tmp_path: Path) -> None:
    made = table().rename(columns={"label": "kind"})
    made["kind"] = [k % 3 for k in range(40)]
    path = tmp_path / "t.csv"
    made.to_csv(path, index=False)
    assert load(path, label="kind").classes == [0, 1, 2]
    made.loc[0, "kind"] = np.nan  # whole numbers beside a gap are read as floats
    made.to_csv(path, index=False)
    assert load(path, label="kind").classes == [0, 1, 2]


TEXTS = [f"the {'good' if k % 2 else 'poor'} film number {k} was seen" for k in range(30)]


def test_texts_are_recognised(tmp_path: Path) -> None:
    texts = [*TEXTS]
    texts[4], texts[5] = "  ", "…!"
    made = pd.DataFrame({"review": texts, "stars": np.arange(30) % 2 + 1, "n": 2 * np.arange(30)})
    path = tmp_path / "t.csv"
    made.to_csv(path, index=False)
    items = load(path, label="stars")
    assert items.kind == "text"
    assert [(one.row, one.reason) for one in items.left_out] == [
        (4, "no word in review"), (5, "no word in review")
    ]  # fmt: skip
    x = features(items)
    assert len(x) == 28
    assert np.linalg.norm(x.numpy(), axis=1) == pytest.approx(12.0, rel=1e-5)
    assert items.origin.view(0) == TextView(texts[0])
    assert load(path, label="stars", kind="table", drop=["review"]).kind == "table"
    lines = tmp_path / "t.jsonl"
    lines.write_text("\n".join(json.dumps({"text": t, "label": k % 2}) for k, t in
                               enumerate(TEXTS)) + "\n\n")  # fmt: skip
    assert load(lines).kind == "text"
    assert load(lines).n_source == 30
    assert not is_text(pd.Series(["a b c d e"] * 20))  # one sentence again and again
    assert not is_text(pd.Series(["one two"] * 20))
    assert not is_text(pd.Series([1.0] * 20))


@pytest.mark.parametrize(
    ("sign", "decimal", "said"),
    [
        (";", ",", "semicolons between its cells and decimal commas in its numbers"),
        (";", ".", "semicolons between its cells"),
        ("\t", ".", "tabs between its cells"),
        ("|", ".", "bars between its cells"),
    ],
)
def test_tables_as_spreadsheets_save_them(
    tmp_path: Path, sign: str, decimal: str, said: str
) -> None:
    path = tmp_path / "t.csv"
    rows = [["größe", "wort", "label"]]
    rows += [[f"{k / 4:.2f}".replace(".", decimal), "ja, so" if k % 3 else '"a' + sign + 'b"',
              "né" if k % 2 else "vu"] for k in range(40)]  # fmt: skip
    text = "".join(sign.join(row) + "\n" for row in rows)
    path.write_bytes(text.encode("cp1252"))
    items = load(path, encoding="cp1252")
    assert items.notes[0] == f"the file has {said}"
    assert list(items.content.columns) == ["größe", "wort"]
    assert items.content["größe"].tolist() == [k / 4 for k in range(40)]
    assert items.classes == ["né", "vu"]
    assert set(items.content["wort"]) == {"ja, so", f"a{sign}b".replace("\t", " ")}
    # the copy is in the same form
    copy = items.origin.write(tmp_path, [0, 1, 2], {0: "né"}).path
    cells = [line.split(sign) for line in copy.read_text("cp1252").splitlines()]
    assert [row[0] for row in cells] == ["größe", f"0{decimal}00", f"0{decimal}25", f"0{decimal}50"]
    assert cells[1][-1] == "né"


def test_commas_stay_commas(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("\ufeffa,label\n" + "1;2,u\n3;4,v\n" * 10)
    assert csv_form(path) == CsvForm()
    items = load(path)
    assert items.notes == []
    assert list(items.content.columns) == ["a"]
    path.write_text("label\n" + "u\nv\n" * 10)  # one column
    assert csv_form(path) == CsvForm()
    path.write_text("a;label\n" + "1;u\n3;v;w\n" * 10)  # rows of several lengths
    assert csv_form(path) == CsvForm()
    path.write_text('a;label\n"1\n2";u\n' * 9000)  # cut within a cell
    assert csv_form(path).separator == ";"


def test_json_lines_in_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    lines = [json.dumps({"text": f"{t} é", "label": k % 2}, ensure_ascii=False)
             for k, t in enumerate(TEXTS)]  # fmt: skip
    path.write_bytes("\n".join(lines).encode("utf-16"))
    items = load(path, encoding="utf-16")
    assert items.content[3] == f"{TEXTS[3]} é"
    copy = items.origin.write(tmp_path, range(30), {0: 1}).path
    assert read_table(copy, "utf-16")["label"].tolist()[:3] == [1, 1, 0]


def test_json_escapes_what_the_encoding_cannot_write(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    lines = [json.dumps({"text": t, "label": "łódź" if k % 2 else "né"}, ensure_ascii=k % 2 == 1)
             for k, t in enumerate(TEXTS)]  # fmt: skip
    path.write_bytes("\n".join(lines).encode("latin-1"))
    items = load(path, encoding="latin-1")
    assert items.classes == ["né", "łódź"]
    copy = items.origin.write(tmp_path, range(30), {0: "łódź", 1: "né"}).path
    assert read_table(copy, "latin-1")["label"].tolist()[:4] == ["łódź", "né", "né", "łódź"]
    assert copy.read_bytes().splitlines()[1].endswith(b'"label": "n\xe9"}')


def test_a_copy_that_its_encoding_cannot_write(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    # an encoding that reads what it cannot write
    path.write_bytes(
        b"x,label\n" + b"".join(b"%d,a\x1b\x80\n%d,b\n" % (k, k + 3) for k in range(20))
    )
    items = load(path, encoding="iso2022_jp")
    place = tmp_path / "copy"
    place.mkdir()
    with pytest.raises(
        UserError, match=r"cleaned.csv, line 2: '\\x80' \(U\+0080\) cannot be writt"
    ):
        items.origin.write(place, range(40), {1: items.classes[0]})
    assert list(place.iterdir()) == []


def test_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="the extra clean is not installed")
    path = tmp_path / "t.parquet"
    table().to_parquet(path)
    items = load(path)
    assert items.kind == "table"
    assert "day" in items.content.columns


def test_a_data_set_of_the_hub(tmp_path: Path) -> None:
    library = pytest.importorskip("datasets", reason="the extra clean is not installed")
    names = library.ClassLabel(names=["bad", "good"])
    made = library.Dataset.from_dict(
        {"text": TEXTS, "label": [k % 2 for k in range(30)]},
        features=library.Features({"text": library.Value("string"), "label": names}),
    )
    assert load(made).classes == ["bad", "good"]
    both = library.DatasetDict(train=made, test=made.select(range(12)))
    both.save_to_disk(str(tmp_path / "saved"))
    items = load(tmp_path / "saved")
    assert items.kind == "text"
    assert items.n_source == 30
    assert load(tmp_path / "saved", split="test").n_source == 12
    copy = items.origin.write(tmp_path, [0, 2, 3], {2: "good"}).path
    again = library.load_from_disk(str(copy))
    assert again["label"] == [0, 1, 1]
    assert again.features["label"].names == ["bad", "good"]
    pictures = library.Dataset.from_dict(
        {
            "image": [Image.fromarray(a) for a in RNG.integers(0, 255, (12, 8, 8), np.uint8)],
            "label": [k % 2 for k in range(12)],
        },
        features=library.Features({"image": library.Image(), "label": names}),
    )
    seen = load(pictures)
    assert seen.kind == "images"
    assert seen.content.shape == (12, 8, 8, 1)
    assert isinstance(seen.origin.view(1), ImageView)


def test_arrays(tmp_path: Path) -> None:
    x, y = RNG.normal(size=(20, 5)), np.arange(20) % 2
    x[3, 1] = np.nan
    np.savez(tmp_path / "a.npz", x=x, y=y)
    items = load(tmp_path / "a.npz")
    assert items.kind == "arrays"
    assert [(one.row, one.reason) for one in items.left_out] == [(3, "values that are not finite")]
    assert features(items).shape == (19, 5)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    (tmp_path / "y.txt").write_text("\n".join(f"k{k}" for k in y))
    assert load(tmp_path / "x.npy", label=str(tmp_path / "y.npy")).classes == [0, 1]
    assert load(tmp_path / "x.npy", label=str(tmp_path / "y.txt")).classes == ["k0", "k1"]
    many = RNG.integers(0, 255, (20, 3, 8, 8), np.uint8)
    pictures = load((many, y))
    assert pictures.kind == "images"
    assert features(pictures).shape == (20, 3, 8, 8)
    assert (pictures.content[0, :, :, 1] == many[0, 1]).all()
    assert load((many, y), kind="arrays").kind == "arrays"
    assert as_images(np.zeros((3, 4))) is None
    assert as_images(np.zeros((3, 2, 2))) is None
    view = pictures.origin.view(2)
    assert isinstance(view, ImageView)


def test_trusted_rows_by_number_name_and_column(images: Path, tmp_path: Path) -> None:
    items = load(images)
    file = tmp_path / "trusted.txt"
    file.write_text("row\n0\ndog/3.png\n\n2\n")
    mask = trusted_items(items, file)
    assert [items.names[k] for k in np.flatnonzero(mask)] == [
        "cat/0.jpg", "cat/2.jpg", "dog/3.png"
    ]  # fmt: skip
    assert (trusted_items(items, [0, 2, "dog/3.png"]) == mask).all()
    rows = load(table().assign(sure=np.arange(40) < 10))
    assert trusted_items(rows, "sure").sum() == 9  # row 6 is left out


def test_features_do_not_depend_on_the_order_of_columns_of_text() -> None:
    vectors = tf_idf(TEXTS)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1.0)
    items = load((RNG.normal(size=(30, 100)), np.arange(30) % 2))
    near = neighbour_vectors(features(items))
    assert near.shape == (30, 30)
    # distances of principal components are those of the rows
    flat = features(items).numpy()
    assert np.linalg.norm(near[0] - near[1]) == pytest.approx(
        np.linalg.norm(flat[0] - flat[1]), rel=1e-4
    )


# ------------------------------------------------------------------------------ what is refused


def csv(text: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(text) and None


def raw(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


HEAD, BODY = "a,b,label\n", "".join(f"{k},{k % 4},{'uv'[k % 2]}\n" for k in range(20))
Y = np.arange(20) % 2


def npz(**arrays: Any) -> Callable[[Path], None]:
    return lambda path: np.savez(path, **arrays)


def npy(array: Any) -> Callable[[Path], None]:
    return lambda path: np.save(path, array)


def lines(*rows: str) -> Callable[[Path], None]:
    return lambda path: path.write_text("\n".join(rows)) and None


TWO_TEXTS = pd.DataFrame({"p": TEXTS, "q": TEXTS, "label": np.arange(30) % 2})
REFUSED: list[tuple[Any, Callable[[Path], None] | None, dict[str, Any], str]] = [
    ("none.csv", None, {}, "none.csv is not there; check the path"),
    ("d.xyz", csv("x"), {}, "d.xyz is of no known form; give a folder of images"),
    (3.5, None, {}, "3.5 is no data; give a folder of images"),
    ((1, 2, 3), None, {}, "two arrays, got 3 things"),
    ("d.csv", csv(HEAD + BODY), {"kind": "audio"}, "--kind audio is unknown"),
    ("d.csv", csv(HEAD + BODY), {"kind": "images"}, "--kind images does not fit d.csv"),
    ("d.csv", csv(HEAD + BODY), {"split": "train"}, "--split goes with a folder"),
    ("d.csv", csv(HEAD + BODY), {"image_size": 32}, "--image-size goes with a folder of images"),
    (".", None, {"image_size": 3}, "--image-size 3 is out of range 8 … 256"),
    (".", None, {"label": "x"}, "--label names a column, but . is a folder of images"),
    (".", None, {}, "has no folders with .png or .jpg files"),
    (
        "d.csv",
        raw(b"a,label\n1,u\n2,caf\xe9\n"),
        {},
        "d.csv, line 3, is not UTF-8 (byte 0xe9 at 17)",
    ),
    ("d.csv", raw(b"\xff\xfea\0"), {}, "it begins as utf-16 does, so add --encoding utf-16"),
    ("d.jsonl", raw(b'{"a": "\xe9"}'), {}, "d.jsonl, line 1, is not UTF-8 (byte 0xe9 at 7); name"),
    (
        "d.jsonl",
        raw(b'{"text": "\\ud83d\\ude00", "label": 1}\n{"text": "a \\ud83d", "label": 0}\n'),
        {},
        "d.jsonl, line 2 holds half of a character (\\ud83d, one of a pair that stands alone)",
    ),
    ("d.csv", csv(HEAD + BODY), {"encoding": "klingon"}, "--encoding klingon is no encoding of"),
    ("d.npz", npz(x=np.zeros((20, 2)), y=Y), {"encoding": "latin-1"}, "goes with .csv and .jsonl"),
    ("d.csv", csv(""), {}, "cannot be read as a csv table"),
    ("d.csv", csv(HEAD), {}, "d.csv holds no rows"),
    ("d.csv", csv(HEAD + BODY), {"label": "labl"}, "no column 'labl' (--label); did you mean"),
    ("d.csv", csv(HEAD + BODY), {"label": "zzz"}, "it has a, b, label"),
    ("d.csv", csv("a,b\n1,2\n"), {}, "Add --label NAME, one of a, b"),
    ("d.csv", csv("y,label\n1,2\n"), {}, "Add --label NAME, one of y, label"),
    ("d.csv", csv(HEAD + BODY), {"text": "c"}, "no column 'c' (--text)"),
    ("d.csv", csv(HEAD + BODY), {"name": "c"}, "no column 'c' (--id)"),
    ("d.csv", csv(HEAD + BODY), {"drop": ["c"]}, "no column 'c' (--drop)"),
    ("d.csv", csv(HEAD + BODY), {"text": "a", "kind": "table"}, "does not go with --kind table"),
    ("d.csv", csv(HEAD + BODY), {"text": "label"}, "is the column of the labels"),
    ("d.csv", csv(HEAD + BODY), {"kind": "text"}, "no column of d.csv looks like text"),
    ("d.csv", csv(HEAD + BODY), {"drop": ["a", "b"]}, "no column to learn from besides the labels"),
    ("d.csv", csv(HEAD + "1,1,u\n2,1,v\n"), {}, "2 different labels in 2 usable rows"),
    (
        "d.csv",
        csv(HEAD + "1,1,u\n" * 3 + "3,2,v\n"),
        {},
        "1 label(s) that occur at least twice (u)",
    ),
    ("d.csv", csv(HEAD + BODY[:40]), {}, "usable rows; at least 10 are needed"),
    (TWO_TEXTS, None, {}, "several columns of text, p, q; choose one with --text"),
    (pd.DataFrame([[1, 2]], columns=["a", "a"]), None, {}, "two columns 'a'; rename one"),
    ("d.jsonl", lines('{"text": 1}', "{"), {}, "d.jsonl, line 2 is no JSON"),
    ("d.jsonl", lines("[1]"), {}, "d.jsonl, line 1 holds a list; every line must be an object"),
    ("d.npz", npz(x=np.zeros((20, 2)), z=Y), {}, "holds the arrays x, z, but x and y"),
    ("d.npz", csv("no"), {}, "cannot be read as plain arrays"),
    ("d.npz", npz(x=np.zeros((20, 2)), y=Y), {"label": "y"}, "--label y goes with tables"),
    ("d.npz", npz(x=np.zeros(20), y=Y), {}, "a single feature has shape (n, 1)"),
    ("d.npz", npz(x=np.zeros((20, 2)), y=Y + 0.5), {}, "must be whole numbers or text"),
    ("d.npz", npz(x=np.zeros((20, 2)), y=Y[:9]), {}, "has 20 rows, y 9; they must agree"),
    ("d.npz", npz(x=np.zeros((20, 2)), y=Y), {"kind": "images"}, "--kind images needs x of shape"),
    ("d.npz", npz(x=np.zeros((20, 2)), y=Y), {"text": "a"}, "d.npz is a file of arrays"),
    ("d.npy", npy(np.zeros((20, 2))), {}, "holds no labels; name a file of them"),
    ("d.npy", npy(np.zeros((20, 2))), {"label": "l"}, "--label l is not a file"),
    ("d.npy", csv("no"), {"label": "d.npy"}, "cannot be read as a plain array"),
]


@pytest.mark.parametrize(
    ("data", "write", "options", "message"), REFUSED, ids=[case[-1] for case in REFUSED]
)
def test_refusals(
    data: Any,
    write: Callable[[Path], None] | None,
    options: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    if write is not None:
        write(Path(data))
    with pytest.raises(UserError) as refused:
        load(data, **options)
    assert message in str(refused.value)


def test_an_option_of_another_name() -> None:
    with pytest.raises(TypeError, match="no option 'lable'; there are kind, label, text"):
        load(table(), lable="kind")  # type: ignore[call-arg]


def items_of_table() -> Items:
    return load(table().assign(sure="maybe"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere.txt", "is not a file and no column of the data; give a text file of rows"),
        ("sure", "must be true or false everywhere, got 'maybe' in row 0"),
        ([], "names no row; verify some, drawn at random"),
        ([0, 0], "names '0' more than once"),
        ([40], "names '40', which is no row (0 … 39) and no name"),
        (["r1x"], "no name, such as 0, 1"),
        ([6], "names row 6 (6), which was left out: no label"),
        ([k for k in range(40) if k != 6], "names all rows"),
    ],
)
def test_trusted_refusals(given: Any, message: str) -> None:
    with pytest.raises(UserError) as refused:
        trusted_items(items_of_table(), given)
    assert message in str(refused.value)


def test_a_trusted_name_that_is_two_things(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sure").write_text("1")
    with pytest.raises(UserError, match=r"both a column and a file; write \./sure"):
        trusted_items(items_of_table(), "sure")
    Path("bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot be read as text"):
        trusted_items(items_of_table(), "bytes")
    names = load(table(), name="id")
    with pytest.raises(UserError, match="did you mean 'r12'"):
        trusted_items(names, ["r12x"])


def test_what_is_not_installed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UserError, match=r"needs the package pyarrow; type: pip install"):
        read_table(tmp_path / "t.parquet")


def test_features_that_cannot_be_had() -> None:
    with pytest.raises(UserError, match="--encoder e goes with texts; these are table"):
        features(load(table()), encoder="e")
    with pytest.raises(UserError, match="no word of two letters"):
        tf_idf(["a", "b c"])
    with pytest.raises(UserError, match=r"column a reaches 1e\+200"):
        encoded_table(pd.DataFrame({"a": [1e200, 2.0, -1e200], "b": [1.0, 2, 3]}))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "npz"])
def test_a_new_label_is_written_as_the_source_writes_it(tmp_path: Path, kind: str) -> None:
    truth = [k % 2 == 0 for k in range(20)]
    path = tmp_path / f"data.{kind}"
    if kind == "csv":
        path.write_text("a,label\n" + "".join(f"{k % 5},{'TRUE' if t else 'FALSE'}\n"
                                              for k, t in enumerate(truth)))  # fmt: skip
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"a": k % 5, "label": t}) + "\n"
                                for k, t in enumerate(truth)))  # fmt: skip
    else:
        np.savez(path, x=np.arange(60.0).reshape(20, 3), y=np.array(truth))
    items = load(path)
    copy = items.origin.write(tmp_path, [0, 1, 2], {1: items.labels[0]}).path
    if kind == "csv":
        assert [line.split(",")[1] for line in copy.read_text().splitlines()[1:]] == ["TRUE"] * 3
    elif kind == "jsonl":
        assert [json.loads(line)["label"] for line in copy.read_text().splitlines()] == [True] * 3
    else:
        y = np.load(copy)["y"]
        assert y.dtype == np.bool_
        assert y.tolist() == [True] * 3


def test_json_lines_are_ended_by_line_feeds_alone(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    texts = [f"one two\u2028three\x85four {k} é" for k in range(20)]
    lines = [json.dumps({"text": t, "label": k % 2}, ensure_ascii=False)
             for k, t in enumerate(texts)]  # fmt: skip
    path.write_bytes(("\ufeff" + "\r\n".join(lines)).encode())
    items = load(path)
    assert list(items.content) == texts
    copy = items.origin.write(tmp_path, range(20), {0: 1}).path
    assert read_table(copy)["label"].tolist() == [1, 1, *([0, 1] * 9)]


def test_a_column_that_counts_the_rows_is_no_feature(tmp_path: Path) -> None:
    # rows stand class by class, so the index that pandas saves would tell the label
    table = pd.DataFrame({"a": np.tile([1.0, 2.0, 4.0, 8.0], 10), "label": np.repeat([0, 1], 20)})
    table.to_csv(tmp_path / "data.csv")
    items = load(tmp_path / "data.csv")
    assert list(items.content.columns) == ["a"]
    assert "column(s) Unnamed: 0 count the rows and were not used" in items.notes


@pytest.mark.parametrize(
    ("row", "message"), [("1,2,x,\n1,3,y,\n", "more cells"), ("r,1,2,x\nq,1,3,y\n", "more cells")]
)
def test_cells_without_a_name_are_not_shifted(tmp_path: Path, row: str, message: str) -> None:
    path = tmp_path / "data.csv"
    path.write_text("a,b,label\n" + row * 10)
    with pytest.raises(UserError, match=message):
        load(path)


def test_labels_and_arrays_without_numbers(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("a,label\n" + "1,inf\n2,1\n" * 10)
    assert load(tmp_path / "data.csv").classes == ["1.0", "inf"]
    for shape in ((0, 28, 28), (20, 0)):
        with pytest.raises(UserError, match="holds no number"):
            load((np.zeros(shape), np.arange(shape[0]) % 2))


def test_a_model_does_not_see_which_rows_are_trusted() -> None:
    data = pd.DataFrame(
        {"a": np.arange(20) ** 2, "ok": np.arange(20) < 5, "label": np.arange(20) % 2}
    )
    items = without_trusted(load(data), "ok")
    assert list(items.content.columns) == ["a"]
    assert items.notes[-1] == "the column ok says which rows are trusted and was not used"
    assert trusted_items(items, "ok").sum() == 5
    whole = load(data)
    assert without_trusted(whole, [0, 1]) is whole
    with pytest.raises(UserError, match="no column to learn from besides the labels and ok"):
        without_trusted(load(data.drop(columns="a")), "ok")


def test_a_class_that_is_called_na_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("a,label\n" + "1,NA\n2,DE\n3,FR\n4,\n5,None\n" * 8)
    items = load(path)
    assert items.classes == ["DE", "FR"]
    reasons = {one.row: one.reason for one in items.left_out}
    assert reasons[0] == "NA counts as no label; spell it otherwise if it is a class"
    assert reasons[3] == "no label"
    assert reasons[4].startswith("None counts as no label")


def test_grey_of_sixteen_bits_is_shown_as_the_model_sees_it(tmp_path: Path) -> None:
    grey = (1000 * np.arange(64)).astype(np.uint16).reshape(8, 8)
    for label in "ab":
        (tmp_path / label).mkdir()
        for k in range(6):
            Image.fromarray(np.roll(grey, k)).save(tmp_path / label / f"{k}.png")
    items = read_image_folder(tmp_path)
    view = items.origin.view(0)
    assert isinstance(view, ImageView)
    with Image.open(io.BytesIO(view.png)) as shown:
        assert np.array_equal(np.asarray(shown), items.content[0, ..., 0])
    assert len(np.unique(items.content[0])) == 64
