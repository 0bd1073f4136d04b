"""Tiny random models and images, for trying a command without a download."""

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VIT_CONFIG = {
    "model_type": "vit",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 4,
    "image_size": 8,
}
"""A ViT's config.json."""
CONFIG = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
}
"""A LLaMA's config.json."""


def byte_tokenizer() -> Tokenizer:
    """A tokenizer of the 256 bytes, with one merge."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet[:-1], "th"])}
    # The stubs of tokenizers lack the constructor of models.
    tokenizer = Tokenizer(models.BPE(vocabulary, [("t", "h")]))  # pyright: ignore[reportCallIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def random_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights for CONFIG by Hugging Face's names, float32 `(out, in)`."""
    draw = np.random.default_rng(seed)
    hidden, inner, keys = 16, 24, 8
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (256, hidden)}
    for index in range(2):
        layer = f"model.layers.{index}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.self_attn.q_proj.weight": (hidden, hidden),
            f"{layer}.self_attn.k_proj.weight": (keys, hidden),
            f"{layer}.self_attn.v_proj.weight": (keys, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, hidden),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.mlp.gate_proj.weight": (inner, hidden),
            f"{layer}.mlp.up_proj.weight": (inner, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, inner),
        }
    shapes["model.norm.weight"] = (hidden,)
    return {
        name: (draw.normal(size=shape) * 0.3 + (len(shape) == 1)).astype(np.float32)
        for name, shape in shapes.items()
    }


def write_model(folder: Path) -> Path:
    """Writes the model to a new folder in Hugging Face's format, and returns the folder."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    save_file(random_tensors(), folder / "model.safetensors")
    return folder


def random_vit_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights for VIT_CONFIG by Hugging Face's names, float32 `(out, in)`."""
    hidden, inner, patch, tokens = 16, 24, 4, 5
    shapes: dict[str, tuple[int, ...]] = {
        "vit.embeddings.cls_token": (1, 1, hidden),
        "vit.embeddings.position_embeddings": (1, tokens, hidden),
        "vit.embeddings.patch_embeddings.projection.weight": (hidden, 3, patch, patch),
        "vit.embeddings.patch_embeddings.projection.bias": (hidden,),
        "vit.layernorm.weight": (hidden,),
        "vit.layernorm.bias": (hidden,),
    }
    for index in range(2):
        layer = f"vit.encoder.layer.{index}"
        for norm in ("layernorm_before", "layernorm_after"):
            shapes |= {f"{layer}.{norm}.{name}": (hidden,) for name in ("weight", "bias")}
        for name, out, in_ in (
            *(
                (f"attention.attention.{part}", hidden, hidden)
                for part in ("query", "key", "value")
            ),
            ("attention.output.dense", hidden, hidden),
            ("intermediate.dense", inner, hidden),
            ("output.dense", hidden, inner),
        ):
            shapes |= {f"{layer}.{name}.weight": (out, in_), f"{layer}.{name}.bias": (out,)}
    draw = np.random.default_rng(seed)
    return {name: draw.normal(size=x).astype(np.float32) * 0.3 for name, x in shapes.items()}


def write_vit(folder: Path) -> Path:
    """Writes a ViT to a new folder in Hugging Face's format, and returns the folder."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(VIT_CONFIG))
    save_file(random_vit_tensors(), folder / "model.safetensors")
    return folder


def write_images(path: Path) -> Path:
    """Writes 20 images of two classes to a .npz file, and returns its path."""
    draw, labels = np.random.default_rng(0), np.arange(20) % 2
    images = draw.integers(0, 100, (20, 8, 8, 3)) + 100 * labels[:, None, None, None]
    np.savez(path, images=images.astype(np.uint8), labels=labels, classes=["dark", "light"])
    return path
