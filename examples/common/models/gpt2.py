"""GPT-2 in Flax nnx: LayerNorm, learned positions, and one projection for queries, keys and values.

Attributes have the names of Hugging Face checkpoints. The layers `h` are stacked, as in `llama.py`.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from loft_jax.adapters import LoraRule

from .attention import attend
from .cache import Cache, CachedAttention, extend_layers
from .stacking import keep, scan_layers, stack, stacked_rule

TARGETS = {
    **dict.fromkeys("qkv", "attn/c_attn"),
    "o": "attn/c_proj",
    "up": "mlp/c_fc",
    "down": "mlp/c_proj",
}
"""The projections that can have an adapter: path within a layer, by short name."""


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """The shape of the model; the defaults are those of the smallest GPT-2."""

    vocab_size: int = 50257
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 1024
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True

    @property
    def head_dim(self) -> int:
        """The width of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        """The heads of keys and values, one for each head of queries."""
        return self.num_attention_heads

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "GPT2Config":
        """Reads Hugging Face's config.json.

        Raises:
            ValueError: the config needs a feature that this model does not have.
        """
        activation = config.get("activation_function", "gelu_new")
        if activation not in ("gelu_new", "gelu_pytorch_tanh"):
            raise ValueError(f"activation_function {activation!r} is not supported")
        for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
            if config.get(name):
                raise ValueError(f"{name}=true is not supported")
        if not config.get("scale_attn_weights", True):
            raise ValueError("scale_attn_weights=false is not supported")
        width = config["n_embd"]
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=width,
            intermediate_size=config.get("n_inner") or 4 * width,
            num_hidden_layers=config["n_layer"],
            num_attention_heads=config["n_head"],
            max_position_embeddings=config.get("n_positions", 1024),
            layer_norm_epsilon=config.get("layer_norm_epsilon", 1e-5),
            tie_word_embeddings=config.get("tie_word_embeddings", True),
        )


class Attention(nnx.Module):
    """Causal attention."""

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        self.config = config
        width = config.hidden_size
        self.c_attn = nnx.Linear(width, 3 * width, rngs=rngs)
        self.c_proj = nnx.Linear(width, width, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        segments: jax.Array | None = None,
        cached: CachedAttention | None = None,
    ) -> jax.Array:
        """`(batch, length, hidden)` to the same; `cached` mixes the values, if it is given."""
        scale = self.config.head_dim**-0.5
        parts = (*x.shape[:2], 3, self.config.num_attention_heads, self.config.head_dim)
        q, k, v = jnp.moveaxis(keep(self.c_attn(x)).reshape(parts), 2, 0)
        if cached is None:
            mixed = attend(q, k, v, scale=scale, segments=segments)
        else:
            mixed = cached(q, k, v, scale=scale)
        return self.c_proj(mixed.reshape(x.shape))


class MLP(nnx.Module):
    """Two projections with GELU between them."""

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        self.c_fc = nnx.Linear(config.hidden_size, config.intermediate_size, rngs=rngs)
        self.c_proj = nnx.Linear(config.intermediate_size, config.hidden_size, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`(batch, length, hidden)` to the same."""
        return self.c_proj(jax.nn.gelu(keep(self.c_fc(x))))


class Layer(nnx.Module):
    """Attention and MLP, each with pre-normalization and a residual connection."""

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        norm = {"epsilon": config.layer_norm_epsilon, "rngs": rngs}
        self.ln_1 = nnx.LayerNorm(config.hidden_size, **norm)
        self.attn = Attention(config, rngs=rngs)
        self.ln_2 = nnx.LayerNorm(config.hidden_size, **norm)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        segments: jax.Array | None = None,
        cached: CachedAttention | None = None,
    ) -> jax.Array:
        """`(batch, length, hidden)` to the same; arguments as `Attention`."""
        x = keep(x + self.attn(self.ln_1(x), segments, cached))
        return x + self.mlp(self.ln_2(x))


class GPT2(nnx.Module):
    """Maps token ids to the logits of the next token; the interface is that of `Llama`."""

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs, remat: bool = False):
        """Draws random weights; arguments as `Llama`."""
        self.config = config
        self.remat = remat
        width = config.hidden_size
        self.wte = nnx.Embed(config.vocab_size, width, rngs=rngs)
        self.wpe = nnx.Embed(config.max_position_embeddings, width, rngs=rngs)
        self.h = stack(lambda rngs: Layer(config, rngs=rngs), config.num_hidden_layers, rngs)
        self.ln_f = nnx.LayerNorm(width, epsilon=config.layer_norm_epsilon, rngs=rngs)
        if not config.tie_word_embeddings:
            self.lm_head = nnx.Linear(width, config.vocab_size, use_bias=False, rngs=rngs)

    def hidden(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
    ) -> jax.Array:
        """The last layer's normalized output, `(batch, length, hidden)`; arguments as `Llama`'s."""
        if positions is None:
            positions = jnp.arange(tokens.shape[1])[None]
        run = lambda layer, x: layer(x, segments)
        x = self._embed(tokens, positions)
        keeps = "input" if self.remat else "named"
        return self.ln_f(scan_layers(self.h, x, run, keeps=keeps))

    def cache(self, first: jax.Array, slots: int) -> Cache:
        """An empty cache for sequences that begin at the slots `first`, int `(batch,)`."""
        return Cache.empty(first, slots, self.config, self.wte.embedding[...].dtype)

    def extend(self, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """The normalized output for tokens that continue the sequences in a cache.

        Arguments and result as `Llama.extend`.
        """
        x = self._embed(tokens, cache.positions(tokens.shape[1]))
        run = lambda layer, x, cached: layer(x, None, cached)
        x, cache = extend_layers(self.h, x, cache, run)
        return self.ln_f(x), cache

    def _embed(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        return self.wte.embedding[...][tokens] + self.wpe.embedding[...][positions]

    def head(self, x: jax.Array) -> jax.Array:
        """Hidden states `(..., hidden)` to logits `(..., vocabulary)`."""
        tied = self.config.tie_word_embeddings
        return x @ self.wte.embedding[...].T if tied else self.lm_head(x)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
    ) -> jax.Array:
        """Ids `(batch, length)` to logits `(batch, length, vocabulary)`; arguments as `hidden`."""
        return self.head(self.hidden(tokens, positions, segments))


def lora_rule(targets: Iterable[str], rank: int, alpha: float) -> LoraRule:
    """Adapters on the projections `targets` (keys of `TARGETS`) of every layer.

    GPT-2 has one projection for q, k and v, so each of these names selects it.
    """
    return stacked_rule(TARGETS, targets, rank, alpha, layers="h")
