"""The shapes of LLaMA and its descendants, read from Hugging Face's config.json."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

Config = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embeddings."""

    theta: float = 1e5
    factor: float = 1.0
    """By how much all rotations are slower."""
    llama3: tuple[float, float, float, float] | None = None
    """LLaMA 3.1's (factor, low_freq_factor, high_freq_factor, original context), if any."""

    def frequencies(self, head_dim: int) -> jax.Array:
        """Radians per position for each pair of coordinates, float32 `(head_dim / 2,)`."""
        exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
        frequencies = self.theta**-exponents / self.factor
        if self.llama3 is None:
            return frequencies
        # LLaMA 3.1 extends its context by slowing the slow rotations: frequencies with wavelengths
        # above context/low are divided by `factor`, those below context/high are kept, and those
        # between are interpolated.
        factor, low, high, context = self.llama3
        rotations = context * frequencies / (2 * math.pi)
        keep = jnp.clip((rotations - low) / (high - low), 0, 1)
        return frequencies * (keep + (1 - keep) / factor)


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """How a layer attends."""

    rope: Rope | None = Rope()
    """None for a layer without positions."""
    window: int | None = None
    """The number of positions that a token sees, its own included; None for all."""


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The shape of the model; the defaults are SmolLM2-135M's."""

    vocab_size: int = 49152
    hidden_size: int = 576
    intermediate_size: int = 1536
    num_hidden_layers: int = 30
    num_attention_heads: int = 9
    num_key_value_heads: int = 3
    head_dim: int = 64
    layer_kinds: tuple[LayerKind, ...] = (LayerKind(),)
    """One for each layer, or a single one for all."""
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int | None = 8192
    """The context, in tokens; None if unknown."""
    tie_word_embeddings: bool = True
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """Whether the heads of queries and keys are normalized."""
    sandwich_norm: bool = False
    """Whether the outputs of attention and MLP are normalized too, as in Gemma."""
    norm_offset: float = 0.0
    """Added to the scales of all norms; 1 in Gemma."""
    activation: Literal["silu", "gelu_tanh"] = "silu"
    embedding_scale: float = 1.0
    attention_scale: float | None = None
    """The factor of the scores; None for head_dim**-0.5."""
    logit_softcap: float | None = None
    """Logits become softcap * tanh(logits / softcap); None to leave them."""

    @property
    def distinct_kinds(self) -> tuple[LayerKind, ...]:
        """The kinds of layers, each once."""
        return tuple(dict.fromkeys(self.layer_kinds))

    @property
    def kind_of_layer(self) -> list[int]:
        """For each layer the index of its kind in `distinct_kinds`."""
        kinds = self.layer_kinds
        kinds = kinds * self.num_hidden_layers if len(kinds) == 1 else kinds
        return [self.distinct_kinds.index(kind) for kind in kinds]

    @property
    def frequencies(self) -> jax.Array:
        """Radians per position of each distinct kind, float32 `(kinds, head_dim / 2)`."""
        still = jnp.zeros(self.head_dim // 2)
        ropes = [kind.rope for kind in self.distinct_kinds]
        return jnp.stack([still if r is None else r.frequencies(self.head_dim) for r in ropes])

    @classmethod
    def from_hf(cls, config: Config) -> "LlamaConfig":
        """Reads Hugging Face's config.json.

        Raises:
            ValueError: the config needs a feature that this model does not have.
        """
        kind = config.get("model_type")
        if kind not in _FAMILIES:
            names = ", ".join([*_FAMILIES, "gpt2"])
            raise ValueError(f"model_type {kind!r} is not supported: use one of {names}")
        return cls(**_common(config) | _FAMILIES[kind](config))

    def to_hf(self) -> dict[str, Any]:
        """The config.json of a LLaMA with unscaled rotations; the inverse of `from_hf`."""
        (kind,) = self.layer_kinds
        assert kind.rope is not None
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "rope_theta": kind.rope.theta,
        }
        return config | {name: getattr(self, name) for name in _SHARED}


_SHARED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps"),
    *("max_position_embeddings", "tie_word_embeddings"),
)
"""The settings that have the same name and meaning in config.json."""


def _common(config: Config) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    activation = config.get("hidden_act", "silu")
    if config["model_type"] != "gemma3_text" and activation != "silu":
        raise ValueError(f"hidden_act {activation!r} is not supported, only silu")
    return {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "num_hidden_layers": config["num_hidden_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "rms_norm_eps": config.get("rms_norm_eps", 1e-6),
        "max_position_embeddings": config.get("max_position_embeddings"),
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
    }


# ---------------------------------------------------------------------------- families


def _llama(config: Config) -> dict[str, Any]:
    return {"layer_kinds": (LayerKind(_rope(config)),), **_biases(config)}


def _mistral(config: Config) -> dict[str, Any]:
    # Configs that do not mention the window have that of Mistral 7B v0.1.
    return {"layer_kinds": (LayerKind(_rope(config), config.get("sliding_window", 4096)),)}


def _qwen2(config: Config) -> dict[str, Any]:
    return {"layer_kinds": _qwen_kinds(config), "qkv_bias": True}


def _qwen3(config: Config) -> dict[str, Any]:
    kinds = _qwen_kinds(config)
    # Its heads do not divide the width.
    return {"layer_kinds": kinds, "qk_norm": True, "head_dim": config.get("head_dim", 128)} | (
        _biases(config)
    )


def _smollm3(config: Config) -> dict[str, Any]:
    layers, rope = range(config["num_hidden_layers"]), _rope(config)
    every = config.get("no_rope_layer_interval", 4)
    has_rope = config.get("no_rope_layers") or [(layer + 1) % every != 0 for layer in layers]
    types = config.get("layer_types") or [
        "full_attention" if has_rope[layer] else "sliding_attention" for layer in layers
    ]
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    kinds = tuple(
        LayerKind(
            rope if has_rope[layer] else None,
            window if types[layer] == "sliding_attention" else None,
        )
        for layer in layers
    )
    return {
        "layer_kinds": kinds,
        "tie_word_embeddings": config.get("tie_word_embeddings", True),
        **_biases(config),
    }


def _gemma3(config: Config) -> dict[str, Any]:
    activation = config.get("hidden_activation", "gelu_pytorch_tanh")
    if activation != "gelu_pytorch_tanh":
        raise ValueError(f"hidden_activation {activation!r} is not supported")
    for name in ("attn_logit_softcapping", "use_bidirectional_attention"):
        if config.get(name):
            raise ValueError(f"{name}={config[name]} is not supported")
    every = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
    types = config.get("layer_types") or [
        "sliding_attention" if (layer + 1) % every else "full_attention"
        for layer in range(config["num_hidden_layers"])
    ]
    if parameters := config.get("rope_parameters"):  # transformers 5
        of_full, of_sliding = parameters["full_attention"], parameters["sliding_attention"]
    else:
        of_full = {"rope_theta": config.get("rope_theta", 1e6)} | (config.get("rope_scaling") or {})
        of_sliding = {"rope_theta": config.get("rope_local_base_freq", 1e4)}
    known = {
        "full_attention": LayerKind(_read_rope(of_full)),
        "sliding_attention": LayerKind(_read_rope(of_sliding), config.get("sliding_window", 4096)),
    }
    return {
        "layer_kinds": tuple(known[name] for name in types),
        "head_dim": config.get("head_dim", 256),
        "tie_word_embeddings": config.get("tie_word_embeddings", True),
        "qk_norm": True,
        "sandwich_norm": True,
        "norm_offset": 1.0,
        "activation": "gelu_tanh",
        "embedding_scale": config["hidden_size"] ** 0.5,
        "attention_scale": config.get("query_pre_attn_scalar", 256) ** -0.5,
        "logit_softcap": config.get("final_logit_softcapping"),
        "qkv_bias": bool(config.get("attention_bias")),
        "o_bias": bool(config.get("attention_bias")),
    }


_FAMILIES: dict[str, Callable[[Config], dict[str, Any]]] = {
    "llama": _llama,  # also SmolLM and SmolLM2
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "smollm3": _smollm3,
    "gemma3_text": _gemma3,
}


def _biases(config: Config) -> dict[str, bool]:
    attention, mlp = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    return {"qkv_bias": attention, "o_bias": attention, "mlp_bias": mlp}


def _qwen_kinds(config: Config) -> tuple[LayerKind, ...]:
    rope = _rope(config)
    if not (config.get("use_sliding_window") and config.get("sliding_window")):
        return (LayerKind(rope),)
    first = config.get("max_window_layers", 28)
    types: Sequence[str] = config.get("layer_types") or [
        "sliding_attention" if layer >= first else "full_attention"
        for layer in range(config["num_hidden_layers"])
    ]
    windows = {"sliding_attention": config["sliding_window"], "full_attention": None}
    return tuple(LayerKind(rope, windows[name]) for name in types)


# -------------------------------------------------------------------------------- rope


def _rope(config: Config) -> Rope:
    # transformers 5 has one entry, rope_parameters; earlier versions have several.
    theta = {"rope_theta": config["rope_theta"]} if config.get("rope_theta") else {}
    return _read_rope(theta | (config.get("rope_parameters") or config.get("rope_scaling") or {}))


def _read_rope(parameters: Config) -> Rope:
    theta = float(parameters.get("rope_theta") or 10_000.0)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, factor=float(parameters["factor"]))
    if kind != "llama3":
        raise ValueError(f"rope scaling {kind!r} is not supported, only llama3 and linear")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    factor, low, high, context = (float(parameters[name]) for name in names)
    return Rope(theta, llama3=(factor, low, high, context))
