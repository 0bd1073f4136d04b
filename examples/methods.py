"""The methods that the examples compare: what each trains, with which optimizer, at which rate."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import optax
from dora import add_dora
from errors import UserError
from flax import nnx

from loft_jax import LoraPairs, baselines, clip_by_projected_global_norm, loft_adamw, loft_muon
from loft_jax.adapters import LoraRule, add_lora

Optimizer = Callable[[Any, LoraPairs | None], optax.GradientTransformation]
"""(learning rate, what to know of the adapters) -> the transformation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """One way to fine-tune."""

    label: str
    optimizer: Optimizer
    rate: float
    """The default peak learning rate, as a multiple of full fine-tuning's on the same task.

    LoFT's and LoRA's are from `finetune_llm.py`'s default run: the best of those tried in 25 steps
    (LoFT 5e-4, 1e-3, 4e-3; LoRA 3e-3, 1e-2), beside the only one tried in full (1e-4). The others'
    are starting points that nobody has tuned: try three times as much and a third of it.
    """
    trains: Literal["adapters", "all", "head"] = "adapters"
    projected: bool = False
    """Whether gradients are clipped by their norm after LoFT's projection: the norm that full
    fine-tuning would see, of what the adapters can express."""
    rslora: bool = False
    dora: bool = False


def _adamw(learning_rate: Any, pairs: LoraPairs | None) -> optax.GradientTransformation:
    return optax.adamw(learning_rate, weight_decay=0.0)


def _loft(second_moment: Any) -> Optimizer:
    options = {"weight_decay": 0.0, "second_moment": second_moment}
    return lambda rate, pairs: loft_adamw(rate, pairs=pairs, **options)


def _peer(make: Callable[..., optax.GradientTransformation]) -> Optimizer:
    return lambda rate, pairs: make(rate, pairs=pairs)


METHODS = {
    "loft": Method(label="LoFT", optimizer=_loft("calibrated"), rate=5, projected=True),
    "factored": Method(label="LoFT, factored", optimizer=_loft("factored"), rate=5, projected=True),
    "simple": Method(label="LoFT (simple)", optimizer=_loft("diagonal"), rate=50, projected=True),
    "muon": Method(
        label="LoFT-Muon",
        # Of AdamW's size, so that AdamW's learning rate serves; other parameters get AdamW.
        optimizer=_peer(functools.partial(loft_muon, consistent_rms=0.2)),
        rate=5,
        projected=True,
    ),
    "lora": Method(label="LoRA", optimizer=_adamw, rate=30),
    "dora": Method(label="DoRA", optimizer=_adamw, rate=30, dora=True),
    "rslora": Method(label="rsLoRA", optimizer=_adamw, rate=10, rslora=True),
    "lora+": Method(label="LoRA+", optimizer=_peer(baselines.lora_plus), rate=5),
    "riemannian": Method(label="Riemannian LoRA", optimizer=_peer(baselines.scaled_adamw), rate=10),
    # The variant with a second moment (the paper's Algorithm 2), at a rate like the others'.
    "altlora": Method(label="AltLoRA+", optimizer=_peer(baselines.altlora_plus), rate=5),
    "lora-pro": Method(label="LoRA-Pro", optimizer=_peer(baselines.lora_pro), rate=1),
    "full": Method(label="full fine-tuning", optimizer=_adamw, rate=1, trains="all"),
    "head": Method(label="the head alone", optimizer=_adamw, rate=30, trains="head"),
}


def default_rate(method: str, full: float) -> float:
    """A method's peak learning rate on a task where full fine-tuning has the rate `full`."""
    return METHODS[method].rate * full


def title(method: str, rank: int) -> str:
    """'LoFT of rank 8', 'full fine-tuning'."""
    chosen = METHODS[method]
    return f"{chosen.label} of rank {rank}" if chosen.trains == "adapters" else chosen.label


def adapter_rule(method: str, rule: LoraRule) -> LoraRule:
    """The rule of the adapters with the scale that the method gives them."""
    return dataclasses.replace(rule, rslora=METHODS[method].rslora)


def adapt(model: Any, method: str, rule: LoraRule, rngs: nnx.Rngs) -> Any:
    """The model as the method wants it: with fresh adapters, or as it is."""
    if METHODS[method].trains != "adapters":
        return model
    try:
        model = add_lora(model, adapter_rule(method, rule), rngs=rngs)
    except ValueError as error:
        raise UserError(f"Cannot add the adapters: {error}.") from error
    return add_dora(model) if METHODS[method].dora else model


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


def make_optimizer(
    method: str,
    learning_rate: Any,
    *,
    pairs: LoraPairs | None = None,
    max_norm: float = 1.0,
    head: str | None = None,
    head_ratio: float = 1.0,
) -> optax.GradientTransformation:
    """A method's optimizer behind gradient clipping, without weight decay.

    Args:
        method: one of `METHODS`.
        learning_rate: a number or a traced scalar.
        pairs: what LoFT and its peers should know of the adapters: scale, and stacked axes.
        max_norm: the global norm at which gradients are clipped.
        head: the attribute of a new head, which gets AdamW; None for a model without one.
        head_ratio: the head's learning rate as a multiple of `learning_rate`.
    """
    chosen = METHODS[method]
    clip = optax.clip_by_global_norm(max_norm)
    if chosen.projected:
        clip = clip_by_projected_global_norm(max_norm, pairs=pairs)
    optimizer = chosen.optimizer(learning_rate, pairs)
    if head is not None and chosen.trains != "head":
        of_head = _adamw(head_ratio * learning_rate, None)
        optimizer = optax.partition(
            {"head": of_head, "body": optimizer}, functools.partial(head_labels, head)
        )
    return optax.chain(clip, optimizer)


def head_labels(head: str, params: Any) -> Any:
    """'head' for the leaves below that attribute, 'body' for all others."""
    within = jax.tree_util.DictKey(head)
    return jax.tree.map_with_path(lambda path, _: "head" if within in path else "body", params)
