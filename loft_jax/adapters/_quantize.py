"""Quantizes the frozen base to 4 or 8 bits, as in QLoRA.

The number formats are those of qwix. Its provider is not needed.
"""

import re
from typing import Any

from flax import nnx

from loft_jax.adapters._nnx import LoraLayer, Model
from loft_jax.adapters._nnx_layers import PLAIN, QType, QuantizedLayer, check_own_call, stacked_axes
from loft_jax.adapters._qwix import import_qwix


def quantize(
    model: Model,
    path: str = ".*",
    *,
    qtype: QType = "nf4",
    tile_size: int = 64,
    batch: tuple[int, ...] | None = None,
) -> Model:
    """Quantizes the kernels of a model's layers to 4 or 8 bits. They are then frozen.

    It quantizes the layers that `add_lora` can adapt. Factors, biases, norms and embeddings keep
    their dtypes, and the optimizer and its state do not change.

    Args:
      model: an nnx module, before or after `add_lora`. It is not modified.
      path: a regular expression that matches a layer's whole path.
      qtype: "nf4" (4-bit NormalFloat, Dettmers et al. 2023), "int4" or "int8".
      tile_size: how many numbers along the last input axis share a scale, which has the kernel's
        dtype. A number takes half a byte (one byte for int8) plus the scale's bytes divided by
        the tile size.
      batch: axes of the kernels that enumerate stacked layers; None reads them from the shapes.

    Returns:
      The model with a `QuantizedLayer` in place of each matching layer. Leave its kernels out of
      checkpoints and quantize the pretrained weights again on restart: Orbax cannot store the
      uint4 of NF4.

    Raises:
      ValueError: no layer matches, a layer is already quantized, or the tile size does not divide
        the last input axis. The message names the layer.
      ImportError: qwix is not installed.

    Example:
      >>> model = quantize(nnx.Linear(128, 4, rngs=nnx.Rngs(0)), qtype="int8")
      >>> model.kernel.get_value().qvalue.dtype, model.kernel.get_value().scale.shape
      (dtype('int8'), (2, 4))
    """
    import_qwix()  # raises before any work is done
    seen: list[str] = []
    matched = 0
    adapted = {keys for keys, node in nnx.iter_modules(model) if isinstance(node, LoraLayer)}

    def replace(keys: tuple[Any, ...], node: Any) -> Any:
        nonlocal matched
        if not isinstance(node, (*PLAIN, QuantizedLayer)):
            return node
        # A layer with an adapter keeps the path that it had without one.
        name = "/".join(map(str, keys[:-1] if keys[:-1] in adapted else keys))
        seen.append(name)
        if not re.fullmatch(path, name):
            return node
        matched += 1
        try:
            if isinstance(node, QuantizedLayer):
                raise ValueError("the layer is already quantized")
            check_own_call(node)
            return QuantizedLayer(node, stacked_axes(node, batch), qtype, tile_size)
        except ValueError as error:
            raise ValueError(f"{name or 'the model'}: {error}") from error

    result = nnx.recursive_map(replace, model)
    if not matched:
        raise ValueError(
            f"no layer matches {path!r}. The layers that can be quantized: "
            f"{', '.join(seen[:12]) or 'none'}"
        )
    return result
