"""A frozen base in 4 or 8 bits with the adapters beside it: QLoRA's storage, for LoFT.

The number formats are qwix's. Its own wrapping of models is not needed for them.
"""

import re
from typing import Any

from flax import nnx

from loft_jax.adapters._nnx import LoraLayer
from loft_jax.adapters._nnx_layers import PLAIN, QType, QuantizedLayer, check_own_call, stacked_axes
from loft_jax.adapters._qwix import import_qwix


def quantize(
    model: Any,
    path: str = ".*",
    *,
    qtype: QType = "nf4",
    tile_size: int = 64,
    batch: tuple[int, ...] | None = None,
) -> Any:
    """Puts the kernels of a model's layers into 4 or 8 bits, to be frozen.

    Quantized are the layers that `add_lora` adapts. The adapters' factors, biases, norms and
    embeddings stay as they are, and so do the optimizer and its state.

    Args:
      model: an nnx module, with adapters of `add_lora` or without. It is left as it is.
      path: a regular expression that a layer's whole path matches.
      qtype: "nf4" (4-bit NormalFloat, Dettmers et al. 2023), "int4" or "int8".
      tile_size: so many numbers along the last input axis share a scale, which has the kernel's
        dtype. Memory per number: half a byte (one for int8), and the scale's over the tile size.
      batch: axes of the kernels that enumerate stacked layers, where shapes leave them in doubt.

    Returns:
      The model with a `QuantizedLayer` for each layer that matches. Checkpoints need not hold its
      kernels, and Orbax cannot store NF4's uint4: quantize the pretrained weights anew.

    Raises:
      ValueError: no layer matches, one is quantized already, or tiles do not fill its axis. The
        message names the layer.
      ImportError: qwix is not installed.

    Example:
      >>> model = quantize(nnx.Linear(128, 4, rngs=nnx.Rngs(0)), qtype="int8")
      >>> model.kernel.get_value().qvalue.dtype, model.kernel.get_value().scale.shape
      (dtype('int8'), (2, 4))
    """
    import_qwix()  # here and not at the first layer, to say what is missing
    seen: list[str] = []
    matched = 0
    adapted = {place for place, node in nnx.iter_modules(model) if isinstance(node, LoraLayer)}

    def replace(place: tuple[Any, ...], node: Any) -> Any:
        nonlocal matched
        if not isinstance(node, (*PLAIN, QuantizedLayer)):
            return node
        # The layer beside an adapter goes by the path that it had without.
        name = "/".join(map(str, place[:-1] if place[:-1] in adapted else place))
        seen.append(name)
        if not re.fullmatch(path, name):
            return node
        matched += 1
        try:
            if isinstance(node, QuantizedLayer):
                raise ValueError("the layer is quantized already")
            check_own_call(node)
            return QuantizedLayer(node, stacked_axes(node, batch), qtype, tile_size)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    result = nnx.recursive_map(replace, model)
    if not matched:
        raise ValueError(f"no layer matches {path!r}; there are: {', '.join(seen[:12]) or 'none'}")
    return result
