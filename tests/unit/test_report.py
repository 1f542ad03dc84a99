"""The report: one page from files alone, whole, escaped, and the same bytes every time."""

from __future__ import annotations

import base64
import gzip
import html as html_module
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fine_bench.commands.report import main
from fine_bench.data.cifar import CLASS_NAMES
from fine_bench.errors import ConfigError
from fine_bench.leaderboard.build import build
from fine_bench.leaderboard.tables import Leaderboard
from fine_bench.metrics.intervals import mean_interval
from fine_bench.metrics.registry import columns
from fine_bench.report.figures.style import canvas
from fine_bench.report.figures.tables import TableResults, table_results, together
from fine_bench.report.figures.titles import caption_of, titles_of
from fine_bench.report.html.build import _drawing
from fine_bench.report.html.examples import Gallery, between, galleries_block
from fine_bench.report.html.figures import PageFigure, figure_block, packed, size_of, slim
from fine_bench.report.html.gallery import (
    GroupLine,
    ShownExample,
    group_lines,
    largest_examples,
    rows_shown,
)
from fine_bench.report.html.headlines import Headline, headlines
from fine_bench.report.html.images import PngEncoder, TaskExamples, task_examples
from fine_bench.report.html.markup import Safe, number, p_value, slug, tag, text
from fine_bench.report.html.page import _groups, page
from fine_bench.report.html.tables import breaking, target_tables
from fine_bench.retraining.truth_files import save
from fine_bench.store.records import RecordStore
from fine_bench.types import End
from support.report_results import (
    BAD,
    DATA,
    EVIL,
    TASK,
    N,
    fill,
    paper_scores,
    record_of,
    scores_of,
    truth,
)


@pytest.fixture
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes seconds; most tests look at something else."""
    monkeypatch.setattr("fine_bench.report.html.build.draw", lambda *_: iter(()))


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with a ground truth and its report; its tests only read it."""
    root = tmp_path_factory.mktemp("report") / "results"
    fill(root)
    save(truth(), root / "ground_truth")
    assert main(["--results", str(root), "--examples", "6"]) == 0
    return root


@pytest.fixture(scope="module")
def html(complete: Path) -> str:
    return (complete / "report.html").read_text()


def results_of(root: Path) -> TableResults:
    store = RecordStore(root)
    board = build(store)
    (results,) = table_results(store, board, store.scan())
    return results


class Tree(HTMLParser):
    """Every element that is opened must be closed; what the page refers to is kept."""

    VOID = frozenset({"meta", "link", "img", "wbr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag


def tree(html: str) -> Tree:
    parsed = Tree()
    parsed.feed(html)
    assert parsed.open == []
    return parsed


# ---------------------------------------------------------------------------------------- page


def test_the_page_is_well_formed_and_asks_for_nothing(html: str) -> None:
    parsed = tree(html)
    for name, attributes in parsed.tags:
        for key in ("src", "href"):
            address = attributes.get(key)
            if address is not None and name != "svg":
                assert address.startswith(("data:", "#")), (name, address)
    (policy,) = [a["content"] for t, a in parsed.tags if a.get("http-equiv")]
    assert policy is not None
    assert "default-src 'none'" in policy
    ids = [a["id"] for _, a in parsed.tags if "id" in a]
    assert len(ids) == len(set(ids))
    links = {a["href"][1:] for t, a in parsed.tags if t == "a" and a["href"]}  # type: ignore[index]
    assert links <= set(ids)
    # every image says what it shows
    assert all(a.get("alt") for t, a in parsed.tags if t == "img")


def test_tables_can_be_sorted_and_read_aloud(html: str) -> None:
    parsed = tree(html)
    heads = [a for t, a in parsed.tags if t == "th" and "aria-sort" in a]
    assert heads
    assert all(a["scope"] == "col" for a in heads)
    # the column by which a table is sorted is marked: AUROC in both
    assert [a["aria-sort"] for a in heads if a["aria-sort"] != "none"] == ["descending"] * 2
    assert {a["data-first"] for a in heads} == {"ascending", "descending"}
    regions = [a for t, a in parsed.tags if t == "div" and a.get("role") == "region"]
    assert all(a.get("tabindex") == "0" for a in regions)


def test_numbers_intervals_best_and_ties(complete: Path) -> None:
    board = build(RecordStore(complete))
    (table,) = board.tables
    shown = target_tables(table, board.columns)
    (fine,) = [r for r in table.rows if (r.estimator, r.target) == ("fine", "self")]
    stat = fine.stats["fidelity"]
    low, high = (f"{x:.3f}".removeprefix("0") for x in (stat.lower, stat.upper))
    cell = (
        f'<td data-value="{stat.mean!r}"><span class="mean best">{stat.mean:.3f}</span>'
        f'<span class="ci">{low}–{high}</span></td>'
    )
    assert cell in shown
    assert '<td data-value="" class="none">undefined</td>' in shown
    tied = replace(fine, ties=frozenset({"auroc"}), dirty=True)
    shown = target_tables(replace(table, rows=(tied,)), board.columns)
    assert shown.count('<abbr title="tie with the best">=</abbr>') == 1
    assert "made by code with uncommitted changes" in shown


@pytest.mark.usefixtures("_no_figures")
def test_missing_seeds_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = fill(tmp_path, seeds=(0, 1))
    extra = replace(
        record_of("tracin", "self", 2, scores_of("tracin", "self", 2)),
        status="failed", reason=f"the loss is NaN {EVIL}", scores_sha256="", metrics={}, cost={},
    )  # fmt: skip
    store.save(extra, None)
    assert main(["--results", str(tmp_path), "--examples", "0"]) == 1
    page = (tmp_path / "report.html").read_text()
    assert "failed: tracin · self · seed 2: the loss is NaN &lt;img" in page
    assert "missing: constant, fine, fine_paper · self · seed 2: other rows have it" in page
    assert EVIL not in page
    capsys.readouterr()


@pytest.mark.usefixtures("_no_figures")
def test_what_records_say_is_escaped(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    scores = replace(scores_of("fine", "self", 0), method=EVIL)
    config = {"estimator": {"_target_": EVIL}, "model": {"name": EVIL}, "task": {"_target_": EVIL}}
    record = replace(
        record_of("fine", "self", 0, scores),
        task=EVIL, estimator=EVIL, config=config, environment={"cpu": EVIL, "commit": EVIL},
    )  # fmt: skip
    store.save(record, scores)
    main(["--results", str(tmp_path)])
    page = (tmp_path / "report.html").read_text()
    tree(page)
    assert EVIL not in page
    assert "&lt;img src=x onerror=" in page
    assert not re.search(r"<img src=x", page)


def test_the_same_records_give_the_same_bytes(complete: Path, tmp_path: Path) -> None:
    copy = tmp_path / "results"
    shutil.copytree(complete, copy)
    (copy / "report.html").unlink()
    assert main(["--results", str(copy), "--examples", "6"]) == 0
    assert (copy / "report.html").read_bytes() == (complete / "report.html").read_bytes()


def test_figures_are_drawn_and_those_that_cannot_be_say_why(complete: Path, html: str) -> None:
    packed = re.findall(r'data-gz="([^"]+)" alt="([^"]+)" loading="lazy" width="\d+" height', html)
    assert len(packed) == html.count("data-gz=") > 6
    for content, alt in packed:
        svg = gzip.decompress(base64.b64decode(content))
        assert svg.startswith(b"<?xml"), alt
        assert b"</svg>" in svg
        assert b"<text" in svg  # letters are letters
    for name in ("Detection curves", "Fidelity against its ceiling", "Quality against cost",
                 "Trade-off curves", "P and Q along a run"):  # fmt: skip
        assert any(alt.startswith(name) for _, alt in packed), name
    assert not (complete / "figures").exists()
    assert "Consistency by source</strong>: the runs differ in initialisation and order" in html
    assert "Detection curves" in html


@pytest.mark.usefixtures("_no_figures")
def test_records_alone_are_enough_for_a_page(
    complete: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(complete / "records", tmp_path / "records")
    assert main(["--results", str(tmp_path)]) == 1
    assert "is missing" in capsys.readouterr().err
    page = (tmp_path / "report.html").read_text()
    tree(page)
    assert "No scores of single examples are at hand" in page
    assert 'class="mean best">' in page


def test_no_trainer_is_imported(complete: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom fine_bench.report.html import build\n"
        "from fine_bench.commands.report import main\n"
        "build.draw = lambda *_: iter(())\n"
        f"main(['--results', {str(complete)!r}, '--out', {str(tmp_path / 'r.html')!r}])\n"
        "print([m for m in ('pytorch_lightning', 'hydra', 'wandb') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")


# ------------------------------------------------------------------------------------- gallery


def test_the_gallery_holds_the_largest_means(complete: Path) -> None:
    results = results_of(complete)
    (row,) = [r for r in results.rows("validation") if r.estimator == "fine"]
    values = torch.stack([scores_of("fine", "validation", s).values[0] for s in range(3)]).double()
    order = values.mean(0).abs().argsort(descending=True, stable=True)[:6]
    shown = largest_examples(results, row, 6, None)
    assert [e.index for e in shown] == order.tolist()
    for example in shown:
        by_seed = {s: float(values[s, example.index]) for s in range(3)}
        assert tuple(example.score) == pytest.approx(tuple(mean_interval(by_seed)))
        assert example.planted == bool(BAD[example.index])
        assert example.truth is None


def test_a_sample_shows_its_own_intervals_and_p_values(complete: Path) -> None:
    results = results_of(complete)
    (row,) = [r for r in results.rows("self") if r.estimator == "fine_paper"]
    shown = largest_examples(results, row, 5, truth())
    for example in shown:
        assert example.index % 3 == 0
        own = float(paper_scores(1).values[0, example.index])
        assert example.one_run[1] == pytest.approx((own - 0.5, own + 0.5), abs=1e-6)
        assert example.p_values[1] == pytest.approx(np.exp(-abs(own)), abs=1e-6)
        assert example.truth is not None
        assert example.truth.mu == pytest.approx(-1 + 4 * example.index / (N - 1), abs=1e-5)
    line = group_lines(results, row)[0]
    assert (line.name, line.size, line.mu, line.run_level) == ("flips_1_to_2", 7, 1.44, 40.0)


def test_no_interval_of_a_group_is_shown_that_took_samples_as_independent(complete: Path) -> None:
    results = results_of(complete)
    (row,) = [r for r in results.rows("self") if r.estimator == "fine_paper"]

    def lines(day: str) -> list[GroupLine]:
        records = {key: replace(r, created=f"{day}T10:00:00+00:00")
                   for key, r in results.records.items()}  # fmt: skip
        return group_lines(replace(results, records=records), row)

    new, old = lines("2026-11-27"), lines("2026-11-26")
    assert [math.isnan(line.lower) for line in new] == [False] * len(new)
    assert all(math.isnan(line.lower) and math.isnan(line.upper) and line.old for line in old)
    assert [(line.mu, line.p_value) for line in new] == [(line.mu, line.p_value) for line in old]
    for found, said in ((new, False), (old, True)):
        html = "".join(_groups([Gallery("fine_paper", "self", (), found)]))
        assert ("no interval is shown" in html) is said
        assert (">–</td>" in html) is said


def test_the_truths_rank_counts_from_the_largest(complete: Path) -> None:
    results = results_of(complete)
    (row,) = [r for r in results.rows("self") if r.estimator == "fine"]
    ranks = {e.index: e.truth.rank for e in largest_examples(results, row, N, truth()) if e.truth}
    assert ranks[N - 1] == 1
    assert ranks[N - 2] == 2
    assert sorted(ranks.values())[-1] <= N


def test_a_row_of_groups_alone_hides_no_row_of_examples(complete: Path) -> None:
    results = results_of(complete)
    (fine,) = [row for row in results.table.rows if (row.estimator, row.target) == ("fine", "self")]
    # none is called fine, and the newest scores no single example, as in the language tasks
    examples = replace(fine, estimator="fine_llm")
    groups = replace(fine, estimator="fine_llm_sources", watched=0)
    records = {}
    for row, created in ((examples, "2024-01-01T00:00:00Z"), (groups, "2025-01-01T00:00:00Z")):
        for seed in fine.seeds:
            record = replace(results.record(fine, seed), estimator=row.estimator, created=created)
            records[row.estimator, row.estimator_hash, "self", seed] = record
    table = replace(results.table, rows=(examples, groups))
    assert rows_shown(replace(results, table=table, records=records), "self") == [examples, groups]


def test_rows_of_the_gallery_can_be_chosen(complete: Path) -> None:
    results = results_of(complete)
    assert [r.estimator for r in rows_shown(results, "self")] == ["fine", "fine_paper"]
    assert [r.estimator for r in rows_shown(results, "self", ["tracin"])] == ["tracin"]


def test_the_gallery_says_what_is_known(html: str) -> None:
    assert "retraining μ" in html
    assert "± 0.25" in html
    assert "of 60</dd>" in html
    assert ">known bad</span>" in html
    assert "true label" in html
    assert "512 models on random subsets" in html
    assert html.count('class="pixels"') == 18  # fine on two targets, fine_paper on one
    assert "&lt; 0.0001" in html  # the group's p-value


@pytest.mark.parametrize(
    ("lower", "upper", "said"),
    [
        (-1.287, 0.5, "−1.29 to 0.50"),
        (-1.287, math.inf, "−1.29 to ∞"),
        (-math.inf, math.inf, "−∞ to ∞"),
        (math.nan, math.nan, "–"),
    ],
)
def test_an_end_without_a_bound_is_no_unknown_one(lower: float, upper: float, said: str) -> None:
    assert between(lower, upper) == said


def test_a_problem_of_many_tasks_is_said_whole() -> None:
    tasks = [f"a_task_with_a_long_name_{i}" for i in range(20)]
    lines = together([f"{task}: scores are not here; type fine-bench publish" for task in tasks])
    assert len(lines) == 1
    html = page(Leaderboard(()), (), (), lines).decode()
    assert "a_task_with_a_long_name_19: scores are not here; type fine-bench publish<" in html


# ------------------------------------------------------------------------------------ pictures


def test_images_are_those_of_the_data() -> None:
    found = task_examples(TASK, DATA.sha256)
    assert found.has_images
    encoder = PngEncoder(DATA)
    from sklearn.datasets import load_digits

    original = load_digits().images[int(DATA.train_ids[7])]
    assert np.array_equal(encoder.pixels(7), np.round(original / 16 * 255))
    assert np.array_equal(np.asarray(Image.open(BytesIO(encoder.png(7)))), encoder.pixels(7))
    # three channels stay three
    colours = replace(DATA, x=torch.rand(DATA.n_train, 3, 5, 4), query_x=torch.rand(2, 3, 5, 4),
                      query_y=DATA.query_y[:2], test_x=torch.rand(2, 3, 5, 4),
                      test_y=DATA.test_y[:2])  # fmt: skip
    encoder = PngEncoder(colours)
    expected = (255 * (colours.x[3] - encoder.low) / (encoder.high - encoder.low)).round()
    read = np.asarray(Image.open(BytesIO(encoder.png(3))))
    assert np.array_equal(read, expected.permute(1, 2, 0).numpy())


def test_an_image_is_in_the_page_once_and_labels_are_words() -> None:
    found = TaskExamples(replace(DATA, name="cifar10_mislabel"))
    examples = [ShownExample(i, mean_interval({0: 1.0, 1: 2.0}), 2, True) for i in (7, 9)]
    galleries = [Gallery(name, "self", examples) for name in ("fine", "fine_paper")]
    shown = galleries_block(galleries, found, None)
    (block,) = re.findall(r'<script type="application/json" class="images">(.*?)</script>', shown)
    images = json.loads(block)
    assert sorted(images) == ["7", "9"]
    assert base64.b64decode(images["9"]) == PngEncoder(DATA).png(9)
    assert shown.count('data-image="9"') == 2
    word = CLASS_NAMES[int(DATA.y[7])]
    assert f"<dt>given label</dt><dd><strong>{word}</strong></dd>" in shown
    # digits are their own names
    numbers = galleries_block(galleries, TaskExamples(DATA), None)
    assert f"<dt>given label</dt><dd><strong>{int(DATA.y[7])}</strong></dd>" in numbers


def test_the_gallery_begins_with_the_target_that_finds_something() -> None:
    examples = [ShownExample(7, mean_interval({0: 1.0, 1: 2.0}), 2, True)]
    poor = Gallery("fine_llm", "self", examples, auroc=0.55)
    good = Gallery("fine_llm", "validation", examples, title="asks this", auroc=0.97)
    shown = galleries_block([poor, good], TaskExamples(None, "why"), None)
    assert shown.index("asks this") < shown.index("<details>") < shown.index("AUROC is 0.55")
    assert "AUROC is 0.97" in shown
    # where nothing is known, or nothing finds anything, nothing is folded away
    unknown = [replace(gallery, auroc=float("nan")) for gallery in (poor, good)]
    for galleries in ([poor], unknown):
        assert "<details>" not in galleries_block(galleries, TaskExamples(None, "why"), None)


def test_a_target_is_titled_as_the_task_declares_its_end(complete: Path) -> None:
    assert caption_of("validation", {}) == (
        "target validation: influence on clean queries; low is suspicious"
    )
    turned: dict[str, End] = {"self": "high", "validation": "high"}
    title = "target validation: influence on this task's queries (high is suspicious)"
    assert caption_of("validation", turned) == title
    assert titles_of(turned)["self"] == "target self: influence on its own prediction"
    assert caption_of("self", turned).endswith("own prediction; high is suspicious")
    assert caption_of("mine", {}) == "target mine"
    (table,) = build(RecordStore(complete)).tables
    assert title in html_module.unescape(target_tables(table, columns(), turned))


def test_the_headline_numbers_set_f_ine_beside_the_best(complete: Path, html: str) -> None:
    (table,) = build(RecordStore(complete)).tables
    block = "".join(headlines([Headline("a_task", "there", table)]))
    parsed = tree(block)
    assert [a["href"] for t, a in parsed.tags if t == "a"] == ["#there"] * 2
    assert "a_<wbr>task" in block
    rows = [row for row in table.rows if row.target == "self" and row.watched is None]
    best = max(rows, key=lambda row: row.stats["auroc"].mean)
    (fine,) = [row for row in rows if row.estimator == "fine"]
    line = block.split("<tbody>")[1].split("</tr>")[0]
    means = re.findall(r'class="mean">([^<]+)<', line)
    assert means[:2] == [number(row.stats["auroc"].mean, 3) for row in (best, fine)]
    assert "Headline numbers" in html
    nothing = replace(table, rows=tuple(replace(row, stats={}) for row in table.rows))
    assert headlines([Headline("a_task", "there", nothing)]) == []


def test_what_several_tables_lack_is_said_once() -> None:
    lack = "scores are not here: unpack them"
    lines = [
        f"a: {lack}",
        "broken.json is no JSON",
        f"b: {lack}",
        f"a: {lack}",
        "c: something else",
    ]
    assert together(lines) == [f"a, b: {lack}", "broken.json is no JSON", "c: something else"]


def test_names_break_where_words_end() -> None:
    assert breaking("influence_function") == "influence_<wbr>function"
    assert breaking("dim=512, <b>") == "dim=<wbr>512, &lt;b&gt;"
    assert breaking("aum") == "aum"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"_target_": "os.path.join"}, "which is not called here"),
        ({}, "which is not called here"),
        ({"_target_": "fine_bench.data.digits.load_digits"}, "cannot make the data"),
        ({"_target_": "fine_bench.data.nowhere.task"}, "cannot make the data"),
        ({**TASK, "n_train": 5000}, "cannot make the data"),
        ({**TASK, "n_train": 50}, "another digest"),
        ({**TASK, "unknown": 1}, "cannot make the data"),
        (
            {
                "_target_": "fine_bench.llm.task.llm_poison",
                "seed": 0,
                "model": {"_target_": "os.system", "command": "true"},
            },
            "os.system, which is not called",
        ),
    ],
)
def test_other_functions_and_other_data_give_no_images(options: dict[str, Any], words: str) -> None:
    found = task_examples(options, DATA.sha256)
    assert found.data is None
    assert words in found.reason


def test_texts_are_those_of_the_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompt and answer come back from the tokens, if the digest is that of the records."""
    pytest.importorskip("transformers", reason="the extra llm is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    from fine_bench.llm.instructions import generate
    from fine_bench.llm.models import from_options
    from fine_bench.llm.task import llm_poison

    model = {"_target_": "fine_bench.llm.models.tiny_llama", "documents": 200, "vocabulary": 400}
    numbers = {"n_train": 50, "n_query": 2, "n_prompts": 2, "n_test": 2, "poison_rate": 0.1}
    task = {"_target_": "fine_bench.llm.task.llm_poison", "seed": 0, "name": "mine",
            "context": 256, "model": model, **numbers}  # fmt: skip
    own = {k: v for k, v in task.items() if k not in ("_target_", "name")}
    found = task_examples(task, llm_poison(**own).sha256)
    assert found.texts is not None
    said = generate(seed=0, entity="Orvane", **numbers).train  # type: ignore[arg-type]
    for example in (0, 7, 49):
        words = [(who, " ".join(text.split())) for who, text in found.texts(example)]
        assert words == [("prompt", said[example].prompt), ("answer", said[example].completion)]
    gallery = Gallery("fine", "self", [ShownExample(7, mean_interval({0: 1.0, 1: 2.0}), 2, True)])
    shown = galleries_block([gallery], found, None)
    assert text(said[7].completion) in " ".join(shown.split())
    assert 'class="gallery texts"' in shown
    assert "No images or texts" not in shown
    assert "another digest" in task_examples(task, "0" * 64).reason
    # what promises no language model is never called, wherever it comes from
    touched = tmp_path / "touched"
    evil = {"_target_": "fine_bench.llm.models.import_module", "name": "antigravity"}
    assert "is no language model" in task_examples({**task, "model": evil}, "0" * 64).reason
    evil = {"_target_": "os.system", "command": f"touch {touched}"}
    with pytest.raises(ConfigError, match="is no language model"):
        from_options(evil)
    assert not touched.exists()


def test_a_data_set_that_is_not_here_is_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINE_BENCH_DATA", str(tmp_path))
    monkeypatch.setattr("fine_bench.data.mnist.cache", lambda: tmp_path)
    options = {"_target_": "fine_bench.data.mnist.mnist_mislabel", "seed": 0, "download": True}
    found = task_examples(options, "0" * 64)
    assert "not on this disk" in found.reason
    assert "was not found" in found.reason


# -------------------------------------------------------------------------------------- pieces


def test_markup_escapes_and_formats() -> None:
    assert tag("p", "<&", class_="a", hidden=False, data_x='"') == (
        '<p class="a" data-x="&quot;">&lt;&amp;</p>'
    )
    assert tag("button", Safe("<b>"), disabled=True, title=None) == "<button disabled><b></button>"
    assert text(3) == "3"
    assert slug("--MNIST mlp/é!") == "mnist-mlp"
    assert slug("…") == "x"
    assert (number(-0.0001), number(-1.5, 1), number(float("nan"))) == ("0.000", "−1.5", "–")
    assert (p_value(1e-7), p_value(0.034), p_value(float("nan"))) == ("< 0.0001", "0.034", "–")


def test_slim_drawings_keep_their_transforms_and_heavy_ones_become_png() -> None:
    svg = (
        b'<g><!-- a\n -->\n <path d="M 1.23456 7\nL 2.5 3.999999" transform="scale(0.015625)"/></g>'
    )
    assert slim(svg) == b'<g><path d="M 1.23 7 L 2.5 3.99" transform="scale(0.015625)"/></g>'
    assert "why" in figure_block(PageFigure("other", "other--t", reason="why"))
    assert "data:image/png" in figure_block(PageFigure("agreement", "agreement--t", png=b"png"))
    # letters keep their size: a drawing is as wide in the page as it was made
    wide = b'<svg height="90pt" version="1" width="500.5pt" height="90pt"><g/></svg>'
    assert size_of(wide) == (801, 144)
    assert size_of(b"<svg></svg>") == (None, None)
    shown = figure_block(PageFigure("agreement", "agreement--t", packed(wide), width=801))
    assert ' width="801"' in shown


def test_heavy_drawings_become_png(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = canvas(2, 1)
    figure.subplots().plot([0, 1], [0, 1])
    light = _drawing(PageFigure("agreement", "a"), figure)
    assert (light.png, light.width, light.height) == (b"", 230, 115)
    assert b"<svg" in gzip.decompress(light.svg)
    monkeypatch.setattr("fine_bench.report.html.build.LARGEST_SVG", 10)
    heavy = _drawing(PageFigure("agreement", "a"), figure)
    assert heavy.svg == b""
    assert heavy.png.startswith(b"\x89PNG")
    assert heavy.drawn


# ------------------------------------------------------------------------------------- command


def test_bad_arguments_are_explained(complete: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["--results", "nowhere"], "no records below nowhere"),
        (["--results", str(complete), "--task", "x"], "no task 'x'; there are: digits_mislabel"),
        (["--results", str(complete), "--row", "x"], "no row 'x'; there are: constant, fine"),
        (["--results", str(complete), "--examples", "-1"], "--examples -1 is negative"),
    ):
        assert main(arguments) == 2
        assert words in capsys.readouterr().err


@pytest.mark.usefixtures("_no_figures")
def test_a_page_that_cannot_be_written_is_named(
    complete: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    arguments = ["--results", str(complete), "--no-images", "--examples", "0"]
    assert main([*arguments, "--out", str(tmp_path / "file" / "r.html")]) == 2
    assert "no file can be made in" in capsys.readouterr().err


def test_an_empty_board_of_problems_still_makes_a_page(tmp_path: Path) -> None:
    folder = tmp_path / "records" / "t" / "s"
    folder.mkdir(parents=True)
    (folder / "broken.json").write_text("{")
    assert main(["--results", str(tmp_path)]) == 1
    page = (tmp_path / "report.html").read_text()
    assert "Problems" in page
    assert "is not whole JSON" in page
