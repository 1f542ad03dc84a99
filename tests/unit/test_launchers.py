"""Launchers: every configuration composes, a missing extra is named, a sweep can be sent away."""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hydra import compose
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig
from rich.console import Console

from fine_bench import terminal
from fine_bench.commands.run import multirun_first
from fine_bench.errors import DataError
from fine_bench.runner import launchers, sweep
from fine_bench.runner.config import check, setting_digest
from fine_bench.runner.execution import execute
from fine_bench.runner.plan import Job, plan
from fine_bench.runner.progress import Follower
from fine_bench.runner.schema import config_folder
from fine_bench.store.records import RecordStore

pytestmark = pytest.mark.usefixtures("hydra")

PLUGINS = {
    "joblib": "hydra_joblib_launcher",
    "submitit_local": "hydra_submitit_launcher",
    "submitit_slurm": "hydra_submitit_launcher",
    "ray": "hydra_ray_launcher",
}
SMALL = (
    "task.n_train=60",
    "task.n_query=10",
    "trainer.max_epochs=1",
    "trainer.batch_size=16",
    "trainer.progress=false",
    "targets=[self]",
    "logger.mode=disabled",
    "estimator=[mean_loss,random]",
)


def composed(*overrides: str) -> DictConfig:
    return compose("config", list(overrides), return_hydra_config=True)


def job(folder: Path, *overrides: str) -> Job:
    return plan(check(compose("config", [*SMALL, f"results_dir={folder}", *overrides])))


# ------------------------------------------------------------------------------- configuration


def test_every_launcher_has_a_file_and_an_extra() -> None:
    import tomllib

    files = {path.stem for path in (config_folder() / "launcher").glob("*.yaml")}
    assert files == {launchers.BASIC, *launchers.EXTRAS} == {launchers.BASIC, *PLUGINS}
    project = Path(__file__).parents[2] / "pyproject.toml"
    extras = tomllib.loads(project.read_text())["project"]["optional-dependencies"]
    for name, extra in launchers.EXTRAS.items():
        distribution = PLUGINS[name].replace("_", "-")
        assert any(line.startswith(distribution) for line in extras[extra])


@pytest.mark.parametrize("name", sorted(PLUGINS))
def test_a_launcher_composes(name: str) -> None:
    pytest.importorskip(
        f"hydra_plugins.{PLUGINS[name]}", reason=f"the extra of launcher={name} is not installed"
    )
    config = composed(f"launcher={name}", "seed=1")
    assert config.hydra.launcher._target_.startswith(f"hydra_plugins.{PLUGINS[name]}.")
    assert launchers.name_of(config.hydra) == name
    assert config.trainer.num_threads == 1
    assert composed(f"launcher={name}", "trainer.num_threads=3").trainer.num_threads == 3
    # where jobs run is no part of what is computed
    assert setting_digest(check(config)) == setting_digest(check(composed("seed=1")))


def test_the_basic_launcher_is_hydras_own() -> None:
    config = composed()
    assert config.hydra.launcher._target_.endswith("basic_launcher.BasicLauncher")
    assert launchers.name_of(config.hydra) == "basic"
    assert config.trainer.num_threads is None


@dataclass
class Init:
    """The keys that ``hydra-ray-launcher`` 1.2 knows, where it is not installed."""

    init: dict[str, Any] = field(default_factory=lambda: {"address": None})
    remote: dict[str, Any] = field(default_factory=dict)


@dataclass
class RayStandIn:
    """See ``Init``."""

    _target_: str = "hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher"
    ray: Init = field(default_factory=Init)


def test_rays_file_fits_the_keys_of_its_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    store = ConfigStore.instance()
    group = store.repo["hydra"]["launcher"]
    monkeypatch.setitem(group, "ray.yaml", group.get("ray.yaml"))  # put back afterwards
    store.store(group="hydra/launcher", name="ray", node=RayStandIn)
    try:
        launcher = composed("launcher=ray").hydra.launcher
    finally:
        if group["ray.yaml"] is None:
            del group["ray.yaml"]
    assert launcher.ray.init.address is None
    assert launcher.ray.init.log_to_driver is False
    assert launcher.ray.remote.num_cpus == 1


@pytest.mark.parametrize("name", sorted(PLUGINS))
def test_a_missing_extra_is_named(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    group = ConfigStore.instance().repo["hydra"]["launcher"]
    monkeypatch.delitem(group, f"{name}.yaml", raising=False)
    with pytest.raises(HydraException) as caught:
        compose("config", [f"launcher={name}"])
    message = launchers.explain(caught.value)
    assert message is not None
    assert f"launcher={name} needs a Hydra plugin that is not installed" in message
    assert f"pip install 'hydra-{launchers.EXTRAS[name]}-launcher>=1.2,<2'" in message
    monkeypatch.setattr(sweep, "out", Console(stderr=True, soft_wrap=True))
    with pytest.raises(SystemExit) as end:
        sweep.refuse(caught.value)
    assert end.value.code == 2
    assert "launcher=basic" in capsys.readouterr().err


def test_an_unknown_launcher_is_no_missing_extra() -> None:
    with pytest.raises(HydraException) as caught:
        compose("config", ["launcher=slurmm"])
    assert launchers.explain(caught.value) is None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], ["-m"]),
        (["seed=0,1"], ["-m", "seed=0,1"]),
        (["+experiment=x", "-m", "seed=0,1"], ["-m", "+experiment=x", "seed=0,1"]),
        (["--multirun", "seed=0,1"], ["-m", "seed=0,1"]),
        (["hydra.mode=RUN"], ["hydra.mode=RUN"]),
        (["--cfg", "job"], ["--cfg", "job"]),
        (["--help"], ["--help"]),
    ],
)
def test_a_sweep_is_asked_for_where_nothing_speaks_against_it(
    given: list[str], expected: list[str]
) -> None:
    assert multirun_first(given) == expected


# ---------------------------------------------------------------------- jobs in other processes


def test_a_hook_is_sent_to_other_processes_without_the_data(tmp_path: Path) -> None:
    hook = sweep.SweepHook()
    with sweep.command() as swept:
        config = composed(*SMALL, f"results_dir={tmp_path}")
        swept.begin(lambda: [config], Path("a/now"), "joblib")
        sent = pickle.dumps(hook)
        swept.end()
    assert len(sent) < 1000
    assert vars(pickle.loads(sent)) == {}
    assert len(swept.jobs) == 1


@pytest.mark.parametrize(
    ("name", "output"),
    [("basic", "terminal"), ("joblib", "nowhere"), ("ray", "nowhere"), ("submitit_slurm", "file")],
)
def test_where_the_lines_of_a_job_go(name: str, output: str) -> None:
    assert launchers.output_of(name) == output


def test_no_bars_where_several_processes_share_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stderr", Terminal())
    console = Console(file=io.StringIO(), force_terminal=True)
    assert terminal.shown()
    assert not terminal.bar_on(console).disable
    with terminal.hidden():
        assert not terminal.shown()
        assert terminal.bar_on(console).disable
        with terminal.hidden(False):
            assert not terminal.shown()
    assert terminal.shown()
    monkeypatch.setattr("sys.stderr", io.StringIO())
    assert not terminal.shown()


def test_what_other_processes_finish_is_named_once(tmp_path: Path) -> None:
    execute(job(tmp_path, "seed=2"), "earlier", say=lambda line: None)
    jobs = [job(tmp_path, "seed=0"), job(tmp_path, "seed=1"), job(tmp_path, "seed=2")]
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, color_system=None)
    follower = Follower(jobs, "now", "", console)
    assert len(follower.open) == 4  # seed 2 is done
    assert follower.look() == []
    execute(jobs[0], "another sweep", say=lambda line: None)
    assert follower.look() == []
    follower.start()
    execute(job(tmp_path, "seed=0", "force=true"), "now", say=lambda _: None)
    execute(jobs[1], "now", say=lambda line: None)
    follower.stop()
    shown = screen.getvalue()
    for seed in (0, 1):
        for name in ("mean_loss", "random"):
            assert shown.count(f"seed {seed}: {name}") == 1
    assert "seed 2" not in shown
    assert "remaining" in shown
    assert "4/4" in shown
    assert follower.open == []


def test_several_tasks_are_told_apart(tmp_path: Path) -> None:
    jobs = [job(tmp_path), job(tmp_path, "task=digits_transition")]
    follower = Follower(jobs, "now", "", sweep.out)
    execute(jobs[1], "now", say=lambda line: None)
    lines = follower.look()
    assert len(lines) == 2
    assert all(line.startswith("digits_transition seed 0: ") for line in lines)


# ---------------------------------------------------------------------------- a sweep cut short


class StoppedError(Exception):
    """As one of a launcher's own."""


@pytest.fixture
def announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> sweep.Sweep:
    monkeypatch.setattr(sweep, "out", Console(stderr=True, soft_wrap=True, highlight=False))
    swept = sweep.Sweep()
    config = composed(*SMALL, f"results_dir={tmp_path}")
    swept.begin(lambda: [config], Path("a/now"), "joblib")
    return swept


@pytest.mark.parametrize(
    ("error", "said", "trace"),
    [
        (
            StoppedError("the job\nwas killed"),
            "a job ended before its work (StoppedError): the job\n",
            False,
        ),
        (DataError("no such file"), "a job could not start: no such file", False),
        (RuntimeError("a mistake"), "RuntimeError: a mistake", True),
    ],
)
def test_a_sweep_cut_short_shows_what_there_is(
    announced: sweep.Sweep,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    said: str,
    trace: bool,
) -> None:
    monkeypatch.setattr(StoppedError, "__module__", "submitit.core.utils")
    (planned,) = announced.jobs
    execute(planned.only(planned.cells[:1]), "now", say=lambda _: None)
    assert announced.running
    with pytest.raises(type(error)) as caught:
        raise error
    announced.cut_short(caught.value)
    assert announced.status == 1
    assert not announced.running
    shown = capsys.readouterr()
    assert said in shown.err
    assert ("Traceback" in shown.err) is trace
    assert "random/self seed 0 missing" in shown.err
    assert "mean_loss" in shown.out
    assert len(RecordStore(planned.results).scan().records) == 1
