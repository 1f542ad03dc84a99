"""Language data of the user's own: their records verified with their files."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose

import support.language  # noqa: F401  (skips without the extra)
from fine_bench.commands.verify import main as verify_command
from fine_bench.errors import ConfigError
from fine_bench.llm.instructions import InstructionSet
from fine_bench.llm.jsonl import write_jsonl
from fine_bench.runner.config import check
from fine_bench.runner.execution import execute
from fine_bench.runner.plan import Job, plan
from fine_bench.runner.recorded import cell_of, digests_of
from fine_bench.runner.verify import verify
from fine_bench.runner.write import Written
from fine_bench.store.record_json import record_file

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
