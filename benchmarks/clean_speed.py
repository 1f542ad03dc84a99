"""How long ``fine-bench clean`` takes: to the first ranking, and to the end.

Each call runs in a process of its own, as typed (three runs, with f-INE's μ), on files made
before: images of MNIST with ``--model mlp``, of CIFAR-10 with the default of images (``gn_cnn``),
paragraphs of docstrings (twelve words or more, of twelve packages), and a table of 20 numbers and a
category. A tenth of the labels is flipped; CIFAR-10 has people's labels. CPU seconds are those of
the call and its children, its imports among them, and are what counts where the machine is shared:
there the seconds on the clock say as much of others. *First* is counted until the ranking of the
first run is in the folder.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from clean_against_cleanlab import PACKAGES, flip, paragraphs
from numpy.typing import NDArray
from outputs import add_out, made_earlier, table_files

from fine_bench.seeds import derive

RESULTS = Path("results")
NUMBERS = ("rows", "first_wall", "first_cpu", "wall", "cpu")
ROWS = (2000, 10_000)
KINDS = ("mnist", "cifar10", "text", "table")
MORE = ("numpy", "scipy", "pandas", "sklearn", "torch", "matplotlib")
OPTIONS = {"mnist": ("--model", "mlp")}
WHAT = {
    "mnist": "images 28 × 28, `--model mlp`",
    "cifar10": "images 3 × 32 × 32, `gn_cnn`",
    "text": "texts, TF–IDF and a linear layer",
    "table": "table of 21 columns, one hidden layer",
}


@dataclass(frozen=True)
class Line:
    """A row of the table; times in seconds.

    Attributes:
        kind, rows: what was cleaned.
        first_wall, wall: from the start of the process.
        first_cpu, cpu: of it.
    """

    kind: str
    rows: int
    first_wall: float
    first_cpu: float
    wall: float
    cpu: float


def make(kind: str, n: int, folder: Path) -> Path:
    """A file of ``n`` rows, a tenth of its labels wrong."""
    rng = np.random.default_rng(derive(0, f"clean_speed/{kind}"))
    if kind in ("mnist", "cifar10"):
        if kind == "mnist":
            from fine_bench.data.mnist import mnist_mislabel

            task = mnist_mislabel(seed=0, n_train=n, noise_rate=0.1)
        else:
            from fine_bench.data.cifar10n import cifar10n

            task = cifar10n(seed=0, n_train=10_000)
        path = folder / f"{kind}.npz"
        np.savez(path, x=task.x.numpy()[:n], y=task.y.numpy()[:n])
        return path
    path = folder / f"{kind}.csv"
    table, y = (_texts if kind == "text" else _numbers)(n, rng)
    table["label"] = flip(y, int(y.max()) + 1, rng)
    table.to_csv(path, index=False)
    return path


def _texts(n: int, rng: np.random.Generator) -> tuple[pd.DataFrame, NDArray[np.int64]]:
    found = [(k, text) for k, name in enumerate((*PACKAGES, *MORE)) for text in paragraphs(name)]
    rows = rng.permutation(len(found))
    if len(found) < n:
        # fewer paragraphs than rows: others are made of the halves of two of one package
        rows = np.concatenate([rows, rng.integers(len(found), size=n - len(found))])
    chosen = [found[k] for k in rows[:n].tolist()]
    texts = [text for _, text in chosen]
    y = np.array([k for k, _ in chosen], dtype=np.int64)
    for row in range(len(found), n):
        same = np.flatnonzero(y[: len(found)] == y[row])
        words = texts[int(rng.choice(same))].split()
        own = texts[row].split()
        texts[row] = " ".join([*own[: len(own) // 2], *words[len(words) // 2 :]])
    return pd.DataFrame({"text": texts}), y


def _numbers(n: int, rng: np.random.Generator) -> tuple[pd.DataFrame, NDArray[np.int64]]:
    from sklearn.datasets import make_classification

    x, y = make_classification(
        n, 20, n_informative=8, n_redundant=6, n_classes=4, class_sep=1.5, random_state=0
    )
    table = pd.DataFrame(x, columns=[f"x{k}" for k in range(x.shape[1])])
    table["colour"] = np.array(["red", "green", "blue"])[(y + rng.integers(0, 2, n)) % 3]
    return table, y.astype(np.int64)


def measure(kind: str, n: int) -> Line:
    """Time one call."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        data = make(kind, n, folder)
        out = folder / "out"
        call = [sys.executable, "-m", "fine_bench", "clean", str(data), "--out", str(out),
                *OPTIONS.get(kind, ())]  # fmt: skip
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        start = time.perf_counter()
        with subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            early = _early(process.pid, out / "runs" / "first_ranking.csv", start)
            _, said = process.communicate()
            found = early()
        wall = time.perf_counter() - start
        if process.returncode:
            raise RuntimeError(f"{' '.join(call)} failed: {said.decode()[-2000:]}")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return Line(kind, n, *found, wall, cpu)


def _early(pid: int, path: Path, start: float) -> Callable[[], tuple[float, float]]:
    """Watch for a file; what is returned waits and gives wall and CPU seconds of that moment."""
    seen: list[tuple[float, float]] = []
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            if path.exists():
                seen.append((time.perf_counter() - start, _cpu_of(pid)))
                return
            time.sleep(0.05)

    thread = threading.Thread(target=watch)
    thread.start()

    def wait() -> tuple[float, float]:
        over.set()
        thread.join()
        return seen[0] if seen else (float("nan"), float("nan"))

    return wait


def _cpu_of(pid: int) -> float:
    """CPU seconds of a living process, where /proc says so; NaN elsewhere."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return float("nan")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def joined(measured: Sequence[Line], before: Sequence[Line]) -> list[Line]:
    """All rows in the order of the kinds; what was measured takes the place of what was before."""
    found = {(one.kind, one.rows): one for one in (*before, *measured)}
    return sorted(found.values(), key=lambda one: (KINDS.index(one.kind), one.rows))


def recalled(table: Path) -> list[Line]:
    """The rows of a file that this script wrote before.

    Raises:
        SystemExit: the file is no such table; says what to do.
    """
    found = made_earlier(table, ["kind"], NUMBERS).itertuples(index=False)
    return [Line(x[0], int(x[1]), *map(float, x[2:])) for x in found if x[0] in KINDS]


def to_markdown(lines: Sequence[Line]) -> str:
    """The page."""
    said = [
        "# Cleaning: how long it takes",
        "",
        "Made by `python benchmarks/clean_speed.py`; a row alone by `--kinds KIND --rows N`, which "
        f"leaves the others. {os.cpu_count()} cores, one call at a time; threads of PyTorch: "
        f"{os.environ.get('OMP_NUM_THREADS', 'as it chooses')}.",
        "",
        *(part for part in (__doc__ or "").split("\n\n", 1)[1].strip().splitlines()),
        "",
        "| data | rows | first ranking, s of CPU | end, s of CPU | first, s | end, s |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in lines:
        said.append(
            f"| {one.kind}: {WHAT[one.kind]} | {one.rows:,} | {one.first_cpu:.0f} | "
            f"{one.cpu:.0f} | {one.first_wall:.0f} | {one.wall:.0f} |"
        )
    return "\n".join([*said, ""])


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    add_out(parser, RESULTS)
    given = parser.parse_args(argv)
    outputs, table, page = table_files("clean_speed", given.out, RESULTS, force=given.force)
    for kind in given.kinds:
        for n in given.rows:
            found = measure(kind, n)
            print(found, flush=True)
            # read anew each time: another call may have written its own
            lines = joined([found], recalled(table))
            outputs.write(table, pd.DataFrame([asdict(one) for one in lines]))
            outputs.write(page, to_markdown(lines))


if __name__ == "__main__":
    main()
