"""Whole runs: storages do not change results, and what does not fit into memory is adapted all the same."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import report, run
from kills import in_child
from testers import TINY
from torch import Tensor, nn
from toys import ToyData, ToySuite

from lit_merge import AdaMerging, MergeError, MergeModule, MergeTrainer, NetworkSuite, TaskDataModule
from lit_merge.callbacks import ExportMerge, Report
from lit_merge.checkpoints.threads import in_threads
from lit_merge.methods import DAM, ConcreteMerging, TaskArithmetic
from lit_merge.storage import DenseStorage, HostStorage, MappedStorage
from lit_merge.transforms import Ties


def fitted(make: Any, steps: int, storage: str, **options: Any) -> Any:
    suite = ToySuite("vit")
    module = make(suite=suite, storage=storage, **options)
    data = TaskDataModule(suite, batch_size=4, steps_per_epoch=steps, seed=1)
    MergeTrainer(**TINY).fit(module, datamodule=data)
    return module


def parameters(module: MergeModule) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in module.named_parameters()}


@pytest.mark.parametrize(
    ("make", "steps", "options"),
    [
        (AdaMerging, 20, {"optimizer": partial(torch.optim.Adam, lr=0.05)}),
        (AdaMerging, 5, {"transforms": [Ties()], "storage_dtype": "bfloat16"}),
        (ConcreteMerging, 4, {"mask_steps": 2}),
        (DAM, 3, {"mask_steps": 1}),
    ],
    ids=["adamerging", "ties", "concrete", "dam"],
)
def test_host_and_mmap_learn_the_bits_of_device(make: Any, steps: int, options: dict[str, Any]) -> None:
    expected = fitted(make, steps, "device", **options)
    for storage, kind in (("host", HostStorage), ("mmap", MappedStorage)):
        if make is not AdaMerging and storage == "host":
            continue
        found = fitted(make, steps, storage, **options)
        assert isinstance(found.bank.storage, kind)
        for name, value in parameters(expected).items():
            assert torch.equal(parameters(found)[name], value), name
        assert all(torch.equal(found.merged_state()[n], v) for n, v in expected.merged_state().items())
    assert isinstance(expected.bank.storage, DenseStorage)


def test_low_rank_stays_within_the_error_that_it_states(tmp_path: Path) -> None:
    suite = ToySuite("vit")
    module = AdaMerging(suite=suite, storage="low_rank", storage_rank=0.25)
    dense = AdaMerging(suite=suite, storage="device")
    dense.configure_model()
    data = TaskDataModule(suite, batch_size=4, steps_per_epoch=5, seed=1)
    trainer = MergeTrainer(**TINY, default_root_dir=tmp_path, callbacks=[Report(), ExportMerge()])
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    stated = report(tmp_path)["extra"]["storage"]
    assert 0.1 < stated["relative_error"] < 0.9  # of noise, whose spectrum is flat
    assert json.loads((tmp_path / "export/merge.json").read_text())["storage"] == stated
    coefficients = module.coefficients.detach()
    length = torch.cat([value.flatten(1) for value in dense.bank.deltas.values()], 1).norm(dim=1)
    errors = torch.tensor([stated["tasks"][task] for task in suite.tasks])
    bound = (coefficients.abs().max(1).values * errors * length).sum()
    merged = [bank.contract(coefficients) for bank in (module.bank, dense.bank)]
    apart = torch.cat([(merged[0][name] - value).flatten() for name, value in merged[1].items()]).norm()
    assert 0 < float(apart) <= float(bound)


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ("--model.storage=mmap", "--model.storage_folder", str(tmp_path), "--model.storage_rank=0.5")
    cli = run("fit", "adamerging.yaml", *options)
    assert isinstance(cli.model.bank.storage, MappedStorage)
    assert "storage" not in report(next(tmp_path.rglob("report.json")).parent)["extra"]  # nothing is lost


def test_streams_and_files_have_no_use_for_it() -> None:
    with pytest.raises(MergeError, match="it cannot merge a stream of experts: storage: mmap is for many experts"):
        TaskArithmetic(suite=ToySuite("mlp"), storage="mmap").enter_stream()


# A bank that is larger than memory -----------------------------------------------------------------------------------

EXPERTS, WIDTH, DEPTH = 47, 256, 18
BANK = 4 * (EXPERTS + 1) * (192 + DEPTH * WIDTH) * WIDTH
LIMIT = BANK // 4


class Deep(nn.Sequential):
    """Matrices, none of which is much of the whole."""

    def __init__(self) -> None:
        sizes = [192, *[WIDTH] * (DEPTH + 1)]
        layers = [nn.Linear(*pair, bias=False) for pair in pairwise(sizes)]
        super().__init__(nn.Flatten(), *(part for layer in layers for part in (layer, nn.Tanh())))


class Shifted(Mapping[str, Tensor]):
    """An expert that is made as it is read."""

    def __init__(self, base: Mapping[str, Tensor], number: int) -> None:
        self.base, self.number = base, number

    def __getitem__(self, name: str) -> Tensor:
        return torch.roll(self.base[name], self.number + 1, 0)

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)


def large() -> NetworkSuite:
    base = Deep()
    tasks = [f"t{t}" for t in range(EXPERTS)]
    return NetworkSuite(
        network=base,
        experts={task: Shifted(base.state_dict(), t) for t, task in enumerate(tasks)},  # type: ignore[misc]
        heads={task: nn.Linear(WIDTH, 2) for task in tasks},
        test={task: ToyData(4, 2, t) for t, task in enumerate(tasks)},
    )


def private() -> int:
    """Bytes of this process that are not in a file."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData")]
    return int(line.split()[1]) * 1024


def limited(storage: str) -> str:
    """Three steps in a process that may take no more than :data:`LIMIT` bytes besides what it has; how it ended."""
    suite = large()
    module = AdaMerging(suite=suite, storage=storage)
    data = TaskDataModule(suite, batch_size=2, steps_per_epoch=3)
    in_threads([lambda: torch.ones(2**16).sum()] * 8)  # their stacks stay, and are not what is measured
    resource.setrlimit(resource.RLIMIT_DATA, (private() + LIMIT, resource.RLIM_INFINITY))
    try:
        MergeTrainer(**TINY).fit(module, datamodule=data)
    except (RuntimeError, MemoryError) as error:
        return "no memory" if "memory" in str(error) else repr(error)
    moved = float((module.coefficients.detach() - 0.3).abs().max())
    return f"{type(module.bank.storage).__name__}, {moved > 0}"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the limit is Linux's")
@pytest.mark.parametrize(
    ("storage", "end"),
    [("device", "no memory"), ("auto", "MappedStorage, True")],
)
def test_a_bank_of_four_times_the_memory(tmp_path: Path, storage: str, end: str) -> None:
    assert in_child(lambda: (tmp_path / "end").write_text(limited(storage))) == 0
    found = (tmp_path / "end").read_text()
    if storage == "device" and found == "DenseStorage, True":
        pytest.skip("what earlier tests have freed in this process is room enough")
    assert found == end
