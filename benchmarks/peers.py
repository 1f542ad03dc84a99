"""Our attribution methods against public packages: same model, checkpoint, data and threads.

    pip install -c constraints.txt ".[peers]"    # in a checkout
    FINE_BENCH_DATA=… python benchmarks/peers.py [--model mlp|cnn] [--n-train 10000]
        [--n-query 500] [--threads 2] [--repeats 5] [--only tracin-pairwise trak] [--json FILE]

Two things are measured, for each question and each package:

*Agreement* with the exact float64 answer (``peers_exact.py``), on the first ``--check-train``
images and ``--check-query`` queries: largest error over largest value, and Spearman over all
entries. The right answer is one within ``--tolerance`` of the exact one in float32. A package that
misses it by rounding, being within ``--tolerance-64`` when asked in float64, gets two rows: its
answer in float64, which is right, and the one in float32, which is not. TRAK is checked with each
package's own projection; traker rescales its scores, so there one common factor is fitted first.
λ is a tenth of the mean eigenvalue of the empirical Fisher, the same number for everybody.

*Cost* at full size, for the answers that are right and those lost to rounding (``--time-all``: for
all), each in the precision of its row: each repeat runs every package once, each in a process of
its own after a warm-up on a few examples, and every second repeat in reversed order. Wall and CPU
time are medians over repeats, ratios medians of the paired ratios (theirs/ours within a repeat),
memory the largest rise of the resident set. A package's whole way from model and data to a score
matrix in memory counts. Full-size scores are compared with ours as well ("gap": largest difference
over largest value).

A package that is missing, fails, is not right, or does not offer a method is listed with the
reason.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import json
import logging
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import peers_exact as exact
import torch
import torch.nn.functional as F
from outputs import Outputs, add_force
from peers_adapters import CASES, OURS, Peer, Setting
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from scipy.stats import spearmanr
from torch import Tensor

from fine_bench.data.mnist import mnist_mislabel
from fine_bench.models.networks import cnn, mlp

PACKAGES = ("captum", "traker", "kronfluence", "dattri", "pyDVL", "curvlinops-for-pytorch")
SHAPE, CLASSES = (1, 28, 28), 10
LR, EPOCHS, TRAIN_BATCH = 0.05, 3, 64
WARM_UP = (24, 6)
MIB = 2**20


@dataclass
class Row:
    """What is known of one package's answer to one question.

    Attributes:
        index: place of the package's answer in the case; double: asked in float64.
        error, spearman: agreement with the exact answer; None where there is no answer.
        right: within the tolerance.
        rounding: wrong in float32 and right in float64.
        reason: why a number is missing.
        wall, cpu: medians, seconds; memory: largest rise of the resident set, MiB.
        gap: largest difference from our scores at full size over their largest value.
        wall_ratio, cpu_ratio: medians of paired ratios, theirs over ours.
        walls: every repeat's wall time.
    """

    case: str
    package: str
    remark: str
    version: str
    index: int = 0
    double: bool = False
    error: float | None = None
    spearman: float | None = None
    right: bool = False
    rounding: bool = False
    reason: str = ""
    wall: float | None = None
    cpu: float | None = None
    memory: float | None = None
    gap: float | None = None
    wall_ratio: float | None = None
    cpu_ratio: float | None = None
    walls: Sequence[float] = ()


# ---------------------------------------------------------------------------------------- problem


def train(kind: str, x: Tensor, y: Tensor) -> torch.nn.Module:
    """A few epochs of plain SGD, seed 0."""
    torch.manual_seed(0)
    net = {"mlp": mlp, "cnn": cnn}[kind](SHAPE, CLASSES)
    optimiser = torch.optim.SGD(net.parameters(), lr=LR)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(y)).split(TRAIN_BATCH):
            optimiser.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimiser.step()
    return net.eval()


def build(arguments: argparse.Namespace, folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """Train the checkpoint and write the problem for the workers; also what the twins need."""
    data = mnist_mislabel(seed=0, n_train=arguments.n_train, n_query=arguments.n_query)
    net = train(arguments.model, data.x, data.y)
    n, v = arguments.check_train, arguments.check_query
    x, y, qx, qy = data.x[:n], data.y[:n], data.query_x[:v], data.query_y[:v]
    print(f"exact answers for {len(y)} images and {len(qy)} queries …", flush=True)
    gradients = exact.per_example(net, x, y)
    queries = exact.per_example(net, qx, qy)
    damping = 0.1 * exact.mean_square(gradients)
    problem = {
        "model": arguments.model,
        "state": net.state_dict(),
        "x": data.x,
        "y": data.y,
        "qx": data.query_x,
        "qy": data.query_y,
        "damping": damping,
    }
    path = folder / "problem.pt"
    torch.save(problem, path)
    answers: dict[str, Tensor] = {}
    wanted = arguments.only
    last = [name for name in gradients if name.endswith(".weight")][-1].removesuffix(".weight")
    if "tracin-pairwise" in wanted:
        answers["tracin-pairwise"] = exact.tracin(queries, gradients, LR)
    if "tracin-self" in wanted:
        answers["tracin-self"] = exact.tracin_self(gradients, LR)
    if "tracin-last" in wanted:
        q, g = (
            {name: value for name, value in part.items() if name.startswith(f"{last}.")}
            for part in (queries, gradients)
        )
        answers["tracin-last"] = exact.tracin(q, g, LR)
    for fisher in ("empirical", "fisher"):
        names = [f"ekfac-{fisher}-pairwise", f"ekfac-{fisher}-self"]
        if any(name in wanted for name in names):
            twin = exact.EKFAC(net, x, y, empirical=fisher == "empirical", damping=damping)
            answers[names[0]] = twin.pairwise(queries, gradients)
            answers[names[1]] = twin.self_influence(gradients)
    return path, answers


def setting(
    problem: dict[str, Any], n: int, v: int, dim: int, batch: int, *, double: bool = False
) -> Setting:
    """The first n images and v queries, with a fresh model."""
    dtype = torch.float64 if double else torch.float32
    net = {"mlp": mlp, "cnn": cnn}[problem["model"]](SHAPE, CLASSES)
    net.load_state_dict(problem["state"])
    return Setting(
        model=net.to(dtype).eval(),
        x=problem["x"][:n].to(dtype),
        y=problem["y"][:n],
        qx=problem["qx"][:v].to(dtype),
        qy=problem["qy"][:v],
        lr=LR,
        damping=problem["damping"],
        dim=dim,
        batch=batch,
    )


# ---------------------------------------------------------------------------------------- workers


def resident() -> float:
    """Resident set now, MiB (its peak so far where the system does not tell)."""
    with contextlib.suppress(OSError):
        text = Path("/proc/self/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", text)[0]) / 1024
    return resident_peak()


def forget_peak() -> None:
    """Start the peak of the resident set anew, where the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def resident_peak() -> float:
    """Peak of the resident set, MiB."""
    with contextlib.suppress(OSError):
        text = Path("/proc/self/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+)", text)[0]) / 1024
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB


def work(job: dict[str, Any]) -> dict[str, Any]:
    """One package's answer, in this process; scores go to ``job["scores"]``."""
    torch.set_num_threads(job["threads"])
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    problem = torch.load(job["problem"])
    peer = CASES[job["case"]].peers[job["index"]]
    dim, batch = job["dim"], job["batch"]
    if job["warm_up"]:
        torch.manual_seed(0)
        peer.answer(setting(problem, *WARM_UP, min(dim, 8), batch))
    s = setting(problem, job["n"], job["v"], dim, batch, double=job["double"])
    torch.manual_seed(0)
    forget_peak()
    before = resident()
    wall, cpu = time.perf_counter(), time.process_time()
    scores = peer.answer(s).detach()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    memory = resident_peak() - before
    torch.save(scores, job["scores"])
    if job["exact"] and peer.features is not None:
        torch.save(trak_twin(problem, job, peer), job["exact"])
    return {"wall": wall, "cpu": cpu, "memory": memory}


def trak_twin(problem: dict[str, Any], job: dict[str, Any], peer: Peer) -> Tensor:
    """The exact TRAK for the projection that this package uses."""
    s = setting(problem, job["n"], job["v"], job["dim"], job["batch"])
    assert peer.features is not None
    # projected together: some packages draw their projection anew for every call
    both = torch.cat([s.x, s.qx]), torch.cat([s.y, s.qy])
    phi = peer.features(s, exact.flat(exact.per_example(s.model, *both, exact.margin)))
    n = len(s.y)
    return exact.trak(phi[n:], phi[:n], exact.one_minus_p(s.model, s.x, s.y))


def run(job: dict[str, Any], timeout: float) -> dict[str, Any]:
    """Do a job in a process of its own; ``{"reason": …}`` where it fails."""
    file = Path(job["scores"]).with_suffix(".json")
    file.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--worker", json.dumps({**job, "result": str(file)})]
    threads = str(job["threads"])
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    environment["TQDM_DISABLE"] = "1"
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return {"reason": f"took more than {timeout:g} s"}
    if not file.exists():
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"reason": lines[-1][:300]}
    result: dict[str, Any] = json.loads(file.read_text())
    return result


# ---------------------------------------------------------------------------------------- judging


def version(package: str) -> str:
    """Installed version, empty where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def agreement(scores: Tensor, truth: Tensor, up_to_scale: bool) -> tuple[float, float]:
    """Largest error over largest value, and Spearman over all entries."""
    scores, truth = scores.double(), truth.double()
    if scores.shape != truth.shape:
        raise ValueError(f"scores of shape {tuple(scores.shape)}, not {tuple(truth.shape)}")
    if not bool(torch.isfinite(scores).all()):
        return float("inf"), float("nan")
    rho = float(spearmanr(scores.flatten(), truth.flatten()).statistic)
    if up_to_scale:
        scores = scores * ((scores * truth).sum() / scores.square().sum())
    return float((scores - truth).abs().max() / truth.abs().max()), rho


def check(
    name: str, job: dict[str, Any], truth: Tensor | None, arguments: argparse.Namespace
) -> list[Row]:
    """Ask one package the small question: one row, or two where rounding decides."""
    peer = CASES[name].peers[job["index"]]
    row = Row(name, peer.package, peer.remark, version(peer.package), index=job["index"])
    if peer.package != OURS and not row.version:
        row.reason = "not installed"
        return [row]
    result = run(job, arguments.timeout)
    if "reason" in result:
        row.reason = result["reason"]
        return [row]
    truth = torch.load(job["exact"]) if truth is None else truth
    try:
        row.error, row.spearman = agreement(torch.load(job["scores"]), truth, peer.up_to_scale)
    except ValueError as error:
        row.reason = str(error)
        return [row]
    row.right = row.error <= arguments.tolerance
    if row.right:
        return [row]
    row.reason = "not the right answer"
    # TRAK's truth is that of float32 projections, which float64 would not repeat
    again = {**job, "double": True, "exact": ""}
    if peer.features is not None or "reason" in run(again, arguments.timeout):
        return [row]
    error, rho = agreement(torch.load(job["scores"]), truth, peer.up_to_scale)
    if error > arguments.tolerance_64:
        row.reason += f", nor in float64 (error {error:.0e})"
        return [row]
    row.rounding = True
    row.reason = "not the right answer: loses digits in float32"
    double = replace(row, double=True, error=error, spearman=rho, right=True, rounding=False)
    double.remark, double.reason = f"{row.remark}, float64", ""
    return [double, row]


def measure(name: str, rows: list[Row], job: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Time the packages that answered, paired and in alternating order."""
    peers = CASES[name].peers
    chosen = [
        i
        for i, row in enumerate(rows)
        if row.right or row.rounding or (arguments.time_all and row.error is not None) or i == 0
    ]
    runs: dict[int, list[dict[str, Any]]] = {i: [] for i in chosen}
    reference: Tensor | None = None
    for repeat in range(arguments.repeats):
        for i in chosen if repeat % 2 == 0 else chosen[::-1]:
            if any("reason" in result for result in runs[i]):
                continue
            row = rows[i]
            asked = {**job, "index": row.index, "double": row.double}
            runs[i].append(run(asked, arguments.timeout))
            if "reason" in runs[i][-1]:
                row.reason = f"at full size: {runs[i][-1]['reason']}"
                continue
            if repeat == 0:
                scores = torch.load(job["scores"])
                if i == 0:
                    reference = scores
                elif reference is not None and peers[row.index].features is None:
                    row.gap = agreement(scores, reference, False)[0]
    for i in chosen:
        results = runs[i]
        if not results or any("reason" in result for result in results):
            continue
        row = rows[i]
        row.walls = [result["wall"] for result in results]
        row.wall = statistics.median(row.walls)
        row.cpu = statistics.median(result["cpu"] for result in results)
        row.memory = max(result["memory"] for result in results)
        if i and len(runs[0]) == len(results) and "reason" not in runs[0][-1]:
            pairs = list(zip(results, runs[0], strict=True))
            row.wall_ratio = statistics.median(r["wall"] / o["wall"] for r, o in pairs)
            row.cpu_ratio = statistics.median(r["cpu"] / o["cpu"] for r, o in pairs)


# ---------------------------------------------------------------------------------------- report


def show(console: Console, name: str, rows: list[Row]) -> None:
    """Print one question's table and its verdict."""
    table = Table(title=CASES[name].title, title_justify="left")
    for column in ("package", "asked", "error", "ρ", "wall s", "CPU s", "MiB", "gap"):
        table.add_column(column, justify="left" if column in ("package", "asked") else "right")
    for column in ("wall ÷ ours", "CPU ÷ ours", "remark"):
        table.add_column(column, justify="left" if column == "remark" else "right")

    def text(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    for row in rows:
        table.add_row(
            f"{row.package} {row.version}",
            escape(row.remark),
            text(row.error, ".1e"),
            text(row.spearman, ".4f"),
            text(row.wall, ".2f"),
            text(row.cpu, ".2f"),
            text(row.memory, ".0f"),
            text(row.gap, ".1e"),
            text(row.wall_ratio, ".1f"),
            text(row.cpu_ratio, ".1f"),
            escape(row.reason),
        )
    for package, reason in CASES[name].absent.items():
        table.add_row(f"{package} {version(package)}", *["–"] * 9, reason)
    console.print(table)
    rivals = [r for r in rows if r.package != OURS and r.right and r.wall_ratio is not None]
    if not rivals:
        console.print("no public package that was timed gets the right answer\n")
        return
    untimed = [r.package for r in rows if r.package != OURS and r.right and r.wall_ratio is None]
    if untimed:
        console.print(f"right but not timed, so the ratio may not stand: {', '.join(untimed)}")
    best = min(rivals, key=lambda row: row.wall_ratio or 0.0)
    ours = rows[0].memory or 0.0
    console.print(
        f"{text(best.wall_ratio, '.1f')} times faster (CPU {text(best.cpu_ratio, '.1f')}) than "
        f"{best.package} {best.version}, the fastest public package with the right answer; "
        f"extra memory {ours:.0f} MiB, theirs {text(best.memory, '.0f')}\n"
    )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("mlp", "cnn"), default="mlp")
    parser.add_argument("--n-train", type=int, default=10_000)
    parser.add_argument("--n-query", type=int, default=500)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--dim", type=int, default=512, help="projected dimension of TRAK")
    parser.add_argument("--batch", type=int, default=500, help="examples handed over at a time")
    parser.add_argument("--check-train", type=int, default=600)
    parser.add_argument("--check-query", type=int, default=20)
    parser.add_argument("--check-dim", type=int, default=64, help="TRAK's dimension in the check")
    parser.add_argument("--tolerance", type=float, default=1e-3)
    parser.add_argument("--tolerance-64", type=float, default=1e-6)
    parser.add_argument("--timeout", type=float, default=1800, help="seconds a run may take")
    parser.add_argument("--time-all", action="store_true", help="time wrong answers too")
    parser.add_argument("--no-timing", action="store_true", help="check agreement only")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    add_force(parser)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Check, measure, print."""
    arguments = parse()
    if arguments.worker:
        job = json.loads(arguments.worker)
        with contextlib.redirect_stdout(io.StringIO()):
            result = work(job)
        Path(job["result"]).write_text(json.dumps(result))
        return
    files = Outputs([arguments.json] if arguments.json else [], force=arguments.force)
    arguments.check_train = min(arguments.check_train, arguments.n_train)
    arguments.check_query = min(arguments.check_query, arguments.n_query)
    torch.set_num_threads(arguments.threads)
    console = Console(width=max(Console().width, 170))
    environment = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        OURS: version(OURS) or "working tree",
        **{package: version(package) for package in PACKAGES},
    }
    console.print(
        f"{arguments.model}, {arguments.n_train} images, {arguments.n_query} queries, "
        f"{arguments.threads} threads, {arguments.repeats} repeats, tolerance "
        f"{arguments.tolerance:g}; "
        + ", ".join(f"{name} {value or 'missing'}" for name, value in environment.items())
    )
    every: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        problem, answers = build(arguments, folder)
        common = {
            "problem": str(problem),
            "scores": str(folder / "scores.pt"),
            "threads": arguments.threads,
            "batch": arguments.batch,
        }
        for case in arguments.only:
            small = {
                **common,
                "case": case,
                "n": arguments.check_train,
                "v": arguments.check_query,
                "dim": arguments.check_dim,
                "exact": str(folder / "exact.pt"),
                "warm_up": False,
                "double": False,
            }
            rows = [
                row
                for i in range(len(CASES[case].peers))
                for row in check(case, {**small, "index": i}, answers.get(case), arguments)
            ]
            if not arguments.no_timing:
                full = {
                    **common,
                    "case": case,
                    "n": arguments.n_train,
                    "v": arguments.n_query,
                    "dim": arguments.dim,
                    "exact": "",
                    "warm_up": True,
                    "double": False,
                }
                measure(case, rows, full, arguments)
            show(console, case, rows)
            every += rows
            if arguments.json:
                hidden = ("json", "worker", "force")
                options = {k: v for k, v in vars(arguments).items() if k not in hidden}
                report = {
                    "options": options,
                    "environment": environment,
                    "rows": [asdict(row) for row in every],
                    "absent": {name: CASES[name].absent for name in arguments.only},
                }
                files.write(arguments.json, json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
