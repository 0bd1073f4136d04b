"""Renewal of the adapters of a tree, with the states of the LoFT optimizers that train them."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
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
from loft_jax.execution.arguments import leaves_like
from loft_jax.execution.groups import Group, group_pairs
from loft_jax.optimizers.adamw import ScaleByLoftAdamState
from loft_jax.optimizers.muon import ScaleByLoftMuonState
from loft_jax.optimizers.options import Off, second_moment_name
from loft_jax.optimizers.sgd import ScaleByLoftMomentumState
from loft_jax.pairs.find import Pair, PairedTree, find_pairs
from loft_jax.pairs.spec import PerPair, first_match

_STATES = (ScaleByLoftAdamState, ScaleByLoftMomentumState, ScaleByLoftMuonState)


class _Plan(NamedTuple):
    """What happens to a pair: how many of its directions stay, and how many are new."""

    keep: int
    new: int


class _Leaves(NamedTuple):
    """A LoFT state as flat lists, in the order of the parameters' leaves.

    Attributes:
      basis, mu, nu: its trees; None where it has none.
      second_moment: how ``nu`` is kept.
    """

    basis: list[Any] | None
    mu: list[Any] | None
    nu: list[Any] | None
    second_moment: SecondMoment | None

    def has(self, factor: int) -> bool:
        """Whether the state is of the factor at this position, and not masked there."""
        return self.basis is not None and not isinstance(self.basis[factor], optax.MaskedNode)


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
    choose = _directions(directions, states)

    leaves = list(tree.leaves)
    new_states = [s._replace(**{f: _copy(getattr(s, f)) for f in s._fields[:3]}) for s in states]
    for number, (plan, members) in enumerate(_plans(tree, keep, rank).items()):
        _check_ablations(tree, members, plan, flat)
        part = PairedTree(tree.paths, tree.leaves, tree.treedef, tuple(members), tree.splits)
        key_of_plan = jax.random.fold_in(key, number)
        for k, group in enumerate(group_pairs(part)):
            renew = functools.partial(_renew_group, group, plan, choose, size)
            renew(jax.random.fold_in(key_of_plan, k), tree.leaves, leaves, states, new_states)
    written = iter(new_states)
    flat = [_write(tree, x, next(written)) if is_state(x) else x for x in flat]
    return tree.treedef.unflatten(leaves), treedef.unflatten(flat)


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
    """Writes the renewed factors of a group to the lists, and its moments."""
    kind, names = group.kind, ("a", "b")
    matrices = lambda leaves: FactorPair(*(group.matrices(name, leaves) for name in names))
    of_group = [k for k, state in enumerate(old_states) if state.has(group.leaves.a[0])]
    factors = matrices(old_leaves)
    first = next((old_states[k].mu for k in of_group), None)
    given = RenewalInput(factors, None if first is None else matrices(first))

    def renew(key: jax.Array, given: RenewalInput) -> FactorPair[jax.Array]:
        return renew_factors(key, given, plan.keep, plan.new, directions, size)

    keys = jax.random.split(key, kind.batch) if kind.batch else key
    new = kind.over_batch(renew)(keys, given)
    for name, of_name in zip(names, new, strict=True):
        group.put_matrices(name, of_name, new_leaves, old_leaves)

    bases_of = kind.over_batch(
        lambda pair: FactorPair(*(orthonormal_basis(x, kind.scale) for x in pair))
    )
    old_bases, new_bases = bases_of(factors), bases_of(new)
    for k in of_group:
        old, target = old_states[k], new_states[k]
        assert old.basis is not None
        carry = kind.over_batch(functools.partial(carry_moments, old.second_moment))
        previous = matrices(old.basis)
        for name, partner in (("a", "b"), ("b", "a")):
            of_name = lambda leaves, name=name: (
                None if leaves is None else group.matrices(name, leaves)
            )
            bases = [getattr(x, partner) for x in (old_bases, new_bases)]
            moments = Moments(of_name(old.mu), of_name(old.nu))
            carried = carry(moments, getattr(previous, partner), *bases)
            for before, after, leaves in zip(
                (old.mu, old.nu), (target.mu, target.nu), carried, strict=True
            ):
                if before is not None:
                    group.put_matrices(name, leaves, after, before)
            group.put_matrices(partner, bases[1].matrix, target.basis, old.basis)


def _read(tree: PairedTree, state: Any) -> _Leaves:
    flat = lambda field: None if field is None else leaves_like(tree, field, "states")
    basis, mu, nu = flat(state.basis), flat(state.mu), flat(getattr(state, "nu", None))
    second_moment = None
    if nu is not None:
        second_moment = SECOND_MOMENTS[second_moment_name(state.options)]
    return _Leaves(basis, mu, nu, second_moment)


def _write(tree: PairedTree, state: Any, leaves: _Leaves) -> Any:
    fields = {f: x for f, x in leaves._asdict().items() if isinstance(x, list)}
    return state._replace(**{f: tree.treedef.unflatten(x) for f, x in fields.items()})


def _copy(leaves: list[Any] | None) -> list[Any] | None:
    return None if leaves is None else list(leaves)


def _plans(tree: PairedTree, keep: PerPair, rank: PerPair) -> dict[_Plan, list[Pair]]:
    """Returns the pairs by what happens to them."""
    found: dict[_Plan, list[Pair]] = {}
    for pair in tree.pairs:
        path = tree.paths[pair.a]
        new_rank = first_match(rank, path)
        new_rank = pair.r if new_rank is None else new_rank
        if not 1 <= new_rank <= min(pair.m, pair.n):
            raise ValueError(
                f"{path}: the new rank must be from 1 to {min(pair.m, pair.n)}, the smaller size "
                f"of its weight, got {new_rank}"
            )
        kept = first_match(keep, path)
        largest = min(pair.r, new_rank)
        kept = largest if kept is None else kept
        if not 0 <= kept <= largest:
            raise ValueError(
                f"{path}: keep must be from 0 to {largest}, the smaller of the old and the new "
                f"rank, got {kept}"
            )
        found.setdefault(_Plan(kept, new_rank - kept), []).append(pair)
    return found


def _directions(directions: str | Directions, states: Sequence[_Leaves]) -> Directions:
    if callable(directions):
        return directions
    if directions not in DIRECTIONS:
        names = ", ".join(map(repr, DIRECTIONS))
        raise ValueError(f"directions must be a function or one of {names}, got {directions!r}")
    if directions == "momentum" and any(state.mu is None for state in states):
        raise ValueError(
            "directions='momentum' needs a first moment, and loft_sgd without momentum has none: "
            "use 'random' or a function"
        )
    return DIRECTIONS[directions]


def _check_states(tree: PairedTree, states: Sequence[_Leaves]) -> None:
    if not states:
        raise ValueError(
            "The state holds none of a LoFT optimizer, whose moments a renewal could carry over. "
            "Pass the whole optimizer state of loft_adamw, loft_muon or loft_sgd. With another "
            "optimizer, merge the adapter, draw a new one, and make the state anew"
        )
    if any(state.basis is None for state in states):
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

