"""A step block by block is the ordinary step, and holds the merged weights of one block at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import chain
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from ranks import Record, close, odd, trainer
from testers import TINY
from tiny_clip import OPEN_CLIP, VISION, randomized
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from toys import SIZE, ToyData, ToySuite, expert_state, network

from lit_merge import AdaMerging, MergeModule, MergeTrainer, TaskDataModule, lazy_weights
from lit_merge.data import UnlabelledBatch
from lit_merge.encoders import HuggingFaceEncoder, OpenClipEncoder
from lit_merge.encoders.heads import CosineHead
from lit_merge.errors import MergeError
from lit_merge.functional import masked
from lit_merge.methods import DAM, SAU, ConcreteMerging, SingularAdaMerging
from lit_merge.objectives import Entropy, PerturbationConsistency, WeightedSum
from lit_merge.skeleton import Skeleton
from lit_merge.stack import Stack
from lit_merge.storage import sharded
from lit_merge.suites import NetworkSuite
from lit_merge.task_vectors import TaskVectors


class Odd(nn.Module):
    """Blocks that are called with keywords and return tuples, tied across blocks, called twice, skipped or read."""

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.linear, self.inner = nn.Linear(width, width), nn.ModuleList([nn.Linear(width, width)])
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor, *, skip: Tensor | None, flag: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
            x = x + self.scale * self.inner[0](self.linear(x).tanh()) + (0 if skip is None else skip)
            return x, {"twice": 2 * x if flag else x}

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Linear(3 * SIZE * SIZE, width)
        self.h = nn.ModuleList([self.Block(width) for _ in range(3)])
        self.h[1].linear.weight = self.h[0].linear.weight  # type: ignore[union-attr]
        self.pairs = nn.ModuleList([nn.ModuleList([nn.Linear(width, width), nn.LayerNorm(width)])])
        self.read = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width)])
        self.out = nn.Linear(width, width)
        self.out.weight = self.h[2].linear.weight  # type: ignore[union-attr,assignment]

    def forward(self, images: Tensor) -> Tensor:
        x = stem = self.stem(images.flatten(1))
        for block in self.h:
            x, more = block(x, skip=stem)
        x, _ = self.h[0](more["twice"], skip=None, flag=False)
        for pair in self.pairs:
            linear, norm = pair.children()
            x = norm(linear(x))
        features: Tensor = self.out(x @ self.read[0].weight)
        return features


def hugging_face() -> nn.Module:
    return HuggingFaceEncoder({**VISION, "image_size": SIZE, "patch_size": 4})


def open_clip_tower(folder: Path) -> nn.Module:
    vision = {**OPEN_CLIP["vision_cfg"], "image_size": SIZE, "patch_size": 4}
    (folder / "tiny-8.json").write_text(json.dumps({**OPEN_CLIP, "vision_cfg": vision}))
    open_clip.add_model_config(folder / "tiny-8.json")
    return OpenClipEncoder("tiny-8")


BLOCKS = {
    "vit": ["transformer.resblocks.0", "transformer.resblocks.1"],
    "open_clip": ["visual.transformer.resblocks.0", "visual.transformer.resblocks.1"],
    "hugging_face": ["vision_model.encoder.layers.0", "vision_model.encoder.layers.1"],
    "cnn": ["blocks.0", "blocks.1"],
    "mlp": ["1", "3"],
    "odd": ["h.0", "h.1", "h.2", "pairs.0.0", "pairs.0.1"],  # without those that are not called
}


def suite_of(kind: str, folder: Path, dtype: torch.dtype = torch.float64) -> NetworkSuite:
    made: dict[str, Callable[[], nn.Module]] = {
        "hugging_face": hugging_face, "open_clip": lambda: open_clip_tower(folder), "odd": Odd,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = randomized(made[kind]()) if kind in made else network(kind)  # type: ignore[arg-type]
        net = net.to(dtype).eval()
        width = net(torch.zeros(1, 3, SIZE, SIZE, dtype=dtype)).shape[1]
        heads = {f"t{t}": CosineHead(torch.randn(3 + t, width), scale=5.0).to(dtype) for t in range(3)}
    data = {task: ToyData(9 + t, 3 + t, t) for t, task in enumerate(heads)}
    for images in data.values():
        images.images = images.images.to(dtype)
    experts = {task: expert_state(net, 1 + t, 0.1) for t, task in enumerate(heads)}
    return NetworkSuite(net, experts, data, heads=heads, pixels=ToyData.pixels)  # type: ignore[arg-type]


def step(module: MergeModule, images: int = 5) -> tuple[dict[str, Tensor], Tensor]:
    """Logits of one training step, and the gradient of the coefficients."""
    if not hasattr(module, "bank"):
        module.configure_model()
        module.trainer = MergeTrainer(**TINY)
        module.trainer.strategy.connect(module)
        module.log = lambda *_, **__: None  # type: ignore[method-assign]
        module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    batch = {}
    for task in module.suite.tasks:
        data = module.suite.dataset(task, "test")
        batch[task] = UnlabelledBatch(torch.stack([data[i][0] for i in range(images)]), torch.arange(images))
    module.get_parameter("coefficients").grad = None
    result = module.training_step(batch, 0)
    result["loss"].backward()
    gradient = module.get_parameter("coefficients").grad
    assert gradient is not None
    return result["logits"], gradient.clone()


@pytest.mark.parametrize(
    ("kind", "max_images"),
    [
        ("vit", None),
        ("vit", 10),
        ("open_clip", 5),
        ("hugging_face", 10),
        ("cnn", 5),
        ("mlp", None),
        ("odd", 5),
        ("odd", 10),
    ],
)
def test_a_step_is_the_ordinary_step(tmp_path: Path, kind: str, max_images: int | None) -> None:
    suite = suite_of(kind, tmp_path)
    options: dict[str, Any] = {"suite": suite, "max_images": max_images, "softmax": max_images == 5}
    if max_images == 10:  # two more passes, one to the images
        options["objective"] = WeightedSum([Entropy(), PerturbationConsistency()], [1.0, 0.5])
    logits, gradient = step(AdaMerging(**options))
    module = AdaMerging(merge_by="block", **options)
    for _ in range(1 if max_images == 10 else 2):  # the first pass finds blocks that are not called
        found, own = step(module)
        assert all(torch.equal(found[task], logits[task]) for task in logits)
        torch.testing.assert_close(found, logits, rtol=0, atol=1e-12)
        torch.testing.assert_close(own, gradient, rtol=0, atol=1e-10)
    assert kind == "odd" or gradient.abs().min() > 0
    assert gradient.abs().max() > 1e-3
    assert list(module.skeleton.by_block.blocks) == BLOCKS[kind]


class Alive:
    """Counts bytes of merged weights and of their gradients that exist at once, by their storages."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.most = 0
        self._known: dict[int, tuple[StorageWeakRef, int]] = {}
        merged, pulled = Stack.merged, masked.pulled

        def counted_merge(stack: Stack, *args: Any, **kwargs: Any) -> Tensor:
            result = merged(stack, *args, **kwargs)
            self.note(result)
            return result

        def counted_pull(block: Any, gradient: Tensor, *rest: Any) -> Any:
            self.note(gradient)
            return pulled(block, gradient, *rest)

        monkeypatch.setattr(Stack, "merged", counted_merge)
        monkeypatch.setattr(lazy_weights, "pulled", counted_pull)

    def note(self, value: Tensor) -> None:
        storage = value.untyped_storage()
        self._known[storage._cdata] = (StorageWeakRef(storage), value.nbytes)
        self._known = {key: found for key, found in self._known.items() if not found[0].expired()}
        self.most = max(self.most, sum(size for _, size in self._known.values()))


@pytest.mark.parametrize(("kind", "most"), [("vit", 5), ("vit", "auto"), ("open_clip", 5), ("hugging_face", 5)])
def test_one_block_is_alive_at_a_time(tmp_path: Path, kind: str, most: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = suite_of(kind, tmp_path)
    module = AdaMerging(suite=suite)
    module.configure_model()
    sizes = dict(zip(module.bank.names, module.bank.sizes, strict=True))
    blocks = [sum(n for name, n in sizes.items() if name.startswith(f"{block}.")) for block in BLOCKS[kind]]
    outside = sum(sizes.values()) - sum(blocks)
    del module
    alive = Alive(monkeypatch)
    step(AdaMerging(suite=suite, merge_by="block", max_images=most))
    bound = 8 * (max(blocks) + outside + max(sizes.values()))  # a weight and its gradient pass each other
    assert 8 * (max(blocks) + outside) <= alive.most <= bound
    assert bound < 8 * sum(sizes.values())


def fits(make: Callable[..., MergeModule], suite: NetworkSuite, **options: Any) -> Iterator[MergeModule]:
    """The same fit in both ways."""
    for merge_by in ("network", "block"):
        module = make(suite=suite, merge_by=merge_by)
        data = TaskDataModule(suite, batch_size=6, steps_per_epoch=4, seed=1)
        MergeTrainer(**TINY, **options).fit(module, datamodule=data)
        yield module


@pytest.mark.parametrize(
    "make",
    [
        lambda **kw: ConcreteMerging(mask_steps=2, max_images=6, mask_rate=0.3, **kw),
        lambda **kw: SAU(unit="neuron", start=0.5, **kw),
    ],
    ids=["concrete", "sau"],
)
def test_masks_are_learned_alike(tmp_path: Path, make: Callable[..., MergeModule]) -> None:
    one, other = fits(make, suite_of("vit", tmp_path))
    for name, value in one.named_parameters():
        torch.testing.assert_close(other.get_parameter(name), value, rtol=0, atol=1e-9, msg=name)
    state = one.merged_state()
    assert all(torch.allclose(value, state[name], atol=1e-9) for name, value in other.merged_state().items())
    assert (one.get_parameter("logits") - one.get_parameter("logits")[0]).abs().max() > 1e-3


@pytest.mark.parametrize("storage", [None, "bfloat16"])
def test_works_in_mixed_precision(tmp_path: Path, storage: Any) -> None:
    make = lambda **kw: AdaMerging(storage_dtype=storage, optimizer=lambda p: torch.optim.SGD(p, lr=1.0), **kw)  # noqa: E731
    one, other = fits(make, suite_of("hugging_face", tmp_path, torch.float32), precision="bf16-mixed")
    moved = one.get_parameter("coefficients") - 0.3
    assert (other.get_parameter("coefficients") - 0.3 - moved).norm() < 0.02 * moved.norm()


def test_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    suite = suite_of("cnn", tmp_path)

    def fit(epochs: int, path: Path | None = None) -> AdaMerging:
        module = AdaMerging(suite=suite, merge_by="block")
        engine = MergeTrainer(**TINY | {"max_epochs": epochs})
        data = TaskDataModule(suite, batch_size=4, steps_per_epoch=2)
        engine.fit(module, datamodule=data, ckpt_path=path)
        engine.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module

    whole = fit(2)
    fit(1)
    assert torch.equal(fit(2, tmp_path / "1.ckpt").coefficients, whole.coefficients)


def test_two_ranks_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded, "WHOLE", 4)  # entries; toys have no tensor that is worth a message
    gradients = []
    for ranks, merge_by, storage in ((1, "network", "device"), (2, "block", "device"), (2, "block", "sharded")):
        (folder := tmp_path / f"{ranks}-{storage}").mkdir()
        module = AdaMerging(suite=odd(), merge_by=merge_by, storage=storage, max_images=5)
        data = TaskDataModule(module.suite, batch_size=8 // ranks, steps_per_epoch=2)
        options = {"max_epochs": 1, "callbacks": [Record(folder)], "enable_checkpointing": False}
        trainer(folder, ranks, **options).fit(module, datamodule=data)
        gradients.append([torch.load(folder / f"fit-{rank}.pt")["gradients"] for rank in range(ranks)])
    (alone,), *several = gradients
    for rank in chain.from_iterable(several):
        close(rank, alone)


def test_lazy_weights_are_a_state_dict(monkeypatch: pytest.MonkeyPatch) -> None:
    suite = ToySuite("tied", dtype="float64")
    module = AdaMerging(suite=suite)
    module.configure_model()
    coefficients = torch.rand(3, len(module.bank.names), dtype=torch.float64, requires_grad=True)
    expected = module.complete(module.bank.contract(coefficients))
    with module.bank.lazily():
        lazy = module.complete(module.bank.contract(coefficients))
    assert dict(lazy).keys() == expected.keys()
    assert len(lazy) == len(expected)
    with monkeypatch.context() as patch:
        patch.setattr(Stack, "merged", None)
        assert "stem.weight" in lazy
        assert "stem" not in lazy
    assert all(torch.equal(lazy[name], value) for name, value in expected.items())
    learned = torch.ones_like(expected["stem.bias"]).requires_grad_()
    changed = lazy | {"stem.bias": learned * 2}
    (changed["stem.bias"].sum() + changed["second.weight"].square().sum()).backward()
    (mine,), coefficients.grad = [coefficients.grad], None
    expected["second.weight"].square().sum().backward()
    torch.testing.assert_close(mine, coefficients.grad)
    assert learned.grad is not None
    copied = deepcopy(Skeleton(network("vit")))
    assert copied.by_block.blocks == tuple(BLOCKS["vit"])


class Doubled(AdaMerging):
    """Looks at the values of the merged weights."""

    def merge(self, bank: TaskVectors) -> dict[str, Tensor]:
        return {name: 2 * value for name, value in super().merge(bank).items()}


def test_says_what_cannot_be_merged_by_block() -> None:
    suite = ToySuite("vit")
    with pytest.raises(MergeError, match="expected network or block, found 'layer'"):
        AdaMerging(suite=suite, merge_by="layer")
    with pytest.raises(MergeError, match="DAM cannot merge by block: it uses one gradient"):
        DAM(suite=suite, merge_by="block")
    with pytest.raises(MergeError, match="SingularAdaMerging cannot merge by block: it multiplies"):
        SingularAdaMerging(suite=suite, merge_by="block")
    with pytest.raises(MergeError, match=r"no module of the network has a number in its name"):
        AdaMerging(suite=ToySuite("tied"), merge_by="block").configure_model()
    with pytest.raises(MergeError, match=r"Doubled cannot merge by block: its merge does not return"):
        step(Doubled(suite=suite, merge_by="block"))
