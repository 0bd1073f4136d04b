"""Records the logits of Hugging Face's language models, for `test_llama.py`.

    pip install torch transformers
    python tests/examples/record_llama_logits.py

Writes `data/llama_logits.npz`: for each case its config, random weights, token ids and logits.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

PATH = Path(__file__).parent / "data" / "llama_logits.npz"

_SHAPE = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES: dict[str, dict[str, Any]] = {
    "tied": {"model_type": "llama", "rope_theta": 1e5, "tie_word_embeddings": True},
    "untied, wide heads": {
        "model_type": "llama",
        "head_dim": 8,
        "rope_theta": 1e4,
        "tie_word_embeddings": False,
    },
    "llama3 rope scaling": {
        "model_type": "llama",
        "rope_theta": 1e4,
        "rope_scaling": _LLAMA3,
        "tie_word_embeddings": True,
    },
    "biases, linear rope scaling": {
        "model_type": "llama",
        "rope_theta": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "mistral": {"model_type": "mistral", "sliding_window": 7, "tie_word_embeddings": False},
    "qwen2 biases": {"model_type": "qwen2", "rope_theta": 1e4, "tie_word_embeddings": True},
    "qwen2 windows": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": True},
    "smollm3": {
        "model_type": "smollm3",
        "no_rope_layer_interval": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 8,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 7,
        "query_pre_attn_scalar": 5,
        "final_logit_softcapping": 6.0,
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 48,
        "n_positions": 64,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 4,
    },
}


def make_model(case: str) -> Any:
    """The model of transformers with a case's random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    options = (_SHAPE if CASES[case]["model_type"] != "gpt2" else {}) | CASES[case]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # the initial values would hide differences
            parameter.add_(0.3 * torch.randn_like(parameter))
            parameter.copy_(parameter.half())  # so that the file can hold them in 16 bits
    return model


def record(case: str) -> dict[str, Any]:
    """A case's config (as transformers writes it), weights, ids `(1, 24)` and float32 logits."""
    import torch

    model = make_model(case)
    config = model.config
    with torch.no_grad():
        ids = torch.randint(0, config.vocab_size, (1, 24))
        logits = model(ids).logits.numpy()
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    return {"config": config.to_dict(), "tensors": tensors, "ids": ids.numpy(), "logits": logits}


def read_recorded(case: str) -> dict[str, Any]:
    """A case of the recorded file, as `record` returns it."""
    with np.load(PATH) as file:
        prefix = f"{case}/tensors/"
        return {
            "config": json.loads(str(file[f"{case}/config"])),
            "tensors": {
                n.removeprefix(prefix): file[n] for n in file.files if n.startswith(prefix)
            },
            "ids": file[f"{case}/ids"],
            "logits": file[f"{case}/logits"],
        }


def main() -> None:
    """Writes the file."""
    arrays: dict[str, Any] = {}
    for case in CASES:
        recorded = record(case)
        arrays[f"{case}/config"] = json.dumps(recorded["config"])
        arrays[f"{case}/ids"] = recorded["ids"].astype(np.int32)
        arrays[f"{case}/logits"] = recorded["logits"]
        for name, tensor in recorded["tensors"].items():
            if name != "lm_head.weight" or not recorded["config"].get("tie_word_embeddings", True):
                arrays[f"{case}/tensors/{name}"] = tensor.astype(np.float16)
    PATH.parent.mkdir(exist_ok=True)
    np.savez_compressed(PATH, **arrays)


if __name__ == "__main__":
    main()
