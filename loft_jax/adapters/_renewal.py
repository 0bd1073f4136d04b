"""Renews adapters in the middle of training: other directions, the same model."""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import optax
from flax import nnx

from loft_jax.adapters._trees import add_products, find_weight, find_with_weights
from loft_jax.algorithm.renewal import Directions
from loft_jax.execution.explicit_mesh import in_auto_axes
from loft_jax.optimizers.renewal import renew_adapter
from loft_jax.pairs.find import PairedTree, path_string
from loft_jax.pairs.init_checks import check_as_made
from loft_jax.pairs.spec import PerPair


class Renewed(NamedTuple):
    """What training goes on with after `renew` or `change_rank`.

    Attributes:
      base: with the changed weights; all other leaves are those that were given.
      adapter: with the new factors.
      state: of the optimizer, with its moments in the new bases. Counters, schedules and the active
        factor are as before.
    """

    base: Any
    adapter: Any
    state: optax.OptState


def renew(
    base: Any,
    adapter: Any,
    state: optax.OptState,
    key: jax.Array,
    *,
    pairs: Any = None,
    keep: PerPair = 0,
    directions: str | Directions = "momentum",
    size: float = 1.0,
    weights: Sequence[tuple[str, str]] = (),
    transpose: Sequence[tuple[str, Sequence[int]]] = (),
) -> Renewed:
    r"""Gives each adapter new directions and goes on with the moments of the old ones.

    An adapter reaches a product of rank ``r`` at most. A renewal adds what it has learned to the
    frozen weight, ``W0 + s U V^T``, and chooses other factors, so that many renewals reach any
    rank. The optimizer does not start anew: LoFT's own calibration, ``T = Q_-^T Q``, carries both
    moments into the new bases. New directions enter with a product of their own, which is taken
    out of the frozen weight. So the weight of the model does not change, and a renewal that keeps
    all directions changes nothing.

    It is a pure function of arrays. Call it between two steps, under `jax.jit` or not, at intervals
    that you choose. docs/longruns.md has where this helped, and where it did harm.

    Args:
      base: a pytree that contains the base weights, floating point. Each renewal rounds them once:
        keep them in float32. In bfloat16 most of a small product is lost.
      adapter: a pytree of the factors.
      state: the optimizer's, with a state of `loft_adamw`, `loft_sgd`, `loft_muon` or of their
        cores inside, chained, masked, partitioned or injected. Other parts stay as they are. With
        `optax.MultiSteps` renew where no gradients are accumulated; under jit, where this cannot be
        checked, the accumulation starts anew.
      key: of the random numbers.
      pairs: as in the optimizers.
      keep: how many directions of each pair stay, with their part of the product: the leading
        singular vectors. A number, or ``(regex of the path of a, number)`` entries; pairs that no
        entry matches keep none.
      directions: the new ones. "random"; "momentum", the leading directions of the first moments,
        which are sketches of the mean gradient; or a function, see
        `loft_jax.algorithm.renewal.Directions`.
      size: the singular values with which new directions enter, relative to the root mean square
        of those of ``s U V^T``; positive. After a small one the first step turns the factors
        towards its gradient. Which is better depends on the interval: docs/longruns.md.
      weights, transpose: as in `merge`.

    Returns:
      The base, the adapter and the state to go on with, with all shapes and dtypes as before.

    Raises:
      ValueError: as `merge` (also for quantized weights) and as the optimizers; a ``keep`` that is
        no whole number, above the rank, or for no adapter; a ``size`` that is not positive; unknown
        ``directions``, "momentum" without a first moment, or columns of other shapes; a state
        without a LoFT optimizer, of other pairs, of an ablation, with gradients accumulated, or
        with another tree like the adapter (`optax.contrib.schedule_free`, `optax.ema`); leaves
        sharded by a shard_map.

    Warns:
      UserWarning: a weight has less than 32 bits; adapters were made with another scale.

    Example:
      >>> import jax.numpy as jnp
      >>> from loft_jax import loft_adamw
      >>> base = {"q": {"kernel": jnp.zeros((6, 5))}}
      >>> adapter = {"q": {"lora_a": jnp.ones((6, 2)), "lora_b": jnp.eye(2, 5)}}
      >>> tx = loft_adamw(1e-3)
      >>> new = renew(base, adapter, tx.init(adapter), jax.random.key(0), directions="random")
      >>> before, after = (x["q"]["lora_a"] @ x["q"]["lora_b"] for x in (adapter, new.adapter))
      >>> bool(jnp.allclose(new.base["q"]["kernel"] + after, before, atol=1e-6))
      True
    """
    plan = _Plan(keep, None, directions, size)
    return _renew(plan, base, adapter, state, key, pairs, weights, transpose)


def change_rank(
    base: Any,
    adapter: Any,
    state: optax.OptState,
    key: jax.Array,
    rank: PerPair,
    *,
    pairs: Any = None,
    directions: str | Directions = "momentum",
    size: float = 1.0,
    weights: Sequence[tuple[str, str]] = (),
    transpose: Sequence[tuple[str, Sequence[int]]] = (),
) -> Renewed:
    """Changes the rank of adapters in the middle of training, with the moments carried over.

    A larger rank keeps the factors as they are and adds directions: the moments of the old ones are
    carried exactly. A smaller rank keeps the leading singular vectors of the product; the rest of
    the product goes to the frozen weight, and the moments are projected. As in `renew`, the weight
    of the model does not change.

    The adapter's scale stays what it was. Keep the optimizer's rules: their scale is ``alpha /
    rank`` of the rule, whatever the rank of the factors. A new rule with the new rank would change
    it. Where you need one, give ``LoraPairs(scale=...)``, or the rule the ``alpha`` that keeps
    ``alpha / rank``: a linen `LoraModel` needs such a rule, as its shapes are the rule's.

    Args:
      base, adapter, state, key, pairs, directions, size, weights, transpose: as in `renew`.
      rank: the new one: a number, or ``(regex of the path of a, number)`` entries; pairs that no
        entry matches keep theirs.

    Returns:
      The base, the adapter and the state to go on with. Their shapes are new, and so a compiled
      step is compiled again.

    Raises:
      ValueError: as `renew`; a rank below 1 or above the smaller size of a weight.

    Example:
      >>> import jax.numpy as jnp
      >>> from loft_jax import loft_adamw
      >>> base = {"q": {"kernel": jnp.zeros((6, 5))}}
      >>> adapter = {"q": {"lora_a": jnp.ones((6, 2)), "lora_b": jnp.eye(2, 5)}}
      >>> tx = loft_adamw(1e-3)
      >>> new = change_rank(base, adapter, tx.init(adapter), jax.random.key(0), 3)
      >>> new.adapter["q"]["lora_a"].shape, new.state[0].mu["q"]["lora_b"].shape
      ((6, 3), (3, 5))
    """
    plan = _Plan(None, rank, directions, size)
    return _renew(plan, base, adapter, state, key, pairs, weights, transpose)


def renew_model(
    model: nnx.Module,
    optimizer: nnx.Optimizer,
    key: jax.Array,
    *,
    rank: PerPair = None,
    pairs: Any = None,
    keep: PerPair = 0,
    directions: str | Directions = "momentum",
    size: float = 1.0,
    weights: Sequence[tuple[str, str]] = (),
    transpose: Sequence[tuple[str, Sequence[int]]] = (),
) -> None:
    """Renews the adapters of an nnx model in place, or changes their rank.

    Args:
      model: with adapters of `add_lora` or of Flax, whose frozen weights are floating point.
      optimizer: an `nnx.Optimizer` of these adapters, with a LoFT optimizer inside.
      key: of the random numbers.
      rank: a new rank, as in `change_rank`; None renews at the same rank.
      keep: as in `renew`, where the rank stays.
      pairs, directions, size, weights, transpose: as in `renew`.

    Raises:
      ValueError: as `renew` and `change_rank`; a ``keep`` beside a ``rank``.

    Example:
      >>> import jax.numpy as jnp
      >>> from loft_jax import loft_adamw
      >>> from loft_jax.adapters import LoraRule, add_lora
      >>> model = nnx.Sequential(nnx.Linear(6, 5, rngs=nnx.Rngs(0)), nnx.relu)
      >>> rule = LoraRule(path="layers/0", rank=2, alpha=4, init_b=jax.nn.initializers.normal())
      >>> model = add_lora(model, rule, rngs=nnx.Rngs(1))
      >>> optimizer = nnx.Optimizer(model, loft_adamw(1e-3, pairs=rule), wrt=nnx.LoRAParam)
      >>> before = model(jnp.ones((1, 6)))
      >>> renew_model(model, optimizer, jax.random.key(0), pairs=rule)
      >>> bool(jnp.allclose(model(jnp.ones((1, 6))), before, atol=1e-5))
      True
    """
    plan = _Plan(keep if rank is None else None, rank, directions, size)
    if rank is not None and keep != 0:
        raise ValueError(
            "A change of rank keeps all directions that it can: leave keep out, or renew first"
        )
    adapters = optimizer.wrt
    trees = (
        nnx.as_pure(nnx.state(model, nnx.Not(adapters))),
        nnx.as_pure(nnx.state(model, adapters)),
        nnx.as_pure(optimizer.opt_state),
    )
    new = _renew(plan, *trees, key, pairs, weights, transpose)
    nnx.update(model, new.base)
    nnx.update(model, new.adapter)
    nnx.update(optimizer.opt_state, nnx.state(new.state))


class _Plan(NamedTuple):
    """What happens to the adapters: arguments of `renew_adapter`."""

    keep: PerPair
    rank: PerPair
    directions: str | Directions
    size: float


def _renew(
    plan: _Plan,
    base: Any,
    adapter: Any,
    state: optax.OptState,
    key: jax.Array,
    pairs: Any,
    weights: Sequence[tuple[str, str]],
    transpose: Sequence[tuple[str, Sequence[int]]],
) -> Renewed:
    tree = find_with_weights(adapter, pairs)
    # The warnings are of the line that calls `renew`, `change_rank` or `renew_model`.
    check_as_made(tree, pairs, "The renewal", "the weights differ", stacklevel=4)
    _check_precision(tree, base, weights)

    def on_arrays(base: Any, adapter: Any, state: Any, key: jax.Array) -> tuple[Any, Any, Any]:
        new, new_state = renew_adapter(adapter, state, key, pairs=pairs, **plan._asdict())
        terms = [(1, adapter), (-1, new)]
        return add_products(base, terms, pairs, weights, transpose), new, new_state

    like = (base, adapter, state)
    return Renewed(*in_auto_axes(on_arrays, base, adapter, state, key, out_like=like))


def _check_precision(tree: PairedTree, base: Any, weights: Sequence[tuple[str, str]]) -> None:
    """Warns of weights that round most of a small product away."""
    leaves = {path_string(path): x for path, x in jax.tree_util.tree_flatten_with_path(base)[0]}
    names = [find_weight(tree.paths[pair.a], leaves, weights) for pair in tree.pairs]
    if narrow := [name for name in names if leaves[name].dtype.itemsize < 4]:
        warnings.warn(
            f"{narrow[0]} is {leaves[narrow[0]].dtype}, so that a renewal rounds away most of a "
            "small product, and changes the model. Keep the weights that are renewed in float32",
            stacklevel=4,
        )
