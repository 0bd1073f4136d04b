"""A Vision Transformer in Flax nnx: ViT or DINOv2.

DINOv2 scales the output of each block (LayerScale), and its classifier uses the class token and
the mean of the patches. The classifier of a ViT uses the class token alone. Attributes have the
names of a ViT in Hugging Face transformers. The layers are stacked, as in `llama.py`.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from loft_jax.adapters import LoraRule

from .stacking import scan_layers, stack, stacked_rule

TARGETS = {
    "q": "attention/q_proj",
    "k": "attention/k_proj",
    "v": "attention/v_proj",
    "o": "attention/o_proj",
    "fc1": "mlp/fc1",
    "fc2": "mlp/fc2",
}
"""The projections that can have an adapter: path within a layer, by short name."""

CLASSIFIER = "classifier"
"""The attribute of the classification head."""


@dataclasses.dataclass(frozen=True)
class VitConfig:
    """The shape of the model; the defaults are those of DINOv2's ViT-S/14."""

    kind: Literal["vit", "dinov2"] = "dinov2"
    hidden_size: int = 384
    intermediate_size: int = 1536
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    patch_size: int = 14
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True
    image_mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Mean and standard deviation of each channel, for pixels from 0 to 1."""
    image_std: tuple[float, ...] = (0.229, 0.224, 0.225)

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None
    ) -> "VitConfig":
        """Reads Hugging Face's config.json and preprocessor_config.json.

        Raises:
            ValueError: the config needs a feature that this model does not have.
        """
        kind = config.get("model_type")
        if kind not in ("vit", "dinov2"):
            raise ValueError(f"model_type {kind!r} is not supported: use vit or dinov2")
        if config.get("hidden_act", "gelu") != "gelu":
            raise ValueError(f"hidden_act {config['hidden_act']!r} is not supported, only gelu")
        if config.get("use_swiglu_ffn"):
            raise ValueError("use_swiglu_ffn=true is not supported (DINOv2 giant uses it)")
        if config.get("num_channels", 3) != 3:
            raise ValueError(f"num_channels={config['num_channels']} is not supported, only 3")
        patch, hidden = config["patch_size"], config["hidden_size"]
        if not isinstance(patch, int):
            raise ValueError(f"patch_size {patch} is not supported: patches must be square")
        inner = hidden * config.get("mlp_ratio", 4) if kind == "dinov2" else 4 * hidden
        # ViT was pretrained on values from -1 to 1, DINOv2 with ImageNet's mean and deviation.
        half = {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3} if kind == "vit" else {}
        given = {
            name: tuple(preprocessor[name])
            for name in ("image_mean", "image_std")
            if preprocessor and name in preprocessor
        }
        return cls(
            kind=kind,
            hidden_size=hidden,
            intermediate_size=inner if kind == "dinov2" else config.get("intermediate_size", inner),
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=config["num_attention_heads"],
            patch_size=patch,
            layer_norm_eps=config.get("layer_norm_eps", 1e-6 if kind == "dinov2" else 1e-12),
            qkv_bias=config.get("qkv_bias", True),
            **half | given,
        )


class Attention(nnx.Module):
    """Self-attention between all tokens."""

    def __init__(self, config: VitConfig, *, rngs: nnx.Rngs):
        self.heads, width = config.num_attention_heads, config.hidden_size
        make = lambda bias: nnx.Linear(width, width, use_bias=bias, rngs=rngs)
        self.q_proj, self.k_proj, self.v_proj = (make(config.qkv_bias) for _ in range(3))
        self.o_proj = make(True)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`(batch, tokens, hidden)` to the same."""
        split = (*x.shape[:2], self.heads, -1)
        q, k, v = (layer(x).reshape(split) for layer in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(jax.nn.dot_product_attention(q, k, v).reshape(x.shape))


class MLP(nnx.Module):
    """Two layers with an exact GELU between them."""

    def __init__(self, config: VitConfig, *, rngs: nnx.Rngs):
        self.fc1 = nnx.Linear(config.hidden_size, config.intermediate_size, rngs=rngs)
        self.fc2 = nnx.Linear(config.intermediate_size, config.hidden_size, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`(batch, tokens, hidden)` to the same."""
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class LayerScale(nnx.Module):
    """A learned scale for each channel."""

    def __init__(self, config: VitConfig):
        self.lambda1 = nnx.Param(jnp.ones(config.hidden_size))

    def __call__(self, x: jax.Array) -> jax.Array:
        """`(batch, tokens, hidden)` to the same."""
        return x * self.lambda1[...]


class Layer(nnx.Module):
    """Attention and MLP, each with pre-normalization and a residual connection."""

    def __init__(self, config: VitConfig, *, rngs: nnx.Rngs):
        norm = {"epsilon": config.layer_norm_eps, "use_fast_variance": False, "rngs": rngs}
        self.layernorm_before = nnx.LayerNorm(config.hidden_size, **norm)
        self.attention = Attention(config, rngs=rngs)
        self.layernorm_after = nnx.LayerNorm(config.hidden_size, **norm)
        self.mlp = MLP(config, rngs=rngs)
        scaled = config.kind == "dinov2"
        self.layer_scale1 = LayerScale(config) if scaled else _identity
        self.layer_scale2 = LayerScale(config) if scaled else _identity

    def __call__(self, x: jax.Array) -> jax.Array:
        """`(batch, tokens, hidden)` to the same."""
        x = x + self.layer_scale1(self.attention(self.layernorm_before(x)))
        return x + self.layer_scale2(self.mlp(self.layernorm_after(x)))


class Embeddings(nnx.Module):
    """The class token and the patches, with position embeddings."""

    def __init__(self, config: VitConfig, image_size: int, *, rngs: nnx.Rngs):
        width, patch = config.hidden_size, config.patch_size
        self.patch_embeddings = PatchEmbeddings(width, patch, rngs=rngs)
        tokens = 1 + (image_size // patch) ** 2
        self.cls_token = nnx.Param(jnp.zeros((1, 1, width)))
        self.position_embeddings = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (1, tokens, width))
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """`(batch, height, width, 3)` to `(batch, 1 + patches, hidden)`."""
        x = self.patch_embeddings.projection(x)
        x = x.reshape(len(x), -1, x.shape[-1])
        first = jnp.broadcast_to(self.cls_token[...], (len(x), 1, x.shape[-1]))
        return jnp.concatenate([first, x], axis=1) + self.position_embeddings[...]


class PatchEmbeddings(nnx.Module):
    """A linear map of the pixels of a patch, as a convolution."""

    def __init__(self, width: int, patch: int, *, rngs: nnx.Rngs):
        window = (patch, patch)
        self.projection = nnx.Conv(3, width, window, strides=window, padding="VALID", rngs=rngs)


class Vit(nnx.Module):
    """Maps images of a fixed size to class logits."""

    def __init__(self, config: VitConfig, image_size: int, classes: int, *, rngs: nnx.Rngs):
        self.config = config
        self.embeddings = Embeddings(config, image_size, rngs=rngs)
        self.layers = stack(lambda rngs: Layer(config, rngs=rngs), config.num_hidden_layers, rngs)
        self.layernorm = nnx.LayerNorm(
            config.hidden_size, epsilon=config.layer_norm_eps, use_fast_variance=False, rngs=rngs
        )
        self.classifier = nnx.Linear(
            config.hidden_size * (2 if config.kind == "dinov2" else 1),
            classes,
            kernel_init=nnx.initializers.truncated_normal(0.02),
            rngs=rngs,
        )

    def tokens(self, images: jax.Array) -> jax.Array:
        """uint8 `(batch, size, size, 3)` to the normalized outputs `(batch, 1 + patches, hidden)`.

        The first output belongs to the class token.
        """
        mean, std = jnp.array(self.config.image_mean), jnp.array(self.config.image_std)
        x = (images.astype(jnp.float32) / 255 - mean) / std
        return self.layernorm(scan_layers(self.layers, self.embeddings(x)))

    def features(self, images: jax.Array) -> jax.Array:
        """uint8 `(batch, size, size, 3)` to the classifier's input `(batch, features)`."""
        tokens = self.tokens(images)
        if self.config.kind == "vit":
            return tokens[:, 0]
        return jnp.concatenate([tokens[:, 0], tokens[:, 1:].mean(axis=1)], axis=-1)

    def __call__(self, images: jax.Array) -> jax.Array:
        """uint8 `(batch, size, size, 3)` to logits `(batch, classes)`."""
        return self.classifier(self.features(images))


def lora_rule(targets: Iterable[str], rank: int, alpha: float) -> LoraRule:
    """Adapters on the projections `targets` (keys of `TARGETS`) of every layer."""
    return stacked_rule(TARGETS, targets, rank, alpha)


def _identity(x: jax.Array) -> jax.Array:
    return x
