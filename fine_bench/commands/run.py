"""``fine-bench run`` and ``python -m fine_bench``: run a sweep and compare the leaderboard.

Hydra reads the arguments. Exit status: 0 done, 1 something failed or is missing, 2 bad input; 130
or 143 interrupted by Ctrl-C or SIGTERM: what is finished is kept, the leaderboard is made.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from fine_bench.commands.common import at_home
from fine_bench.commands.hydra_help import narrow
from fine_bench.errors import ConfigError, DataError
from fine_bench.runner import execution, interruption, sweep
from fine_bench.runner.config import config_folder, refuse_empty_groups, register


def main(argv: Sequence[str]) -> int:
    """Run what the overrides ``argv`` ask for; returns the exit status."""
    # Hydra's own handler shortens tracebacks and hides causes; errors are explained here
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv[1:] = multirun_first(at_home(argv))
    register()
    entry = hydra.main(version_base="1.3", config_path=str(config_folder()), config_name="config")
    with interruption.caught(), sweep.command() as swept:
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


def _job(config: DictConfig) -> None:
    execution.run_job(config)
