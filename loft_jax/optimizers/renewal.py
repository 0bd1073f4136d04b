"""Renewal of the adapters of a tree, with the states of the LoFT optimizers that train them."""

import functools
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from loft_jax.algorithm.basis import orthonormal_basis
from loft_jax.algorithm.pair import FactorPair, Moments
from loft_jax.algorithm.renewal import (
    DIRECTIONS,
    Directions,
    RenewalInput,
    carry_moments,
    renew_factors,
)
from loft_jax.algorithm.second_moment import SECOND_MOMENTS, SecondMoment
from loft_jax.execution.groups import Group, group_pairs
from loft_jax.optimizers.adamw import ScaleByLoftAdamState
from loft_jax.optimizers.masked import is_masked, mask_as, unmask
from loft_jax.optimizers.mirrored import check_other_state, restart_accumulation
from loft_jax.optimizers.muon import ScaleByLoftMuonState
from loft_jax.optimizers.options import Off, second_moment_name
from loft_jax.optimizers.sgd import ScaleByLoftMomentumState
from loft_jax.pairs.find import Pair, PairedTree, find_pairs
from loft_jax.pairs.spec import PerPair, first_match, is_entries

_STATES = (ScaleByLoftAdamState, ScaleByLoftMomentumState, ScaleByLoftMuonState)


class _Plan(NamedTuple):
    """What happens to a pair: how many of its directions stay, and how many are new.

    `states` has the positions of the states that train the pair.
    """

    keep: int
    new: int
    states: tuple[int, ...]


class _Leaves(NamedTuple):
    """A LoFT state as flat lists in the order of the parameters' leaves, empty where it has none.

    Attributes:
      basis, mu, nu: its trees.
      second_moment: how ``nu`` is kept.
    """

    basis: list[Any]
    mu: list[Any]
    nu: list[Any]
    second_moment: SecondMoment | None

    def has(self, factor: int) -> bool:
        """Whether the state is of the factor at this position, and not masked there."""
        return bool(self.basis) and not is_masked(self.basis[factor])


@jax.default_matmul_precision("highest")
def renew_adapter(
    adapter: optax.Params,
    state: optax.OptState,
    key: jax.Array,
    *,
    pairs: Any = None,
    keep: PerPair,
    rank: PerPair,
    directions: str | Directions,
    size: float,
) -> tuple[optax.Params, optax.OptState]:
    """Returns renewed factors, and the state of their optimizer in the new bases.

    See `loft_jax.adapters.renew` for the arguments and the errors.
    """
    tree = find_pairs(adapter, pairs)
    if sharded := [k for k in range(len(tree.leaves)) if tree.sharded(k).axes]:
        raise ValueError(
            f"{tree.paths[sharded[0]]} is sharded by a shard_map. Renew adapters outside of it, "
            "under jit"
        )
    is_state = lambda x: isinstance(x, _STATES)
    flat, treedef = jax.tree.flatten(state, is_leaf=is_state)
    states = [_read(tree, x) for x in flat if is_state(x)]
    _check_states(tree, states)
    check_other_state(tree, state, _STATES)
    plans = _plans(tree, keep, rank, states)
    choose = _directions(directions, states, any(plan.new for plan in plans))
    if not (isinstance(size, jax.Array) or 0 < size < math.inf):
        raise ValueError(f"size must be positive and finite, got {size!r}")

    leaves = list(tree.leaves)
    new_states = [x._replace(basis=[*x.basis], mu=[*x.mu], nu=[*x.nu]) for x in states]
    for number, (plan, members) in enumerate(plans.items()):
        _check_ablations(tree, members, plan, flat)
        part = PairedTree(tree.paths, tree.leaves, tree.treedef, tuple(members), tree.splits)
        key_of_plan = jax.random.fold_in(key, number)
        for k, group in enumerate(group_pairs(part)):
            renew = functools.partial(_renew_group, group, plan, choose, size)
            renew(jax.random.fold_in(key_of_plan, k), tree.leaves, leaves, states, new_states)
    written = iter(new_states)
    flat = [_write(tree, x, next(written)) if is_state(x) else x for x in flat]
    new = tree.treedef.unflatten(leaves)
    return new, restart_accumulation(treedef.unflatten(flat), new)


def _renew_group(
    group: Group,
    plan: _Plan,
    directions: Directions,
    size: float,
    key: jax.Array,
    old_leaves: Sequence[jax.Array],
    new_leaves: list[jax.Array],
    old_states: Sequence[_Leaves],
    new_states: Sequence[_Leaves],
) -> None:
    """Writes the renewed factors of a group to the new leaves, and its moments to the states."""
    kind = group.kind
    of_both = lambda leaves: FactorPair(group.matrices("a", leaves), group.matrices("b", leaves))
    of_group = plan.states
    moments = of_both(old_states[of_group[0]].mu) if of_group else None
    given = RenewalInput(of_both(old_leaves), moments)

    def renew(key: jax.Array, given: RenewalInput) -> FactorPair[jax.Array]:
        return renew_factors(key, given, plan.keep, plan.new, directions, size)

    keys = jax.random.split(key, kind.batch) if kind.batch else key
    factors = kind.over_batch(renew)(keys, given)
    group.put_matrices("a", factors.a, new_leaves, old_leaves)
    group.put_matrices("b", factors.b, new_leaves, old_leaves)
    for k in of_group:
        old, new = old_states[k], new_states[k]
        carry = kind.over_batch(functools.partial(carry_moments, old.second_moment))
        for own, partner in ("ab", "ba"):
            basis_of = kind.over_batch(functools.partial(orthonormal_basis, scale=kind.scale))
            bases = basis_of(getattr(given.factors, partner)), basis_of(getattr(factors, partner))
            before = [group.matrices(own, x) if x else None for x in (old.mu, old.nu)]
            after = carry(Moments(*before), group.matrices(partner, old.basis), *bases)
            group.put_matrices(partner, bases[1].matrix, new.basis, old.basis)
            for x, target, like in zip(after, (new.mu, new.nu), (old.mu, old.nu), strict=True):
                if x is not None:
                    group.put_matrices(own, x, target, like)


def _read(tree: PairedTree, state: Any) -> _Leaves:
    like = tree.treedef.unflatten(tree.leaves)

    def flat(field: Any) -> list[Any]:
        if field is None:
            return []
        try:
            return tree.treedef.flatten_up_to(unmask(field, like))
        except (ValueError, TypeError) as error:
            raise ValueError(
                "The state does not have the structure of the adapter. For an nnx.Optimizer use "
                "loft_jax.adapters.renew_model. Elsewhere pass the tree of parameters that the "
                f"optimizer was given. JAX says: {str(error)[:200]}"
            ) from error

    nu = flat(getattr(state, "nu", None))
    second_moment = SECOND_MOMENTS[second_moment_name(state.options)] if nu else None
    return _Leaves(flat(state.basis), flat(state.mu), nu, second_moment)


def _write(tree: PairedTree, state: Any, leaves: _Leaves) -> Any:
    fields = {name: x for name, x in leaves._asdict().items() if isinstance(x, list) and x}
    put = lambda name, new: mask_as(tree.treedef.unflatten(new), getattr(state, name))
    return state._replace(**{name: put(name, x) for name, x in fields.items()})


def _plans(
    tree: PairedTree, keep: PerPair, rank: PerPair, states: Sequence[_Leaves]
) -> dict[_Plan, list[Pair]]:
    """Returns the pairs by what happens to them."""
    paths = [tree.paths[pair.a] for pair in tree.pairs]
    if not paths:
        return {}
    _check_counts("keep", keep, paths)
    _check_counts("rank", rank, paths)
    found: dict[_Plan, list[Pair]] = {}
    for pair, path in zip(tree.pairs, paths, strict=True):
        size, given = min(pair.m, pair.n), first_match(rank, path)
        new_rank = pair.r if given is None else given
        if given is not None and not 1 <= given <= size:
            raise ValueError(
                f"{path}: the new rank must be from 1 to {size}, the smaller size of its weight, "
                f"got {given}"
            )
        largest = min(pair.r, new_rank)
        # A change of rank keeps all that it can, and a renewal what it is told.
        kept = largest if keep is None else first_match(keep, path) or 0
        if not 0 <= kept <= largest:
            raise ValueError(
                f"{path}: keep must be from 0 to {largest}, the smaller of the old and the new "
                f"rank, got {kept}"
            )
        if kept < new_rank and new_rank > size:
            raise ValueError(
                f"{path}: its rank is {new_rank}, and its weight has {size} directions only: "
                f"lower the rank with change_rank, or keep={pair.r} for this pair"
            )
        trained_by = tuple(k for k, state in enumerate(states) if state.has(pair.a))
        found.setdefault(_Plan(kept, new_rank - kept, trained_by), []).append(pair)
    return found


def _check_counts(name: str, value: PerPair, paths: Sequence[str]) -> None:
    """Checks that a ``keep`` or ``rank`` is a whole number, or such numbers by regex.

    Raises:
      ValueError: it is something else, or a regex matches no adapter.
    """
    if value is None:
        return
    named = value if is_entries(value) else ((".*", value),)
    for entry in named:
        regex, number = entry
        if not isinstance(number, (int, np.integer)) or isinstance(number, bool):
            raise ValueError(
                f"{name} must be a whole number, or (regex of the path of a, whole number) "
                f"entries, got {value!r}"
            )
        if not any(re.fullmatch(regex, path) for path in paths):
            raise ValueError(
                f"{name}: {regex!r} matches no adapter. Their paths are {', '.join(paths[:5])}"
                + ", ..." * (len(paths) > 5)
            )


def _directions(
    directions: str | Directions, states: Sequence[_Leaves], needed: bool
) -> Directions:
    if callable(directions):
        return directions
    if directions not in DIRECTIONS:
        names = ", ".join(map(repr, DIRECTIONS))
        raise ValueError(f"directions must be a function or one of {names}, got {directions!r}")
    if needed and directions == "momentum" and not all(state.mu for state in states):
        raise ValueError(
            "directions='momentum' needs a first moment, and loft_sgd without momentum has none: "
            "use 'random' or a function"
        )
    return DIRECTIONS[directions]


def _check_states(tree: PairedTree, states: Sequence[_Leaves]) -> None:
    if not states:
        raise ValueError(
            "The state holds none of a LoFT optimizer, whose moments a renewal could carry over. "
            "Pass the whole optimizer state of loft_adamw, loft_muon or loft_sgd; for an "
            "nnx.Optimizer use loft_jax.adapters.renew_model. With another optimizer, merge the "
            "adapter, draw a new one, and make the state anew"
        )
    if not all(state.basis for state in states):
        return
    for pair in tree.pairs:
        if not any(state.has(pair.a) for state in states):
            raise ValueError(
                f"{tree.paths[pair.a]}: no LoFT optimizer in the state trains this pair. Leave "
                "frozen adapters out of the tree to be renewed"
            )


def _check_ablations(
    tree: PairedTree, members: Sequence[Pair], plan: _Plan, states: Sequence[Any]
) -> None:
    """Moments in raw coordinates have no orthonormal basis to be carried from."""
    for state in states:
        options = getattr(state, "options", None)
        if options is not None and any(isinstance(option, Off) for option in options):
            raise ValueError(
                f"{tree.paths[members[0].a]}: the state was made with {options}. A renewal carries "
                "moments in orthonormal bases: it needs scale_gradient, calibrate and reconstruct"
            )
