"""Hydra's side of a run: check every job of a sweep first, run each, then show the leaderboard.

Hydra expands a sweep job by job and stops at the first one that raises, and its callbacks swallow
exceptions. Here all jobs are composed and checked before the first one trains, a job never raises
(its failure becomes a record), and the exit status is taken from the records when all have ended,
whatever launcher ran them.

A ``Sweep`` belongs to the command that runs it. Hydra makes the callback ``SweepHook`` and calls
``execution.run_job`` by their names and hands nothing back, so both find the command's sweep in
the context that ``command`` opens; in the process of another launcher's job there is none.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from fine_bench.errors import ConfigError, DataError
from fine_bench.runner import interruption, launchers, sharing
from fine_bench.runner.conclusion import Draw, conclude
from fine_bench.runner.config import check, explain
from fine_bench.runner.plan import Cell, Job, plan_sweep
from fine_bench.runner.progress import Follower
from fine_bench.store.records import now
from fine_bench.terminal import Terminal, marked

BAD_INPUT = 2
INCOMPLETE = 1

out = Terminal(stderr=True, soft_wrap=True)


class Sweep:
    """The jobs of one command, planned once, and how they ended.

    Args:
        draw: draws figures at the end, for W&B; none without it.

    Attributes:
        jobs: as they were planned.
        folder: of the sweep; its name is that of the sweep.
        running: whether the sweep has been announced and has not ended.
        concluding: whether its end has begun.
        status: exit status of what has ended: 0, or 1 if a cell failed or is missing.
    """

    def __init__(self, draw: Draw | None = None) -> None:
        self.jobs: list[Job] = []
        self._draw = draw
        self.folder = Path()
        self.running = self.concluding = False
        self.status = 0
        self._planned: dict[tuple[str, ...], Job] = {}
        self._written: set[tuple[str, ...]] = set()
        self._follower: Follower | None = None

    def begin(
        self,
        configs: Callable[[], Sequence[DictConfig]],
        folder: Path,
        launcher: str,
        at_once: int = 1,
    ) -> None:
        """Plan all jobs, say what will run, and follow those that run in other processes.

        Bad input ends the process: Hydra would turn an exception into a warning and go on.

        Args:
            configs: composes those of the jobs.
            folder: of the sweep.
            launcher: its name.
            at_once: see ``launchers.at_once``.
        """
        try:
            composed = configs()
            self.jobs = plan_sweep([check(config) for config in composed])
        except (ConfigError, DataError, HydraException, OmegaConfBaseException) as error:
            refuse(error)
        except Exception:
            traceback.print_exc()
            raise SystemExit(INCOMPLETE) from None
        self._planned = {
            _overrides(config.hydra): job for config, job in zip(composed, self.jobs, strict=True)
        }
        self.folder = folder
        announce(self.jobs, folder, launcher)
        since = now() if at_once > 1 else ""  # clocks of other machines may be behind
        sharing.open_folder(folder, len(self.jobs), at_once, since)
        self.running = True
        if launcher != launchers.BASIC:
            self._follower = Follower(self.jobs, folder.name, since, out)
            self._follower.start()

    def take(self, hydra: Any) -> Job | None:
        """The planned job that Hydra runs now, without what earlier jobs have done of it.

        Two jobs of a sweep over estimators may share a cell; the first of them computes it.
        """
        job = self._planned.get(_overrides(hydra))
        if job is None or job.config.force:
            return job
        return job.only(c for c in job.todo if _key(job, c) not in self._written)

    def note(self, job: Job, cells: Sequence[Cell]) -> None:
        """Cells of a job that need not be computed again."""
        self._written |= {_key(job, cell) for cell in cells}

    def end(self) -> None:
        """Show the leaderboard and keep the exit status; never raises."""
        if self.running:
            sharing.close_folder(self.folder)
        self.running, self.concluding = False, True
        if self._follower is not None:
            self._follower.stop()
        # Hydra turns an exception in here into a warning and the exit status 0
        try:
            self.status = conclude(self.jobs, self.folder.name, out, self._draw)
        except Exception as error:
            out.print(marked("error:", f" the leaderboard could not be made: {error}"))
            self.status = INCOMPLETE

    def cut_short(self, error: Exception) -> None:
        """End a sweep whose launcher, or one of whose jobs, raised: say why, show what there is."""
        if launchers.of_launcher(error):
            out.print(
                marked(
                    "error:",
                    " the process of a job ended before its work "
                    f"({type(error).__name__}): {str(error).strip()}\nOut of memory or of time is "
                    "what this is mostly. The same command computes what is missing, and nothing "
                    "else",
                )
            )
        elif isinstance(error, ConfigError | DataError | HydraException | OmegaConfBaseException):
            out.print(marked("error:", f" a job could not start: {explain(error)}"))
        else:
            traceback.print_exception(error)
        self.end()
        self.status = INCOMPLETE

    def interrupted(self, stop: KeyboardInterrupt) -> None:
        """End a sweep that was asked to stop: say how to go on, show what there is."""
        word = "SIGTERM" if isinstance(stop, interruption.Terminated) else "Ctrl-C"
        if not self.jobs or self.concluding:
            out.print(marked("interrupted", f" by {word}; the same command goes on from here"))
        else:
            out.print(
                marked(
                    "interrupted",
                    f" by {word}: what is finished is kept; the same command computes what is "
                    "missing, and nothing else",
                )
            )
            try:
                self.end()
            except KeyboardInterrupt:
                out.print("interrupted again; `fine-bench leaderboard` makes the tables")
        self.status = interruption.status_of(stop)


def _overrides(hydra: Any) -> tuple[str, ...]:
    """What tells the jobs of a sweep apart: the overrides that each was composed with."""
    return tuple(hydra.overrides.task)


def _key(job: Job, cell: Cell) -> tuple[str, ...]:
    return (str(job.results), *map(str, job.identity(cell).values()))


def refuse(error: Exception) -> NoReturn:
    """Say what is wrong with the input and end the process."""
    out.print(marked("error:", f" {launchers.explain(error) or explain(error)}"))
    raise SystemExit(BAD_INPUT)


# ------------------------------------------------------------------------- what Hydra calls by name

_COMMAND: ContextVar[Sweep] = ContextVar("sweep of the command that runs in this process")


def current() -> Sweep | None:
    """The sweep of the command that runs in this process; None in a job's own process."""
    return _COMMAND.get(None)


@contextmanager
def command(draw: Draw | None = None) -> Iterator[Sweep]:
    """The sweep that Hydra's callback and jobs find meanwhile.

    Args:
        draw: see ``Sweep``.
    """
    sweep = Sweep(draw)
    token = _COMMAND.set(sweep)
    try:
        yield sweep
    finally:
        _COMMAND.reset(token)


class SweepHook(Callback):
    """Hydra's events, told to the sweep of the command. It holds nothing: launchers send it."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check and announce."""
        hydra = config.hydra
        folder = Path(hydra.sweep.dir)
        name, at_once = launchers.name_of(hydra), launchers.at_once(hydra)
        _COMMAND.get().begin(lambda: expand(config), folder, name, at_once)

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """The same for a single job (``hydra.mode=RUN``)."""
        _COMMAND.get().begin(lambda: [config], Path(config.hydra.run.dir), launchers.BASIC)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Leaderboard and exit status."""
        _COMMAND.get().end()

    def on_run_end(self, config: DictConfig, **kwargs: Any) -> None:
        """The same for a single job."""
        _COMMAND.get().end()


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


def announce(jobs: Sequence[Job], sweep_folder: Path, launcher: str) -> None:
    """Say what will run and where results go."""
    first = jobs[0]
    config = first.config
    seeds = list(dict.fromkeys(job.config.seed for job in jobs))
    tasks = list(dict.fromkeys(job.data.name for job in jobs))
    data = first.data
    about = f"  {', '.join(tasks)}, seeds {', '.join(map(str, seeds))}"
    out.print(marked("fine_bench", about, "bold"))
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
    cells, todo = sum(len(job.cells) for job in jobs), sum(len(job.todo) for job in jobs)
    out.print(f"  to compute  {todo} of {cells} cells ({cells - todo} finished earlier)")
    if launcher != launchers.BASIC:
        out.print(f"  launcher    {launcher}: {len(jobs)} job(s), in processes of their own")
    out.print(f"  results     {config.results_dir}/ (log: {sweep_folder})")
    out.print()
