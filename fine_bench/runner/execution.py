"""One job, as Hydra calls it: its open cells computed, each record written and said at once."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.loggers import Logger
from rich.text import Text

from fine_bench.runner import launchers, loggers, sweep
from fine_bench.runner.cells import outcomes
from fine_bench.runner.config import check
from fine_bench.runner.plan import Job, TaskCache, plan
from fine_bench.runner.progress import Announcer, CellBar
from fine_bench.runner.sharing import Claims, Process
from fine_bench.runner.write import Writer, Written
from fine_bench.store.files import StoreError
from fine_bench.store.records import RecordStore
from fine_bench.terminal import hidden, marked

log = logging.getLogger(__name__)


def run_job(config: DictConfig) -> None:
    """One job, as Hydra calls it. It never raises for what a seed may do; see ``cells``."""
    hydra = HydraConfig.get()
    command = sweep.current()
    job = None if command is None else command.take(hydra)
    if job is not None:
        _run(job, hydra)
        return
    # a process of its own
    tasks, folder = TaskCache(), folder_of(hydra)
    process = None
    if not OmegaConf.is_missing(hydra.job, "num"):
        process = Process.of(folder, hydra.job.num, config)
    try:
        _run(plan(check(config), tasks), hydra, None if process is None else process.claims())
        if process is not None:
            with hidden(True), suppress(OSError):  # the own job is done, whatever the disk says
                for theirs, claims in process.to_help():
                    help_with(theirs, claims, tasks)
    finally:
        if process is not None:
            process.leave()


def folder_of(hydra: Any) -> Path:
    """Where the sweep, or the single run, keeps its log."""
    return Path(hydra.run.dir if OmegaConf.is_missing(hydra.job, "num") else hydra.sweep.dir)


def _run(job: Job, hydra: Any, claims: Claims | None = None) -> None:
    """Compute a job, with lines where its launcher has a place for them."""
    folder = folder_of(hydra)
    silent = launchers.output_of(launchers.name_of(hydra)) == "nowhere"

    def say(line: str | Text) -> None:
        if not silent:
            sweep.out.print(line)

    name = f"{job.data.name} seed {job.config.seed}"
    say(marked(name, f": {len(job.todo)} cells to compute", "bold"))
    if not job.todo:
        return
    logger = loggers.start_run(job, folder.name, list(hydra.overrides.task))
    with hidden(silent), closing(CellBar(len(job.todo), sweep.out)) as cells:
        written = execute(
            job, folder.name, logger, lambda line: say("  " + line), cells, claims=claims
        )
    if claims is not None:
        written = with_others(job, written, claims)
    loggers.finish_run(logger, job, written)
    if (command := sweep.current()) is not None:
        command.note(job, [one.cell for one in written if one.record.status != "failed"])
    sys.stderr.flush()


def help_with(config: DictConfig, claims: Claims, tasks: TaskCache | None = None) -> list[Written]:
    """Compute cells of another process's job that nobody has begun, from the last ones on.

    Args:
        config: of that job.
        claims: on its cells.
        tasks: data that are at hand.

    Returns:
        what was computed. Whatever ends it is said by that job, which computes the rest; here it is
        in the log of Hydra's job alone, with ``hydra.verbose=true``.
    """
    try:
        job = plan(check(config), tasks)
        job = job.only(claims.leftover(job))
        return execute(job, claims.sweep, say=lambda _: None, claims=claims)
    except Exception:
        log.debug("gave up helping with seed %s of this sweep", config.get("seed"), exc_info=True)
    return []


def with_others(job: Job, written: Sequence[Written], claims: Claims) -> list[Written]:
    """What a job has written, and what others have written of it, in the order of its cells."""
    own = {one.cell: one for one in written}
    store, found = RecordStore(job.results), list[Written]()
    for cell in job.todo:
        if cell in own:
            found.append(own[cell])
        elif (record := job.of_sweep(store, cell, claims.sweep, claims.since)) is not None:
            scores = None
            if record.status == "finished":
                with suppress(StoreError):  # the leaderboard says what is wrong with it
                    scores = store.load_scores(record)
            found.append(Written(cell, record, scores))
    return found


def execute(
    job: Job,
    sweep: str,
    logger: Logger | None = None,
    say: Callable[[str], None] = print,
    busy: Callable[[str], AbstractContextManager[object]] = lambda _: nullcontext(),
    *,
    claims: Claims | None = None,
) -> list[Written]:
    """Compute every open cell of a job, write its record, and say so.

    Args:
        job: what is to be done.
        sweep: name of the sweep, which the records carry.
        logger: is told of the training.
        say: prints a line.
        busy: shows what is being worked on while it lasts.
        claims: see ``outcomes``.
    """
    if not job.todo:
        return []
    announcer = Announcer(say, busy)
    writer = Writer(job, sweep)
    written = []
    for outcome in outcomes(job, logger, announcer, claims):
        written.append(writer.write(outcome))
        announcer.written(written[-1].record)
    return written
