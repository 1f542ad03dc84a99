"""Checkpoints that are damaged, edited or another run's: named, set aside, trained again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from fine_bench.runner import checkpoints
from fine_bench.runner.backends.trained import folder_of, run_of
from fine_bench.runner.config import check
from fine_bench.runner.execution import execute
from fine_bench.runner.plan import Job, plan
from support.records import digits_run


def job_in(results: Path, estimator: str, seed: int = 0) -> Job:
    config = {
        "seed": seed,
        **digits_run(num_threads=1),
        "targets": ["self"],
        "estimators": {estimator: {"_target_": f"baselines.{estimator}"}},
        "results_dir": str(results),
    }
    return plan(check(OmegaConf.create(config)))


def sha256(results: Path, estimator: str) -> tuple[str, list[str]]:
    """Digest of the scores of a run that may read checkpoints, and what was said."""
    said: list[str] = []
    (one,) = execute(job_in(results, estimator), "test", say=said.append)
    assert one.record.status == "finished", one.record.reason
    return one.record.scores_sha256, said


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints") / "results"
    for seed in (0, 1):
        execute(job_in(root, "controls.MeanTrainingLoss", seed), "test", say=lambda _: None)
    shutil.rmtree(root / "records")
    return root


def first(folder: Path) -> Path:
    return min(folder.glob("*.ckpt"))


def cut(folder: Path) -> None:
    first(folder).write_bytes(first(folder).read_bytes()[:1000])


def flip(folder: Path) -> None:
    content = bytearray(first(folder).read_bytes())
    content[len(content) // 2] ^= 1
    first(folder).write_bytes(content)


def other_shape(folder: Path) -> None:
    content = torch.load(first(folder), weights_only=True)
    content["state_dict"] = {k: v[:1] for k, v in content["state_dict"].items()}
    torch.save(content, first(folder))


def sealed_other_shape(folder: Path) -> None:
    for path in folder.glob("*.ckpt"):
        content = torch.load(path, weights_only=True)
        content["state_dict"] = {k: v[:1] for k, v in content["state_dict"].items()}
        torch.save(content, path)
    sealed_again(folder)


def sealed_again(folder: Path) -> None:
    run = json.loads((folder / checkpoints.SEAL).read_text())["run"]
    (folder / checkpoints.SEAL).unlink()
    checkpoints.seal(folder, run)


def facts(content: str, *, sealed: bool = False) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / checkpoints.FACTS).write_text(content)
        if sealed:
            sealed_again(folder)

    return write


def edited(folder: Path) -> None:
    path = folder / checkpoints.FACTS
    path.write_text(json.dumps({**json.loads(path.read_text()), "test_accuracy": 1.0}))


def of_another_seed(folder: Path) -> None:
    other = folder.with_name(folder.name.replace("seed0", "seed1"))
    shutil.rmtree(folder)
    shutil.copytree(other, folder)


def pipe(folder: Path) -> None:
    first(folder).unlink()
    os.mkfifo(folder / "epoch=0000.ckpt")


def replace_by_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("no folder")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (cut, "is damaged or was edited"),
    "empty": (lambda folder: first(folder).write_bytes(b""), "is damaged or was edited"),
    "rubbish": (lambda folder: first(folder).write_bytes(b"\x80" * 999), "is damaged"),
    "a flipped bit": (flip, "is damaged or was edited"),
    "another shape": (other_shape, "is damaged or was edited"),
    "another shape, sealed": (sealed_other_shape, "they cannot be read (RuntimeError"),
    "one missing": (lambda folder: first(folder).unlink(), "epoch=0000.ckpt is missing"),
    "one too many": (
        lambda folder: shutil.copy(first(folder), folder / "epoch=0009.ckpt"),
        "epoch=0009.ckpt is not theirs",
    ),
    "a pipe": (pipe, "is damaged or was edited"),
    "another seed's": (of_another_seed, "they are of another run (seed 1, wanted 0)"),
    "no seal": (lambda folder: (folder / checkpoints.SEAL).unlink(), "carry no seal.json"),
    "half a seal": (
        lambda folder: (folder / checkpoints.SEAL).write_text("{"), "their seal.json is damaged",
    ),
    "a deep seal": (
        lambda folder: (folder / checkpoints.SEAL).write_text("[" * 200_000),
        "their seal.json is damaged",
    ),
    "a seal of another form": (
        lambda folder: (folder / checkpoints.SEAL).write_text('{"run": 1, "files": [3]}'),
        "their seal.json is damaged",
    ),
    "edited facts": (edited, "training.json is damaged or was edited"),
    "facts of no form": (facts("[1, 2]"), "training.json is damaged or was edited"),
    "facts of no form, sealed": (facts("[1, 2]", sealed=True), "cannot be read (TypeError"),
    "facts of numbers as words, sealed": (
        facts('{"test_accuracy": "x", "train_accuracy": 1, "seconds": 2}', sealed=True),
        "cannot be read (ValueError",
    ),
    "half facts, sealed": (facts("{", sealed=True), "cannot be read (JSONDecodeError"),
    "a file": (replace_by_a_file, "there is no folder of that name"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_set_aside_and_trained_again(
    trained: Path, tmp_path: Path, damage: str
) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    shutil.copytree(trained, bad)
    folder = folder_of(job_in(bad, "tracin.TracIn"))
    DAMAGES[damage][0](folder)
    found, said = sha256(bad, "tracin.TracIn")
    assert DAMAGES[damage][1] in said[0]
    assert "trained: test accuracy" in said[1]
    # nothing is lost, the scores are those of whole checkpoints, and the next call reads new ones
    assert folder.with_name(f"{folder.name}.unused-1").exists()
    shutil.copytree(trained, good)
    right, said = sha256(good, "tracin.TracIn")
    assert "not trained again" in said[0]
    assert found == right
    _, said = sha256(bad, "gradient_similarity.GradDot")
    assert "not trained again" in said[0]


def test_what_is_set_aside_keeps_a_name_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "seed0"
    for number in (1, 2, 3):
        folder.mkdir()
        assert checkpoints.read(folder, {}, lambda: (0, 0), dict) is None
        assert (tmp_path / f"seed0.unused-{number}").is_dir()
        assert not folder.exists()


def test_files_are_on_the_disk_before_their_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, order = tmp_path / "seed0", []
    flush, rename = checkpoints._flush, Path.rename
    monkeypatch.setattr(checkpoints, "_flush", lambda p: (order.append(p.name), flush(p)))
    monkeypatch.setattr(Path, "rename", lambda p, to: (order.append("name"), rename(p, to))[1])
    with checkpoints.scratch(folder) as temporary:
        (temporary / "a.ckpt").write_text("x")
        (temporary / checkpoints.FACTS).write_text("{}")
        checkpoints.seal(temporary, {"seed": 0})
        order.clear()
        checkpoints.publish(temporary, folder)
    assert {"a.ckpt", checkpoints.FACTS, checkpoints.SEAL} < set(order[: order.index("name")])
    assert order[order.index("name") + 1 :] == [tmp_path.name]


def test_the_seal_tells_runs_apart(tmp_path: Path) -> None:
    one, other = (run_of(job_in(tmp_path, "tracin.TracIn", seed)) for seed in (0, 1))
    assert one != other
    assert set(one) == {"task", "data", "setting", "seed", "init_seed", "order_seed"}
