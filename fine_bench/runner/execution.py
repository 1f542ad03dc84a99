"""One job, as Hydra calls it: its open cells computed, each record written and said at once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.loggers import Logger
from rich.text import Text

from fine_bench.runner import launchers, loggers, sweep
from fine_bench.runner.cells import outcomes
from fine_bench.runner.config import check
from fine_bench.runner.plan import Job, plan
from fine_bench.runner.progress import Announcer, CellBar
from fine_bench.runner.write import Writer, Written
from fine_bench.terminal import hidden, marked


def run_job(config: DictConfig) -> None:
    """One job, as Hydra calls it. It never raises for what a seed may do; see ``cells``."""
    hydra = HydraConfig.get()
    command = sweep.current()
    job = None if command is None else command.take(hydra)
    if job is None:  # a process of its own
        job = plan(check(config))
    folder = Path(
        hydra.sweep.dir if OmegaConf.is_missing(hydra.job, "num") is False else hydra.run.dir
    )
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
        written = execute(job, folder.name, logger, lambda line: say("  " + line), cells)
    loggers.finish_run(logger, job, written)
    if command is not None:
        command.note(job, [one.cell for one in written if one.record.status != "failed"])
    sys.stderr.flush()


def execute(
    job: Job,
    sweep: str,
    logger: Logger | None = None,
    say: Callable[[str], None] = print,
    busy: Callable[[str], AbstractContextManager[object]] = lambda _: nullcontext(),
) -> list[Written]:
    """Compute every open cell of a job, write its record, and say so.

    Args:
        job: what is to be done.
        sweep: name of the sweep, which the records carry.
        logger: is told of the training.
        say: prints a line.
        busy: shows what is being worked on while it lasts.
    """
    if not job.todo:
        return []
    announcer = Announcer(say, busy)
    writer = Writer(job, sweep)
    written = []
    for outcome in outcomes(job, logger, announcer):
        written.append(writer.write(outcome))
        announcer.written(written[-1].record)
    return written
