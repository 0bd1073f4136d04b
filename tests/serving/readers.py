"""What vLLM and SGLang compute from a folder of PEFT, restated from their sources.

Neither is installed, so these are no tests of vLLM and SGLang: they repeat, as functions of NumPy
arrays, the rules that were read in vLLM 0.33.0 (``PEFTHelper`` and ``validate_legal`` in
lora/peft_helper.py, ``parse_fine_tuned_lora_name`` in lora/utils.py, ``from_lora_tensors`` in
lora/lora_model.py) and SGLang 0.5.23 (``LoRAAdapter`` in srt/lora/lora.py, ``validate_new_adapter``
in lora_manager.py, ``load_lora_weight_tensor`` in mem_pool.py). They share no code with ours.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

Products = dict[str, np.ndarray]
"""Changes of weights (out, in) by module, and parameters saved in full by name."""


class RefusedError(Exception):
    """The server does not load the adapter."""


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    prefix = "base_model.model."
    return config, {name.removeprefix(prefix): value for name, value in tensors.items()}


def vllm(folder: Path, max_lora_rank: int = 16) -> Products:
    """The rules of vLLM, for models without stacked experts."""
    config, tensors = _read(folder)
    if set(config["modules_to_save"] or ()) - {"classifier", "score"}:
        raise RefusedError("modules_to_save")
    plain = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
    kind = config["init_lora_weights"]
    if isinstance(kind, str) and kind.lower() not in plain:
        raise RefusedError("init_lora_weights")
    for field in ("use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication"):
        if config[field]:
            raise RefusedError(field)
    if config["use_bdlora"] or config["use_qalora"] or config["bias"] != "none":
        raise RefusedError("bias or a variant")
    if max([config["r"], *config["rank_pattern"].values()]) > max_lora_rank:
        raise RefusedError("rank")
    factors: dict[str, dict[str, np.ndarray]] = {}
    found: Products = {}
    for name, value in tensors.items():
        if name.endswith((".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")):
            continue
        if match := re.fullmatch(r"(.+)\.lora_(?:embedding_([AB])|([AB])\.weight)", name):
            factors.setdefault(match[1], {})[match[2] or match[3]] = value
        elif re.fullmatch(r"(.+\.)?(score|classifier)\.(weight|bias)", name):
            found[name] = value
        else:
            raise RefusedError(name)

    def of(field: str, module: str, default: float) -> float:
        matches = (v for k, v in config[field].items() if re.match(rf"(.*\.)?({k})$", module))
        return next(matches, default)

    for module, pair in factors.items():
        rank = of("rank_pattern", module, config["r"])
        alpha = of("alpha_pattern", module, config["lora_alpha"])
        scale = alpha / (rank**0.5 if config["use_rslora"] else rank)
        found[module] = scale * pair["B"].astype(np.float64) @ pair["A"]
    return found


def sglang(folder: Path) -> Products:
    """The rules of SGLang, for the projections of a LLaMA."""
    config, tensors = _read(folder)
    if config["use_dora"]:
        raise RefusedError("DoRA")
    factors: dict[str, dict[str, np.ndarray]] = {}
    for name, value in tensors.items():
        if match := re.fullmatch(r"(.*layers\.\d+\..+)\.lora_([AB])\.weight", name):
            factors.setdefault(match[1], {})[match[2]] = value
    found: Products = {}
    for module, pair in factors.items():
        parent, _, end = module.rpartition(".")
        queries = f"{parent}.q_proj" in factors
        if end == "q_proj" and f"{parent}.v_proj" not in factors:
            raise RefusedError(f"KeyError of {parent}.v_proj, which q is stacked with")
        if end in ("k_proj", "v_proj") and not queries:
            continue  # stacked with q, or left out
        if pair["A"].shape[0] != config["r"]:
            raise RefusedError("the buffers of all modules have the rank r")
        scale = config["lora_alpha"] / config["r"]
        found[module] = scale * pair["B"].astype(np.float64) @ pair["A"]
    return found


def vllm_experts(folder: Path, *, marked: bool) -> Products:
    """The changes (experts, out, in) that vLLM computes from PEFT's stacks of experts.

    Args:
      folder: of an adapter with both stacks and without patterns.
      marked: whether the model is marked ``is_3d_moe_weight``. The rules for others are in
        `_stack_moe_lora_weights` of lora/model_manager.py, after "Some 3D MoE models".
    """
    config, tensors = _read(folder)
    rank, scale = config["r"], config["lora_alpha"] / config["r"]
    found: Products = {}
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        module = name.removesuffix(".lora_A.weight")
        a, b = tensors[name], tensors[f"{module}.lora_B.weight"]
        experts = len(a) // rank
        rows = a.reshape(experts, rank, -1)
        if marked:
            columns = b.reshape(len(b), rank, experts).transpose(2, 0, 1)
        else:
            columns = np.stack(np.split(b, experts, axis=1))
            if module.endswith(".base_layer"):  # rows of gate and up in turn
                columns = np.concatenate([columns[:, ::2], columns[:, 1::2]], axis=1)
        end = ".gate_up_proj" if module.endswith(".base_layer") else ".down_proj"
        found[module.removesuffix(".base_layer") + end] = scale * columns @ rows
    return found
