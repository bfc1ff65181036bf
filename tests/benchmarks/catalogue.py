"""The whole catalogue on the embedded suite: accuracy, seconds, memory and bytes of every method, and a Pareto picture.

    python tests/benchmarks/catalogue.py --seeds 0 1 2 --output runs/catalogue --picture
    python tests/benchmarks/catalogue.py --seeds 0 --methods "iso-*" doge

A row is a bundled config with its shipped settings, as ``lit-merge merge`` or ``lit-merge fit`` has them with
``--config NAME.yaml --suite.seed SEED --seed_everything SEED``, without validation and callbacks. Rows with "best" in
their name take the value of a grid that is most accurate on every fourth *training* image. ``EXCLUDED`` in
``_catalogue.py`` says which configs are left out, and why.

Each row and seed is a process of its own, forked from one that has read the libraries. Seconds are CPU seconds of
transforms, calibration, fit and merge, and of a grid's choice, once networks and data were read. Memory is the largest
resident set beyond that of the same moment; scoring does not count. Bytes are all that has to be kept to serve all
tasks, heads aside. Results are kept in ``OUTPUT/rows``; a second call makes only what is missing, failed, or older than
its config. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import logging
import multiprocessing
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from fnmatch import fnmatchcase
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from _catalogue import Entry, Result, entries, table  # type: ignore[import-not-found]
from _catalogue_picture import draw  # type: ignore[import-not-found]
from _embedded import accuracies  # type: ignore[import-not-found]
from torch import Tensor

from lit_merge import MergeModule, MiniSuite
from lit_merge.calibrated_module import CalibratedModule
from lit_merge.checkpoints import write_json
from lit_merge.cli import MergeCLI
from lit_merge.cli import main as command
from lit_merge.data_free_module import DataFreeModule
from lit_merge.methods import SimpleAverage, TsvCompress
from lit_merge.methods._per_task import PerTaskModule
from lit_merge.task_vectors import TaskVectors

FORK = multiprocessing.get_context("fork")
TRAINER = {
    "logger": "false", "callbacks": "null", "accelerator": "cpu", "limit_val_batches": "0",
    "enable_progress_bar": "false", "enable_checkpointing": "false", "enable_model_summary": "false",
}  # fmt: skip


class Meter:
    """CPU seconds between :meth:`start` and :meth:`stop`, added up, and the largest memory of any one span."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.peak_bytes = 0
        self._started = 0.0
        self._resident = 0

    def start(self) -> None:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of what was before
        self._resident = memory("VmRSS")
        self._started = time.process_time()

    def stop(self, merging: bool = True) -> None:
        self.seconds += time.process_time() - self._started
        if merging:
            self.peak_bytes = max(self.peak_bytes, memory("VmHWM") - self._resident)


def memory(key: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at the peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def load_libraries() -> None:
    """Load what torch loads at the first use, so that no method pays for it."""
    value = torch.randn(64, 64, requires_grad=True)
    (torch.linalg.svd(value.detach())[0] @ value).sum().backward()
    torch.linalg.eigh((value @ value.mT).detach().double())
    torch.optim.Adam([value], fused=True).step()


def made(arguments: list[str], meter: Meter) -> MergeModule:
    """The merge of a command line, ready to be scored."""
    cli = command(arguments, run=False)
    assert isinstance(cli, MergeCLI)
    model: MergeModule = cli.model
    read = model.read_bank
    cli.datamodule.prepare_data()
    cli.datamodule.setup("test")

    def read_and_start(base: Any) -> TaskVectors:
        bank = read(base)
        meter.start()
        return bank

    model.read_bank = read_and_start  # type: ignore[method-assign]
    model.configure_model()
    if model.learnable:
        cli.trainer.fit(model, datamodule=cli.datamodule)
    if model.needs_images:
        model.calibrate(cli.datamodule)
    for _ in networks(model):
        pass
    meter.stop()
    return model


def networks(model: MergeModule) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """The network for all tasks, or one after the other those of each."""
    if isinstance(model, PerTaskModule | TsvCompress):
        yield from (((task,), model.task_state(task)) for task in model.suite.tasks)
    else:
        yield model.suite.tasks, model.merged_state()


def sees(model: MergeModule) -> str:
    """What a merge looks at."""
    if isinstance(model, CalibratedModule):
        return "training images" if model.image_source == "train" else "test images"
    return "test images" if model.learnable and not isinstance(model, DataFreeModule) else "weights"


def measure(entry: Entry, seed: int, folder: str) -> dict[str, Any]:
    """One row of one seed."""
    fixed = [f"--trainer.{key}={value}" for key, value in TRAINER.items()] + [f"--trainer.default_root_dir={folder}"]
    arguments = [
        "--config",
        f"{entry.config}.yaml",
        *entry.options,
        f"--suite.seed={seed}",
        f"--seed_everything={seed}",
    ]
    meter, chosen = Meter(), None
    if entry.grid:
        scores = {}
        for value in entry.grid:
            model = made([*arguments, *fixed, f"--model.{entry.option}={value}"], meter)
            meter.start()
            scores[value] = fmean(accuracies(model, model.merged_state(), "train", every=4).values())
            meter.stop(merging=False)
        chosen = max(scores, key=lambda value: (scores[value], -value))
        fixed.append(f"--model.{entry.option}={chosen}")
    spent, peak = meter.seconds, meter.peak_bytes if entry.grid else 0
    model = made([*arguments, *fixed], meter)
    spent, peak = spent or meter.seconds, peak or meter.peak_bytes
    found: dict[str, float] = {}
    count = 0
    for tasks, state in networks(model):
        count += 1
        found |= accuracies(model, state, "test", tasks)
    return {
        "chosen": chosen,
        "sees": "training labels" if entry.grid else sees(model),
        "seconds": spent,
        "peak_bytes": peak,
        "networks": count,
        "stored_bytes": model.stored_bytes,
        "tasks": {
            task: a for some, state in networks(model) for task, a in accuracies(model, state, "test", some).items()
        },
    }


def reference(name: str, seed: int, tasks: tuple[str, ...]) -> dict[str, Any]:
    """Base or experts on some tasks."""
    model = SimpleAverage(suite=MiniSuite(tasks, seed=seed))
    model.configure_model()
    states = [(task, model.suite.base() if name == "base" else model.suite.expert(task)) for task in tasks]
    count = len(tasks) if name == "experts" else 1
    return {
        "sees": "", "seconds": 0.0, "peak_bytes": 0, "networks": count, "stored_bytes": count * model.stored_bytes,
        "tasks": {task: accuracies(model, state, "test", (task,))[task] for task, state in states},
    }  # fmt: skip


def work(end: Connection, entry: Entry, seed: int) -> None:
    """What the process of a row does: send its result, or what went wrong."""
    torch.set_num_threads(1)
    load_libraries()
    said = io.StringIO()
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(said):
            if entry.config:
                end.send(measure(entry, seed, folder))
            else:
                end.send(reference(entry.name, seed, entry.options))
    except (Exception, SystemExit) as error:
        text = said.getvalue().strip() or str(error) or type(error).__name__
        found = [line for line in text.splitlines() if "error:" in line] or text.splitlines()
        end.send({"failed": found[0].removeprefix("error: ")})


def in_a_process(entry: Entry, seed: int) -> dict[str, Any]:
    """Measure, or say what went wrong."""
    here, there = FORK.Pipe(duplex=False)
    process = FORK.Process(target=work, args=(there, entry, seed), daemon=True)
    process.start()
    there.close()
    try:
        result: dict[str, Any] = here.recv()
    except EOFError:
        result = {}
    process.join()
    return result or {"failed": f"its process ended with status {process.exitcode}"}


def result_of(entry: Entry, seed: int, folder: Path) -> Result:
    """Result of a row and a seed; it is read if it is there."""
    path = folder / f"{entry.file}-{seed}.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if "failed" in result or result.get("digest") != entry.digest:
        result = {"name": entry.name, "seed": seed, "digest": entry.digest} | in_a_process(entry, seed)
        write_json(path, result)
        said = result.get("failed") or f"{100 * fmean(result['tasks'].values()):.1f} %, {result['seconds']:.2f} s"
        print(f"{entry.name}, seed {seed}: {said}", file=sys.stderr, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=["*"], help="names of rows, with wildcards")
    parser.add_argument("--output", type=Path, default=Path("runs/catalogue"))
    parser.add_argument("--picture", action="store_true", help="draw OUTPUT/catalogue.png")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    rows = [entry for entry in entries() if any(fnmatchcase(entry.name, pattern) for pattern in args.methods)]
    results = []
    for seed in args.seeds:
        build = FORK.Process(target=MiniSuite(seed=seed).prepare)  # threads of this process would not survive a fork
        build.start()
        build.join()
        found = [result_of(entry, seed, args.output / "rows") for entry in rows]
        sets = {tuple(result["tasks"]) for result in found if "tasks" in result}
        references = [Entry(name, "", tasks) for tasks in sorted(sets) for name in ("base", "experts")]
        results += found + [result_of(entry, seed, args.output / "rows") for entry in references]
    text = table(results)
    (args.output / "catalogue.md").write_text(f"{text}\n", encoding="utf-8")
    print(text)
    if args.picture:
        draw(results, args.output / "catalogue.png")


if __name__ == "__main__":
    main()
