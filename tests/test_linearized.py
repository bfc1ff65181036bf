"""The tangent of a network: what it equals, what adds up, and that it merges like the network."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from toys import SIZE, Kind, ToySuite, expert_state, network

from lit_merge.checkpoints.digests import state_digest
from lit_merge.checkpoints.origin import check_origin
from lit_merge.errors import MergeError
from lit_merge.functional.linearize import first_order, forward_differentiable
from lit_merge.linearized import LinearizedNetwork
from lit_merge.lora import LoraNetwork, LoraOptions
from lit_merge.methods import AdaMerging, TaskArithmetic
from lit_merge.skeleton import Skeleton
from lit_merge.suites.linearized import LinearizedSuite

KINDS: tuple[Kind, ...] = ("vit", "cnn", "tied", "mlp")


class HuggingFace(nn.Module):
    """The image tower of transformers with eager or fused attention."""

    def __init__(self, attention: str) -> None:
        super().__init__()
        self.attention = attention
        transformers = pytest.importorskip("transformers")
        config = transformers.CLIPVisionConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
        )
        self.tower = transformers.CLIPVisionModel._from_config(config, attn_implementation=attention)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.tower(pixel_values=images).pooler_output
        return features


def small_lora() -> nn.Module:
    """A network of which only low-rank factors are parameters."""
    return LoraNetwork(network("vit").double(), LoraOptions(rank=2))


MAKERS: dict[str, Callable[[], nn.Module]] = {
    **{kind: lambda kind=kind: network(kind) for kind in KINDS},  # type: ignore[misc]
    "hugging_face": lambda: HuggingFace("sdpa"),
    "hugging_face_eager": lambda: HuggingFace("eager"),
    "lora": small_lora,
}


@pytest.fixture(params=MAKERS)
def plain(request: pytest.FixtureRequest) -> nn.Module:
    """A network in float64."""
    torch.manual_seed(0)
    return MAKERS[request.param]().double().eval()


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def direction(plain: nn.Module, seed: int, spread: float = 0.1) -> dict[str, Tensor]:
    """A random change of every parameter; tied ones get one change, buffers none."""
    generator, done = torch.Generator().manual_seed(seed), dict[int, Tensor]()
    noise = {
        name: done.setdefault(id(value), spread * torch.randn(value.shape, generator=generator).double())
        for name, value in plain.named_parameters(remove_duplicate=False)
    }
    return {name: noise.get(name, torch.zeros_like(value)) for name, value in plain.state_dict().items()}


def moved(state: Mapping[str, Tensor], *changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: value + sum((change[name] for change in changes), torch.zeros_like(value))
        for name, value in state.items()
    }


def test_at_its_start_it_is_the_network(plain: nn.Module) -> None:
    tangent = LinearizedNetwork(plain)
    with forward_differentiable():
        expected = plain(images())
    torch.testing.assert_close(tangent(images()), expected, rtol=1e-13, atol=1e-14)  # sums in another order


def test_it_has_the_names_of_the_network_in_their_order(plain: nn.Module) -> None:
    tangent = LinearizedNetwork(plain)
    assert list(tangent.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in tangent.named_parameters()] == [name for name, _ in plain.named_parameters()]
    plain.load_state_dict(tangent.state_dict())
    assert Skeleton(tangent).tied == Skeleton(plain).tied
    assert Skeleton(tangent).buffers_of == Skeleton(plain).buffers_of


def test_the_network_is_left_alone(plain: nn.Module) -> None:
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    tangent = LinearizedNetwork(plain)
    with torch.no_grad():
        for parameter in tangent.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())


def test_task_vectors_add_exactly(plain: nn.Module) -> None:
    skeleton, start = Skeleton(LinearizedNetwork(plain)), dict(plain.state_dict())
    origin = skeleton(start, images())
    changes = [direction(plain, seed) for seed in range(3)]
    together = skeleton(moved(start, *changes), images()) - origin
    apart = [skeleton(moved(start, change), images()) - origin for change in changes]
    # eager attention of transformers takes its softmax in float32, whatever the network is in
    eager = isinstance(plain, HuggingFace) and plain.attention == "eager"
    torch.testing.assert_close(together, sum(apart), rtol=0, atol=1e-6 if eager else 1e-11)
    bent = Skeleton(plain)
    assert (bent(moved(start, *changes), images()) - origin - sum(apart)).abs().max() > 1e-3  # not so the network


def test_it_is_the_derivative_of_the_network(plain: nn.Module) -> None:
    skeleton, start, change = Skeleton(LinearizedNetwork(plain)), dict(plain.state_dict()), direction(plain, 0)
    slope = skeleton(moved(start, change), images()) - skeleton(start, images())
    # the other mode of differentiation: ⟨u, J v⟩ = ⟨Jᵀ u, v⟩ for a random u
    inputs = {name: start[name].detach().requires_grad_() for name, _ in plain.named_parameters()}
    aliases = {alias: inputs[name] for alias, name in Skeleton(plain).tied.items()}
    features = functional_call(plain, start | inputs | aliases, (images(),), tie_weights=False)
    u = torch.randn(features.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    gradients = torch.autograd.grad((u * features).sum(), list(inputs.values()), allow_unused=True)
    dot = sum((g * change[name]).sum() for name, g in zip(inputs, gradients, strict=True) if g is not None)
    torch.testing.assert_close((u * slope).sum(), torch.as_tensor(dot), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["vit", "cnn", "mlp"])
def test_it_is_what_finite_differences_say(kind: Kind) -> None:
    plain = network(kind).double().eval()
    skeleton, start, change = Skeleton(LinearizedNetwork(plain)), dict(plain.state_dict()), direction(plain, 0)
    step = {name: 1e-5 * value for name, value in change.items()}
    back = {name: -value for name, value in step.items()}
    plainly = Skeleton(plain)
    difference = (plainly(moved(start, step), images()) - plainly(moved(start, back), images())) / 2e-5
    slope = skeleton(moved(start, change), images()) - skeleton(start, images())
    torch.testing.assert_close(slope, difference, rtol=1e-6, atol=1e-8)


def test_its_gradient_is_that_of_the_network_at_the_start_and_stays_it(plain: nn.Module) -> None:
    tangent, weights = LinearizedNetwork(plain), torch.linspace(-1, 1, 3, dtype=torch.float64)[:, None]
    parameters = list(plain.parameters())
    expected = torch.autograd.grad((weights * plain(images())).sum(), parameters, allow_unused=True)
    for _ in range(2):
        (gradients) = torch.autograd.grad((weights * tangent(images())).sum(), list(tangent.parameters()))
        for mine, theirs in zip(gradients, expected, strict=True):
            torch.testing.assert_close(mine, torch.zeros_like(mine) if theirs is None else theirs, rtol=1e-6, atol=1e-9)
        with torch.no_grad():  # the loss is linear in the features, so the gradient is the same everywhere
            for parameter in tangent.parameters():
                parameter.add_(0.1)


def test_base_from_a_state_or_a_file_is_the_start(tmp_path: Path) -> None:
    base = expert_state(network("mlp"), 5)
    save_file(base, tmp_path / "base.safetensors")
    expected = Skeleton(network("mlp"))(base, images().float())
    for given in (base, tmp_path / "base.safetensors", str(tmp_path / "base.safetensors")):
        assert torch.equal(LinearizedNetwork(network("mlp"), given)(images().float()), expected)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({"1.weight": torch.zeros(1)}, "base: its tensors are not those of the network: 3 missing"),
        (network("mlp").state_dict() | {"3.bias": torch.zeros(9)}, r"base: 3\.bias: the network expects shape \(4,\)"),
        ("gone.safetensors", r"gone\.safetensors: no such file"),
    ],
)
def test_another_base_is_refused(base: Any, message: str) -> None:
    with pytest.raises(MergeError, match=message):
        LinearizedNetwork(network("mlp"), base)


def test_running_statistics_and_dropout_stay_as_they_are() -> None:
    plain = nn.Sequential(network("cnn"), nn.Dropout(0.5))
    tangent = LinearizedNetwork(plain).train()
    x = torch.randn(8, 3, SIZE, SIZE)
    assert torch.equal(tangent(x), tangent(x))
    state = tangent.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items() if "running" in name)


def test_an_operation_without_forward_derivative_is_named() -> None:
    class OneWay(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad

    with pytest.raises((MergeError, RuntimeError), match="jvp"):
        first_order(lambda at: OneWay.apply(at["x"]), {"x": torch.ones(1)}, {"x": torch.ones(1)})


def test_fused_attention_is_back_afterwards() -> None:
    before = (torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled())
    LinearizedNetwork(network("vit"))(images().float())
    assert (torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()) == before


class TestMerging:
    """A suite of tangents goes through the same merge as one of networks."""

    @pytest.mark.parametrize("kind", KINDS)
    def test_merged_features_are_the_sum_of_the_experts(self, kind: Kind) -> None:
        suite = LinearizedSuite(ToySuite(kind, dtype="float64"))
        module = TaskArithmetic(suite=suite, scale=0.4, buffers="base")
        module.configure_model()
        base = dict(suite.base())
        frozen = {name: base[name] for name in module.skeleton.buffers_of}
        origin = module.skeleton(base, images())
        experts = [module.skeleton(dict(suite.expert(task)) | frozen, images()) - origin for task in suite.tasks]
        merged = module.skeleton(module.merged_state(), images()) - origin
        torch.testing.assert_close(merged, 0.4 * torch.stack(experts).sum(0), rtol=1e-9, atol=1e-10)

    @pytest.mark.parametrize("kind", ["vit", "tied"])
    def test_coefficients_get_their_gradients(self, kind: Kind) -> None:
        suite = LinearizedSuite(ToySuite(kind, dtype="float64"))
        module = AdaMerging(suite=suite, granularity="task", init=0.3)
        module.configure_model()
        (coefficients,) = (parameter for parameter in module.parameters() if parameter.requires_grad)

        def loss() -> Tensor:
            features = module.skeleton(module.complete(module.merge(module.bank)), images())
            return F.softmax(module.head(suite.tasks[0])(features), -1).square().sum()

        (gradient,) = torch.autograd.grad(loss(), coefficients)
        flat, step = coefficients.data.view(-1), 1e-4
        for place in range(flat.numel()):
            values = []
            for sign in (1, -1):
                flat[place] += sign * step
                values.append(loss().item())
                flat[place] -= sign * step
            assert gradient.view(-1)[place].item() == pytest.approx(
                (values[0] - values[1]) / (2 * step), rel=1e-4, abs=1e-8
            )

    def test_arguments(self) -> None:
        toys = ToySuite("mlp")
        assert LinearizedSuite(toys).name == "toys (linearised)"
        assert LinearizedSuite(toys, {"task.b": "x.safetensors"}).tasks == ("task.b",)
        with pytest.raises(MergeError, match=r"low-rank experts are files"):
            LinearizedSuite(toys, lora=LoraOptions())
        with pytest.raises(MergeError, match=r"at least one"):
            LinearizedSuite(toys, {})
        with pytest.raises(MergeError, match=r"unknown task 'cars'"):
            LinearizedSuite(toys, {"cars": "x.safetensors"})
        with pytest.raises(MergeError, match=r"x\.safetensors: no such file"):
            LinearizedSuite(toys, {"task.b": "x.safetensors"}).expert("task.b")

    def test_experts_in_folders(self, tmp_path: Path) -> None:
        toys = ToySuite("mlp")
        save_file(dict(toys.expert("task.b")), tmp_path / "model.safetensors")
        assert set(LinearizedSuite(toys, {"task.b": tmp_path}).expert("task.b")) == set(toys.base())
        (tmp_path / "finetune.json").write_text("[")
        with pytest.raises(MergeError, match=r"finetune\.json: .*JSON"):
            LinearizedSuite(toys, {"task.b": tmp_path}).expert("task.b")

    @pytest.mark.parametrize(("method", "base"), [("full", None), ("lora", None), ("linearized", "x")])
    def test_experts_of_the_suite_that_are_not_of_the_tangent(
        self, method: str, base: str | None, tmp_path: Path
    ) -> None:
        class Checked(ToySuite):
            def expert(self, task: str) -> Mapping[str, Tensor]:
                check_origin(tmp_path, self.base(), f"expert {task!r}")
                return super().expert(task)

        toys, facts = Checked("mlp"), tmp_path / "finetune.json"
        LinearizedSuite(toys).expert("task.b")  # nothing says how it was made
        facts.write_text(json.dumps({"method": "linearized", "base": state_digest(toys.base())}))
        LinearizedSuite(toys).expert("task.b")
        with pytest.raises(MergeError, match="use LinearizedSuite"):
            toys.expert("task.b")
        facts.write_text(json.dumps({"method": method, "base": base or state_digest(toys.base())}))
        with pytest.raises(MergeError, match=r"finetune\.json: expert 'task\.b': expected (method linearized|base)"):
            LinearizedSuite(toys).expert("task.b")


def test_a_network_without_memory_takes_its_base() -> None:
    base = network("vit").state_dict()
    with torch.device("meta"):
        empty = network("vit")
    tangent = LinearizedNetwork(empty, base)
    torch.testing.assert_close(tangent(images().float()), network("vit")(images().float()))
    assert all(value.data_ptr() != base[name].data_ptr() for name, value in tangent.state_dict().items())
