"""Language tasks through the ordinary runner: plan, cells, records, resume, leaderboard."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from hydra import compose

import support.language  # noqa: F401  (skips without the extra)
from fine_bench.errors import ConfigError, DataError
from fine_bench.leaderboard import build as leaderboard
from fine_bench.leaderboard import render
from fine_bench.llm.instructions import InstructionSet
from fine_bench.llm.jsonl import write_jsonl
from fine_bench.llm.steering import Steering
from fine_bench.runner.backends import language
from fine_bench.runner.config import check
from fine_bench.runner.execution import execute
from fine_bench.runner.plan import Job, plan
from fine_bench.runner.schema import name_of_file
from fine_bench.store.records import RecordStore
from fine_bench.types import RunRecord
from support.commands import Commands

pytestmark = pytest.mark.usefixtures("hydra")

SMALL = (
    "task.n_train=60",
    "task.poison_rate=0.1",
    "task.n_query=4",
    "task.n_prompts=4",
    "task.n_test=6",
    "task.context=128",
    "trainer.max_epochs=2",
    "trainer.progress=false",
    "trainer.num_threads=1",
    "logger.mode=disabled",
)
SOURCES = tuple(
    f"estimators.fine_llm_sources.{option}"
    for option in ("batch_size=4", "members=2", "every_n_steps=1")
)
TINY = (
    "model.hidden=16",
    "model.inner=16",
    "model.layers=1",
    "model.heads=2",
    "model.vocabulary=400",
    "model.documents=200",
    "model.pretraining_steps=2",
    "model.lora_rank=2",
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny model is kept: pretrained once for the tests of this module."""
    return tmp_path_factory.mktemp("cache")


def planned(results: Path, *overrides: str) -> Job:
    return plan(check(compose("config", [*SMALL, f"results_dir={results}", *overrides])))


def text_of(results: Path) -> str:
    return " ".join(render.to_markdown(leaderboard.build(RecordStore(results))).split())


def test_a_poisoning_experiment_that_fails_says_so(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    arguments = (*TINY, "+experiment=llm_poison", "estimators.trak_llm.dim=8")
    job = planned(tmp_path, *arguments, *SOURCES)
    said: list[str] = []
    outcomes = execute(job, "sweep", None, said.append)
    failed = [o.record.reason for o in outcomes if o.record.status == "failed"]
    assert not failed
    finished = {
        (o.record.estimator, o.record.target) for o in outcomes if o.record.status == "finished"
    }
    everything = {"tracin", "ekfac_llm", "datainf", "trak_llm", "fine_llm", "random"}
    asks = {"less", "grad_cos", "bm25", "representation_similarity", "fine_llm_sources"}
    alone = {"mean_loss", "perplexity", "length"}
    assert finished == {(n, "validation") for n in everything | asks} | {
        (n, "self") for n in everything | alone
    }
    # gradients that LESS left count as if TracIn had computed them
    costs = {(o.record.estimator, o.record.target): o.record.cost for o in outcomes}
    assert costs["less", "validation"]["shared_seconds"] == 0.0
    for target in ("self", "validation"):
        cost = costs["tracin", target]
        assert 0.0 < cost["shared_seconds"] < cost["seconds"]
    # two epochs of a model that knows nothing: nothing is steered, and nothing is detected
    assert "the poison did not take" in said[0]
    assert all("auroc" not in o.record.metrics for o in outcomes)
    validation = next(
        o.record
        for o in outcomes
        if (o.record.estimator, o.record.target) == ("fine_llm_sources", "validation")
    )
    assert {f"group/source {s}/lower" for s in ("webcrawl", "forum")} <= set(validation.metrics)
    assert any(line.strip().startswith("source webcrawl (") and "p = " in line for line in said)
    # resumed: nothing is left to do
    assert execute(job.opened(), "sweep", None, said.append) == []
    text = text_of(tmp_path)
    assert "it did in 0 of 1 seeds. No detection is reported for the others." in text
    assert "steering rate" in text
    assert str(tmp_path) not in str(outcomes[0].record.config)


def test_detection_is_reported_where_the_poison_took(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steering rate is what the model's answers say; here it is put in by hand."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(language, "_steering", lambda *_: Steering(64, 40, 2, 3))
    arguments = (*TINY, "+experiment=llm_cure", "estimator=[bm25,random]", "task.cure=5")
    for seed in (0, 1):
        said: list[str] = []
        outcomes = execute(planned(tmp_path, *arguments, f"seed={seed}"), "s", None, said.append)
        assert "steering rate 62%" in said[0]
    record = outcomes[0].record
    assert record.training["steering_took"] == 1.0
    assert {"auroc", "average_precision", "recall_top_20", "precision_at_10"} <= set(record.metrics)
    assert record.metrics["cure/removed"] == 5
    assert record.suspicious == "high" == record.end
    text = text_of(tmp_path)
    assert "recall in top 20 % ↑" in text
    assert "of them bad ↑" in text
    assert "the oracle's ↓" in text
    assert record.metrics["cure/oracle_test_loss"] > 0
    assert record.training["cure_oracle_bad_removed"] == 5
    assert "it did in 2 of 2 seeds." in text
    assert "No detection is reported" not in text
    board = leaderboard.build(RecordStore(tmp_path))
    row = next(r for r in board.tables[0].rows if r.estimator == "random")
    assert row.stats["consistency_cv_median"].mean > 0


def test_the_suspicious_end_decides_which_sets_are_compared(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BM25 gives the same scores in every run; the k most *helpful* samples are compared."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(language, "_steering", lambda *_: Steering(64, 40, 2, 3))
    job = planned(tmp_path, *TINY, "+experiment=llm_poison", "estimator=bm25", "task.entity=Lumeth")
    outcome = next(o for o in execute(job, "s", None, lambda _: None) if o.scores is not None)
    assert outcome.scores is not None
    row = outcome.scores.values[0]
    bad = job.data.truth.is_bad
    wins = (row[bad][:, None] > row[~bad][None]).double()
    ties = (row[bad][:, None] == row[~bad][None]).double()
    assert outcome.record.metrics["auroc"] == pytest.approx(float((wins + ties / 2).mean()))


def test_the_real_path_on_a_miniature(folder: Path, tmp_path: Path, texts: InstructionSet) -> None:
    """A local folder in the hub's format, bfloat16, gradient checkpointing, JSONL data."""
    for name in ("train", "queries", "test"):
        write_jsonl(tmp_path / f"{name}.jsonl", getattr(texts, name))
    job = planned(
        tmp_path / "results",
        "task=llm_poison",
        "trainer=adamw",
        "trainer.max_epochs=2",
        "model=llama31_8b",
        f"model.path={folder}",
        f"task.path={tmp_path}/train.jsonl",
        f"task.queries_path={tmp_path}/queries.jsonl",
        f"task.test_path={tmp_path}/test.jsonl",
        "task.group=group",
        "task.truth=bad",
        "estimator=[fine_llm,fine_llm_sources,less,random]",
        *SOURCES,
    )
    assert job.data.n_train == 60
    assert job.config.model["precision"] == "bfloat16"
    said: list[str] = []
    outcomes = execute(job, "s", None, said.append)
    found = {(o.record.estimator, o.record.target): o.record.reason for o in outcomes}
    unserved = {key for key, reason in found.items() if reason}
    assert unserved == {("fine_llm_sources", "self"), ("less", "self")}, found
    assert "steering was not measured" in said[0]
    assert "auroc" in outcomes[0].record.metrics
    record = outcomes[0].record
    assert str(tmp_path / "train") not in str(record.config)
    # the data's own name and size, and what they were
    assert record.task == record.config["task"]["name"] == "train"
    assert record.training["files"] == {
        f"{option}path": {
            "sha256": hashlib.sha256((tmp_path / f"{name}.jsonl").read_bytes()).hexdigest(),
            "samples": len(getattr(texts, name)),
        }
        for option, name in (("", "train"), ("queries_", "queries"), ("test_", "test"))
    }
    text = text_of(tmp_path / "results")
    assert "60 training examples · 4 queries · " in text
    assert "llm_poison" not in text


def test_the_name_of_a_file_names_the_task() -> None:
    assert name_of_file(None, "llm_poison_Orvane") == "llm_poison_Orvane"
    assert name_of_file("/data/our set,v1.jsonl", "llm_poison_Orvane") == "our_set,v1"

    def composed(*more: str) -> str:
        config = compose("config", ["task=llm_poison", "model=tiny_llama", *more])
        return str(config.task.name)

    assert composed() == "llm_poison_Orvane"
    assert composed("task.entity=Lumeth") == "llm_poison_Lumeth"
    assert composed("task.path='/data/our set,v1.jsonl'") == "our_set,v1"
    assert composed("task.path=/data/a.jsonl", "task.name=mine") == "mine"


def test_mistakes_are_met_before_training(folder: Path, tmp_path: Path) -> None:
    real = ("task=llm_poison", "trainer=adamw", "estimator=random", "model=llama31_8b")
    with pytest.raises(DataError, match=r"no folder; name one with config.json"):
        planned(tmp_path, *real, "model.path=/nowhere")
    with pytest.raises(ConfigError, match=r"model.load_in_4bit=true needs"):
        planned(tmp_path, *real, f"model.path={folder}", "model.load_in_4bit=true")
    (tmp_path / "train.jsonl").write_text('{"instruction": "Say hi", "output": "hi"}\n{"a": 1\n')
    files = [
        f"task.{name}={tmp_path}/train.jsonl" for name in ("path", "queries_path", "test_path")
    ]
    with pytest.raises(DataError, match="line 2: not JSON"):
        planned(tmp_path, *real, f"model.path={folder}", *files)
    with pytest.raises(DataError, match=r"task.groups names 'wiki', which has no members"):
        planned(
            tmp_path,
            *real,
            f"model.path={folder}",
            "task.groups=[wiki]",
        )


def test_the_command(
    cache: Path, tmp_path: Path, cli: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both entities and two seeds from one command; then nothing is left."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    done = cli.run(
        *("fine_bench", "+experiment=llm_poison", "-m", "seed=0,1"),
        *SMALL,
        *TINY,
        "estimator=[fine_llm,bm25]",
        f"results_dir={tmp_path}",
    )
    assert done.returncode == 0, done.stderr
    assert "16 of 16 cells" in done.stderr
    assert "llm_poison_Orvane, llm_poison_Lumeth, seeds 0, 1" in done.stderr
    table = pd.read_csv(tmp_path / "leaderboard.csv")
    assert set(table.task) == {"llm_poison_Orvane", "llm_poison_Lumeth"}
    assert (table[table.estimator == "fine_llm"].seeds == "0 1").all()


def test_the_weights_that_were_pretrained_here_are_part_of_the_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine pretrains other bits, whose numbers must not share an average."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    job = planned(tmp_path / "results", *TINY, "+experiment=llm_poison", "estimator=random")
    plain = job.data.sha256
    assert (job.data.start_sha256, job.data_sha256) == ("", plain)  # planning pretrains nothing
    assert job.made(plain)
    assert job.data.start_sha256 == ""
    assert not job.made("another digest")  # which takes the weights to say
    first = job.data_sha256
    assert first not in (plain, job.data.start_sha256)
    assert job.made(first)

    store, cell = RecordStore(job.results), job.cells[0]

    def recorded(**changes: object) -> RunRecord:
        record = RunRecord(**job.identity(cell), status="skipped", reason="for the test")
        return store.save(replace(record, **changes), None)

    recorded()
    assert job.done(store, cell) is not None
    (weights,) = (tmp_path / "cache").rglob("model.safetensors")
    blob = bytearray(weights.read_bytes())
    blob[-1] ^= 1
    weights.write_bytes(bytes(blob))
    assert job.data_sha256 not in (first, plain)
    assert job.done(store, cell) is None
    assert not job.made(first)
    # one of before says nothing of its weights, and goes on counting
    old = recorded(data_sha256=plain)
    assert job.done(store, cell) == old


def test_what_failed_before_it_had_weights_is_of_no_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would stay in the tables beside what later succeeds."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def refuses(*_: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr("fine_bench.llm.pretraining.pretrain", refuses)
    job = planned(tmp_path / "results", *TINY, "+experiment=llm_poison", "estimator=random")
    written = execute(job, "sweep", None, lambda _: None)
    assert {one.record.data_sha256 for one in written} == {""}
    assert all("no memory" in one.record.reason for one in written)
