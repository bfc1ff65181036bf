"""Precision and recall of ``lit-merge audit`` in the laboratory, on the embedded suite.

    python tests/benchmarks/audit_experts.py --seeds 0 1 2 --output runs/audit-experts

Per seed: the clean suite; BadNets, and BadMerging (on-task), in one expert, for each victim; BadMerging in two experts
that share trigger and target. Search and threshold of the audit were chosen on seed 0 alone; the other seeds test
them. Per signal the table shows how well it alone would rank the poisoned experts of all scenarios above those of the
clean suites (area under the ROC curve; 50 is chance).
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from pathlib import Path
from typing import Any

from lit_merge import MiniSuite
from lit_merge.attacks import Attack, BadMergingOn, BadNets
from lit_merge.auditing import AuditOptions, audit
from lit_merge.checkpoints import write_json
from lit_merge.suites import Suite
from lit_merge.suites.backdoor import BackdoorSuite

VICTIMS = ("mnist", "digits", "symbols")


def badmerging(trigger_of: str | None = None) -> Attack:
    """The attack of ``suites/backdoor.yaml``."""
    return BadMergingOn(target=1, size=4, alpha=2.0, patch_steps=150, patch_rate=0.1, trigger_of=trigger_of)


def scenarios(seed: int, victims: list[str], cache_dir: Path | None) -> dict[str, Suite]:
    clean = MiniSuite(seed=seed, cache_dir=cache_dir)
    attacks: dict[str, dict[str, Attack]] = {}
    for task in victims:
        attacks[f"BadNets in {task}"] = {task: BadNets(target=1, size=4)}
        attacks[f"BadMerging in {task}"] = {task: badmerging()}
    attacks["BadMerging in mnist, digits"] = {"mnist": badmerging(), "digits": badmerging("mnist")}
    poisoned = {name: BackdoorSuite(clean, made, seed=seed, cache_dir=cache_dir) for name, made in attacks.items()}
    return {"clean": clean, **poisoned}


def results_table(results: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| seed, scenario | pointed at | score of the poisoned | largest score of a clean one | precision | recall |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    hits = pointed = poisoned = alarms = innocents = 0
    for name, found in results.items():
        truth = (found["laboratory"] or {}).get("compromised", [])
        scores = {task: row["score"] for task, row in found["experts"].items()}
        bad = ", ".join(f"{task} {scores[task]:.2f}" for task in truth) or "-"
        task, best = max(((t, s) for t, s in scores.items() if t not in truth), key=lambda pair: pair[1])
        shares = [(found["laboratory"] or {}).get(key) for key in ("precision", "recall")]
        cells = ["-" if share is None else f"{100 * share:.0f}" for share in shares]
        lines.append(
            f"| {name} | {', '.join(found['pointed']) or 'nothing'} | {bad} | {task} {best:.2f} | {' | '.join(cells)} |"
        )
        hits += len(set(found["pointed"]) & set(truth))
        pointed, poisoned = pointed + len(found["pointed"]), poisoned + len(truth)
        if not truth:
            alarms, innocents = alarms + len(found["pointed"]), innocents + len(scores)
    precision = f"{hits}/{pointed}" if pointed else "-"
    lines.append(
        f"\nprecision {precision}, recall {hits}/{poisoned}; experts of clean suites pointed at: {alarms}/{innocents}"
    )
    return "\n".join(lines)


def signals_table(results: dict[str, dict[str, Any]]) -> str:
    """How well each signal alone ranks poisoned above clean experts, in percent."""
    values: dict[str, tuple[set[tuple[Any, ...]], set[tuple[Any, ...]]]] = {}
    for name, found in results.items():
        truth = (found["laboratory"] or {}).get("compromised", [])
        for task, row in found["experts"].items():
            if task not in truth and truth:
                continue  # a clean expert counts once, in the clean suite
            for signal, value in row["signals"].items():
                values.setdefault(signal, (set(), set()))[task in truth].add((name, task, value))
    lines = ["| signal | ranks right, percent | clean, largest | poisoned, smallest |", "| --- | --- | --- | --- |"]
    for signal, (clean, bad) in values.items():
        pairs = [(b[-1] > c[-1]) + 0.5 * (b[-1] == c[-1]) for b in bad for c in clean]
        if pairs:
            most, least = max(c[-1] for c in clean), min(b[-1] for b in bad)
            lines.append(f"| {signal} | {100 * sum(pairs) / len(pairs):.0f} | {most:.2f} | {least:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--victims", nargs="+", default=list(VICTIMS))
    parser.add_argument("--cache-dir", type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs/audit-experts"))
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    results: dict[str, dict[str, Any]] = {}
    for seed in arguments.seeds:
        store = arguments.output / f"seed-{seed}.json"
        found = json.loads(store.read_text()) if store.is_file() else {}
        memory: dict[Any, Any] = {}
        for name, suite in scenarios(seed, arguments.victims, arguments.cache_dir).items():
            if name not in found:
                start = time.monotonic()
                found[name] = audit(suite, AuditOptions(), memory)
                print(f"{seed}, {name}: {found[name]['pointed']} ({time.monotonic() - start:.0f} s)", flush=True)
                write_json(store, found)
        results |= {f"{seed}, {name}": row for name, row in found.items()}
        chosen = {key: row for key, row in results.items() if key.startswith(f"{seed}, ")}
        print(f"\nseed {seed}\n\n{results_table(chosen)}\n\n{signals_table(chosen)}\n", flush=True)
    print(f"all seeds\n\n{results_table(results)}\n\n{signals_table(results)}")


if __name__ == "__main__":
    main()
