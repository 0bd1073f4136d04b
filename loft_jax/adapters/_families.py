"""The built-in families of models, as tables of names in Hugging Face transformers."""

import re
from collections.abc import Sequence
from typing import Any

from loft_jax.adapters._family import LAYER, Family


def as_family(family: Family | str) -> Family:
    """Returns a family, given itself or the name of a built-in one.

    Raises:
      ValueError: the name is unknown.
      TypeError: it is neither a family nor a name.
    """
    if isinstance(family, Family):
        return family
    if not isinstance(family, str):
        raise TypeError(f"family must be a name or a Family, got {family!r}")
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}. Use one of {', '.join(FAMILIES)}")
    return FAMILIES[family]


def _family(
    name: str,
    prefix: str,
    backbone: Sequence[Sequence[str]],
    heads: Sequence[str],
    kinds: tuple[tuple[str, str], ...] = (),
    column: int = 0,
) -> Family:
    """Builds a family from a table of names.

    Args:
      name, prefix, kinds: as in `Family`.
      backbone: for each module its names. All of them are recognized in our paths.
      heads: names of modules outside of the backbone.
      column: which of the names to write.
    """
    entries = [
        (_regex(known), "{prefix}" + names[min(column, len(names) - 1)])
        for names in backbone
        for known in names
    ]
    entries += [(_regex(head), head) for head in heads]
    return Family(name=name, prefix=prefix, modules=tuple(dict(entries).items()), kinds=kinds)


def _regex(name: str) -> str:
    """Returns a regex of our paths of a module: layers have a number after / or _, or none."""
    # Split before escaping, because re.escape also escapes the braces.
    parts = [re.escape(part.replace(".", "/")) for part in name.split("." + LAYER)]
    return r"(?:[/_](?P<layer>\d+))?".join(parts)


def _rows(*names: Any) -> tuple[tuple[str, ...], ...]:
    return tuple((name,) if isinstance(name, str) else name for name in names)


_LLAMA = _rows(
    "embed_tokens",
    "layers.{layer}.input_layernorm",
    *(f"layers.{LAYER}.self_attn.{part}_proj" for part in "qkvo"),
    *(f"layers.{LAYER}.self_attn.{part}_norm" for part in "qk"),  # Qwen3, Gemma 3
    "layers.{layer}.post_attention_layernorm",
    *(f"layers.{LAYER}.{when}_feedforward_layernorm" for when in ("pre", "post")),  # Gemma 3
    *(f"layers.{LAYER}.mlp.{part}_proj" for part in ("gate", "up", "down")),
    "layers.{layer}.mlp.gate",  # the router of Mixtral, Qwen2-MoE and Qwen3-MoE
    *(f"layers.{LAYER}.mlp.experts.{part}_proj" for part in ("gate_up", "down")),
    "norm",
)
_GPT2 = _rows(
    "wte",
    "wpe",
    "h.{layer}.ln_1",
    "h.{layer}.attn.c_attn",
    "h.{layer}.attn.c_proj",
    "h.{layer}.ln_2",
    "h.{layer}.mlp.c_fc",
    "h.{layer}.mlp.c_proj",
    "ln_f",
)
_BERT = _rows(
    *(f"embeddings.{part}_embeddings" for part in ("word", "position", "token_type")),
    "embeddings.LayerNorm",
    *(f"encoder.layer.{LAYER}.attention.self.{part}" for part in ("query", "key", "value")),
    "encoder.layer.{layer}.attention.output.dense",
    "encoder.layer.{layer}.attention.output.LayerNorm",
    "encoder.layer.{layer}.intermediate.dense",
    "encoder.layer.{layer}.output.dense",
    "encoder.layer.{layer}.output.LayerNorm",
    "pooler.dense",
)
# The name in transformers 5, then the one in version 4 if it differs. Our paths may use either.
_VIT = _rows(
    "embeddings",
    "embeddings.patch_embeddings.projection",
    ("layers.{layer}.layernorm_before", "encoder.layer.{layer}.layernorm_before"),
    ("layers.{layer}.attention.q_proj", "encoder.layer.{layer}.attention.attention.query"),
    ("layers.{layer}.attention.k_proj", "encoder.layer.{layer}.attention.attention.key"),
    ("layers.{layer}.attention.v_proj", "encoder.layer.{layer}.attention.attention.value"),
    ("layers.{layer}.attention.o_proj", "encoder.layer.{layer}.attention.output.dense"),
    ("layers.{layer}.layernorm_after", "encoder.layer.{layer}.layernorm_after"),
    ("layers.{layer}.mlp.fc1", "encoder.layer.{layer}.intermediate.dense"),
    ("layers.{layer}.mlp.fc2", "encoder.layer.{layer}.output.dense"),
    "layernorm",
    "pooler.dense",
)
_DINO = "encoder.layer.{layer}."
_DINOV2 = _rows(
    "embeddings",
    "embeddings.patch_embeddings.projection",
    _DINO + "norm1",
    (_DINO + "attention.q_proj", _DINO + "attention.attention.query"),
    (_DINO + "attention.k_proj", _DINO + "attention.attention.key"),
    (_DINO + "attention.v_proj", _DINO + "attention.attention.value"),
    (_DINO + "attention.o_proj", _DINO + "attention.output.dense"),
    _DINO + "layer_scale1",
    _DINO + "norm2",
    _DINO + "mlp.fc1",
    _DINO + "mlp.fc2",
    _DINO + "layer_scale2",
    "layernorm",
)
# The SwiGLU of DINOv2 giant. In transformers 4 gate and up are one layer, so it has other modules.
_DINOV2_SWIGLU = _rows(*(f"{_DINO}mlp.{part}_proj" for part in ("gate", "up", "down")))
_DINOV2_SWIGLU4 = _rows(_DINO + "mlp.weights_in", _DINO + "mlp.weights_out")

_EXPERTS = ((r".*\.mlp\.experts\..*", "experts"), (r".*\.mlp\.gate", "parameter"))
_PATCHES = ((r".*\.projection", "conv2d"),)
_BERT_HEADS = (
    "classifier",
    "qa_outputs",
    "cls.predictions",
    "cls.predictions.decoder",
    "cls.predictions.transform.dense",
    "cls.predictions.transform.LayerNorm",
    "cls.seq_relationship",
)

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        _family(
            "llama",
            "model",
            _LLAMA,
            ("lm_head", "score"),
            kinds=((r".*embed_tokens", "embedding"), *_EXPERTS),
        ),
        _family(
            "gpt2",
            "transformer",
            _GPT2,
            ("lm_head", "score", "classifier", "qa_outputs"),
            kinds=((r".*\.c_(attn|proj|fc)", "conv1d"), (r".*w[tp]e", "embedding")),
        ),
        _family("bert", "bert", _BERT, _BERT_HEADS, kinds=((r".*_embeddings", "embedding"),)),
        _family("vit", "vit", _VIT, ("classifier",), kinds=_PATCHES),
        _family("dinov2", "dinov2", _DINOV2 + _DINOV2_SWIGLU, ("classifier",), kinds=_PATCHES),
        _family("vit_transformers4", "vit", _VIT, ("classifier",), kinds=_PATCHES, column=1),
        _family(
            "dinov2_transformers4",
            "dinov2",
            _DINOV2 + _DINOV2_SWIGLU4,
            ("classifier",),
            kinds=_PATCHES,
            column=1,
        ),
    )
}
"""The built-in families, by name.

``vit`` and ``dinov2`` use the module names of transformers 5. For adapters and models made with
transformers 4 use ``vit_transformers4`` and ``dinov2_transformers4``.
"""
