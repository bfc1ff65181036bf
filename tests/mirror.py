"""A local mirror of the repositories of a bundled suite: tiny twins with the same names in the same formats."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lit_merge.suites.task_files import load_task

BASE = "openai/clip-vit-base-patch32"
EXPERT = "tanganke/clip-vit-base-patch32_{task}"
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 32, "patch_size": 16, "projection_dim": 16, "hidden_act": "quick_gelu",
}  # fmt: skip
TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "vocab_size": 514, "max_position_embeddings": 77, "projection_dim": 16, "hidden_act": "quick_gelu",
    "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513,
}  # fmt: skip


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of single bytes, saved by transformers."""
    from open_clip.tokenizer import bytes_to_unicode
    from transformers import CLIPTokenizer

    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[]).save_pretrained(folder)


def write_base(folder: Path, seed: int = 0) -> Any:
    """A complete tiny CLIP, saved by transformers."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16)).eval()
    model.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    write_tokenizer(folder)
    return model


def write_expert(folder: Path, base: Any, seed: int, spread: float = 0.02) -> None:
    """A vision model near the base's, saved by transformers."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    generator = torch.Generator().manual_seed(seed)
    expert = CLIPVisionModel(CLIPVisionConfig(**VISION))
    expert.load_state_dict(getattr(base, "vision_model", base).state_dict(), strict=False)
    with torch.no_grad():
        for value in expert.parameters():
            value += spread * torch.randn(value.shape, generator=generator)
    expert.save_pretrained(folder)


def write_images(folder: Path, task: str, size: int = 6) -> None:
    """A tiny image set with the classes and columns of a task, saved by ``datasets``."""
    from datasets import ClassLabel, Dataset, DatasetDict, Features
    from datasets import Image as ImageColumn

    known = load_task(task)
    assert known.classes is not None
    source = known.dataset
    columns = Features({source.image: ImageColumn(), source.label: ClassLabel(names=list(known.classes))})
    random = np.random.default_rng(len(task))
    parts = {}
    for split in {str(name) for name in source.splits.values()}:
        pictures = [Image.fromarray(random.integers(0, 256, (36, 40, 3), dtype=np.uint8)) for _ in range(size)]
        labels = [number * len(known.classes) // size for number in range(size)]
        parts[split] = Dataset.from_dict({source.image: pictures, source.label: labels}, features=columns)
    DatasetDict(parts).save_to_disk(folder)


def write_mirror(root: Path, tasks: Sequence[str], size: int = 6) -> Path:
    """Base, experts and images of some tasks of the ViT-B/32 suites."""
    base = write_base(root / BASE)
    for number, task in enumerate(tasks):
        write_expert(root / EXPERT.format(task=task), base, number + 1)
        write_images(root / str(load_task(task).dataset.id), task, size)
    return root
