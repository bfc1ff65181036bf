"""Peak memory and seconds of merging synthetic LLMs piece by piece.

    python tests/benchmarks/streaming.py --experts 4 --layers 22 --methods Ties TsvMerge

makes a base and experts in bfloat16 with the shapes of TinyLlama (1.1 billion parameters with 22 layers), and merges
them in a process of its own each. The peak is of resident memory, pages of mapped files included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from lit_merge import methods
from lit_merge.checkpoints.reading import read_state
from lit_merge.streaming import PieceReader, stream_merge
from lit_merge.suites import WeightsSuite

WIDTH, KEYS, HIDDEN, VOCABULARY = 2048, 256, 5632, 32000
LAYER = {
    "self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (KEYS, WIDTH), "self_attn.v_proj": (KEYS, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH), "mlp.gate_proj": (HIDDEN, WIDTH), "mlp.up_proj": (HIDDEN, WIDTH),
    "mlp.down_proj": (WIDTH, HIDDEN), "input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,),
}  # fmt: skip


def build(folder: Path, layers: int, vocabulary: int, seed: int) -> None:
    """Write one network, a shard per layer."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    files: dict[str, str] = {}
    for number in range(layers + 1):
        shapes = {f"model.layers.{number}.{name}.weight": shape for name, shape in LAYER.items()}
        if number == layers:
            shapes = {f"{name}.weight": (vocabulary, WIDTH) for name in ("lm_head", "model.embed_tokens")}
        name = f"model-{number + 1:05d}-of-{layers + 1:05d}.safetensors"
        save_file(
            {k: (0.02 * torch.randn(s, generator=generator)).bfloat16() for k, s in shapes.items()}, folder / name
        )
        files |= dict.fromkeys(shapes, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def resident_peak() -> int:
    """Peak of resident memory of this process in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def merge(folder: Path, method: str, experts: int) -> None:
    """Merge in this process, and print what it took."""
    states = [read_state(folder / str(number) / "model.safetensors.index.json") for number in range(experts + 1)]
    names = [str(number) for number in range(1, experts + 1)]
    model = getattr(methods, method)(suite=WeightsSuite("base", names))
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak, part of which is the parent's
    before, start = resident_peak(), time.perf_counter()
    reader = PieceReader(states[0], dict(zip(names, states[1:], strict=True)))
    stream_merge(model, reader, folder / "out", overwrite=True)
    peak, seconds = resident_peak(), time.perf_counter() - start
    largest = 4 * max(value.numel() for value in states[0].values())
    beyond = (peak - before) * 1024 / largest
    print(f"{method:<16} {peak / 2**20:5.2f} GiB resident, beyond the imports {beyond:.1f} × the largest tensor in "
          f"float32, {seconds:.0f} s")  # fmt: skip


def main() -> None:
    """Make the networks and merge them by each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/streaming"))
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--methods", nargs="+", default=["TaskArithmetic", "Ties", "TsvMerge"])
    parser.add_argument("--only", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only:
        merge(given.folder, given.only, given.experts)
        return
    for number in range(given.experts + 1):
        if not (given.folder / str(number)).exists():
            build(given.folder / str(number), given.layers, given.vocabulary, number)
    for method in given.methods:
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--only", method], check=True)


if __name__ == "__main__":
    main()
