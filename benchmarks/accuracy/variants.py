"""What is compared: the methods of the examples, and variants of them that only a study needs."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import optax
from flax import nnx

from examples.common.methods import METHODS, Optimizer, adapt, adapter_rule, head_labels, trainable
from loft_jax import LoraPairs, clip_by_projected_global_norm, loft_adamw
from loft_jax.adapters import LoraRule, lora_pairs, quantize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to fine-tune, or none."""

    label: str
    method: str
    """Of the examples: what is trained, the adapters' scale, how gradients are clipped."""
    rate: float
    """Where the search of the learning rate starts, as a multiple of full fine-tuning's."""
    optimizer: Optimizer
    alpha: float = 1
    """LoRA's alpha as a multiple of the rank."""
    quantized: bool = False
    """Whether the frozen layers are kept in 4 bits (NF4)."""
    from_gradient: bool = False
    """Whether the factors start as LoRA-GA's, from the gradient on the first batch."""
    trained: bool = True

    @property
    def ranked(self) -> bool:
        """Whether there are adapters, and so a rank."""
        return METHODS[self.method].trains == "adapters"


def _like(method: str, **changes: Any) -> Variant:
    chosen = METHODS[method]
    defaults = {"label": chosen.label, "rate": chosen.rate, "optimizer": chosen.optimizer}
    return Variant(method=method, **(defaults | changes))


def _loft_without(**parts: Any) -> Optimizer:
    return lambda rate, pairs: loft_adamw(rate, weight_decay=0.0, pairs=pairs, **parts)


VARIANTS = {name: _like(name) for name in METHODS} | {
    "zero-shot": _like("head", label="before training", trained=False),
    "loft": _like("loft", label="LoFT, calibrated"),
    # With the scale 2. rsLoRA has the same at rank 4, where alpha / sqrt(r) is 2.
    "lora-2r": _like("lora", label="LoRA, alpha = 2r", rate=10, alpha=2),
    # With the scale of its paper, alpha / sqrt(r).
    "lora-ga": _like("rslora", label="LoRA-GA", from_gradient=True),
    "no-alternation": _like(
        "loft", label="LoFT, no alternation", optimizer=_loft_without(alternate=False)
    ),
    "no-calibration": _like(
        "loft", label="LoFT, no calibration", optimizer=_loft_without(calibrate=False)
    ),
    "neither": _like(
        "loft", label="LoFT, neither", optimizer=_loft_without(alternate=False, calibrate=False)
    ),
    "zero-shot-nf4": _like("head", label="before training, NF4", trained=False, quantized=True),
    "lora-nf4": _like("lora", label="QLoRA", quantized=True),
    "loft-nf4": _like("loft", label="QLoFT", quantized=True),
}


def rule_of(variant: Variant, make_rule: Callable[[int, float], LoraRule], rank: int) -> LoraRule:
    """The rule of the variant's adapters; `make_rule` makes a plain one of rank and alpha."""
    return adapter_rule(variant.method, make_rule(rank, variant.alpha * rank))


def quantized(variant: Variant, base: Any, batch: tuple[int, ...] | None = None) -> Any:
    """The pretrained model as the variant keeps it; `batch`: the axes that stack its layers."""
    return quantize(base, "layers/.*", batch=batch) if variant.quantized else base


def adapted(variant: Variant, base: Any, rule: LoraRule, seed: int) -> Any:
    """The base with adapters that the seed draws, where the variant has such.

    It shares the base's variables: nothing may be written to them.
    """
    return adapt(base, variant.method, rule, nnx.Rngs(seed))


def trained_by(variant: Variant, head: str | None) -> Any:
    """The nnx filter of what is trained; `head` is the attribute of a new head, if there is one."""
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
        learning_rate: a number or a traced scalar, of everything but the head.
        rule: of `rule_of`.
        max_norm: the global norm at which gradients are clipped.
        head: the attribute of a new head; None for a model without one.
        head_schedule: the learning rate of the head's AdamW, by the step; where the head alone is
            trained, it is `learning_rate`.
    """
    pairs: LoraPairs = lora_pairs(rule)
    clip = optax.clip_by_global_norm(max_norm)
    if METHODS[variant.method].projected:
        clip = clip_by_projected_global_norm(max_norm, pairs=pairs)
    optimizer = variant.optimizer(learning_rate, pairs)
    if head is not None and head_schedule is not None and METHODS[variant.method].trains != "head":
        of_head = optax.adamw(head_schedule, weight_decay=0.0)
        optimizer = optax.partition(
            {"head": of_head, "body": optimizer}, functools.partial(head_labels, head)
        )
    return optax.chain(clip, optimizer)
