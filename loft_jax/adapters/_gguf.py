"""Exchanges adapters with llama.cpp, as GGUF files.

llama.cpp adds ``alpha / r * lora_b @ lora_a`` to a weight (out, in), with ``r`` read from the
tensors and one ``alpha`` for the whole file. The names of tensors are those of the package `gguf`.

https://github.com/ggml-org/llama.cpp/blob/master/src/llama-adapter.cpp
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from loft_jax.adapters._cast_modules import cast_modules
from loft_jax.adapters._collect import collect
from loft_jax.adapters._families import as_family
from loft_jax.adapters._family import LAYER, Family
from loft_jax.adapters._folder import replacing_file
from loft_jax.adapters._gguf_base import (
    Base,
    GgufBase,
    import_gguf,
    open_gguf,
    permute,
    read_base,
    read_field,
    unpermute,
)
from loft_jax.adapters._loaded import (
    LoadedAdapter,
    LoraFactors,
    few,
    refuse_experts,
    sorted_by_layer,
)
from loft_jax.adapters._safetensors import check_finite
from loft_jax.adapters._scales import fold_scales, most_common

_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
FACTOR = re.compile(r"(.+)\.weight\.lora_([ab])")


def save_gguf(
    path: str | os.PathLike[str],
    adapter: Any,
    *,
    family: Family | str,
    base: Base,
    pairs: Any = None,
    dtype: str = "float32",
) -> Path:
    """Writes an adapter for llama.cpp (``--lora``) and Ollama (``ADAPTER``).

    Args:
      path: the file, ending in ``.gguf``. It is written to a temporary file and then renamed.
      adapter: a pytree of the factors, of any layout and float dtype.
      family: the names of the modules, as in `save_peft`.
      base: the base model, which determines names and the order of rows: its GGUF file, its folder
        of transformers, or the contents of its config.json. Supported are the model types llama,
        mistral, qwen2, qwen3, gemma, gemma2, gemma3_text and gpt2. With a GGUF file the shapes are
        compared too.
      pairs: names, axes and scale of the factors, as in `save_peft`. Scales that differ are
        multiplied into ``lora_b``; ranks may differ.
      dtype: ``float32``, ``float16``, ``bfloat16`` or ``q8_0``. For 16 bits the factors are cast as
        in `cast_factors`. Q8_0 stores blocks of 32 numbers of
        a row; a factor whose rows are no multiple of 32 becomes float16.

    Returns:
      The file.

    Raises:
      ValueError: llama.cpp has no tensor for a module, a parameter is saved in full, the output
        head is tied to the embedding and either is adapted, or a shape differs from that of the
        base. The message names the module.
      FileNotFoundError: the base is missing.
      ImportError: gguf is not installed.

    Example:
      >>> import tempfile
      >>> layer = {"q_proj": {"lora_a": np.ones((2, 6, 3)), "lora_b": np.ones((2, 3, 8))}}
      >>> adapter = {"layers": {"self_attn": layer}}  # two layers, stacked
      >>> base = {"model_type": "llama", "num_attention_heads": 2, "num_hidden_layers": 2}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     file = save_gguf(f"{folder}/out.gguf", adapter, family="llama", base=base)
      ...     loaded = load_gguf(file, family="llama")
      >>> list(loaded.factors)
      ['model.layers.0.self_attn.q_proj', 'model.layers.1.self_attn.q_proj']
    """
    gguf, family, path = import_gguf(), as_family(family), Path(path)
    if path.suffix != ".gguf":
        raise ValueError(f"{path} must end in .gguf, by which llama.cpp's tools know the format")
    if dtype not in _TYPES:
        raise ValueError(f"unknown dtype {dtype!r}. Use one of {', '.join(_TYPES)}")
    factors, saved = collect(adapter, family, pairs)
    refuse_experts(factors, "llama.cpp")
    if saved:
        raise ValueError(
            f"llama.cpp cannot load parameters saved in full ({few(saved)}). Merge the adapter and "
            "use save_merged, or omit them"
        )
    if dora := [module for module, one in factors.items() if one.magnitude is not None]:
        raise ValueError(
            f"{dora[0]}: llama.cpp has no DoRA (lora_magnitude). Write the weights of "
            "loft_jax.baselines.dora_weight with save_merged"
        )
    model = read_base(base)
    names = {module: _tensor_name(module, model, family) for module in factors}
    # alpha 0 would mean a scale of 1. The most common value leaves most factors as they are.
    alpha = float(np.float32(most_common(one.scale * one.rank for one in factors.values())))
    if not 0 < abs(alpha) < float("inf"):
        raise ValueError(f"alpha, scale times rank, is {alpha} in float32. Rescale the factors")
    for module, one in factors.items():
        _check_shape(module, names[module], one, model)
        factors |= fold_scales({module: one}, alpha / one.rank)
    if dtype in ("float16", "bfloat16"):
        factors, _ = cast_modules(factors, dtype)
    tensors = {}
    for module, one in factors.items():
        heads = model.heads_of(module)
        a, b = one.a.T, one.b.T
        if family.kind(module) == "embedding":
            a = a.T  # llama.cpp reads rows of it by token
        elif heads is not None:
            b = permute(b, heads)
        tensors |= {f"{names[module]}.weight.lora_a": a, f"{names[module]}.weight.lora_b": b}
    check_finite(tensors, "the tensors to save")
    with replacing_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, model.architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        # For load_gguf; llama.cpp does not read them from an adapter.
        writer.add_head_count(model.heads)
        writer.add_head_count_kv(model.kv_heads)
        for name, tensor in tensors.items():
            wide = np.ascontiguousarray(tensor, np.float32)
            kind = gguf.GGMLQuantizationType[_TYPES[dtype]]
            if dtype == "q8_0" and wide.shape[-1] % 32:
                kind = gguf.GGMLQuantizationType.F16
            with np.errstate(over="ignore"):
                stored = gguf.quantize(wide, kind)
            if stored.dtype == np.float16 and not np.isfinite(stored).all():
                raise ValueError(f"{name}: a number is too large for float16. Use bfloat16")
            writer.add_tensor(name, stored, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


def load_gguf(
    path: str | os.PathLike[str], *, family: Family | str, base: Base | None = None
) -> LoadedAdapter:
    """Reads an adapter of llama.cpp, written by `save_gguf` or by convert_lora_to_gguf.py.

    Args:
      path: the file.
      family: the names of the modules, as in `save_peft`.
      base: the base model, as in `save_gguf`. Files of `save_gguf` do not need it.

    Returns:
      A `LoadedAdapter`. Use `load_into` to put it into a tree. The factors are float32 or, if the
      file's are, float16; bfloat16 and Q8_0 become float32.

    Raises:
      FileNotFoundError: the file is missing.
      ValueError: the file is damaged, not a LoRA adapter, of another architecture than the base, or
        has tensors that the family does not have; or the numbers of heads are unknown.
      ImportError: gguf is not installed.

    Example:
      >>> import tempfile
      >>> up = {"lora_a": np.ones((6, 3)), "lora_b": np.ones((3, 4))}
      >>> base = {"model_type": "gpt2", "n_head": 2, "n_layer": 1}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     file = save_gguf(f"{folder}/out.gguf", {"h": {"0": {"mlp": {"c_fc": up}}}},
      ...                      family="gpt2", base=base)
      ...     load_gguf(file, family="gpt2").scale_of("c_fc")
      1.0
    """
    family, path = as_family(family), Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. Pass the GGUF file of an adapter")
    reader = open_gguf(path)
    config = {key: read_field(reader, key) for key in reader.fields if not key.startswith("GGUF.")}
    if (config.get("general.type"), config.get("adapter.type")) != ("adapter", "lora"):
        raise ValueError(f"{path}: not a LoRA adapter but {config.get('general.type')!r}")
    tensors = _read_tensors(reader, path)
    model = _base_of(config, base, path, tensors)
    modules = _modules(model, family)
    factors: dict[str, LoraFactors] = {}
    for name, pair in tensors.items():
        if name not in modules:
            raise ValueError(f"{path}: {name}: the family {family.name!r} has no such module")
        if pair.keys() != {"a", "b"}:
            raise ValueError(f"{path}: {name} lacks lora_a or lora_b. Write or download it again")
        factors[modules[name]] = _read_factors(modules[name], pair, config, model, family, path)
    if not factors:
        raise ValueError(f"{path}: the file contains no lora_a and lora_b")
    return LoadedAdapter(path, config, {m: factors[m] for m in sorted_by_layer(factors)}, {})


def _tensor_name(module: str, model: GgufBase, family: Family) -> str:
    """Returns the name of a module in llama.cpp, without ``.weight``."""
    found = _name_map(model).get_name(module)
    if found is None or (model.shapes is not None and f"{found}.weight" not in model.shapes):
        why = " because it is tied to the embedding" if found == "output" and model.tied else ""
        raise ValueError(
            f"{module}: llama.cpp has no tensor for it in the architecture "
            f"{model.architecture!r}{why}. Leave it out, or merge the adapter and use save_merged"
        )
    if model.tied and (found == "output" or family.kind(module) == "embedding"):
        raise ValueError(
            f"{module}: the output head of this base is tied to the embedding, and llama.cpp would "
            "change only one of the two. Leave it out of the adapter"
        )
    return found


def _name_map(model: GgufBase) -> Any:
    gguf = import_gguf()
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(kinds[model.architecture], model.layers)


def _modules(model: GgufBase, family: Family) -> dict[str, str]:
    """Returns the modules of a family in transformers by their names in llama.cpp."""
    names, found = _name_map(model), {}
    prefix = family.prefix and family.prefix + "."
    for _, template in family.modules:
        for layer in range(model.layers if LAYER in template else 1):
            module = template.replace("{prefix}", prefix).replace(LAYER, str(layer))
            if (name := names.get_name(module)) is not None:
                found.setdefault(name, module)
    return found


def _check_shape(module: str, name: str, one: LoraFactors, model: GgufBase) -> None:
    heads, (fan_in, fan_out) = model.heads_of(module), (one.a.shape[0], one.b.shape[1])
    if heads is not None and fan_out % (2 * heads):
        raise ValueError(
            f"{module}: {fan_out} outputs are not {heads} heads of an even size. Pass the base of "
            "this adapter"
        )
    if model.shapes is None:
        return
    shape = model.shapes[f"{name}.weight"]
    # GGUF stores an embedding as (vocabulary, out), which is (in, out) of its adapter.
    required = (fan_in, fan_out) if name == "token_embd" else (fan_out, fan_in)
    if shape != required:
        raise ValueError(
            f"{module}: the adapter is for a weight (out, in) of {(fan_out, fan_in)}, the base has "
            f"{shape} in {name}.weight. Pass the base of this adapter"
        )


def _read_tensors(reader: Any, path: Path) -> dict[str, dict[str, np.ndarray]]:
    """Returns the factors by the names of llama.cpp."""
    gguf, tensors = import_gguf(), {}
    for tensor in reader.tensors:
        if not (match := FACTOR.fullmatch(tensor.name)):
            raise ValueError(f"{path}: {tensor.name}: neither lora_a nor lora_b of a weight")
        value = tensor.data
        if value.dtype not in (np.float32, np.float16):
            value = gguf.dequantize(value, tensor.tensor_type)
        value = value.reshape([int(size) for size in tensor.shape[::-1]]).copy()
        tensors.setdefault(match[1], {})[match[2]] = value
    flat = {f"{name}.lora_{k}": v for name, pair in tensors.items() for k, v in pair.items()}
    check_finite(flat, str(path))
    return tensors


def _base_of(
    config: Mapping[str, Any], base: Base | None, path: Path, names: Mapping[str, Any]
) -> GgufBase:
    """Returns the base model as far as the file describes it, or as given."""
    architecture = str(config.get("general.architecture"))
    if base is None:
        heads = config.get(f"{architecture}.attention.head_count")
        if heads is None:
            raise ValueError(
                f"{path}: the file does not contain the numbers of heads. Pass base=, the GGUF "
                "file or the config.json of the base model"
            )
        numbers = [int(match[1]) for name in names if (match := re.match(r"blk\.(\d+)\.", name))]
        fields = {
            "model_type": architecture,
            "num_attention_heads": heads,
            "n_head": heads,
            "num_key_value_heads": config.get(f"{architecture}.attention.head_count_kv"),
            "num_hidden_layers": max(numbers, default=0) + 1,
            "n_layer": max(numbers, default=0) + 1,
        }
        base = {**fields, "model_type": {"gemma3": "gemma3_text"}.get(architecture, architecture)}
    model = read_base(base)
    if model.architecture != architecture:
        raise ValueError(
            f"{path}: the adapter is for the architecture {architecture!r}, the base is "
            f"{model.architecture!r}"
        )
    return model


def _read_factors(
    module: str,
    pair: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    model: GgufBase,
    family: Family,
    path: Path,
) -> LoraFactors:
    """Returns the factors of one module in Flax's layout."""
    a, b, heads = pair["a"], pair["b"], model.heads_of(module)
    a = a if family.kind(module) == "embedding" else a.T
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"{path}: {module}: lora_a {pair['a'].shape} and lora_b {b.shape} have different ranks"
        )
    if heads is not None:
        if len(b) % (2 * heads):
            raise ValueError(f"{path}: {module}: {len(b)} outputs are not {heads} heads")
        b = unpermute(b, heads)
    alpha = config.get("adapter.lora.alpha")
    rank = a.shape[1]
    return LoraFactors(a, b.T, float(alpha) / rank if alpha else 1.0)  # as llama.cpp reads 0
