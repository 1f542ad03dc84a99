"""The help of a Hydra command: its configuration, within the width of a terminal, and at once.

Nothing is imported for it but Hydra and the schema: neither PyTorch nor what a run needs.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from fine_bench.commands.common import DONE, at_home

if TYPE_CHECKING:
    from omegaconf import DictConfig

WIDTH = 100

CONFIGS: Final[Mapping[str, str]] = {"run": "config", "bank": "bank"}
"""The file of ``conf`` that each Hydra command begins with."""


def asked(arguments: Sequence[str]) -> bool:
    """Whether the arguments of a Hydra command ask for its help."""
    return bool({"-h", "--help"} & set(arguments))


def show(command: str, arguments: Sequence[str]) -> int:
    """Print the help of a Hydra command, with the configuration that the overrides make.

    What is wrong with the overrides is said by the command itself.

    Args:
        command: one of ``CONFIGS``.
        arguments: of the command; ``asked`` of them.

    Returns:
        the exit status.
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from fine_bench.errors import ConfigError
    from fine_bench.runner import schema

    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv[1:] = at_home(arguments)
    schema.register()
    name, folder = CONFIGS[command], str(schema.config_folder())
    entry = hydra.main(version_base="1.3", config_path=folder, config_name=name)
    printed = io.StringIO()
    try:
        schema.refuse_empty_groups(arguments)
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            entry(_nothing)()  # Hydra ends the process after its help
    except (ConfigError, HydraException, OmegaConfBaseException):
        GlobalHydra.instance().clear()
        status: int = importlib.import_module(f"fine_bench.commands.{command}").main(arguments)
        return status
    sys.stdout.write(wrapped(printed.getvalue()))
    return DONE


def _nothing(config: DictConfig) -> None:
    """Hydra runs no job for its help."""


def wrapped(text: str) -> str:
    """Long lines, such as the names of all estimators, broken at blanks and set in."""
    lines = []
    for line in text.splitlines():
        if len(line) <= WIDTH:
            lines.append(line)
            continue
        indent = " " * (len(line) - len(line.lstrip()) + 4)
        lines += textwrap.wrap(
            line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )
    return "\n".join(lines).rstrip() + "\n"
