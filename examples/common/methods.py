"""The fine-tuning methods: trained parameters, optimizer and default learning rate of each."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, Protocol

import jax
import optax
from flax import nnx

from loft_jax import LoraPairs, baselines, clip_by_projected_global_norm, loft_adamw, loft_muon
from loft_jax.adapters import LoraLayer, LoraRule, add_lora, remove_lora

from .errors import UserError


class Optimizer(Protocol):
    """Makes the transformation for a learning rate; `pairs` describes the adapters."""

    def __call__(
        self, learning_rate: Any, pairs: LoraPairs | None, weight_decay: float = 0.0
    ) -> optax.GradientTransformation: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """One way to fine-tune."""

    label: str
    optimizer: Optimizer
    rate: float
    """Default peak learning rate, as a multiple of full fine-tuning's on the same task.

    LoFT's follows the rule of docs/accuracy.md: 3x. LoRA's is the better of two tried in 25 steps
    of `finetune_llm.py` (3e-3, 1e-2). The others are untuned starting points: also try three times
    as much and a third.
    """
    trains: Literal["adapters", "prompts", "bottlenecks", "all", "head"] = "adapters"
    """Prompts and bottlenecks are those of `models.vit_baselines`, for images only."""
    projected: bool = False
    """Whether clipping uses the norm of the gradients after LoFT's projection. This norm is the
    part of full fine-tuning's gradient norm that the adapters can express. The norm of the factors'
    own gradients means nothing to an optimizer that is free to scale one factor up and the other
    down."""
    alternate: bool = True
    """Whether a projected step moves one factor, in turn, or both."""
    rslora: bool = False
    dora: bool = False
    decays: bool = True
    """Whether its optimizer has weight decay."""

    @property
    def for_text(self) -> bool:
        """Whether it trains language models too."""
        return self.trains not in ("prompts", "bottlenecks")

    @property
    def exchangeable(self) -> bool:
        """Whether `save_peft` supports the adapters."""
        return self.trains == "adapters" and not self.dora


def _adamw(
    learning_rate: Any, pairs: LoraPairs | None = None, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """AdamW, which does not use the description of the adapters."""
    return optax.adamw(learning_rate, weight_decay=weight_decay, mask=decayed)


def _muon(
    learning_rate: Any, pairs: LoraPairs | None, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    # Updates have AdamW's size, so AdamW's learning rate suits non-LoRA parameters too.
    return loft_muon(
        learning_rate,
        weight_decay=weight_decay,
        adam_weight_decay=weight_decay,
        consistent_rms=0.2,
        pairs=pairs,
    )


def _lora_pro(
    learning_rate: Any, pairs: LoraPairs | None, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    if weight_decay:
        raise ValueError("LoRA-Pro has no weight decay")
    return baselines.lora_pro(learning_rate, pairs=pairs)


def _with_pairs(make: Callable[..., optax.GradientTransformation], **options: Any) -> Optimizer:
    return lambda learning_rate, pairs, weight_decay=0.0: make(
        learning_rate, weight_decay=weight_decay, pairs=pairs, **options
    )


def _loft(**options: Any) -> Optimizer:
    return _with_pairs(loft_adamw, **options)


def decayed(params: Any) -> Any:
    """Whether weight decay applies to each leaf: to all but biases and the scales of norms."""
    spared = {jax.tree_util.DictKey(name) for name in ("bias", "scale")}
    return jax.tree.map_with_path(lambda path, _: spared.isdisjoint(path), params)


METHODS = {
    "loft": Method(label="LoFT", optimizer=_loft(), rate=3, projected=True),
    "factored": Method(
        label="LoFT, factored",
        optimizer=_loft(second_moment="factored"),
        rate=3,
        projected=True,
    ),
    "simple": Method(
        label="LoFT (simple)",
        optimizer=_loft(second_moment="diagonal"),
        rate=50,
        projected=True,
    ),
    # The ablations of the paper's Tables 6 and 7.
    "no-alternation": Method(
        label="LoFT, no alternation",
        optimizer=_loft(alternate=False),
        rate=3,
        projected=True,
        alternate=False,
    ),
    "no-calibration": Method(
        label="LoFT, no calibration",
        optimizer=_loft(calibrate=False),
        rate=3,
        projected=True,
    ),
    "neither": Method(
        label="LoFT, neither",
        optimizer=_loft(alternate=False, calibrate=False),
        rate=3,
        projected=True,
        alternate=False,
    ),
    "muon": Method(
        label="LoFT-Muon",
        optimizer=_muon,
        rate=3,
        projected=True,
    ),
    "lora": Method(label="LoRA", optimizer=_adamw, rate=30),
    "dora": Method(label="DoRA", optimizer=_adamw, rate=30, dora=True),
    # LoFT for the direction, AdamW for the magnitude.
    "loft-dora": Method(
        label="DoRA with LoFT",
        optimizer=_loft(second_moment="factored"),
        rate=3,
        projected=True,
        dora=True,
    ),
    "rslora": Method(label="rsLoRA", optimizer=_adamw, rate=10, rslora=True),
    "lora+": Method(label="LoRA+", optimizer=_with_pairs(baselines.lora_plus), rate=5),
    "riemannian": Method(
        label="Riemannian LoRA", optimizer=_with_pairs(baselines.scaled_adamw), rate=10
    ),
    # The variant with a second moment (Algorithm 2 of the paper).
    "altlora": Method(label="AltLoRA+", optimizer=_with_pairs(baselines.altlora_plus), rate=5),
    "lora-pro": Method(label="LoRA-Pro", optimizer=_lora_pro, rate=1, decays=False),
    "lora-rite": Method(
        label="LoRA-RITE",
        optimizer=_with_pairs(baselines.lora_rite),
        rate=5,
        projected=True,
        alternate=False,
    ),
    "vpt": Method(label="VPT", optimizer=_adamw, rate=10, trains="prompts"),
    "adapter": Method(label="bottleneck adapters", optimizer=_adamw, rate=10, trains="bottlenecks"),
    "full": Method(label="full fine-tuning", optimizer=_adamw, rate=1, trains="all"),
    "head": Method(label="the head alone", optimizer=_adamw, rate=30, trains="head"),
}


def default_learning_rate(method: str, full: float) -> float:
    """A method's default peak learning rate if full fine-tuning's is `full`."""
    return METHODS[method].rate * full


def title(method: str, rank: int) -> str:
    """'LoFT of rank 8', 'full fine-tuning'."""
    chosen = METHODS[method]
    return f"{chosen.label} of rank {rank}" if chosen.trains == "adapters" else chosen.label


# ---------------------------------------------------------------------------- adapters


def adapter_rule(method: str, rule: LoraRule) -> LoraRule:
    """The rule with the scale that the method uses."""
    return dataclasses.replace(rule, rslora=METHODS[method].rslora)


def adapt(model: Any, method: str, rule: LoraRule, rngs: nnx.Rngs) -> Any:
    """The model with new adapters, or unchanged if the method trains none."""
    if METHODS[method].trains != "adapters":
        return model
    try:
        model = add_lora(model, adapter_rule(method, rule), rngs=rngs)
    except ValueError as error:
        raise UserError(f"Cannot add the adapters: {error}.") from error
    if not METHODS[method].dora:
        return model
    wrap = lambda path, node: DoraLayer(node) if isinstance(node, LoraLayer) else node
    return nnx.recursive_map(wrap, model)


def merge(model: Any, method: str) -> Any:
    """A trained model without adapters, whose weights contain them."""
    if METHODS[method].trains != "adapters":
        return model
    if not METHODS[method].dora:
        return remove_lora(model, merge=True)
    unwrap = lambda path, node: node.merged() if isinstance(node, DoraLayer) else node
    return nnx.recursive_map(unwrap, model)


class DoraLayer(nnx.Module):
    """DoRA: a linear layer whose weight is a direction, adapted by LoRA, times a magnitude."""

    def __init__(self, layer: LoraLayer):
        """Takes the base and the factors of an adapted `nnx.Linear`, stacked on axis 0 or not."""
        self.base, self.scale, self.dropout = layer.base, layer.scale, layer.dropout
        self.lora_a, self.lora_b = layer.lora_a, layer.lora_b
        init = jax.vmap(baselines.dora_init) if layer.stack else baselines.dora_init
        self.lora_magnitude = nnx.LoRAParam(init(layer.base.kernel[...]))

    def __call__(self, x: jax.Array) -> jax.Array:
        """`(..., in)` to `(..., out)`."""
        factors = (self.lora_magnitude[...], self.lora_a[...], self.lora_b[...])
        dropped = None if self.dropout is None else self.dropout(x)
        y = baselines.dora_output(x, self.base.kernel[...], *factors, self.scale, dropped=dropped)
        return y if self.base.bias is None else y + self.base.bias[...]

    def merged(self) -> nnx.Linear:
        """The layer with DoRA's weight."""
        weight = functools.partial(baselines.dora_weight, scale=self.scale)
        factors = (self.lora_magnitude[...], self.lora_a[...], self.lora_b[...])
        base = nnx.clone(self.base)
        kernel = base.kernel[...]
        base.kernel[...] = (jax.vmap(weight) if kernel.ndim > 2 else weight)(kernel, *factors)
        return base


def trainable(method: str, head: str | None = None) -> Any:
    """The nnx filter of the parameters that a method trains.

    Args:
        method: one of `METHODS`.
        head: the attribute of a new head, which every method trains; None for a model without one.
    """
    trains = METHODS[method].trains
    if trains == "all":
        return nnx.Param
    of_head = () if head is None else (nnx.PathContains(head),)
    return nnx.Any(*of_head) if trains == "head" else nnx.Any(nnx.LoRAParam, *of_head)


# --------------------------------------------------------------------------- optimizer


def make_optimizer(
    method: str,
    learning_rate: Any,
    *,
    pairs: LoraPairs | None = None,
    max_norm: float | None = 1.0,
    weight_decay: float = 0.0,
    head: str | None = None,
    head_ratio: float = 1.0,
) -> optax.GradientTransformation:
    """Gradient clipping followed by a method's optimizer.

    Args:
        method: one of `METHODS`.
        learning_rate: a number or a traced scalar.
        pairs: scale and stacked axes of the adapters.
        max_norm: the global norm at which gradients are clipped; None does not clip.
        weight_decay: decoupled, times the learning rate. Biases and the scales of norms, which
            `full` and `head` train, do not decay.
        head: the attribute of a new head, which AdamW trains; None for a model without one.
        head_ratio: the head's learning rate as a multiple of `learning_rate`.
    """
    chosen = METHODS[method]
    optimizer = chosen.optimizer(learning_rate, pairs, weight_decay)
    if head is not None and chosen.trains != "head":
        of_head = _adamw(head_ratio * learning_rate, None, weight_decay)
        optimizer = optax.partition(
            {"head": of_head, "body": optimizer}, functools.partial(head_labels, head)
        )
    if max_norm is None:
        return optimizer
    return optax.chain(clip_by_norm(method, max_norm, pairs), optimizer)


def clip_by_norm(
    method: str, max_norm: float, pairs: LoraPairs | None
) -> optax.GradientTransformation:
    """Clips gradients at the global norm that suits a method; see `Method.projected`."""
    chosen = METHODS[method]
    if not chosen.projected:
        return optax.clip_by_global_norm(max_norm)
    return clip_by_projected_global_norm(max_norm, alternate=chosen.alternate, pairs=pairs)


def head_labels(head: str, params: Any) -> Any:
    """'head' for the leaves below that attribute, 'body' for all others."""
    within = jax.tree_util.DictKey(head)
    return jax.tree.map_with_path(lambda path, _: "head" if within in path else "body", params)
