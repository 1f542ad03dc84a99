"""Progress of jobs that run in other processes, read from the records that they write.

Works with any launcher, since the results folder is all that the processes share.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from threading import Event, Thread

from rich.console import Console
from rich.markup import escape

from fine_bench.runner.plan import Cell, Job
from fine_bench.store.records import RecordStore
from fine_bench.terminal import bar_on
from fine_bench.types import RunRecord

Describe = Callable[[RunRecord], str]

PAUSE = 1.0
"""Seconds between two looks, at least; looking takes a tenth of the time at most."""


class Follower:
    """A thread that names each finished cell of a sweep and shows the time that remains.

    Args:
        jobs: the jobs of the sweep.
        sweep: its name, which its records carry.
        describe: one line for a record.
        out: where to say it.
    """

    def __init__(self, jobs: Sequence[Job], sweep: str, describe: Describe, out: Console) -> None:
        self.sweep, self.describe, self.out = sweep, describe, out
        stores = {root: RecordStore(root) for root in {job.results for job in jobs}}
        self.open = [
            (stores[job.results], job, cell)
            for job in jobs
            for cell in job.cells
            if job.config.force or job.done(stores[job.results], cell) is None
        ]
        self.several_tasks = len({job.data.name for job in jobs}) > 1
        self._ended = Event()
        self._thread = Thread(target=self._follow, name="follower", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Look a last time, then end."""
        self._ended.set()
        self._thread.join()

    def look(self) -> list[str]:
        """Lines for the cells finished since the last look."""
        lines, still = [], []
        for store, job, cell in self.open:
            record = self._record(store, job, cell)
            if record is None:
                still.append((store, job, cell))
                continue
            task = f"{job.data.name} " if self.several_tasks else ""
            lines.append(f"{task}seed {job.config.seed}: {self.describe(record)}")
        self.open = still
        return lines

    def _record(self, store: RecordStore, job: Job, cell: Cell) -> RunRecord | None:
        record = store.find(**job.identity(cell))
        return record if record is not None and record.sweep == self.sweep else None

    def _follow(self) -> None:
        with bar_on(self.out) as progress:
            bar = progress.add_task("  cells", total=len(self.open))
            pause = PAUSE
            while True:
                ending = self._ended.wait(pause)
                start = time.perf_counter()
                lines = self.look()
                for line in lines:
                    self.out.print("  " + escape(line))
                progress.advance(bar, len(lines))
                if ending:
                    return
                pause = max(PAUSE, 9 * (time.perf_counter() - start))
