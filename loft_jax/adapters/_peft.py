"""Writes adapters for Hugging Face PEFT, without PyTorch or PEFT.

PEFT stores an adapter as a folder with two files. ``adapter_model.safetensors`` contains ``lora_A``
(r, in) and ``lora_B`` (out, r) of each module, and ``adapter_config.json`` contains the scale.
"""

import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from loft_jax.adapters._base_weights import is_tied
from loft_jax.adapters._cast_modules import cast_modules
from loft_jax.adapters._collect import collect
from loft_jax.adapters._families import as_family
from loft_jax.adapters._family import Family
from loft_jax.adapters._folder import replacing
from loft_jax.adapters._loaded import LoraFactors, few
from loft_jax.adapters._peft_config import TASK_TYPES, make_config, write_config
from loft_jax.adapters._peft_load import CONFIG, PREFIX, WEIGHTS
from loft_jax.adapters._peft_load import load_peft as load_peft
from loft_jax.adapters._peft_parameters import stack_to_peft, stored_names
from loft_jax.adapters._safetensors import write_tensors
from loft_jax.adapters._scales import fold_scales as fold
from loft_jax.adapters._scales import pad_ranks

_HEAD = "lm_head.weight"
_TIED = ("embed_tokens.weight", "wte.weight")  # what the head may be tied to
_TOKENS = "token_adapter.trainable_tokens_delta"

# For these tasks PEFT adds the modules to modules_to_save and then requires their weights.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def save_peft(
    path: str | os.PathLike[str],
    adapter: Any,
    *,
    family: Family | str,
    pairs: Any = None,
    base_model: str | None = None,
    task_type: str | None = None,
    model_class: str | None = None,
    use_rslora: bool = False,
    fold_scales: bool = False,
    trainable_tokens: Sequence[int] | np.ndarray | None = None,
    tied_head: bool | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> Path:
    """Writes an adapter that `PeftModel.from_pretrained(model, path)` of PEFT loads.

    Args:
      path: the folder, which is created if necessary. Both files are written to a temporary folder
        and then renamed, so a failed write leaves the old ones intact.
      adapter: a pytree of the factors, of any layout and float dtype. Other leaves, such as a
        classification head, are saved in full as PEFT's modules_to_save. PEFT requires all
        parameters of such a module. A bias beside its factors is saved as ``bias="lora_only"``, and
        a ``lora_magnitude`` beside ``lora_a`` as DoRA. Factors of experts
        ``(*layers, experts, ...)`` are saved as PEFT's target_parameters.
      family: the names of the model's modules in transformers: ``llama``, ``gpt2``, ``bert``,
        ``vit``, ``dinov2``, or a `Family`.
      pairs: names, axes and scale of the factors, as in the optimizers: a `LoraPairs`, or the
        `LoraRule` with which the model was adapted. The scale is written to the configuration.
        None is a scale of 1, with a warning for adapters that are known to be scaled otherwise.
      base_model: the hub id or folder of the base model, for AutoPeftModel of PEFT.
      task_type: PEFT's task type, such as ``CAUSAL_LM`` or ``SEQ_CLS``, which selects its model
        class.
      model_class: the model's class in transformers, such as ``ViTForImageClassification``, for
        PEFT's AutoPeftModel, which needs it where there is no task_type.
      use_rslora: whether to write the scale as ``lora_alpha / sqrt(r)`` instead of
        ``lora_alpha / r``.
      fold_scales: whether to multiply the scales into ``lora_B`` and pad all adapters with zeros to
        one rank. Then ``lora_alpha`` equals ``r`` and there are no patterns: every server computes
        the same, also those that ignore ``lora_alpha``, patterns or rsLoRA.
      trainable_tokens: ids of the tokens whose rows of the embeddings in `adapter` were trained.
        Only these rows are saved (PEFT's trainable_token_indices), and a tied head follows them.
        With None, embeddings are saved in full.
      tied_head: whether ``lm_head`` of the base is tied to an embedding in `adapter`. Then PEFT is
        told to keep them tied (ensure_weight_tying), which it does not by itself. None reads it
        from the configuration if `base_model` is a folder, and means no otherwise.
      dtype: float32, float16 or bfloat16, to cast the factors with `cast_factors`; None keeps their
        dtypes. The entry ``largest_product_error`` in the metadata of the weights file states the
        largest relative error of a product. Other leaves are not cast.

    Returns:
      The folder.

    Raises:
      ValueError: the family has no such module, the stacked axes are unclear, a module is both
        adapted and saved in full, the head that the task needs is missing, `trainable_tokens` are
        not rows of an embedding in `adapter`, an embedding is adapted to which the head is tied, a
        value is NaN or infinite, or a product is too large for float16. The message names the path
        or the module.
      TypeError: another ``dtype``.
      ImportError: safetensors is not installed.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> from loft_jax import LoraPairs
      >>> layer = {"q_proj": {"lora_a": jnp.ones((2, 6, 3)), "lora_b": jnp.ones((2, 3, 4))}}
      >>> adapter = {"layers": {"self_attn": layer}}  # two layers, stacked
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _ = save_peft(folder, adapter, family="llama", pairs=LoraPairs(scale=2.0))
      ...     peft = load_peft(folder)
      >>> list(peft.factors)
      ['model.layers.0.self_attn.q_proj', 'model.layers.1.self_attn.q_proj']
      >>> peft.config["r"], peft.config["lora_alpha"], peft.scale_of("q_proj")
      (3, 6, 2.0)
    """
    family = as_family(family)
    if fold_scales and use_rslora:
        raise ValueError("fold_scales writes a scale of 1, so use_rslora has no effect. Omit one")
    if task_type is not None and task_type not in TASK_TYPES:
        raise ValueError(
            f"unknown task_type {task_type!r}. Use one of {', '.join(TASK_TYPES)}, or None"
        )
    factors, saved = collect(adapter, family, pairs)
    if fold_scales:
        factors = fold(factors)
    factors, metadata = cast_modules(factors, dtype)
    if fold_scales:
        factors = pad_ranks(factors)
    tensors: dict[str, np.ndarray] = {}
    kinds = {module: family.kind(module) for module in factors}
    stored = stored_names(module for module, kind in kinds.items() if kind == "experts")
    for module, one in factors.items():
        tensors |= _tensors(stored.get(module, module), one, kinds[module])
    rows = _token_rows(saved, family, trainable_tokens)
    tensors |= {f"{PREFIX}{module}.{_TOKENS}": value for module, value in rows.items()}
    tied = _tied_embedding(saved, factors, tied_head, base_model)
    if tied is not None:
        tensors[f"{PREFIX}{_HEAD}"] = saved[tied]
    biases = {f"{module}.bias" for module in factors} & saved.keys()
    for name, value in saved.items():
        inside = ".base_layer" if name in biases else ""
        module, _, parameter = name.rpartition(".")
        tensors[f"{PREFIX}{module}{inside}.{parameter}"] = value
    heads = {name.rpartition(".")[0] for name in saved if name not in biases}
    _check_saved(heads, factors, task_type)
    # PEFT adapts a parameter by its own name, also in the keys of patterns.
    names = {module: f"{module}.weight" for module, kind in kinds.items() if kind == "parameter"}
    parameters = sorted([*names.values(), *stored])
    config = make_config(
        {names.get(module, module): one.rank for module, one in factors.items()},
        {names.get(module, module): one.scale for module, one in factors.items()},
        use_rslora=use_rslora,
        target_modules=sorted(factors.keys() - names.keys() - stored.keys()),
        target_parameters=parameters or None,
        trainable_token_indices={k: np.asarray(trainable_tokens).tolist() for k in rows} or None,
        modules_to_save=sorted(_outermost(heads)) or None,
        ensure_weight_tying=tied is not None,
        fan_in_fan_out="conv1d" in kinds.values(),
        bias="lora_only" if biases else "none",
        use_dora=_has_magnitudes(factors, parameters),
        base_model_name_or_path=base_model,
        task_type=task_type,
        auto_mapping=model_class
        and {"base_model_class": model_class, "parent_library": "transformers"},
    )
    with replacing(Path(path)) as temporary:
        write_tensors(temporary / WEIGHTS, tensors, metadata)
        write_config(temporary / CONFIG, config)
    return Path(path)


def _tensors(module: str, one: LoraFactors, kind: str) -> dict[str, np.ndarray]:
    """Returns the tensors of one adapter in PEFT's layout."""
    key = PREFIX + module
    dora = {}
    if one.magnitude is not None:
        magnitude = one.magnitude[None, :, None, None] if kind == "conv2d" else one.magnitude
        dora = {f"{key}.lora_magnitude_vector": magnitude}
    if kind == "embedding":  # lora_A (r, vocabulary), lora_B (out, r)
        return {f"{key}.lora_embedding_A": one.a.T, f"{key}.lora_embedding_B": one.b.T} | dora
    if kind == "experts":
        a, b = stack_to_peft(one)
        return {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    a, b = one.a.T, one.b.T
    if kind == "conv2d":  # (r, in, height, width), (out, r, 1, 1)
        a, b = one.a.transpose(3, 2, 0, 1), b[..., None, None]
    return {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b} | dora


def _token_rows(
    saved: dict[str, np.ndarray], family: Family, tokens: Sequence[int] | np.ndarray | None
) -> dict[str, np.ndarray]:
    """Takes the embedding out of `saved`, and returns its trained rows by module."""
    if tokens is None:
        return {}
    ids = np.asarray(tokens)
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or not 0 < ids.size == len(np.unique(ids)):
        raise ValueError(f"trainable_tokens must be different token ids, got {tokens!r}")
    modules = {name: name.removesuffix(".weight") for name in saved}
    embeddings = [name for name, module in modules.items() if family.kind(module) == "embedding"]
    if len(embeddings) != 1:
        raise ValueError(
            "trainable_tokens needs one embedding in the adapter, got "
            f"{few(embeddings) or 'none'}. Give the trained embedding of tokens, such as "
            "embed_tokens/embedding, and no other"
        )
    (name,) = embeddings
    value = saved.pop(name)
    if ids.min() < 0 or ids.max() >= len(value):
        raise ValueError(f"trainable_tokens has ids that are no rows of {name} {value.shape}")
    return {modules[name]: value[ids]}


def _tied_embedding(
    saved: Mapping[str, np.ndarray],
    factors: Mapping[str, LoraFactors],
    tied: bool | None,
    base_model: str | None,
) -> str | None:
    """Returns the name of a trained embedding that the head is tied to."""
    if _HEAD in saved or _HEAD.removesuffix(".weight") in factors:
        return None
    if tied is None:
        config = Path(base_model or "") / "config.json"
        tied = (
            base_model is not None and config.is_file() and is_tied(json.loads(config.read_bytes()))
        )
    names = [name for name in saved if name.endswith(_TIED)] if tied else []
    adapted = [module for module in factors if f"{module}.weight".endswith(_TIED)]
    if tied and adapted:
        raise ValueError(
            f"{adapted[0]} is adapted, and the head of this base is tied to it, which PEFT would "
            "leave as it is. Merge the adapter and use save_merged, or leave it out"
        )
    return names[0] if names else None


def _has_magnitudes(factors: Mapping[str, LoraFactors], parameters: Sequence[str]) -> bool:
    """Returns whether the adapters are DoRA, which PEFT has for all modules or for none."""
    without = [module for module, one in factors.items() if one.magnitude is None]
    if 0 < len(without) < len(factors):
        raise ValueError(
            f"{without[0]} has no lora_magnitude (DoRA) and others have one, while PEFT has one "
            "kind for all. Write two adapters, or train all with DoRA"
        )
    if not without and parameters:
        raise ValueError(
            f"PEFT has no DoRA for parameters ({few(parameters)}). Leave them out of the adapter, "
            "or merge it into the weights"
        )
    return not without


def _outermost(modules: Iterable[str]) -> set[str]:
    """Returns the modules that are not inside another one, the only ones that PEFT may wrap."""
    modules = set(modules)
    parents = lambda name: itertools.accumulate(name.split(".")[:-1], "{}.{}".format)
    return {name for name in modules if not modules.intersection(parents(name))}


def _check_saved(saved: Iterable[str], adapted: Iterable[str], task_type: str | None) -> None:
    """Refuses an adapter that PEFT could not load."""
    for module, target in itertools.product(saved, adapted):
        # PEFT does not adapt modules in modules_to_save, nor their submodules.
        if f".{module}." in f".{target}.":
            raise ValueError(
                f"{module} is saved in full and {target} is adapted, which PEFT cannot load. If "
                "this is the frozen base, save the adapter alone (loft_jax.adapters.split, or "
                "nnx.state(model, nnx.LoRAParam)). If it is trained, merge the adapter and use "
                "save_merged"
            )
    heads = _HEADS.get(task_type or "", ())
    if heads and not any(module.endswith(heads) for module in saved):
        raise ValueError(
            f"with task_type {task_type} PEFT requires the trained head ({' or '.join(heads)}) in "
            "the file. Add its parameters to the adapter, or omit task_type"
        )
