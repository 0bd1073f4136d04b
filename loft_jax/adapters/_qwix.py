"""The rules for adapters, in the words of qwix, which wraps models of nnx and of linen."""

import importlib
from typing import Any

from loft_jax.adapters._rule import Rules, as_rules


def qwix_provider(rules: Rules, **quantization: Any) -> Any:
    """A provider with which `qwix.apply_lora_to_model` puts these adapters into a model.

    qwix reaches products that lie in no layer (`jnp.einsum` with a parameter); `add_lora` and
    `LoraModel` reach what qwix does not: Explicit meshes, scanned layers, einsums in linen's
    compact methods, and factors of each expert's own (in qwix all experts share ``b``).

    Args:
      rules: as for `add_lora`. qwix makes the factors in the dtype of the weight.
      **quantization: of the frozen weights, for all rules: ``weight_qtype="nf4"``,
        ``tile_size=64``, as in `qwix.LoraRule`.

    Returns:
      A `qwix.LoraProvider`. Tell the optimizer of the same rules by `lora_pairs`.

    Raises:
      ValueError: a rule with dropout, which qwix would not switch off in evaluation.
      ImportError: qwix is not installed.

    Example:
      >>> from loft_jax.adapters import LoraRule
      >>> provider = qwix_provider(LoraRule(path="layers/.*", rank=8, alpha=16))
    """
    qwix = import_qwix()
    rules = as_rules(rules)
    if any(rule.dropout for rule in rules):
        raise ValueError(
            "qwix drops the adapters' inputs in evaluation too: set dropout=0, or use add_lora "
            "(nnx) or LoraModel (linen)"
        )
    return qwix.LoraProvider(
        [
            qwix.LoraRule(
                module_path=rule.path,
                rank=rule.rank,
                alpha=rule.scale * rule.rank,  # qwix scales by alpha / rank
                lora_a_initializer=rule.init_a,
                lora_b_initializer=rule.init_b,
                **quantization,
            )
            for rule in rules
        ]
    )


def import_qwix() -> Any:
    """The module.

    Raises:
      ImportError: it is not installed; the message names the extra.
    """
    try:
        return importlib.import_module("qwix")
    except ImportError as error:
        raise ImportError('this needs qwix: pip install "loft_jax[qwix]"') from error
