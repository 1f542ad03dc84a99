"""``fine-bench bank`` on a small slice of the digits."""

from __future__ import annotations

import io
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from rich.console import Console

from fine_bench.commands import bank as entry
from fine_bench.gradients.margin import margins
from fine_bench.metrics.retraining import models_for_counts, retraining_mu
from fine_bench.retraining.bank import Bank, find_bank
from fine_bench.runner import bank as command
from fine_bench.runner import bank_config, schema
from fine_bench.runner.backends import images
from fine_bench.runner.plan import plan
from fine_bench.runner.schema import BankConfig
from support.commands import Commands

SMALL = (
    "task.n_train=60",
    "task.n_query=10",
    "trainer.max_epochs=3",
    "trainer.batch_size=16",
    "model.hidden=[12]",
)

Main = Callable[..., tuple[int, str]]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Iterator[Main]:
    """The command in this process: exit status and what it said."""

    # Hydra would set up the logging of the whole process, pytest's included
    for place in ("hydra.core.utils.configure_log", "hydra._internal.hydra.configure_log"):
        monkeypatch.setattr(place, lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["fine-bench bank"])

    def run(folder: Path, *arguments: str) -> tuple[int, str]:
        said = io.StringIO()
        console = Console(file=said, width=200, highlight=False, soft_wrap=True)
        for module in (command, entry):
            monkeypatch.setattr(module, "out", console)
        try:
            status = entry.main([f"results_dir={folder}", *SMALL, *arguments])
        except SystemExit as end:
            status = int(end.code or 0)
        finally:
            GlobalHydra.instance().clear()
        return status, said.getvalue()

    yield run
    GlobalHydra.instance().clear()


def only_bank(folder: Path) -> Bank:
    (found,) = (folder / "banks").iterdir()
    return Bank.open(found)


def test_a_bank_with_all_its_parts_grows(main: Main, tmp_path: Path) -> None:
    status, said = main(tmp_path, "bank.models=30", "bank.subsets=2")
    assert status == 0, said
    assert "digits_mislabel, seed 0, vary both" in said
    assert "60 training examples, 12 bad, 10 queries" in said
    assert "30 models, each on a random 50% (30 examples) of its own" in said
    enough = models_for_counts(60, 0.5)
    assert 30 < enough <= 40
    assert f"for the μ of every example about {enough} are needed: bank.models={enough}" in said
    assert "2 subsets of 30 examples, 5 seeds each" in said
    assert "single: 0 of 30 models are there, 30 to train" in said
    assert "trained 40 models in" in said
    assert "s a model" in said
    bank = only_bank(tmp_path)
    assert f"the bank is complete: {bank.folder}" in said
    before = bank.load("single")
    assert (len(before), before.n_train) == (30, 60)
    assert (before.members.sum(axis=1) == 30).all()

    definition = [f"bank.definition.{o}" for o in ("singles=6", "with_runs=4", "without_runs=3")]
    status, said = main(tmp_path, "bank.models=40", *definition)
    assert status == 0, said
    assert "single: 30 of 40 models are there, 10 to train" in said
    assert "4 models on everything, 3 without each of 6 single examples and 2 groups" in said
    after = bank.load("single")
    assert np.array_equal(after.margin[:30], before.margin)
    sets = bank.sets()
    assert sum(name.startswith("example_") for name in sets) == 6
    assert set(plan(config("bank.models=1")[0]).data.groups) < set(sets)
    left_out = bank.load("definition")
    assert len(left_out) == 4 + 3 * len(sets)
    assert (left_out.subset == 0).sum() == 4
    found = {tuple(np.flatnonzero(~row).tolist()) for row in left_out.members}
    assert found == {(), *sets.values()}
    # spread over the ranks of the bank's own μ
    rank = np.argsort(np.argsort(retraining_mu(after.members, after.margin).mu))
    singles = [s[0] for name, s in sets.items() if name.startswith("example_")]
    assert sorted(rank[singles] // 10) == list(range(6))

    definition[0] = "bank.definition.singles=8"
    status, said = main(tmp_path, "bank.models=40", *definition)
    assert status == 0, said
    assert "definition: 28 of 34 models are there, 6 to train" in said
    assert set(sets.items()) < set(bank.sets().items())
    assert main(tmp_path, "bank.models=40", *definition)[1].count(" 0 to train") == 2


def config(*arguments: str, folder: str = "results") -> Any:
    from hydra import compose, initialize_config_dir

    from fine_bench.runner.schema import config_folder

    schema.register()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        given = [f"results_dir={folder}", *SMALL, *arguments]
        return bank_config.check(compose("bank", overrides=given))


def test_the_defaults_of_the_file_are_those_of_the_code() -> None:
    from fine_bench.runner.schema import config_folder

    file = OmegaConf.load(config_folder() / "bank.yaml")
    assert OmegaConf.to_container(file.bank) == OmegaConf.to_container(
        OmegaConf.structured(BankConfig)
    )


@pytest.mark.parametrize(
    ("vary", "changes"),
    [
        ("both", []),
        ("initialisation", ["trainer.momentum=0.9", "trainer.lr_schedule=cosine"]),
        ("order", ["trainer.weight_decay=0.01"]),
    ],
)
def test_a_model_on_all_data_is_a_benchmark_run(
    vary: str, changes: list[str], main: Main, tmp_path: Path
) -> None:
    runs = [f"bank.definition.{o}" for o in ("with_runs=2", "without_runs=1", "groups=true")]
    arguments = ["bank.models=0", f"bank.vary={vary}", *runs, *changes]
    status, said = main(tmp_path, *arguments)
    assert status == 0, said
    run, wanted = config(*arguments)
    models = only_bank(tmp_path).load("definition")
    job = plan(run)
    for k in (0, 1):
        seed = int(models.seed[k])
        place = next(m for m in command.definition_models({}, 2, 0) if m.run == k)
        assert wanted.design.run_seed(place) == seed
        trainer = replace(run.trainer, progress=False)
        if vary != "both":
            trainer = replace(
                trainer,
                init_seed=wanted.design.init_seed(place),
                order_seed=wanted.design.order_seed(place),
            )
        once = replace(run, seed=seed, trainer=trainer, results_dir=str(tmp_path / str(k)))
        net = images.train(replace(job, config=once), [], None).model
        with torch.no_grad():
            expected = margins(net(job.data.x), job.data.y).numpy()
        assert np.abs(models.margin[k] - expected).max() < 1e-3 * np.abs(expected).max()
    assert np.abs(models.margin[0] - models.margin[1]).max() > 0.1
    # and what a record of such a run says of its setting finds the bank
    assert only_bank(tmp_path).identity["setting"] == job.setting


def test_other_settings_are_other_banks(main: Main, tmp_path: Path) -> None:
    for arguments in ([], ["bank.keep=0.9"], ["trainer.lr=0.01"], ["bank.seed=1"], ["task.seed=1"]):
        assert main(tmp_path, "bank.models=2", *arguments)[0] == 0
    assert len(list((tmp_path / "banks").iterdir())) == 5
    run, bank = config("bank.keep=0.9", folder=str(tmp_path))
    identity = bank_config.identity_of(run, plan(run).data, bank.design)
    assert len(find_bank(bank.folder, identity).present("single")) == 2
    identity["design"]["keep"] = 0.7
    with pytest.raises(command.StoreError, match=r"design\.keep is 0\.9 there, asked for is 0\.7"):
        find_bank(bank.folder, identity)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m"], "a bank is one job"),
        (["bank.modles=3"], "bank.modles is unknown; did you mean bank.models?"),
        (["bank.models=many"], "bank.models: Value 'many'"),
        (["bank.models=-1"], "bank.models=-1 is negative; type bank.models=0"),
        (["bank.definition.with_runs=-1"], "bank.definition.with_runs=-1 is negative"),
        (["bank.processes=0"], "bank.processes=0 must be at least 1; type bank.processes=null"),
        (["bank.at_once=0"], "bank.at_once=0 must be at least 1"),
        (["bank.keep=1.5"], "bank.keep=1.5 must lie strictly between 0 and 1"),
        (["bank.vary=nothing"], "bank.vary=nothing is unknown; type bank.vary=both"),
        (["bank.seed=-1"], "bank.seed=-1 is negative; type bank.seed=0"),
        (["seed=3"], "Type bank.seed=3 for another bank"),
        (["trainer.init_seed=1"], "type bank.vary=order instead"),
        (["trainer.order_seed=1"], "type bank.vary=initialisation instead"),
        (["bank.subsets=3", "bank.seeds_per_subset=4"], "type bank.seeds_per_subset=5 or more"),
        (["bank.definition.with_runs=3"], "the one is compared with the other; type both"),
        (["bank.definition.singles=3"], "bank.definition.singles=3 needs models with and without"),
        (
            [
                "bank.definition.with_runs=2",
                "bank.definition.without_runs=2",
                "bank.definition.groups=false",
            ],
            "bank.definition leaves nothing out; type bank.definition.singles=100",
        ),
        (["bank.models=0"], "the bank would be empty; type for instance bank.models=256"),
        (
            ["bank.device=abacus"],
            "bank.device=abacus is unknown or not there; type bank.device=cpu",
        ),
        (["trainer.batch_size=31"], "trainer.batch_size=31 is larger than the smallest subset"),
        (["trainer.lr=-1"], "trainer.lr=-1.0 must be a positive number"),
        (["task.n_train=5"], "task.n_train=5 is fewer than the 10 classes"),
        (["model.hiden=[3]"], "model.hiden is unknown; did you mean model.hidden?"),
        (
            [
                "bank.models=20",
                "bank.definition.singles=61",
                "bank.definition.with_runs=2",
                "bank.definition.without_runs=2",
            ],
            "but there are 60 training examples; type bank.definition.singles=60",
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_bad_input_ends_before_anything_is_written(
    arguments: list[str], message: str, main: Main, tmp_path: Path
) -> None:
    status, said = main(tmp_path / "results", *arguments)
    assert (status, said.count("error:")) == (2, 1)
    assert message in said
    assert not (tmp_path / "results").exists()


def test_too_few_models_to_choose_singles_by(main: Main, tmp_path: Path) -> None:
    runs = ["bank.definition.with_runs=2", "bank.definition.without_runs=2"]
    status, said = main(tmp_path, "bank.models=10", "bank.definition.singles=5", *runs)
    assert status == 2
    assert "are chosen by the bank's own μ, which its part single does not give yet: " in said
    assert "too few models" in said
    status, said = main(
        tmp_path, "bank.models=0", "bank.definition.singles=5", "bank.seed=1", *runs
    )
    assert status == 2
    assert "holds 0 models, at least 1 are needed" in said


def test_divergence_is_no_bad_input(main: Main, tmp_path: Path) -> None:
    status, said = main(tmp_path, "bank.models=3", "trainer.lr=1e38")
    assert status == 1
    assert "model single/0/0 diverged" in said
    assert "trainer.lr=1e+37" in said


def test_a_network_that_cannot_be_stacked(main: Main, tmp_path: Path) -> None:
    status, said = main(
        tmp_path,
        "bank.models=2",
        "model={_target_: test_bank_cli.normalised}",
        "allow_packages=[test_bank_cli]",
    )
    assert status == 2
    assert "model: 1 (BatchNorm1d) mixes the examples of a batch" in said


def normalised(in_shape: Any, n_classes: int, *, hidden: Any, activation: Any, bias: Any) -> Any:
    n_in = int(np.prod(in_shape))
    return torch.nn.Sequential(
        torch.nn.Flatten(),
        torch.nn.BatchNorm1d(n_in, track_running_stats=False),
        torch.nn.Linear(n_in, n_classes),
    )


def test_a_damaged_chunk_is_named(main: Main, tmp_path: Path) -> None:
    assert main(tmp_path, "bank.models=2", "bank.at_once=2")[0] == 0
    (chunk,) = tmp_path.rglob("*.safetensors")
    chunk.write_bytes(chunk.read_bytes()[:-9])
    status, said = main(tmp_path, "bank.models=4")
    assert status == 1
    assert f"the chunk {chunk} is damaged" in said
    chunk.unlink()
    assert main(tmp_path, "bank.models=4")[0] == 0


def test_a_bar_on_a_terminal_and_lines_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal, expected in ((True, "remaining"), (False, "3 of 6 models, ")):
        said = io.StringIO()
        console = Console(file=said, width=120, force_terminal=terminal, highlight=False)
        monkeypatch.setattr(command, "out", console)
        monkeypatch.setattr(command, "_SECONDS_BETWEEN_LINES", 0.0)
        with command._progress(6) as report:
            report(3)
            report(3)
        assert expected in said.getvalue()
        assert ("6/6" in said.getvalue()) == terminal


def test_durations() -> None:
    assert [command._duration(s) for s in (0.25, 59.94, 61, 3725)] == [
        "0.2 s",
        "59.9 s",
        "1 min 01 s",
        "1 h 02 min",
    ]


def test_interrupted_from_the_keyboard(cli: Commands, tmp_path: Path) -> None:
    """And what the command prints to a user, from any folder."""
    arguments = [f"results_dir={tmp_path}", *SMALL, "trainer.max_epochs=300", "bank.models=4000"]
    process = cli.start("fine_bench", "bank", *arguments, "bank.processes=1")
    end = time.monotonic() + 300
    while not list(tmp_path.rglob("[!.]*.safetensors")):
        assert process.poll() is None, process.texts()
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    printed, said = process.texts()
    assert "interrupted; what is stored stays" in said
    assert "Traceback" not in said + printed
    bank = only_bank(tmp_path)
    assert 0 < len(bank.present("single")) < 4000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["banks"]
