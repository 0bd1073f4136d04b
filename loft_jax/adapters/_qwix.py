"""Converts rules to those of qwix, which adds adapters to nnx and linen models."""

import importlib
from typing import Any

from loft_jax.adapters._rule import Rules, as_rules, path_of_a
from loft_jax.pairs.declared import declare_batch, declare_scale


def qwix_provider(rules: Rules, **quantization: Any) -> Any:
    """Returns a provider with which `qwix.apply_lora_to_model` adds these adapters to a model.

    qwix also adapts products outside of layers (`jnp.einsum` with a parameter). It does not support
    Explicit meshes, scanned nnx layers or einsums in compact methods of linen, and with qwix all
    experts share ``b``. For these, use `add_lora` or `LoraModel`.

    Args:
      rules: as in `add_lora`. qwix creates the factors in the dtype of the weight.
      **quantization: how to quantize the frozen weights, for all rules: ``weight_qtype="nf4"``,
        ``tile_size=64``, as in `qwix.LoraRule`.

    Returns:
      A `qwix.LoraProvider`. Pass the same rules to the optimizer, as ``pairs=rules``.

    Raises:
      ValueError: a rule has dropout, which qwix would not turn off in evaluation.
      ImportError: qwix is not installed.

    Example:
      >>> from loft_jax.adapters import LoraRule
      >>> provider = qwix_provider(LoraRule(path=["q_proj", "v_proj"], rank=8, alpha=16))
    """
    qwix = import_qwix()
    rules = as_rules(rules)
    if any(rule.dropout for rule in rules):
        raise ValueError(
            "qwix does not turn off the dropout of adapters in evaluation. Set dropout=0, or use "
            "add_lora (nnx) or LoraModel (linen)"
        )
    for rule in reversed(rules):  # the last declaration counts, in qwix the first rule
        path = path_of_a(rule, name=r"\w+_lora_a")
        declare_scale(path, rule.scale)
        if rule.batch is not None:
            declare_batch(path, rule.batch)
    return qwix.LoraProvider(
        [
            qwix.LoraRule(
                module_path=rule.regex,
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
    """Returns the module `qwix`.

    Raises:
      ImportError: qwix is not installed. The message names the extra.
    """
    try:
        return importlib.import_module("qwix")
    except ImportError as error:
        raise ImportError('qwix is not installed: pip install "loft_jax[qwix]"') from error
