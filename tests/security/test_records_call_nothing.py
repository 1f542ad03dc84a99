"""A record, or a report's, names code and places: what is not a task, a model or a method of an
allowed package is never called, and nothing outside of the results is read or written."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from fine_bench.commands import cure, verify
from fine_bench.errors import ConfigError
from fine_bench.llm.models import from_options
from fine_bench.report.html.images import task_examples
from fine_bench.runner.calls import target_of
from fine_bench.runner.config import check
from fine_bench.runner.plan import plan
from fine_bench.store.record_json import record_json
from support.records import digits_run, make_record

OURS = ("fine_bench", "baselines")


def written(folder: Path, **sections: Any) -> Path:
    """A record as somebody else may have written it."""
    config = {
        **digits_run(),
        "estimator": {"_target_": "baselines.controls.RandomScores", "seed": 0},
        **sections,
    }
    path = folder / "records" / "digits" / "x" / "record.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(record_json(make_record(config=config)))
    return path


def attacks(touched: Path) -> dict[str, Mapping[str, Any]]:
    second = {"_target_": "subprocess.run", "args": ["touch", str(touched)]}
    return {
        "a command": {
            "_target_": "fine_bench.commands.verify.main",
            "argv": [json.dumps(second), "--allow-packages", "subprocess"],
        },
        "a command of the days before": {
            "_target_": "fine_bench.run.verify.main", "argv": ["--help"],
        },
        "a command that overwrites": {
            "_target_": "fine_bench.commands.clean.main", "argv": ["--out", str(touched)],
        },
        "an end with status 0": {
            "_target_": "fine_bench.commands.verify.main", "argv": ["--help"],
        },
        "the main command": {"_target_": "fine_bench.__main__.call", "arguments": ["--version"]},
        "a writer": {
            "_target_": "fine_bench.store.files.write_atomic",
            "path": str(touched), "data": "evil",
        },
        "a folder": {"_target_": "fine_bench.store.records.RecordStore", "root": str(touched)},
        "a verification with packages": {
            "_target_": "fine_bench.runner.recorded.job_of",
            "record": second, "allow_packages": ["subprocess"],
        },
        "a call of calls": {
            "_target_": "fine_bench.runner.calls.build",
            "options": second, "where": "task", "packages": ["subprocess"],
        },
        "a helper that promises a model": {
            "_target_": "fine_bench.llm.models.from_options", "options": second,
        },
        "a helper that promises a task": {
            "_target_": "fine_bench.runner.plan._data", "options": second,
            "packages": ["subprocess"],
        },
        "a method of a class": {
            "_target_": "fine_bench.runner.plan.TaskCache.get", "options": second,
            "packages": ["subprocess"],
        },
        "an import of an import": {
            "_target_": "fine_bench.llm.models.import_module", "name": "antigravity",
        },
        "a class of another kind": {
            "_target_": "fine_bench.runner.write.Writer", "job": {}, "sweep": "x",
        },
    }  # fmt: skip


@pytest.mark.parametrize("section", ["task", "model", "estimator"])
@pytest.mark.parametrize("attack", attacks(Path()))
def test_a_record_calls_no_command_and_no_helper(
    tmp_path: Path, attack: str, section: str, capsys: pytest.CaptureFixture[str]
) -> None:
    touched = tmp_path / "touched"
    evil = attacks(touched)[attack]
    path = written(tmp_path / "results", **{section: evil})
    assert verify.main([str(path)]) == 2
    if section != "estimator":
        results = ["--results", str(tmp_path / "results"), "--task", "digits"]
        assert cure.main([*results, "--methods", "fine"]) == 2
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    assert said.err.strip()
    assert not touched.exists()


@pytest.mark.parametrize("attack", attacks(Path()))
@pytest.mark.parametrize("where", ["task.model", "task.inner", "estimator.layers"])
def test_what_is_nested_is_held_to_the_same(tmp_path: Path, attack: str, where: str) -> None:
    evil = attacks(tmp_path / "touched")[attack]
    section, _, key = where.partition(".")
    options = digits_run().get(section, {"_target_": "baselines.tracin.TracIn"})
    inner = {**options, key: [evil] if key == "layers" else evil}
    assert verify.main([str(written(tmp_path / "results", **{section: inner}))]) == 2
    assert not (tmp_path / "touched").exists()


def test_one_kind_does_not_stand_for_another() -> None:
    task, model, method = (
        "fine_bench.data.digits.digits_mislabel",
        "fine_bench.models.networks.mlp",
        "baselines.tracin.TracIn",
    )
    fine = "fine_bench.callback.FINECallback"
    sections: dict[Any, set[str]] = {"task": {task}, "model": {model}, "estimators": {method, fine}}
    for section, right in sections.items():
        for path in (task, model, method, fine):
            if path in right:
                assert callable(target_of({"_target_": path}, section, OURS, section))
                continue
            with pytest.raises(ConfigError, match=r"is not called here; name an? "):
                target_of({"_target_": path}, section, OURS, section)


def test_what_ends_the_process_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Inside of a package that the user allowed: its code runs, its SystemExit is no success."""
    (tmp_path / "ending_package.py").write_text(
        "import sys\n"
        "from baselines.controls import RandomScores\n"
        "def task(**options): sys.exit(0)\n"
        "def model(in_shape, n_classes): sys.exit(0)\n"
        "class Method(RandomScores):\n"
        "    def compute(self): sys.exit(0)\n"
    )
    (tmp_path / "ending_import.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    cases = {
        "task": "ending_package.task", "model": "ending_package.model",
        "estimator": "ending_import.Method",
    }  # fmt: skip
    for section, target in cases.items():
        path = written(tmp_path / section, **{section: {"_target_": target}})
        assert verify.main([str(path), "--allow-packages", target.partition(".")[0]]) == 2
        assert section in capsys.readouterr().err
    sys.modules.pop("ending_package", None)

    from fine_bench.runner.execution import execute

    config = {
        "seed": 0, **digits_run(num_threads=1), "targets": ["self"],
        "estimators": {
            "ends": {"_target_": "ending_package.Method"},
            "random": {"_target_": "baselines.controls.RandomScores", "seed": None},
        },
        "allow_packages": ["ending_package"], "results_dir": str(tmp_path / "run"),
    }  # fmt: skip
    ended = execute(plan(check(OmegaConf.create(config))), "test", say=lambda _: None)
    assert [one.record.status for one in ended] == ["failed", "finished"]
    assert ended[0].record.reason == "SystemExit: 0"


@pytest.mark.parametrize(
    ("section", "change", "words"),
    [
        ("task", {"data_dir": "/etc"}, "config.task.data_dir is '/etc'"),
        ("task", {"path": "/etc/passwd"}, "config.task.path"),
        ("task", {"name": "${oc.env:HOME}"}, "holds values, no references"),
        ("model", {"activation": "${oc.env:HOME}"}, "holds values, no references"),
        ("estimator", {"seed": "???"}, "holds values, no references"),
        ("model", {"path": "/etc"}, "config.model.path is '/etc'"),
        ("model", {"path": "../x"}, "config.model.path is '../x'"),
        ("task", {"model": {"path": "~/x"}}, "config.task.model.path is '~/x'"),
        ("task", {"n_train": 10**18}, "task.n_train"),
    ],
)
def test_a_record_names_no_places_and_no_variables(
    tmp_path: Path,
    section: str,
    change: Mapping[str, Any],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = digits_run().get(section, {"_target_": "baselines.controls.RandomScores"})
    assert verify.main([str(written(tmp_path, **{section: {**options, **change}}))]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("section", ["task", "model", "estimator", "trainer"])
@pytest.mark.parametrize("value", [None, 3, "text", [1], []])
def test_sections_of_another_form_are_refused(
    tmp_path: Path, section: str, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify.main([str(written(tmp_path, **{section: value}))]) == 2
    assert f"config.{section}" in capsys.readouterr().err


def test_the_gallery_calls_tasks_and_names_no_places(tmp_path: Path) -> None:
    llm = {"_target_": "fine_bench.llm.task.llm_poison", "seed": 0}
    for evil in (
        {"_target_": "fine_bench.data.task.promised", "function": "x"},
        {"_target_": "fine_bench.data.task.TaskData"},
        {"_target_": "fine_bench.data.mnist.sys.exit"},
        {**llm, "model": {"_target_": "fine_bench.llm.models.from_options", "options": {}}},
        {**llm, "model": {"_target_": "fine_bench.llm.models.pretrained", "path": str(tmp_path)}},
        {**llm, "model": {"_target_": "fine_bench.llm.models.with_lora", "model": "x"}},
        {**llm, "model": 3},
    ):
        found = task_examples(evil, "0" * 64)
        assert found.data is None
        assert "cannot make the data" in found.reason


def test_a_language_model_is_imported_by_no_file() -> None:
    module = "this"  # its import prints: a module that nothing else imports
    sys.modules.pop(module, None)
    with pytest.raises(ConfigError, match="is no language model"):
        from_options({"_target_": f"{module}.s"})
    assert module not in sys.modules
    again = {"_target_": "fine_bench.llm.models.from_options", "options": {"_target_": "this.s"}}
    with pytest.raises(ConfigError, match="is no language model"):
        from_options(again)


def test_functions_of_ones_own_need_no_annotation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package that the user allows is the user's: only what says otherwise is refused."""
    (tmp_path / "own_unannotated.py").write_text(
        "from typing import Any\n"
        "def task(seed=0): ...\n"
        "def model(in_shape, n_classes) -> Any: ...\n"
        "def wrong() -> dict: ...\n"
        "class Wrong: ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    packages = (*OURS, "own_unannotated")
    for name, section in (("task", "task"), ("model", "model")):
        assert callable(
            target_of({"_target_": f"own_unannotated.{name}"}, "x", packages, section)  # type: ignore[arg-type]
        )
    sections: tuple[Any, ...] = ("task", "model", "estimators")
    for name in ("wrong", "Wrong"):
        for section in sections:
            with pytest.raises(ConfigError, match="is not called here"):
                target_of({"_target_": f"own_unannotated.{name}"}, "x", packages, section)
    sys.modules.pop("own_unannotated", None)


@pytest.mark.parametrize("said", [{"download": True}, {}])
def test_nothing_is_fetched_for_a_record(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    said: Mapping[str, Any],
) -> None:
    """Records of before places were left out say ``download: true``: they can be verified."""
    asked: list[object] = []
    monkeypatch.setattr("fine_bench.data.downloads._download", lambda *a, **_: asked.append(a))
    monkeypatch.setenv("FINE_BENCH_DATA", str(tmp_path / "nothing"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    task = {"_target_": "fine_bench.data.mnist.mnist_mislabel", "name": "m", "seed": 0, **said}
    assert verify.main([str(written(tmp_path, task=task))]) == 2
    assert "train-images-idx3-ubyte" in capsys.readouterr().err
    assert asked == []


def test_a_task_that_fetches_nothing_is_not_given_the_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digits = {**digits_run()["task"], "download": True}
    assert verify.main([str(written(tmp_path, task=digits))]) == 1
    assert "not computed: another identity" in capsys.readouterr().out
