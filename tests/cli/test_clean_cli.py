"""``fine-bench clean`` on the digits with planted flips."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from fine_bench.commands.clean import main
from fine_bench.data.digits import digits_mislabel
from fine_bench.data.task import TaskData
from fine_bench.metrics.error_rate import flag, repeated
from fine_bench.runner.clean.data_files import LabelledData, read, standardise
from fine_bench.runner.clean.scores import Scored, explain, score, suggestions, warnings_of


@pytest.fixture(scope="module")
def digits() -> TaskData:
    return digits_mislabel(seed=0)


@pytest.fixture(scope="module")
def bad(digits: TaskData) -> np.ndarray:
    return digits.truth.is_bad.numpy()


@pytest.fixture(scope="module")
def folder(digits: TaskData, bad: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``digits.npz`` with images, ``table.csv`` of 300 rows, and which rows are trusted."""
    home = tmp_path_factory.mktemp("clean")
    images, labels = digits.x[:, 0].numpy(), digits.y.numpy()
    np.savez(home / "digits.npz", x=images, y=labels)
    rng = np.random.default_rng(0)
    rows = rng.choice(np.flatnonzero(~bad), 200, replace=False)
    (home / "trusted.txt").write_text("\n".join(map(str, rows)))
    table = pd.DataFrame(digits.x[:300].flatten(1).numpy()).add_prefix("pixel")
    table["species"] = [f"digit {k}" for k in labels[:300]]
    table["verified"] = ~bad[:300] & (rng.random(300) < 0.4)
    table.to_csv(home / "table.csv", index=False)
    return home


def run(folder: Path, *arguments: str, data: str = "digits.npz", trusted: str = "") -> int:
    return main(
        [
            *("--data", str(folder / data)),
            *("--trusted", trusted or str(folder / "trusted.txt")),
            *arguments,
        ]
    )


def test_a_user_finds_flipped_labels(
    folder: Path,
    digits: TaskData,
    bad: np.ndarray,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "flagged.csv"
    assert run(folder, "--out", str(out), "--epochs", "15") == 0
    shown = " ".join(capsys.readouterr().out.split())
    table = pd.read_csv(out)
    assert list(table.columns) == [
        "index", "given_label", "score", "p_value", "adjusted_p", "suggested_label"
    ]  # fmt: skip
    assert f"flagged {len(table)} of 1147" in shown
    assert "trusted 200 rows; 1147 to be judged" in shown
    assert "at most 10 % are right after all" in shown
    assert f"written: {out}, the flagged rows" in shown
    index = table["index"].to_numpy()
    assert len(table) > 150
    assert bad[index].mean() > 0.85  # one draw; the promise is about the mean
    assert (np.diff(table["p_value"]) >= 0).all()
    assert (table["adjusted_p"] <= 0.1).all()
    assert (table["given_label"] == digits.y.numpy()[index]).all()
    assert (table["suggested_label"] != table["given_label"]).all()
    flips = table[bad[index]]
    right = digits.clean_y.numpy()[flips["index"]] == flips["suggested_label"]
    assert right.mean() > 0.8
    trusted = np.loadtxt(folder / "trusted.txt", dtype=int)
    assert not set(index) & set(trusted)


def test_the_rate_holds_and_the_seed_decides(digits: TaskData, bad: np.ndarray) -> None:
    def scored(method: str, seed: int) -> Scored:
        return score(digits.x, digits.y, 10, method=method, epochs=10, seed=seed)

    for method in ("fine", "mean_loss", "aum"):
        found = scored(method, 0)
        (rate,) = repeated({0: found.suspicion}, bad, n_trusted=200, levels=[0.1], n_draws=40)
        # on average at most 0.1 · m_good/m = 0.077; 0.1 leaves room for 40 draws
        assert rate.false_share.mean <= 0.1
        assert rate.false_share.lower <= 0.077
        assert rate.power > 0.5
    again, other = scored("aum", 0), scored("aum", 1)
    assert (again.suspicion == found.suspicion).all()
    assert (again.probabilities == found.probabilities).all()
    assert (other.suspicion != found.suspicion).any()
    assert found.probabilities.sum(axis=1) == pytest.approx(1.0)


def test_a_csv_with_a_column_of_verified_rows(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--label", "species", "--method", "mean_loss", "--epochs", "8", "--all"]
    paths = [tmp_path / "a.csv", tmp_path / "b.csv"]
    for path in paths:
        assert (
            run(folder, *arguments, "--out", str(path), data="table.csv", trusted="verified") == 0
        )
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert "every row" in " ".join(capsys.readouterr().out.split())
    table, given = pd.read_csv(paths[0]), pd.read_csv(folder / "table.csv")
    assert sorted(table["index"]) == list(range(300))
    order = table["index"]
    assert (table["given_label"].to_numpy() == given["species"][order].to_numpy()).all()
    assert (table["trusted"].to_numpy() == given["verified"][order].to_numpy()).all()
    assert table["p_value"].isna().to_numpy().tolist() == table["trusted"].tolist()
    assert (table["flagged"] == (table["adjusted_p"] <= 0.1)).all()
    # the most suspicious first: among equal p-values by score
    first = table[~table["trusted"]]
    assert (np.lexsort((-first["score"], first["p_value"])) == np.arange(len(first))).all()


def test_images_and_a_convolutional_network(folder: Path, digits: TaskData, tmp_path: Path) -> None:
    np.savez(tmp_path / "few.npz", x=(digits.x[:120, 0].numpy() * 50 + 90).astype(np.uint8),
             y=digits.y[:120].numpy())  # fmt: skip
    (tmp_path / "rows.csv").write_text("row\n" + "\n".join(map(str, range(40))))
    arguments = ["--model", "cnn", "--epochs", "2", "--out", str(tmp_path / "o.csv"), "--all"]
    assert run(tmp_path, *arguments, data="few.npz", trusted=str(tmp_path / "rows.csv")) == 0
    table = pd.read_csv(tmp_path / "o.csv")
    assert sorted(table["index"][table["trusted"]]) == list(range(40))
    assert run(folder, "--model", "cnn", "--label", "species", data="table.csv",
               trusted="verified") == 2  # fmt: skip


def test_nothing_flagged_says_what_it_means(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "noise.npz", x=rng.normal(size=(200, 4)), y=np.arange(200) % 2)
    rows = tmp_path / "rows.txt"
    rows.write_text("\n".join(map(str, range(30))))
    out = tmp_path / "none.csv"
    arguments = ["--method", "mean_loss", "--epochs", "2", "--out", str(out)]
    assert run(tmp_path, *arguments, data="noise.npz", trusted=str(rows)) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Nothing is flagged at level 0.1" in shown
    assert "does not show that the labels are right" in shown
    # 30 trusted of 200: none or at least 170/(0.1 · 31) = 54.8; one of 170 needs 1699
    assert "either none or at least 55 of 170 rows can be flagged" in shown
    assert "as few as 1, 1699 trusted rows are needed" in shown
    assert len(pd.read_csv(out)) == 0
    assert pd.read_csv(out).columns[0] == "index"


def test_notes_on_the_data() -> None:
    y = torch.tensor([0, 0, 0, 1, 1, 1, 2])
    trusted = np.arange(7) < 2
    data = LabelledData(torch.zeros(7, 1), y, ["a", "b", "c"], trusted)
    p = np.tile([0.6, 0.3, 0.1], (7, 1))
    p[1] = [0.2, 0.5, 0.3]
    scored = Scored(np.arange(7.0), p, 0.5)
    single, odd = warnings_of(data, scored)
    assert single.startswith("1 label(s) occur only once (c)")
    assert odd.startswith("1 of 2 trusted rows look wrong to the model, the first 1.")
    assert suggestions(p, y.numpy()).tolist() == [1, 1, 1, 0, 0, 0, 0]
    enough = flag(np.r_[np.zeros(900), np.ones(100)], np.arange(800), 0.2)
    assert len(explain(enough)) == 1  # even a few could have been found


def test_standardise() -> None:
    x = np.array([[1.0, 7.0], [3.0, 7.0]])
    assert standardise(x).tolist() == [[-1.0, 0.0], [1.0, 0.0]]
    images = np.arange(8, dtype=np.uint8).reshape(2, 2, 2)
    whole = standardise(images)
    assert float(whole.double().mean()) == pytest.approx(0.0, abs=1e-7)
    assert float(whole.double().std(correction=0)) == pytest.approx(1.0)
    assert whole[0, 0, 0] < whole[0, 0, 1]


# -------------------------------------------------------------------------------- what is refused


def npz(**arrays: object) -> Callable[[Path], None]:
    return lambda path: np.savez(path, **arrays)  # type: ignore[arg-type]


def text(content: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(content) and None


X, Y = np.zeros((30, 2)), np.arange(30) % 3
INF = np.where(np.arange(60).reshape(30, 2) == 9, np.inf, 0.0)
LABEL = ["--label", "k"]
ROWS = "\n".join(map(str, range(20)))
HEAD = "a,k,t\n"
BODY = "".join(f"{i},{i % 3},{i % 2}\n" for i in range(30))


CASES: list[tuple[str, Callable[[Path], None] | None, str | None, list[str], str]] = [
    ("d.npz", npz(x=X, z=Y), ROWS, [], "holds the arrays x, z, but x and y are needed"),
    ("d.npz", npz(x=X, y=Y.astype(float)), ROWS, [], "must be whole numbers of shape (n,)"),
    ("d.npz", npz(x=X[:, 0], y=Y), ROWS, [], "a single feature has shape (n, 1)"),
    ("d.npz", npz(x=X, y=Y[:29]), ROWS, [], "has 30 rows, y 29"),
    ("d.npz", npz(x=INF, y=Y), ROWS, [], "not finite, the first at 4"),
    ("d.npz", npz(x=np.array([{}] * 30), y=Y), ROWS, [], "without objects among them"),
    ("d.npz", text("no archive"), ROWS, [], "cannot be read as plain arrays"),
    ("d.npz", npz(x=X, y=Y * 0), ROWS, [], "all rows of"),
    ("d.npz", npz(x=X, y=np.arange(30)), ROWS, [], "30 different labels in 30 rows"),
    ("d.npz", npz(x=X[:1], y=Y[:1]), "0", [], "holds 1 row(s)"),
    ("d.npz", npz(x=X, y=Y), ROWS, ["--label", "y"], "leave --label out"),
    ("d.npz", npz(x=X, y=Y), "0\n1\n2", [], "At least 9 are needed"),
    ("d.npz", npz(x=X, y=Y), "0\n1\n1", [], "position 1 more than once"),
    ("d.npz", npz(x=X, y=Y), "0\n31", [], "from 0 to 31, but there are 30"),
    ("d.npz", npz(x=X, y=Y), "0.5\n1", [], "must hold row positions, whole numbers"),
    ("d.npz", npz(x=X, y=Y), "", [], "no example is trusted"),
    ("d.npz", npz(x=X, y=Y), None, [], "is not a file, and"),
    ("d.npz", npz(x=X, y=Y), ROWS, ["--level", "1.5"], "--level 1.5 is out of range"),
    ("d.npz", npz(x=X, y=Y), ROWS, ["--batch-size", "2"], "--batch-size 2 is out of range"),
    ("d.npz", npz(x=X, y=Y), ROWS, ["--out", "d.npz"], "would replace an input"),
    ("d.npz", npz(x=X, y=Y), ROWS, ["--model", "cnn"], "--model cnn needs images"),
    ("d.npz", None, ROWS, [], "d.npz is not a file; check the path"),
    ("d.txt", text("x"), ROWS, [], "must be a .npz or .csv file"),
    ("d.csv", text("a,k\n" * 3), ROWS, [], "Add --label NAME, one of a, k"),
    ("d.csv", text("a,kind,t\n" + BODY), ROWS, ["--label", "kin"], "did you mean 'kind'?"),
    ("d.csv", text(HEAD + BODY), "COLUMN k", ["--label", "t"], "everywhere, got '2' in row 2"),
    ("d.csv", text(HEAD + BODY + ",1,1\n"), ROWS, LABEL, "row 30 (rows count from 0), column"),
    ("d.csv", text(HEAD + BODY + "1,,1\n"), ROWS, LABEL, "without a label, the first at 30"),
    ("d.csv", text(HEAD + BODY + "u,1,1\n"), ROWS, LABEL, "the column(s) a of"),
    ("d.csv", text("k,t\n" + "1,1\n0,0\n" * 9), "COLUMN t", LABEL, "besides k, t"),
    ("d.csv", text(HEAD + "1,1,1\n"), "COLUMN t", LABEL, "holds 1 row(s)"),
    ("d.csv", text(""), ROWS, LABEL, "cannot be read as a csv table"),
    ("d.csv", text(HEAD + BODY), "COLUMN rows.txt", LABEL, "no column of"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "write", "trusted", "arguments", "message"), CASES, ids=[case[-1] for case in CASES]
)
def test_refusals(
    name: str,
    write: Callable[[Path], None] | None,
    trusted: str | None,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if write is not None:
        write(tmp_path / name)
    rows = "rows.txt"
    if trusted is not None and trusted.startswith("COLUMN "):
        rows = trusted.removeprefix("COLUMN ")
    elif trusted is not None:
        (tmp_path / rows).write_text(trusted)
    assert main(["--data", name, "--trusted", rows, "--epochs", "1", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "flagged.csv").exists()


def test_a_column_and_a_file_of_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("d.csv").write_text(HEAD + BODY)
    assert read(Path("d.csv"), "t", "k").trusted.sum() == 15
    Path("t").write_text(ROWS)
    with pytest.raises(ValueError, match="both a column"):
        read(Path("d.csv"), "t", "k")
    assert read(Path("d.csv"), "./t", "k").trusted.sum() == 20


def test_a_step_size_at_which_training_diverges(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--lr", "1e9", "--epochs", "3", "--method", "mean_loss"]
    assert run(folder, *arguments, "--out", str(tmp_path / "o.csv")) == 2
    assert "training diverged with --lr 1e+09; use a smaller step" in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "fine-bench clean --data digits.npz --trusted checked.txt" in shown
    for default in ("(default: 0.1)", "default: 30", "(default: flagged.csv)", "(default: 0.05)"):
        assert default in shown
