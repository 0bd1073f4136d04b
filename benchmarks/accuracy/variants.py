"""The methods of the study: those of the examples, and variants of them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import optax
from flax import nnx

from examples.common.methods import (
    METHODS,
    Optimizer,
    adapt,
    adapter_rule,
    clip_by_norm,
    head_labels,
    trainable,
)
from loft_jax import LoraPairs, baselines
from loft_jax.adapters import LoraRule, lora_pairs, quantize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to fine-tune."""

    label: str
    method: str
    """The method of the examples, which defines what is trained, the scale and the clipping."""
    rate: float
    """The learning rate at which the search starts, as a multiple of that of full fine-tuning."""
    optimizer: Optimizer
    alpha: float = 1
    """LoRA's alpha as a multiple of the rank."""
    quantized: bool = False
    """Whether the frozen layers are stored in 4 bits (NF4)."""
    from_gradient: bool = False
    """Whether LoRA-GA initializes the factors, from the gradient on the first batch."""
    trained: bool = True

    @property
    def ranked(self) -> bool:
        """Whether the method has adapters, and so a rank."""
        return METHODS[self.method].trains == "adapters"


def _like(method: str, **changes: Any) -> Variant:
    chosen = METHODS[method]
    defaults = {"label": chosen.label, "rate": chosen.rate, "optimizer": chosen.optimizer}
    return Variant(method=method, **(defaults | changes))


VARIANTS = {name: _like(name) for name, method in METHODS.items() if method.for_text} | {
    "zero-shot": _like("head", label="before training", trained=False),
    "loft": _like("loft", label="LoFT, calibrated"),
    # The scale is 2, as in rsLoRA at rank 4, where alpha / sqrt(r) is 2.
    "lora-2r": _like("lora", label="LoRA, alpha = 2r", rate=10, alpha=2),
    # The scale is alpha / sqrt(r), as in its paper.
    "lora-ga": _like("rslora", label="LoRA-GA", from_gradient=True),
    # The default of its released code.
    "lora-rite-no-escape": _like(
        "lora-rite",
        label="LoRA-RITE, no escaped mass",
        optimizer=lambda rate, pairs: baselines.lora_rite(rate, escaped_mass=False, pairs=pairs),
    ),
    "zero-shot-nf4": _like("head", label="before training, NF4", trained=False, quantized=True),
    "lora-nf4": _like("lora", label="QLoRA", quantized=True),
    "loft-nf4": _like("loft", label="QLoFT", quantized=True),
}


def rule_of(variant: Variant, make_rule: Callable[[int, float], LoraRule], rank: int) -> LoraRule:
    """The rule of the variant's adapters; `make_rule(rank, alpha)` makes one of plain LoRA."""
    return adapter_rule(variant.method, make_rule(rank, variant.alpha * rank))


def quantized(variant: Variant, base: Any, batch: tuple[int, ...] | None = None) -> Any:
    """The pretrained model, quantized if the variant is; `batch`: the axes of stacked layers."""
    return quantize(base, "layers/.*", batch=batch) if variant.quantized else base


def adapted(variant: Variant, base: Any, rule: LoraRule, seed: int) -> Any:
    """The base with adapters from the seed, if the variant has adapters.

    The result shares the variables of the base; do not write to them.
    """
    return adapt(base, variant.method, rule, nnx.Rngs(seed))


def trained_by(variant: Variant, head: str | None) -> Any:
    """The nnx filter of the trained parameters; `head`: the attribute of a new head, or None."""
    return trainable(variant.method, head) if variant.trained else nnx.Nothing()


def make_optimizer(
    variant: Variant,
    learning_rate: Any,
    rule: LoraRule,
    max_norm: float,
    head: str | None = None,
    head_schedule: optax.Schedule | None = None,
) -> optax.GradientTransformation:
    """The variant's optimizer behind gradient clipping, without weight decay.

    Args:
        variant: one of `VARIANTS`.
        learning_rate: a number or a traced scalar, for everything except the head.
        rule: the result of `rule_of`.
        max_norm: the global norm at which gradients are clipped.
        head: the attribute of a new head, or None.
        head_schedule: the learning rate of the head's AdamW by step. If only the head is trained,
            its learning rate is `learning_rate`.
    """
    pairs: LoraPairs = lora_pairs(rule)
    optimizer = variant.optimizer(learning_rate, pairs)
    if head is not None and head_schedule is not None and METHODS[variant.method].trains != "head":
        of_head = optax.adamw(head_schedule, weight_decay=0.0)
        optimizer = optax.partition(
            {"head": of_head, "body": optimizer}, functools.partial(head_labels, head)
        )
    return optax.chain(clip_by_norm(variant.method, max_norm, pairs), optimizer)
