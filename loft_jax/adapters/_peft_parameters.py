"""Adapters on parameters that no linear layer owns, as PEFT's ``target_parameters`` stores them.

Experts are the main case: their weights are stacked in one parameter (experts, out, in). PEFT wraps
the module that owns the parameter and stores, for E experts, ``lora_A`` (E r, in) with the experts
outside, and ``lora_B`` (out, r E) with the experts inside. Names of files have the module alone:
with two parameters of one module the wrappers are nested, and the one of the parameter that the
module registers first is called ``base_layer``.

https://github.com/huggingface/peft, ``ParamWrapper`` in ``tuners/lora/layer.py``
"""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import numpy as np

from loft_jax.adapters._loaded import LoraFactors, few

EXPERTS = ("gate_up_proj", "down_proj")
"""The parameters of experts, in the order in which all models of transformers register them."""

_NESTED = ".base_layer"
_MERGE = "Merge it in PEFT (merge_and_unload) and read the merged model instead"


def parameter_names(
    modules: Iterable[str], target_parameters: Collection[str], path: Path
) -> dict[str, str]:
    """Returns the parameters that the adapters of a file belong to.

    Args:
      modules: the names of modules in the file, such as ``mlp.experts.base_layer``.
      target_parameters: names of parameters, or ends of them, from adapter_config.json.
      path: of the file, for the message.

    Returns:
      The parameter, by the name in the file, for each module whose parameter is targeted.

    Raises:
      ValueError: the file has more or fewer adapters of a module than targeted parameters, or the
        order of several parameters is unknown. The message names the module.

    Example:
      >>> modules = ["mlp.experts", "mlp.experts.base_layer", "q_proj"]
      >>> parameter_names(modules, ["experts.down_proj", "experts.gate_up_proj"], Path("file"))
      {'mlp.experts.base_layer': 'mlp.experts.gate_up_proj', 'mlp.experts': 'mlp.experts.down_proj'}
    """
    depths: dict[str, list[str]] = {}
    for module in sorted(modules, key=len, reverse=True):  # the innermost wrapper first
        owner = module
        while owner.endswith(_NESTED):
            owner = owner.removesuffix(_NESTED)
        depths.setdefault(owner, []).append(module)
    targets: dict[str, set[str]] = {}
    for target in target_parameters:
        parent, _, name = target.rpartition(".")
        targets.setdefault(parent, set()).add(name)
    lengths = {parent.count(".") + 1 for parent in targets}
    found = {}
    for owner, stored in depths.items():
        # Ends of the name by their lengths, so that the time does not grow with the targets.
        keys = owner.split(".")
        ends = {".".join(keys[-length:]) for length in lengths if length <= len(keys)}
        if keys[-1] == "experts":
            ends.add("")  # PEFT takes a name without a module for the parameters of all modules
        names = sorted(set().union(*(targets.get(end, ()) for end in ends)))
        if not names and stored == [owner]:
            continue
        nested = [owner + depth * _NESTED for depth in reversed(range(len(names)))]
        if stored != nested:
            raise ValueError(
                f"{path}: {owner} has {len(stored)} adapters, and target_parameters names "
                f"{few(names) or 'no parameter of it'}. The two files do not belong together"
            )
        if len(names) > 1 and not set(names) <= set(EXPERTS):
            raise ValueError(
                f"{path}: {owner} has adapters of {few(names)}. Which is which depends on the "
                f"model, and is known only of {', '.join(EXPERTS)}. {_MERGE}"
            )
        names = sorted(names, key=lambda name: EXPERTS.index(name) if name in EXPERTS else 0)
        found |= {module: f"{owner}.{name}" for module, name in zip(stored, names, strict=True)}
    return found


def stored_names(parameters: Iterable[str]) -> dict[str, str]:
    """Returns the module's name in PEFT's file for each parameter of experts.

    Raises:
      ValueError: a module has several parameters of unknown order. The message names them.

    Example:
      >>> stored_names(["mlp.experts.down_proj", "mlp.experts.gate_up_proj"])
      {'mlp.experts.gate_up_proj': 'mlp.experts.base_layer', 'mlp.experts.down_proj': 'mlp.experts'}
    """
    owners: dict[str, list[str]] = {}
    for parameter in parameters:
        owner, _, name = parameter.rpartition(".")
        owners.setdefault(owner, []).append(name)
    stored = {}
    for owner, names in owners.items():
        if len(names) == 1:
            stored[f"{owner}.{names[0]}"] = owner
            continue
        if not set(names) <= set(EXPERTS):
            raise ValueError(
                f"{owner} has adapters of {few(names)}, whose order in PEFT's file is known only "
                f"of {', '.join(EXPERTS)}. Name them so in the Family, as transformers does"
            )
        for depth, name in enumerate(sorted(names, key=EXPERTS.index, reverse=True)):
            stored[f"{owner}.{name}"] = owner + depth * _NESTED
    return dict(reversed(stored.items()))


def stack_to_peft(one: LoraFactors) -> tuple[np.ndarray, np.ndarray]:
    """Returns ``lora_A`` (E r, in) and ``lora_B`` (out, r E) of a stack of experts.

    Example:
      >>> a, b = stack_to_peft(LoraFactors(np.ones((8, 6, 3)), np.ones((8, 3, 4)), scale=1.0))
      >>> a.shape, b.shape
      ((24, 6), (4, 24))
    """
    a = one.a.swapaxes(1, 2).reshape(-1, one.a.shape[1])
    return a, one.b.transpose(2, 1, 0).reshape(one.b.shape[2], -1)


def stack_from_peft(a: np.ndarray, b: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `stack_to_peft`: (E, in, r) and (E, r, out).

    Example:
      >>> a, b = stack_from_peft(np.ones((24, 6)), np.ones((4, 24)), rank=3)
      >>> a.shape, b.shape
      ((8, 6, 3), (8, 3, 4))
    """
    a = a.reshape(-1, rank, a.shape[1]).swapaxes(1, 2)
    return a, b.reshape(len(b), rank, -1).transpose(2, 1, 0)


def check_experts(factors: Mapping[str, LoraFactors], path: Path) -> None:
    """Refuses experts whose weights have another layout than (experts, out, in).

    PEFT calls the axes of a stack inputs and outputs by their positions, so in a file of such a
    model they are exchanged. With both parameters the sizes tell: the second returns to the inputs
    of the first, which has two outputs for each of its inputs, gate and up.

    Raises:
      ValueError: the sizes do not fit. The message names the parameter.
    """
    first, second = EXPERTS
    for name, one in factors.items():
        other = factors.get(f"{name.removesuffix(first)}{second}")
        if not name.endswith(f".experts.{first}") or other is None:
            continue
        sizes = [(part.a.shape[-2], part.b.shape[-1]) for part in (one, other)]
        (hidden, both), (inner, out) = sizes
        if (hidden, both) != (out, 2 * inner):
            raise ValueError(
                f"{path}: {name}: (in, out) of {first} and {second} are {sizes}, so the experts do "
                f"not have the layout (experts, out, in), and others are not supported. {_MERGE}"
            )
