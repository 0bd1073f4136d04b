"""Writes, reads and checks PEFT's adapter_config.json, and looks up ranks and scales in it.

https://huggingface.co/docs/peft/developer_guides/checkpoint, with the fields of PEFT 0.21.
"""

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

VERSION = "0.21.2"

TASK_TYPES = (
    "SEQ_CLS",
    "SEQ_2_SEQ_LM",
    "CAUSAL_LM",
    "TOKEN_CLS",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
)

# All fields that PEFT writes, with their defaults.
_DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": VERSION,
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_modules": None,
    "target_parameters": None,
    "task_type": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}

# Fields that may be set: they are read here, or they concern how the adapter was trained and not
# what it computes. If any other field is set, also a future one, W + scale a b may be wrong.
_ALLOWED = frozenset(
    {
        *("peft_type", "peft_version", "task_type", "inference_mode", "runtime_config"),
        *("auto_mapping", "base_model_name_or_path", "revision"),
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("modules_to_save", "fan_in_fan_out", "bias", "megatron_core", "qalora_group_size"),
        *("init_lora_weights", "corda_config", "eva_config", "loftq_config", "lora_ga_config"),
        "velora_config",
    }
)

# The initializations that do not change the base weights.
_PLAIN_INITIALIZATIONS = (True, False, "gaussian", "eva", "orthogonal", "mica")


def make_config(
    ranks: Mapping[str, int],
    scales: Mapping[str, float],
    *,
    use_rslora: bool,
    **fields: Any,
) -> dict[str, Any]:
    """Returns the configuration of an adapter.

    Each module is named in full, because a shorter name could match further modules of the model.
    The most common rank and alpha become the general ones; the patterns contain the others.

    Args:
      ranks: ranks by module names of transformers.
      scales: scales by the same names.
      use_rslora: whether the scale is ``lora_alpha / sqrt(r)``.
      **fields: further fields.

    Example:
      >>> config = make_config({"h.0.up": 4, "h.1.up": 2}, {"h.0.up": 2.0, "h.1.up": 2.0},
      ...                      use_rslora=False)
      >>> config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]
      (4, 8, {'^h\\\\.1\\\\.up': 2}, {'^h\\\\.1\\\\.up': 4})
    """
    alphas = {
        module: _alpha(scales[module], rank, use_rslora=use_rslora)
        for module, rank in ranks.items()
    }
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    # PEFT reads the keys as regexes that may match after any dot. This one matches one module.
    exact = lambda module: "^" + re.escape(module)
    return _DEFAULTS | {
        "target_modules": sorted(ranks),
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {exact(name): r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {exact(name): value for name, value in alphas.items() if value != alpha},
        "use_rslora": use_rslora,
        **fields,
    }


def write_config(path: Path, config: Mapping[str, Any]) -> None:
    """Writes a configuration in PEFT's format."""
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def read_config(path: Path) -> dict[str, Any]:
    """Reads and checks a configuration.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is not JSON or not of LoRA, a field has a wrong type, or a feature is not
        supported.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing. Pass a folder that PEFT's save_pretrained has written"
        )
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}). Save or download it again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(config).__name__}")
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"{path}: peft_type is {config.get('peft_type')!r}; only LORA is supported"
        )
    config = _DEFAULTS | config
    _refuse_unsupported(config, path)
    _check_types(config, path)
    return config


def _refuse_unsupported(config: Mapping[str, Any], path: Path) -> None:
    for field, value in config.items():
        if value and field not in _ALLOWED:
            raise ValueError(
                f"{path}: {field} is set ({value!r}), which is not supported: the adapter may then "
                "not be scale * a @ b. Merge it in PEFT (merge_and_unload) instead"
            )
    if config["bias"] != "none":
        raise ValueError(
            f"{path}: bias is {config['bias']!r}; only 'none' is supported, not trained biases"
        )
    if config["init_lora_weights"] not in _PLAIN_INITIALIZATIONS:
        raise ValueError(
            f"{path}: init_lora_weights is {config['init_lora_weights']!r}, which changed the base "
            "weights. Convert the adapter in PEFT with "
            "save_pretrained(path_initial_model_for_weight_conversion=...)"
        )


def _check_types(config: Mapping[str, Any], path: Path) -> None:
    def check(field: str, valid: bool, required: str) -> None:
        if not valid:
            raise ValueError(f"{path}: {field} must be {required}, got {config[field]!r}")

    check("r", _is_rank(config["r"]), "an integer of at least 1")
    check("lora_alpha", _is_alpha(config["lora_alpha"]), "a finite number other than zero")
    check("use_rslora", isinstance(config["use_rslora"], bool), "true or false")
    for field, is_valid in (("rank_pattern", _is_rank), ("alpha_pattern", _is_alpha)):
        pattern = config[field] or {}
        check(field, isinstance(pattern, dict), "an object")
        check(field, all(map(_is_regex, pattern)), "an object whose keys are regular expressions")
        check(field, all(map(is_valid, pattern.values())), "an object of valid numbers")
    saved = config["modules_to_save"] or []
    names = isinstance(saved, list) and all(isinstance(name, str) for name in saved)
    check("modules_to_save", names, "a list of names, or null")


def rank_of(config: Mapping[str, Any], module: str) -> int:
    """Returns the rank of a module."""
    return _matching(config["rank_pattern"], module, config["r"])


def scale_of(config: Mapping[str, Any], module: str) -> float:
    """Returns the scale of a module."""
    alpha = _matching(config["alpha_pattern"], module, config["lora_alpha"])
    return alpha / _divisor(rank_of(config, module), use_rslora=config["use_rslora"])


def _matching(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Returns the value of the first key, in file order, that matches the end of the name."""
    entries = (pattern or {}).items()
    return next((v for key, v in entries if re.fullmatch(rf"(.*\.)?({key})", module)), default)


def _alpha(scale: float, rank: int, *, use_rslora: bool) -> int | float:
    divisor = _divisor(rank, use_rslora=use_rslora)
    alpha = scale * divisor
    whole = round(alpha)
    # For example 16 / 6 * 6: the user had specified the integer.
    return whole if whole and math.isclose(whole / divisor, scale, rel_tol=1e-12) else alpha


def _divisor(rank: int, *, use_rslora: bool) -> float:
    return math.sqrt(rank) if use_rslora else float(rank)


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_alpha(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < abs(value) <= sys.float_info.max  # False for a NaN


def _is_regex(value: str) -> bool:
    try:
        re.compile(rf"(.*\.)?({value})")
    except re.error:
        return False
    return True


def is_saved_in_full(tensor: str, modules_to_save: Sequence[str]) -> bool:
    """Returns whether a tensor is part of a module in the list.

    Args:
      tensor: the name of the tensor.
      modules_to_save: names of modules, or ends of them.

    Example:
      >>> is_saved_in_full("classifier.dense.weight", ["classifier"])
      True
    """
    keys = tensor.split(".")
    parents = (".".join(keys[:count]) for count in range(1, len(keys)))
    return any(parent.endswith(tuple(modules_to_save)) for parent in parents)
