"""The ViT equals Hugging Face's, from their files and from an ONNX export."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from flax import nnx

from common.errors import UserError
from common.methods import adapt
from common.models import vit_weights
from common.models.vit import TARGETS, VitConfig, lora_rule
from loft_jax.adapters import remove_lora
from tests.examples import record_vit_logits as hugging_face


def with_recorded_head(model: Any, tensors: dict[str, np.ndarray]) -> Any:
    """The model with the recorded head in place of its new one."""
    model.classifier.kernel[...] = jnp.asarray(tensors["classifier.weight"].T, jnp.float32)
    model.classifier.bias[...] = jnp.asarray(tensors["classifier.bias"], jnp.float32)
    return model


def assert_same_logits(recorded: dict[str, Any], folder: Path) -> None:
    """Ours equal the recorded ones up to float32 rounding through two layers."""
    loaded = vit_weights.load(str(hugging_face.write_folder(recorded, folder)))
    model = with_recorded_head(loaded.build(hugging_face.IMAGE_SIZE, 3), recorded["tensors"])
    scale = np.abs(recorded["logits"]).max()
    np.testing.assert_allclose(
        model(recorded["images"]), recorded["logits"], rtol=0, atol=1e-5 * scale
    )


@pytest.mark.parametrize("case", hugging_face.CASES)
def test_logits_are_those_recorded_from_hugging_face(case, tmp_path):
    assert_same_logits(hugging_face.read_recorded(case), tmp_path / "model")


def test_logits_are_those_of_hugging_face(tmp_path):
    # The packages are large and optional; the recorded logits above are always tested.
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    assert_same_logits(hugging_face.record("dinov2 on smaller images"), tmp_path / "model")


@pytest.fixture
def recorded():
    return hugging_face.read_recorded("dinov2 on smaller images")


@pytest.fixture
def folder(recorded, tmp_path):
    return hugging_face.write_folder(recorded, tmp_path / "model")


def test_positions_of_the_same_grid_are_kept_bit_exactly():
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


def as_onnx(tensors: dict[str, np.ndarray]) -> bytes:
    """A DINOv2 as PyTorch exports it: matrices are transposed; they and positions have no names."""
    weights, nodes = [], []

    def add_weight(name: str, tensor: np.ndarray) -> None:
        weights.append(onnx.numpy_helper.from_array(tensor.astype(np.float32), name))

    def add_node(name: str, *inputs: str) -> None:
        nodes.append(onnx.helper.make_node(name.split("/")[-1].split("_")[0], inputs, ["y"], name))

    for name, tensor in tensors.items():
        name = re.sub("^dinov2", "backbone", name)
        if name.endswith("position_embeddings"):
            add_weight("a", tensor[:, :1])
            add_weight("b", tensor[:, 1:])
            add_node("/backbone/embeddings/Reshape_1", "b", "shape")
            add_node("/backbone/embeddings/Concat_6", "a", "resized")
        elif tensor.ndim == 2 and name.startswith("backbone.encoder"):
            module = name.removesuffix(".weight").replace(".", "/").replace("layer/", "layer.")
            anonymous = f"MatMul_{len(weights)}"
            add_weight(anonymous, tensor.T)
            add_node(f"/{module}/MatMul", "x", anonymous)
        else:
            add_weight(name, tensor)
    # Integer constants, such as shapes, are not weights.
    weights.append(onnx.numpy_helper.from_array(np.array([1, -1]), "shape"))
    graph = onnx.helper.make_graph(nodes, "graph", [], [], weights)
    return onnx.helper.make_model(graph).SerializeToString()


def test_an_onnx_export_gives_the_weights_it_was_written_from(recorded, folder):
    read = vit_weights.from_onnx(as_onnx(recorded["tensors"]))
    original = vit_weights.load(str(folder)).tensors
    for name, tensor in read.items():
        np.testing.assert_array_equal(tensor, original[name], err_msg=name)
    assert set(original) - set(read) <= {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [(lambda data: data[:-7], "not an ONNX model"), (lambda data: b"", "no float32 weights")],
    ids=["truncated", "empty"],
)
def test_a_damaged_onnx_file_is_refused(recorded, damage, message):
    with pytest.raises(ValueError, match=message):
        vit_weights.from_onnx(damage(as_onnx(recorded["tensors"])))


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
    with pytest.raises(UserError, match="--image-size 11 is not a multiple of 4.*try 12"):
        vit_weights.load(str(folder)).build(11, 3)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_truncated_file_is_named(folder, name):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=f"Cannot (read|use) .*{name}"):
        vit_weights.load(str(folder))
