"""Networks: shapes, independence of examples, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fine_bench.gradients.recorder import LayerRecorder
from fine_bench.models.networks import Residual, bn_cnn, cnn, gn_cnn, mlp, resnet9
from fine_bench.models.transformer import row_transformer, token_transformer

SMALL: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "cnn": cnn,
    "gn_cnn": gn_cnn,
    "resnet9": lambda shape, n, **options: resnet9(shape, n, width=8, **options),
    "row_transformer": lambda shape, n: row_transformer(shape, n, width=12, depth=2),
}
SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (2, 9, 11)]


def make(name: str, shape: tuple[int, ...], n_classes: int = 7) -> nn.Module:
    torch.manual_seed(0)
    return SMALL[name](shape, n_classes)


@pytest.mark.parametrize("name", list(SMALL))
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_of_every_input_shape(name: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(3, *shape)
    assert make(name, shape)(x).shape == (3, 7)


@pytest.mark.parametrize("name", list(SMALL))
def test_no_example_depends_on_another(name: str) -> None:
    net = make(name, (3, 32, 32)).double().train()
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(net(x)[:1], net(x[:1]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", list(SMALL))
def test_every_parameter_is_trained(name: str) -> None:
    net = make(name, (3, 32, 32))
    x = torch.randn(4, 3, 32, 32)
    F.cross_entropy(net(x), torch.arange(4)).backward()
    for key, parameter in net.named_parameters():
        assert parameter.grad is not None, key
        assert float(parameter.grad.abs().sum()) > 0, key


@pytest.mark.parametrize("name", ["gn_cnn", "resnet9"])
def test_only_modules_whose_gradients_have_factors(name: str) -> None:
    net = make(name, (3, 32, 32))
    for module in net.modules():
        own = list(module.parameters(recurse=False))
        assert not own or isinstance(module, nn.Conv2d | nn.Linear | nn.GroupNorm)
        assert not getattr(module, "inplace", False)
        assert not list(module.buffers(recurse=False))


def test_rows_are_the_tokens_of_an_image() -> None:
    net = row_transformer((2, 3, 4), 5, width=8, heads=2, depth=1)
    x = torch.randn(6, 2, 3, 4)
    rows = net.embed[0](x)  # type: ignore[union-attr, index, operator]
    assert rows.shape == (6, 3, 8)
    assert torch.equal(rows[4, 1], torch.cat([x[4, 0, 1], x[4, 1, 1]]))
    # without places, the mean over positions would not see their order
    assert not torch.allclose(net(x), net(x.flip(2)), atol=1e-4)


def test_tokens() -> None:
    net = token_transformer(11, 7, 5, width=8, heads=2, depth=1)
    x = torch.randint(11, (6, 4))  # shorter than the longest
    assert net(x).shape == (6, 5)


def test_every_layer_of_a_transformer_has_factors() -> None:
    for net in (token_transformer(11, 7, 5, width=8), row_transformer((1, 5, 4), 5, width=8)):
        assert not LayerRecorder(net).leftover


def test_sizes() -> None:
    count = lambda net: sum(p.numel() for p in net.parameters())  # noqa: E731
    # 5²·3·32 + 9·32·64 + 9·64·128 + 2·(32 + 64 + 128) + 2²·128·10 + 10
    assert count(gn_cnn((3, 32, 32), 10)) == 2400 + 18432 + 73728 + 448 + 5120 + 10
    assert 6.5e6 < count(resnet9((3, 32, 32), 10)) < 6.7e6


def test_the_two_ways_to_halve_have_the_same_output_size() -> None:
    strided = gn_cnn((3, 32, 32), 10, halving=["stride"] * 3)
    pooled = gn_cnn((3, 32, 32), 10, halving=["pool"] * 3)
    sizes = [[tuple(p.shape) for p in net.parameters()] for net in (strided, pooled)]
    assert sizes[0] == sizes[1]
    x = torch.randn(2, 3, 32, 32)
    assert strided(x).shape == pooled(x).shape == (2, 10)


def test_batch_normalisation_takes_the_place_of_group_normalisation() -> None:
    for grouped, batched in (
        (gn_cnn((3, 32, 32), 10), bn_cnn((3, 32, 32), 10)),
        (resnet9((3, 32, 32), 10, width=8), resnet9((3, 32, 32), 10, width=8, norm="batch")),
    ):
        pairs = list(zip(grouped.modules(), batched.modules(), strict=True))
        swapped = [b for a, b in pairs if isinstance(a, nn.GroupNorm)]
        assert swapped
        assert all(isinstance(b, nn.BatchNorm2d) for b in swapped)
        assert all(type(a) is type(b) for a, b in pairs if not isinstance(a, nn.GroupNorm))
        shapes = [[tuple(p.shape) for p in net.parameters()] for net in (grouped, batched)]
        assert shapes[0] == shapes[1]


def test_a_residual_block_adds_its_input() -> None:
    x = torch.randn(2, 3)
    linear = nn.Linear(3, 3)
    torch.testing.assert_close(Residual(linear)(x), x + linear(x))


def test_a_small_set_is_learned() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(32, 3, 16, 16), torch.arange(32) % 4
    net = gn_cnn((3, 16, 16), 4, channels=[8, 16], halving=["stride", "pool"], groups=4)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    assert bool((net(x).argmax(1) == y).all())


@pytest.mark.parametrize(
    ("build", "shape", "options", "message"),
    [
        (mlp, (1, 8, 8), {"hidden": [0]}, r"model\.hidden must be positive"),
        (mlp, (1, 8, 8), {"activation": "swish"}, r"type model\.activation=relu"),
        (mlp, (1, 8, 8), {"dropout": 1.0}, r"below 1, got 1\.0; type model\.dropout=0\.1"),
        (cnn, (1, 2, 2), {}, r"type model\.channels=\[16\]"),
        (gn_cnn, (3, 32, 32), {"channels": [32, 0, 8]}, "must be positive numbers"),
        (gn_cnn, (3, 32, 32), {"groups": 0}, "must be positive numbers"),
        (gn_cnn, (3, 32, 32), {"groups": 5}, r"model\.groups=5 must divide .* got 32; type"),
        (gn_cnn, (3, 32, 32), {"halving": ["stride"]}, r"type model\.halving=\[stride,stride,str"),
        (gn_cnn, (3, 32, 32), {"halving": ["skip"] * 3}, "stride or pool for each of the 3"),
        (gn_cnn, (3, 32, 32), {"first_kernel": 4}, r"must be odd.*type model\.first_kernel=5"),
        (gn_cnn, (1, 2, 2), {"halving": ["pool"] * 3}, "3 halvings leave nothing of a 2×2"),
        (resnet9, (1, 7, 8), {}, "three poolings leave nothing of a 7×8 image"),
        (resnet9, (1, 8, 8), {"width": 0}, "must be positive numbers"),
        (row_transformer, (1, 8, 8), {"depth": 0}, r"model\.depth must be a positive number"),
        (row_transformer, (1, 8, 8), {"heads": 3}, r"model\.heads=3 must divide .* got 64"),
        (resnet9, (1, 8, 8), {"norm": "layer"}, r"model\.norm must be group or batch, got 'layer'"),
        (resnet9, (1, 8, 8), {"width": 12}, r"model\.groups=8 must divide .* got 12"),
    ],
)
def test_networks_that_cannot_be(
    build: Callable[..., nn.Module], shape: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(shape, 10, **options)
