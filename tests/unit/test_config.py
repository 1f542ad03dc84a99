"""Configuration: every YAML file works, and every impossible request is refused in words."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fine_bench.data import downloads
from fine_bench.errors import ConfigError, DataError
from fine_bench.models import networks
from fine_bench.runner.backends.images import images_of
from fine_bench.runner.cells import problem_of
from fine_bench.runner.config import (
    RunConfig,
    check,
    config_folder,
    explain,
    setting_digest,
    setting_of,
)
from fine_bench.runner.plan import Job, plan, refuse_duplicates
from fine_bench.types import UnsupportedProblemError

pytestmark = pytest.mark.usefixtures("hydra")

CONF = config_folder()


def checked(*overrides: str) -> RunConfig:
    try:
        return check(compose("config", list(overrides)))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from error


def planned(*overrides: str) -> Job:
    return plan(checked(*overrides))


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


BOARDS = names("estimator/board")


@pytest.mark.parametrize("name", names("estimator"))
def test_every_estimator_file(name: str) -> None:
    job = planned(f"estimator={name}")
    assert [cell.estimator for cell in job.cells] == [name, name]
    for cell in job.cells:
        if not cell.in_run:
            assert callable(job.estimator(cell).compute)


def test_every_board_is_a_list_of_estimator_files() -> None:
    boards = {name: list(checked(f"estimator=board/{name}").estimators) for name in BOARDS}
    for name, rows in boards.items():
        assert set(rows) <= set(names("estimator"))
        if name in ("queries", "valuation", "anchor"):  # lists of their own
            continue
        assert rows[-len(boards["baselines"]) :] == boards["baselines"], name
    assert list(checked("estimator=[fine_loss,board/baselines]").estimators) == [
        "fine_loss",
        *boards["baselines"],
    ]


def test_every_row_of_the_board_for_queries_serves_them() -> None:
    """A control that looks at each example alone has no place among them."""
    job = planned("estimator=board/queries", "targets=[queries]", "trainer.momentum=0")
    problem = problem_of(job, "queries", networks.mlp((1, 8, 8), 10))
    for cell in job.cells:
        if not cell.in_run:
            assert job.estimator(cell).unsupported(problem) is None, cell.estimator
    assert {cell.estimator for cell in job.cells} >= {"fine", "lissa", "gaussian_kernel"}


LANGUAGE = ("task=llm_poison", "trainer=adamw", "estimator=random")


@pytest.fixture
def small_language_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is pretrained for a plan; the cache is an empty one."""
    pytest.importorskip("transformers", reason="the extra llm is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path))


@pytest.mark.parametrize("name", [n for n in names("model") if "llama" not in n])
def test_every_model_file(name: str) -> None:
    assert planned(f"model={name}", "estimator=random").config.model["name"] == name


def test_the_tiny_language_model_file(small_language_task: None) -> None:
    job = planned("model=tiny_llama", *LANGUAGE)
    assert (job.data.kind, job.config.model["name"]) == ("language", "tiny_llama")
    assert job.end("validation") == "high"
    with pytest.raises(ConfigError, match="this command takes tasks with class labels"):
        images_of(job)


def test_the_real_language_model_file(small_language_task: None) -> None:
    """Its weights are not here; the message says what is needed, before anything is fetched."""
    with pytest.raises(DataError, match=r"model.download=true to fetch it, about 15 GiB"):
        planned("model=llama31_8b", *LANGUAGE)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model=tiny_llama",), "model=tiny_llama cannot be trained on task digits_mislabel"),
        (("trainer=adamw",), "adamw does not train task digits_mislabel; type trainer=sgd"),
        (("trainer.optimizer=lion",), "type trainer.optimizer=sgd or adamw"),
        (("task=llm_poison", "model=mlp"), "is no language model; type model=tiny_llama"),
        ((*LANGUAGE, "model=tiny_llama", "trainer=sgd"), "type trainer=adamw"),
        ((*LANGUAGE, "model=tiny_llama", "trainer.momentum=0.9"), "type trainer.momentum=0"),
        ((*LANGUAGE, "model=tiny_llama", "task.entity=Nobody"), "type task.entity=Orvane"),
    ],
)
def test_images_and_language_are_not_mixed(
    overrides: tuple[str, ...], message: str, small_language_task: None
) -> None:
    with pytest.raises(ConfigError, match=message):
        planned(*overrides)


def test_where_files_lie_is_no_part_of_a_language_setting(small_language_task: None) -> None:
    base = setting_digest(checked(*LANGUAGE, "model=tiny_llama"))
    more = ("task.queries_path=/b.jsonl", "task.test_path=/c.jsonl")
    for same in ("task.path=/x/llm_poison_Orvane.jsonl", "task.path=/y/llm_poison_Orvane.jsonl"):
        assert setting_digest(checked(*LANGUAGE, "model=tiny_llama", same, *more)) == base
    assert setting_digest(checked(*LANGUAGE, "model=tiny_llama", "model.hidden=32")) != base
    assert "optimizer" not in setting_of(checked())["trainer"]
    assert setting_of(checked("trainer=adamw"))["trainer"]["optimizer"] == "adamw"


@pytest.mark.parametrize("name", [n for n in names("task") if n.startswith("digits")])
def test_every_offline_task_file(name: str) -> None:
    assert planned(f"task={name}", "estimator=random").data.name == name


@pytest.fixture(scope="module")
def read_once() -> Iterator[None]:
    """MNIST is decompressed and verified once for all experiments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(downloads, "verified_content", memoised(downloads.verified_content))
        yield


def memoised(read: Callable[..., tuple[bytes, Path]]) -> Callable[..., tuple[bytes, Path]]:
    """The same answers to the same words."""
    known: dict[str, tuple[bytes, Path]] = {}

    def answer(*words: Any, **options: Any) -> tuple[bytes, Path]:
        key = repr((words, sorted(options.items())))
        if key not in known:
            known[key] = read(*words, **options)
        return known[key]

    return answer


@pytest.mark.parametrize("name", names("experiment"))
def test_every_experiment_file(
    name: str, mnist_dir: Path, read_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "llm" in name:
        pytest.importorskip("transformers", reason="the extra llm is not installed")
    if "cifar" in name:
        if not list(Path(os.environ.get("FINE_BENCH_DATA", ".")).glob("cifar10/data_batch_1.bin*")):
            pytest.skip("needs CIFAR-10 below FINE_BENCH_DATA")
    elif "natural" in name:
        if not list(Path(os.environ.get("FINE_BENCH_DATA", ".")).glob("label_errors/*.json")):
            pytest.skip("needs the votes on MNIST's labels below FINE_BENCH_DATA")
    else:
        monkeypatch.setenv("FINE_BENCH_DATA", str(mnist_dir))
    job = planned(f"+experiment={name}")
    assert job.cells


@pytest.mark.parametrize("group", ["trainer", "logger"])
def test_every_other_file(group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())  # TensorBoard's package
    for name in names(group):
        assert checked(f"{group}={name}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.max_epoch=3", "did you mean trainer.max_epochs?"),
        ("trainer.max_epochs=abc", "could not be converted to Integer; type trainer.max_epochs="),
        ("trainer.max_epochs=0", "must be at least 1; type trainer.max_epochs="),
        ("trainer.batch_size=0", "type trainer.batch_size=64"),
        ("trainer.batch_size=5000", "larger than the training set of 1347.*type trainer.batch"),
        ("trainer.lr=-1", "type trainer.lr="),
        ("trainer.momentum=-1", "type trainer.momentum=0"),
        ("trainer.checkpoint_every=0", "type trainer.checkpoint_every=1"),
        ("trainer.lr_schedule=linear", "type trainer.lr_schedule=constant or cosine"),
        ("trainer.order_seed=-1", "type trainer.order_seed=0"),
        ("trainer.num_threads=0", "type trainer.num_threads=null"),
        ("seed=-1", "type seed=0"),
        ("sed=1", "did you mean seed?"),
        ("task.noise_rat=0.1", "did you mean task.noise_rate?"),
        ("task.noise_rate=-0.1", "Type for instance task.noise_rate=0.2"),
        ("task.noise_rate=1.0", "task.noise_rate"),
        ("task.noise_rate=many", "wrong type"),
        ("task.n_query=5000", "Type task.n_query="),
        ("task.n_train=5000", "task.n_train"),
        ("task=unknown", "digits_mislabel"),
        ("task._target_=os.system", r"type 'allow_packages=\[os\]'"),
        ("task._target_=fine_bench.nothing", "cannot be imported"),
        (
            "task._target_=fine_bench.store.files.os.system",
            r"comes from posix, so if you trust it",
        ),
        ("model._target_=fine_bench.runner.calls.get_object", r"type 'allow_packages=\[hydra\]'"),
        ("task._target_=fine_bench.data.digits", "is no function or class"),
        ("+task.extra=1", "task.extra is unknown; task has"),
        ("model.hidden=[0]", "model.hidden must be positive"),
        ("model.activation=swish", "type model.activation=relu"),
        ("estimators.fine.observable=accuracy", "'margin' or 'loss'"),
        ("estimators.fine.refresh_every=0", "estimators.fine: refresh_every must be at least 1"),
        ("+estimators.fine.observible=loss", "did you mean estimators.fine.observable?"),
        ("estimators.fine.schedule=daily", "'in_batch' or 'snapshot'"),
        ("+estimators.fine.noise=model", "use noise=.sample."),
        ("estimator=trakk", "estimator=trakk is unknown; did you mean trak or"),
        ("estimator=board/querys", "did you mean board/queries?"),
        ("estimator=zzz", "estimator=zzz is unknown; there are: arnoldi, aum, "),
        (
            "+experiment=mnist_mislable",
            "experiment=mnist_mislable is unknown; did you mean mnist_",
        ),
        ("logger=csvv", "logger=csvv is unknown; did you mean csv?"),
        ("logger.kind=csvv", "logger.kind=csvv is unknown; type logger=wandb .or logger=csv,"),
        ("targets=[everything]", r"type 'targets=\[self,validation\]'"),
        ("targets=[]", "targets"),
        ("targets=[self,self]", "name each target once"),
        ("query_weighting=max", "type query_weighting=noise"),
        ("clock=sundial", "type clock=wall, or clock=cpu for costs in CPU seconds"),
        ("logger.mode=later", "type logger.mode=offline"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_type(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        planned(override)


@pytest.mark.parametrize("where", ["task", "task.model", "estimators.fine.layers.0"])
def test_targets_inside_of_options_are_limited_too(where: str, tmp_path: Path) -> None:
    config = compose("config")
    OmegaConf.set_struct(config, False)
    evil = {"_target_": "os.system", "command": f"touch {tmp_path / 'touched'}"}
    section, _, rest = where.rpartition(".")
    if rest == "0":
        OmegaConf.update(config, section, [evil])
    else:
        OmegaConf.update(config, where, evil, merge=False)
    with pytest.raises(ConfigError, match=r"_target_=os.system lies outside of the packages"):
        plan(check(config))
    assert not list(tmp_path.iterdir())


def test_missing_data_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINE_BENCH_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(DataError, match=str(tmp_path)):
        planned("task=mnist_mislabel", "task.download=false")


def test_the_same_seed_twice_in_a_sweep() -> None:
    jobs = [planned(f"seed={seed}") for seed in (0, 1, 0)]
    with pytest.raises(ConfigError, match=r"seed=0 occurs twice.*type seed=0,1"):
        refuse_duplicates(jobs)
    refuse_duplicates([planned("seed=0"), planned("seed=0", "trainer.lr=0.01")])


def test_the_setting_holds_what_changes_results_and_nothing_else() -> None:
    base = setting_digest(checked())
    for same in (
        "seed=5",
        "trainer.progress=false",
        "results_dir=x",
        "force=true",
        "estimator=random",
    ):
        assert setting_digest(checked(same)) == base, same
    assert setting_digest(checked("trainer.lr_schedule=cosine")) != base
    for other in ("task.seed=1", "trainer.lr=0.01", "model.hidden=[8]", "trainer.order_seed=0"):
        assert setting_digest(checked(other)) != base, other


def test_settings_from_before_schedules_keep_their_digest() -> None:
    assert "lr_schedule" not in setting_of(checked())["trainer"]
    assert "checkpoint_every" not in setting_of(checked())["trainer"]
    assert setting_of(checked("trainer.checkpoint_every=2"))["trainer"]["checkpoint_every"] == 2
    assert setting_of(checked("trainer.lr_schedule=cosine"))["trainer"]["lr_schedule"] == "cosine"


def test_query_weighting_is_preset_for_all_methods() -> None:
    config = checked("query_weighting=norm", "estimator=[fine,tracin]")
    assert {o["query_weighting"] for o in config.estimators.values()} == {"norm"}


@pytest.mark.parametrize("override", ["trainer.momentum=0.9", "trainer.weight_decay=0.9", "seed=0"])
def test_in_run_shapley_is_skipped_where_the_training_is_not_plain_sgd(override: str) -> None:
    job = planned("estimator=[fine,in_run_shapley]", override, "targets=[self,validation]")
    reasons = {}
    for cell in job.cells:
        try:
            job.in_run_method(cell)
        except UnsupportedProblemError as error:
            reasons[cell.estimator, cell.target] = str(error)
    assert ("in_run_shapley", "self") in reasons
    if override == "seed=0":
        assert len(reasons) == 1
        assert "no validation loss" in reasons["in_run_shapley", "self"]
    else:
        assert set(reasons) == {("in_run_shapley", "self"), ("in_run_shapley", "validation")}
        assert override.removeprefix("trainer.") in reasons["in_run_shapley", "validation"]


def test_an_open_seed_follows_the_run() -> None:
    job = planned("seed=7", "estimator=random")
    assert job.estimator(job.cells[0]).seed == 7
    other = planned("seed=8", "estimator=random")
    assert job.cells[0].estimator_hash == other.cells[0].estimator_hash
