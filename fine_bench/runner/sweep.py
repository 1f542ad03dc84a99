"""Hydra's side of a run: check every job of a sweep first, run each, then show the leaderboard.

Hydra expands a sweep job by job and stops at the first one that raises, and its callbacks swallow
exceptions. Here all jobs are composed and checked before the first one trains, a job never raises
(its failure becomes a record), and the exit status is taken from the records when all have ended,
whatever launcher ran them.
"""

from __future__ import annotations

import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.markup import escape
from rich.progress import TaskID

from fine_bench.errors import ConfigError, DataError
from fine_bench.leaderboard import build as leaderboard
from fine_bench.leaderboard import render
from fine_bench.leaderboard import sensitivity_tables as sensitivity_view
from fine_bench.leaderboard.sensitivity import spreads
from fine_bench.leaderboard.tables import Planned
from fine_bench.runner import launchers, wandb_log
from fine_bench.runner.cells import describe, execute
from fine_bench.runner.config import check, explain
from fine_bench.runner.plan import Job, plan, refuse_duplicates
from fine_bench.runner.progress import Follower
from fine_bench.store.records import RecordStore
from fine_bench.terminal import bar_on, hidden

BAD_INPUT = 2
INCOMPLETE = 1

_exit_status = 0
_running: SweepHook | None = None

out = Console(stderr=True, highlight=False, soft_wrap=True)


def exit_status() -> int:
    """Of the sweep that has ended: 0, or 1 if a cell failed or is missing."""
    return _exit_status


def refuse(error: Exception) -> NoReturn:
    """Say what is wrong with the input and end the process."""
    out.print(f"[bold red]error:[/] {escape(launchers.explain(error) or explain(error))}")
    raise SystemExit(BAD_INPUT)


def running() -> bool:
    """Whether a sweep has been announced and has not ended."""
    return _running is not None


def cut_short(error: Exception) -> int:
    """End a sweep whose launcher, or one of whose jobs, raised: say why, show what there is.

    Returns:
        the exit status, 1.
    """
    assert _running is not None
    if launchers.of_launcher(error):
        out.print(
            "[bold red]error:[/] the process of a job ended before its work "
            f"({type(error).__name__}): {escape(str(error).strip())}\nOut of memory or of time is "
            "what this is mostly. The same command computes what is missing, and nothing else"
        )
    elif isinstance(error, ConfigError | DataError | HydraException | OmegaConfBaseException):
        out.print(f"[bold red]error:[/] a job could not start: {escape(explain(error))}")
    else:
        traceback.print_exception(error)
    _running.end()
    return INCOMPLETE


def expand(config: DictConfig) -> list[DictConfig]:
    """The configuration of every job of a sweep, as Hydra's basic sweeper will make them."""
    loader = GlobalHydra.instance().config_loader()
    defaults = config.hydra.sweeper.get("params") or {}
    arguments = [f"{key}={value}" for key, value in defaults.items()]
    arguments += list(config.hydra.overrides.task)
    parser = OverridesParser.create(config_loader=loader)
    batches = BasicSweeper.split_arguments(parser.parse_overrides(arguments), None)
    return [
        loader.load_sweep_config(config, list(overrides))
        for batch in batches
        for overrides in batch
    ]


def prepare(configs: Sequence[DictConfig]) -> list[Job]:
    """Check all jobs of a sweep.

    Raises:
        ConfigError, DataError: the first thing that cannot work; nothing has been trained.
    """
    jobs = [plan(check(config)) for config in configs]
    refuse_duplicates(jobs)
    return jobs


def announce(jobs: Sequence[Job], sweep_folder: Path, launcher: str) -> None:
    """Say what will run and where results go."""
    first = jobs[0]
    config = first.config
    seeds = list(dict.fromkeys(job.config.seed for job in jobs))
    tasks = list(dict.fromkeys(job.data.name for job in jobs))
    data = first.data
    out.print(f"[bold]fine_bench[/]  {', '.join(tasks)}, seeds {', '.join(map(str, seeds))}")
    out.print(
        f"  data        {data.n_train:,} training examples, {data.truth.n_bad:,} bad "
        f"({data.truth.rate:.0%}, {data.truth.kind}), {len(data.query_y):,} queries, "
        f"{len(data.test_y):,} test"
    )
    out.print(
        f"  model       {config.model.get('name', config.model['_target_'])}, "
        f"{config.trainer.max_epochs} epochs, batch {config.trainer.batch_size}, "
        f"lr {config.trainer.lr:g}"
    )
    out.print(f"  estimators  {', '.join(config.estimators)}")
    ranges = Counter(cell.variation["of"] for cell in first.cells if cell.variation)
    if ranges:
        words = ", ".join(f"{row} ({n} cells)" for row, n in ranges.items())
        out.print(f"  sensitivity {words}")
    out.print(f"  targets     {', '.join(config.targets)}")
    cells = sum(len(job.cells) for job in jobs)
    done = 0
    if not config.force:
        done = sum(
            job.done(RecordStore(job.results), cell) is not None
            for job in jobs
            for cell in job.cells
        )
    out.print(f"  to compute  {cells - done} of {cells} cells ({done} finished earlier)")
    if launcher != launchers.BASIC:
        out.print(f"  launcher    {launcher}: {len(jobs)} job(s), in processes of their own")
    out.print(f"  results     {config.results_dir}/ (log: {sweep_folder})")
    out.print()


class SweepHook(Callback):
    """What happens before the first job and after the last one."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.folder = Path()
        self.follower: Follower | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Launchers send callbacks to the processes of the jobs: without data and threads."""
        return vars(SweepHook())

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check and announce."""
        launcher = launchers.name_of(config.hydra)
        self._start(lambda: expand(config), Path(config.hydra.sweep.dir), launcher)
        if launcher != launchers.BASIC:
            self.follower = Follower(self.jobs, self.folder.name, describe, out)
            self.follower.start()

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """The same for a single job (``hydra.mode=RUN``)."""
        self._start(lambda: [config], Path(config.hydra.run.dir), launchers.BASIC)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Leaderboard and exit status."""
        self.end()

    def on_run_end(self, config: DictConfig, **kwargs: Any) -> None:
        """The same for a single job."""
        self.end()

    def _start(self, configs: Any, folder: Path, launcher: str) -> None:
        global _running
        try:
            self.jobs = prepare(configs())
        except (ConfigError, DataError, HydraException, OmegaConfBaseException) as error:
            refuse(error)
        except Exception:
            # Hydra would turn it into a warning and go on without a plan
            traceback.print_exc()
            raise SystemExit(INCOMPLETE) from None
        announce(self.jobs, folder, launcher)
        self.folder = folder
        _running = self

    def end(self) -> None:
        """Show the leaderboard and keep the exit status; never raises."""
        global _exit_status, _running
        _running = None
        if self.follower is not None:
            self.follower.stop()
        # Hydra turns an exception in here into a warning and the exit status 0
        try:
            status = conclude(self.jobs, self.folder.name)
        except Exception as error:
            out.print(
                f"[bold red]error:[/] the leaderboard could not be made: {escape(str(error))}"
            )
            status = INCOMPLETE
        _exit_status = status


def conclude(jobs: Sequence[Job], sweep: str) -> int:
    """Build, print, write and log the leaderboard.

    Returns:
        0, or 1 if a planned cell failed or is missing, or a number of these tables cannot be had.
    """
    root = jobs[0].results
    store = RecordStore(root)
    with bar_on(out) as progress:
        bar = progress.add_task("reading records", total=None)

        def reading(done: int, total: int, name: str) -> None:
            progress.update(bar, completed=done, total=total, description=f"comparing {name}")

        board = leaderboard.build(store, reading, jobs[0].packages)
        bands = spreads(store, store.scan(), reading)
    settings = {job.setting for job in jobs}
    shown = replace(board, tables=tuple(t for t in board.tables if t.setting in settings))
    render.show(shown)
    written = render.write(board, root)
    if bands:
        sensitivity_view.show([band for band in bands if band.setting in settings])
        written += sensitivity_view.write(bands, root)
    planned = [
        Planned(job.setting, cell.estimator, cell.estimator_hash, cell.target, job.config.seed)
        for job in jobs
        for cell in job.cells
    ]
    states = leaderboard.cells(store.scan().records, planned)
    bad = [cell for cell in states if cell.state in ("failed", "missing")]
    frame = render.frame(shown)
    rows = [{str(k): v for k, v in row.items()} for row in frame.to_dict("records")]
    wandb_log.log_summary(jobs, sweep, rows, root / "leaderboard.csv")
    out.print(f"\nwritten: {', '.join(map(str, written))}")
    if bad:
        out.print(f"[bold red]{len(bad)} of {len(states)} cells are not there:[/]")
        for cell in bad:
            name = f"{cell.estimator}/{cell.target} seed {cell.seed}"
            out.print(f"  {name} {cell.state}: {escape(cell.reason)}")
    # a record may be there and its scores damaged: then a number of these tables is missing
    where = tuple({f"{job.data.name}/{job.setting[:8]}: " for job in jobs})
    damaged = [line for line in board.problems if line.startswith(where)]
    for line in damaged:
        out.print(f"[bold red]problem:[/] {escape(line)}")
    return INCOMPLETE if bad or damaged else 0


class _Cells:
    """A bar over the cells of a job, with the remaining time; nothing where ``out`` is a file.

    It starts with the first cell: during training Lightning shows a bar of its own.
    """

    def __init__(self, total: int) -> None:
        self.progress = bar_on(out)
        self.total = total
        self.bar: TaskID | None = None

    @contextmanager
    def __call__(self, line: str) -> Iterator[None]:
        """Show what is being worked on while it lasts."""
        number, _, name = line.rpartition(": ")
        if self.bar is None:
            self.progress.start()
            self.bar = self.progress.add_task("", total=self.total)
        self.progress.update(self.bar, description=f"  {name}")
        try:
            yield
        finally:
            self.progress.update(self.bar, advance=1 if number else 0)

    def close(self) -> None:
        """Take the bar away."""
        self.progress.stop()


def run_job(config: DictConfig) -> None:
    """One job, as Hydra calls it. It never raises for what a seed may do; see ``execute``."""
    job = plan(check(config))
    hydra = HydraConfig.get()
    folder = Path(
        hydra.sweep.dir if OmegaConf.is_missing(hydra.job, "num") is False else hydra.run.dir
    )
    sweep = folder.name
    store = RecordStore(job.results)
    todo = [c for c in job.cells if job.config.force or job.done(store, c) is None]
    silent = launchers.output_of(launchers.name_of(hydra)) == "nowhere"

    def say(line: str) -> None:
        if not silent:
            out.print(line)

    say(f"[bold]{job.data.name} seed {job.config.seed}[/]: {len(todo)} cells to compute")
    if not todo:
        return
    logger = wandb_log.start_run(job, sweep)
    with hidden(silent), closing(_Cells(len(todo))) as cells:
        outcomes = execute(job, sweep, logger, lambda line: say("  " + escape(line)), cells)
    wandb_log.finish_run(logger, job, outcomes)
    sys.stderr.flush()
