"""``fine-bench run`` and ``python -m fine_bench``: run a sweep and compare the leaderboard.

Hydra reads the arguments. Exit status: 0 done, 1 something failed or is missing, 2 bad input; 130
or 143 interrupted by Ctrl-C or SIGTERM: what is finished is kept, the leaderboard is made.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from fine_bench.commands.common import at_home
from fine_bench.errors import ConfigError, DataError
from fine_bench.leaderboard.tables import Leaderboard
from fine_bench.runner import execution, interruption, sweep
from fine_bench.runner.plan import Job
from fine_bench.runner.schema import config_folder, refuse_empty_groups, register
from fine_bench.store.records import RecordStore

TOP = 10
"""Influential samples in the terminal."""
WORDS = 160
"""Characters of each of them there."""

SHOWN = ("detection_and_consistency", "recall_curves")
"""Figures of a sweep in W&B."""


def main(argv: Sequence[str]) -> int:
    """Run what the overrides ``argv`` ask for; returns the exit status."""
    # Hydra's own handler shortens tracebacks and hides causes; errors are explained here
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv[1:] = multirun_first(at_home(argv))
    register()
    entry = hydra.main(version_base="1.3", config_path=str(config_folder()), config_name="config")
    with interruption.caught(), sweep.command(figures_of) as swept:
        try:
            refuse_empty_groups(argv)
            entry(_job)()
            interruption.raise_lost()
        except (ConfigError, DataError, HydraException, OmegaConfBaseException) as error:
            if not swept.running:
                sweep.refuse(error)
            swept.cut_short(error)
        except KeyboardInterrupt as stop:
            swept.interrupted(stop)
        except Exception as error:
            if not swept.running:
                raise
            swept.cut_short(error)
    if swept.jobs and not swept.running:
        show_influential(swept.jobs)
    return swept.status


def show_influential(jobs: Sequence[Job]) -> None:
    """Which samples of the user's own language data drive the given completions, with their text.

    The first ``TOP`` in the terminal, all in a csv, the first of them on a page. Nothing is said of
    other data.
    """
    if not any(job.data.files for job in jobs):
        return
    from fine_bench.report.influential import influential_page, interval
    from fine_bench.runner.influential import listings
    from fine_bench.store.files import StoreError, make_folder, write_atomic
    from fine_bench.store.spreadsheet import to_csv
    from fine_bench.terminal import Terminal, visible

    out = Terminal(soft_wrap=True)
    found = listings(jobs)
    if not found:
        out.print(
            "\nno list of influential samples: it takes scores of f-INE on the given completions; "
            "type 'estimator=[fine_llm]' 'targets=[validation]'"
        )
    for one in found:
        seeds = f"seed{'s' * (len(one.seeds) > 1)} {', '.join(map(str, one.seeds))}"
        about = (
            f"{one.task}: what training on a sample does to the given completions, as "
            f"{one.estimator} sees it ({seeds}). μ > 0 makes them likelier; 95 % interval"
        )
        out.print(f"\n{about}")
        for row in one.table.head(TOP).to_dict("records"):
            words = visible(f"{row['prompt']} → {row['completion']}")
            short = words if len(words) <= WORDS else f"{words[:WORDS]}…"
            source = visible(row["source"] or "source unknown")
            out.print(
                f"{row['rank']:>3}. μ {interval(row)} · {source} · line {row['line']} · {short}"
            )
        title = f"{one.task}: influential samples"
        page = influential_page(one.table, title=title, about=about)
        try:
            make_folder(one.path.parent)
            for ending, content in ((".csv", to_csv(one.table).encode()), (".html", page)):
                write_atomic(one.path.with_name(one.path.name + ending), content)
        except StoreError as error:
            out.print(f"the list could not be written: {error}")
        else:
            out.print(f"all {len(one.table):,} with their text: {one.path}.csv and .html")


def multirun_first(arguments: Sequence[str]) -> list[str]:
    """The same arguments with ``-m`` in front, and with it where nothing speaks against it.

    Hydra's parser takes one run of overrides only: with ``-m`` between them, as in
    ``+experiment=mnist_mislabel -m seed=0,1,2``, it refuses what follows. Without it Hydra asks the
    configuration for the mode, which is the same one; but where that has a mistake, it complains
    about the commas of ``seed=0,1,2`` and not about the mistake.
    """
    rest = [a for a in arguments if a not in ("-m", "--multirun")]
    given = len(rest) < len(arguments)
    free = not any(a.startswith(("-", "hydra.mode=")) for a in rest)
    return ["-m", *rest] if given or free else rest


def figures_of(store: RecordStore, shown: Leaderboard) -> Iterator[tuple[str, Any]]:
    """Detection beside consistency, and recall curves, of each table: what W&B shows of a sweep.

    Figures whose numbers are not there are left out.
    """
    from fine_bench.report.figures.collection import Measures, draw
    from fine_bench.report.figures.tables import suffixes, table_results

    names = suffixes(shown.tables)
    found = table_results(store, shown, store.scan())
    keys = [(one.table.task, one.table.setting, one.table.data) for one in found]
    for drawn in draw(found, [names[key] for key in keys], Measures(), SHOWN):
        if drawn.figure is not None:
            yield drawn.name, drawn.figure


def _job(config: DictConfig) -> None:
    execution.run_job(config)
