"""What the columns ``method``, ``checkpoints``, ``source`` and ``note`` of the published tables mean."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ("CHECKPOINTS", "DTD_LEAK", "METHODS", "NOTES", "PROTOCOLS", "SOURCES", "Method", "Source")


@dataclass(frozen=True)
class Method:
    """A row's method.

    Attributes:
        id: As in the tables; where lit-merge has a config for it, the name of that config.
        name: As in papers.
        protocol: Id in :data:`PROTOCOLS`.
        paper: arXiv id, or nothing.
    """

    id: str
    name: str
    protocol: str
    paper: str = ""


@dataclass(frozen=True)
class Source:
    """Where numbers were published.

    Attributes:
        title: The document.
        address: Where it is, if known.
        caveat: What its authors or readers say about all of its numbers.
    """

    title: str
    address: str
    caveat: str = ""


PROTOCOLS = {
    "reference": "nothing is merged",
    "trained": "trained on the training images of all tasks",
    "data-free": "sees no images; where a scale was searched, that was on validation images",
    "calibrated": "measures the experts on training images",
    "transductive": "adapts on the unlabelled test images that it is scored on",
}
"""Which images a method saw."""

METHODS = {
    method.id: method
    for method in (
        Method("pretrained", "Pre-trained", "reference", "2103.00020"),
        Method("fine-tuned", "Fine-tuned", "reference"),
        Method("multi-task", "Multi-task training", "trained"),
        Method("ensemble", "Simple ensemble", "reference"),
        Method("simple-average", "Simple average", "data-free", "2203.05482"),
        Method("fisher", "Fisher merging", "calibrated", "2111.09832"),
        Method("regmean", "RegMean", "calibrated", "2212.09849"),
        Method("regmean-plus-plus", "RegMean++", "calibrated", "2508.03121"),
        Method("task-arithmetic", "Task arithmetic", "data-free", "2212.04089"),
        Method("concrete-task-arithmetic", "Concrete task arithmetic", "transductive", "2312.06173"),
        Method("ties", "TIES", "data-free", "2306.01708"),
        Method("consensus-ta", "Consensus task arithmetic", "data-free", "2405.07813"),
        Method("magmax", "MagMax", "data-free", "2407.06322"),
        Method("adamerging-task", "Task-wise AdaMerging", "transductive", "2310.02575"),
        Method("adamerging", "Layer-wise AdaMerging", "transductive", "2310.02575"),
        Method("concrete-adamerging", "Concrete layer-wise AdaMerging", "transductive", "2312.06173"),
        Method("wudi", "WUDI", "data-free", "2503.08099"),
        Method("iso-c", "Iso-C", "data-free", "2502.04959"),
        Method("iso-cts", "Iso-CTS", "data-free", "2502.04959"),
        Method("tsv-merge", "TSV-M", "data-free", "2412.00081"),
        Method("tsv-compress", "TSV-C (task known)", "data-free", "2412.00081"),
        Method("wemoe", "WEMoE", "transductive", "2402.00433"),
        Method("e-wemoe", "E-WEMoE", "transductive", "2410.21804"),
    )
}
"""Methods by id, in the order in which tables list them."""

CHECKPOINTS = {
    "tanganke": "Hugging Face fine-tunes tanganke/clip-vit-*_TASK (Adam, 1e-5, 4000 steps of 32 images)",
    "task-vectors": "OpenCLIP fine-tunes of the task_vectors repository (Ilharco et al., arXiv 2212.04089)",
    "tall-masks": "OpenCLIP fine-tunes of the TALL-masks and TSV repositories, whose DTD leaks test images",
    "gladia-newer": "newer public fine-tunes of the GLADIA lab, without that leak",
    "sequential": "fine-tuned on one task after the other, 2500 steps each, not from the base",
}
"""Which fine-tuned networks were merged."""

_PRELIMINARY = (
    "hyper-parameters are not fully optimised, say its authors, and papers that merge OpenCLIP checkpoints have other "
    "numbers; there the papers are authoritative"
)
_FUSIONBENCH = "https://github.com/tanganke/fusion_bench/tree/main/"

SOURCES = {
    "fusionbench-clip-vit": Source(
        "FusionBench, docs/modelpool/clip_vit.md, Experimental Results",
        f"{_FUSIONBENCH}docs/modelpool/clip_vit.md",
        _PRELIMINARY,
    ),
    "fusionbench-opcm": Source(
        "FusionBench, examples/opcm/results/vit-*.csv, and docs/modelpool/clip_vit.md",
        f"{_FUSIONBENCH}examples/opcm/results",
    ),
    "fusionbench-tsv": Source(
        "FusionBench, examples/task_singular_vector/results",
        f"{_FUSIONBENCH}examples/task_singular_vector/results",
        "TSV here takes every matrix, the position embedding too",
    ),
    "fusionbench-regmean": Source(
        "FusionBench, examples/regmean_plusplus/results", f"{_FUSIONBENCH}examples/regmean_plusplus/results"
    ),
    "fusionbench-magmax": Source("FusionBench, docs/algorithms/magmax.md", f"{_FUSIONBENCH}docs/algorithms/magmax.md"),
    "fusionbench-wemoe": Source(
        "FusionBench, docs/algorithms/weight_ensembling_moe.md, original experiments",
        f"{_FUSIONBENCH}docs/algorithms/weight_ensembling_moe.md",
    ),
    "tsv-repository": Source(
        "Task Singular Vectors (arXiv 2412.00081), averages recomputed from the result files of its repository",
        "https://github.com/AntoAndGar/task_singular_vectors",
    ),
    "gladia-repository": Source("A newer repository of the laboratory behind TSV, result file for B/32, 8 tasks", ""),
}
"""Documents by id."""

DTD_LEAK = (
    "DTD: the fine-tunes of the TALL-masks and TSV repositories have a DTD test accuracy of 97.98 % and a validation "
    "accuracy of 78.5 %, because training and test images overlap in that split; newer public fine-tunes have 78.2 % "
    "(B/32), 82.9 % (B/16) and 85.1 % (L/14). This alone explains most of 85.9 against 83.2 for TSV-M on B/32: compare "
    "normalised accuracies, or leave DTD out"
)

NOTES = {
    "dtd-leak": DTD_LEAK,
    "regmean-b16-copy": (
        "the result file clip-vit-base-patch16/TA8.json of RegMean++ is a copy of that of B/32; this row is that of "
        "the document, not of the file"
    ),
    "unseen-pretrained": (
        "the pre-trained row of this table disagrees with that of the eight tasks (SVHN 23.5 against 31.6, GTSRB 30.4 "
        "against 32.5), and the unseen mean of the second experiment, 40.1, is not that of its row, 42.05"
    ),
    "pixelate": (
        "Cars has 0 to 3 % under pixelate with every method: the corrupted images are broken or far too strong, so "
        "give this suite little weight"
    ),
}
"""Traps of single rows by id."""
