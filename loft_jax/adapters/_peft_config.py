"""Writes, reads and checks PEFT's adapter_config.json, and looks up ranks and scales in it.

https://huggingface.co/docs/peft/developer_guides/checkpoint, with the fields of PEFT 0.21.
"""

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Collection, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from loft_jax.adapters._patterns import is_regex, lookup
from loft_jax.adapters._peft_relative import check_token_indices

VERSION = "0.21.2"
MAX_BYTES = 16 * 2**20

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
        *("auto_mapping", "base_model_name_or_path", "revision", "ensure_weight_tying"),
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("modules_to_save", "fan_in_fan_out", "bias", "megatron_core", "qalora_group_size"),
        *("init_lora_weights", "corda_config", "eva_config", "loftq_config", "lora_ga_config"),
        *("velora_config", "use_dora", "target_parameters"),
        *("lora_bias", "trainable_token_indices"),
    }
)

_MERGE = "Merge it in PEFT (merge_and_unload) and read the merged model instead"
# What to do about a field. Only what PEFT does correctly is advised.
_REMEDIES = {
    "layer_replication": (
        "It cannot be converted: replicated layers share their weights, so merging is wrong too. "
        "Serve it with PEFT"
    ),
    "alora_invocation_tokens": (
        "It cannot be converted or merged: it acts on a part of each sequence. Serve it with PEFT"
    ),
}

# The initializations that do not change the base weights. PEFT ignores the case of some names.
_PLAIN_INITIALIZATIONS = (True, False, "gaussian", "eva", "orthogonal", "mica")
# These subtract from the base what they put into the factors, and the base determines it.
FROM_BASE = ("pissa", "olora")
_CONVERT = (
    "Convert the adapter in PEFT: save the initial adapter with save_pretrained(initial) before "
    "the training, and the trained one with save_pretrained(trained, "
    "path_initial_model_for_weight_conversion=initial)"
)


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
      (4, 8, {'h.1.up': 2}, {'h.1.up': 4})
    """
    alphas = {
        module: _alpha(scales[module], rank, use_rslora=use_rslora)
        for module, rank in ranks.items()
    }
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return _DEFAULTS | {
        "target_modules": sorted(ranks),
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": _pattern(ranks, rank),
        "alpha_pattern": _pattern(alphas, alpha),
        "use_rslora": use_rslora,
        **fields,
    }


def _pattern(values: Mapping[str, Any], general: Any) -> dict[str, Any]:
    """Returns the values other than the general one, by keys that match one module each."""
    others = {module: value for module, value in values.items() if value != general}
    ends = Counter(
        end for module in values for end in accumulate(module.split(".")[::-1], _prepend)
    )
    # PEFT matches a key with the end of a name, as a regex. It ignores keys with ^ up to 0.14, so
    # the plain name is better wherever no other name ends with it.
    key = lambda module: module if ends[module] == 1 else "^" + re.escape(module)
    return {key(module): value for module, value in others.items()}


def _prepend(end: str, key: str) -> str:
    return f"{key}.{end}"


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
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: more than {MAX_BYTES} bytes, which is no configuration")
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
    config = with_defaults(config)
    _refuse_unsupported(config, path)
    _check_types(config, path)
    return config


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a configuration with PEFT's defaults for missing fields.

    Example:
      >>> with_defaults({"r": 4})["lora_alpha"]
      8
    """
    return {**_DEFAULTS, **config}


def _refuse_unsupported(config: Mapping[str, Any], path: Path) -> None:
    for field, value in config.items():
        if value and field not in _ALLOWED:
            remedy = _REMEDIES.get(field, "Serve it with PEFT")
            raise ValueError(
                f"{path}: {field} is set ({value!r}), which is not supported: the adapter may then "
                f"not be scale * a @ b. {remedy}"
            )
    if config["bias"] not in ("none", "lora_only"):
        raise ValueError(
            f"{path}: bias is {config['bias']!r}; only 'none' and 'lora_only' are supported, not "
            f"trained biases of other layers. {_MERGE}"
        )
    kind = initialization(config)
    if kind in _PLAIN_INITIALIZATIONS or kind in FROM_BASE:
        return
    why = f"{path}: init_lora_weights is {config['init_lora_weights']!r}, which changed the base"
    if kind == "loftq":  # PEFT's conversion ignores the quantization
        raise ValueError(
            f"{why} weights to quantized ones that are not in the file. Converting it in PEFT "
            "would give wrong weights without a message. Merge it (merge_and_unload) in the "
            "process that trained it, or train again without loftq"
        )
    raise ValueError(f"{why} weights. {_CONVERT}")


def initialization(config: Mapping[str, Any]) -> Any:
    """Returns the initialization, a name in lower case or a boolean.

    Example:
      >>> initialization({"init_lora_weights": "MiCA"})
      'mica'
    """
    kind = config["init_lora_weights"]
    return kind.lower() if isinstance(kind, str) else kind


def _check_types(config: Mapping[str, Any], path: Path) -> None:
    def check(field: str, valid: bool, required: str) -> None:
        if not valid:
            raise ValueError(f"{path}: {field} must be {required}, got {config[field]!r}")

    check("r", _is_rank(config["r"]), "an integer of at least 1")
    check("lora_alpha", _is_alpha(config["lora_alpha"]), "a finite number other than zero")
    check("use_rslora", isinstance(config["use_rslora"], bool), "true or false")
    for field, is_valid in (("rank_pattern", _is_rank), ("alpha_pattern", _is_alpha)):
        pattern = {} if config[field] is None else config[field]
        check(field, isinstance(pattern, dict), "an object")
        check(field, all(map(is_regex, pattern)), "an object whose keys are regular expressions")
        check(field, all(map(is_valid, pattern.values())), "an object of valid numbers")
    for field in ("modules_to_save", "target_parameters"):
        value = [] if config[field] is None else config[field]
        names = isinstance(value, list) and all(isinstance(name, str) for name in value)
        check(field, names, "a list of names, or null")
    check("lora_bias", isinstance(config["lora_bias"], bool | None), "true or false")
    if config["trainable_token_indices"] is not None:
        check_token_indices(config["trainable_token_indices"], path)


def rank_of(config: Mapping[str, Any], module: str) -> int:
    """Returns the rank of a module."""
    return lookup(config["rank_pattern"], module, config["r"])


def scale_of(config: Mapping[str, Any], module: str) -> float:
    """Returns the scale of a module."""
    alpha = lookup(config["alpha_pattern"], module, config["lora_alpha"])
    return alpha / _divisor(rank_of(config, module), use_rslora=config["use_rslora"])


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


def is_saved_in_full(tensor: str, modules_to_save: Collection[str]) -> bool:
    """Returns whether a tensor is part of a module in the list.

    Args:
      tensor: the name of the tensor.
      modules_to_save: a set of names of modules, or ends of them.

    Example:
      >>> is_saved_in_full("classifier.dense.weight", {"classifier"})
      True
    """
    parents = accumulate(tensor.split(".")[:-1], "{}.{}".format)
    return any(
        parent[start:] in modules_to_save for parent in parents for start in range(len(parent))
    )
