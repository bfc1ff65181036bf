"""The option: what is chosen, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lit_merge import AdaMerging, MergeError
from lit_merge.storage import StorageChoice, layout_of
from lit_merge.storage import choice as module
from lit_merge.storage.free_memory import host_memory, in_memory

BASE = {"w": torch.zeros(50, 2)}  # 400 bytes; with 4 task vectors in bfloat16 1,200
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def decided(device: torch.device = CPU, **kwargs: Any) -> tuple[str, str]:
    return StorageChoice(**kwargs).decided(layout_of(["w"], BASE), 4, torch.bfloat16, device)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Free bytes, by device."""
    found = {"cpu": 10**9, "cuda": 10**9}
    monkeypatch.setattr(module, "free_memory", lambda device: found[device.type])
    monkeypatch.setattr(module, "host_memory", lambda: found["cpu"])
    return found


def test_auto_takes_the_first_that_has_room(free: dict[str, int]) -> None:
    free["cuda"] = 2500  # 80 % less two networks: 1,200
    assert decided(CUDA)[0] == "device"
    free["cuda"] = 2498
    kind, why = decided(CUDA)
    assert kind == "host"
    assert why == (
        "base and task vectors take 1200 bytes, and only 1198 bytes may be used on cuda:0; "
        "800.00 MB may be used of the host's memory"
    )
    free["cpu"] = 1499
    assert decided(CUDA)[0] == "mmap"
    free["cpu"] = 2499
    assert decided(CPU)[0] == "mmap"  # there is no other memory
    free["cpu"] = 2500
    assert decided(CPU)[0] == "device"
    assert decided(CPU, ranks=2)[0] == "mmap"  # they have one memory together
    assert decided(CUDA, ranks=1)[0] == "host"


def test_a_budget_takes_the_place_of_what_is_measured(free: dict[str, int]) -> None:
    assert decided(CUDA, budget=1200)[0] == decided(CPU, budget=1200)[0] == "device"
    assert decided(CUDA, budget=1199)[0] == "host"
    assert decided(CPU, budget=1199) == (
        "mmap",
        "base and task vectors take 1200 bytes, and only 1199 bytes are allowed on cpu",
    )
    assert decided(CPU, budget=1200, copies=2)[0] == "mmap"  # a transform makes a second one
    assert decided(CPU, budget=2000, copies=2)[0] == "device"


def test_what_is_asked_for_is_taken() -> None:
    for kind in ("host", "mmap", "low_rank"):
        assert decided(CPU, kind=kind, budget=0)[0] == kind
    assert decided(CPU, kind="device", budget=1200)[0] == "device"
    with pytest.raises(MergeError, match=r"base and task vectors take 1,200 bytes, and model.storage_budget is 1,199"):
        decided(CPU, kind="device", budget=1199)
    with pytest.raises(MergeError, match=r"storage: sharded: the ranks are not known here; give sharded_over"):
        StorageChoice("sharded")(layout_of(["w"], BASE), BASE, 4, torch.bfloat16)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"storage": "disk"}, "model.storage: expected auto, device, host, mmap, low_rank, sharded, found 'disk'"),
        ({"storage_budget": -1}, "model.storage_budget: expected bytes"),
        ({"storage_rank": 2.0}, "storage_rank: expected a number"),
        ({"storage_dtype": "int8"}, "model.storage_dtype: expected"),
    ],
)
def test_an_option_out_of_range(option: dict[str, Any], message: str) -> None:
    from toys import ToySuite

    with pytest.raises(MergeError, match=message):
        AdaMerging(suite=ToySuite("mlp"), **option)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_free_memory_of_the_host(tmp_path: Path) -> None:
    """The least of what the system and the groups around the process leave; cache that can be dropped is free."""
    meminfo = {"proc/meminfo": "MemTotal: 900 kB\nMemAvailable:    500 kB\n"}
    assert host_memory(write(tmp_path / "plain", meminfo)) == 500 * 1024
    group = {"memory.max": "300000\n", "memory.current": "250000\n", "memory.stat": "anon 1\ninactive_file 60000\n"}
    second = {
        **meminfo,
        "proc/self/cgroup": "0::/a/b\n",
        **{f"sys/fs/cgroup/a/{name}": text for name, text in group.items()},
        "sys/fs/cgroup/a/b/memory.max": "max\n",
    }
    assert host_memory(write(tmp_path / "second", second)) == 300000 - 250000 + 60000
    first = {
        **meminfo,
        "proc/self/cgroup": "5:cpu:/\n4:memory:/job\n0::/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "1000\n",
        "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "5000\n",
        "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "7000\n",
    }
    assert host_memory(write(tmp_path / "first", first)) == 0


def test_a_folder_may_be_in_memory(tmp_path: Path) -> None:
    mounts = "disk / ext4 rw 0 0\ntmpfs /run tmpfs rw 0 0\ndisk /run/disk ext4 rw 0 0\ntmpfs /running tmpfs rw 0 0\n"
    root = write(tmp_path, {"proc/self/mounts": mounts})
    found = {folder: in_memory(Path(folder), root) for folder in ("/run", "/run/a", "/run/disk/a", "/runs", "/running")}
    assert [folder for folder, memory in found.items() if memory] == ["/run", "/run/a", "/running"]
    assert not in_memory(Path("/run"), tmp_path / "nowhere")
