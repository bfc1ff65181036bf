"""Kill streams of experts with SIGKILL, and count the runs that come to the bits of an uninterrupted one.

    python tests/benchmarks/kill_streams.py --single 100 --double 50 --workers 10 --ranks 2

A single kill is at a random moment of a run: at the start or end of a step or stage, before, in and after a stage's
file or ``last.ckpt`` is written, while a network is scored; or, every fourth time, at a random time. A double kill is
one more in the run that goes on. Compared are the merged weights (stage file and export), the matrix of accuracies and
the report without times.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

import lightning as L
import torch
from torch.multiprocessing.spawn import ProcessExitedException

sys.path.insert(0, str(Path(__file__).parents[1]))

from kills import in_child
from streams import Case, Moment, StreamKill, final, uninterrupted

CASES = (Case(), Case("ada"), Case("ada", data="seen", every=2), Case("ada++"), Case("dam"), Case("doge"))


class KillRank(L.Callback):
    """Kills one of several ranks at the start of a batch; the other one is ended by the launcher."""

    def __init__(self, left: int) -> None:
        self.left = left

    def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
        self.left -= 1
        if self.left == 0 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def attempt(case: Case, root: Path, choice: random.Random, seconds: float, kills: int) -> int:
    """Run until it was killed so often, or has ended; return how often it was."""
    done = 0
    for _ in range(kills):
        if choice.random() < 0.25:
            status = in_child(lambda: case.run(root), deadline=choice.uniform(0.05, 0.9) * seconds)
        else:
            kill = StreamKill(choice.choice(get_args(Moment)), choice.randint(1, 6))
            status = in_child(lambda: case.run(root, kill))  # noqa: B023
        if status not in (0, -signal.SIGKILL):
            raise SystemExit(f"{case}: a run that was to be killed ended with status {status}")
        done += status != 0
    return done


def series(name: str, cases: list[Case], wanted: int, kills: int, choice: random.Random) -> None:
    """Make so many runs that were killed so often, and say how many of them were bit-identical."""
    same, total, tried, began = 0, 0, 0, time.monotonic()
    while total < wanted:
        case = cases[tried % len(cases)]
        tried += 1
        expected, seconds = reference(case)
        with TemporaryDirectory() as folder:
            root = Path(folder)
            if attempt(case, root, choice, seconds, kills) < kills:
                continue  # it had ended before
            total += 1
            ended = in_child(lambda: case.run(root)) == 0  # noqa: B023
            if ended and final(root) == expected:
                same += 1
            else:
                tell(f"differs: {case}")
    tell(f"{name}: {same} of {total} bit-identical ({time.monotonic() - began:.0f} s)")


_TERMINAL = os.dup(1)
_SECONDS: dict[Case, float] = {}


def reference(case: Case) -> tuple[dict[str, object], float]:
    """What an uninterrupted run comes to, and how long a second one takes."""
    expected = uninterrupted(case)
    if case not in _SECONDS:
        began = time.monotonic()
        with TemporaryDirectory() as folder:
            in_child(lambda: case.run(Path(folder)))
        _SECONDS[case] = time.monotonic() - began
    return expected, _SECONDS[case]


def ranks(count: int, kill_at: int) -> None:
    """Kill one of several ranks, go on, and compare with the same run on as many."""
    case = Case("ada", ranks=count)
    with TemporaryDirectory() as folder:
        straight, broken = Path(folder, "straight"), Path(folder, "broken")
        for root in (straight, broken):
            root.mkdir()
        case.run(straight)  # here, as a fork that forks again is not allowed where CUDA was asked for
        dead = False
        try:
            case.run(broken, KillRank(kill_at))
        except ProcessExitedException:
            dead = True
        case.run(broken)
        same = dead and final(straight) == final(broken)
    tell(f"{count} ranks, one killed at batch {kill_at}: {int(same)} of 1 bit-identical")


def tell(text: str) -> None:
    """Write one line, whatever else is silenced."""
    os.write(_TERMINAL, f"{text}\n".encode())


def main() -> None:
    """Run the campaign."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--single", type=int, default=100, help="runs that are killed once")
    parser.add_argument("--double", type=int, default=50, help="runs that are killed twice")
    parser.add_argument("--workers", type=int, default=0, help="of both kinds, this many more with two workers")
    parser.add_argument("--ranks", type=int, default=0, help="also a run on so many ranks")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    choice = random.Random(given.seed)
    with Path(os.devnull).open("w") as nowhere:  # what the runs say
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    for name, wanted, kills in (("single kills", given.single, 1), ("double kills", given.double, 2)):
        if wanted:
            series(name, list(CASES), wanted, kills, choice)
        if given.workers:
            series(f"{name}, 2 workers", [replace(Case("ada"), workers=2)], given.workers, kills, choice)
    if given.ranks:
        ranks(given.ranks, 5)


if __name__ == "__main__":
    main()
