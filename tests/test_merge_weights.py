from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import refused
from safetensors.torch import load_file, save_file
from streamed import SHAPES, assert_same, in_memory, make, states

from lit_merge import MergeTrainer, main, methods, transforms
from lit_merge.checkpoints.reading import read_state


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Base and two experts as folders, the base in two shards."""
    for name in ("", "a", "b"):
        folder = tmp_path / (name or "base")
        folder.mkdir()
        save_file(states()[name], folder / "model.safetensors")
    for name in ("config.json", "tokenizer.model", "notes.txt", "tokenizer.py"):
        (tmp_path / "base" / name).write_text("{}")
    (tmp_path / "base/modeling.py").write_text("raise SystemExit")
    return tmp_path


class TestCommand:
    def test_merges_folders(self, folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
        given = ["--base", f"{folders}/base", "--experts", f"{folders}/a", f"second={folders}/b"]
        main(["merge", *given, "--method", "Ties", "--scale", "0.5", "--density=0.4", "--progress=false",
              "--output", f"{folders}/out", "--shard_size", "1KB"])  # fmt: skip
        model = make("Ties", 2, {"scale": 0.5, "density": 0.4})
        assert_same(dict(read_state(folders / "out/model.safetensors.index.json")), in_memory(model, states()))
        files = sorted(path.name for path in (folders / "out").iterdir())
        shards = [f"model-0000{n}-of-00004.safetensors" for n in range(1, 5)]
        assert files == [
            "README.md",
            "config.json",
            "merge.json",
            *shards,
            "model.safetensors.index.json",
            "tokenizer.model",
        ]
        assert sum(len(load_file(folders / "out" / shard)) for shard in shards) == len(SHAPES) + 1
        said = json.loads((folders / "out/merge.json").read_text())
        assert (said["method"], said["tasks"], said["streamed"]) == ("Ties", ["a", "second"], True)
        card = (folders / "out/README.md").read_text()
        assert said["base"][:12] in card
        assert "features" not in card
        assert "merged network: " in capsys.readouterr().out
        again = ["merge", *given, "--method=SimpleAverage", "--progress=false", "--output", f"{folders}/out"]
        assert "there are weights already" in refused(capsys, *again, status=1)
        (folders / "base/config.json").write_text('{"changed": true}')
        main([*again, "--overwrite", "true"])
        assert "changed" in (folders / "out/config.json").read_text()  # new weights with an old config would not fit
        assert not list((folders / "out").glob("*index.json"))
        assert_same(load_file(folders / "out/model.safetensors"), in_memory(make("SimpleAverage", 2, {}), states()))

    def test_reads_a_config(self, folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(folders)
        Path("merge.yaml").write_text(
            "base: base\nexperts: [a, b]\noutput: out\nprogress: false\nmethod:\n  class_path: TaskArithmetic\n"
            "  init_args:\n    scale: [{filter: mlp, value: [0.1, 0.9]}, {value: 0.2}]\n"
            "    transforms: [{class_path: lit_merge.transforms.Dare, init_args: {drop: 0.2}}]\n"
        )
        main(["merge", "--config", "merge.yaml"])
        options = {
            "scale": [{"filter": "mlp", "value": [0.1, 0.9]}, {"value": 0.2}],
            "transforms": [transforms.Dare(0.2)],
        }
        assert_same(load_file("out/model.safetensors"), in_memory(make("TaskArithmetic", 2, options), states()))

    @pytest.mark.parametrize(
        ("more", "said", "status"),
        [
            (["--method=AdaMerging"], "AdaMerging learns its merge", 1),
            (["--method=Tyes"], "did you mean Ties", 2),
            (["--method=ties"], "error: unknown method 'ties'; did you mean Ties?\n", 2),
            (["--method=xyzzy"], "unknown method 'xyzzy'; there are AWM, AdaMerging, ", 2),
            (["--method=Ties", "--densty=0.3"], "did you mean density", 2),
            (["--method=Ties", "--density=much"], "density", 2),
            (["--method=Ties", "--output=base", "--overwrite=true"], "is the folder of", 1),
            (["--method=Ties", "--output=base/config.json"], "expected a folder for the weights, found a file", 1),
            (["--method=Ties", "--base=nowhere"], "nowhere: no such file or folder", 1),
            (["--method=Ties", "--experts", "cut"], "not a complete safetensors file", 1),
            (["--method=Ties", "--shard_size=much"], "shard_size", 2),
            (
                ["--method=TaskArithmetic", '--scale=[{"filter": "mpl", "value": 0.3}, {"value": 1}]'],
                "'mpl' fits no",
                1,
            ),
        ],
    )
    def test_refusals(
        self,
        folders: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        more: list[str],
        said: str,
        status: int,
    ) -> None:
        monkeypatch.chdir(folders)
        (folders / "cut").mkdir()
        whole = (folders / "b/model.safetensors").read_bytes()
        (folders / "cut/model.safetensors").write_bytes(whole[:-1])
        given = ["--base=base", "--experts", "a", "--output=out", "--progress=false"]
        message = refused(capsys, "merge", *given, *more, status=status)
        assert said in message
        assert "merging in memory" not in message
        assert not (folders / "out").exists()


def test_the_trainer_streams_what_it_need_not_score(tmp_path: Path) -> None:
    from testers import TINY
    from toys import ToySuite

    for kind in ("cnn", "tied"):
        model = methods.Ties(suite=ToySuite(kind))  # type: ignore[arg-type, unused-ignore]
        path = MergeTrainer(**TINY).merge(model, output=tmp_path / kind)
        assert not hasattr(model, "bank")
        model.configure_model()
        assert_same(load_file(path), model.merged_state())
        assert "Ties" in (tmp_path / kind / "README.md").read_text()
