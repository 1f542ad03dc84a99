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
from fine_bench.commands.hydra_help import narrow
from fine_bench.errors import ConfigError, DataError
from fine_bench.leaderboard.tables import Leaderboard
from fine_bench.runner import execution, interruption, sweep
from fine_bench.runner.config import config_folder, refuse_empty_groups, register
from fine_bench.store.records import RecordStore

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
            with narrow(sys.argv[1:]):
                entry(_job)()
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
    return swept.status


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
