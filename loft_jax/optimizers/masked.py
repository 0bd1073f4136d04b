"""Trees from which `optax.masked` or `optax.partition` hides leaves or whole subtrees."""

from typing import Any

import jax
import optax


def is_masked(x: Any) -> bool:
    """Whether a leaf or subtree is hidden."""
    return isinstance(x, optax.MaskedNode)


def unmask(tree: Any, like: Any) -> Any:
    """Returns a tree with the structure of another: one `optax.MaskedNode` for each hidden leaf.

    Raises:
      ValueError, TypeError: the structures differ otherwise.

    Example:
      >>> unmask({"q": optax.MaskedNode(), "k": 1}, {"q": {"a": 3, "b": 4}, "k": 5})
      {'k': 1, 'q': {'a': MaskedNode(), 'b': MaskedNode()}}
    """
    expand = lambda x, subtree: jax.tree.map(lambda _: x, subtree) if is_masked(x) else x
    return jax.tree.map(expand, tree, like, is_leaf=is_masked)


def mask_as(tree: Any, like: Any) -> Any:
    """Returns a tree in which all is hidden that is hidden in another.

    Example:
      >>> mask_as({"q": {"a": 3, "b": 4}, "k": 5}, {"q": optax.MaskedNode(), "k": 1})
      {'k': 5, 'q': MaskedNode()}
    """
    hide = lambda masked, subtree: masked if is_masked(masked) else subtree
    return jax.tree.map(hide, like, tree, is_leaf=is_masked)
