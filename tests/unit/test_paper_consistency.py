"""benchmarks/paper_consistency.py and natural_errors.py: numbers by hand, from made-up runs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from fine_bench.store.digest import digest
from fine_bench.store.records import RecordStore
from fine_bench.store.scores import truth_extras
from fine_bench.types import GroundTruth, InfluenceScores, Target
from support.benchmarks import BENCHMARKS, loaded
from support.records import make_record

N = 100
BAD = torch.arange(N) % 5 == 0


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return loaded("paper_consistency")


@pytest.fixture
def natural(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return loaded("natural_errors")


def noisy(seed: int, shape: int = N) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(1, shape, generator=draw) + 1.5 * BAD[:shape]


def add(
    store: RecordStore, estimator: str, seed: int, values: torch.Tensor, *,
    trainer: dict[str, Any] | None = None, task: str = "paper_consistency", model: str = "mlp",
    truth: GroundTruth | None = None, target: Target = "self", weights: str | None = None,
    metrics: dict[str, float] | None = None, **changes: Any,
) -> None:  # fmt: skip
    fixed = {"init_seed": None, "order_seed": None} | (trainer or {})
    config = {"trainer": fixed, "model": {"name": model}, "task": {}, "query_weighting": weights}
    record = make_record(
        task=task, estimator=estimator, seed=seed, setting=digest([fixed, model])[:16],
        config=config, target=target, estimator_hash=digest([estimator, weights]),
        **({} if metrics is None else {"metrics": metrics}),
    )  # fmt: skip
    extras = {**truth_extras(truth or GroundTruth(BAD, "x")), **changes.pop("extras", {})}
    store.save(record, InfluenceScores(values, estimator, target, extras=extras, **changes))


def sets(runs: list[torch.Tensor], k: int) -> float:
    tops = [set(torch.argsort(-run[0])[:k].tolist()) for run in runs]
    return float(np.mean([len(a & b) / len(a | b) for a, b in combinations(tops, 2)]))


def test_jaccard_by_source_share_and_estimate(script: ModuleType, tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    runs = {source: [noisy(10 * i + s) for s in range(3)] for i, source in enumerate("obn")}
    for source, name in (("o", "init_seed"), ("n", "order_seed"), ("b", "")):
        trainer = {name: 0} if name else {}
        for seed, run in enumerate(runs[source]):
            add(store, "tracin", seed, run, trainer=trainer)
    add(store, "tracin", 9, noisy(9), trainer={"init_seed": 0, "order_seed": 0})
    add(store, "tracin", 0, noisy(9), task="another")
    add(store, "fine", 0, noisy(9))  # a single run says nothing
    some = torch.arange(0, N, 2)
    extras = {}
    for seed in range(2):
        extras[seed] = {"moment": noisy(50 + seed)[0, some], "rank": torch.full((50,), 1.0)}
        add(
            store, "fine_paper", seed, noisy(70 + seed), watched=some, extras=extras[seed],
            n_observations=torch.full((N,), 39), std_error=torch.ones(1, N),
        )  # fmt: skip
    lines = script.measure(store)
    at = {(line.row, line.source): line for line in lines}
    assert {key for key in at if key[0] == "tracin"} == {
        ("tracin", source) for source in ("order", "initialisation", "both")
    }
    for source, key in (("order", "o"), ("initialisation", "n"), ("both", "b")):
        line = at["tracin", source]
        assert line.n == 3
        for share, k in zip(script.SHARES, (1, 5, 10, 20), strict=True):
            assert line.jaccard[share].mean == pytest.approx(sets(runs[key], k))
    paper = at["fine_paper", "both"]
    watched = [noisy(70 + seed)[:, some] for seed in range(2)]
    assert paper.jaccard[0.2].mean == pytest.approx(sets(watched, 10))
    assert paper.method == "the paper's estimator, split samples, 39 samples, 50 examples"
    moments = [extras[seed]["moment"][None] for seed in range(2)]
    assert at["fine_paper/moment", "both"].jaccard[0.2].mean == pytest.approx(sets(moments, 10))
    assert np.isnan(at["fine_paper/rank", "both"].jaccard[0.2].mean)  # constant: not agreement
    assert ("fine", "both") not in at

    text = script.markdown(lines)
    value = at["tracin", "order"].jaccard[0.2]
    row = next(x for x in text.splitlines() if x.startswith("| TracIn | training"))
    assert f"{value.mean:.3f} [{value.lower:.3f}, {value.upper:.3f}]" in row
    assert "| the paper's estimator, moments, 39 samples, 50 examples | training | 0.938 |" in text
    assert "not run" in text
    frame = script.frame(lines)
    assert len(frame) == len(lines) * len(script.SHARES)


def test_queries_are_read_by_their_weights(script: ModuleType, tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    runs = {
        weights: [-noisy(i + seed) for seed in range(2)] for i, weights in ((0, None), (5, "noise"))
    }
    for weights, of in runs.items():
        for seed, run in enumerate(of):
            add(store, "tracin", seed, run, target="validation", weights=weights)
            add(store, "fine", seed, run, target="queries", weights=weights)  # no reading
    add(store, "tracin", 0, noisy(1), weights="noise")
    add(store, "tracin", 1, noisy(2), weights="noise")  # self has no queries to weight
    at = {line.target: line for line in script.measure(store)}
    assert set(at) == {"self", "validation", "validation/noise"}
    for reading, weights in (("validation", None), ("validation/noise", "noise")):
        harmful = [-run for run in runs[weights]]
        assert at[reading].jaccard[0.2].mean == pytest.approx(sets(harmful, 20))
    text = script.markdown(script.ordered(list(at.values())))
    assert "## Influence on the test queries, summed: Jaccard at 20 %" in text
    assert "## Influence on the test queries, weighted by noise, both differ: Jaccard at k" in text


def test_cells_without_scores_are_kept_from_the_table(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published, later = tmp_path / "published", tmp_path / "later"
    store = RecordStore(published)
    for seed in range(2):
        add(store, "tracin", seed, noisy(seed))
        add(store, "trak", seed, noisy(10 + seed))
    assert script.main(["--results", str(published)]) == 0
    assert "kept" not in capsys.readouterr().out
    before = script.measure(store)
    table = published / "paper_consistency.csv"
    assert script.kept(table, before) == []
    assert script.kept(tmp_path / "absent.csv", before) == []

    store = RecordStore(later)
    for seed in range(3):
        add(store, "tracin", seed, noisy(20 + seed))
    (later / table.name).write_bytes(table.read_bytes())
    assert script.main(["--results", str(later)]) == 0
    assert "1 cells kept" in capsys.readouterr().out
    at = {line.row: line for line in script.kept(later / table.name, [])}
    old, new = {x.row: x for x in before}, {x.row: x for x in script.measure(store)}
    assert (at["tracin"].n, at["trak"].n) == (3, 2)
    for row, known in (("tracin", new["tracin"]), ("trak", old["trak"])):
        assert at[row].precision.mean == pytest.approx(known.precision.mean, abs=1e-4)
        for share in script.SHARES:
            assert at[row].jaccard[share] == pytest.approx(
                known.jaccard[share], abs=1e-4, nan_ok=True
            )
    text = (later / "paper_consistency.md").read_text()
    assert (
        f"| {script.shown(old['trak'].jaccard[0.2])} | {old['trak'].precision.mean:.3f} |" in text
    )


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda text: text.replace(",note,", ",remark,"), "cannot be read as a table"),
        (lambda text: text.replace(",self,", ",selves,"), "holds selves"),
        (lambda text: text.replace(",0.2000,", ",0.3000,"), "other shares than 0.01"),
    ],
)
def test_a_strange_table_is_refused(
    script: ModuleType, tmp_path: Path, spoil: Callable[[str], str], said: str
) -> None:
    store = RecordStore(tmp_path)
    for seed in range(2):
        add(store, "tracin", seed, noisy(seed))
    script.main(["--results", str(tmp_path)])
    table = tmp_path / "paper_consistency.csv"
    table.write_text(spoil(table.read_text()))
    with pytest.raises(SystemExit, match=said):
        script.main(["--results", str(tmp_path)])


def test_it_writes_a_table_and_a_figure(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["--results", str(tmp_path)]) == 2
    assert "+experiment=paper_consistency -m seed=0,1" in capsys.readouterr().err
    store = RecordStore(tmp_path)
    for seed in range(2):
        add(store, "grad_dot", seed, noisy(seed))
    assert script.main(["--results", str(tmp_path)]) == 0
    assert (tmp_path / "paper_consistency.md").read_text().startswith("# Consistency as the")
    assert (tmp_path / "figures" / "paper_consistency--self.png").stat().st_size > 5000


def test_two_settings_of_one_row_are_not_mixed(script: ModuleType, tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    for model in ("mlp", "cnn"):
        add(store, "grad_dot", 0, noisy(0), model=model, trainer={"init_seed": 0 if model else 1})
    record = make_record(
        task="paper_consistency", estimator="grad_dot", seed=0, setting="another",
        config={"trainer": {"init_seed": 7, "order_seed": None}},
    )  # fmt: skip
    store.save(record, InfluenceScores(noisy(3), "grad_dot", "self"))
    with pytest.raises(SystemExit, match=r"grad_dot has several settings .* seed 0 .* --results"):
        script.measure(store)


def test_runs_of_other_lengths(script: ModuleType, tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    for seed, n in ((0, N), (1, 50)):
        add(store, "tracin", seed, noisy(seed, n), truth=GroundTruth(BAD[:n], "x"))
    with pytest.raises(SystemExit, match="score different numbers of examples; run it again"):
        script.measure(store)


# --- natural errors

KNOWN = torch.arange(N) >= 40
REVIEWED = KNOWN & (torch.arange(N) % 2 == 0)
WRONG = REVIEWED & (torch.arange(N) % 7 == 0)
TRUTH = GroundTruth(WRONG, "natural label error", KNOWN, REVIEWED)


def precision(values: torch.Tensor, bad: torch.Tensor) -> float:
    hits = np.flatnonzero(bad[torch.argsort(-values)].numpy())
    return float(np.mean([(i + 1) / (place + 1) for i, place in enumerate(hits)]))


def add_natural(
    store: RecordStore, estimator: str, seed: int, values: torch.Tensor, model: str = "mlp"
) -> None:
    metrics = {
        "average_precision": precision(values[0, KNOWN], WRONG[KNOWN]),
        "reviewed_average_precision": precision(values[0, REVIEWED], WRONG[REVIEWED]),
    }
    add(
        store, estimator, seed, values, task="mnist_natural", truth=TRUTH, model=model,
        metrics=metrics,
    )  # fmt: skip


def test_natural_errors_by_hand(natural: ModuleType, tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    runs = {seed: noisy(seed) + 2.0 * WRONG for seed in range(3)}
    for seed, run in runs.items():
        add_natural(store, "fine", seed, run)
    add_natural(store, "aum", 0, noisy(8), model="cnn")
    add(store, "aum", 0, noisy(8), task="another", truth=TRUTH)
    add(store, "old", 0, noisy(8), task="mnist_natural")  # its truth knows of no reviews
    lines = natural.measure(store, None)
    assert [(x.model, x.row, x.n) for x in lines] == [("cnn", "aum", 1), ("mlp", "fine", 3)]
    found = lines[1]
    expected = [precision(run[0, KNOWN], WRONG[KNOWN]) for run in runs.values()]
    assert found.known.mean == pytest.approx(np.mean(expected))
    expected = [precision(run[0, REVIEWED], WRONG[REVIEWED]) for run in runs.values()]
    assert found.reviewed.mean == pytest.approx(np.mean(expected))
    k = int(WRONG.sum())
    bad = set(WRONG[REVIEWED].nonzero()[:, 0].tolist())
    tops = [set(torch.argsort(-run[0, REVIEWED])[:k].tolist()) for run in runs.values()]
    assert found.recall == pytest.approx(np.mean([len(top & bad) / k for top in tops]))
    assert found.stable == pytest.approx(len(set.intersection(*tops) & bad) / k)
    assert 0 < found.stable < found.recall
    assert np.isnan(lines[0].stable)
    row = natural.markdown(lines).splitlines()[-1]
    assert row.startswith(f"| mlp | fine | 3 | {found.reviewed.mean:.3f} [")
    assert row.endswith(f"| {found.recall:.2f} | {found.stable:.2f} |")
    assert natural.frame(lines).reviewed_average_precision[1] == found.reviewed.mean


def test_the_studys_own_probabilities(
    natural: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    store = RecordStore(tmp_path / "r")
    add_natural(store, "fine", 0, noisy(0))
    n = int(KNOWN.sum())
    labels = np.arange(n) % 10
    monkeypatch.setattr(natural, "given_labels", lambda: labels)
    p = np.random.default_rng(0).dirichlet(np.ones(10), n)
    p[0, labels[0]] = 0.0
    path = tmp_path / "p.npy"
    np.save(path, p)
    outside = natural.measure(store, path)[-1]
    own = torch.from_numpy(-p[np.arange(n), labels])
    assert (outside.model, outside.n) == ("outside", 1)
    assert outside.known.mean == pytest.approx(precision(own, WRONG[KNOWN]))
    np.save(path, p[:-1])
    with pytest.raises(SystemExit, match=r"shape \(59, 10\), expected \(60, 10\).*task\.n_train=n"):
        natural.measure(store, path)

    monkeypatch.delenv("FINE_BENCH_DATA", raising=False)
    assert natural.at_hand() is None
    (tmp_path / "label_errors").mkdir()
    path.rename(tmp_path / natural.PROBABILITIES)
    monkeypatch.setenv("FINE_BENCH_DATA", str(tmp_path))
    assert natural.at_hand() == tmp_path / natural.PROBABILITIES
    assert natural.main(["--results", str(tmp_path), "--probabilities", "nowhere.npy"]) == 2
    assert "nowhere.npy is no file" in capsys.readouterr().err
    assert natural.main(["--results", str(tmp_path / "empty")]) == 2
    assert "+experiment=mnist_natural -m seed=0,1" in capsys.readouterr().err
    np.save(tmp_path / natural.PROBABILITIES, p)
    assert natural.main(["--results", str(tmp_path / "r")]) == 0
    assert "| outside | cross-validated prob" in (tmp_path / "r" / "natural_errors.md").read_text()


def test_natural_rows_without_scores_are_kept(
    natural: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, later = tmp_path / "first", tmp_path / "later"
    store = RecordStore(first)
    for seed in range(2):
        add_natural(store, "fine", seed, noisy(seed))
        add_natural(store, "aum", seed, noisy(5 + seed))
    assert natural.main(["--results", str(first)]) == 0
    assert "kept" not in capsys.readouterr().out
    known = {x.row: x for x in natural.measure(store, None)}
    table = first / "natural_errors.csv"

    store = RecordStore(later)
    for seed in range(3):  # three records, of which one has its scores
        add_natural(store, "fine", seed, noisy(9 + seed))
    for path in (later / "scores").rglob("fine*seed[12]*.safetensors"):
        path.unlink()
    add_natural(store, "fine", 0, noisy(9), model="cnn")
    (later / table.name).write_bytes(table.read_bytes())
    assert natural.main(["--results", str(later)]) == 0
    assert "recalls of 2 rows kept" in capsys.readouterr().out
    lines = natural.earlier(later / table.name)
    assert (lines[0].model, lines[0].row, lines[0].n, lines[0].scored) == ("cnn", "fine", 1, 1)
    at = {x.row: x for x in lines if x.model == "mlp"}
    assert {(x.row, x.n, x.scored) for x in at.values()} == {("fine", 3, 2), ("aum", 2, 2)}
    expected = [precision(noisy(9 + s)[0, REVIEWED], WRONG[REVIEWED]) for s in range(3)]
    assert at["fine"].reviewed.mean == pytest.approx(np.mean(expected), abs=1e-4)
    assert at["aum"].reviewed == pytest.approx(known["aum"].reviewed, abs=1e-4, nan_ok=True)
    assert at["aum"].known == pytest.approx(known["aum"].known, abs=1e-4, nan_ok=True)
    for row, x in at.items():  # of two runs, before
        assert (x.recall, x.stable) == pytest.approx(
            (known[row].recall, known[row].stable), abs=1e-4
        )
    assert f"| {at['fine'].stable:.2f} (2) |" in (later / "natural_errors.md").read_text()
    table.write_text("model,row\n")
    with pytest.raises(SystemExit, match="move it away"):
        natural.earlier(table)
