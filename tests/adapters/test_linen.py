"""Adapters on linen models, and functions that split, join and merge any parameter trees."""

import dataclasses

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from optimizers import hasty_compiler as hasty_compiler

from loft_jax import LoraAxes, LoraPairs, loft_adamw
from loft_jax.adapters import (
    LoraModel,
    LoraRule,
    adapt,
    join,
    lora_pairs,
    merge,
    split,
    unmerge,
)
from loft_jax.sharding import adapter_shardings

normal = jax.nn.initializers.normal(0.3)
X = jax.random.normal(jax.random.key(0), (2, 5, 6))


class Model(nn.Module):
    """Every kind of layer that can have an adapter."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, name="dense")(x)
        x = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(jnp.tanh(x))
        x = nn.Einsum((4, 6, 3), "btd,ndh->btnh", name="heads")(x)
        return nn.Conv(5, (2, 3), name="conv")(jnp.tanh(x))

    def encode(self, x):
        return self(x)


RULE = LoraRule(path="dense|attention/.*|heads|conv", rank=2, alpha=3, init_b=normal)
KEY = jax.random.key(1)


def test_a_new_adapter_changes_no_output_and_no_path():
    adapted = LoraModel(Model(), LoraRule(path="dense|attention/.*|heads|conv", rank=2))
    params = adapted.init(KEY, X)["params"]
    adapter, base = split(params)
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    assert shapes(base) == shapes(Model().init(KEY, X)["params"])
    assert shapes(adapter["heads"]) == {"lora_a": (6, 2), "lora_b": (2, 4, 3)}
    y = adapted.apply({"params": params}, X)
    np.testing.assert_array_equal(y, Model().apply({"params": base}, X))


def test_merged_weights_equal_the_adapted_model_and_unmerge_restores_the_base():
    adapted = LoraModel(Model(), RULE)
    params = adapted.init(KEY, X)["params"]
    adapter, base = split(params)
    y = adapted.apply({"params": params}, X)
    merged = merge(base, adapter, lora_pairs(RULE))
    assert float(jnp.abs(y - Model().apply({"params": base}, X)).max()) > 0.1
    np.testing.assert_allclose(Model().apply({"params": merged}, X), y, atol=1e-5)
    back = unmerge(merged, adapter, lora_pairs(RULE))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), back, base)


def test_every_method_of_the_model_is_adapted():
    adapted = LoraModel(Model(), RULE)
    variables = adapted.init(KEY, X)
    y = adapted.apply(variables, X, method="encode")
    np.testing.assert_array_equal(y, adapted.apply(variables, X))
    with adapt(RULE):
        np.testing.assert_array_equal(y, Model().apply(variables, X))


def test_dropout_is_on_if_apply_gets_its_key():
    adapted = LoraModel(nn.Dense(5), LoraRule(path="", rank=2, dropout=0.5, init_b=normal))
    variables = adapted.init(KEY, X)
    certain = adapted.apply(variables, X)
    draw = jax.jit(lambda key: adapted.apply(variables, X, rngs={"dropout": key}))
    draws = np.stack([draw(key) for key in jax.random.split(KEY, 400)])
    assert not np.array_equal(draws[0], draws[1])
    np.testing.assert_array_equal(draw(KEY), draw(KEY))
    spread = draws.std(axis=0).max() / 20
    assert np.abs(draws.mean(axis=0) - certain).max() < 5 * spread


def test_factors_are_partitioned_like_their_kernel():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
    adapted = LoraModel(nn.Dense(5, kernel_init=init), LoraRule(path="", rank=2))
    params = adapted.init(KEY, X)["params"]
    assert params["lora_a"].names == ("embed", None) and params["lora_b"].names == (None, "mlp")
    y = adapted.apply({"params": params}, X)
    assert y.shape == (2, 5, 5)


def test_factors_with_logical_axes_are_placed_like_their_kernel():
    init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
    adapted = LoraModel(nn.Dense(4, kernel_init=init), LoraRule(path="", rank=2))
    variables = adapted.init(KEY, X)
    assert type(variables["params"]["lora_b"]) is type(variables["params"]["kernel"])
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh), nn.logical_axis_rules((("embed", None), ("mlp", "x"))):
        y = jax.jit(adapted.apply)(variables, X)
    np.testing.assert_allclose(y, adapted.apply(variables, X), atol=1e-6)


def test_a_model_without_supported_layers_is_refused():
    class Bare(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x @ self.param("w", normal, (6, 5))

    with pytest.raises(ValueError, match="no layer follows the rule 'w'.*: none"):
        LoraModel(Bare(), LoraRule(path="w", rank=2)).init(KEY, X)


def test_adapted_layers_work_on_an_explicit_mesh():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    adapted = LoraModel(Model(), RULE)
    variables = adapted.init(KEY, X)
    expected = adapted.apply(variables, X)
    with jax.set_mesh(mesh):
        y = jax.jit(adapted.apply)(variables, jax.device_put(X, jax.P("data")))
        assert jax.typeof(y).sharding.spec[0] == "data"
    np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "rules", "message"),
    [
        (Model(), LoraRule(path="danse", rank=2), "no layer follows the rule 'danse'.*dense"),
        (Model(), LoraRule(path="dense", rank=7), "dense: rank 7 is above 6"),
        (
            nn.Sequential([nn.Dense(4), nn.LayerNorm()]),
            LoraRule(path="layers_1", rank=2),
            "layers_1 has the type LayerNorm, which cannot be adapted. The layers .*: layers_0",
        ),
        (nn.Conv(6, 3, feature_group_count=2), LoraRule(path="", rank=2), "grouped or masked"),
        (
            nn.DenseGeneral(4, batch_dims=(0,)),
            LoraRule(path="", rank=2),
            "the model: .*Use an nn.Einsum instead",
        ),
    ],
)
def test_unsupported_layers_are_refused_by_name(model, rules, message):
    with pytest.raises(ValueError, match=message):
        LoraModel(model, rules).init(KEY, X)


# ----------------------------------------------------------------------------- trees


def test_whole_trees_can_be_split_merged_and_sharded_but_not_trained():
    adapted = LoraModel(Model(), RULE)
    params = adapted.init(KEY, X)["params"]
    adapter, base = split(params, RULE)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, join(adapter, base), params))
    merged = merge(params, params, RULE)
    jax.tree.map(np.testing.assert_array_equal, split(merged)[1], merge(base, adapter, RULE))
    back = unmerge(merged, params, RULE)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), back, params)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated = jax.tree.map(lambda x: jax.device_put(x, jax.NamedSharding(mesh, jax.P())), base)
    placed = adapter_shardings(params, replicated, pairs=RULE)
    assert split(placed)[0] == adapter_shardings(adapter, replicated, pairs=RULE)
    with pytest.raises(ValueError, match="next to their own adapters"):
        loft_adamw(1e-3, pairs=RULE).init(params)
    pairs = dataclasses.replace(lora_pairs(RULE), train_weights=True)
    loft_adamw(1e-3, pairs=pairs).init(params)


def factors(shape_a, shape_b, names=("lora_a", "lora_b")):
    keys = jax.random.split(KEY)
    shapes = zip(names, keys, (shape_a, shape_b), strict=True)
    return {name: jax.random.normal(key, shape) for name, key, shape in shapes}


def test_split_and_join_are_inverses_and_accept_any_mapping():
    params = {"q": {"kernel": 1.0, "lora_a": 2.0, "lora_b": 3.0}, "norm": {"scale": 4.0}}
    adapter, base = split(flax.core.freeze(params))
    assert adapter == {"q": {"lora_a": 2.0, "lora_b": 3.0}}
    assert join(adapter, base) == params
    with pytest.raises(ValueError, match="q/kernel is in both the adapter and the base"):
        join({"q": {"kernel": 0.0}}, base)
    with pytest.raises(ValueError, match="q/lora_a: no partner"):
        split({"q": {"lora_a": 1.0}})
    with pytest.raises(TypeError, match="must be nested mappings"):
        split([1.0])


@pytest.mark.parametrize(
    ("a", "b", "equation", "weight"),
    [
        ((6, 2), (2, 5), "ar,rb->ab", (6, 5)),
        ((6, 2), (2, 6), "ar,rb->ab", (6, 6)),
        ((6, 2), (2, 4, 3), "ar,rbc->abc", (6, 4, 3)),
        ((6, 2), (2, 12), "ar,rb->ab", (6, 4, 3)),  # qwix's dot_general flattens the heads
        ((6, 2), (2, 4, 3), "ar,rbc->bac", (4, 6, 3)),  # an einsum of gemma's
        ((4, 3, 2), (2, 6), "abr,rc->abc", (4, 3, 6)),
        ((3, 3, 6, 2), (2, 6), "hwar,rb->hwab", (3, 3, 6, 6)),  # a convolution
        ((3, 4, 2), (3, 2, 3, 2), "car,crbd->cabd", (3, 4, 3, 2)),  # as many layers as heads
        ((3, 4, 2), (3, 2, 5), "car,crb->cab", (3, 4, 5)),  # one adapter per expert or layer
        ((3, 4, 2), (3, 2, 10), "car,crb->cab", (3, 4, 5, 2)),
    ],
)
def test_products_get_the_axes_of_their_weight(a, b, equation, weight):
    adapter = {"x": factors(a, b)}
    base = {"x": {"kernel": jnp.zeros(weight)}}
    merged = merge(base, adapter, LoraPairs(scale=0.5))["x"]["kernel"]
    expected = jnp.einsum(equation, adapter["x"]["lora_a"], adapter["x"]["lora_b"])
    np.testing.assert_allclose(merged, 0.5 * expected.reshape(weight), atol=1e-6)


@pytest.mark.parametrize(
    ("names", "weight"),
    [
        ("kernel_lora_a kernel_lora_b", "kernel"),
        ("w_lora_a w_lora_b", "w"),
        ("lora/a lora/b", "w"),
        ("lora_a/kernel lora_b/kernel", "kernel"),
        ("lora/lora_a lora/lora_b", "kernel"),
        ("lora_a lora_b", "base_module/kernel"),
        ("lora_kernel_a lora_kernel_b", "kernel"),
        ("lora_embeddings_a lora_embeddings_b", "embeddings"),
    ],
)
def test_the_weight_of_every_known_name_is_found(names, weight):
    adapter = factors((6, 2), (2, 5), [f"layers/0/q/{name}" for name in names.split()])
    base = {f"layers/0/q/{weight}": jnp.zeros((6, 5)), "layers/0/q/bias": jnp.zeros(5)}
    merged = merge(base, adapter)
    a, b = adapter.values()
    np.testing.assert_allclose(merged[f"layers/0/q/{weight}"], a @ b, atol=1e-6)
    assert merged["layers/0/q/bias"] is base["layers/0/q/bias"]


def test_a_layer_named_lora_has_its_own_weight():
    base = {"lora": {"kernel": jnp.zeros((6, 5))}, "other": {"kernel": jnp.zeros((6, 5))}}
    merged = merge(base, {"lora": factors((6, 2), (2, 5))})
    assert float(jnp.abs(merged["lora"]["kernel"]).max()) > 0.1
    assert merged["other"]["kernel"] is base["other"]["kernel"]


def test_layers_stacked_on_axis_1_are_merged_on_axis_1():
    adapter = factors((6, 3, 2), (2, 3, 5))
    pairs = LoraPairs(axes=LoraAxes(batch=(1,)))
    merged = merge({"kernel": jnp.zeros((6, 3, 5))}, adapter, pairs)["kernel"]
    expected = jnp.einsum("alr,rlb->alb", adapter["lora_a"], adapter["lora_b"])
    np.testing.assert_allclose(merged, expected, atol=1e-6)


def test_ambiguous_axes_are_refused_until_specified():
    adapter, base = factors((4, 2), (2, 4, 3)), {"kernel": jnp.zeros((4, 4, 3))}
    with pytest.raises(ValueError, match=r"lora_a: .* fits the weight \(4, 4, 3\) in 2 ways"):
        merge(base, adapter)
    merged = merge(base, adapter, transpose=(("lora_a", (1, 0, 2)),))["kernel"]
    expected = jnp.einsum("ar,rbc->bac", adapter["lora_a"], adapter["lora_b"])
    np.testing.assert_allclose(merged, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({"weight": jnp.zeros((6, 5))}, "lora_a: there is no floating-point weight at kernel or"),
        ({"kernel": jnp.zeros((6, 5), jnp.int8)}, "A quantized weight cannot be merged into"),
        ({"kernel": jnp.zeros((5, 6))}, r"\(6, 5\) does not fit the weight \(5, 6\)"),
        ({"kernel": jnp.zeros((3, 10))}, r"\(6, 5\) does not fit the weight \(3, 10\)"),
        ({"kernel": jnp.zeros((2, 3, 5, 2))}, "does not fit the weight"),
    ],
)
def test_a_base_that_does_not_fit_is_refused(base, message):
    with pytest.raises(ValueError, match=message):
        merge(base, factors((6, 2), (2, 5)))


def test_a_weight_with_another_name_is_merged_if_specified():
    adapter = {"blocks": {"down": factors((6, 2), (2, 5))}}
    base = {"blocks": {"W": jnp.zeros((6, 5))}}
    merged = merge(base, adapter, weights=((r"(.*)/down/lora_a", r"\1/W"),))
    assert float(jnp.abs(merged["blocks"]["W"]).max()) > 0.1
