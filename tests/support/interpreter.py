"""An interpreter that has imported the commands, waits, and forks one child a call.

Starting Python with PyTorch, Lightning and Hydra takes six seconds of a core, the command itself
on a few digits about one. Run as a script, this module pays for the imports once and then listens
on a socket. For each call it forks a child, which leaves the loop below and runs
``python -m MODULE ARGUMENTS`` to the natural end of the interpreter, exit handlers and all: a
process of its own, with its own folder, environment, streams, signals and exit status. What it
shares with the others is no more than imported modules.

:meth:`Interpreter.start` gives a handle with what the tests need of ``subprocess.Popen``.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

PRELOADED = (
    "fine_bench.commands.run",
    "fine_bench.commands.bank",
    "fine_bench.runner.backends.images",
    "wandb",
)
STREAMS = ("out", "err")


class Interpreter:
    """The waiting interpreter, seen from a test; ``folder`` takes its socket."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.address = str(folder / "s")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "support.interpreter", self.address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(environment),
            cwd=folder,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n", "the interpreter did not start"

    def start(
        self,
        module: str,
        arguments: Sequence[str],
        cwd: Path,
        environment: Mapping[str, str],
        streams: Path,
    ) -> Child:
        """``python -m module arguments``; the folder ``streams`` takes what it prints."""
        call = {
            "module": module,
            "arguments": list(arguments),
            "cwd": str(cwd),
            "environment": dict(environment),
            "streams": str(streams),
        }
        return Child(self.address, call, streams)

    def close(self) -> None:
        """It ends with its input, so also when the tests are killed."""
        self.process.communicate()


class Child:
    """A running call: ``pid``, and ``returncode`` once it has ended."""

    def __init__(self, address: str, call: Mapping[str, object], streams: Path) -> None:
        self.returncode: int | None = None
        self.streams = streams
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(address)
        connection.sendall(json.dumps(call).encode() + b"\n")
        self._answers = connection.makefile("r")
        connection.close()  # once the answers are
        self.pid = int(self._answers.readline())
        # a thread reads the status, so that poll() does not block
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with self._answers:
            self.returncode = int(self._answers.readline())

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._reader.join(timeout)
        if self.returncode is None:
            self.kill()
            raise TimeoutError(f"process {self.pid} did not end within {timeout} s")
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def texts(self) -> tuple[str, str]:
        """What it has printed, to its output and to its errors."""
        out, err = ((self.streams / name).read_text() for name in STREAMS)
        return out, err


def _wait_for_a_call(address: str) -> dict[str, object]:
    """Serve calls; returns in the child of each, with what it has to run."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    print("ready", flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the attendants are nobody's business
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            sys.exit()
        connection, _ = listener.accept()
        if os.fork():
            connection.close()
            continue
        # the call's attendant, which knows how its child ends
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        listener.close()
        call: dict[str, object] = json.loads(connection.makefile().readline())
        child = os.fork()
        if child == 0:
            connection.close()
            return call
        connection.sendall(f"{child}\n".encode())
        _, status = os.waitpid(child, 0)
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
        os._exit(0)


def _become(call: Mapping[str, object]) -> str:
    """Take the call's streams, folder, environment and arguments; the module to run."""
    folder = str(call["streams"])
    for number, path in enumerate([os.devnull, *(os.path.join(folder, n) for n in STREAMS)]):
        file = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(call["environment"])  # type: ignore[call-overload]
    os.chdir(str(call["cwd"]))
    sys.path[0] = str(call["cwd"])  # where ``python -m`` has the current folder
    sys.argv[1:] = call["arguments"]  # type: ignore[call-overload]
    module = str(call["module"])
    sys.modules.pop(f"{module}.__main__", None)  # imported already, but not run
    return module


if __name__ == "__main__":
    for preloaded in PRELOADED:
        importlib.import_module(preloaded)
    gc.collect()
    gc.freeze()  # so that the end of a child does not visit, and copy, all that was imported
    wanted = _become(_wait_for_a_call(sys.argv[1]))
    runpy.run_module(wanted, run_name="__main__", alter_sys=True)
