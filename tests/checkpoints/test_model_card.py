"""The model card says what is known, and the hub understands its header."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_merge.checkpoints.model_card import model_card

FACTS: dict[str, Any] = {
    "schema": 1,
    "method": "AdaMerging",
    "suite": "clip-vit-b-32-2",
    "tasks": ["sun397", "stanford-cars"],
    "base": "b" * 64,
    "experts": {"sun397": "1" * 64, "stanford-cars": "2" * 64},
    "transforms": ["Ties(density=0.2)"],
    "hyperparameters": {"granularity": "tensor", "init": 0.3, "buffers": "average"},
    "steps": 500,
    "versions": {"lit-merge": "0.1.0", "torch": "2.15.0"},
    "config": "seed_everything: 0\n",
    "sources": {
        "base": {"source": "openai/clip-vit-base-patch32@3d74acf", "revision": "3d74acf"},
        "sun397": {"source": "tanganke/clip-vit-base-patch32_sun397", "revision": None},
        "stanford-cars": {"source": "weights/cars.safetensors", "revision": None},
    },
    "activation": "quick_gelu",
    "weights": {"file": "model.safetensors", "sha256": "9" * 64},
}
REPORT: dict[str, Any] = {
    "schema": 1,
    "protocol": "transductive",
    "seed": 0,
    "tasks": {
        "sun397": {
            "n": 100,
            "accuracy": 0.645,
            "expert_accuracy": 0.75,
            "base_accuracy": 0.632,
            "normalized_accuracy": 0.86,
        },
        "stanford-cars": {
            "n": 50,
            "accuracy": 0.68,
            "expert_accuracy": 0.78,
            "base_accuracy": 0.6,
            "normalized_accuracy": 0.871,
        },
    },
    "mean": {"accuracy": 0.6626, "expert_accuracy": 0.765, "base_accuracy": 0.616, "normalized_accuracy": 0.8656},
    "extra": {
        "unseen": {"tasks": {"mnist": {"n": 10, "accuracy": 0.5, "base_accuracy": 0.4}}, "mean": {"accuracy": 0.5}}
    },
}


def header(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    found: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return found


def test_the_hub_reads_it() -> None:
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard(model_card(FACTS, REPORT, library="transformers"))
    assert card.data.base_model == ["openai/clip-vit-base-patch32", "tanganke/clip-vit-base-patch32_sun397"]
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["model-merging", "lit-merge"]
    results = {result.dataset_name: result.metric_value for result in card.data.eval_results}
    assert results == {"sun397": 0.645, "stanford-cars": 0.68}
    assert card.data.license is None  # that of the weights is not ours to say


def test_no_local_path_is_given_as_a_repository() -> None:
    local = {**FACTS, "sources": {"base": {"source": "/home/me/clip"}, "sun397": {"source": "weights/sun.safetensors"}}}
    assert "base_model" not in header(model_card(local))
    assert header(model_card({**FACTS, "sources": {"base": "openai/clip@abc"}}))["base_model"] == ["openai/clip"]


def test_scores_are_those_of_the_report() -> None:
    card = model_card(FACTS, REPORT)
    assert "| sun397 | 100 | 63.2 | 75.0 | 64.5 | 86.0 |" in card
    assert "| mnist (not merged) | 10 | 40.0 |  | 50.0 |  |" in card
    assert "| **mean** |  | 61.6 | 76.5 | 66.3 | 86.6 |" in card
    assert "## Scores" not in model_card(FACTS)
    assert "has not been scored" in model_card(FACTS)


def test_what_was_merged_and_how_is_said() -> None:
    card = model_card(FACTS, REPORT)
    for text in (
        "2 networks, fine-tuned from the same base on sun397 and stanford-cars,",
        "| sun397 | `tanganke/clip-vit-base-patch32_sun397` |  | `" + "1" * 64,
        "| base | `openai/clip-vit-base-patch32@3d74acf` | `3d74acf` | `" + "b" * 64,
        "9" * 64,
        '- granularity: `"tensor"`',
        "`Ties(density=0.2)`",
        "steps of adaptation: 500",
        "lit-merge 0.1.0, torch 2.15.0",
        "```yaml\nseed_everything: 0\n```",
        "activation is `quick_gelu`",
    ):
        assert text in card


@pytest.mark.parametrize(
    ("facts", "protocol", "said", "seen"),
    [
        ({}, "transductive", "on the very test images", True),
        ({}, "split", "scored on the other part", False),
        ({}, "online", "as they arrive", False),
        ({}, "custom", "see the configuration for the images", False),
        ({"steps": 0}, "transductive", "No image was used in merging", False),
        ({"steps": 0, "hyperparameters": {"buffers": "recalibrate"}}, "transductive", "on the very test images", True),
    ],
)
def test_the_protocol_is_honest(facts: dict[str, Any], protocol: str, said: str, seen: bool) -> None:
    card = model_card({**FACTS, **facts}, {**REPORT, "protocol": protocol})
    assert said in card
    assert ("test images were seen in merging" in card) == seen


def test_code_of_the_library_is_shown_with_the_architecture() -> None:
    assert "CLIPVisionModel.from_pretrained" in model_card(FACTS, library="transformers")
    card = model_card({**FACTS, "architecture": "ViT-B-32-quickgelu"}, library="open_clip")
    assert 'open_clip.create_model("ViT-B-32-quickgelu")' in card
    assert "How to load" not in model_card(FACTS)


def test_little_is_enough_and_text_cannot_break_out() -> None:
    assert header(model_card({}))["tags"] == ["model-merging", "lit-merge"]
    wild = {**FACTS, "suite": "a: b\n--- c", "config": "x: |\n  ```\n  code\n", "tasks": ["only"]}
    card = model_card(wild, {**REPORT, "tasks": {"a|b": {"accuracy": 1.0}}})
    assert header(card)["model-index"][0]["name"] == "AdaMerging on a: b\n--- c"
    assert "a\\|b" in card
    assert "````yaml\n" in card
    Path("README.md").write_text(card)
