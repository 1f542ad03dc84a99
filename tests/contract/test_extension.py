"""A method, an in-run method and a task of one's own: one Python file and at most one YAML file.

Each is written into a package that lies where a user's would, beside the folder in which the
command is typed, and is run by the command to a leaderboard. Nothing of the project is edited. The
fourth extension, a metric, is shown by ``tests/unit/test_metric_registry.py``.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from support.commands import SMALL, Commands, small

POST_HOC = '''
"""How surprised the model is by a given label."""

import torch

from fine_bench import Checkpoint, InfluenceEstimator, InfluenceScores, Problem


class Surprise(InfluenceEstimator):
    """1 − p of the given label, summed over the checkpoints."""

    name, version = "surprise", 1

    def __init__(self, power: float = 1.0) -> None:
        super().__init__()
        self.power = power

    def unsupported(self, problem: Problem) -> str | None:
        if problem.target != "self":
            return "looks at each example alone and has no notion of a query"
        return None

    def setup(self, problem: Problem) -> None:
        super().setup(problem)
        self.total = torch.zeros(problem.n_train)

    def update(self, checkpoint: Checkpoint) -> None:
        self.load(checkpoint)
        with torch.no_grad():
            for rows, x, y in self.problem.batches("train"):
                p = torch.softmax(self.model(x), dim=1)
                self.total[rows] += (1 - p.gather(1, y[:, None])[:, 0]) ** self.power

    def compute(self) -> InfluenceScores:
        self.require_update()
        return InfluenceScores(
            self.total[None], self.name, self.problem.target, version=self.version
        )
'''

IN_RUN = '''
"""What the training itself sees of a label: the loss of each example in its own batches."""

import torch
import torch.nn.functional as F

from fine_bench.callback.base import InRunMethod
from fine_bench.types import InfluenceScores, UnsupportedProblemError


class BatchLoss(InRunMethod):
    """Sum of an example's losses right after the steps that it took part in."""

    name, version = "batch_loss", 1

    def __init__(self, target="self", *, queries=None) -> None:
        if target != "self":
            raise UnsupportedProblemError("looks at each example alone")
        super().__init__(target=target)

    def on_train_start(self, trainer, pl_module) -> None:
        self._forget()
        self.total = torch.zeros(len(trainer.train_dataloader.dataset))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        x, y, index = batch
        with self._timed(), torch.no_grad():
            self.total[index] += F.cross_entropy(pl_module(x), y, reduction="none")

    def scores(self) -> InfluenceScores:
        return InfluenceScores(self.total[None], self.name, "self", version=self.version)

    def metrics(self) -> dict[str, float]:
        return {"batch_loss/total": float(self.total.sum())}
'''

TASK = '''
"""Two Gaussian clouds; a tenth of the labels are swapped."""

import torch

from fine_bench.data.task import TaskData
from fine_bench.seeds import stream
from fine_bench.types import GroundTruth


def two_clouds(*, name: str = "two_clouds", seed: int, n_train: int = 200) -> TaskData:
    """The data, drawn from ``seed``."""
    draw = stream(seed, "two_clouds")

    def cloud(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.randint(2, (n,), generator=draw)
        return torch.randn(n, 4, generator=draw) + 2.0 * y[:, None], y

    x, clean_y = cloud(n_train)
    bad = torch.rand(n_train, generator=draw) < 0.1
    query_x, query_y = cloud(50)
    test_x, test_y = cloud(200)
    return TaskData(
        name=name,
        x=x,
        y=torch.where(bad, 1 - clean_y, clean_y),
        clean_y=clean_y,
        truth=GroundTruth(bad, "swapped label"),
        query_x=query_x,
        query_y=query_y,
        test_x=test_x,
        test_y=test_y,
        n_classes=2,
        train_ids=torch.arange(n_train),
    )
'''

COMMON = ("targets=[self,validation]", "logger.mode=disabled", "seed=0,1")


def write(cli: Commands, package: str, code: str, group: str, name: str, options: str) -> list[str]:
    """One Python file, ``PACKAGE/NAME.py``, and one YAML file; what names them on the command."""
    home = cli.elsewhere / package
    (home / "conf" / group).mkdir(parents=True)
    (home / f"{name}.py").write_text(code)
    (home / "conf" / group / f"{name}.yaml").write_text(options)
    return [f"hydra.searchpath=[file://{home / 'conf'}]", f"allow_packages=[{package}]"]


def leaderboard(folder: Path) -> tuple[str, pd.DataFrame]:
    table = pd.read_csv(folder / "leaderboard.csv")
    return (folder / "leaderboard.md").read_text(), table[table.metric == "auroc"]


def test_a_post_hoc_method_of_ones_own(cli: Commands, tmp_path: Path) -> None:
    named = write(
        cli, "own_method", POST_HOC, "estimator", "surprise",
        "# @package estimators.surprise\n_target_: own_method.surprise.Surprise\npower: 2.0\n",
    )  # fmt: skip
    done = cli(tmp_path, *named, "estimator=[surprise,mean_loss,random]", *COMMON)
    assert done.returncode == 0, done.stderr
    assert "surprise             self        AUROC" in done.stderr
    text, table = leaderboard(tmp_path)
    aurocs = table[table.target == "self"].set_index("estimator")["mean"]
    assert aurocs["surprise"] > 0.65 > aurocs["random"]
    assert "surprise" in done.stdout
    assert "| self | surprise | 2 |" in text
    assert "has no notion of a query" in " ".join(text.split())
    refused = cli(tmp_path, *named, "estimator=surprise", "+estimators.surprise.force=2", *COMMON)
    assert refused.returncode == 2
    assert "estimators.surprise.force is unknown" in refused.stderr


def test_an_in_run_method_of_ones_own(cli: Commands, tmp_path: Path) -> None:
    named = write(
        cli, "own_watcher", IN_RUN, "estimator", "batch_loss",
        "# @package estimators.batch_loss\n_target_: own_watcher.batch_loss.BatchLoss\n",
    )  # fmt: skip
    done = cli(tmp_path, *named, "estimator=[batch_loss,fine,tracin]", *COMMON)
    assert done.returncode == 0, done.stderr
    text, table = leaderboard(tmp_path)
    aurocs = table[table.target == "self"].set_index("estimator")["mean"]
    assert aurocs["batch_loss"] > 0.65
    assert set(aurocs.index) == {"batch_loss", "fine", "tracin"}
    assert "| self | batch_loss | 2 |" in text
    assert "looks at each example alone" in " ".join(text.split())
    (record, _) = sorted((tmp_path / "records").rglob("batch_loss--self--*.json"))
    assert '"batch_loss/total"' in record.read_text()


def test_a_task_of_ones_own(cli: Commands, tmp_path: Path) -> None:
    named = write(
        cli, "own_task", TASK, "task", "two_clouds",
        "_target_: own_task.two_clouds.two_clouds\nname: two_clouds\nseed: 0\nn_train: 150\n",
    )  # fmt: skip
    own = [option for option in small(tmp_path) if not option.startswith("task.")]
    assert len(own) == len(SMALL) - 1
    named[:1] = ["--config-dir", str(cli.elsewhere / "own_task" / "conf")]  # the other way
    done = cli.run(
        "fine_bench", *named, *own, "task=two_clouds", "estimator=[fine,mean_loss,random]", *COMMON
    )
    assert done.returncode == 0, done.stderr
    assert "150 training examples" in done.stderr
    assert "swapped label" in done.stderr
    text, table = leaderboard(tmp_path)
    assert set(table.task) == {"two_clouds"}
    assert "two_clouds" in text
    aurocs = table.set_index(["estimator", "target"])["mean"]
    assert aurocs["mean_loss", "self"] > 0.8
    assert ("fine", "validation") in aurocs.index
