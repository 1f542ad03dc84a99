"""How each package is asked the questions of ``benchmarks/peers.py``, as its documentation says.

An adapter takes a ``Setting`` and returns scores ``(n_query, n_train)``, or ``(1, n_train)`` for
self-influence. Packages are imported inside their adapters, so that a missing one is reported and
the others run. Settings under which a package computes what the formula says are chosen even where
they are not its defaults; the remark of an adapter says which they are.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from baselines.influence_functions import InfluenceFunction
from baselines.tracin import TracIn
from baselines.trak import TRAK
from fine_bench import Checkpoint, InfluenceEstimator, Problem, replay

OURS = "fine_bench"


@dataclass(eq=False)
class Setting:
    """One problem, the same for every package.

    Attributes:
        model: at the checkpoint, in ``eval`` mode; an adapter gets a copy of its own.
        x, y: training examples.
        qx, qy: queries.
        lr: step size of the checkpoint.
        damping: λ of the influence functions, added to the eigenvalues of the mean curvature.
        dim: projected dimension of TRAK.
        batch: examples handed over at a time.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    qx: Tensor
    qy: Tensor
    lr: float
    damping: float
    dim: int
    batch: int

    @property
    def last_layer(self) -> str:
        """Name of the last linear layer."""
        return [n for n, m in self.model.named_modules() if isinstance(m, nn.Linear)][-1]

    def train_loader(self) -> DataLoader[Any]:
        """Training batches in index order."""
        return DataLoader(TensorDataset(self.x, self.y), self.batch)

    def query_loader(self) -> DataLoader[Any]:
        """Query batches in index order."""
        return DataLoader(TensorDataset(self.qx, self.qy), self.batch)


Answer = Callable[[Setting], Tensor]


@dataclass(frozen=True)
class Peer:
    """One way to get an answer.

    Attributes:
        package: distribution name.
        remark: what was asked of it.
        answer: the adapter.
        features: TRAK only, exact margin gradients ``(n, P)`` float64 to this package's φ.
        up_to_scale: the package rescales its scores; one common factor is fitted before comparing.
    """

    package: str
    remark: str
    answer: Answer
    features: Callable[[Setting, Tensor], Tensor] | None = None
    up_to_scale: bool = False


@dataclass(frozen=True)
class Case:
    """One question.

    Attributes:
        title: for the table.
        peers: who is asked, ours first.
        absent: packages that do not offer it, with the reason.
    """

    title: str
    peers: tuple[Peer, ...]
    absent: dict[str, str] = field(default_factory=dict)


# ---------------------------------------------------------------------------------------- ours


def ours(make: Callable[[Setting], InfluenceEstimator], *, self_influence: bool = False) -> Answer:
    """Replay one of our estimators."""

    def answer(s: Setting) -> Tensor:
        problem = Problem(
            model=s.model,
            loss=F.cross_entropy,
            train=TensorDataset(s.x, s.y),
            queries="self" if self_influence else TensorDataset(s.qx, s.qy),
            batch_size=s.batch,
        )
        checkpoint = Checkpoint(s.model.state_dict(), lr=s.lr)
        return replay(make(s), problem, [checkpoint]).values

    return answer


def our_ekfac(curvature: str) -> Callable[[Setting], InfluenceEstimator]:
    """EK-FAC with the absolute damping of the setting."""
    return lambda s: InfluenceFunction(solver="ekfac", curvature=curvature, damping=s.damping)  # type: ignore[arg-type]


def our_trak(kind: str) -> Peer:
    """TRAK with one of our projections."""

    def features(s: Setting, gradients: Tensor) -> Tensor:
        from fine_bench.gradients.engine import GradientEngine
        from fine_bench.gradients.margin import negative_margin
        from fine_bench.gradients.projection.random import make_projection, projection_matrix

        pattern = GradientEngine(s.model, negative_margin)(s.x[:1], s.y[:1])
        matrix = projection_matrix(make_projection(kind, s.dim, 0), pattern)  # type: ignore[arg-type]
        return gradients @ matrix

    answer = ours(lambda s: TRAK(projection=kind, dim=s.dim))  # type: ignore[arg-type]
    return Peer(OURS, f"TRAK(projection={kind!r})", answer, features)


# ---------------------------------------------------------------------------------------- captum


def _captum_options(s: Setting) -> dict[str, Any]:
    return {
        "train_dataset": s.train_loader(),
        "checkpoints": ["the model as it is"],
        "checkpoints_load_func": lambda model, path: s.lr,
        "loss_fn": nn.CrossEntropyLoss(reduction="sum"),
    }


def captum_tracin(s: Setting) -> Tensor:
    from captum.influence import TracInCP

    method = TracInCP(s.model, sample_wise_grads_per_batch=True, **_captum_options(s))
    return method.influence((s.qx, s.qy))


def captum_tracin_self(s: Setting) -> Tensor:
    from captum.influence import TracInCP

    method = TracInCP(s.model, sample_wise_grads_per_batch=True, **_captum_options(s))
    return method.self_influence()[None]


def captum_last_layer(s: Setting) -> Tensor:
    from captum.influence import TracInCPFast

    layer = s.model.get_submodule(s.last_layer)
    return TracInCPFast(s.model, layer, **_captum_options(s)).influence((s.qx, s.qy))


# ------------------------------------------------------------------------------------ kronfluence


def kronfluence(
    strategy: str,
    *,
    empirical: bool = True,
    self_influence: bool = False,
    last_layer: bool = False,
) -> Answer:
    """Pairwise or self scores; ``identity`` times the step size is TracIn."""

    def answer(s: Setting) -> Tensor:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments, ScoreArguments
        from kronfluence.task import Task

        class Classification(Task):
            def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Any:
                x, y = batch
                logits = model(x)
                if sample:
                    with torch.no_grad():
                        y = torch.multinomial(torch.softmax(logits, 1), 1)[:, 0]
                return F.cross_entropy(logits, y, reduction="sum")

            def compute_measurement(self, batch: Any, model: nn.Module) -> Any:
                x, y = batch
                return F.cross_entropy(model(x), y, reduction="sum")

            def get_influence_tracked_modules(self) -> list[str] | None:
                return [s.last_layer] if last_layer else None

        task = Classification()
        train, queries = TensorDataset(s.x, s.y), TensorDataset(s.qx, s.qy)
        with tempfile.TemporaryDirectory() as folder:
            analyzer = Analyzer(
                "peers",
                prepare_model(s.model, task),
                task,
                cpu=True,
                disable_tqdm=True,
                output_dir=folder,
                log_level=40,
            )
            factors = FactorArguments(
                strategy=strategy,
                use_empirical_fisher=empirical,
                activation_covariance_dtype=s.x.dtype,
                gradient_covariance_dtype=s.x.dtype,
                per_sample_gradient_dtype=s.x.dtype,
                lambda_dtype=s.x.dtype,
            )
            analyzer.fit_all_factors(
                "factors", train, per_device_batch_size=s.batch, factor_args=factors
            )
            # the identity has no eigenvalues to damp
            how = ScoreArguments(
                damping_factor=0.0 if strategy == "identity" else s.damping,
                per_sample_gradient_dtype=s.x.dtype,
                precondition_dtype=s.x.dtype,
                score_dtype=s.x.dtype,
            )
            if self_influence:
                analyzer.compute_self_scores(
                    "scores", "factors", train, per_device_train_batch_size=s.batch, score_args=how
                )
                scores = analyzer.load_self_scores("scores")
            else:
                analyzer.compute_pairwise_scores(
                    "scores",
                    "factors",
                    queries,
                    train,
                    per_device_query_batch_size=s.batch,
                    per_device_train_batch_size=s.batch,
                    score_args=how,
                )
                scores = analyzer.load_pairwise_scores("scores")
        assert scores is not None
        values = scores["all_modules"].reshape(1 if self_influence else len(s.qy), len(s.y))
        return values * s.lr if strategy == "identity" else values

    return answer


# ---------------------------------------------------------------------------------------- dattri


def _dattri_task(s: Setting, function: Callable[..., Tensor]) -> Any:
    from dattri.task import AttributionTask

    return AttributionTask(function, s.model, s.model.state_dict())


def _dattri_single_loss(s: Setting) -> Callable[..., Tensor]:
    """The loss of one example without a batch dimension, as ``TracInAttributor`` calls it."""

    def loss(params: Any, data: tuple[Tensor, Tensor]) -> Tensor:
        x, y = data
        logits = torch.func.functional_call(s.model, params, x[None])
        return F.cross_entropy(logits, y[None])

    return loss


def dattri_tracin(*, last_layer: bool = False) -> Answer:
    """Pairwise TracIn without the random projection that is the default."""

    def answer(s: Setting) -> Tensor:
        from dattri.algorithm.tracin import TracInAttributor

        layer = [f"{s.last_layer}.weight", f"{s.last_layer}.bias"] if last_layer else None
        method = TracInAttributor(
            _dattri_task(s, _dattri_single_loss(s)),
            weight_list=torch.tensor([s.lr]),
            normalized_grad=False,
            layer_name=layer,
        )
        method.projector_kwargs = None
        return method.attribute(s.train_loader(), s.query_loader()).T

    return answer


def dattri_tracin_default(s: Setting) -> Tensor:
    from dattri.algorithm.tracin import TracInAttributor

    method = TracInAttributor(
        _dattri_task(s, _dattri_single_loss(s)),
        weight_list=torch.tensor([s.lr]),
        normalized_grad=False,
    )
    return method.attribute(s.train_loader(), s.query_loader()).T


def dattri_ekfac(*, self_influence: bool = False) -> Answer:
    """EK-FAC of the linear layers, fitted with a summed loss so that the damping keeps its unit."""

    def answer(s: Setting) -> Tensor:
        from dattri.algorithm.influence_function import IFAttributorEKFAC

        def loss(params: Any, data: tuple[Tensor, Tensor]) -> Tensor:
            x, y = data
            logits = torch.func.functional_call(s.model, params, x)
            return F.cross_entropy(logits, y, reduction="sum")

        method = IFAttributorEKFAC(_dattri_task(s, loss), damping=s.damping)
        method.cache(s.train_loader())
        if self_influence:
            return method.self_attribute(s.train_loader())[None]
        return method.attribute(s.train_loader(), s.query_loader()).T

    return answer


def _dattri_projector(s: Setting) -> dict[str, Any]:
    return {"proj_dim": s.dim, "proj_type": "normal", "proj_seed": 0, "device": "cpu"}


def dattri_trak(s: Setting) -> Tensor:
    from dattri.algorithm.trak import TRAKAttributor

    def probability(params: Any, data: tuple[Tensor, Tensor]) -> Tensor:
        return torch.exp(-_dattri_single_loss(s)(params, data))

    def margin(params: Any, data: tuple[Tensor, Tensor]) -> Tensor:
        x, y = data
        logits = torch.func.functional_call(s.model, params, x[None])[0]
        label = torch.arange(len(logits)) == y
        others = torch.where(label, -torch.inf, logits)
        return torch.where(label, logits, 0.0).sum() - torch.logsumexp(others, 0)

    method = TRAKAttributor(
        _dattri_task(s, margin), probability, projector_kwargs=_dattri_projector(s)
    )
    method.cache(s.train_loader())
    return method.attribute(s.query_loader()).T


def dattri_features(s: Setting, gradients: Tensor) -> Tensor:
    """Its projection of given gradients, up to a scale that TRAK does not see."""
    from dattri.func.projection import random_project

    rows = gradients.float()
    options = _dattri_projector(s)
    return random_project(rows, len(rows), proj_max_batch_size=32, **options)(rows, ensemble_id=0)


# ---------------------------------------------------------------------------------------- traker


def _traker(s: Setting, folder: str, half: bool) -> Any:
    from trak import TRAKer

    return TRAKer(
        model=s.model,
        task="image_classification",
        train_set_size=len(s.y),
        save_dir=folder,
        device="cpu",
        proj_dim=s.dim,
        use_half_precision=half,
        logging_level=40,
    )


def traker(*, half: bool) -> Answer:
    """TRAK of one checkpoint."""

    def answer(s: Setting) -> Tensor:
        state = s.model.state_dict()
        if half:
            s.model.half()
        with tempfile.TemporaryDirectory() as folder:
            method = _traker(s, folder, half)
            method.load_checkpoint(state, model_id=0)
            for x, y in s.train_loader():
                method.featurize((x.half() if half else x, y), num_samples=len(y))
            method.finalize_features()
            # finalising freed the projector: a second object scores from the same folder
            method = _traker(s, folder, half)
            method.start_scoring_checkpoint("peers", state, model_id=0, num_targets=len(s.qy))
            for x, y in s.query_loader():
                method.score((x.half() if half else x, y), num_samples=len(y))
            scores = torch.tensor(method.finalize_scores("peers")).float()
        return scores.T

    return answer


def traker_features(s: Setting, gradients: Tensor) -> Tensor:
    """Its projection of given gradients."""
    with tempfile.TemporaryDirectory() as folder:
        method = _traker(s, str(Path(folder) / "features"), half=False)
        return method.projector.project(gradients.float(), model_id=0)


# ------------------------------------------------------------------------------------ curvlinops


def _gradients(s: Setting, x: Tensor, y: Tensor, size: int) -> Iterator[Tensor]:
    """Per-example loss gradients by ``torch.func``, ``(batch, P)``: the operators need vectors."""
    params = {name: p.detach() for name, p in s.model.named_parameters()}

    def one(values: dict[str, Tensor], xi: Tensor, yi: Tensor) -> Tensor:
        logits = torch.func.functional_call(s.model, values, (xi[None],))
        return F.cross_entropy(logits, yi[None])

    gradient = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0))
    for rows in torch.arange(len(y)).split(size):
        parts = gradient(params, x[rows], y[rows])
        yield torch.cat([g.flatten(1) for g in parts.values()], 1)


def curvlinops(fisher: str, *, self_influence: bool = False) -> Answer:
    """EK-FAC operator and its exactly damped inverse, applied to per-example gradients."""

    def answer(s: Setting) -> Tensor:
        from curvlinops import EKFACLinearOperator, KFACInverseLinearOperator

        operator = EKFACLinearOperator(
            s.model,
            nn.CrossEntropyLoss(),
            [p for p in s.model.parameters() if p.requires_grad],
            list(s.train_loader()),
            check_deterministic=False,
            fisher_type=fisher,
            separate_weight_and_bias=False,
            num_per_example_loss_terms=1,
            num_data=len(s.y),
        )
        inverse = KFACInverseLinearOperator(operator, damping=s.damping, use_exact_damping=True)
        if self_influence:
            parts = [
                ((inverse @ g.T) * g.T).sum(0) for g in _gradients(s, s.x, s.y, min(s.batch, 100))
            ]
            return torch.cat(parts)[None]
        queries = torch.cat(list(_gradients(s, s.qx, s.qy, s.batch)))
        solved = inverse @ queries.T.contiguous()
        return torch.cat([g @ solved for g in _gradients(s, s.x, s.y, s.batch)]).T

    return answer


# ---------------------------------------------------------------------------------------- pyDVL


def pydvl_ekfac(s: Setting) -> Tensor:
    from pydvl.influence.torch import EkfacInfluence

    method = EkfacInfluence(s.model, update_diagonal=True, hessian_regularization=s.damping)
    method.fit(s.train_loader())
    factors = method.influence_factors(s.qx, s.qy)
    parts = [method.influences_from_factors(factors, x, y) for x, y in s.train_loader()]
    return torch.cat(parts, 1)


# ---------------------------------------------------------------------------------------- cases

_NO_SELF_PYDVL = {"pyDVL": "has no self-influence but the diagonal of all pairs"}

CASES: dict[str, Case] = {
    "tracin-pairwise": Case(
        "TracIn, pairwise",
        (
            Peer(OURS, "TracIn()", ours(lambda s: TracIn())),
            Peer("captum", "TracInCP, sample-wise by batch", captum_tracin),
            Peer("kronfluence", 'strategy="identity", times lr', kronfluence("identity")),
            Peer("dattri", "TracInAttributor, projection off", dattri_tracin()),
            Peer("dattri", "TracInAttributor, default (projects)", dattri_tracin_default),
        ),
        {
            "pyDVL": "has no TracIn",
            "curvlinops-for-pytorch": "has curvature only",
            "traker": "has TRAK only",
        },
    ),
    "tracin-self": Case(
        "TracIn, self",
        (
            Peer(OURS, "TracIn()", ours(lambda s: TracIn(), self_influence=True)),
            Peer("captum", "TracInCP.self_influence", captum_tracin_self),
            Peer(
                "kronfluence",
                'strategy="identity", times lr',
                kronfluence("identity", self_influence=True),
            ),
        ),
        {
            "dattri": "TracInAttributor has no self-influence",
            "pyDVL": "has no TracIn",
            "curvlinops-for-pytorch": "has curvature only",
            "traker": "has TRAK only",
        },
    ),
    "tracin-last": Case(
        "TracIn, pairwise, last layer",
        (
            Peer(OURS, "TracIn(layers=[last])", ours(lambda s: TracIn(layers=[s.last_layer]))),
            Peer("captum", "TracInCPFast", captum_last_layer),
            Peer(
                "kronfluence",
                'strategy="identity", last layer tracked',
                kronfluence("identity", last_layer=True),
            ),
            Peer("dattri", "layer_name=last, projection off", dattri_tracin(last_layer=True)),
        ),
        {
            "pyDVL": "has no TracIn",
            "curvlinops-for-pytorch": "has curvature only",
            "traker": "has TRAK only",
        },
    ),
    "ekfac-empirical-pairwise": Case(
        "EK-FAC (empirical Fisher), pairwise",
        (
            Peer(OURS, 'curvature="empirical_fisher"', ours(our_ekfac("empirical_fisher"))),
            Peer("kronfluence", "use_empirical_fisher=True", kronfluence("ekfac")),
            Peer("curvlinops-for-pytorch", 'fisher_type="empirical"', curvlinops("empirical")),
            Peer("dattri", "IFAttributorEKFAC, summed loss", dattri_ekfac()),
        ),
        {
            "pyDVL": "has the model's Fisher only",
            "captum": "has no EK-FAC",
            "traker": "has TRAK only",
        },
    ),
    "ekfac-empirical-self": Case(
        "EK-FAC (empirical Fisher), self",
        (
            Peer(
                OURS,
                'curvature="empirical_fisher"',
                ours(our_ekfac("empirical_fisher"), self_influence=True),
            ),
            Peer(
                "kronfluence",
                "use_empirical_fisher=True",
                kronfluence("ekfac", self_influence=True),
            ),
            Peer(
                "curvlinops-for-pytorch",
                'fisher_type="empirical"',
                curvlinops("empirical", self_influence=True),
            ),
            Peer("dattri", "IFAttributorEKFAC, summed loss", dattri_ekfac(self_influence=True)),
        ),
        {**_NO_SELF_PYDVL, "captum": "has no EK-FAC", "traker": "has TRAK only"},
    ),
    "ekfac-fisher-pairwise": Case(
        "EK-FAC (the model's Fisher), pairwise",
        (
            Peer(OURS, 'curvature="fisher"', ours(our_ekfac("fisher"))),
            Peer("curvlinops-for-pytorch", 'fisher_type="type-2"', curvlinops("type-2")),
            Peer(
                "kronfluence",
                "default: one sampled label",
                kronfluence("ekfac", empirical=False),
            ),
            Peer("pyDVL", "EkfacInfluence, update_diagonal=True", pydvl_ekfac),
        ),
        {
            "dattri": "has the empirical Fisher only",
            "captum": "has no EK-FAC",
            "traker": "has TRAK only",
        },
    ),
    "ekfac-fisher-self": Case(
        "EK-FAC (the model's Fisher), self",
        (
            Peer(OURS, 'curvature="fisher"', ours(our_ekfac("fisher"), self_influence=True)),
            Peer(
                "curvlinops-for-pytorch",
                'fisher_type="type-2"',
                curvlinops("type-2", self_influence=True),
            ),
            Peer(
                "kronfluence",
                "default: one sampled label",
                kronfluence("ekfac", empirical=False, self_influence=True),
            ),
        ),
        {
            **_NO_SELF_PYDVL,
            "dattri": "has the empirical Fisher only",
            "captum": "has no EK-FAC",
            "traker": "has TRAK only",
        },
    ),
    "trak": Case(
        "TRAK, pairwise",
        (
            our_trak("gaussian"),
            our_trak("rademacher"),
            our_trak("sjlt"),
            our_trak("factorized"),
            Peer(
                "traker",
                "use_half_precision=False, normal projection",
                traker(half=False),
                traker_features,
                up_to_scale=True,
            ),
            Peer(
                "traker",
                "default: half precision",
                traker(half=True),
                traker_features,
                up_to_scale=True,
            ),
            Peer("dattri", "TRAKAttributor, normal projection", dattri_trak, dattri_features),
        ),
        {
            "captum": "has no TRAK",
            "kronfluence": "has no TRAK",
            "pyDVL": "has no TRAK",
            "curvlinops-for-pytorch": "has curvature only",
        },
    ),
}
