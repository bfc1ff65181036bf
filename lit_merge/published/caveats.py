"""What keeps a run and published numbers from being comparable."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from lit_merge.published.facts import CHECKPOINTS, DTD_LEAK, METHODS, NOTES, SOURCES
from lit_merge.published.runs import Run
from lit_merge.published.tables import PublishedRow, PublishedTable

__all__ = ("caveats",)

_POINTS = 1.0  # more than rounding, seeds and image libraries make
_LEAKING = 90.0  # a DTD accuracy that only an expert which saw test images has: others have 78 to 86


def caveats(
    run: Run,
    table: PublishedTable,
    chosen: Sequence[PublishedRow],
    others: Sequence[PublishedRow],
    references: Sequence[PublishedRow],
    *,
    guessed: bool,
) -> tuple[str, ...]:
    """Say what differs between a run and the rows beside it.

    Args:
        run: The run.
        table: The published table.
        chosen: Rows of the run's own method.
        others: Rows of other methods.
        references: Rows of the base and of the fine-tuned networks that are compared with those of the run.
        guessed: The run's method was found by the name of its class, not given.

    Returns:
        Sentences; the gravest first.
    """
    shown = (*chosen, *others)
    found = [
        *_networks(run, references),
        *_tasks(run, table),
        *_dtd(run, table, shown),
        *_protocol(run, shown),
        *_method(run, table, chosen, guessed=guessed),
        *_robustness(table),
        *(NOTES[note] for note in _unique(row.note for row in shown) if note and NOTES[note] != DTD_LEAK),
        *(
            f"{SOURCES[s].title}: {SOURCES[s].caveat}"
            for s in _unique(row.source for row in shown)
            if SOURCES[s].caveat
        ),
    ]
    return tuple(text[0].upper() + text[1:] for text in found)


def _networks(run: Run, references: Iterable[PublishedRow]) -> Iterator[str]:
    for row in references:
        base = row.method == "pretrained"
        score = "base_accuracy" if base else "expert_accuracy"
        off = []
        for task, published in row.accuracy.items():
            own = run.percent(task, score)
            if own is not None and abs(own - published) > _POINTS:
                off.append(f"{task} {own:.1f} against {published:.1f}")
        if off and base:
            yield (
                f"the base has other accuracies than the published pre-trained network ({', '.join(off)}): weights, "
                "activation, preprocessing, class names, prompts or test images are not the same; mend this first"
            )
        elif off:
            yield (
                f"the experts are not the checkpoints of the table, {CHECKPOINTS[row.checkpoints]} ({', '.join(off)}): "
                "compare normalised accuracies only"
            )


def _tasks(run: Run, table: PublishedTable) -> Iterator[str]:
    missing = [task for task in table.tasks if task not in run.scores]
    extra = [task for task in run.scores if task not in table.tasks]
    if missing:
        yield (
            f"the run has no scores for {', '.join(missing)}: means are over the others, and published rows merged all "
            "of them"
        )
    if extra:
        yield f"nothing was published on this suite for {', '.join(extra)}: they are left out here, but were merged"


def _dtd(run: Run, table: PublishedTable, shown: Iterable[PublishedRow]) -> Iterator[str]:
    own = run.percent("dtd", "expert_accuracy")
    if own is not None and own > _LEAKING:
        yield f"the run's DTD expert has {own:.1f} %, so it has seen test images. {DTD_LEAK}"
    elif "dtd" in table.tasks and any(row.checkpoints == "tall-masks" for row in shown):
        yield DTD_LEAK


def _protocol(run: Run, shown: Iterable[PublishedRow]) -> Iterator[str]:
    if run.protocol == "transductive":
        return
    adapted = [METHODS[row.method].name for row in shown if METHODS[row.method].protocol == "transductive"]
    which = {
        "split": "it scores only the test images that adaptation did not see",
        "online": "it scores each test image at its arrival, before adaptation has seen the rest",
    }.get(run.protocol, "its images are a choice of its own")
    yield f"the protocol of the run is {run.protocol}: {which}; published rows score all test images" + (
        f", and {', '.join(_unique(adapted))} adapted on the very same images (transductive)" if adapted else ""
    )


def _method(run: Run, table: PublishedTable, chosen: Sequence[PublishedRow], *, guessed: bool) -> Iterator[str]:
    if not chosen:
        yield f"nothing was published for {run.method} on {table.suite}; --method NAME chooses rows to compare with"
    elif guessed and len({row.method for row in chosen}) > 1:
        yield "whether the run was layer-wise or task-wise is not in its report; both are shown, --method chooses one"
    if transforms := run.model.get("transforms"):
        names = [str(t.get("class_path", t)).rpartition(".")[2] if isinstance(t, dict) else str(t) for t in transforms]
        yield f"the run transforms its task vectors first ({', '.join(names)}), which published rows do not"
    if run.model.get("granularity") == "block":
        yield "the run has one coefficient per block, which was not published; layer-wise means per parameter tensor"


def _robustness(table: PublishedTable) -> Iterator[str]:
    if "-robustness-" in table.suite and not table.suite.endswith("-clean"):
        yield (
            "published rows use stored copies of the corrupted images, of one severity that is not stated; lit-merge "
            "corrupts on the fly with the severity of the suite"
        )


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))
