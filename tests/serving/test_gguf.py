"""Adapters for llama.cpp: compared with the real program, round trips, and refusals."""

import os
import stat
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from serving import tiny_models
from serving.adapters import log_probs, merged, random_adapter
from serving.programs import llama_cpp_log_probs, require

from examples.common.models.llama import LlamaConfig
from examples.common.models.llama_weights import build_model
from loft_jax import LoraAxes, LoraPairs
from loft_jax.adapters import (
    LoraRule,
    _gguf,
    add_lora,
    load_gguf,
    load_into,
    load_peft,
    save_gguf,
    save_peft,
)

gguf = pytest.importorskip("gguf")

IDS = np.array([3, 9, 27, 5, 40, 11])
FAMILY = {"gpt2": "gpt2"}  # all others have LLaMA's names
# llama.cpp looks GELU up in a table of float16.
TOLERANCE = {"gpt2": 5e-3, "gemma": 5e-3}

others_warn = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Returns the tiny model of a name and its GGUF file."""
    for name in ("torch", "transformers", "xllamacpp"):
        require(name)
    made = {}

    def get(name: str, **changes: Any) -> tuple[tiny_models.TinyModel, Path]:
        key = (name, *changes.items())
        if key not in made:
            path = tmp_path_factory.mktemp(name) / "base.gguf"
            made[key] = tiny_models.make_model(name, **changes), path
            tiny_models.save_gguf_model(*made[key])
        return made[key]

    return get


@others_warn
@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_llama_cpp_computes_our_adapter(model, close, tmp_path, name, same):
    """Ranks and scales that differ are folded into the one alpha of the file."""
    base, file = model(name)
    adapter, pairs = random_adapter(base, same=same)
    path = tmp_path / "adapter.gguf"
    save_gguf(path, adapter, family=FAMILY.get(name, "llama"), base=file, pairs=pairs)
    expected = log_probs(merged(base, adapter, pairs), IDS)[-1]
    assert np.abs(expected - log_probs(base, IDS)[-1]).max() > 0.3  # the adapter does something
    got = llama_cpp_log_probs(file, IDS, path)
    close(f"llama.cpp with our adapter of {name}", got, expected, TOLERANCE.get(name, 1e-4))


@others_warn
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
def test_llama_cpp_equals_our_model(model, close, tmp_path, name):
    base, file = model(name)
    config = base.torch.config.to_dict()
    ours = build_model(LlamaConfig.from_hf(config), base.tensors)
    rule = LoraRule(path="layers/.*_proj", rank=3, alpha=7, batch=(0,))
    ours = add_lora(ours, rule, rngs=nnx.Rngs(0))
    draw = np.random.default_rng(0)
    random = lambda x: jnp.asarray(0.3 * draw.normal(size=x.shape), x.dtype)
    adapter = jax.tree.map(random, nnx.state(ours, nnx.LoRAParam))
    nnx.update(ours, adapter)
    path = save_gguf(tmp_path / "a.gguf", adapter, family="llama", base=config, pairs=rule)
    expected = jax.nn.log_softmax(ours(jnp.asarray(IDS[None]))[0, -1])
    got = llama_cpp_log_probs(file, IDS, path)
    close(f"llama.cpp with our adapter against our model of {name}", got, expected, 1e-4)


@others_warn
def test_without_the_permutation_the_comparison_fails(model, tmp_path, monkeypatch):
    base, file = model("llama")
    adapter, pairs = random_adapter(base)
    expected = log_probs(merged(base, adapter, pairs), IDS)[-1]
    monkeypatch.setattr(_gguf, "permute", lambda rows, heads: rows)
    path = save_gguf(tmp_path / "a.gguf", adapter, family="llama", base=file, pairs=pairs)
    assert np.abs(llama_cpp_log_probs(file, IDS, path) - expected).max() > 0.02


@others_warn
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float16", 5e-3), ("bfloat16", 5e-2), ("q8_0", 5e-2)]
)
def test_llama_cpp_reads_every_dtype(model, close, tmp_path, dtype, tolerance):
    base, file = model("llama")
    adapter, pairs = random_adapter(base)
    path = tmp_path / "a.gguf"
    save_gguf(path, adapter, family="llama", base=file, pairs=pairs, dtype=dtype)
    expected = log_probs(merged(base, adapter, pairs), IDS)[-1]
    got = llama_cpp_log_probs(file, IDS, path)
    close(f"llama.cpp with our adapter in {dtype}", got, expected, tolerance)
    types = {tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    expected_types = {"float16": {"F16"}, "bfloat16": {"BF16"}, "q8_0": {"Q8_0", "F16"}}
    assert types == expected_types[dtype]


@others_warn
def test_llama_cpp_computes_an_adapter_of_the_embedding_and_the_head(model, close, tmp_path):
    base, file = model("llama")
    adapter, pairs = random_adapter(base)
    draw = np.random.default_rng(5)
    pair = lambda m, n: {
        "lora_a": draw.normal(size=(m, 2)).astype(np.float32) / 3,
        "lora_b": draw.normal(size=(2, n)).astype(np.float32) / 3,
    }
    adapter["model"]["embed_tokens"], adapter["lm_head"] = pair(64, 32), pair(32, 64)
    pairs = LoraPairs(scale=(*pairs.scale, ("model/embed_tokens/lora_a", 0.5), (".*", 1.0)))
    path = tmp_path / "a.gguf"
    save_gguf(path, adapter, family="llama", base=file, pairs=pairs)
    import torch

    expected = merged(base, adapter, LoraPairs(scale=pairs.scale[:-2]))
    with torch.no_grad():
        for module, scale in (("model.embed_tokens", 0.5), ("lm_head", 1.0)):
            place = adapter["lm_head"] if module == "lm_head" else adapter["model"]["embed_tokens"]
            product = torch.tensor(scale * place["lora_a"] @ place["lora_b"])
            weight = expected.torch.get_submodule(module).weight
            weight += product.T if module == "lm_head" else product
    got = llama_cpp_log_probs(file, IDS, path)
    close("llama.cpp with adapters of embedding and head", got, log_probs(expected, IDS)[-1], 1e-4)
    loaded = load_gguf(path, family="llama")
    again = load_into(adapter, loaded, family="llama")
    np.testing.assert_array_equal(
        again["model"]["embed_tokens"]["lora_a"], adapter["model"]["embed_tokens"]["lora_a"]
    )


@others_warn
def test_a_file_converted_by_way_of_peft_is_the_same(model, tmp_path):
    """save_peft with fold_scales has the product of the GGUF file for every module."""
    base, file = model("llama")
    adapter, pairs = random_adapter(base)
    save_peft(tmp_path / "peft", adapter, family="llama", pairs=pairs, fold_scales=True)
    save_gguf(tmp_path / "a.gguf", adapter, family="llama", base=file, pairs=pairs)
    ours = load_gguf(tmp_path / "a.gguf", family="llama").factors
    for module, (a, b, scale, _) in load_peft(tmp_path / "peft").factors.items():
        one = ours[module]
        np.testing.assert_allclose(scale * a @ b, one.scale * one.a @ one.b, atol=1e-6)


# ------------------------------------------------------------------ without llama.cpp

LLAMA = {
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "tie_word_embeddings": True,
}
GPT2 = {"model_type": "gpt2", "n_head": 4, "n_layer": 2}


def factors(fan_in: int, fan_out: int, rank: int, *stack: int, seed: int = 0) -> dict:
    draw = np.random.default_rng(seed)
    return {
        "lora_a": draw.normal(size=(*stack, fan_in, rank)).astype(np.float32),
        "lora_b": draw.normal(size=(*stack, rank, fan_out)).astype(np.float32),
    }


def llama_adapter(*stack: int) -> dict:
    sizes = {"q_proj": (16, 16), "k_proj": (16, 8), "v_proj": (16, 8), "o_proj": (16, 16)}
    attention = {name: factors(*size, 4, *stack) for name, size in sizes.items()}
    return {"self_attn": attention, "mlp": {"up_proj": factors(16, 24, 4, *stack)}}


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_the_round_trip_is_exact(tmp_path, name):
    base = GPT2 if name == "gpt2" else LLAMA | {"model_type": name}
    stacked = {"layers": llama_adapter(2)}
    if name == "gpt2":
        stacked = {
            "h": {"attn": {"c_attn": factors(16, 48, 4, 2), "c_proj": factors(16, 16, 4, 2)}}
        }
    pairs = LoraPairs(scale=1.75, axes=LoraAxes(batch=(0,)))
    family = FAMILY.get(name, "llama")
    path = save_gguf(tmp_path / "a.gguf", stacked, family=family, base=base, pairs=pairs)
    for given in (None, base):
        loaded = load_gguf(path, family=family, base=given)
        again = load_into(stacked, loaded, family=family, pairs=pairs)
        for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(stacked), strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)
    assert loaded.config["adapter.lora.alpha"] == 7.0


def test_only_q_and_k_of_llama_are_permuted(tmp_path):
    for kind in ("llama", "mistral", "qwen2", "qwen3", "gemma"):
        path = tmp_path / f"{kind}.gguf"
        adapter = {"layers": {"0": llama_adapter()}}
        save_gguf(path, adapter, family="llama", base=LLAMA | {"model_type": kind})
        tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
        for name, heads in (("q", 4), ("k", 2), ("v", 0)):
            b = adapter["layers"]["0"]["self_attn"][f"{name}_proj"]["lora_b"].T
            if heads and kind in ("llama", "mistral"):
                b = tiny_models.interleaved(b, heads)
            np.testing.assert_array_equal(tensors[f"blk.0.attn_{name}.weight.lora_b"], b)


def test_a_scale_is_never_written_as_alpha_zero(tmp_path):
    """llama.cpp reads alpha 0 as a scale of 1."""
    adapter = {"layers": {"0": llama_adapter()}}
    scales = LoraPairs(scale=(("layers/0/mlp/.*", 0.125), (".*", 1.0)))
    path = save_gguf(tmp_path / "a.gguf", adapter, family="llama", base=LLAMA, pairs=scales)
    loaded = load_gguf(path, family="llama")
    assert loaded.config["adapter.lora.alpha"] == 4.0
    up = loaded.factors["model.layers.0.mlp.up_proj"]
    np.testing.assert_array_equal(up.b, adapter["layers"]["0"]["mlp"]["up_proj"]["lora_b"] / 8)
    assert up.scale == 1.0
    with pytest.raises(ValueError, match="is 0.0 in float32"):
        save_gguf(path, adapter, family="llama", base=LLAMA, pairs=LoraPairs(scale=1e-60))


def test_the_file_is_replaced_at_once_with_the_mode_of_the_umask(tmp_path):
    path = tmp_path / "new" / "a.gguf"
    adapter = {"layers": {"0": llama_adapter()}}
    save_gguf(path, adapter, family="llama", base=LLAMA)
    before = path.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~_umask()
    adapter["layers"]["0"]["mlp"]["up_proj"]["lora_a"][0, 0] = np.nan
    with pytest.raises(ValueError, match="blk.0.ffn_up.weight.lora_a contains a NaN"):
        save_gguf(path, adapter, family="llama", base=LLAMA)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_what_float16_cannot_hold_is_refused(tmp_path):
    adapter = {"layers": {"0": llama_adapter()}}
    adapter["layers"]["0"]["mlp"]["up_proj"]["lora_b"][0, 0] = 1e12
    # Rows of 4 numbers are stored in float16, also by Q8_0.
    for dtype, message in (("float16", "up_proj: the product"), ("q8_0", "ffn_up.*a number is")):
        with pytest.raises(ValueError, match=f"{message}.* too large"):
            save_gguf(tmp_path / "a.gguf", adapter, family="llama", base=LLAMA, dtype=dtype)
    save_gguf(tmp_path / "a.gguf", adapter, family="llama", base=LLAMA, dtype="bfloat16")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


NORM = {"norm": {"scale": np.ones(16, np.float32)}}


@pytest.mark.parametrize(
    ("adapter", "options", "message"),
    [
        ({"embed_tokens": factors(64, 16, 2)}, {}, "embed_tokens: the output head of this base"),
        ({"lm_head": factors(16, 64, 2)}, {}, "lm_head: the output head of this base is tied"),
        ({"score": factors(16, 3, 2)}, {}, "score: llama.cpp has no tensor for it.*save_merged"),
        (NORM, {}, r"saved in full \(model.norm.weight\).*save_merged"),
        ({}, {"dtype": "float64"}, "unknown dtype 'float64'. Use one of float32"),
        ({}, {"base": LLAMA | {"model_type": "opt"}}, "model_type 'opt' is not supported for GGUF"),
        ({}, {"base": {"model_type": "llama"}}, "base: num_attention_heads is missing"),
        ({}, {"base": LLAMA | {"num_attention_heads": 5}}, "16 outputs are not 5 heads"),
        ({}, {"path": "a.bin"}, "must end in .gguf"),
    ],
)
def test_what_llama_cpp_cannot_load_is_refused_by_name(tmp_path, adapter, options, message):
    adapter = adapter | {"layers": {"0": llama_adapter()}}
    path = tmp_path / options.pop("path", "a.gguf")
    with pytest.raises(ValueError, match=message):
        save_gguf(path, adapter, **({"family": "llama", "base": LLAMA} | options))
    assert not any(tmp_path.iterdir())


@others_warn
def test_the_base_file_is_compared(model, tmp_path):
    _, file = model("llama")
    adapter = {"layers": {"0": llama_adapter()}}
    with pytest.raises(ValueError, match=r"up_proj: .*\(out, in\) of \(24, 16\).*has \(64, 32\)"):
        save_gguf(tmp_path / "a.gguf", adapter, family="llama", base=file)


def write(path: Path, tensors: dict[str, np.ndarray], **fields: Any) -> Path:
    """A GGUF file of an adapter as convert_lora_to_gguf.py writes it: without heads."""
    fields = {"general.type": "adapter", "adapter.type": "lora", **fields}
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in fields.items():
        (writer.add_float32 if isinstance(value, float) else writer.add_string)(key, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


A, B = np.ones((2, 16), np.float32), np.ones((16, 2), np.float32)
Q = "blk.0.attn_q.weight.lora_"


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        ({Q + "a": A, Q + "b": B}, {"base": None}, "does not contain the numbers of heads"),
        ({Q + "a": A}, {}, "blk.0.attn_q lacks lora_a or lora_b"),
        ({Q + "a": A, Q + "b": np.ones((16, 3), np.float32)}, {}, "have different ranks"),
        ({"blk.0.attn_q.weight": A}, {}, "blk.0.attn_q.weight: neither lora_a nor lora_b"),
        ({"blk.0.what.weight.lora_a": A}, {}, "blk.0.what: the family 'llama' has no such"),
        ({Q + "a": A, Q + "b": B}, {"base": GPT2}, "architecture 'llama', the base is 'gpt2'"),
        ({Q + "a": A * np.inf, Q + "b": B}, {}, "contains a NaN"),
        ({}, {}, "contains no lora_a and lora_b"),
        ({Q + "a": A, Q + "b": B}, {"fields": {"general.type": "model"}}, "but 'model'"),
    ],
)
def test_files_that_do_not_fit_are_refused_by_name(tmp_path, tensors, options, message):
    path = write(tmp_path / "a.gguf", tensors, **options.get("fields", {}))
    with pytest.raises(ValueError, match=message) as caught:
        load_gguf(path, family="llama", base=options.get("base", LLAMA))
    assert str(path) in str(caught.value)


def test_files_of_other_programs_are_read_as_llama_cpp_reads_them(tmp_path):
    path = write(tmp_path / "a.gguf", {Q + "a": A, Q + "b": B}, **{"adapter.lora.alpha": 6.0})
    assert load_gguf(path, family="llama", base=LLAMA).scale_of("q_proj") == 3.0
    path = write(path, {Q + "a": A, Q + "b": B}, **{"adapter.lora.alpha": 0.0})
    assert load_gguf(path, family="llama", base=LLAMA).scale_of("q_proj") == 1.0
    for damaged in (b"GGUF", path.read_bytes()[:100], b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="a.gguf: not a complete GGUF file"):
            load_gguf(path, family="llama", base=LLAMA)
    with pytest.raises(FileNotFoundError, match="is missing"):
        load_gguf(tmp_path / "none.gguf", family="llama")
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        save_gguf(path, {"layers": {"0": llama_adapter()}}, family="llama", base=tmp_path)


def test_a_missing_gguf_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r'pip install "loft_jax\[gguf\]"'):
        save_gguf(tmp_path / "a.gguf", {}, family="llama", base=LLAMA)
