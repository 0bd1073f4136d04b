"""The model computes what Hugging Face's do, from their files and from an ONNX export."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx_weights
import pytest
import record_vit_logits as hugging_face
import vit_weights
from errors import UserError
from flax import nnx
from methods import adapt
from safetensors.numpy import save_file
from vit import TARGETS, VitConfig, lora_rule

from loft_jax.adapters import remove_lora


def read_recorded(case: str) -> dict[str, Any]:
    """A case of the recorded file."""
    with np.load(hugging_face.PATH) as file:
        prefix = f"{case}/tensors/"
        tensors = {n.removeprefix(prefix): file[n] for n in file.files if n.startswith(prefix)}
        rest = {name: file[f"{case}/{name}"] for name in ("images", "logits")}
        return {"config": json.loads(str(file[f"{case}/config"])), "tensors": tensors} | rest


def write_folder(recorded: dict[str, Any], folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(recorded["config"]))
    save_file(recorded["tensors"], folder / "model.safetensors")
    return folder


def with_recorded_head(model: Any, tensors: dict[str, np.ndarray]) -> Any:
    """The model with the recorded head: ours would be a new one."""
    model.classifier.kernel[...] = jnp.asarray(tensors["classifier.weight"].T, jnp.float32)
    model.classifier.bias[...] = jnp.asarray(tensors["classifier.bias"], jnp.float32)
    return model


def assert_same_logits(recorded: dict[str, Any], folder: Path) -> None:
    """Ours equal the recorded ones up to float32 rounding through two layers."""
    loaded = vit_weights.load(str(write_folder(recorded, folder)))
    model = with_recorded_head(loaded.build(hugging_face.IMAGE_SIZE, 3), recorded["tensors"])
    scale = np.abs(recorded["logits"]).max()
    np.testing.assert_allclose(
        model(recorded["images"]), recorded["logits"], rtol=0, atol=1e-5 * scale
    )


@pytest.mark.parametrize("case", hugging_face.CASES)
def test_logits_are_those_recorded_from_hugging_face(case, tmp_path):
    assert_same_logits(read_recorded(case), tmp_path / "model")


def test_logits_are_those_of_hugging_face(tmp_path):
    # Gigabytes that the test extra leaves out: the recorded logits above always run.
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    assert_same_logits(hugging_face.record("dinov2 on smaller images"), tmp_path / "model")


@pytest.fixture
def recorded():
    return read_recorded("dinov2 on smaller images")


@pytest.fixture
def folder(recorded, tmp_path):
    return write_folder(recorded, tmp_path / "model")


def test_positions_of_the_same_grid_are_kept_to_the_bit():
    table = np.random.default_rng(0).normal(size=(1, 10, 4)).astype(np.float32)
    np.testing.assert_array_equal(vit_weights.resize_positions(table, 3), table)


def test_new_adapters_leave_the_logits_unchanged_and_merge_when_they_are_trained(folder, recorded):
    model = vit_weights.load(str(folder)).build(12, 3)
    adapted = adapt(model, "lora", lora_rule(TARGETS, rank=2, alpha=6), nnx.Rngs(0))
    images = recorded["images"]
    np.testing.assert_array_equal(adapted(images), model(images))
    for path, factor in nnx.to_flat_state(nnx.state(adapted, nnx.LoRAParam)):
        if path[-1] == "lora_b":
            factor[...] = 0.1 * jax.random.normal(jax.random.key(0), factor.shape)
    assert float(jnp.abs(adapted(images) - model(images)).max()) > 0.01
    merged = remove_lora(adapted, merge=True)
    np.testing.assert_allclose(adapted(images), merged(images), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------- ONNX


def field(number: int, value: int | bytes) -> bytes:
    """A field of a protocol buffer."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value: int) -> bytes:
    low, rest = value & 127, value >> 7
    return bytes([low | 128]) + varint(rest) if rest else bytes([low])


def initializer(name: str, tensor: np.ndarray) -> bytes:
    dims = b"".join(field(1, size) for size in tensor.shape)
    data = field(9, np.ascontiguousarray(tensor, "<f4").tobytes())
    return field(5, dims + field(2, 1) + field(8, name.encode()) + data)


def node(name: str, *inputs: str) -> bytes:
    return field(1, b"".join(field(1, x.encode()) for x in inputs) + field(3, name.encode()))


def as_onnx(tensors: dict[str, np.ndarray]) -> bytes:
    """A DINOv2 as PyTorch exports it: matrices transposed, they and the positions anonymous."""
    parts = []
    for name, tensor in tensors.items():
        name = re.sub("^dinov2", "backbone", name)
        if name.endswith("position_embeddings"):
            parts += [initializer("a", tensor[:, :1]), initializer("b", tensor[:, 1:])]
            parts += [node("/backbone/embeddings/Reshape_1", "b", "shape")]
            parts += [node("/backbone/embeddings/Concat_6", "a", "resized")]
        elif tensor.ndim == 2 and name.startswith("backbone.encoder"):
            module = name.removesuffix(".weight").replace(".", "/").replace("layer/", "layer.")
            parts += [initializer(f"MatMul_{len(parts)}", tensor.T)]
            parts += [node(f"/{module}/MatMul", "x", f"MatMul_{len(parts) - 1}")]
        else:
            parts += [initializer(name, tensor)]
    return field(1, 10) + field(2, b"pytorch") + field(7, b"".join(parts))


def test_an_onnx_export_gives_the_weights_it_was_written_from(recorded, folder):
    read = vit_weights.from_onnx(onnx_weights.read_graph(as_onnx(recorded["tensors"])))
    original = vit_weights.load(str(folder)).tensors
    for name, tensor in read.items():
        np.testing.assert_array_equal(tensor, original[name], err_msg=name)
    assert set(original) - set(read) <= {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [(lambda data: data[:-7], "ends within"), (lambda data: b"", "no float32 weights")],
)
def test_a_damaged_onnx_file_is_refused(recorded, damage, message):
    with pytest.raises(ValueError, match=message):
        onnx_weights.read_graph(damage(as_onnx(recorded["tensors"])))


# --------------------------------------------------------------------------- messages


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "clip"},
        {"hidden_act": "quick_gelu"},
        {"use_swiglu_ffn": True},
        {"num_channels": 1},
        {"patch_size": [4, 8]},
    ],
)
def test_configs_that_would_be_computed_wrongly_are_refused(recorded, change):
    with pytest.raises(ValueError, match="not supported"):
        VitConfig.from_hf(recorded["config"] | change)


def test_the_preprocessor_tells_the_means_of_the_pixels(folder):
    assert vit_weights.load(str(folder)).config.image_mean == (0.485, 0.456, 0.406)
    values = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    assert vit_weights.load(str(folder)).config.image_mean == (0.1, 0.2, 0.3)


def test_weights_that_do_not_fit_the_config_are_named(folder, recorded):
    config = recorded["config"]
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match="lack layers.2"):
        vit_weights.load(str(folder)).build(12, 3)
    (folder / "config.json").write_text(json.dumps(config | {"mlp_ratio": 3}))
    with pytest.raises(UserError, match="do not fit its config.json: layers.0.mlp.fc1"):
        vit_weights.load(str(folder)).build(12, 3)


def test_an_image_size_that_patches_do_not_fill_is_refused_with_one_that_they_do(folder):
    with pytest.raises(UserError, match="--image-size 11 is no multiple of 4.*try 12"):
        vit_weights.load(str(folder)).build(11, 3)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_truncated_file_is_named(folder, name):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=f"Cannot (read|use) .*{name}"):
        vit_weights.load(str(folder))
