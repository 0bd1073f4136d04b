"""All formats give the same model; errors name the bad file."""

import functools
import json
import shutil
import weakref

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from optimizers import hasty_compiler as hasty_compiler
from safetensors.numpy import load_file, save_file

from common.errors import UserError
from common.meshes import make_mesh, weight_sharding
from common.models import llama_weights as weights
from common.models.pretrained import Safetensors
from tests.examples.record_llama_logits import read_recorded
from tests.examples.tiny_llama import CONFIG, byte_tokenizer, random_tensors

IDS = jnp.arange(12)[None]


@pytest.fixture
def folder(model_folder, tmp_path):
    """A copy of the tiny model."""
    return shutil.copytree(model_folder, tmp_path / "model")


def test_shards_read_as_one_file_does(folder):
    whole = weights.load(str(folder)).build()(IDS)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"one.safetensors": names[:5], "two.safetensors": names[5:]}
    for file, members in shards.items():
        save_file({name: tensors[name] for name in members}, folder / file)
    index = {name: file for file, members in shards.items() for name in members}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    np.testing.assert_array_equal(weights.load(str(folder)).build()(IDS), whole)


def test_weights_have_the_dtype_of_the_request_whatever_the_file_has(folder):
    rounded = {n: t.astype(ml_dtypes.bfloat16) for n, t in random_tensors().items()}
    save_file(rounded, folder / "model.safetensors")
    for dtype in ("float32", "bfloat16"):
        model = weights.load(str(folder)).build(dtype)
        kernel = model.layers.mlp.up_proj.kernel[...]
        assert {leaf.dtype.name for leaf in jax.tree.leaves(nnx.state(model))} == {dtype}
        np.testing.assert_array_equal(kernel[1].T, rounded["model.layers.1.mlp.up_proj.weight"])
        assert model.hidden(IDS).dtype == dtype


def test_bfloat16_logits_are_near_those_of_float32(folder):
    pretrained = weights.load(str(folder))
    exact, rounded = pretrained.build()(IDS), pretrained.build("bfloat16")(IDS)
    assert np.abs(exact - rounded).max() < 0.03 * np.abs(exact).max()


def test_a_tensor_is_read_once_and_not_kept(folder, monkeypatch):
    pretrained, alive, most, reads = weights.load(str(folder)), set(), [0], []
    read = Safetensors.__getitem__

    class Noticed(np.ndarray):
        pass

    def noticed(tensors, name):
        array = read(tensors, name).view(Noticed)
        reads.append(name)
        alive.add(name)
        most[0] = max(most[0], len(alive))
        weakref.finalize(array, alive.discard, name)
        return array

    monkeypatch.setattr(Safetensors, "__getitem__", noticed)
    pretrained.build("bfloat16")
    assert sorted(reads) == sorted(pretrained.tensors) and most[0] <= 2  # the last and the new one


def test_weights_go_straight_to_their_places_on_a_mesh(folder):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    placement = functools.partial(weight_sharding, mesh=mesh)
    pretrained = weights.load(str(folder))
    model, alone = pretrained.build(placement=placement), pretrained.build()
    kernel = model.layers.self_attn.o_proj.kernel[...]
    assert kernel.sharding == NamedSharding(mesh, PartitionSpec(None, "tensor", "fsdp"))
    assert kernel.addressable_shards[0].data.shape == (2, 8, 8)
    np.testing.assert_allclose(model(IDS), alone(IDS), rtol=0, atol=1e-5)


def test_gpt2_without_its_head_is_read(tmp_path, folder):
    """The hub's GPT-2 is the backbone alone, with the masks of its attention."""
    recorded = read_recorded("gpt2")
    tensors = {n.removeprefix("transformer."): t for n, t in recorded["tensors"].items()}
    tensors["h.0.attn.bias"] = np.ones((1, 1, 64, 64), np.float32)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(recorded["config"]))
    logits = weights.load(str(folder)).build()(jnp.asarray(recorded["ids"]))
    np.testing.assert_allclose(logits, recorded["logits"], atol=1e-4)


def test_gguf_gives_the_model_and_tokenizer_it_was_written_from(folder, tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    read, original = weights.read_gguf(tmp_path / "tiny.gguf"), weights.load(str(folder))
    context = CONFIG["max_position_embeddings"]
    assert read.config.max_position_embeddings == context
    assert original.config.max_position_embeddings == context
    np.testing.assert_allclose(read.build()(IDS), original.build()(IDS), rtol=1e-5, atol=1e-5)
    text = "In 1987 the thin thief\n\n said: naïve!"
    ids = read.tokenizer.encode(text).ids
    assert ids == original.tokenizer.encode(text).ids
    assert read.tokenizer.decode(ids) == text


def write_gguf(path) -> None:
    """The tiny model in llama.cpp's format, with its permutation of the rows of q and k."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(CONFIG["max_position_embeddings"])
    writer.add_embedding_length(CONFIG["hidden_size"])
    writer.add_feed_forward_length(CONFIG["intermediate_size"])
    writer.add_block_count(CONFIG["num_hidden_layers"])
    writer.add_head_count(CONFIG["num_attention_heads"])
    writer.add_head_count_kv(CONFIG["num_key_value_heads"])
    writer.add_rope_dimension_count(4)
    writer.add_layer_norm_rms_eps(CONFIG["rms_norm_eps"])
    writer.add_rope_freq_base(CONFIG["rope_theta"])
    tokenizer = json.loads(byte_tokenizer().to_str())
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["t h"])
    short = {long: short for short, long in weights._GGUF_NAMES.items()}
    for name, tensor in random_tensors().items():
        parts = name.removeprefix("model.").removesuffix(".weight").split(".")
        prefix = f"blk.{parts[1]}." if parts[0] == "layers" else ""
        kind = ".".join(parts[2:] if prefix else parts)
        if kind in ("self_attn.q_proj", "self_attn.k_proj"):
            halves = tensor.reshape(-1, 2, 2, tensor.shape[-1])  # heads, half, head_dim/2, in
            tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(f"{prefix}{short[kind]}.weight", np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"has no .*{name.split('.')[1]}"):
        weights.load(str(folder))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_truncated_file_is_named(folder, name):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=f"Cannot (read|use) .*{name}"):
        weights.load(str(folder))


def test_an_unsupported_model_is_refused_with_what_is_supported(folder):
    (folder / "config.json").write_text(json.dumps(CONFIG | {"model_type": "bert"}))
    with pytest.raises(UserError, match="'bert' is not supported: use one of llama, mistral, "):
        weights.load(str(folder))


def test_a_config_that_lacks_an_entry_is_refused_by_its_name(folder):
    config = {name: value for name, value in CONFIG.items() if name != "vocab_size"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="config.json: it has no vocab_size"):
        weights.load(str(folder))


def test_weights_that_do_not_fit_the_config_are_named(folder):
    (folder / "config.json").write_text(json.dumps(CONFIG | {"intermediate_size": 20}))
    with pytest.raises(
        UserError, match="do not fit its config.*mlp.down_proj.weight: the shape is .16, 24."
    ):
        weights.load(str(folder)).build()
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match="The weights of .* lack model.layers.2"):
        weights.load(str(folder)).build()


@pytest.mark.parametrize("source", ["no/such/folder", "nothing"])
def test_a_missing_folder_is_named(source):
    with pytest.raises(UserError, match=f"--model {source}: there is no such folder"):
        weights.load(source)


def test_an_unreachable_hub_is_reported_with_the_remedy():
    with pytest.raises(UserError, match="Cannot fetch owner/name .* pass a local folder"):
        weights.load("owner/name")
