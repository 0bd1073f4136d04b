"""Which leaves of a pytree are the two factors of one low-rank adapter.

An adapter adds ``scale * a @ b`` to a weight. Its factors are two leaves of the parameters, found
by their names; the optimizers see each as a tall matrix, ``(*batch, dimension, rank)``, whatever
its layout in the tree, and treat both sides with the same functions.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from loft_jax._axes import FactorLayout, LoraAxes, guess_axes, read_layout, split_rows
from loft_jax._rows import WHOLE, Rows
from loft_jax._splits import Split, find_splits

DEFAULT_RULES: tuple[tuple[str, str], ...] = (
    # flax.nnx.LoRA, qwix and tunix (`kernel_lora_a`), plain `lora_a`.
    (r"(.*[/_]|)lora_a", r"(.*[/_]|)lora_b"),
    # gemma.peft: bare `a` and `b`, so only under a parent of that name.
    (r"(.*/|)lora/a", r"(.*/|)lora/b"),
    # MaxText's older layout.
    (r"(.*[/_]|)lora_a/kernel", r"(.*[/_]|)lora_b/kernel"),
    # Keras 3.
    (r"(.*/|)lora_(kernel|embeddings)_a", r"(.*/|)lora_(kernel|embeddings)_b"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraPairs:
    """Says which parameters are low-rank pairs, how to read their axes, and their scale.

    It is a frozen value and not a function, so that it can be an argument of an optimizer under
    `optax.inject_hyperparams`, which would take a function for a schedule.

    Attributes:
      rules: pairs of regular expressions, for ``a`` and for ``b``, matched against whole paths
        (keys joined by ``/``). Two leaves are a pair when all groups of both matches agree.
      axes: a `LoraAxes` for all pairs, or ``(regex, LoraAxes)`` entries of which the first that
        matches the path of ``a`` counts. None: two-dimensional factors, any number of equal
        leading batch axes, or one factor with several row axes; else an error asks for them.
      scale: the adapter's own factor, ``alpha / r`` (``alpha / sqrt(r)`` for rsLoRA), one number
        for all pairs or ``(regex, number)`` entries as for ``axes`` (1 where none matches;
        `describe_pairs` shows what each pair got).
      specs: for an update inside `jax.shard_map` how that has split the leaves, ``(regex, spec)``
        entries as for ``axes``, matched against each leaf's own path;
        `loft_jax.sharding.shard_map_pairs` makes them of the ``in_specs``. Not used elsewhere.

    Raises:
      ValueError: a rule is no pair of valid expressions, or a scale is zero or not finite.
      TypeError: a field is not hashable (a list, a dict); use tuples.

    Example:
      >>> LoraPairs(scale=2.0).scale
      2.0
      >>> by_layer = LoraPairs(scale=((".*attention.*", 2.0), (".*", 0.5)))
      >>> scanned = LoraPairs(axes=LoraAxes(batch=(1,)))
      >>> other_names = LoraPairs(rules=((r"(.*)/down", r"(.*)/up"),))
    """

    rules: tuple[tuple[str, str], ...] = DEFAULT_RULES
    axes: LoraAxes | tuple[tuple[str, LoraAxes], ...] | None = None
    scale: float | tuple[tuple[str, float], ...] = 1.0
    specs: tuple[tuple[str, PartitionSpec], ...] = ()

    def __post_init__(self):
        try:
            hash((self.rules, self.axes, self.scale, self.specs))
        except TypeError as error:
            raise TypeError(
                f"LoraPairs takes tuples and numbers, not lists, dicts or arrays: {self}"
            ) from error
        fields = {
            "rules": self.rules,
            "axes": _entries(self.axes),
            "scale": _entries(self.scale),
            "specs": self.specs,
        }
        for name, entries in fields.items():
            if any(not isinstance(entry, tuple) or len(entry) != 2 for entry in entries):
                raise ValueError(
                    f"LoraPairs: {name} is a tuple of pairs, each with a regex first (mind the "
                    f"comma after a single pair), got {entries!r}"
                )
        patterns = [pattern for rule in self.rules for pattern in rule]
        told = (*_entries(self.axes), *_entries(self.scale), *self.specs)
        patterns += [regex for regex, _ in told]
        for pattern in patterns:
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise ValueError(
                    f"LoraPairs: {pattern!r} is no regular expression: {error}"
                ) from error
        for _, scale in _entries(self.scale):
            if not math.isfinite(scale) or scale == 0:
                raise ValueError(f"LoraPairs: a scale must be finite and not zero, got {scale}")

    def axes_of(self, path: str) -> LoraAxes | None:
        """The axes told for the pair whose ``a`` is at ``path``."""
        return next((v for regex, v in _entries(self.axes) if re.fullmatch(regex, path)), None)

    def scale_of(self, path: str) -> float:
        """The scale told for the pair whose ``a`` is at ``path``, 1 where none is."""
        found = (v for regex, v in _entries(self.scale) if re.fullmatch(regex, path))
        return float(next(found, 1.0))  # a NumPy number would promote what it multiplies


def _entries(value: Any) -> tuple[tuple[str, Any], ...]:
    if value is None:
        return ()
    return value if isinstance(value, tuple) else ((r"(?s).*", value),)


class Pair(NamedTuple):
    """A low-rank adapter: two leaves, by their position among the leaves of the tree.

    Attributes:
      a, b: positions of the factors.
      layout_a, layout_b: how each lies in its array.
      m, n, r: rows of ``a``, rows of ``b`` (each as a tall matrix), rank. All rows: in a shard_map
        those of all devices.
      batch: sizes of the batch axes, in a shard_map of this device's part.
      scale: the adapter's own scale.
      rows_a, rows_b: how the rows are spread over the devices of a shard_map.
    """

    a: int
    b: int
    layout_a: FactorLayout
    layout_b: FactorLayout
    m: int
    n: int
    r: int
    batch: tuple[int, ...]
    scale: float
    rows_a: Rows = WHOLE
    rows_b: Rows = WHOLE


class PairedTree(NamedTuple):
    """A flattened pytree and the pairs in it."""

    paths: tuple[str, ...]
    leaves: list[Any]
    treedef: Any
    pairs: tuple[Pair, ...]
    splits: tuple[Split, ...] = ()

    def parts(self, k: int) -> Rows:
        """How the leaf at a position is spread, along whichever of its axes."""
        return Rows(tuple(name for names in self.splits[k] for name in names))


def find_pairs(params: Any, pairs: LoraPairs | None = None) -> PairedTree:
    """Finds the low-rank pairs among the leaves of ``params``.

    Args:
      params: a pytree of arrays or of anything with a shape and a dtype. None, `optax.MaskedNode`
        and other childless nodes are no leaves.
      pairs: how to find them; None for the defaults.

    Raises:
      ValueError: a factor without its partner, an ambiguous one, factors whose shapes do not
        belong together, a rank above both dimensions, or leaves with no pair among them at all.
        The message lists the paths and the remedy.
      TypeError: a leaf that is no real floating-point array.

    Example:
      >>> params = {"q": {"lora_a": jnp.ones((6, 2)), "lora_b": jnp.zeros((2, 4))}}
      >>> (pair,) = find_pairs(params).pairs
      >>> pair.m, pair.n, pair.r
      (6, 4, 2)
    """
    pairs = LoraPairs() if pairs is None else pairs
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    paths = tuple(path_string(path) for path, _ in with_paths)
    leaves = [leaf for _, leaf in with_paths]
    if not leaves:  # optax.tree_map_params calls init with such a tree
        return PairedTree(paths, leaves, treedef, ())
    _check_dtypes(paths, leaves)
    splits = find_splits(paths, leaves, pairs.specs)
    found, problems = [], []
    for a, b in match_names(paths, pairs.rules):
        try:
            found.append(_read_pair(a, b, paths, leaves, splits, pairs))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError(_listing("These low-rank factors cannot be read:", problems))
    return PairedTree(paths, leaves, treedef, tuple(found), splits)


def path_string(path: Sequence[Any]) -> str:
    """Joins the keys of a pytree path by ``/``, without the ``.value`` of a Flax Variable.

    Example:
      >>> tree = {"layers": [{"lora_a": 1}]}
      >>> path_string(jax.tree_util.tree_flatten_with_path(tree)[0][0][0])
      'layers/0/lora_a'
    """
    keys = list(path)
    # nnx.Optimizer shows Variables to `init` and bare arrays to `update`.
    while keys and getattr(keys[-1], "name", None) in ("value", "raw_value"):
        keys.pop()
    return jax.tree_util.keystr(tuple(keys), simple=True, separator="/")


def _check_dtypes(paths: Sequence[str], leaves: Sequence[Any]) -> None:
    kinds = [leaf.dtype if hasattr(leaf, "dtype") else type(leaf) for leaf in leaves]
    bad = [
        f"{path}: {getattr(kind, '__name__', kind)}"
        for path, kind in zip(paths, kinds, strict=True)
        if kind is not float
        and not (hasattr(kind, "itemsize") and jnp.issubdtype(kind, jnp.floating))
    ]
    if bad:
        raise TypeError(
            _listing(
                "These parameters are not real floating-point arrays. Frozen or quantized weights "
                "belong outside the optimizer: give it the adapters alone (nnx.Optimizer(..., "
                "wrt=nnx.LoRAParam)), or wrap it in optax.masked or optax.partition.",
                bad,
            )
        )


def match_names(paths: Sequence[str], rules: Sequence[tuple[str, str]]) -> list[tuple[int, int]]:
    """Returns the positions of the leaves whose names make a pair, in the order of ``a``."""
    roles: dict[int, list[tuple[tuple, str]]] = {}
    members: dict[tuple, dict[str, list[int]]] = {}
    for number, rule in enumerate(rules):
        for role, regex in zip("ab", rule, strict=True):
            for position, path in enumerate(paths):
                if match := re.fullmatch(regex, path):
                    key = (number, *match.groups())
                    roles.setdefault(position, []).append((key, role))
                    members.setdefault(key, {"a": [], "b": []})[role].append(position)
    problems = [
        f"{paths[position]}: matched {len(taken)} times; make the rules exclusive"
        for position, taken in roles.items()
        if len(taken) > 1
    ]
    for key, sides in members.items():
        for role, other in ("ab", "ba"):
            if not sides[other]:
                wanted = rules[key[0]]["ab".index(other)]
                problems += [f"{paths[p]}: no partner matches {wanted!r}" for p in sides[role]]
        if len(sides["a"]) > 1 or len(sides["b"]) > 1:
            names = ", ".join(paths[p] for p in (*sides["a"], *sides["b"]))
            problems.append(f"{names}: more than two leaves in one pair; give the rules groups")
    if problems:
        raise ValueError(
            _listing(
                "These low-rank factors are unpaired or ambiguous. Both factors of an adapter must "
                "reach the same transformation (one label of optax.partition, one mask), under "
                "names that LoraPairs(rules=...) pairs:",
                problems,
            )
        )
    if not members:
        raise ValueError(
            _listing(
                "No low-rank pair was found. Name the factors with LoraPairs(rules=((regex of a, "
                "regex of b),)), or use optax.adamw for a tree without adapters. The leaves are:",
                list(paths),
            )
        )
    return sorted((sides["a"][0], sides["b"][0]) for sides in members.values())


def _read_pair(
    a: int,
    b: int,
    paths: Sequence[str],
    leaves: Sequence[Any],
    splits: Sequence[Split],
    pairs: LoraPairs,
) -> Pair:
    # Whole shapes, so that a pair reads the same inside a shard_map and outside.
    shape_a, shape_b = (
        tuple(Rows(names).count(part) for names, part in zip(splits[k], shape, strict=True))
        for k, shape in ((a, jnp.shape(leaves[a])), (b, jnp.shape(leaves[b])))
    )
    where = f"{paths[a]} {shape_a}, {paths[b]} {shape_b}"
    axes = pairs.axes_of(paths[a]) or guess_axes(shape_a, shape_b, where)
    layout_a = read_layout(shape_a, axes.batch, axes.rank_a, where)
    layout_b = read_layout(shape_b, axes.batch, axes.rank_b, where)
    stacked, stacked_b = (
        [s[x] for x in t.batch] for s, t in ((shape_a, layout_a), (shape_b, layout_b))
    )
    r = shape_a[layout_a.rank]
    if stacked != stacked_b or r != shape_b[layout_b.rank]:
        raise ValueError(
            f"{where}: batch axes or rank differ (a is (*batch, in, r), b is (*batch, r, out); "
            "else say so with LoraPairs(axes=...))"
        )
    if [splits[a][axis] for axis in layout_a.batch] != [splits[b][axis] for axis in layout_b.batch]:
        raise ValueError(f"{where}: a shard_map has split their batch axes differently")
    rows_a, rows_b = (
        split_rows(layout, splits[k], paths[k]) for layout, k in ((layout_a, a), (layout_b, b))
    )
    m = math.prod(shape_a[axis] for axis in layout_a.rows)
    n = math.prod(shape_b[axis] for axis in layout_b.rows)
    batch = tuple(jnp.shape(leaves[a])[axis] for axis in layout_a.batch)
    if min(m, n, *batch, 1) == 0:
        raise ValueError(f"{where}: an axis of length zero leaves nothing to train")
    if r > max(m, n) or r == 0:
        raise ValueError(
            f"{where}: rank {r} must be at least 1 and at most {max(m, n)}, the larger side of the "
            f"{m} x {n} weight; a higher one adds nothing, so lower it. If these are not the axes "
            "of the rank, as in PyTorch's layout, name them: LoraPairs(axes=LoraAxes(rank_a=0, "
            "rank_b=-1))"
        )
    scale = pairs.scale_of(paths[a])
    return Pair(a, b, layout_a, layout_b, m, n, r, batch, scale, rows_a, rows_b)


def _listing(headline: str, lines: Sequence[str], most: int = 12) -> str:
    shown = [f"  {line}" for line in lines[:most]]
    if len(lines) > most:
        shown.append(f"  and {len(lines) - most} more")
    return "\n".join([headline, *shown])
