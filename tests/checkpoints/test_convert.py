"""Whole modules become safetensors bit for bit, and nothing else does."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import old_checkpoints as old
import open_clip
import pytest
import torch
from commands import refused
from open_clip.transformer import VisionTransformer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from lit_merge.checkpoints.convert import ConvertReport, convert
from lit_merge.checkpoints.reading import file_digest
from lit_merge.cli import main
from lit_merge.encoders.heads import read_head
from lit_merge.errors import MergeError

LEFTOVERS = {"positional_embedding", "text_projection", "logit_scale", "token_embedding.weight", "ln_final.weight"}


def made(source: str = "old.pt", target: str = "new.safetensors", **how: Any) -> ConvertReport:
    """Convert, and check that sidecar, header and files agree."""
    report = convert(Path(source), Path(target), **how)
    said = json.loads(Path(target).with_suffix(".json").read_text())
    assert said == report.sidecar
    assert said["source"]["sha256"] == file_digest(source)
    assert said["weights"]["sha256"] == file_digest(target)
    with safe_open(target, "pt") as file:
        assert file.metadata().items() >= {"format": "pt", "kind": said["kind"]}.items()
    return report


@pytest.mark.parametrize("modeling", ["src.modeling", "modeling"])
def test_an_encoder_is_kept_bit_for_bit(modeling: str) -> None:
    encoder = old.encoder()
    old.save_whole(encoder, "old.pt", modeling)
    assert modeling not in sys.modules
    report = made()
    found, expected = load_file("new.safetensors"), encoder.model.visual.state_dict(prefix="visual.")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in expected.items())
    said = report.sidecar
    assert set(said["dropped"]) == LEFTOVERS | {"ln_final.bias"}
    assert f"{modeling}.ImageEncoder" in said["globals"]
    sizes = {"width": 32, "depth": 2, "heads": 2, "mlp_width": 128, "patch": 4, "image_size": 8, "embedding_width": 16}
    assert said.items() >= {**sizes, "layout": "open_clip", "activation": "quick_gelu", "architecture": None}.items()


@pytest.mark.parametrize(("act", "now"), [(old.QuickGELU, open_clip.transformer.QuickGELU), (nn.GELU, nn.GELU)])
def test_open_clip_of_today_computes_the_same(act: type[nn.Module], now: type[nn.Module]) -> None:
    encoder = old.encoder(act)
    old.save_whole(encoder, "old.pt")
    assert made().sidecar["activation"] == ("gelu" if act is nn.GELU else "quick_gelu")
    tower = VisionTransformer(8, 4, 32, 2, 2, 4.0, output_dim=16, act_layer=now).eval()
    tower.load_state_dict({name.removeprefix("visual."): value for name, value in load_file("new.safetensors").items()})
    images = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(tower(images), encoder(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_head_gives_the_same_logits(normalize: bool) -> None:
    head = old.head(normalize=normalize)
    head.bias.data[1] = 0.5
    old.save_whole(head, "head_MNIST.pt")
    report = made("head_MNIST.pt", "head.safetensors")
    Path("head.json").unlink()  # the weights' own header is enough
    found, features = read_head("head.safetensors"), torch.randn(7, old.EMBED)
    assert torch.equal(found(features), head(features))
    assert (
        report.sidecar.items() >= {"kind": "head", "classes": 5, "embedding_width": 16, "normalize": normalize}.items()
    )
    assert report.sidecar["logit_scale"] == (pytest.approx(100.0, rel=1e-6) if normalize else None)
    head.weight.data[0] *= 2
    old.save_whole(head, "trained.pt")
    assert made("trained.pt", "trained.safetensors").sidecar["logit_scale"] is None


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("suffix", [".pt", ".bin"])
def test_a_state_dict_keeps_its_names(suffix: str, legacy: bool) -> None:
    shared = torch.randn(2, 3)
    half = torch.randn(4, 2).T.to(torch.bfloat16)
    state = {"a.weight": shared, "tied": shared, "half": half, "steps": torch.tensor(3), "mask": torch.tensor([True])}
    torch.save(state, f"old{suffix}", _use_new_zipfile_serialization=not legacy)
    assert made(f"old{suffix}").kind == "state_dict"
    found = load_file("new.safetensors")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in state.items())


def test_nothing_is_overwritten_unless_asked() -> None:
    torch.save({"w": torch.ones(1)}, "old.pt")
    Path("new.json").write_text("mine")
    with pytest.raises(MergeError, match=r"new\.json: it exists; give another name or --overwrite true"):
        made()
    assert Path("new.json").read_text() == "mine"
    assert not Path("new.safetensors").exists()
    made(overwrite=True)
    with pytest.raises(MergeError, match=r"new\.safetensors: it exists"):
        made()


@pytest.mark.parametrize(
    ("source", "target", "what"),
    [
        ("old.safetensors", "new.safetensors", "old.safetensors: expected .pt, .pth, .bin or .ckpt"),
        ("old.pt", "new.pt", "new.pt: expected a name that ends in .safetensors, found .pt"),
        ("gone.pt", "new.safetensors", "gone.pt: no such file"),
    ],
)
def test_wrong_names(source: str, target: str, what: str) -> None:
    torch.save({"w": torch.ones(1)}, "old.pt")
    with pytest.raises(MergeError) as error:
        convert(Path(source), Path(target))
    assert str(error.value).startswith(what)


def change(edit: Callable[[Any], None], content: Any = None) -> Callable[[], None]:
    """Save an encoder or another module with one thing wrong."""

    def save() -> None:
        module = old.encoder() if content is None else content()
        edit(module)
        old.save_whole(module, "old.pt")

    return save


def set_(path: str, value: object) -> Callable[[Any], None]:
    """Replace a parameter, module or attribute, however deep."""

    def edit(module: Any) -> None:
        *parents, leaf = path.split(".")
        for name in parents:
            module = getattr(module, name)
        if isinstance(value, torch.Tensor) and not value.is_floating_point():
            module._parameters[leaf] = value
        else:
            setattr(module, leaf, value)

    return edit


def loop(module: Any) -> None:
    """A module inside of itself."""
    module.model._modules["self"] = module.model


def tanh(module: nn.Module) -> None:
    """The approximation of GELU."""
    if isinstance(module, nn.Sequential):
        module.gelu = nn.GELU("tanh")


def headless(module: nn.Module) -> None:
    """A number of heads that cannot be."""
    if isinstance(module, nn.MultiheadAttention):
        module.num_heads = 5


def doubled(module: Any) -> None:
    """Thirty modules that look like a billion."""
    for _ in range(30):
        inner = nn.Module()
        inner.one = inner.two = module.model.visual
        module.model.visual = inner


VISUAL, BLOCK = "model.visual", "model.visual.transformer.resblocks.1"
NAN, WEIGHT = nn.Parameter(torch.full((32,), float("nan"))), nn.Parameter(torch.zeros(1))
REFUSED = {
    "NaN": (change(set_(f"{BLOCK}.ln_1.bias", NAN)), "resblocks.1.ln_1.bias: 32 of 32 values are NaN"),
    "integers": (
        change(set_(f"{BLOCK}.ln_1.bias", torch.ones(32).int())),
        "ln_1.bias: expected floating-point weights",
    ),
    "float8": (change(set_(f"{VISUAL}.proj", nn.Parameter(torch.zeros(32, 16).to(torch.float8_e4m3fn)))), "cast it"),
    "shape": (change(set_(f"{VISUAL}.proj", nn.Parameter(torch.zeros(31, 16)))), "proj: expected shape (32, 16)"),
    "grid": (
        change(set_(f"{VISUAL}.positional_embedding", nn.Parameter(torch.zeros(4, 32)))),
        "positional_embedding: expected shape (5, 32), found (4, 32)",
    ),
    "missing": (change(lambda m: delattr(m.model.visual, "proj")), "1 missing (visual.proj), 0 extra"),
    "extra": (change(lambda m: setattr(m.model.visual, "new", WEIGHT)), "0 missing, 1 extra (visual.new)"),
    "outside": (change(lambda m: setattr(m, "new", WEIGHT)), "new: expected everything below model"),
    "activation": (change(set_(f"{BLOCK}.mlp.gelu", nn.GELU())), "in all blocks, found GELU, QuickGELU"),
    "tanh": (
        change(lambda m: m.model.visual.transformer.resblocks.apply(tanh)),
        "expected either QuickGELU or exact GELU in all blocks, found GELU",
    ),
    "heads": (change(set_(f"{BLOCK}.attn.num_heads", 5)), "expected the same number of attention heads"),
    "loop": (change(loop), "modules inside of modules without end"),
    "billion": (change(doubled), "more than 20000 modules"),
    "no block": (change(set_(f"{VISUAL}.transformer", nn.Module())), "expected a vision transformer, found no block"),
    "empty": (change(set_(f"{VISUAL}.proj", nn.Parameter(torch.zeros(32, 0)))), "visual.proj: expected weights, found"),
    "matrix": (change(set_(f"{VISUAL}.proj", nn.Parameter(torch.zeros(3)))), "proj or mlp.c_fc is not of CLIP's shape"),
    "no heads": (change(lambda m: m.model.visual.apply(headless)), "expected a number of attention heads that divides"),
    "not a tensor": (change(lambda m: m.model.visual._parameters.update(proj="x")), "visual.proj: expected a tensor"),
    "not a module": (
        change(lambda m: m.model._modules.update(visual=3)),
        "model: visual: expected a module, found int",
    ),
    "name": (change(lambda m: m.model._modules.update({"a.b": nn.Linear(1, 1)})), "expected names without dots"),
    "head NaN": (change(set_("bias", nn.Parameter(torch.full((5,), torch.inf))), old.head), "bias: 5 of 5 values are"),
    "head shape": (
        change(set_("bias", nn.Parameter(torch.zeros(4))), old.head),
        "expected weight (C, D) and bias (C,)",
    ),
    "head extra": (change(lambda m: setattr(m, "new", WEIGHT), old.head), "0 missing, 1 extra (new)"),
    "head flag": (change(set_("normalize", "yes"), old.head), "normalize: expected true or false, found 'yes'"),
    "other module": (change(lambda _: None, lambda: nn.Linear(1, 1)), "it holds a torch.nn.modules.linear.Linear"),
    "other content": (change(lambda _: None, lambda: {"model": old.encoder()}), "expected a module, found dict"),
    "state NaN": (change(lambda _: None, lambda: {"w": torch.tensor([torch.nan])}), "w: 1 of 1 values are NaN"),
    "epoch": (change(lambda _: None, lambda: {"epoch": 3}), "epoch: expected a tensor, found int"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    save, what = REFUSED[case]
    save()
    with pytest.raises(MergeError) as error:
        convert(Path("old.pt"), Path("out/new.safetensors"))
    assert str(error.value).startswith("old.pt: ")
    assert what in str(error.value)
    assert [path.name for path in Path().iterdir()] == ["old.pt"]


@pytest.mark.parametrize("save", [lambda: old.save_whole(old.encoder(), "old.pt"), change(lambda _: None, old.head)])
def test_too_large(save: Callable[[], None]) -> None:
    save()
    with pytest.raises(MergeError, match=r"old\.pt: it has \d+ bytes; expected at most 99"):
        made(max_bytes=99)


class TestCommand:
    def test_one_file(self, capsys: pytest.CaptureFixture[str]) -> None:
        old.save_whole(old.encoder(), "old.pt")
        main(["convert", "old.pt", "new.safetensors"])
        assert capsys.readouterr().out == "new.safetensors: encoder, 32 tensors, activation quick_gelu\n"
        assert "new.safetensors: it exists" in refused(capsys, "convert", "old.pt", "new.safetensors", status=1)
        main(["convert", "old.pt", "new.safetensors", "--overwrite", "true"])

    def test_a_folder(self, capsys: pytest.CaptureFixture[str]) -> None:
        Path("in/MNIST").mkdir(parents=True)
        old.save_whole(old.encoder(), "in/MNIST/finetuned.pt")
        old.save_whole(old.head(), "in/head_MNIST.pt")
        torch.save({"epoch": 3}, "in/other.pt")
        said = refused(capsys, "convert", "in", "out", status=1)
        assert "in: 1 of 3 files were not converted:" in said
        assert "in/other.pt: epoch: expected a tensor" in said
        found = {str(path) for path in Path("out").rglob("*.*")}
        assert found == {
            f"out/{name}.{suffix}" for name in ("MNIST/finetuned", "head_MNIST") for suffix in ("json", "safetensors")
        }

        Path("in/other.pt").unlink()
        main(["convert", "in", "out", "--overwrite", "true"])
        assert len(capsys.readouterr().out.splitlines()) == 2

    def test_an_empty_folder(self, capsys: pytest.CaptureFixture[str]) -> None:
        Path("in").mkdir()
        assert "in: expected files that end in .pt below it, found none" in refused(
            capsys, "convert", "in", "out", status=1
        )
