"""From the step of an optimizer on flat leaves to an Optax transformation.

A `Core` works on a `PairedTree`, so that the pairs of a tree are found once an update, however many
parts the optimizer has.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import optax

from loft_jax.execution.alternation import A_IS_ACTIVE
from loft_jax.execution.arguments import leaves_like, read_arguments, state_of_type
from loft_jax.execution.balance import balance_updates
from loft_jax.execution.explicit_mesh import in_auto_axes
from loft_jax.execution.rounding import narrow, widen
from loft_jax.pairs.find import PairedTree, find_pairs
from loft_jax.pairs.init_checks import warn_of_pairs

Mask = Any | Callable[[optax.Params], Any] | None
State = TypeVar("State", bound=tuple)  # a NamedTuple
Hyperparams = TypeVar("Hyperparams")


@dataclasses.dataclass(frozen=True)
class Core(Generic[State, Hyperparams]):
    """An optimizer without learning rate and weight decay.

    Attributes:
      state: the type of its state, which is checked.
      init: ``(tree) -> state``.
      step: ``(hyperparams, tree, gradients, state) -> (directions, state)`` on flat lists of
        leaves; the tree holds the parameters.
      hyperparams: a pytree of numbers, which `optax.inject_hyperparams` may have made arrays.
      active: the active factor of a state's next step; None if both factors move at every step.
      sharded: whether it sums over the shards of a shard_map.
    """

    state: type[State]
    init: Callable[[PairedTree], State]
    step: Callable[[Hyperparams, PairedTree, list[Any], State], tuple[list[Any], State]]
    hyperparams: Hyperparams
    active: Callable[[State], jax.Array] | None = None
    sharded: bool = True


def as_transformation(
    core: Core[State, Hyperparams], pairs: Any
) -> optax.GradientTransformationExtraArgs:
    """Returns a core as an Optax transformation."""

    def init(params: optax.Params) -> optax.OptState:
        return core.init(check_pairs(params, pairs))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        tree, gradients = read_arguments(params, updates, pairs, sharded=core.sharded)
        before = state_of_type(state, core.state)
        directions, after = in_auto_axes(
            core.step,
            core.hyperparams,
            tree,
            widen(gradients),
            before,
            out_like=(tree.leaves, before),
        )
        return tree.treedef.unflatten(narrow(directions, gradients)), after

    return optax.with_extra_args_support(optax.GradientTransformation(init, update))


def descend(
    core: Core[State, Hyperparams],
    learning_rate: optax.ScalarOrSchedule,
    pairs: Any,
    *,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask = None,
    balance: bool = False,
    others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adds decoupled weight decay and a learning rate to a core.

    Args:
      core: gives the directions. Its inactive factors do not decay.
      learning_rate: a number or a schedule of the step.
      pairs: how to find the pairs.
      weight_decay: a number or a schedule, times the learning rate.
      mask: a tree of booleans, or a function from parameters to one, of what to decay.
      balance: whether the updates also balance the factors; then the core's steps must depend on
        their product alone.
      others: a complete optimizer of the non-LoRA parameters, which gets the core's directions of
        these; None treats them like the factors.

    Returns:
      A transformation whose state is the tuple of the states of the core, the weight decay, the
      learning rate and, where given, of ``others``.
    """
    decay = optax.add_decayed_weights(weight_decay, mask)
    rate = optax.scale_by_learning_rate(learning_rate)

    def init(params: optax.Params) -> tuple[Any, ...]:
        tree = check_pairs(params, pairs)
        own, non_lora = _separate(tree, tree.leaves, others)
        states = core.init(tree), decay.init(own), rate.init(own)
        return states if others is None else (*states, others.init(non_lora))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        tree, gradients = read_arguments(params, updates, pairs, sharded=core.sharded)
        core_state, decay_state, rate_state, *others_states = state
        before = state_of_type(core_state, core.state)
        leaves, after = in_auto_axes(
            core.step,
            core.hyperparams,
            tree,
            widen(gradients),
            before,
            out_like=(tree.leaves, before),
        )
        own, non_lora = _separate(tree, tree.leaves, others)
        directions, _ = _separate(tree, leaves, others)
        decayed, decay_state = decay.update(directions, decay_state, own)
        if core.active is not None:
            decayed = _decay_active(tree, decayed, leaves, core.active(before))
        updates, rate_state = rate.update(decayed, rate_state, own)
        states = after, decay_state, rate_state
        if balance:
            updates = _balance(tree, updates, None if core.active is None else core.active(before))
        updates = _narrow(tree, updates, gradients)
        if others is None:
            return updates, states
        _, of_non_lora = _separate(tree, narrow(leaves, gradients), others)
        of_non_lora, others_state = optax.with_extra_args_support(others).update(
            of_non_lora, others_states[0], non_lora, **extra
        )
        return _join(tree, updates, of_non_lora), (*states, others_state)

    return optax.GradientTransformationExtraArgs(init, update)


def check_pairs(params: optax.Params, pairs: Any) -> PairedTree:
    """Returns parameters with their pairs, and warns of what looks like a mistake."""
    tree = find_pairs(params, pairs)
    warn_of_pairs(tree, pairs)
    return tree


def _separate(
    tree: PairedTree, leaves: list[Any], others: optax.GradientTransformation | None
) -> tuple[Any, Any]:
    """Returns the leaves as two trees that mask each other: the core's and non-LoRA parameters."""
    if others is None:
        return tree.treedef.unflatten(leaves), None
    others_at, masked = set(tree.others), optax.MaskedNode()
    own = [masked if k in others_at else leaf for k, leaf in enumerate(leaves)]
    non_lora = [leaf if k in others_at else masked for k, leaf in enumerate(leaves)]
    return tree.treedef.unflatten(own), tree.treedef.unflatten(non_lora)


def _join(tree: PairedTree, own: Any, non_lora: Any) -> Any:
    """Inverse of `_separate`."""
    leaves = leaves_like(tree, own, "updates")
    of_non_lora = leaves_like(tree, non_lora, "updates")
    for k in tree.others:
        leaves[k] = of_non_lora[k]
    return tree.treedef.unflatten(leaves)


def _balance(tree: PairedTree, updates: optax.Updates, active: jax.Array | None) -> optax.Updates:
    leaves = leaves_like(tree, updates, "updates")
    balanced = in_auto_axes(balance_updates, tree, leaves, active, out_like=leaves)
    return tree.treedef.unflatten(balanced)


def _narrow(tree: PairedTree, updates: optax.Updates, gradients: list[Any]) -> optax.Updates:
    """Returns updates in the dtypes of the gradients, see `rounding.widen`."""
    leaves = leaves_like(tree, updates, "updates")
    kept = [k for k, x in enumerate(leaves) if not isinstance(x, optax.MaskedNode)]
    pick = lambda values: [values[k] for k in kept]
    for k, x in zip(kept, narrow(pick(leaves), pick(gradients)), strict=True):
        leaves[k] = x
    return tree.treedef.unflatten(leaves)


def _decay_active(
    tree: PairedTree, decayed: Any, directions: list[Any], active: jax.Array
) -> optax.Updates:
    """Returns the decayed updates; for inactive factors their directions, which are zero.

    Zeros in their place would be an array to the compiler, the same as those in which gradients
    begin to be summed, and kept from there to here.
    """
    leaves = leaves_like(tree, decayed, "updates")
    a_is_active = active == A_IS_ACTIVE
    for pair in tree.pairs:
        for k, moves in ((pair.a, a_is_active), (pair.b, ~a_is_active)):
            leaves[k] = jnp.where(moves, leaves[k], directions[k])
    return tree.treedef.unflatten(leaves)
