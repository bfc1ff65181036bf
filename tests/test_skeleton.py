from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import SIZE, Kind, network

from lit_merge.errors import MergeError
from lit_merge.skeleton import Skeleton, freeze_to_buffers

IMAGES = torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["vit", "cnn", "tied", "mlp"])
def test_runs_like_the_network(kind: Kind) -> None:
    net = network(kind).eval()
    skeleton = Skeleton(net)
    torch.testing.assert_close(skeleton(net.state_dict(), IMAGES), net(IMAGES))


@pytest.mark.parametrize("kind", ["vit", "cnn", "tied"])
def test_holds_no_values_and_leaves_the_network_alone(kind: Kind) -> None:
    net = network(kind).train()
    before = deepcopy(net.state_dict())
    skeleton = Skeleton(net)
    assert not list(skeleton.parameters())
    assert skeleton.state_dict() == {}
    assert sum(buffer.numel() for buffer in skeleton.buffers()) == 0
    assert all(p.requires_grad for p in net.parameters())
    assert net.training
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_tied_names_and_buffers_are_known() -> None:
    assert Skeleton(network("tied")).tied == {"second.weight": "first.weight"}
    assert Skeleton(network("tied")).buffers_of == {"index"}
    assert "bn1.running_mean" in Skeleton(network("cnn")).buffers_of


def test_overriding_a_tied_weight_reaches_both_names_after_a_move() -> None:
    net = network("tied")
    skeleton = Skeleton(net).to(torch.float64)
    state = {name: value.double() if value.is_floating_point() else value for name, value in net.state_dict().items()}
    changed = state | {"first.weight": 2 * state["first.weight"], "second.weight": 2 * state["first.weight"]}
    net.double()
    with torch.no_grad():
        net.first.weight.mul_(2)  # type: ignore[union-attr,operator]
    torch.testing.assert_close(skeleton(changed, IMAGES.double()), net(IMAGES.double()))


def test_gradients_reach_what_is_passed_in() -> None:
    net = network("cnn").eval()
    trained = dict(net.named_parameters())
    state = {k: v.clone().requires_grad_(k in trained) for k, v in net.state_dict().items()}
    Skeleton(net)(state, IMAGES).sum().backward()
    net(IMAGES).sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(state[name].grad, parameter.grad)


class Pair(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return x, x


class Flat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum()


@pytest.mark.parametrize(("net", "found"), [(Pair(), "found tuple"), (Flat(), r"found \(\)")])
def test_names_an_output_that_is_not_features(net: nn.Module, found: str) -> None:
    with pytest.raises(MergeError, match=rf"expected features \(4, D\) for 4 images, {found}; wrap the network"):
        Skeleton(net)({}, IMAGES)


def test_freezing_keeps_ties_and_results() -> None:
    net = network("tied").eval()
    expected = net(IMAGES)
    frozen = freeze_to_buffers(deepcopy(net))
    assert not list(frozen.parameters())
    assert frozen.first.weight is frozen.second.weight  # type: ignore[union-attr]
    torch.testing.assert_close(frozen(IMAGES), expected)


def test_a_layer_that_is_there_twice_is_run_twice() -> None:
    layer = nn.Linear(4, 4)
    net = nn.Sequential(layer, nn.Tanh(), layer)
    images = torch.ones(2, 4)
    torch.testing.assert_close(Skeleton(net)(net.state_dict(), images), net(images))
