"""``fine-bench clean DATA``: from data to a reviewed list and back, as a user types it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import fine_bench
from fine_bench.commands.clean import main
from fine_bench.errors import UserError
from fine_bench.runner.clean import cleaning
from fine_bench.runner.clean.decisions import apply, decisions_of
from fine_bench.runner.clean.folder import default_folder
from fine_bench.runner.clean.inputs.recognise import load

FILES = {
    "ranking.csv", "issues.csv", "left_out.csv", "summary.md", "verify_first.csv", "review.html",
    "verify_first.html", "runs",
}  # fmt: skip


def rows(n: int = 300) -> tuple[pd.DataFrame, np.ndarray]:
    """A table with a tenth of its labels wrong, a category, gaps, and which are wrong."""
    rng = np.random.default_rng(0)
    right = np.arange(n) % 2
    wrong = np.isin(np.arange(n), rng.permutation(n)[: n // 10])
    x = rng.normal(size=(n, 3)) + 3.0 * right[:, None]
    table = pd.DataFrame(x, columns=["a", "b", "=c"])
    table["colour"] = np.where(right == 1, "+red", "blue")
    table.loc[3, "a"] = np.nan
    table["label"] = np.where(right ^ wrong, "@plum", "apple")
    table.loc[5, "label"] = None
    return table, wrong


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``fruit.csv``, cleaned into ``out``."""
    folder = tmp_path_factory.mktemp("clean")
    rows()[0].to_csv(folder / "fruit.csv", index=False)
    status = main(
        [str(folder / "fruit.csv"), "--out", str(folder / "out"), "--runs", "2", "--epochs", "4",
         "--lr", "0.2", "--level", "0.4"]
    )  # fmt: skip
    assert status == 0
    return folder


def test_a_folder_is_written(home: Path) -> None:
    out = home / "out"
    assert {path.name for path in out.iterdir()} == FILES
    table = pd.read_csv(out / "ranking.csv")
    assert list(table.columns) == [
        "row", "name", "label", "suggested", "score", "rank", "runs_found", "runs", "repeats",
        "repeatable", "p_label", "mu", "mu_low", "mu_high",
    ]  # fmt: skip
    assert len(table) == 299
    wrong = rows()[1]
    assert wrong[table["row"].to_numpy()[:20]].mean() > 0.8
    assert (table["mu_low"].dropna() <= table["mu"][table["mu_low"].notna()]).all()
    # cells that a spreadsheet would take for formulas are marked as text
    assert set(table["label"]) == {"'@plum", "apple"}
    assert pd.read_csv(out / "left_out.csv").to_numpy().tolist() == [[5, 5, "no label"]]
    said = (out / "summary.md").read_text()
    assert "299 of 300 rows, 2 classes" in said
    assert "missing values in column(s) a (1), the first in row 3" in said
    assert "left out: 1 row(s), no label: 5 (row 5)." in said
    assert "verify the" in said
    assert "of these at most 40% would be no suspects in another run" in said
    assert table["repeats"].between(0, 1).all()
    most = 2 * table["runs_found"] > table["runs"]
    assert 0 < table["repeatable"].sum() <= most.sum()
    assert most[table["repeatable"]].all()
    page = (out / "review.html").read_text()
    assert "<script" in page
    assert "@plum" in page
    drawn = pd.read_csv(out / "verify_first.csv")
    assert list(drawn.columns) == ["row", "name", "label"]
    assert len(list((out / "runs").glob("*.npz"))) == 4


def test_nothing_is_replaced_and_the_same_seed_gives_the_same_files(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = [str(home / "fruit.csv"), "--runs", "2", "--epochs", "4", "--lr", "0.2", "--level",
            "0.4"]  # fmt: skip
    assert main([*call, "--out", str(home / "out")]) == 2
    assert "is already there and would be replaced; name another folder" in capsys.readouterr().err
    assert main([*call, "--out", str(tmp_path / "again")]) == 0
    for name in sorted(FILES - {"runs"}):
        first, second = (
            (folder / name).read_bytes() for folder in (home / "out", tmp_path / "again")
        )
        assert first.replace(str(home / "out").encode(), b"") == second.replace(
            str(tmp_path / "again").encode(), b""
        ), name
    for path in (home / "out" / "runs").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / "runs" / path.name).read_bytes()


def test_an_interrupted_call_goes_on(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call = [str(home / "fruit.csv"), "--runs", "2", "--epochs", "4", "--lr", "0.2", "--level",
            "0.4", "--out", str(tmp_path / "out"), "--no-page"]  # fmt: skip
    made = cleaning.train_run
    calls = []

    def stopped(*given: object, **options: object) -> object:
        if calls:
            raise KeyboardInterrupt
        calls.append(given)
        return made(*given, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(cleaning, "train_run", stopped)
    assert main(call) == 130
    kept = sorted((tmp_path / "out" / "runs").glob("*.npz"))
    assert len(kept) == 2
    # the first run has been answered
    early = pd.read_csv(tmp_path / "out" / "runs" / "first_ranking.csv")
    assert len(early) == 299
    assert set(early["runs"]) == {1}
    assert not (tmp_path / "out" / "ranking.csv").exists()
    said = " ".join(capsys.readouterr().err.split())
    assert "after the first run, most suspicious: " in said
    assert "2 finished part(s) of runs are in" in said
    assert "the same call goes on from there" in said
    times = [path.stat().st_mtime_ns for path in kept]
    monkeypatch.undo()
    assert main(call) == 0
    assert [path.stat().st_mtime_ns for path in kept] == times
    assert (tmp_path / "out" / "ranking.csv").read_bytes() == (
        home / "out" / "ranking.csv"
    ).read_bytes()
    assert not (tmp_path / "out" / "review.html").exists()


def test_decisions_give_a_copy_and_a_trusted_list_for_a_second_call(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(home / "out", tmp_path / "out")
    table, wrong = rows()
    drawn = pd.read_csv(tmp_path / "out" / "verify_first.csv")["row"].tolist()
    top = pd.read_csv(tmp_path / "out" / "ranking.csv")["row"].head(8).tolist()
    other = {"apple": "'@plum", "@plum": "apple"}
    lines = []
    for row in dict.fromkeys([*drawn, *top]):
        if wrong[row]:
            lines.append((row, row, "relabel" if row % 2 else "reject",
                          other[table["label"][row]] if row % 2 else ""))  # fmt: skip
        else:
            lines.append((row, row, "accept", ""))
    decided = pd.DataFrame(lines, columns=["row", "name", "decision", "label"])
    decided.to_csv(tmp_path / "d.csv", index=False)
    call = [str(home / "fruit.csv"), "--out", str(tmp_path / "out")]
    assert main([*call, "--decisions", str(tmp_path / "d.csv")]) == 0
    said = capsys.readouterr()
    assert f"{len(lines)} decisions" in said.out
    copy = pd.read_csv(tmp_path / "out" / "cleaned.csv", dtype=str, keep_default_na=False)
    given = pd.read_csv(home / "fruit.csv", dtype=str, keep_default_na=False)
    gone = [row for row, _, word, _ in lines if word == "reject"]
    kept = given.drop(index=gone)
    assert len(copy) == 300 - len(gone)
    assert (copy["a"].to_numpy() == kept["a"].to_numpy()).all()  # verbatim
    for row, _, word, label in lines:
        if word == "relabel":
            assert copy["label"][list(kept.index).index(row)] == label.lstrip("'")
    trusted = np.loadtxt(tmp_path / "out" / "trusted.txt", dtype=int).tolist()
    assert trusted == sorted(row for row in drawn if not wrong[row])
    same = np.loadtxt(tmp_path / "out" / "trusted_cleaned.txt", dtype=int)
    assert (copy["b"].to_numpy()[same] == given["b"].to_numpy()[trusted]).all()

    # the second call trains nothing, and promises a rate
    def never(*given: object, **options: object) -> None:
        raise AssertionError("was trained again")

    monkeypatch.setattr("fine_bench.runner.clean.training.train_model", never)
    second = [*call, "--runs", "2", "--epochs", "4", "--lr", "0.2", "--level", "0.4", "--trusted",
              str(tmp_path / "out" / "trusted.txt"), "--force"]  # fmt: skip
    assert main(second) == 0
    found = pd.read_csv(tmp_path / "out" / "ranking.csv")
    assert {"trusted", "p_value", "covered"} <= set(found.columns)
    assert found["covered"].sum() > 0
    assert wrong[found["row"][found["covered"]]].mean() > 0.3  # a tenth is wrong in all
    assert "at most 40 % are right after all" in " ".join(capsys.readouterr().out.split())
    # a copy that is there is not replaced
    assert main([*call, "--decisions", str(tmp_path / "d.csv")]) == 2
    assert "cleaned.csv is already there" in capsys.readouterr().err
    assert main([*call, "--decisions", str(tmp_path / "d.csv"), "--force"]) == 0


@pytest.fixture
def drawn_before(home: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A folder with the draw of an earlier call, and a file of one decision."""
    out, decided = tmp_path / "out", tmp_path / "d.csv"
    out.mkdir()
    shutil.copy(home / "out" / "verify_first.csv", out)
    decided.write_text("row,name,decision,label\n0,0,reject,\n")
    return out, decided


def test_neither_data_nor_a_list_in_the_folder_are_replaced(
    home: Path, drawn_before: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out, decided = drawn_before
    # the copy of an earlier call as data
    data = shutil.copy(home / "fruit.csv", out / "cleaned.csv")
    before = data.read_bytes()
    for options in ([], ["--decisions", str(decided)]):
        assert main([str(data), "--out", str(out), "--force", *options]) == 2
        assert "holds the data, cleaned.csv, which would be replaced" in capsys.readouterr().err
    assert data.read_bytes() == before
    data.unlink()
    # a list of somebody's own
    (out / "trusted.txt").write_text("7\n")
    call = [str(home / "fruit.csv"), "--out", str(out), "--decisions", str(decided)]
    assert main(call) == 2
    assert "trusted.txt is already there" in capsys.readouterr().err
    assert (out / "trusted.txt").read_text() == "7\n"
    assert not (out / "cleaned.csv").exists()
    assert main([*call, "--force"]) == 0
    assert (out / "trusted.txt").read_text() == ""


def test_a_draw_of_other_data_is_not_trusted(
    home: Path,
    drawn_before: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, decided = drawn_before
    other = rows()[0]
    other["label"] = other["label"].map({"@plum": "apple", "apple": "@plum"})
    other.to_csv(tmp_path / "other.csv", index=False)
    call = ["--out", str(out), "--decisions", str(decided)]
    assert main([str(tmp_path / "other.csv"), *call]) == 2
    assert "was drawn from other data: it names row" in " ".join(capsys.readouterr().err.split())
    assert not (out / "cleaned.csv").exists()
    assert main([str(home / "fruit.csv"), *call]) == 0


def test_data_of_one_name_have_folders_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    names = [str(default_folder(str(tmp_path / name))) for name in ("a", "a.csv", "a.jsonl")]
    assert names == ["clean-a", "clean-a-csv", "clean-a-jsonl"]


def test_a_draw_that_is_half_decided_is_trusted_up_to_its_first_gap(tmp_path: Path) -> None:
    items = load((np.random.default_rng(0).normal(size=(40, 2)), np.arange(40) % 2))
    drawn = pd.DataFrame({"row": [9, 4, 7, 2, 30]})
    file = tmp_path / "d.csv"
    file.write_text(
        "row,name,decision,label\n9,9,accept,\n4,4,reject,\n2,2,accept,\n11,11,accept,\n"
    )
    done = apply(items, decisions_of([file], items), drawn, tmp_path)
    assert done.trusted == (9,)
    assert done.trusted_cleaned == (8,)
    said = " ".join(done.notes)
    assert "2 of the 5 rows of verify_first.csv are undecided, the first in its line 4" in said
    assert "2 accepted row(s) were not drawn at random" not in said
    assert "1 accepted row(s) were not drawn at random" in said
    alone = apply(items, decisions_of([file], items), None, tmp_path)
    assert alone.trusted == ()
    assert "no trusted list" in alone.notes[0]
    with np.load(alone.copy, allow_pickle=False) as copy:
        assert len(copy["y"]) == 39


def test_decisions_that_contradict_or_cannot_be(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(40, 2))
    x[3] = np.nan
    items = load((x, np.arange(40) % 2))
    head = "row,name,decision,label\n"
    (tmp_path / "a.csv").write_text(head + "9,9,accept,\n")
    (tmp_path / "b.csv").write_text(head + "9,9,reject,\n")
    (tmp_path / "c.csv").write_text(head + "3,3,accept,\n")
    (tmp_path / "d.csv").write_text(head + "".join(f"{k},{k},reject,\n" for k in range(40)))
    a, b, c, d = (tmp_path / f"{name}.csv" for name in "abcd")
    assert len(decisions_of([a, a], items)) == 1
    with pytest.raises(UserError, match=r"decided as accept in .*a.csv and as reject in .*b.csv"):
        decisions_of([a, b], items)
    with pytest.raises(UserError, match=r"row 3 \(3\) was left out \(values that are not finite"):
        decisions_of([c], items)
    with pytest.raises(UserError, match="every row is rejected"):
        apply(items, decisions_of([d], items), None, tmp_path)


def test_images_are_copied_into_the_folders_of_their_new_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    home = tmp_path / "photos"
    for label in ("cat", "dog"):
        (home / label).mkdir(parents=True)
        for k in range(12):
            array = rng.integers(0, 80, (12, 12), np.uint8) + np.uint8(150 * (label == "dog"))
            Image.fromarray(array).save(home / label / f"{k:02d}.png")
    out = tmp_path / "out"
    call = [str(home), "--out", str(out), "--runs", "1", "--epochs", "2", "--no-mu"]
    assert main(call) == 0
    assert "photos: images, 24 images in 2 folders" in capsys.readouterr().err
    drawn = pd.read_csv(out / "verify_first.csv")
    assert drawn["name"].str.match(r"(cat|dog)/\d\d\.png").all()
    assert "data:image/png" in (out / "review.html").read_text()
    row, name = int(drawn["row"][0]), str(drawn["name"][0])
    other = "dog" if name.startswith("cat") else "cat"
    lines = [f"{row},{name},relabel,{other}"]
    lines += [f"{r},{n},accept," for r, n in zip(drawn["row"][1:], drawn["name"][1:], strict=True)]
    (tmp_path / "d.csv").write_text("row,name,decision,label\n" + "\n".join(lines))
    assert main([str(home), "--out", str(out), "--decisions", str(tmp_path / "d.csv")]) == 0
    copied = sorted(str(p.relative_to(out / "cleaned")) for p in (out / "cleaned").rglob("*.png"))
    moved = f"{other}/{Path(name).stem}--row{row}.png"
    assert moved in copied
    assert name not in copied
    assert (out / "cleaned" / moved).read_bytes() == (home / name).read_bytes()
    # positions in the copy are those that reading it gives
    again = load(out / "cleaned")
    names = dict(zip(again.rows.tolist(), again.names, strict=True))
    trusted = np.loadtxt(out / "trusted_cleaned.txt", dtype=int)
    assert sorted(names[k] for k in trusted) == sorted(drawn["name"][1:])
    assert main([str(home), "--out", str(home / "out")]) == 2
    assert "lies in the data" in capsys.readouterr().err


def test_probabilities_and_json_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [f"the {'good' if k % 2 else 'poor'} film number {k} was seen" for k in range(40)]
    data = tmp_path / "t.jsonl"
    data.write_text("".join(f'{{"text": "{t}", "label": {k % 2}}}\n' for k, t in enumerate(texts)))
    p = np.full((40, 2), 0.1)
    p[np.arange(40), np.arange(40) % 2] = 0.9
    p[7] = p[7, ::-1]
    np.save(tmp_path / "p.npy", p)
    out = tmp_path / "out"
    assert main([str(data), "--probabilities", str(tmp_path / "p.npy"), "--out", str(out)]) == 0
    assert "none: probabilities of 1 run(s) were given" in capsys.readouterr().out
    assert pd.read_csv(out / "ranking.csv")["row"][0] == 7
    assert not (out / "runs").exists()
    (tmp_path / "d.csv").write_text("row,name,decision,label\n7,7,relabel,0\n8,8,reject,\n")
    assert main([str(data), "--out", str(out), "--decisions", str(tmp_path / "d.csv")]) == 0
    copy = (out / "cleaned.jsonl").read_text().splitlines()
    assert len(copy) == 39
    assert copy[7] == f'{{"text": "{texts[7]}", "label": 0}}'
    assert copy[6] == data.read_text().splitlines()[6]


REFUSED = [
    ([], "name the data: fine-bench clean DATA"),
    (["t.csv", "--all"], "--all goes with --data"),
    (["t.csv", "--data", "t.csv"], "both t.csv and --data t.csv; name one of them"),
    (["--data", "t.csv"], "--data needs --trusted; without a trusted list type fine-bench clean"),
    (["--data", "t.csv", "--trusted", "x", "--check"], "--check does not go with --data"),
    (["--data", "t.csv", "--trusted", "x", "--model", "linear"], "which takes mlp or cnn"),
    (["t.csv", "--runs", "0"], "--runs 0 is out of range; type for instance 3"),
    (["t.csv", "--level", "2"], "--level 2.0 is out of range"),
    (["t.csv", "--lr", "-1"], "--lr -1.0 is out of range"),
    (["t.csv", "--epochs", "0"], "--epochs 0 is out of range"),
    (["t.csv", "--batch-size", "2"], "--batch-size 2 is out of range"),
    (["t.csv", "--seed", "-1"], "--seed -1 is out of range"),
    (["t.csv", "--trusted", "few.txt"], "At least 9 are needed"),
    (["t.csv", "--probabilities", "p.npy", "--check"], "--check trains, but --probabilities"),
    (["t.csv", "--probabilities", "p.npy", "--model", "mlp"], "exclude each other"),
    (["t.csv", "--probabilities", "p.npy", "--score", "mu"], "--score mu needs training"),
    (["t.csv", "--no-mu", "--score", "mu", "--epochs", "1"], "--score mu needs f-INE"),
    (
        ["t.csv", "--lr", "1e12", "--epochs", "3"],
        "training diverged with --lr 1e+12; use a smaller",
    ),
    (["t.csv", "--out", "few.txt"], "--out few.txt is a file; name a folder"),
    *(
        (["t.csv", "--decisions", "t.csv", *options], f"{options[0]} does not go with --decisions")
        for options in (["--trusted", "few.txt"], ["--check"], ["--model", "mlp"], ["--runs", "2"])
    ),
    (["t.csv", "--encoding", "hex"], "--encoding hex is no encoding of text"),
    (["t.csv", "--decisions", "t.csv"], "decisions have row, name, decision, label"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[case[-1] for case in REFUSED])
def test_refusals(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    rows(60)[0].to_csv("t.csv", index=False)
    Path("few.txt").write_text("0\n1\n")
    assert main(arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.glob("clean-*/ranking.csv"))


def test_the_function_does_what_the_command_does(home: Path) -> None:
    seen = []
    table, _ = rows()
    found = fine_bench.clean(
        table, runs=2, epochs=4, lr=0.2, level=0.4, read=lambda items: seen.append(items.kind),
    )  # fmt: skip
    assert seen == ["table"]
    ranking = pd.read_csv(home / "out" / "ranking.csv")
    assert found.table["row"].tolist() == ranking["row"].tolist()
    assert found.table["score"].to_numpy() == pytest.approx(ranking["score"].to_numpy(), rel=1e-5)
    assert found.verify is not None
    with pytest.raises(UserError, match="--score best is unknown"):
        fine_bench.clean(table, score="best")  # type: ignore[arg-type]


def test_check_says_whether_it_helps(
    home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shutil.copytree(home / "out" / "runs", tmp_path / "out" / "runs")
    call = [str(home / "fruit.csv"), "--runs", "2", "--epochs", "4", "--lr", "0.2", "--level",
            "0.4", "--out", str(tmp_path / "out"), "--no-page", "--check"]  # fmt: skip
    assert main(call) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "suspected rows on average" in said
    assert "5 seeds" in said
