"""Jobs of a sweep that help each other: whose job has ended takes cells of one that goes on.

Three runs on two cores leave a core idle while the third one runs. The process that has nothing
left to do then reads the checkpoints of that run, or trains it once more, unwatched, and computes
cells from the end of the list while their own job computes them from its beginning. The targets of
an estimator, which share work, come one after the other all the same: the two processes meet in one
row. What watches the training stays with its job. Scores do not depend on who computes them, and
each cell is computed once.

All that the processes share is a folder of the sweep:

    shared/sweep.json    how many jobs there are, how many run at once, and when the sweep began
    shared/N.yaml        the configuration of job N once it has begun; locked until its process is
                         free for another one
    shared/N.CELL        locked while somebody computes that cell of job N

The system lets go of a lock when its process dies, so nobody waits for a process that is gone, and
the job itself computes what a helper has left, and once more what has failed in one: memory that
two processes do not find may be there for one.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from itertools import chain, groupby
from pathlib import Path
from typing import Literal

from omegaconf import DictConfig, OmegaConf

from fine_bench.runner.plan import Cell, Job
from fine_bench.store import files
from fine_bench.store.digest import digest
from fine_bench.store.records import RecordStore

State = Literal["waiting", "running", "ended"]

FOLDER, SWEEP = "shared", "sweep.json"

PAUSE, PATIENCE = 0.2, 10.0
"""Seconds between two looks at jobs that others are to begin, and after which to stop looking."""


def open_folder(sweep: Path, jobs: int, at_once: int, since: str) -> None:
    """Let the jobs of a sweep help each other, where there are several and files can be locked.

    Args:
        sweep: its folder.
        jobs: how many there are.
        at_once: how many of them run at the same time, each in a process of its own.
        since: when it began, see ``Job.of_sweep``.
    """
    close_folder(sweep)  # of a sweep that was killed, and had the same folder
    if jobs > 1 and at_once > 1 and files.CAN_LOCK:
        about = json.dumps({"jobs": jobs, "at_once": min(at_once, jobs), "since": since})
        with suppress(files.StoreError):  # a record will say why this disk refuses
            files.write_atomic(sweep / FOLDER / SWEEP, about.encode())


def close_folder(sweep: Path) -> None:
    """Remove what the jobs have shared."""
    shutil.rmtree(sweep / FOLDER, ignore_errors=True)


class Claims:
    """The cells of a job that this process computes: those that nobody else works on.

    Args:
        folder: that is shared.
        number: of the job.
        sweep: the name that the records carry.
        since: when it began; earlier records are none of it.
        helps: whether the job is another process's, which computes what is left over.
    """

    def __init__(
        self, folder: Path, number: int, sweep: str, since: str, *, helps: bool = False
    ) -> None:
        self._folder, self._number = folder, number
        self.sweep, self.since, self.helps = sweep, since, helps

    def cells(self, job: Job) -> Iterator[Cell]:
        """The open cells of a job in their order, each locked until the next one is asked for.

        One that a helper works on comes last, unless the helper has recorded it by then.
        """
        store, taken = RecordStore(job.results), list[Cell]()
        for cell in job.todo:
            with files.held(self._path(cell)) as mine:
                if not mine:
                    taken.append(cell)
                elif job.of_sweep(store, cell, self.sweep, self.since) is None:
                    yield cell
        for cell in [] if self.helps else taken:
            with files.held(self._path(cell), wait=True):
                if job.of_sweep(store, cell, self.sweep, self.since) is None:
                    yield cell

    def leftover(self, job: Job) -> list[Cell]:
        """The open cells of a job that a helper may take: the last estimator's first."""
        rows = [list(row) for _, row in groupby(job.todo, key=lambda cell: cell.estimator)]
        store, found = RecordStore(job.results), list[Cell]()
        for cell in chain.from_iterable(reversed(rows)):
            if not cell.in_run:
                with files.held(self._path(cell)) as free:
                    # by force, and where they failed, cells of this sweep are open to a plan
                    if free and job.of_sweep(store, cell, self.sweep, self.since) is None:
                        found.append(cell)
        return found

    def _path(self, cell: Cell) -> Path:
        name = digest([cell.estimator, cell.estimator_hash, cell.target])
        return self._folder / f"{self._number}.{name[:16]}"


class Process:
    """The process of one job among those of the others.

    Args:
        sweep: the folder of the sweep.
        number: of the job that begins here.
        config: its own.
    """

    def __init__(self, sweep: Path, number: int, config: DictConfig) -> None:
        self.folder, self.number, self.name = sweep / FOLDER, number, sweep.name
        about = json.loads((self.folder / SWEEP).read_text())
        self._jobs, self._at_once = int(about["jobs"]), int(about["at_once"])
        self._since = str(about["since"])
        self._own = ExitStack()
        with files.lock(self.folder):
            files.write_atomic(self._path(number), OmegaConf.to_yaml(config, resolve=True).encode())
            self._own.enter_context(files.held(self._path(number)))

    @classmethod
    def of(cls, sweep: Path, number: int, config: DictConfig) -> Process | None:
        """None where the jobs of the sweep do not help each other, or the disk refuses."""
        if not (sweep / FOLDER / SWEEP).is_file():
            return None
        try:
            return cls(sweep, number, config)
        except (OSError, files.StoreError):  # a record will say why
            return None

    def claims(self) -> Claims:
        """Of the own job."""
        return Claims(self.folder, self.number, self.name, self._since)

    def to_help(self) -> Iterator[tuple[DictConfig, Claims]]:
        """Configurations of jobs that go on, one after the other, and what to claim of each.

        It ends when no other job goes on, or one waits for this process, which is free from then.
        """
        helped, patient = {self.number}, time.monotonic() + PATIENCE
        while True:
            with files.lock(self.folder):
                states = {n: self._state(n) for n in range(self._jobs) if n != self.number}
                waiting = list(states.values()).count("waiting")
                others = self._at_once - list(states.values()).count("running") - 1
                if waiting > max(0, others) or (waiting and time.monotonic() > patient):
                    self.leave()  # so that whoever looks next knows that this process is free
                    return
            if waiting:  # the processes that are free begin these in a moment
                time.sleep(PAUSE)
                continue
            going_on = [n for n, state in states.items() if state == "running" and n not in helped]
            if not going_on:
                return
            helped.add(going_on[0])
            config = OmegaConf.load(self._path(going_on[0]))
            assert isinstance(config, DictConfig)
            yield config, Claims(self.folder, going_on[0], self.name, self._since, helps=True)

    def leave(self) -> None:
        """The job has ended, and its process is free."""
        self._own.close()

    def _path(self, number: int) -> Path:
        return self.folder / f"{number}.yaml"

    def _state(self, number: int) -> State:
        if not self._path(number).exists():
            return "waiting"
        with files.held(self._path(number)) as free:
            return "ended" if free else "running"
