"""Images per second of the adaptation loader over a folder of JPEGs, with and without the cache of decoded images.

    python tests/benchmarks/adaptation_images.py --images 512 --side 256

The pictures are made from a seed: smooth colours with noise, which JPEG packs about as tightly as photographs, in one
folder per class. The preprocessing is that of CLIP at 224 pixels (bicubic, centre crop, normalised). A pass is every
image once, in the order of adaptation, in batches of 16, without a network. The first pass with a cache decodes and
fills it, the second reads from it. The rows take turns, and the median of several runs is shown. Processor time, with
that of the workers, hardly depends on what else the machine does. One image of each batch is compared between the rows,
so that a cache which changed an image would be seen.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import transforms as T

from lit_merge import TaskDataModule
from lit_merge.data.file_images import FolderImages
from lit_merge.suites import NetworkSuite

CLIP = T.Compose(
    [
        T.Resize(224, interpolation=T.InterpolationMode.BICUBIC),
        T.CenterCrop(224),
        T.ToTensor(),
        T.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    ]
)


def pictures(folder: Path, count: int, side: int, seed: int = 0) -> int:
    """Write JPEGs of two classes; their size in bytes."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize(
            (side, side), Image.Resampling.BICUBIC
        )
        noisy = np.asarray(coarse) + rng.normal(scale=8, size=(side, side, 3))
        path = folder / f"class{number % 2}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return sum(path.stat().st_size for path in folder.rglob("*.jpg"))


def passes(folder: Path, workers: int, cache: int, count: int) -> dict[str, Any]:
    """Images per second of two passes, bytes that the cache took, and a digest of all batches."""
    network = torch.nn.Linear(2, 2)
    suite = NetworkSuite(
        network=network,
        experts={"x": network.state_dict()},
        heads={"x": torch.nn.Identity()},
        test={"x": FolderImages(folder, transform=CLIP)},
        num_classes={"x": 2},
    )
    data = TaskDataModule(suite, batch_size=16, num_workers=workers, image_cache=cache, seed=0)
    data.setup("fit")
    digest = hashlib.sha256()
    speeds, work = [], []
    loader = data.train_dataloader()
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        start, seen, busy, before = time.perf_counter(), 0, 0.0, sum(os.times()[:4])
        for batch in loader:
            images = batch["x"].images
            seen += len(images)
            hashing = time.perf_counter()
            digest.update(images[0].numpy().tobytes())
            busy += time.perf_counter() - hashing
        speeds.append(seen / (time.perf_counter() - start - busy))
        work.append(1000 * (sum(os.times()[:4]) - before - busy) / seen)
    caches = list((data._caches or {}).values())
    return {
        "first": speeds[0],
        "second": speeds[1],
        "first_cpu_ms": work[0],
        "second_cpu_ms": work[1],
        "cache_bytes": sum(each.reserved for each in caches),
        "kept": sum(each.kept for each in caches),
        "digest": digest.hexdigest(),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| workers | cache | first pass | second pass | CPU per image | memory |", "|---|---|---|---|---|---|"]
    for row in rows:
        cache = "on" if row["cache"] else "off"
        speeds = " | ".join(f"{row[key]:.0f} images/s" for key in ("first", "second"))
        work = ", ".join(f"{row[key]:.1f}" for key in ("first_cpu_ms", "second_cpu_ms"))
        lines.append(f"| {row['workers']} | {cache} | {speeds} | {work} ms | {row['cache_bytes'] / 1e6:.0f} MB |")
    return "\n".join(lines)


def main() -> None:
    """Measure and show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--side", type=int, default=256, help="pixels")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = pictures(folder, options.images, options.side)
        rows = []
        for workers in options.workers:
            found: dict[int, list[dict[str, Any]]] = {0: [], 2**31: []}
            for _ in range(options.repeats):
                for cache, runs in found.items():  # in turn, as the machine may have other work
                    runs.append(passes(folder, workers, cache, options.images))
            for cache, runs in found.items():
                middle = {key: median(run[key] for run in runs) for key in runs[0] if key != "digest"}
                rows.append({"workers": workers, "cache": cache, **middle, "digest": runs[0]["digest"]})
    if len({row["digest"] for row in rows}) != 1:
        raise SystemExit("the rows have different images")
    result = {"images": options.images, "side": options.side, "jpeg_bytes": size, "rows": rows}
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
