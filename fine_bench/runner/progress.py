"""What is said while a job runs: its lines, the bar over its cells, and jobs of other processes.

The progress of other processes is read from the records that they write: that works with any
launcher, since the results folder is all that the processes share.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Event, Thread

from rich.console import Console
from rich.progress import TaskID

from fine_bench.runner.plan import Job
from fine_bench.store.records import RecordStore
from fine_bench.terminal import bar_on
from fine_bench.types import RunRecord

PAUSE = 1.0
"""Seconds between two looks at the records, at least; looking takes a tenth of the time at most."""

SHOWN_GROUPS = 10


def describe(record: RunRecord) -> str:
    """One line for the terminal."""
    name = f"{record.estimator:<20} {record.target:<11}"
    if record.status != "finished":
        return f"{name} {record.status}: {record.reason}"
    found = f"AUROC {record.metrics['auroc']:.3f}" if "auroc" in record.metrics else " " * 11
    for metric, label in (("fidelity", "fidelity"), ("lds", "LDS")):
        if metric in record.metrics:
            value = record.metrics[metric]  # scores that are the same for all rank nothing
            found += f"  {label} {value:.3f}" if math.isfinite(value) else f"  {label} undefined"
    return f"{name} {found}   {record.cost.get('seconds', math.nan):6.1f} s"


def describe_groups(record: RunRecord) -> list[str]:
    """A line for each group that was tested: its influence with the test's own interval."""
    metrics = record.metrics
    names = [k[len("group/") : -len("/mu")] for k in metrics if re.fullmatch(r"group/.*/mu", k)]
    lines = []
    for name in names[:SHOWN_GROUPS]:
        mu, low, high, p, size = (
            metrics.get(f"group/{name}/{part}", math.nan)
            for part in ("mu", "lower", "upper", "p_value", "size")
        )
        lines.append(f"  {name} ({size:g}): {_tested(mu, low, high, p)}")
    if len(names) > SHOWN_GROUPS:
        lines.append(f"  and {len(names) - SHOWN_GROUPS} more groups, in the record")
    return lines


def _tested(mu: float, low: float, high: float, p: float) -> str:
    """A group's influence; what a run has too few samples for is said to be unknown."""
    if not math.isfinite(mu):
        return "μ unknown: too few samples with and without it in this run"
    between = f" [{low:+.2f}, {high:+.2f}]" if math.isfinite(high - low) else ", interval unknown"
    return f"μ {mu:+.2f}{between}" + (f", p = {p:.2g}" if math.isfinite(p) else "")


class Announcer:
    """Says what happens in a job.

    Args:
        say: prints a line.
        busy: shows what is being worked on while it lasts.
    """

    def __init__(
        self,
        say: Callable[[str], None],
        busy: Callable[[str], AbstractContextManager[object]] = lambda _: nullcontext(),
    ) -> None:
        self.say, self.busy = say, busy

    def reused(self) -> None:
        """Nothing is trained."""
        self.say("checkpoints of an earlier run are complete: not trained again")

    def trained(self, description: str) -> None:
        """The model is there, trained or read."""
        self.say(description)

    def trained_auxiliary(self, seconds: float) -> None:
        """The second run, which some methods subtract, is done."""
        self.say(f"trained the auxiliary run: {seconds:.1f} s")

    def written(self, record: RunRecord) -> None:
        """A cell is done."""
        self.say(describe(record))
        for line in describe_groups(record):
            self.say(line)


class CellBar:
    """A bar over the cells of a job, with the remaining time; nothing where ``out`` is a file.

    It starts with the first cell: during training Lightning shows a bar of its own.

    Args:
        total: number of cells.
        out: where to show it.
    """

    def __init__(self, total: int, out: Console) -> None:
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


class Follower:
    """A thread that names each finished cell of a sweep and shows the time that remains.

    Args:
        jobs: the jobs of the sweep.
        sweep: its name, which its records carry.
        since: when it began; earlier records are none of it.
        out: where to say it.
    """

    def __init__(self, jobs: Sequence[Job], sweep: str, since: str, out: Console) -> None:
        self.sweep, self.since, self.out = sweep, since, out
        stores = {root: RecordStore(root) for root in {job.results for job in jobs}}
        self.open = [(stores[job.results], job, cell) for job in jobs for cell in job.todo]
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
            record = job.of_sweep(store, cell, self.sweep, self.since)
            if record is None:
                still.append((store, job, cell))
                continue
            task = f"{job.data.name} " if self.several_tasks else ""
            lines.append(f"{task}seed {job.config.seed}: {describe(record)}")
        self.open = still
        return lines

    def _follow(self) -> None:
        with bar_on(self.out) as progress:
            bar = progress.add_task("  cells", total=len(self.open))
            pause = PAUSE
            while True:
                ending = self._ended.wait(pause)
                start = time.perf_counter()
                lines = self.look()
                for line in lines:
                    self.out.print("  " + line)
                progress.advance(bar, len(lines))
                if ending:
                    return
                pause = max(PAUSE, 9 * (time.perf_counter() - start))
