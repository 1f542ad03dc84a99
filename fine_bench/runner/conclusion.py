"""The end of a sweep: the leaderboard of its records, and which of its cells are not there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from rich.console import Console

from fine_bench.leaderboard import build as leaderboard
from fine_bench.leaderboard import render
from fine_bench.leaderboard import sensitivity_tables as sensitivity_view
from fine_bench.leaderboard.sensitivity import spreads
from fine_bench.leaderboard.tables import Leaderboard, Planned
from fine_bench.retraining.oracles import limits_in
from fine_bench.runner import wandb_log
from fine_bench.runner.plan import Job
from fine_bench.store.records import RecordStore
from fine_bench.terminal import Terminal, marked, record_bar

Draw: TypeAlias = Callable[[RecordStore, Leaderboard], Iterable[tuple[str, Any]]]
"""From the records and the tables to show to figures with their names."""


def conclude(
    jobs: Sequence[Job], sweep: str, out: Console | None = None, draw: Draw | None = None
) -> int:
    """Build, print, write and log the leaderboard.

    Args:
        jobs: of the sweep.
        sweep: its name.
        out: where to say what is there and what is not; the error stream without one.
        draw: draws the figures of the sweep's tables, for W&B; none without it.

    Returns:
        0, or 1 if a planned cell failed or is missing, or a number of these tables cannot be had.
    """
    out = out or Terminal(stderr=True, soft_wrap=True)
    root = jobs[0].results
    store = RecordStore(root)
    with record_bar(out) as bar:
        board = leaderboard.build(store, bar.comparing, jobs[0].packages, limits_in(root))
        bands = spreads(store, store.scan(), bar.comparing)
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
    wandb_log.log_summary(
        jobs, sweep, rows, root / "leaderboard.csv", lambda: draw(store, shown) if draw else ()
    )
    out.print(f"\nread: {store.sources}")
    out.print(f"written: {', '.join(map(str, written))}")
    upload = wandb_log.offline_runs(jobs)
    if upload:
        out.print(f"W&B:     logged offline; upload by: {upload}")
    if bad:
        out.print(marked(f"{len(bad)} of {len(states)} cells are not there:", ""))
        for cell in bad:
            name = f"{cell.estimator}/{cell.target} seed {cell.seed}"
            out.print(f"  {name} {cell.state}: {cell.reason}")
    # a record may be there and its scores damaged: then a number of these tables is missing
    where = tuple({f"{job.data.name}/{job.setting[:8]}: " for job in jobs})
    damaged = [line for line in board.problems if line.startswith(where)]
    for line in damaged:
        out.print(marked("problem:", f" {line}"))
    return 1 if bad or damaged else 0
