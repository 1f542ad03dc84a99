"""Language data of the user's own: records verified with their files, samples listed by μ."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from hydra import compose

import support.language  # noqa: F401  (skips without the extra)
from fine_bench.commands import run as run_command
from fine_bench.commands.run import show_influential
from fine_bench.commands.verify import main as verify_command
from fine_bench.errors import ConfigError
from fine_bench.llm.instructions import InstructionSet
from fine_bench.llm.jsonl import write_jsonl
from fine_bench.report.influential import influential_page, interval
from fine_bench.runner.config import check
from fine_bench.runner.execution import execute
from fine_bench.runner.influential import table_of
from fine_bench.runner.plan import Job, plan
from fine_bench.runner.recorded import cell_of, digests_of
from fine_bench.runner.verify import verify
from fine_bench.runner.write import Written
from fine_bench.store.record_json import record_file
from fine_bench.types import InfluenceScores

pytestmark = pytest.mark.usefixtures("hydra")

OPTIONS = ("path", "queries_path", "test_path")
TINY = (
    *("task=llm_poison", "task.context=128", "task.group=group", "model=tiny_llama"),
    *("model.hidden=16", "model.inner=16", "model.layers=1", "model.heads=2"),
    *("model.vocabulary=400", "model.documents=200", "model.pretraining_steps=2"),
    *("model.lora_rank=2", "trainer=adamw", "trainer.max_epochs=2", "trainer.progress=false"),
    *("trainer.num_threads=1", "logger.mode=disabled"),
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def pretrained_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


@pytest.fixture
def files(tmp_path: Path, texts: InstructionSet) -> dict[str, Path]:
    """The three files by the options that name them."""
    parts = (texts.train, texts.queries, texts.test)
    made = {}
    for option, samples in zip(OPTIONS, parts, strict=True):
        made[option] = tmp_path / "own" / f"{option.removesuffix('_path')}.jsonl"
        made[option].parent.mkdir(exist_ok=True)
        write_jsonl(made[option], samples)
    return made


def planned(results: Path, files: dict[str, Path], *overrides: str) -> Job:
    own = [f"task.{option}={file}" for option, file in files.items()]
    return plan(check(compose("config", [*TINY, f"results_dir={results}", *own, *overrides])))


def run(job: Job) -> list[Written]:
    written = execute(job, "sweep", None, lambda _: None)
    assert not [one.record.reason for one in written if one.record.status != "finished"]
    return written


def test_a_record_of_ones_own_files_is_verified_with_them(
    tmp_path: Path, files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results"
    (one,) = run(planned(results, files, "estimator=length", "targets=[self]"))
    with pytest.raises(ConfigError, match=r"add --path FILE --queries-path FILE --test-path FILE$"):
        cell_of(one.record, tmp_path)
    with pytest.raises(ConfigError, match=r"add --test-path FILE$"):
        verify(one.record, files={option: files[option] for option in OPTIONS[:2]})
    with pytest.raises(ConfigError, match=r"--path \$\{oc.env:HOME\} has \$\{ in its name"):
        verify(one.record, files={**files, "path": Path("${oc.env:HOME}")})

    # the data's name is the record's, wherever the files lie and whatever they are called now
    elsewhere = {option: file.rename(tmp_path / file.name) for option, file in files.items()}
    files = {**elsewhere, "path": elsewhere["path"].rename(tmp_path / "renamed.jsonl")}
    told = [f"--{o.replace('_', '-')}={file}" for o, file in files.items()]
    assert verify_command([str(results / "records" / record_file(one.record)), *told]) == 0
    assert "equal: scores bit for bit" in capsys.readouterr().out

    # one of before digests were kept: the data's own decides
    training = {k: v for k, v in one.record.training.items() if k != "files"}
    assert verify(replace(one.record, training=training), results, files=files).equal

    # other bytes of the same samples explain; other samples decide
    files["path"].write_bytes(files["path"].read_bytes() + b"\n")
    verdict = verify(one.record, results, files=files)
    assert verdict.equal
    assert [c.name for c in verdict.circumstances if c.name.startswith("task")] == ["task.path"]
    lines = files["test_path"].read_text().splitlines(keepends=True)
    files["test_path"].write_text("".join(lines[1:]))  # no part of the digest of the data
    verdict = verify(one.record, results, files=files)
    assert [d.name for d in verdict.differences] == ["task.path", "task.test_path"]
    files["test_path"].write_text("".join(lines))
    queries = files["queries_path"].read_text().splitlines(keepends=True)
    files["queries_path"].write_text("".join(queries[1:]))
    told = [f"--{o.replace('_', '-')}={file}" for o, file in files.items()]
    assert verify_command([str(results / "records" / record_file(one.record)), *told]) == 1
    said = capsys.readouterr().out
    sha = digests_of(one.record.training["files"])["queries_path"]
    assert f"task.queries_path: {sha[:12]}… in the record, " in said
    assert "task.test_path" not in said
    assert "  data: " in said


def test_what_is_said_of_files_may_be_anything() -> None:
    assert digests_of("no mapping") == digests_of({"path": 3, "test_path": {}}) == {}


def test_the_influential_samples_are_listed_with_their_text(
    tmp_path: Path, files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    first, *others = files["path"].read_text().splitlines(keepends=True)
    group = json.loads(first)["group"]
    marked = {"instruction": "=cmd|x", "output": "<b>bold</b>", "group": group}
    files["path"].write_text("\n" + json.dumps(marked) + "\n" + "".join(others))
    more = ("estimator=[fine_llm,random]", "targets=[self,validation]")
    jobs = [planned(tmp_path / "results", files, *more, f"seed={seed}") for seed in (0, 1)]
    scores = [
        one.scores
        for job in jobs
        for one in run(job)
        if (one.record.estimator, one.record.target) == ("fine_llm", "validation")
    ]
    show_influential(jobs)
    said = capsys.readouterr().out
    (csv,) = (tmp_path / "results" / "influential").glob("*.csv")
    table = pd.read_csv(csv)

    # slow twin: mean over the runs, and the interval whose errors are as large as runs differ
    mu = [one.values[0].double().numpy() for one in scores if one is not None]
    errors = [one.std_error[0].double().numpy() for one in scores if one is not None]
    mean = [(a + b) / 2 for a, b in zip(*mu, strict=True)]
    within = [(a * a + b * b) / 2 for a, b in zip(*errors, strict=True)]
    between = [(a - b) ** 2 / 2 for a, b in zip(*mu, strict=True)]
    usable = [i for i in range(60) if math.isfinite(within[i])]
    scale = sum(between[i] for i in usable) / sum(within[i] for i in usable)
    order = sorted(range(60), key=lambda i: -mean[i])
    assert table["mu"].tolist() == pytest.approx([mean[i] for i in order])
    half = [1.959964 * math.sqrt(scale * within[i] / 2) for i in order]
    assert (table["mu_high"] - table["mu"]).tolist() == pytest.approx(half, nan_ok=True)
    assert (table["mu"] - table["mu_low"]).tolist() == pytest.approx(half, nan_ok=True)

    # text, source and line are those of the sample, and harmless
    samples = jobs[0].data.samples
    assert table["rank"].tolist() == list(range(1, 61))
    assert table["line"].tolist() == [samples[i].line for i in order]
    assert table["line"].min() == 2  # the file begins with an empty line
    assert table["source"].tolist() == [samples[i].group for i in order]
    assert table["completion"].tolist() == [samples[i].completion for i in order]
    assert table[table["line"] == 2]["prompt"].item().startswith("'=cmd|x")
    page = csv.with_suffix(".html").read_text()
    assert "&lt;b&gt;bold&lt;/b&gt;" in page
    assert "<b>bold" not in page
    assert page.count('<li class="card">') == 60

    # ten of them in the terminal, and where the others are
    assert said.count(" · line ") == 10
    assert f"  1. μ {interval(table.iloc[0].to_dict())} · {table['source'][0]} · line" in said
    assert "as fine_llm sees it (seeds 0, 1)" in said
    assert f"all 60 with their text: {csv.with_suffix('')}.csv and .html" in said

    # where the list cannot be had, what it takes
    show_influential([planned(tmp_path / "other", files, "estimator=random")])
    assert "type 'estimator=[fine_llm]' 'targets=[validation]'" in capsys.readouterr().out


def test_samples_without_score_or_interval(texts: InstructionSet) -> None:
    class Task:
        samples = texts.train[:4]

    def scores(mu: list[float], error: list[float], watched: list[int] | None) -> InfluenceScores:
        return InfluenceScores(
            torch.tensor([mu]),
            "fine",
            "validation",
            torch.tensor([error]),
            watched=None if watched is None else torch.tensor(watched),
        )

    inf = math.inf
    runs = [
        scores([1.0, -2.0, 0.0, 3.0], [0.1, 0.1, inf, inf], [0, 1, 3]),
        scores([2.0, -1.0, 0.0, 3.0], [0.1, 0.1, inf, inf], [0, 1, 3]),
    ]
    table = table_of(Task(), runs)  # type: ignore[arg-type]
    assert table["line"].tolist() == [texts.train[i].line for i in (3, 0, 1)]
    assert table["mu"].tolist() == [3.0, 1.5, -1.5]
    assert table["mu_low"].isna().tolist() == [True, False, False]
    # runs differ by 1: s² = ½, in place of 0.01
    assert table["mu_high"][1] - 1.5 == pytest.approx(1.959964 * 0.5)
    assert interval(table.iloc[0].to_dict()) == "3.000 (no interval)"
    page = influential_page(
        pd.concat([table] * 200, ignore_index=True), title="mine", about="of a test"
    ).decode()
    assert "The first 500 of 600 samples; the csv beside this page has all." in page
    assert "known as poison" in page


def test_the_command_lists_them_when_its_sweep_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it was cut short; not where it was never announced."""
    told: list[object] = []
    sweep = SimpleNamespace(jobs=["a job"], running=False, status=1)

    @contextmanager
    def command(*_: object) -> Iterator[SimpleNamespace]:
        yield sweep

    monkeypatch.setattr(run_command.sweep, "command", command)
    monkeypatch.setattr(run_command.hydra, "main", lambda **_: lambda _: lambda: None)
    monkeypatch.setattr(run_command, "show_influential", told.append)
    monkeypatch.setattr("sys.argv", ["fine-bench"])
    assert run_command.main([]) == 1
    assert told == [["a job"]]
    sweep.jobs = []
    assert run_command.main([]) == 1
    assert len(told) == 1
