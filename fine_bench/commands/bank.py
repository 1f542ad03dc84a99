"""``fine-bench bank``: train the models of a bank, or those that it lacks.

Hydra reads the arguments. Exit status: 0 done, 1 something failed, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from fine_bench.commands.common import DONE, INCOMPLETE, INTERRUPTED, REFUSED, at_home
from fine_bench.errors import ConfigError, DataError
from fine_bench.retraining.build import WorkerError
from fine_bench.retraining.train import DivergedModelError
from fine_bench.runner import bank_config
from fine_bench.runner.bank import BankJob, out
from fine_bench.runner.config import explain
from fine_bench.runner.schema import config_folder, refuse_empty_groups, register
from fine_bench.store.files import StoreError
from fine_bench.terminal import marked
from fine_bench.types import UnsupportedProblemError


def main(argv: Sequence[str]) -> int:
    """Train what the overrides ``argv`` ask for; 0 done, or an exit with another status."""
    # Hydra's own handler shortens tracebacks and hides causes; errors are explained here
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv[1:] = argv = at_home(argv)
    if {"-m", "--multirun"} & set(argv):
        _end("a bank is one job, whose models get seeds of their own; leave out -m", REFUSED)
    register()
    run = hydra.main(version_base="1.3", config_path=str(config_folder()), config_name="bank")
    with _explained():
        refuse_empty_groups(argv)
        run(_job)()
    return DONE


@contextmanager
def _explained() -> Iterator[None]:
    """Turn what may be expected to go wrong into one line and an exit status."""
    try:
        yield
    except (ConfigError, DataError, HydraException, OmegaConfBaseException) as error:
        _end(explain(error), REFUSED)
    except UnsupportedProblemError as error:
        _end(f"model: {error}", REFUSED)
    except (StoreError, WorkerError, DivergedModelError) as error:
        _end(str(error), INCOMPLETE)
    except KeyboardInterrupt:
        _end("interrupted; what is stored stays, the same command goes on from there", INTERRUPTED)


def _end(message: str, status: int) -> NoReturn:
    out.print(marked("error:", f" {message}"))
    raise SystemExit(status)


def _job(cfg: DictConfig) -> None:
    with _explained():  # in here too: Hydra would add its own lines to an error
        config, bank = bank_config.check(cfg)
        BankJob.prepare(config, bank).run()
