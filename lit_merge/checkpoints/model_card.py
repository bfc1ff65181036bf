"""The model card of a merged network: what was merged, how, with which images, and how well it does."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

__all__ = ("model_card",)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_FILES = (".safetensors", ".json", ".pt", ".pth", ".bin", ".ckpt")
_COLUMNS = {
    "n": "images",
    "base_accuracy": "base",
    "expert_accuracy": "expert",
    "accuracy": "merged",
    "normalized_accuracy": "merged / expert",
}
_ADAPTED = {
    "transductive": "adapted on the very test images that it is scored on, without their labels. The scores say how "
    "well it fits this set of images; others may do worse.",
    "split": "adapted on one part of the test images, without their labels, and scored on the other part.",
    "online": "adapted on test images as they arrive, without their labels; each image is scored at its arrival, "
    "before the network has learned from it.",
}
_LOADING = {
    "transformers": """from transformers import CLIPImageProcessor, CLIPVisionModel

model = CLIPVisionModel.from_pretrained("FOLDER")
processor = CLIPImageProcessor.from_pretrained("FOLDER")
""",
    "open_clip": """import open_clip
from safetensors.torch import load_file

model = open_clip.create_model("ARCHITECTURE")
report = model.load_state_dict(load_file("FOLDER/open_clip_model.safetensors"), strict=False)
assert not report.unexpected_keys and not any(key.startswith("visual.") for key in report.missing_keys)
""",
}


def model_card(
    provenance: Mapping[str, Any],
    report: Mapping[str, Any] | None = None,
    *,
    library: str | None = None,
    title: str | None = None,
) -> str:
    r"""Write a model card in Markdown, with a header that the Hugging Face hub understands.

    Everything in it comes from the arguments; what they do not say is not there. No licence is named: that of the
    merged weights follows from base and experts, not from lit-merge.

    Args:
        provenance: Content of ``merge.json``, see :func:`lit_merge.provenance.provenance`; also read are ``sources``
            (``{"base" or task: {"source", "revision"}}``), ``architecture``, ``layout``, ``activation`` and
            ``weights``.
        report: Content of ``report.json``, if the network was scored.
        library: Library that loads it, ``transformers`` or ``open_clip``.
        title: Heading; by default method and suite.

    Returns:
        Content of ``README.md``.

    >>> card = model_card({"method": "TaskArithmetic", "suite": "toys", "tasks": ["a", "b"]})
    >>> print(card.split("\n## ")[0])
    ---
    tags:
    - model-merging
    - lit-merge
    ---
    <BLANKLINE>
    # TaskArithmetic on toys
    <BLANKLINE>
    2 networks, fine-tuned from the same base on a and b, merged into one by TaskArithmetic with lit-merge.
    <BLANKLINE>
    """
    title = title or f"{provenance.get('method', 'Merge')} on {provenance.get('suite', 'a suite')}"
    parts = [
        _header(provenance, report, library, title),
        f"# {title}\n",
        _summary(provenance),
        *_section("Scores", _scores(provenance, report)),
        *_section("How it was merged", _method(provenance)),
        *_section("What was merged", _networks(provenance)),
        *_section("How to load it", _loading(provenance, library)),
        *_section("What to keep in mind", _caveats(provenance, report)),
        *_section("Configuration", _config(provenance)),
    ]
    return "\n".join(parts).rstrip() + "\n"


def _loading(provenance: Mapping[str, Any], library: str | None) -> str:
    if library not in _LOADING:
        return ""
    code = _LOADING[library].replace("ARCHITECTURE", str(provenance.get("architecture", "ARCHITECTURE")))
    return f"```python\n{code}```"


def _header(provenance: Mapping[str, Any], report: Mapping[str, Any] | None, library: str | None, title: str) -> str:
    content: dict[str, Any] = {}
    if library is not None:
        content["library_name"] = library
    content["tags"] = ["model-merging", "lit-merge"]
    if library == "transformers":
        content["pipeline_tag"] = "image-feature-extraction"
    if parents := list(dict.fromkeys(name for name, _ in _hub_ids(provenance))):
        content |= {"base_model": parents, "base_model_relation": "merge"}
    if report is not None and report.get("tasks"):
        content["model-index"] = [{"name": title, "results": [*_results(report)]}]
    return f"---\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True)}---\n"


def _results(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for task, row in report["tasks"].items():
        metric = {"type": "accuracy", "name": f"accuracy ({report.get('protocol', 'custom')})"}
        yield {
            "task": {"type": "image-classification"},
            "dataset": {"type": task, "name": task, "split": "test"},
            "metrics": [{**metric, "value": round(float(row["accuracy"]), 6)}],
        }


def _hub_ids(provenance: Mapping[str, Any]) -> Iterator[tuple[str, str | None]]:
    """Repositories of the hub among the sources; a path on somebody's disk is none."""
    for source in (provenance.get("sources") or {}).values():
        spec, revision = _source(source)
        repo, _, pinned = spec.partition("@")
        if _HUB_ID.fullmatch(repo) and not repo.endswith(_FILES):
            yield repo, revision or pinned or None


def _source(source: Any) -> tuple[str, str | None]:  # noqa: ANN401 - plain data
    if isinstance(source, Mapping):
        return str(source.get("source", "")), source.get("revision")
    return str(source), None


def _section(title: str, text: str) -> list[str]:
    return [f"## {title}\n", text.rstrip() + "\n"] if text.strip() else []


def _summary(provenance: Mapping[str, Any]) -> str:
    tasks = list(provenance.get("tasks") or ())
    merged = f"{len(tasks)} networks, fine-tuned from the same base on {_listed(tasks)}," if tasks else "Networks"
    architecture = f" The architecture is {provenance['architecture']}." if provenance.get("architecture") else ""
    method = f" by {provenance['method']}" if provenance.get("method") else ""
    return f"{merged} merged into one{method} with lit-merge.{architecture}\n"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _scores(provenance: Mapping[str, Any], report: Mapping[str, Any] | None) -> str:
    if report is None or not report.get("tasks"):
        return ""
    rows = list(report["tasks"].items())
    unseen = (report.get("extra") or {}).get("unseen") or {}
    rows += [(f"{task} (not merged)", row) for task, row in (unseen.get("tasks") or {}).items()]
    means = [("**mean**", report.get("mean") or {})]
    means += [("**mean of not merged**", unseen["mean"])] if unseen.get("mean") else []
    columns = [key for key in _COLUMNS if any(key in row for _, row in rows)]
    lines = ["| task |" + "".join(f" {_COLUMNS[key]} |" for key in columns), "|---|" + "---:|" * len(columns)]
    for task, row in rows + means:
        lines.append(f"| {_cell(task)} |" + "".join(f" {_number(key, row)} |" for key in columns))
    seed = f" Seed {report['seed']}." if "seed" in report else ""
    table = "\n".join(lines)
    return f"Accuracies in percent.\n\n{table}\n\n{_protocol(provenance, report)}{seed}"


def _protocol(provenance: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """Which images the network has seen before it was scored."""
    if not _learned(provenance):
        return "No image was used in merging."
    protocol = str(report.get("protocol", "custom"))
    other = "see the configuration for the images that it was adapted and scored on."
    return f"Protocol `{protocol}`: {_ADAPTED.get(protocol, other)}"


def _learned(provenance: Mapping[str, Any]) -> bool:
    """Whether images took part in the merge: by steps of adaptation, or by measured running statistics."""
    recalibrated = (provenance.get("hyperparameters") or {}).get("buffers") == "recalibrate"
    return bool(provenance.get("steps")) or recalibrated


def _number(key: str, row: Mapping[str, Any]) -> str:
    if row.get(key) is None:
        return ""
    return str(row[key]) if key == "n" else f"{100 * float(row[key]):.1f}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _method(provenance: Mapping[str, Any]) -> str:
    lines = [f"- method: `{provenance['method']}`"] if provenance.get("method") else []
    lines += [f"- {name}: `{json.dumps(value)}`" for name, value in (provenance.get("hyperparameters") or {}).items()]
    lines += [f"- transform of the task vectors: `{name}`" for name in provenance.get("transforms") or ()]
    lines += [f"- steps of adaptation: {provenance['steps']}"] if provenance.get("steps") else []
    return "\n".join(lines)


def _networks(provenance: Mapping[str, Any]) -> str:
    digests = {"base": provenance.get("base"), **(provenance.get("experts") or {})}
    sources = provenance.get("sources") or {}
    lines = []
    for name in dict.fromkeys([*digests, *sources]):
        spec, revision = _source(sources.get(name, ""))
        cells = (name, f"`{spec}`" if spec else "", f"`{revision}`" if revision else "", _hash(digests.get(name)))
        if any(cells[1:]):
            lines.append("".join(f"| {_cell(cell)} " for cell in cells) + "|")
    if not lines:
        return ""
    head = "| network | source | revision | SHA-256 of its tensors |\n|---|---|---|---|\n"
    own = (provenance.get("weights") or {}).get("sha256")
    return head + "\n".join(lines) + (f"\n\nSHA-256 of the tensors of the merged network: {_hash(own)}" if own else "")


def _hash(digest: object) -> str:
    return f"`{digest}`" if digest else ""


def _caveats(provenance: Mapping[str, Any], report: Mapping[str, Any] | None) -> str:
    lines = [
        "- The licences of base and experts hold for the merged weights; see there.",
        "- What the experts have learned, the merged network may have as well: their biases, and a backdoor if one of "
        "them has one.",
    ]
    if provenance.get("suite") != "WeightsSuite":  # any network, with its head or not
        lines.append(
            "- It gives features. Scores are those of one frozen head per task, which is not part of this file."
        )
    if provenance.get("activation"):
        lines.append(
            f"- Its activation is `{provenance['activation']}`. The weights load into a network with another one "
            "without an error, and give wrong features."
        )
    if report is None or not report.get("tasks"):
        lines.append("- It has not been scored.")
    else:
        lines.append("- Scores of one run. Differences of a point can be chance.")
        if report.get("protocol") == "transductive" and _learned(provenance):
            lines.append("- The test images were seen in merging: do not compare with scores of methods that saw none.")
    return "\n".join(lines)


def _config(provenance: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in (provenance.get("versions") or {}).items())
    made = f"Made with {versions}.\n\n" if versions else ""
    config = provenance.get("config")
    if not config:
        return made
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall(r"`{3,}", config))])
    return f"{made}`config.yaml` of the run:\n\n{fence}yaml\n{str(config).rstrip()}\n{fence}"
