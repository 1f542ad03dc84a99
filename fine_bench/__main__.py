"""``fine-bench COMMAND`` and ``python -m fine_bench``: the first word picks a command.

Everything else goes to Hydra, as ``fine-bench run`` does. ``fine-bench`` alone lists the commands.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches

from fine_bench import __version__
from fine_bench.commands import COMMANDS, hydra_help

REFUSED = 2


def main() -> None:
    """The program ``fine-bench``."""
    arguments = sys.argv[1:]
    if arguments[:1] in ([], ["-h"], ["--help"]):
        print(overview())
        sys.exit(0)
    if arguments[0] in ("-V", "--version"):
        print(f"fine-bench {__version__}")
        sys.exit(0)
    sys.exit(call(arguments))


def call(arguments: Sequence[str]) -> int:
    """Run a command, or Hydra's where the first word is none; returns the exit status."""
    first = arguments[0] if arguments else ""
    if first in COMMANDS:
        sys.argv[0] = f"fine-bench {first}"
        return _main_of(first, arguments[1:])
    if re.fullmatch(r"[A-Za-z][\w-]*", first):  # neither an override nor an option of Hydra's
        print(unknown(first), file=sys.stderr)
        return REFUSED
    return _main_of("run", arguments)


def _main_of(command: str, arguments: Sequence[str]) -> int:
    if command in hydra_help.CONFIGS and hydra_help.asked(arguments):
        return hydra_help.show(command, arguments)
    status: int = importlib.import_module(f"fine_bench.commands.{command}").main(arguments)
    return status


def unknown(word: str) -> str:
    """What to say of a word that is no command."""
    near = get_close_matches(word.lower(), COMMANDS)
    meant = f"did you mean {' or '.join(near)}? " if near else ""
    return (
        f"fine-bench has no command {word!r}; {meant}`fine-bench` lists them all, and an override "
        "of the configuration is written key=value"
    )


def overview() -> str:
    """The list of the commands."""
    width = max(map(len, COMMANDS)) + 2
    return "\n".join(
        [
            "usage: fine-bench COMMAND [ARGUMENTS]",
            "",
            "Training-data influence under training randomness, measured reproducibly.",
            "",
            "Commands:",
            *(f"  {name:<{width}}{line}" for name, line in COMMANDS.items()),
            "",
            "`fine-bench COMMAND --help` says more. Begin with `fine-bench run`, which takes three",
            "seeds on the digits, offline, in a few minutes; then `fine-bench report`.",
        ]
    )


if __name__ == "__main__":
    sys.exit(call(sys.argv[1:]))
