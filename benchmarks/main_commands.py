"""Wall time and peak memory of the README's commands, each in a process of its own.

    FINE_BENCH_DATA=... python benchmarks/main_commands.py [digits] [mnist] [mnist_all]

``digits``: ``python -m fine_bench``. ``mnist``: the three-seed MNIST experiment with f-INE, TracIn
and four controls. ``mnist_all``: the same with every method of the experiment file. Results go to
a temporary folder, so that nothing is found finished.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time

FEW = "estimator=[fine,tracin,mean_loss,gradient_norm,random,constant]"
MNIST = ["+experiment=mnist_mislabel", "-m", "seed=0,1,2"]
COMMANDS: dict[str, list[str]] = {
    "digits": [],
    "mnist": [*MNIST, FEW],
    "mnist_all": MNIST,
}


def main() -> None:
    """Run what was asked for and print one line each."""
    chosen = sys.argv[1:] or list(COMMANDS)
    for name in chosen:
        if name not in COMMANDS:
            raise SystemExit(f"unknown command {name!r}; there are: {', '.join(COMMANDS)}")
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "fine_bench", *COMMANDS[name]]
            start = time.perf_counter()
            process = subprocess.Popen(
                [*command, f"results_dir={folder}"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - start
        print(
            f"{name:<10} {seconds:7.1f} s   {usage.ru_maxrss / 2**20:5.2f} GiB   "
            f"exit {os.waitstatus_to_exitcode(status)}   {' '.join(command[1:])}",
            flush=True,
        )


if __name__ == "__main__":
    main()
