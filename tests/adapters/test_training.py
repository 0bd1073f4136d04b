"""Every kind of adapter in a Flax model trains with `loft_adamw`; the kinds are rows of a table.

A row is a model with its adapters. Its loss must fall, and every adapted weight must move exactly
as it would with plain two-dimensional factors: the same factors, reshaped by hand to (in, r) and
(r, out), are also trained by the same optimizer without `axes`.
"""

import importlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from optimizers import hasty_compiler as hasty_compiler

from loft_jax import LoraAxes, LoraPairs, clip_by_projected_global_norm, loft_adamw
from loft_jax.adapters import (
    LoraModel,
    LoraRule,
    add_lora,
    join,
    quantize,
    qwix_provider,
    split,
)

normal = jax.nn.initializers.normal
STEPS = 20


class Row(NamedTuple):
    """An adapter in a model.

    Attributes:
      adapter: the factors, any tree.
      predict: (adapter, x) -> y.
      x: inputs.
      pairs: the argument of the optimizer: the rule, or what a user specifies without one.
      matrices: adapter -> {name: {"lora_a": (in, r), "lora_b": (r, out)}}, by hand: a linear
        rearrangement of the numbers.
      scale: alpha / r, independent of how the optimizer reads it.
    """

    adapter: Any
    predict: Callable[[Any, jax.Array], jax.Array]
    x: jax.Array
    pairs: LoraRule | LoraPairs
    matrices: Callable[[Any], dict[str, dict[str, jax.Array]]]
    scale: float


ROWS: dict[str, Callable[[], Row]] = {}


def row(make: Callable[[], Row]) -> Callable[[], Row]:
    """Adds a row to the table."""
    ROWS[make.__name__.replace("_", " ")] = make
    return make


def flat(tree: Any) -> dict[str, jax.Array]:
    """The factors by path."""
    with_paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    join_keys = lambda keys: jax.tree_util.keystr(keys, simple=True, separator="/")
    return {join_keys(keys).removesuffix("/value"): leaf for keys, leaf in with_paths}


def matrix(a: jax.Array, b: jax.Array, r: int) -> dict[str, jax.Array]:
    """Factors with the rank last in `a` and first in `b`, as two matrices."""
    return {"lora_a": a.reshape(-1, r), "lora_b": b.reshape(r, -1)}


def each(tree: Any, r: int, a: str = "lora_a", b: str = "lora_b") -> dict[str, Any]:
    """All pairs of a tree whose factors have no batch axis."""
    leaves = flat(tree)
    return {
        name: matrix(leaf, leaves[re.sub(a + r"(?=$|/\w+$)", b, name)], r)
        for name, leaf in leaves.items()
        if re.search(rf"{a}($|/\w+$)", name)
    }


def stacked(tree: Any, r: int, axis: int) -> dict[str, Any]:
    """All pairs of a tree, one for each layer of a stack on that axis."""
    leaves = flat(tree)
    return {
        f"{name}[{k}]": matrix(
            jnp.take(leaf, k, axis), jnp.take(leaves[name.replace("lora_a", "lora_b")], k, axis), r
        )
        for name, leaf in leaves.items()
        if "lora_a" in name
        for k in range(leaf.shape[axis])
    }


def float64(tree: Any) -> Any:
    """Casts to double precision, so that the order of summation does not change a trajectory."""
    wide = lambda leaf: leaf.astype(jnp.float64) if leaf.dtype == jnp.float32 else leaf
    return jax.tree.map(wide, tree)  # quantized leaves are kept


def inputs(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(7), shape, jnp.float64)


def of_nnx(
    model: Any, x: jax.Array, pairs: LoraRule | LoraPairs, matrices: Any, call: Any = None
) -> Row:
    """A row with an nnx model, split like users split it."""
    graphdef, adapter, base = nnx.split(model, nnx.LoRAParam, ...)
    adapter, base = float64(nnx.as_pure(adapter)), float64(nnx.as_pure(base))
    call = call or (lambda model, x: model(x))
    predict = lambda adapter, x: call(nnx.merge(graphdef, adapter, base), x)
    return Row(adapter, predict, x, pairs, matrices, pairs.scale)


def of_linen(model: Any, x: jax.Array, pairs: LoraRule | LoraPairs, matrices: Any) -> Row:
    """A row with a linen model; `model` is anything with init and apply."""
    params = model.init(jax.random.key(0), x.astype(jnp.float32))["params"]
    adapter, base = split(float64(params))
    predict = lambda adapter, x: model.apply({"params": join(adapter, base)}, x)
    return Row(adapter, predict, x, pairs, matrices, pairs.scale)


# ------------------------------------------------------------------------------- nnx


@row
def nnx_LoRA_around_a_layer() -> Row:
    rngs = nnx.Rngs(0)
    base = nnx.Linear(6, 5, rngs=rngs)
    model = nnx.LoRA(6, 2, 5, base_module=base, rngs=rngs)
    return of_nnx(model, inputs(16, 6), LoraPairs(), lambda t: each(t, 2))


@row
def nnx_LoRALinear() -> Row:
    model = nnx.LoRALinear(6, 5, lora_rank=2, rngs=nnx.Rngs(0))
    return of_nnx(model, inputs(16, 6), LoraPairs(), lambda t: each(t, 2))


@row
def add_lora_on_nnx_Linear_with_alpha() -> Row:
    rule = LoraRule(path=r"layers/\d", rank=2, alpha=8)
    model = nnx.Sequential(
        nnx.Linear(6, 7, rngs=nnx.Rngs(0)), nnx.tanh, nnx.Linear(7, 5, rngs=nnx.Rngs(1))
    )
    model = add_lora(model, rule, rngs=nnx.Rngs(2))
    return of_nnx(model, inputs(16, 6), rule, lambda t: each(t, 2))


@row
def add_lora_on_nnx_attention() -> Row:
    rule = LoraRule(path="query|key|value|out", rank=3, alpha=4, rslora=True)
    model = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
    model = add_lora(model, rule, rngs=nnx.Rngs(1))
    return of_nnx(model, inputs(4, 5, 8), rule, lambda t: each(t, 3))


@row
def add_lora_on_nnx_Einsum_with_heads() -> Row:
    rule = LoraRule(path="", rank=2, alpha=3)
    model = nnx.Einsum("btd,ndh->btnh", (4, 6, 3), rngs=nnx.Rngs(0))
    model = add_lora(model, rule, rngs=nnx.Rngs(1))
    return of_nnx(model, inputs(3, 5, 6), rule, lambda t: each(t, 2))


@row
def add_lora_on_nnx_Einsum_with_experts() -> Row:
    # Both factors are per expert: (E, D, r) and (E, r, F).
    rule = LoraRule(path="", rank=2, alpha=3)
    model = nnx.Einsum("ebd,edf->ebf", (3, 6, 5), rngs=nnx.Rngs(0))
    model = add_lora(model, rule, rngs=nnx.Rngs(1))
    return of_nnx(model, inputs(3, 8, 6), rule, lambda t: stacked(t, 2, 0))


@row
def add_lora_on_nnx_Conv() -> Row:
    rule = LoraRule(path="", rank=2, alpha=4)
    model = nnx.Conv(4, 5, (3, 2), strides=(2, 1), padding="SAME", rngs=nnx.Rngs(0))
    model = add_lora(model, rule, rngs=nnx.Rngs(1))
    return of_nnx(model, inputs(4, 6, 6, 4), rule, lambda t: each(t, 2))


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(6, 9, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs)
        self.down = nnx.Linear(9, 6, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(self.attention(x))))


def scanned(axis: int, rule: LoraRule) -> Row:
    """Three blocks made by nnx.vmap on that axis, adapted, and run by nnx.scan."""
    axes = nnx.StateAxes({nnx.Param: axis, ...: 0})
    keys = jax.random.split(jax.random.key(0), 3)
    model = nnx.vmap(lambda key: Block(nnx.Rngs(key)), out_axes=axes)(keys)
    model = add_lora(model, rule, rngs=nnx.Rngs(1))
    run = nnx.scan(
        lambda block, x: block(x), in_axes=(axes, nnx.Carry), out_axes=nnx.Carry, length=3
    )
    return of_nnx(model, inputs(4, 5, 6), rule, lambda t: stacked(t, 2, axis), call=run)


@row
def add_lora_on_layers_stacked_by_nnx_on_axis_0() -> Row:
    return scanned(0, LoraRule(path="up|attention/query", rank=2, alpha=4))


@row
def add_lora_on_layers_stacked_by_nnx_on_axis_1() -> Row:
    return scanned(1, LoraRule(path="down|attention/out", rank=2, alpha=4, batch=(1,)))


# ----------------------------------------------------------------------------- linen


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x)
        return nn.Dense(5, name="out")(x)


@row
def LoraModel_on_linen_Dense_and_attention() -> Row:
    rule = LoraRule(path="attention/(query|key|value|out)|out", rank=3, alpha=6)
    model = LoraModel(Attention(), rule)
    return of_linen(model, inputs(3, 5, 8), rule, lambda t: each(t, 3))


class CompactEinsum(nn.Module):
    """qwix does not support this model in linen."""

    @nn.compact
    def __call__(self, x):
        q = nn.Einsum((4, 6, 3), "btd,ndh->btnh", use_bias=False, name="q")(x)
        return nn.Einsum((4, 3, 6), "btnh,nhd->btd", use_bias=False, name="o")(jnp.tanh(q))


@row
def LoraModel_on_linen_Einsum_with_heads() -> Row:
    rule = LoraRule(path="[qo]", rank=2, alpha=4)
    model = LoraModel(CompactEinsum(), rule)
    return of_linen(model, inputs(3, 5, 6), rule, lambda t: each(t, 2))


@row
def LoraModel_on_linen_Einsum_with_experts() -> Row:
    rule = LoraRule(path="", rank=2, alpha=4)
    model = LoraModel(nn.Einsum((3, 6, 5), "ebd,edf->ebf"), rule)
    return of_linen(model, inputs(3, 8, 6), rule, lambda t: stacked(t, 2, 0))


@row
def LoraModel_on_linen_Conv() -> Row:
    rule = LoraRule(path="", rank=2, alpha=4)
    model = LoraModel(nn.Conv(5, (3, 3), padding="CIRCULAR"), rule)
    return of_linen(model, inputs(3, 6, 6, 4), rule, lambda t: each(t, 2))


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x)
        return x + nn.Dense(6, name="down")(jnp.tanh(nn.Dense(9, name="up")(y))), None


class LinenStack(nn.Module):
    axis: int

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            LinenBlock, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=3
        )
        return scan(name="layers")(x, None)[0]


@row
def LoraModel_on_layers_scanned_by_linen_on_axis_0() -> Row:
    rule = LoraRule(path="layers/.*(up|query)", rank=2, alpha=4)
    model = LoraModel(LinenStack(0), rule)
    return of_linen(model, inputs(4, 5, 6), rule, lambda t: stacked(t, 2, 0))


@row
def LoraModel_on_layers_scanned_by_linen_on_axis_1() -> Row:
    rule = LoraRule(path="layers/.*(down|out)", rank=2, alpha=4, batch=(1,))
    model = LoraModel(LinenStack(1), rule)
    return of_linen(model, inputs(4, 5, 6), rule, lambda t: stacked(t, 2, 1))


# ------------------------------------------- names and shapes that other libraries write


class GemmaEinsum(nn.Module):
    """An einsum layer with its adapter under `lora`, as gemma.peft names it."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w", normal(), (4, 6, 3))
        return jnp.einsum("btd,ndh->btnh", x, w) + GemmaFactors(name="lora")(x)


class GemmaFactors(nn.Module):
    @nn.compact
    def __call__(self, x):
        a = self.param("a", nn.initializers.kaiming_uniform(), (6, 2))
        b = self.param("b", nn.initializers.zeros_init(), (2, 4, 3))
        return jnp.einsum("btd,dr,rnh->btnh", x, a, b)


@row
def names_of_gemma_peft() -> Row:
    matrices = lambda t: {"lora": matrix(flat(t)["lora/a"], flat(t)["lora/b"], 2)}
    return of_linen(GemmaEinsum(), inputs(3, 5, 6), LoraPairs(), matrices)


class MaxTextDense(nn.Module):
    """A projection with submodules `lora_a.kernel` and `lora_b.kernel`, scale alpha / r = 2."""

    features: int

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(self.features, use_bias=False, name="dense")(x)
        a = nn.Dense(2, use_bias=False, name="lora_a")
        b = nn.Dense(
            self.features, use_bias=False, kernel_init=nn.initializers.zeros, name="lora_b"
        )
        return y + 2.0 * b(a(x))


class MaxTextLayer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + MaxTextDense(6, name="wo")(jnp.tanh(MaxTextDense(9, name="wi")(x))), None


class MaxTextDecoder(nn.Module):
    axis: int

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            MaxTextLayer, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=3
        )
        return scan(name="layers")(x, None)[0]


def maxtext(axis: int, axes: LoraAxes | None) -> Row:
    pairs = LoraPairs(scale=2.0, axes=axes)
    matrices = lambda t: stacked(t, 2, axis)
    return of_linen(MaxTextDecoder(axis), inputs(8, 6), pairs, matrices)


@row
def names_of_MaxText_with_layers_on_axis_0() -> Row:
    return maxtext(0, None)


@row
def names_of_MaxText_with_layers_on_axis_1() -> Row:
    return maxtext(1, LoraAxes(batch=(1,)))


# ------------------------------------------------------------------------------ qwix


QWIX_RULE = LoraRule(path=".*", rank=2, alpha=6)


def qwix_model(model: Any, x: jax.Array, **quantization: Any) -> Any:
    """The model wrapped by qwix, every layer."""
    qwix = importlib.import_module("qwix")
    provider = qwix_provider(QWIX_RULE, **quantization)
    if isinstance(model, nn.Module):  # a linen model gets its shapes at initialization
        return qwix.apply_lora_to_model(model, provider)
    x = x.astype(jnp.float32)
    return qwix.apply_lora_to_model(model, provider, x, rngs=nnx.Rngs(5))


class NnxHeads(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.q = nnx.Einsum("btd,ndh->btnh", (4, 6, 3), rngs=rngs)
        self.o = nnx.Einsum("btnh,nhd->btd", (4, 3, 6), rngs=rngs)
        self.dense = nnx.Linear(6, 5, rngs=rngs)

    def __call__(self, x):
        return self.dense(self.o(jnp.tanh(self.q(x))))


@row
def qwix_on_nnx_dot_general_and_einsum_with_heads() -> Row:
    x = inputs(3, 5, 6)
    model = qwix_model(NnxHeads(nnx.Rngs(0)), x)
    return of_nnx(model, x, QWIX_RULE, lambda t: each(t, 2))


@row
def qwix_on_linen_dot_general_with_heads() -> Row:
    x = inputs(3, 5, 8)
    model = qwix_model(Attention(), x)
    return of_linen(model, x, QWIX_RULE, lambda t: each(t, 2))


class NnxExperts(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.w = nnx.Param(normal(0.5)(rngs.params(), (3, 6, 5)))

    def __call__(self, x):
        return jnp.einsum("ebd,edf->ebf", x, self.w[...])


@row
def qwix_on_experts_that_share_b() -> Row:
    # A (E, D, r) and B (r, F): the concatenated experts are one (E D, F) matrix.
    x = inputs(3, 8, 6)
    model = qwix_model(NnxExperts(nnx.Rngs(0)), x)
    return of_nnx(model, x, QWIX_RULE, lambda t: each(t, 2))


@row
def qwix_on_nnx_Conv() -> Row:
    x = inputs(3, 6, 6, 4)
    model = qwix_model(nnx.Conv(4, 5, (3, 3), rngs=nnx.Rngs(0)), x)
    return of_nnx(model, x, QWIX_RULE, lambda t: each(t, 2))


# ------------------------------------------------------------------- quantized bases


@row
def qwix_on_nnx_in_nf4() -> Row:
    x = inputs(16, 64)
    model = nnx.Sequential(nnx.Linear(64, 7, rngs=nnx.Rngs(0)), nnx.tanh)
    model = qwix_model(model, x, weight_qtype="nf4", tile_size=32)
    return of_nnx(model, x, QWIX_RULE, lambda t: each(t, 2))


@row
def add_lora_on_a_base_in_nf4_by_qwix_formats() -> Row:
    rule = LoraRule(path="", rank=2, alpha=4)
    model = quantize(nnx.Linear(64, 7, rngs=nnx.Rngs(0)), qtype="nf4", tile_size=32)
    model = add_lora(model, rule, rngs=nnx.Rngs(1))
    return of_nnx(model, inputs(16, 64), rule, lambda t: each(t, 2))


# -------------------------------------------------------------------------- the tests


def train(tx: Any, params: Any, loss: Callable[[Any], jax.Array]) -> tuple[Any, list[float]]:
    """Parameters and losses after `STEPS` steps."""

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = jax.jit(tx.init)(params), []
    for _ in range(STEPS):
        params, state, value = step(params, state)
        losses.append(float(value))
    *_, last = step(params, state)  # the step that would follow begins with this loss
    return params, [*losses, float(last)]


def rows() -> list[Any]:
    # qwix uses names that Flax has deprecated.
    quiet = pytest.mark.filterwarnings("ignore::DeprecationWarning")
    return [pytest.param(name, marks=[quiet] if "qwix" in name else []) for name in ROWS]


@pytest.mark.parametrize("name", rows())
def test_training_equals_that_of_plain_matrices_and_lowers_the_loss(name, x64, report):
    if name.startswith("qwix"):
        pytest.importorskip("qwix", reason="qwix is not installed: its adapters are not shown")
    row = ROWS[name]()
    output = jax.eval_shape(row.predict, row.adapter, row.x)
    target = jnp.asarray(np.random.default_rng(3).normal(size=output.shape))
    loss = lambda adapter: jnp.mean((row.predict(adapter, row.x) - target) ** 2)
    transformation = lambda pairs: optax.chain(
        clip_by_projected_global_norm(1.0, pairs=pairs), loft_adamw(3e-2, pairs=pairs)
    )
    trained, losses = train(transformation(row.pairs), row.adapter, loss)
    assert losses[-1] < 0.9 * losses[0]
    assert all(np.isfinite(losses))

    # The rearrangement is a permutation, so its transpose is its inverse.
    to_tree = jax.jit(lambda x: jax.linear_transpose(row.matrices, row.adapter)(x)[0])
    matrices = jax.jit(row.matrices)(row.adapter)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, to_tree(matrices), row.adapter))
    plain, plain_losses = train(
        transformation(LoraPairs(scale=row.scale)), matrices, lambda m: loss(to_tree(m))
    )
    worst = 0.0
    for one, other in zip(row.matrices(trained).values(), plain.values(), strict=True):
        weight, reference = one["lora_a"] @ one["lora_b"], other["lora_a"] @ other["lora_b"]
        assert float(jnp.abs(reference).max()) > 1e-3  # it was trained
        worst = max(worst, float(jnp.abs(weight - reference).max() / jnp.abs(reference).max()))
    report(f"loss {losses[0]:6.3f} -> {losses[-1]:6.3f}, off by {worst:.0e}: {name}")
    # Cross terms of rank one cancel in the first steps, which amplifies rounding.
    assert worst < 1e-6
    np.testing.assert_allclose(losses, plain_losses, rtol=1e-6)
