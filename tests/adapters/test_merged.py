"""Merged models as folders: shards, dtypes, the base's files, and PEFT's own merge."""

import copy
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from adapters.test_peft import (
    as_flax,
    inputs,
    logits_of,
    others_warn,
    torch_model,
)
from safetensors.numpy import load_file

from loft_jax import LoraPairs
from loft_jax.adapters import _merged as merged_module
from loft_jax.adapters import load_peft, merge, save_merged

INDEX = "model.safetensors.index.json"


def weights(dtype: Any = np.float32) -> dict:
    draw = np.random.default_rng(0)
    kernel = lambda *shape: draw.normal(size=shape).astype(dtype)
    return {
        "embed_tokens": {"embedding": kernel(12, 8)},
        "layers": {"mlp": {"up_proj": {"kernel": kernel(3, 8, 16)}}},
        "lm_head": {"kernel": kernel(8, 12)},
    }


def base_folder(folder: Path, **config: Any) -> Path:
    folder.mkdir()
    fields = {"model_type": "llama", "torch_dtype": "float16", "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(fields | config))
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja", "LICENSE"):
        (folder / name).write_text(name)
    for name in ("README.md", "model-00001-of-00002.safetensors", INDEX, "adapter_config.json"):
        (folder / name).write_text("not copied")
    return folder


def test_the_weights_are_divided_into_shards_with_an_index(tmp_path):
    save_merged(tmp_path / "one", weights(), family="llama")
    assert [file.name for file in (tmp_path / "one").iterdir()] == ["model.safetensors"]
    save_merged(tmp_path / "many", weights(), family="llama", max_shard_bytes=1024)
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert index["weight_map"].keys() == whole.keys()
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-0000{k}-of-00003.safetensors" for k in (1, 2, 3)]
    for name, file in index["weight_map"].items():
        assert (tmp_path / "many" / file).stat().st_size < 1024 + 400
        np.testing.assert_array_equal(load_file(tmp_path / "many" / file)[name], whole[name])
    # A tensor above the limit has a file of its own.
    save_merged(tmp_path / "many", weights(), family="llama", max_shard_bytes=1)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) == len(whole)


def test_weights_of_a_former_save_are_removed(tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    for limit in (1024, 10**9, 1024):
        save_merged(tmp_path, weights(), family="llama", max_shard_bytes=limit)
        names = {file.name for file in tmp_path.iterdir()} - {"mine.txt"}
        assert names == (
            {"model.safetensors"}
            if limit > 1024
            else {INDEX, *(f"model-0000{k}-of-00003.safetensors" for k in (1, 2, 3))}
        )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_dtype_is_that_of_weights_and_configuration(tmp_path, dtype):
    base = base_folder(tmp_path / "base")
    save_merged(tmp_path / "out", weights(), family="llama", base=base, dtype=dtype)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    expected = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    assert {tensor.dtype for tensor in tensors.values()} == {expected}
    head = weights()["lm_head"]["kernel"].T.astype(expected)
    np.testing.assert_array_equal(tensors["lm_head.weight"], head)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == dtype
    copied = {"config.json", "tokenizer.json", "generation_config.json", "chat_template.jinja"}
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {*copied, "LICENSE", "model.safetensors"}


def test_the_copied_configuration_describes_the_merged_model(tmp_path):
    quantized = {"quantization_config": {"bits": 4}, "tie_word_embeddings": True}
    base = base_folder(tmp_path / "base", **quantized)
    save_merged(tmp_path / "out", weights(), family="llama", base=base)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {
        "model_type": "llama",
        "torch_dtype": "float32",
        "tie_word_embeddings": False,  # the weights have a head
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "unknown dtype 'int8'. Use one of float32"),
        ({"dtype": "float16", "weights": 1e6}, r"lm_head.weight: 1e\+06 is too large for float16"),
        ({"dtype": "float16", "weights": np.nan}, "lm_head.weight contains a NaN"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, options, message):
    tree = {"lm_head": {"kernel": np.full((8, 12), options.pop("weights", 1.0), np.float32)}}
    with pytest.raises(ValueError, match=message):
        save_merged(tmp_path, tree, family="llama", **options)
    assert not any(tmp_path.iterdir())


def test_the_base_itself_is_not_overwritten(tmp_path):
    base = base_folder(tmp_path / "base")
    with pytest.raises(ValueError, match="is the base model itself"):
        save_merged(base, weights(), family="llama", base=base)
    with pytest.raises(FileNotFoundError, match="config.json is missing. Pass the folder"):
        save_merged(tmp_path / "out", weights(), family="llama", base=tmp_path / "none")


def merged_by_us(hf: Any, base: Any, folder: Path) -> dict:
    """The tree of the base with PEFT's adapter merged by us."""
    tree, loaded = as_flax(hf, base), load_peft(folder)
    tree.pop("lm_head", None)
    scales = []
    for name, one in loaded.factors.items():
        place = tree
        for key in name.split("."):
            place = place[key]
        place |= {"lora_a": jnp.asarray(one.a), "lora_b": jnp.asarray(one.b)}
        scales.append((f"{name.replace('.', '/')}/lora_a", one.scale))
    merged = merge(tree, tree, LoraPairs(scale=tuple(scales)))
    for name in loaded.factors:
        place = merged
        for key in name.split("."):
            place = place[key]
        del place["lora_a"], place["lora_b"]
    return merged


@others_warn
def test_the_merge_equals_that_of_peft_in_bfloat16(hf, tmp_path, report):
    """Where the products are exact in float32, also bit by bit: both round the sum once."""
    base = torch_model(hf, "llama").bfloat16()
    config = hf.peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    adapted = hf.peft.get_peft_model(copy.deepcopy(base), config)
    draw = np.random.default_rng(0)
    for exact in (True, False):
        with hf.torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    values = draw.normal(size=parameter.shape) / 4
                    values = np.round(values * 32) / 32 if exact else values
                    parameter.copy_(hf.torch.tensor(values))
        adapted.save_pretrained(tmp_path / "adapter")
        ours = merged_by_us(hf, copy.deepcopy(base).float(), tmp_path / "adapter")
        save_merged(tmp_path / "merged", ours, family="llama", dtype="bfloat16")
        theirs = copy.deepcopy(adapted).merge_and_unload().state_dict()
        written = load_file(tmp_path / "merged" / "model.safetensors")
        different = total = 0
        for name, tensor in written.items():
            peft = theirs[name].float().numpy().astype(ml_dtypes.bfloat16)
            assert peft.dtype == tensor.dtype
            step = np.abs(peft.astype(np.float32)) * 2.0**-7
            assert (np.abs(tensor.astype(np.float32) - peft.astype(np.float32)) <= step).all()
            different, total = different + (tensor != peft).sum(), total + tensor.size
        what = "exact products" if exact else "any products"
        report(f"PEFT's merge in bfloat16, {what}: {different} of {total} weights differ")
        assert different <= (0 if exact else total * 1e-3)


@others_warn
def test_from_pretrained_loads_the_folder(hf, close, tmp_path):
    base, x = torch_model(hf, "llama"), inputs(hf, "llama")
    base.save_pretrained(tmp_path / "base")
    config = hf.peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    adapted = hf.peft.get_peft_model(copy.deepcopy(base), config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    tree = merged_by_us(hf, base, tmp_path / "adapter")
    save_merged(
        tmp_path / "out", tree, family="llama", base=tmp_path / "base", max_shard_bytes=4096
    )
    assert (tmp_path / "out" / INDEX).exists()
    loaded = hf.transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    expected = logits_of(hf, adapted, x)
    assert np.abs(expected - logits_of(hf, base, x)).max() > 0.05
    close("transformers with merged shards", logits_of(hf, loaded, x), expected, 1e-4)


def test_a_failed_write_keeps_the_old_files(tmp_path, monkeypatch):
    save_merged(tmp_path, weights(), family="llama", max_shard_bytes=1024)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def fail(*_: Any):
        raise OSError("no space left on device")

    monkeypatch.setattr(merged_module, "write_tensors", fail)
    with pytest.raises(OSError, match="no space"):
        save_merged(tmp_path, weights(), family="llama")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
