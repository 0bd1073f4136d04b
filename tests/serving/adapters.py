"""Random adapters of the tiny models, and their products added to the weights."""

import copy
from typing import Any

import numpy as np
from serving.tiny_models import TinyModel

from loft_jax import LoraPairs


def random_adapter(
    model: TinyModel, *, same: bool = False, dtype: Any = np.float32, seed: int = 1
) -> tuple[dict, LoraPairs]:
    """Returns an adapter of all linear layers, and its scales.

    Args:
      model: the model to adapt.
      same: whether all ranks and scales are equal. Otherwise there are two ranks and three scales.
      dtype: of the factors.
      seed: of the values.
    """
    draw, tree, scales = np.random.default_rng(seed), {}, []
    for number, (module, (fan_in, fan_out)) in enumerate(model.targets.items()):
        rank, scale = (3, 0.75) if same else (2 + number % 2, (0.75, 1.5, 0.6)[number % 3])
        place = tree
        for key in module.split("."):
            place = place.setdefault(key, {})
        place["lora_a"] = (0.3 * draw.normal(size=(fan_in, rank))).astype(dtype)
        place["lora_b"] = (0.3 * draw.normal(size=(rank, fan_out))).astype(dtype)
        scales.append((f"{module.replace('.', '/')}/lora_a", scale))
    return tree, LoraPairs(scale=tuple(scales))


def merged(model: TinyModel, adapter: dict, pairs: LoraPairs) -> TinyModel:
    """Returns the model with the products added to its weights, in float64 before rounding."""
    import torch

    scales, module_of = dict(pairs.scale), copy.deepcopy(model.torch)
    for path, scale in scales.items():
        module = path.removesuffix("/lora_a").replace("/", ".")
        place = adapter
        for key in module.split("."):
            place = place[key]
        product = scale * place["lora_a"].astype(np.float64) @ place["lora_b"].astype(np.float64)
        weight = module_of.get_submodule(module).weight
        product = product if model.name == "gpt2" else product.T
        with torch.no_grad():
            weight += torch.tensor(product).to(weight.dtype)
    return TinyModel(model.name, module_of)


def log_probs(model: TinyModel, ids: np.ndarray) -> np.ndarray:
    """Returns the log-probabilities (length, vocabulary) of the next tokens."""
    import torch

    with torch.no_grad():
        logits = model.torch(torch.tensor(ids[None])).logits[0]
    return torch.log_softmax(logits.double(), -1).numpy()
