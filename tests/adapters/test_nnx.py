"""Adapters on nnx models: initial output, merging, dropout, quantized bases, and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from optimizers import hasty_compiler as hasty_compiler

from loft_jax.adapters import (
    LoraLayer,
    LoraRule,
    QuantizedLayer,
    add_lora,
    lora_pairs,
    quantize,
    qwix_provider,
    remove_lora,
)
from loft_jax.pairs.find import find_pairs
from loft_jax.pairs.spec import first_match

normal = jax.nn.initializers.normal(0.3)


class Model(nnx.Module):
    """Every kind of layer that can have an adapter."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(6, 6, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs)
        self.heads = nnx.Einsum("btd,ndh->btnh", (6, 6, 2), (6, 2), rngs=rngs)
        self.experts = nnx.Einsum("btnh,nhd->btnd", (6, 2, 4), rngs=rngs)
        self.conv = nnx.Conv(4, 3, (2, 3), padding="SAME", rngs=rngs)

    def __call__(self, x):
        x = self.attention(jnp.tanh(self.linear(x)))
        return self.conv(self.experts(jnp.tanh(self.heads(x))))


X = jax.random.normal(jax.random.key(0), (2, 5, 6))
ALL = LoraRule(path=".*", rank=2, alpha=3)


def largest(x, y) -> float:
    return float(jnp.abs(x - y).max())


def test_a_new_adapter_changes_no_output_and_no_base_weight():
    model = Model(nnx.Rngs(0))
    adapted = add_lora(model, ALL, rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(adapted(X), model(X))
    assert adapted.linear.base.kernel is model.linear.kernel  # shared, not copied


def test_a_merged_model_equals_the_adapted_model():
    adapted = add_lora(
        Model(nnx.Rngs(0)), LoraRule(path=".*", rank=2, alpha=3, init_b=normal), rngs=nnx.Rngs(1)
    )
    merged, plain = remove_lora(adapted, merge=True), remove_lora(adapted, merge=False)
    assert nnx.graphdef(merged) == nnx.graphdef(Model(nnx.Rngs(0)))
    assert largest(adapted(X), plain(X)) > 0.1
    assert largest(adapted(X), merged(X)) < 1e-5
    np.testing.assert_array_equal(plain(X), Model(nnx.Rngs(0))(X))


@pytest.mark.parametrize("axes", [(0, 0), (1, 0), (0, 2), (2, 1)])
def test_layers_stacked_twice_are_merged_on_both_axes(axes):
    outer, inner = axes
    make = nnx.vmap(
        lambda key: nnx.Linear(6, 7, use_bias=False, rngs=nnx.Rngs(key)), out_axes=inner
    )
    make = nnx.vmap(make, out_axes=outer)
    model = make(jax.random.split(jax.random.key(0), (2, 3)))
    rule = LoraRule(path="", rank=2, alpha=3, init_b=normal)
    adapted = add_lora(model, rule, rngs=nnx.Rngs(1))
    merged = remove_lora(adapted, merge=True)
    of = lambda v, i, j: jnp.take(jnp.take(v, i, outer), j, inner)
    for i in range(2):
        for j in range(3):
            a, b = of(adapted.lora_a[...], i, j), of(adapted.lora_b[...], i, j)
            assert a.shape == (6, 2) and b.shape == (2, 7)
            expected = of(model.kernel[...], i, j) + 1.5 * a @ b
            np.testing.assert_allclose(of(merged.kernel[...], i, j), expected, atol=1e-6)


def test_the_first_rule_that_matches_a_layer_is_used():
    rules = [LoraRule(path="linear", rank=1), LoraRule(path="linear|conv", rank=2, alpha=4)]
    adapted = add_lora(Model(nnx.Rngs(0)), rules, rngs=nnx.Rngs(1))
    assert (adapted.linear.lora_a.shape[-1], adapted.linear.scale) == (1, 1.0)
    assert (adapted.conv.lora_a.shape, adapted.conv.scale) == ((2, 3, 4, 2), 2.0)
    assert not isinstance(adapted.heads, LoraLayer)


@pytest.mark.parametrize(
    ("model", "path"),
    [
        (Model, ".*"),
        (Model, "linear|attention/(query|out)|conv"),
        (lambda rngs: nnx.Linear(6, 5, rngs=rngs), ""),
        (lambda rngs: nnx.Linear(6, 5, rngs=rngs), ".*"),
        (lambda rngs: nnx.Sequential(Model(rngs), nnx.Linear(3, 3, rngs=rngs)), r"layers/.*"),
    ],
)
def test_a_rule_gives_the_optimizer_every_scale(model, path):
    rule = LoraRule(path=path, rank=2, alpha=5)
    adapter = nnx.state(add_lora(model(nnx.Rngs(0)), rule, rngs=nnx.Rngs(1)), nnx.LoRAParam)
    scales = [pair.scale for pair in find_pairs(adapter, lora_pairs(rule)).pairs]
    assert scales and set(scales) == {2.5}


def test_the_scales_of_rules_are_in_the_order_of_the_rules():
    rules = [LoraRule(path="a|b/c", rank=2, alpha=4), LoraRule(path=".*c|", rank=2, alpha=8)]
    paths = ["a/lora_a", "b/c/kernel_lora_a", "z/c/w_lora_a", "lora_a", "q/lora_a"]
    scale = lora_pairs(rules).scale
    assert [first_match(scale, path) for path in paths] == [2.0, 2.0, 4.0, 4.0, None]


def test_bfloat16_layers_compute_in_bfloat16_with_float32_factors():
    model = nnx.Linear(6, 5, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    adapted = add_lora(model, LoraRule(path="", rank=2, init_b=normal), rngs=nnx.Rngs(1))
    assert adapted.lora_a.dtype == jnp.float32
    x = X.astype(jnp.bfloat16)
    assert adapted(x).dtype == jnp.bfloat16
    assert remove_lora(adapted, merge=True).kernel.dtype == jnp.bfloat16


def test_factors_have_the_mesh_axes_of_their_kernel():
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        model = nnx.Einsum(
            "btd,ndh->btnh", (2, 4, 3), kernel_metadata={"out_sharding": ("x", "y", None)},
            rngs=nnx.Rngs(0),
        )  # fmt: skip
        adapted = add_lora(model, LoraRule(path="", rank=2), rngs=nnx.Rngs(1))
    assert adapted.lora_a[...].sharding.spec == jax.P("y", None)
    assert adapted.lora_b[...].sharding.spec == jax.P(None, "x", None)


def test_an_adapted_layer_works_on_an_explicit_mesh():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    model = add_lora(
        nnx.Linear(6, 4, rngs=nnx.Rngs(0)),
        LoraRule(path="", rank=2, init_b=normal),
        rngs=nnx.Rngs(1),
    )
    expected = model(X)
    with jax.set_mesh(mesh):
        x = jax.device_put(X, jax.P("data"))
        for out_sharding in (None, jax.P(None, None, "data")):
            y = nnx.jit(lambda model, x, s=out_sharding: model(x, out_sharding=s))(model, x)
            assert jax.typeof(y).sharding.spec == (out_sharding or jax.P("data", None, None))
            np.testing.assert_allclose(y, expected, atol=1e-6)


# --------------------------------------------------------------------------- dropout


def test_dropout_affects_only_the_adapter_and_only_in_training():
    rule = LoraRule(path="", rank=2, dropout=0.5, init_b=normal)
    base = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
    adapted = add_lora(base, rule, rngs=nnx.Rngs(1))
    adapted.eval()
    certain = adapted(X)
    np.testing.assert_array_equal(adapted(X), certain)
    adapted.train()
    draws = np.stack([adapted(X) for _ in range(400)])
    assert not np.array_equal(draws[0], draws[1])
    spread = draws.std(axis=0).max() / np.sqrt(400)
    assert largest(draws.mean(axis=0), certain) < 5 * spread  # dropout keeps the mean
    assert largest(certain, base(X)) > 0.1


def test_each_layer_of_a_stack_has_its_own_dropout_mask():
    keys = jax.random.split(jax.random.key(0), 3)
    stack = nnx.vmap(lambda key: nnx.Linear(6, 6, rngs=nnx.Rngs(key)))(keys)
    rule = LoraRule(path="", rank=2, dropout=0.5, init_b=normal)
    adapted = add_lora(stack, rule, rngs=nnx.Rngs(1))
    run = nnx.vmap(lambda layer, x: layer.dropout(x), in_axes=(0, None))
    first, second = run(adapted, jnp.ones(64)), run(adapted, jnp.ones(64))
    masks = [np.asarray(mask) for mask in (*first, *second)]
    assert len({mask.tobytes() for mask in masks}) == 6  # per layer and per call


def test_dropout_masks_change_in_every_step_of_a_scanned_model():
    axes = nnx.StateAxes({nnx.Param: 0, ...: 0})
    keys = jax.random.split(jax.random.key(0), 3)
    stack = nnx.vmap(lambda key: nnx.Linear(6, 6, rngs=nnx.Rngs(key)), out_axes=axes)(keys)
    rule = LoraRule(path="", rank=2, dropout=0.5, init_b=normal)
    adapted = add_lora(stack, rule, rngs=nnx.Rngs(1))
    run = nnx.scan(lambda layer, x: layer(x), in_axes=(axes, nnx.Carry), out_axes=nnx.Carry)
    step = nnx.jit(lambda model: run(model, X))
    assert not np.array_equal(step(adapted), step(adapted))
    adapted.eval()
    np.testing.assert_array_equal(step(adapted), step(adapted))


# --------------------------------------------------------------------- quantized bases


@pytest.mark.parametrize(("qtype", "error"), [("nf4", 0.3), ("int4", 0.3), ("int8", 0.03)])
def test_a_quantized_model_equals_the_plain_one_with_rounded_kernels(qtype, error):
    qwix = pytest.importorskip("qwix", reason="qwix is not installed: no quantized bases")
    model = Model(nnx.Rngs(0))
    quantized, rounded = quantize(model, qtype=qtype), nnx.clone(model)
    places = dict(nnx.iter_modules(rounded))
    for path, layer in nnx.iter_modules(quantized):
        if isinstance(layer, QuantizedLayer):
            places[path].kernel[...] = qwix.dequantize(layer.kernel.get_value())
    np.testing.assert_allclose(quantized(X), rounded(X), atol=1e-6)
    assert 0 < largest(quantized(X), model(X)) < error * float(jnp.abs(model(X)).max())


def test_a_quantized_kernel_is_within_half_a_level_and_takes_half_a_byte():
    pytest.importorskip("qwix", reason="qwix is not installed: quantized bases are not shown")
    import qwix

    layer = nnx.Linear(128, 32, rngs=nnx.Rngs(0))
    stored = quantize(layer, qtype="nf4").kernel.get_value()
    assert stored.qvalue.dtype == jnp.uint4 and stored.scale.shape == (2, 32)
    absmax = jnp.abs(layer.kernel[...].reshape(2, 64, 32)).max(axis=1)
    np.testing.assert_allclose(stored.scale, absmax, rtol=1e-6)
    # The widest gap between two levels of NormalFloat is 0.3.
    error = jnp.abs(qwix.dequantize(stored) - layer.kernel[...]).reshape(2, 64, 32).max(axis=1)
    assert bool(jnp.all(error <= 0.16 * absmax))
    compiled = jax.jit(lambda kernel: qwix.dequantize(kernel)).lower(stored).compile()
    sizes = compiled.memory_analysis()
    assert sizes.argument_size_in_bytes == 128 * 32 // 2 + 4 * 2 * 32


@pytest.mark.parametrize("order", ["quantized first", "adapted first"])
def test_quantize_and_add_lora_commute(order):
    pytest.importorskip("qwix", reason="qwix is not installed: quantized bases are not shown")
    model, rule = Model(nnx.Rngs(0)), LoraRule(path="linear|heads", rank=2, alpha=3)
    if order == "quantized first":
        adapted = add_lora(quantize(model, "linear|heads"), rule, rngs=nnx.Rngs(1))
    else:
        adapted = quantize(add_lora(model, rule, rngs=nnx.Rngs(1)), "linear|heads")
    np.testing.assert_array_equal(adapted(X), quantize(model, "linear|heads")(X))
    assert len(nnx.to_flat_state(nnx.state(adapted, nnx.LoRAParam))) == 4
    with pytest.raises(
        ValueError, match="linear|heads: an adapter cannot be merged into a quantized"
    ):
        remove_lora(adapted, merge=True)


# -------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("model", "rules", "message"),
    [
        (Model, LoraRule(path="linaer", rank=2), "no layer follows the rule 'linaer'.*linear"),
        (Model, [ALL, LoraRule(path="conv", rank=2)], "no layer follows the rule 'conv'"),
        (Model, LoraRule(path="linear", rank=7), "linear: rank 7 is above 6"),
        (
            lambda rngs: nnx.Sequential(nnx.Embed(9, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)),
            LoraRule(path="layers/0", rank=2),
            "layers/0 has the type Embed, which cannot be adapted. The layers .*: layers/1",
        ),
        (
            lambda rngs: nnx.Conv(4, 4, 3, feature_group_count=2, rngs=rngs),
            ALL,
            "a grouped or masked convolution",
        ),
        (
            lambda rngs: nnx.LinearGeneral(4, 4, batch_axis={0: 3}, rngs=rngs),
            ALL,
            "Use an nnx.Einsum instead",
        ),
        (
            lambda rngs: nnx.Einsum("ab,bb->a", (3, 3), rngs=rngs),
            ALL,
            "each axis of the kernel by a different letter",
        ),
        (
            lambda rngs: nnx.Einsum("ab,bc->a", (3, 3), rngs=rngs),
            ALL,
            "sums the kernel over its axis 'c' alone",
        ),
        (
            lambda rngs: nnx.LoRALinear(4, 4, lora_rank=2, rngs=rngs),
            ALL,
            "the model already has an adapter",
        ),
        (
            lambda rngs: add_lora(Model(rngs), ALL, rngs=rngs),
            ALL,
            "/base already has an adapter",
        ),
        (
            lambda _: nnx.vmap(lambda k: nnx.Linear(3, 5, rngs=nnx.Rngs(k)))(
                jax.random.split(jax.random.key(0), 3)
            ),
            ALL,
            r"\(3, 3, 5\) .* may be any of \[\(0,\), \(1,\)\]. .* batch=\(0,\)",
        ),
    ],
)
def test_unsupported_layers_are_refused_by_name(model, rules, message):
    with pytest.raises(ValueError, match=message):
        add_lora(model(nnx.Rngs(0)), rules, rngs=nnx.Rngs(1))


def test_an_ambiguous_stack_is_adapted_if_its_axis_is_specified():
    keys = jax.random.split(jax.random.key(0), 3)
    model = nnx.vmap(lambda key: nnx.Linear(3, 5, rngs=nnx.Rngs(key)))(keys)
    adapted = add_lora(model, LoraRule(path="", rank=2, batch=(0,)), rngs=nnx.Rngs(1))
    assert adapted.lora_a.shape == (3, 3, 2) and adapted.lora_b.shape == (3, 2, 5)


def test_subclasses_that_override_call_are_refused():
    class Rectified(nnx.Linear):
        def __call__(self, x, out_sharding=None):
            return nnx.relu(super().__call__(x, out_sharding=out_sharding))

    with pytest.raises(ValueError, match="Rectified overrides __call__"):
        add_lora(Rectified(6, 5, rngs=nnx.Rngs(0)), ALL, rngs=nnx.Rngs(1))


def test_a_layer_with_a_builtin_adapter_is_not_quantized():
    pytest.importorskip("qwix", reason="qwix is not installed: no quantized bases")
    with pytest.raises(ValueError, match="LoRALinear overrides __call__"):
        quantize(nnx.LoRALinear(6, 5, lora_rank=2, rngs=nnx.Rngs(0)))


def test_input_axes_may_be_listed_in_any_order():
    layer = nnx.LinearGeneral((4, 3), 5, axis=(-1, -2), rngs=nnx.Rngs(0))
    rule = LoraRule(path="", rank=2, init_b=normal)
    adapted, x = add_lora(layer, rule, rngs=nnx.Rngs(1)), jnp.ones((2, *layer.kernel.shape[:2]))
    assert largest(adapted(x), remove_lora(adapted, merge=True)(x)) < 1e-5


def test_rules_for_stacked_experts_need_both_axes():
    keys = jax.random.split(jax.random.key(0), 3)
    make = lambda key: nnx.Einsum("ebd,edf->ebf", (4, 6, 7), rngs=nnx.Rngs(key))
    experts = nnx.vmap(make)(keys)
    with pytest.raises(
        ValueError, match="1 axes of stacked layers and 1 axes of experts. List all"
    ):
        add_lora(experts, LoraRule(path="", rank=4, batch=(0,)), rngs=nnx.Rngs(1))
    rule = LoraRule(path="", rank=4, batch=(0, 1))
    adapter = nnx.state(add_lora(experts, rule, rngs=nnx.Rngs(1)), nnx.LoRAParam)
    (pair,) = find_pairs(adapter, lora_pairs(rule)).pairs
    assert (pair.batch, pair.m, pair.n) == ((3, 4), 6, 7)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": "query$"}, "Remove"),
        ({"path": "(?i)query"}, "Remove"),
        ({"path": "("}, "not a valid regular expression"),
        ({"rank": 0}, "rank must be an integer of at least 1"),
        ({"alpha": 0.0}, "alpha must be finite and not zero"),
        ({"alpha": float("nan")}, "alpha must be finite and not zero"),
        ({"dropout": 1.0}, "dropout must be at least 0 and less than 1"),
    ],
)
def test_invalid_rules_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        LoraRule(**{"path": ".*", "rank": 2} | fields)


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("linaer", {}, "no layer matches 'linaer'. .* can be quantized: .*linear"),
        ("linear", {"tile_size": 4}, "linear: tile_size 4 does not divide .* 6 entries"),
    ],
)
def test_layers_that_cannot_be_quantized_are_refused_by_name(path, options, message):
    pytest.importorskip("qwix", reason="qwix is not installed: quantized bases are not shown")
    with pytest.raises(ValueError, match=message):
        quantize(Model(nnx.Rngs(0)), path, **options)


def test_qwix_provider_refuses_dropout():
    pytest.importorskip("qwix", reason="qwix is not installed")
    with pytest.raises(ValueError, match="does not turn off the dropout of adapters in evaluation"):
        qwix_provider(LoraRule(path=".*", rank=2, dropout=0.1))


def test_quantizing_twice_and_removing_no_adapter_are_refused():
    pytest.importorskip("qwix", reason="qwix is not installed: quantized bases are not shown")
    model = Model(nnx.Rngs(0))
    with pytest.raises(ValueError, match="linear: the layer is already quantized"):
        quantize(quantize(model, "linear"), "linear")
    with pytest.raises(ValueError, match="no adapter that add_lora has added"):
        remove_lora(model, merge=True)
