"""From the step of an optimizer on flat leaves to an Optax transformation.

A `Core` works on a `PairedTree`, so that the pairs of a tree are found once an update, however many
parts the optimizer has.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from loft_jax.execution.alternation import A_IS_ACTIVE
from loft_jax.execution.arguments import leaves_like, read_arguments
from loft_jax.execution.balance import balance_updates
from loft_jax.execution.explicit_mesh import in_auto_axes
from loft_jax.execution.rounding import narrow, widen
from loft_jax.pairs.find import PairedTree, find_pairs
from loft_jax.pairs.init_checks import warn_of_pairs

Mask = Any | Callable[[optax.Params], Any] | None


class Core(NamedTuple):
    """An optimizer without learning rate and weight decay.

    Attributes:
      init: ``(tree) -> state``.
      step: ``(hyperparams, tree, gradients, state) -> (directions, state)`` on flat lists of
        leaves; the tree holds the parameters.
      hyperparams: a pytree of numbers, which `optax.inject_hyperparams` may have made arrays.
      sharded: whether it sums over the shards of a shard_map.
    """

    init: Callable[[PairedTree], Any]
    step: Callable[[Any, PairedTree, list[Any], Any], tuple[list[Any], Any]]
    hyperparams: Any = ()
    sharded: bool = True


def as_transformation(core: Core, pairs: Any) -> optax.GradientTransformationExtraArgs:
    """Returns a core as an Optax transformation."""

    def init(params: optax.Params) -> optax.OptState:
        return core.init(check_pairs(params, pairs))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        tree, gradients = read_arguments(params, updates, pairs, sharded=core.sharded)
        directions, state = in_auto_axes(
            core.step,
            core.hyperparams,
            tree,
            widen(gradients),
            state,
            out_like=(tree.leaves, state),
        )
        return tree.treedef.unflatten(narrow(directions, gradients)), state

    return optax.with_extra_args_support(optax.GradientTransformation(init, update))


def descend(
    core: Core,
    learning_rate: optax.ScalarOrSchedule,
    pairs: Any,
    *,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask = None,
    alternate: bool = False,
    balance: bool = False,
    others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adds decoupled weight decay and a learning rate to a core.

    Args:
      core: gives the directions. With ``alternate`` its state has an ``active`` factor.
      learning_rate: a number or a schedule of the step.
      pairs: how to find the pairs.
      weight_decay: a number or a schedule, times the learning rate.
      mask: a tree of booleans, or a function from parameters to one, of what to decay.
      alternate: whether one factor of a pair rests, which then does not decay either.
      balance: whether the updates also balance the factors; then the core's steps must depend on
        their product alone.
      others: a complete optimizer of the leaves outside pairs, which gets the core's directions of
        these; None treats them like the factors.

    Returns:
      A transformation whose state is the tuple of the states of the core, the weight decay, the
      learning rate and, where given, of ``others``.
    """
    decay = optax.add_decayed_weights(weight_decay, mask)
    rate = optax.scale_by_learning_rate(learning_rate)

    def init(params: optax.Params) -> tuple[Any, ...]:
        tree = check_pairs(params, pairs)
        own, rest = _separate(tree, tree.leaves, others)
        states = core.init(tree), decay.init(own), rate.init(own)
        return states if others is None else (*states, others.init(rest))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        tree, gradients = read_arguments(params, updates, pairs, sharded=core.sharded)
        core_state, decay_state, rate_state, *others_state = state
        leaves, after = in_auto_axes(
            core.step,
            core.hyperparams,
            tree,
            widen(gradients),
            core_state,
            out_like=(tree.leaves, core_state),
        )
        own, rest = _separate(tree, tree.leaves, others)
        directions, _ = _separate(tree, leaves, others)
        decayed, decay_state = decay.update(directions, decay_state, own)
        if alternate:
            decayed = _decay_active(tree, decayed, leaves, core_state.active)
        updates, rate_state = rate.update(decayed, rate_state, own)
        states = after, decay_state, rate_state
        if balance:
            updates = _balance(tree, updates, core_state.active)
        updates = _narrow(tree, updates, gradients)
        if others is None:
            return updates, states
        _, of_rest = _separate(tree, narrow(leaves, gradients), others)
        of_rest, rest_state = optax.with_extra_args_support(others).update(
            of_rest, others_state[0], rest, **extra
        )
        return _join(tree, updates, of_rest), (*states, rest_state)

    return optax.GradientTransformationExtraArgs(init, update)


def check_pairs(params: optax.Params, pairs: Any) -> PairedTree:
    """Returns parameters with their pairs, and warns of what looks like a mistake."""
    tree = find_pairs(params, pairs)
    warn_of_pairs(tree, pairs)
    return tree


def _separate(
    tree: PairedTree, leaves: list[Any], others: optax.GradientTransformation | None
) -> tuple[Any, Any]:
    """Returns the leaves as a tree of the factors and one of the others, which mask each other."""
    if others is None:
        return tree.treedef.unflatten(leaves), None
    outside, masked = set(tree.others), optax.MaskedNode()
    own = [masked if k in outside else leaf for k, leaf in enumerate(leaves)]
    rest = [leaf if k in outside else masked for k, leaf in enumerate(leaves)]
    return tree.treedef.unflatten(own), tree.treedef.unflatten(rest)


def _join(tree: PairedTree, own: Any, rest: Any) -> Any:
    """Inverse of `_separate`."""
    leaves, of_rest = leaves_like(tree, own, "updates"), leaves_like(tree, rest, "updates")
    for k in tree.others:
        leaves[k] = of_rest[k]
    return tree.treedef.unflatten(leaves)


def _balance(tree: PairedTree, updates: optax.Updates, active: jax.Array) -> optax.Updates:
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
    """Returns the decayed updates, for resting factors their directions, which are zero.

    Zeros in their place would be an array to the compiler, the same as those in which gradients
    begin to be summed, and kept from there to here.
    """
    leaves = leaves_like(tree, decayed, "updates")
    a_is_active = active == A_IS_ACTIVE
    for pair in tree.pairs:
        for k, moves in ((pair.a, a_is_active), (pair.b, ~a_is_active)):
            leaves[k] = jnp.where(moves, leaves[k], directions[k])
    return tree.treedef.unflatten(leaves)
