"""What the command must know of Hydra's launchers: what brings one, and where its jobs write.

The config group ``launcher`` chooses one. All but ``basic`` come from plugins and run jobs in
processes of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from hydra.errors import MissingConfigException

Output = Literal["terminal", "file", "nowhere"]

BASIC = "basic"

EXTRAS: Mapping[str, str] = {
    "joblib": "joblib",
    "submitit_local": "submitit",
    "submitit_slurm": "submitit",
    "ray": "ray",
}
"""The extra of this package that brings a launcher."""


def name_of(hydra: Any) -> str:
    """The launcher that a ``hydra`` section of a configuration chooses."""
    return str(hydra.runtime.choices.get("hydra/launcher", BASIC))


def output_of(launcher: str) -> Output:
    """Where the lines of a job go.

    Returns:
        ``"terminal"`` for a job in the command's own process, ``"file"`` where each job has a log,
        ``"nowhere"`` where several processes would write over each other on one terminal: the
        command itself then says what they have finished (``progress.Follower``).
    """
    if launcher == BASIC:
        return "terminal"
    return "file" if launcher.startswith("submitit") else "nowhere"


def at_once(hydra: Any) -> int:
    """How many jobs run at the same time, on this machine, in processes that outlive them.

    Returns:
        1 where jobs run one after the other, or nobody here knows.
    """
    if name_of(hydra) != "joblib":
        return 1
    from joblib import effective_n_jobs

    return int(effective_n_jobs(hydra.launcher.n_jobs))


def explain(error: BaseException) -> str | None:
    """What to install, when ``error`` is Hydra's complaint about a launcher that is not there."""
    link: BaseException | None = error
    while link is not None:
        name = str(getattr(link, "missing_cfg_file", None) or "").removeprefix("hydra/launcher/")
        if isinstance(link, MissingConfigException) and name in EXTRAS:
            return (
                f"launcher={name} needs a Hydra plugin that is not installed; type "
                f"pip install 'hydra-{EXTRAS[name]}-launcher>=1.2,<2', or launcher=basic"
            )
        link = link.__cause__ or link.__context__
    return None


def of_launcher(error: BaseException) -> bool:
    """Whether a launcher raised it because a job's process is gone, and not the job's own code."""
    return type(error).__module__.split(".")[0] in ("joblib", "submitit", "ray", "concurrent")
