"""Tiny random models of transformers, and the same as GGUF files, for tests of serving programs."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY = 64

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# transformers' name of the configuration and of the model, and the fields of config.json.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _SIZES),
    "mistral": ("MistralConfig", "MistralForCausalLM", _SIZES | {"sliding_window": None}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _SIZES),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _SIZES),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", _SIZES | {"tie_word_embeddings": True}),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_inner": 128,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
}
_ARCHITECTURES = {"mistral": "llama"}


@dataclasses.dataclass(frozen=True)
class TinyModel:
    """A random model of transformers.

    Attributes:
      name: its model_type.
      torch: the module of PyTorch.
    """

    name: str
    torch: Any

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        """The weights by their names in transformers."""
        return {name: value.detach().numpy() for name, value in self.torch.state_dict().items()}

    @property
    def targets(self) -> dict[str, tuple[int, int]]:
        """All linear layers of the blocks: (in, out) by name."""
        found = {}
        for name, module in self.torch.named_modules():
            if ".layers." in name or ".h." in name:
                shape = tuple(getattr(getattr(module, "weight", None), "shape", ()))
                if len(shape) == 2:
                    found[name] = shape if self.name == "gpt2" else shape[::-1]
        return found


def make_model(name: str, **changes: Any) -> TinyModel:
    """Returns a model far from its initialization, where many errors would not show."""
    import torch
    import transformers

    config, model, fields = MODELS[name]
    torch.manual_seed(0)
    module = getattr(transformers, model)(getattr(transformers, config)(**(fields | changes)))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return TinyModel(name, module.eval())


def save_folder(model: TinyModel, folder: Path) -> None:
    """Writes the folder of the model as transformers and mlx-lm read it, with a tokenizer."""
    from tokenizers import Tokenizer, models

    # mlx-lm expects GPT-2's names without the head, as in the file of the hub.
    (model.torch.transformer if model.name == "gpt2" else model.torch).save_pretrained(folder)
    # mlx-lm reads these fields, which transformers 5 has moved or removed.
    config = json.loads((folder / "config.json").read_text())
    config["rope_theta"] = config.get("rope_parameters", {}).get("rope_theta")
    config["n_ctx"] = config.get("n_positions")
    (folder / "config.json").write_text(json.dumps(config))
    words = {f"t{number}": number for number in range(VOCABULARY)}
    Tokenizer(models.WordLevel(words, unk_token="t0")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "t2"})
    )


def save_gguf_model(model: TinyModel, path: Path) -> None:
    """Writes the model as llama.cpp's converter does, in float32."""
    import gguf

    config = model.torch.config
    architecture = _ARCHITECTURES.get(model.name, model.name)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(128 if model.name == "gpt2" else config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    if model.name == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"t{number}" for number in range(config.vocab_size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    writer.add_token_merges(["t 0"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    kind = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    tied = config.tie_word_embeddings
    for name, tensor in model.tensors.items():
        if (tied and name == "lm_head.weight") or name.endswith((".attn.bias", ".masked_bias")):
            continue
        module, _, parameter = name.rpartition(".")
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        if architecture == "llama" and (key := heads.get(module.rpartition(".")[2])):
            tensor = interleaved(tensor, getattr(config, key))
        if model.name == "gpt2" and tensor.ndim == 2 and ".h." in name:
            tensor = tensor.T
        if model.name == "gemma" and "norm" in name:
            tensor = tensor + 1
        writer.add_tensor(f"{names.get_name(module)}.{parameter}", np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Returns the rows (out, in) in the order of llama.cpp, written out row by row.

    In a head of d rows transformers rotates rows i and i + d / 2 together, llama.cpp 2i and 2i + 1.
    """
    half = len(weight) // heads // 2
    order = []
    for head in range(heads):
        for i in range(half):
            first = 2 * half * head + i
            order += [first, first + half]
    return weight[order]
