"""Peak memory and seconds of merging synthetic language models piece by piece.

    python tests/benchmarks/streaming.py --limit 4

makes a base and four experts in bfloat16 with the shapes of Llama-3.2-1B (1.24 billion parameters; its embedding has
263 million in one tensor), and merges them in a process of its own each. ``peak`` is the largest resident set, pages of
mapped files included, as the kernel counts it; ``--limit`` kills a merge that has more GiB at any moment, which is
looked at a hundred times a second. ``TsvMerge`` decomposes the 112 matrices of the blocks and averages the embedding,
as is usual: its rows are tokens and not features (``exclude``).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from lit_merge import methods
from lit_merge.checkpoints.reading import read_state
from lit_merge.streaming import PieceReader, stream_merge
from lit_merge.suites import WeightsSuite

GIB = 2**30
METHODS: dict[str, dict[str, Any]] = {
    "TaskArithmetic": {}, "Ties": {}, "TsvMerge": {"exclude": ["*embed_tokens*", "lm_head*"]},
}  # fmt: skip


class Shapes(NamedTuple):
    """Sizes of a decoder in the manner of Llama."""

    width: int
    keys: int
    hidden: int
    vocabulary: int
    layers: int
    tied: bool


LLAMAS = {
    "Llama-3.2-1B": Shapes(2048, 512, 8192, 128256, 16, tied=True),
    "TinyLlama-1.1B": Shapes(2048, 256, 5632, 32000, 22, tied=False),
    "tiny": Shapes(64, 16, 256, 512, 2, tied=True),
}


def tensors(size: Shapes, layer: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one layer; those outside of the layers come after the last one."""
    if layer == size.layers:
        outside = ["model.embed_tokens"] if size.tied else ["model.embed_tokens", "lm_head"]
        every: dict[str, tuple[int, ...]] = dict.fromkeys(outside, (size.vocabulary, size.width))
        return {f"{name}.weight": shape for name, shape in every.items()} | {"model.norm.weight": (size.width,)}
    shapes = {
        "self_attn.q_proj": (size.width, size.width), "self_attn.k_proj": (size.keys, size.width),
        "self_attn.v_proj": (size.keys, size.width), "self_attn.o_proj": (size.width, size.width),
        "mlp.gate_proj": (size.hidden, size.width), "mlp.up_proj": (size.hidden, size.width),
        "mlp.down_proj": (size.width, size.hidden), "input_layernorm": (size.width,),
        "post_attention_layernorm": (size.width,),
    }  # fmt: skip
    return {f"model.layers.{layer}.{name}.weight": shape for name, shape in shapes.items()}


def build(folder: Path, size: Shapes, seed: int) -> None:
    """Write one network, a file per layer: the base for seed 0, and experts that are near it."""
    folder.mkdir(parents=True)
    files: dict[str, str] = {}
    for number in range(size.layers + 1):
        shared, own = torch.Generator().manual_seed(number), torch.Generator().manual_seed(10**6 * seed + number)
        state = {}
        for name, shape in tensors(size, number).items():
            value = torch.empty(shape).normal_(std=0.02, generator=shared)
            state[name] = (value.add_(torch.randn(shape, generator=own), alpha=0.002) if seed else value).bfloat16()
        file = f"model-{number + 1:05d}-of-{size.layers + 1:05d}.safetensors"
        save_file(state, folder / file)
        files |= dict.fromkeys(state, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def merge(folder: Path, method: str, experts: int) -> None:
    """Merge in this process, and print what it took."""
    names = [str(number) for number in range(1, experts + 1)]
    states = {name: read_state(folder / name / "model.safetensors.index.json") for name in ("0", *names)}
    model = getattr(methods, method)(suite=WeightsSuite("0", names), **METHODS.get(method, {}))
    imports, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    reader = PieceReader(states["0"], {name: states[name] for name in names})
    stream_merge(model, reader, folder / "out", overwrite=True)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{method:<16}{peak / 2**20:9.2f}{imports / 2**20:13.2f}{seconds:9.0f}", flush=True)


def watched(arguments: list[str], limit: float) -> int:
    """Run a process, and kill it as soon as its resident set is above ``limit`` GiB."""
    process = subprocess.Popen([sys.executable, __file__, *arguments])
    page, over = os.sysconf("SC_PAGE_SIZE"), threading.Event()

    def watch() -> None:
        while process.poll() is None:
            try:
                resident = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * page
            except OSError:  # it has just ended
                return
            if limit and resident > limit * GIB:
                over.set()
                process.kill()
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    watcher.join()
    if over.is_set():
        print(f"killed: more than {limit} GiB resident", flush=True)
    return code


def main() -> None:
    """Make the networks and merge them by each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/streaming"), help="Removed at the end.")
    parser.add_argument("--shapes", choices=list(LLAMAS), default="Llama-3.2-1B")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--layers", type=int, help="Instead of the model's own number.")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--limit", type=float, default=0.0, help="GiB; 0 for none.")
    parser.add_argument("--keep", action="store_true", help="Leave the networks for another run.")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    given = parser.parse_args()
    size = LLAMAS[given.shapes]
    size = size._replace(layers=given.layers or size.layers)
    folder = given.folder / f"{given.shapes}-{size.layers}"
    if given.only == "build":
        for number in range(given.experts + 1):
            if not (folder / str(number) / "model.safetensors.index.json").exists():
                shutil.rmtree(folder / str(number), ignore_errors=True)
                build(folder / str(number), size, number)
        return
    if given.only:
        merge(folder, given.only, given.experts)
        return
    if watched([*sys.argv[1:], "--only", "build"], 0):
        sys.exit(1)
    count = sum(torch.Size(s).numel() for layer in range(size.layers + 1) for s in tensors(size, layer).values())
    print(
        f"{given.experts} experts of {count / 1e9:.2f} billion parameters in bfloat16, "
        f"{torch.get_num_threads()} thread(s)",
        flush=True,
    )
    print(f"{'method':<16}{'peak GiB':>9}{'imports GiB':>13}{'seconds':>9}", flush=True)
    failed = [name for name in given.methods if watched([*sys.argv[1:], "--only", name], given.limit)]
    if not given.keep:
        shutil.rmtree(folder)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
