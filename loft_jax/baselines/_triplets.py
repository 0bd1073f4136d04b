"""Find the factors and the singular values of each AdaLoRA adapter in a pytree."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from loft_jax.pairs.find import Pair, PairedTree, find_pairs

# The path of `a` and the path of its singular values, for the rules of `LoraPairs`.
DEFAULT_VALUES: tuple[tuple[str, str], ...] = (
    (r"(.*[/_]|)lora_a(/kernel|)", r"\1lora_e\2"),
    (r"(.*/|)lora/a", r"\1lora/e"),
    (r"(.*/|)lora_(kernel|embeddings)_a", r"\1lora_\2_e"),
)


class Triplets(NamedTuple):
    """An adapter with its singular values: a pair, and the position of its ``lora_e``."""

    pair: Pair
    e: int

    def per_triplet(self, leaves: Sequence[Any]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns ``a``, ``e`` and ``b`` with the triplet as the last axis."""
        a, b = leaves[self.pair.a], leaves[self.pair.b]
        return self.pair.layout_a.matricize(a), leaves[self.e], self.pair.layout_b.matricize(b)


def find_triplets(
    params: optax.Params,
    pairs: Any = None,
    values: tuple[tuple[str, str], ...] = DEFAULT_VALUES,
) -> tuple[PairedTree, tuple[Triplets, ...]]:
    """Finds the pairs of `find_pairs`, each with its leaf of singular values.

    Raises:
      ValueError: as `find_pairs`; a pair without its ``e``, or an ``e`` of another shape.

    Example:
      >>> params = {"lora_a": jnp.ones((6, 2)), "lora_b": jnp.ones((2, 4)), "lora_e": jnp.ones(2)}
      >>> tree, (adapter,) = find_triplets(params)
      >>> tree.paths[adapter.e]
      'lora_e'
    """
    tree = find_pairs(params, pairs)
    positions = {path: k for k, path in enumerate(tree.paths)}
    found, problems = [], []
    for pair in tree.pairs:
        path = tree.paths[pair.a]
        matches = ((re.fullmatch(regex, path), template) for regex, template in values)
        wanted = next((match.expand(template) for match, template in matches if match), None)
        shape = (*pair.batch, pair.r)
        if wanted not in positions:
            problems.append(f"{path}: no singular values at {wanted or 'any path of values='}")
        elif jnp.shape(tree.leaves[positions[wanted]]) != shape:
            problems.append(
                f"{wanted} has shape {jnp.shape(tree.leaves[positions[wanted]])}, not {shape}"
            )
        else:
            found.append(Triplets(pair, positions[wanted]))
    if problems:
        raise ValueError(
            "These adapters are no triplets a (in, r), e (r,), b (r, out). Name each e with "
            "adalora(values=((regex of a's path, template of e's path),)), and give plain LoRA "
            "pairs another optimizer with optax.partition:\n  " + "\n  ".join(problems)
        )
    return tree, tuple(found)


def members(adapters: Sequence[Triplets]) -> list[int]:
    """Returns the positions of all factors and singular values."""
    return [k for adapter in adapters for k in (adapter.pair.a, adapter.e, adapter.pair.b)]
