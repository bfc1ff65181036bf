"""How CLIP's tensors are called in each library: one table per pair of key schemes, and nothing but data.

The schemes are called layouts:

======================  ==========================================================================================
``hugging_face``        ``vision_model.*``, what transformers 4 writes for ``CLIPVisionModel``; with
                        ``visual_projection.weight`` for ``CLIPVisionModelWithProjection``
``hugging_face_5``      the same without the prefix, what transformers 5 writes for ``CLIPVisionModel``
``hugging_face_full``   ``CLIPModel``: both towers, both projections, ``logit_scale``
``open_clip``           ``visual.*``, the image tower of ``open_clip.create_model``
``open_clip_visual``    the same without the prefix: ``model.visual.state_dict()``
``open_clip_full``      both towers of ``open_clip.create_model``
``task_vectors``        ``model.visual.*`` and what is left of the text tower: the checkpoints of the repositories
                        task_vectors (arXiv 2212.04089), AdaMerging (2310.02575) and Representation Surgery
======================  ==========================================================================================

Hugging Face keeps the matrices of queries, keys and values apart, open_clip stacks them; the two store projections
as each other's transpose. ``pre_layrnorm`` is spelled as it is.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

__all__ = ("LAYOUTS", "MARKERS", "TABLES", "KeyTable", "Leftover", "Rename", "Row", "Thirds", "Transposed", "Under")


class Rename(NamedTuple):
    """The same tensor under two names; ``{v}`` and ``{t}`` count the blocks of the image and the text tower."""

    left: str
    right: str
    optional: bool = False


class Transposed(NamedTuple):
    """A matrix and its transpose."""

    left: str
    right: str


class Thirds(NamedTuple):
    """Three tensors and the one in which they are stacked along the first dimension."""

    left: tuple[str, str, str]
    right: str


class Under(NamedTuple):
    """Everything that begins with a prefix, whatever the architecture; comes after the rows that are more special."""

    left: str
    right: str


class Leftover(NamedTuple):
    """What one side has and the other does not, and that may be left out; a name ending in a dot means all under it."""

    side: Literal["left", "right"]
    name: str


Row = Rename | Transposed | Thirds | Under | Leftover


class KeyTable(NamedTuple):
    """How two layouts correspond.

    Attributes:
        left: One layout.
        right: The other one.
        rows: What corresponds, in open_clip's order.
        one_way: Whether only left → right is possible, because the left has more.
    """

    left: str
    right: str
    rows: tuple[Row, ...]
    one_way: bool = False


def _block(left: str, right: str) -> tuple[Row, ...]:
    """The rows of a residual block."""
    q, k, v = (f"{left}.self_attn.{part}_proj" for part in "qkv")
    return (
        Rename(f"{left}.layer_norm1.weight", f"{right}.ln_1.weight"),
        Rename(f"{left}.layer_norm1.bias", f"{right}.ln_1.bias"),
        Thirds((f"{q}.weight", f"{k}.weight", f"{v}.weight"), f"{right}.attn.in_proj_weight"),
        Thirds((f"{q}.bias", f"{k}.bias", f"{v}.bias"), f"{right}.attn.in_proj_bias"),
        Rename(f"{left}.self_attn.out_proj.weight", f"{right}.attn.out_proj.weight"),
        Rename(f"{left}.self_attn.out_proj.bias", f"{right}.attn.out_proj.bias"),
        Rename(f"{left}.layer_norm2.weight", f"{right}.ln_2.weight"),
        Rename(f"{left}.layer_norm2.bias", f"{right}.ln_2.bias"),
        Rename(f"{left}.mlp.fc1.weight", f"{right}.mlp.c_fc.weight"),
        Rename(f"{left}.mlp.fc1.bias", f"{right}.mlp.c_fc.bias"),
        Rename(f"{left}.mlp.fc2.weight", f"{right}.mlp.c_proj.weight"),
        Rename(f"{left}.mlp.fc2.bias", f"{right}.mlp.c_proj.bias"),
    )


_IMAGE: tuple[Row, ...] = (
    Rename("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    Rename("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    Transposed("visual_projection.weight", "visual.proj"),
    Rename("vision_model.embeddings.patch_embedding.weight", "visual.conv1.weight"),
    Rename("vision_model.pre_layrnorm.weight", "visual.ln_pre.weight"),
    Rename("vision_model.pre_layrnorm.bias", "visual.ln_pre.bias"),
    *_block("vision_model.encoder.layers.{v}", "visual.transformer.resblocks.{v}"),
    Rename("vision_model.post_layernorm.weight", "visual.ln_post.weight"),
    Rename("vision_model.post_layernorm.bias", "visual.ln_post.bias"),
    Leftover("left", "vision_model.embeddings.position_ids"),  # a constant, saved by transformers before 4.31
)

_TEXT: tuple[Row, ...] = (
    Rename("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    Transposed("text_projection.weight", "text_projection"),
    Rename("logit_scale", "logit_scale"),
    *_block("text_model.encoder.layers.{t}", "transformer.resblocks.{t}"),
    Rename("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
    Rename("text_model.final_layer_norm.weight", "ln_final.weight"),
    Rename("text_model.final_layer_norm.bias", "ln_final.bias"),
    Leftover("left", "text_model.embeddings.position_ids"),
    Leftover("right", "attn_mask"),  # constants that OpenAI's and old open_clip files hold
    Leftover("right", "input_resolution"),
    Leftover("right", "context_length"),
    Leftover("right", "vocab_size"),
)

TABLES: tuple[KeyTable, ...] = (
    KeyTable("hugging_face", "open_clip", _IMAGE),
    KeyTable(
        "hugging_face",
        "hugging_face_5",
        (
            Rename("visual_projection.weight", "visual_projection.weight", optional=True),
            Leftover("left", "vision_model.embeddings.position_ids"),
            Leftover("right", "embeddings.position_ids"),
            Under("vision_model.", ""),
        ),
    ),
    KeyTable("open_clip", "open_clip_visual", (Under("visual.", ""),)),
    KeyTable(
        "task_vectors",
        "open_clip",
        (
            Under("model.visual.", "visual."),
            Leftover("left", "model.positional_embedding"),
            Leftover("left", "model.text_projection"),
            Leftover("left", "model.logit_scale"),
            Leftover("left", "model.token_embedding.weight"),
            Leftover("left", "model.ln_final.weight"),
            Leftover("left", "model.ln_final.bias"),
            Leftover("left", "model.attn_mask"),
        ),
    ),
    KeyTable(
        "hugging_face_full",
        "hugging_face",
        (
            Rename("visual_projection.weight", "visual_projection.weight"),
            Leftover("left", "vision_model.embeddings.position_ids"),
            Under("vision_model.", "vision_model."),
            Leftover("left", "text_model."),
            Leftover("left", "text_projection.weight"),
            Leftover("left", "logit_scale"),
            Leftover("left", "logit_bias"),
        ),
        one_way=True,
    ),
    KeyTable(
        "open_clip_full",
        "open_clip",
        (
            Under("visual.", "visual."),
            Leftover("left", "transformer."),
            Leftover("left", "token_embedding.weight"),
            Leftover("left", "positional_embedding"),
            Leftover("left", "text_projection"),
            Leftover("left", "ln_final."),
            Leftover("left", "text."),  # open_clip's CustomTextCLIP
            Leftover("left", "text_decoder."),  # CoCa
            Leftover("left", "logit_scale"),
            Leftover("left", "logit_bias"),
            Leftover("left", "attn_mask"),
            Leftover("left", "input_resolution"),
            Leftover("left", "context_length"),
            Leftover("left", "vocab_size"),
        ),
        one_way=True,
    ),
    KeyTable("hugging_face_full", "open_clip_full", _IMAGE + _TEXT),
)

# how a layout is told from its names: the first whose beginnings all occur
MARKERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("hugging_face_full", ("vision_model.", "text_model.")),
    ("hugging_face", ("vision_model.",)),
    ("task_vectors", ("model.visual.",)),
    ("open_clip_full", ("visual.", "token_embedding.")),
    ("open_clip_full", ("visual.", "text.")),
    ("open_clip", ("visual.",)),
    ("hugging_face_5", ("embeddings.patch_embedding.", "pre_layrnorm.")),
    ("open_clip_visual", ("class_embedding", "conv1.", "ln_pre.")),
)

LAYOUTS: tuple[str, ...] = tuple(dict.fromkeys(layout for layout, _ in MARKERS))
