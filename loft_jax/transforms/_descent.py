"""From a direction to a step: weight decay and learning rate, for factors that take turns."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from loft_jax._pairs import LoraPairs, PairedTree, find_pairs
from loft_jax.transforms import _alternation
from loft_jax.transforms._factors import leaves_like


def descend(
    core: optax.GradientTransformationExtraArgs,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: optax.ScalarOrSchedule,
    mask: Any | Callable[[optax.Params], Any] | None,
    alternate: bool,
    moves_first: _alternation.FactorName,
    pairs: LoraPairs | None,
) -> optax.GradientTransformationExtraArgs:
    """Chains a core with decoupled weight decay and a learning rate.

    `optax.chain`, but that a factor which rests does not decay either; the core's state has a
    ``turn``. The state is a tuple of the three states.
    """
    decay = optax.add_decayed_weights(weight_decay, mask)
    rate = optax.scale_by_learning_rate(learning_rate)

    def init(params: optax.Params) -> tuple[Any, Any, Any]:
        return core.init(params), decay.init(params), rate.init(params)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        core_state, decay_state, rate_state = state
        directions, after = core.update(updates, core_state, params)
        updates, decay_state = decay.update(directions, decay_state, params)
        if alternate:
            tree = find_pairs(params, pairs)
            updates = _only_moving(updates, directions, tree, core_state.turn, moves_first)
        updates, rate_state = rate.update(updates, rate_state, params)
        return updates, (after, decay_state, rate_state)

    return optax.with_extra_args_support(optax.GradientTransformation(init, update))


def _only_moving(
    decayed: optax.Updates,
    directions: optax.Updates,
    tree: PairedTree,
    turn: jax.Array,
    moves_first: str,
) -> optax.Updates:
    """The decayed updates, but of factors that rest at this turn their directions, which are zero.

    Zeros in their place would be an array to the compiler, the same as those in which gradients
    begin to be summed, and kept from there to here.
    """
    leaves, resting = (leaves_like(tree, x, "updates") for x in (decayed, directions))
    moves_a = _alternation.a_moves(turn, moves_first)
    for pair in tree.pairs:
        for k, moves in ((pair.a, moves_a), (pair.b, ~moves_a)):
            leaves[k] = jnp.where(moves, leaves[k], resting[k])
    return tree.treedef.unflatten(leaves)
