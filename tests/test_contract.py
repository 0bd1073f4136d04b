"""What every optimizer of this package owes to Optax, JAX, Flax and Orbax, one table through all.

Meshes of several devices are in `tests/sharding`.
"""

import contextlib
import functools
import inspect
import itertools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.core import freeze
from flax.training.train_state import TrainState
from optimizers import (
    BASELINES,
    LOFT,
    OPTIMIZERS,
    assert_trees_close,
    assert_trees_identical,
    every_kind,
    every_loft_kind,
    every_optimizer,
    quick,
    random_like,
    small_gradients,
    small_params,
    train,
    types,
)
from optimizers import hasty_compiler as hasty_compiler

from loft_jax import LoraAxes, LoraPairs, loft_adamw, loft_muon, loft_sgd, scale_by_loft_adam
from loft_jax.baselines import lora_plus

ADAMW = functools.partial(optax.adamw, learning_rate=0.1)
is_masked = lambda x: isinstance(x, optax.MaskedNode)
is_factor = lambda path: "lora" in jax.tree_util.keystr(path)
labels = lambda params: jax.tree.map_with_path(
    lambda path, _: "adapters" if is_factor(path) else "head", params
)


def without_head(tree: Any) -> Any:
    """The tree as `optax.masked` shows it to the optimizer of the adapters."""
    return {**tree, "head": optax.MaskedNode()}


# Optax.


@every_optimizer
def test_a_chain_passes_params_and_extra_arguments(make):
    params, gradients = small_params(), small_gradients(small_params())
    got, _ = train(optax.chain(optax.scale(2.0), quick(make), optax.scale(0.5)), params, gradients)
    tx, state, expected = quick(make), quick(make).init(params), params
    for gradient in gradients:
        updates, state = tx.update(jax.tree.map(lambda g: 2 * g, gradient), state, expected)
        expected = jax.tree.map(lambda p, u: p + u / 2, expected, updates)
    assert_trees_close(got, expected)


@every_optimizer
def test_partition_gives_adapters_and_head_their_own_optimizers(make):
    params, gradients = small_params(), small_gradients(small_params())
    tx = optax.partition({"adapters": quick(make), "head": optax.sgd(0.1)}, labels)
    got, _ = train(tx, params, gradients)
    adapters, _ = train(quick(make), without_head(params), [without_head(g) for g in gradients])
    head = params["head"] - 0.1 * sum(g["head"] for g in gradients)
    assert_trees_close(got, {**adapters, "head": head})


@every_optimizer
def test_partition_of_the_two_factors_is_refused_with_their_paths(make):
    params = small_params()
    tx = optax.partition(
        {"a": quick(make), "b": optax.sgd(0.1)},
        lambda tree: jax.tree.map_with_path(
            lambda path, _: "a" if "lora_a" in jax.tree_util.keystr(path) else "b", tree
        ),
    )
    with pytest.raises(ValueError, match=r"layer1/lora_a: no partner") as error:
        tx.init(params)
    assert "one label of optax.partition" in str(error.value)


@every_optimizer
def test_masked_leaves_pass_through(make):
    params, gradients = small_params(), small_gradients(small_params(), 2)
    mask = jax.tree.map_with_path(lambda path, _: is_factor(path), params)
    got, _ = train(optax.masked(quick(make), mask), params, gradients)
    adapters, _ = train(quick(make), without_head(params), [without_head(g) for g in gradients])
    head = params["head"] + sum(g["head"] for g in gradients)
    assert_trees_close(got, {**adapters, "head": head})


def skip_large(*args):
    return optax.skip_large_updates(*args, max_squared_norm=1e6)


@every_optimizer
@pytest.mark.parametrize("skip", [None, skip_large, optax.skip_not_finite])
def test_multi_steps_is_one_step_on_the_mean(make, skip):
    params, (one, two, *_) = small_params(), small_gradients(small_params())
    bad = {None: [], skip_large: [1e6], optax.skip_not_finite: [np.nan]}[skip]
    skipped = [optax.tree.scale(factor, one) for factor in bad]
    tx = optax.MultiSteps(quick(make), 2, should_skip_update_fn=skip).gradient_transformation()
    got, state = train(tx, params, [one, *skipped, two, *skipped, two, one])
    mean = jax.tree.map(lambda g, h: (g + h) / 2, one, two)
    expected, inner = train(quick(make), params, [mean, mean])
    assert int(state.gradient_step) == 2
    assert_trees_close(got, expected)
    assert_trees_close(state.inner_opt_state, inner)


# AdamW among them: what it owes its user here is what ours do.
@pytest.mark.parametrize("make", [*OPTIMIZERS.values(), ADAMW], ids=[*OPTIMIZERS, "optax.adamw"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_apply_if_finite_skips_a_bad_gradient_as_if_it_never_came(make, bad):
    params, gradients = small_params(), small_gradients(small_params())
    tx = optax.apply_if_finite(quick(make), max_consecutive_errors=3)
    before, state = train(tx, params, gradients[:2])
    broken = jax.tree.map(lambda g: g.at[0, 0].set(bad), gradients[2])
    after, skipped = train(tx, before, [broken], state)
    assert int(skipped.total_notfinite) == 1
    assert_trees_identical((after, skipped.inner_state), (before, state.inner_state))
    got, _ = train(tx, after, gradients[2:], skipped)
    assert_trees_identical(got, train(quick(make), params, gradients)[0])


@every_kind
def test_inject_hyperparams_puts_numbers_in_the_state(make):
    params, gradients = small_params(), small_gradients(small_params(), 2)
    injected = functools.partial(optax.inject_hyperparams(make.func), **make.keywords)
    tx = quick(injected, pairs=LoraPairs())
    state = tx.init(params)
    defaults = {k: v.default for k, v in inspect.signature(make.func).parameters.items()}
    numbers = {k: v for k, v in {**defaults, **make.keywords}.items() if type(v) in (int, float)}
    assert numbers.keys() == state.hyperparams.keys()
    for name, number in numbers.items():
        np.testing.assert_allclose(state.hyperparams[name], number, rtol=1e-6)
    knob = next(k for k in ("learning_rate", "max_norm", "eps", "momentum") if k in numbers)
    for setting in (numbers[knob], 0.03):
        state = optax.tree.set(state, **{knob: jnp.float32(setting)})
        plain = make(**{**make.keywords, knob: setting})
        expected, _ = train(plain, params, gradients)
        assert_trees_close(train(tx, params, gradients, state)[0], expected)


@every_optimizer
def test_schedule_free_runs(make):
    params, gradients = small_params(), small_gradients(small_params())
    tx = optax.contrib.schedule_free(quick(make), learning_rate=0.1, b1=0.9)
    got, state = train(tx, params, gradients)
    evaluated = optax.contrib.schedule_free_eval_params(state, got)
    for path, x in jax.tree_util.tree_leaves_with_path((got, evaluated)):
        assert np.isfinite(x).all(), path
    assert float(jnp.abs(got["head"] - params["head"]).max()) > 1e-3


@every_optimizer
def test_reduce_on_plateau_scales_the_updates(make):
    params, gradients = small_params(), small_gradients(small_params(), 2)
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1)
    got, state = train(optax.chain(quick(make), plateau), params, gradients, value=jnp.float32(1.0))
    assert float(state[1].scale) == 0.5  # the value did not improve in the second step
    middle, inner = train(quick(make), params, gradients[:1])
    updates, _ = quick(make).update(gradients[1], inner, middle)
    assert_trees_close(got, optax.apply_updates(middle, optax.tree.scale(0.5, updates)))


@every_optimizer
def test_tree_map_params_reaches_every_leaf_of_the_state(make):
    params = small_params()
    specs = jax.tree.map_with_path(lambda path, _: jax.tree_util.keystr(path), params)
    state = quick(make).init(params)
    mapped = optax.tree_map_params(
        quick(make),
        lambda leaf, spec: leaf if is_masked(leaf) else spec,
        state,
        specs,
        transform_non_params=lambda _: "scalar",
        is_leaf=is_masked,
    )
    for path, label in jax.tree_util.tree_leaves_with_path(mapped):
        where = jax.tree_util.keystr(path)
        assert label == "scalar" or where.endswith(label), where
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    alone = quick(make).init(without_head(params))
    head = jax.tree.leaves(alone, is_leaf=is_masked)
    if not any(is_masked(x) for x in head if x is not None):  # then no is_leaf is needed
        doubled = optax.tree_map_params(quick(make), lambda x, _: x + 1, alone, without_head(specs))
        assert jax.tree.structure(doubled) == jax.tree.structure(alone)


@every_optimizer
def test_tree_get_and_set_reach_the_counters(make):
    params, gradients = small_params(), small_gradients(small_params(), 1)
    _, state = train(quick(make), params, gradients)
    found = {key: optax.tree.get_all_with_path(state, key) for key in ("count", "active")}
    assert found["active"] or make in BASELINES.values()
    assert all(int(v) == 1 for _, v in found["count"])
    assert all(int(v) in (0, 1) for _, v in found["active"])
    changed = state
    for key, value in {"active": 0, "count": 7}.items():
        if found[key]:
            changed = optax.tree.set(changed, **{key: jnp.int32(value)})
        values = [int(v) for _, v in optax.tree.get_all_with_path(changed, key)]
        assert values == [value] * len(found[key])
    train(quick(make), params, gradients, changed)


# JAX.


@every_optimizer
def test_a_donated_compiled_scan_equals_an_uncompiled_loop(make):
    params, gradients, tx = small_params(), small_gradients(small_params(), 3), make()

    def step(carry, gradient):
        updates, state = tx.update(gradient, carry[1], carry[0])
        return (optax.apply_updates(carry[0], updates), state), None

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *gradients)
    scan = jax.jit(lambda carry: jax.lax.scan(step, carry, stacked)[0], donate_argnums=0)
    expected = train(tx, params, gradients)
    for init in (tx.init, jax.jit(tx.init)):
        got = scan((jax.tree.map(jnp.copy, params), init(params)))
        assert_trees_close(got, expected)


@every_optimizer
def test_a_step_is_traced_once(make):
    params, gradients, traces, tx = small_params(), small_gradients(small_params()), [], make()
    step = jax.jit(lambda *args: traces.append(args) or tx.update(*args))
    state = tx.init(params)
    for gradient in gradients:
        step.trace(gradient, state, params)
        params, state = train(quick(make), params, [gradient], state)
    assert len(traces) == 1


@every_kind
def test_vmap_over_models_equals_separate_runs(make):
    models = [random_like(small_params(), seed) for seed in (11, 12)]
    gradients = [[random_like(p, 10 * k + i) for k in range(3)] for i, p in enumerate(models)]
    stack = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    tx = optax.GradientTransformation(jax.vmap(quick(make).init), jax.vmap(quick(make).update))
    together = train(tx, stack(models), [stack(g) for g in zip(*gradients, strict=True)])
    apart = stack([train(quick(make), p, g) for p, g in zip(models, gradients, strict=True)])
    assert_trees_close(together, apart)


@every_kind
def test_each_layout_of_an_adapter_equals_plain_matrices(make):
    """Layers on axis 0 or 1, several row axes: one update rule, whatever the arrays look like."""
    matrices = [{"lora_a": jnp.zeros((6, 2)), "lora_b": jnp.zeros((2, 4))}] * 6

    def laid_out(tree):
        stack = lambda layers, axis: jax.tree.map(lambda *x: jnp.stack(x, axis), *layers)
        a, b = tree[5]["lora_a"].reshape(2, 3, 2), tree[5]["lora_b"].reshape(2, 2, 2)
        return {
            "leading": stack(tree[:3], 0),
            "second": stack(tree[3:5], 1),
            "heads": {"lora_a": a, "lora_b": b},
        }

    axes = (("second/.*", LoraAxes(batch=(1,))), ("heads/.*", LoraAxes()))
    pairs = LoraPairs(axes=axes)
    params = random_like(matrices, 0)
    gradients = small_gradients(params, 3)
    got, _ = train(quick(make, pairs=pairs), laid_out(params), [laid_out(g) for g in gradients])
    assert_trees_close(got, laid_out(train(quick(make), params, gradients)[0]))


class Adapter(NamedTuple):
    lora_a: jax.Array
    bias: jax.Array | None
    lora_b: jax.Array


@every_kind
def test_containers_of_every_kind_hold_parameters(make):
    def contained(tree):
        first, second = tree["layer0"], tree["layer1"]
        return freeze(
            {
                "layers": [Adapter(first["lora_a"], None, first["lora_b"]), (second, None)],
                "masked": optax.MaskedNode(),
                "last": {"head": tree["head"], "nothing": {}},
            }
        )

    params, gradients = small_params(), small_gradients(small_params(), 3)
    got, _ = train(quick(make), contained(params), [contained(g) for g in gradients])
    assert_trees_close(got, contained(train(quick(make), params, gradients)[0]))


@every_loft_kind  # baselines that modify `optax.adamw` keep its dtypes
def test_bfloat16_parameters_have_float32_state(make):
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (small_params(), small_params()))
    params, gradient = rounded
    gradient = {**gradient, "layer0": small_params()["layer0"]}  # float32: gradients may differ
    state = make().init(params)
    updates, after = quick(make).update(gradient, state, params)
    assert types(updates) == types(gradient)
    assert types(after) == types(state)
    assert {x.dtype for x in jax.tree.leaves(state)} <= {np.dtype("float32"), np.dtype("int32")}
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (gradient, params))
    expected, _ = quick(make).update(wide[0], state, wide[1])
    assert_trees_close(updates, expected, rtol=2**-6)  # of the updates' dtype


@every_loft_kind
def test_numbers_of_python_are_leaves_as_in_optax(make):
    params, gradient = ({**small_params(), "temperature": x} for x in (0.5, 0.25))
    updates, _ = make().update(gradient, make().init(params), params)
    as_array = lambda tree: {**tree, "temperature": jnp.float32(tree["temperature"])}
    got, _ = make().update(as_array(gradient), make().init(as_array(params)), as_array(params))
    assert_trees_close(updates, got)


def every_one_with(option):
    """The optimizers that take an option."""
    takes = lambda make: option in inspect.signature(make.func).parameters
    found = {name: make for name, make in OPTIMIZERS.items() if takes(make)}
    return pytest.mark.parametrize("make", found.values(), ids=found.keys())


@every_one_with("nu_dtype")
def test_nu_dtype_is_that_of_the_factors_second_moment_alone(make):
    params, gradients = small_params(), small_gradients(small_params(), 3)
    got, state = train(make(nu_dtype="bfloat16"), params, gradients)
    assert types(state) == types(make(nu_dtype=jnp.bfloat16).init(params))
    expected, full = train(quick(make), params, gradients)
    assert_trees_close(got, expected, rtol=0.2, atol=0.05)
    narrow = [x for x in jax.tree.leaves(state) if x.dtype == jnp.bfloat16]
    factors = [x for x in jax.tree.leaves(optax.tree.get(full, "nu")) if x.shape != (5, 3)]
    assert sorted(x.shape for x in narrow) == sorted(x.shape for x in factors)


@every_one_with("mu_dtype")
def test_mu_dtype_is_that_of_the_first_moment_alone(make):
    params, gradients = small_params(), small_gradients(small_params(), 2)
    got, state = train(make(mu_dtype="bfloat16"), params, gradients)
    assert types(state) == types(make(mu_dtype=jnp.bfloat16).init(params))
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        fields = {getattr(key, "name", None) for key in path}
        if fields & {"mu", "nu", "basis"}:
            adam_of_head = leaf.shape == (5, 3) and make is LOFT["loft_muon"]
            narrow = "mu" in fields and not adam_of_head
            assert leaf.dtype == (jnp.bfloat16 if narrow else jnp.float32), path
    assert_trees_close(got, train(quick(make), params, gradients)[0], rtol=2e-2, atol=2e-2)


@every_optimizer
def test_init_takes_shapes_alone(make):
    params = small_params()
    shapes = jax.eval_shape(lambda: params)
    state = quick(make).init(params)
    assert types(jax.eval_shape(quick(make).init, params)) == types(state)
    assert_trees_identical(quick(make).init(shapes), state)
    a_first = make.keywords.get("moves_first") == "a"
    assert sum(np.count_nonzero(x) for x in jax.tree.leaves(state)) == a_first


@every_optimizer
@pytest.mark.parametrize("rank", [1, 2])
def test_no_two_arrays_of_a_state_share_a_buffer(make, rank):
    """A shared one could not be donated."""
    params = {"lora_a": jnp.ones((6, rank)), "lora_b": jnp.ones((rank, 5)), "head": jnp.ones(3)}
    arrays = jax.tree.leaves((params, make().init(params)))
    assert len({x.unsafe_buffer_pointer() for x in arrays}) == len(arrays)


# Flax and Orbax.


class NnxModel(nnx.Module):
    """Its parameters have the paths and shapes of `small_params`."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.head = nnx.Param(jnp.zeros((5, 3)))
        self.layer0, self.layer1 = nnx.LoRA(6, 2, 5, rngs=rngs), nnx.LoRA(6, 2, 5, rngs=rngs)


@every_kind
@pytest.mark.parametrize("kind", [nnx.LoRAParam, nnx.Param])
def test_nnx_optimizer_equals_a_plain_tree(make, kind):
    params, gradients = small_params(), small_gradients(small_params(), 3)
    model = NnxModel()
    nnx.update(model, small_params())  # buffers of its own, to donate
    optimizer = nnx.Optimizer(model, make(), wrt=kind)

    @functools.partial(nnx.jit, donate_argnums=(0, 1))
    def step(model, optimizer, gradient):
        variables = nnx.state(model, kind)
        nnx.replace_by_pure_dict(variables, gradient)
        optimizer.update(model, variables)

    plain = (lambda tree: tree) if kind is nnx.Param else without_head
    for gradient in gradients:
        known = {k: v for k, v in plain(gradient).items() if not is_masked(v)}
        step(model, optimizer, known)
    expected, _ = train(quick(make), plain(params), [plain(g) for g in gradients])
    head = params["head"] if kind is nnx.LoRAParam else expected["head"]
    assert_trees_close(nnx.to_pure_dict(nnx.state(model)), {**expected, "head": head})


class LinenAdapter(nn.Module):
    @nn.compact
    def __call__(self, x):
        a = self.param("lora_a", nn.initializers.normal(), (6, 2))
        return x @ a @ self.param("lora_b", nn.initializers.normal(), (2, 5))


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x):
        head = self.param("head", nn.initializers.normal(), (5, 3))
        return (LinenAdapter(name="layer0")(x) + LinenAdapter(name="layer1")(x)) @ head


@every_optimizer
def test_train_state_equals_a_plain_tree(make):
    model, x, params = LinenModel(), random_like(jnp.zeros((4, 6)), 0), small_params()
    state = TrainState.create(apply_fn=model.apply, params=params, tx=quick(make))
    gradients = []
    with jax.disable_jit():
        for _ in range(3):
            loss = lambda params: jnp.sum(model.apply({"params": params}, x) ** 2)
            gradients.append(jax.grad(loss)(state.params))
            state = state.apply_gradients(grads=gradients[-1])
    assert int(state.step) == 3
    assert_trees_identical(state.params, train(quick(make), params, gradients)[0])


@every_optimizer
def test_orbax_restores_to_the_bit_and_training_goes_on(make, tmp_path):
    params, gradients = small_params(), small_gradients(small_params())
    middle = train(quick(make), params, gradients[:2])
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(2, args=ocp.args.StandardSave(middle))
        manager.wait_until_finished()
        abstract = jax.eval_shape(lambda: (params, quick(make).init(params)))
        restored = manager.restore(2, args=ocp.args.StandardRestore(abstract))
    assert_trees_identical(restored, middle)
    got = train(quick(make), restored[0], gradients[2:], restored[1])
    assert_trees_identical(got, train(quick(make), params, gradients))


# Errors.


def broken_gradient(change):
    gradient = random_like(small_params(), 1)
    change(gradient)
    return gradient


@every_optimizer
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g.pop("head"), "gradients do not have the structure"),
        (lambda g: g["layer0"].update(other=jnp.ones(3)), "gradients do not have the structure"),
        (lambda g: g["layer1"].update(lora_a=jnp.ones((6, 3))), "layer1/lora_a has shape"),
        (lambda g: g["layer0"].update(lora_b=None), "layer0/lora_b is NoneType"),
        (lambda g: g.update(head=optax.MaskedNode()), "head is MaskedNode"),
    ],
)
def test_gradients_unlike_the_parameters_are_refused(make, change, message):
    params = small_params()
    with pytest.raises(ValueError, match=message):
        make().update(broken_gradient(change), make().init(params), params)


@every_optimizer
def test_an_update_without_params_is_refused(make):
    params = small_params()
    with pytest.raises(ValueError, match="params"):
        make().update(params, make().init(params), None)


@every_optimizer
def test_a_state_of_another_rank_is_refused(make):
    params = small_params()
    wider = {**params, "layer1": {"lora_a": jnp.ones((6, 3)), "lora_b": jnp.ones((3, 5))}}
    state = make().init(params)
    has_factors = types(state) != types(make().init(wider))
    refused = pytest.raises(ValueError, match="layer1/lora_[ab] is not for a (factor|leaf) of")
    with refused if has_factors else contextlib.nullcontext():
        quick(make).update(wider, state, wider)


def test_a_state_of_the_other_second_moment_is_refused():
    params = small_params()
    state = quick(OPTIMIZERS["scale_by_loft_adam"]).init(params)
    with pytest.raises(ValueError, match="made with second_moment='calibrated', .*'factored'"):
        quick(OPTIMIZERS["scale_by_loft_adam_factored"]).update(params, state, params)


@pytest.mark.parametrize("make", [loft_adamw, loft_sgd, loft_muon])
@pytest.mark.parametrize("max_norm", [0.0, -1.0, float("nan")])
def test_a_norm_to_clip_by_is_positive(make, max_norm):
    with pytest.raises(ValueError, match="max_norm must be above 0"):
        make(0.1, max_norm=max_norm)


@pytest.mark.parametrize("block", ["scale_gradient", "calibrate", "reconstruct"])
def test_a_state_of_equal_shapes_and_other_options_is_refused(block):
    params = {"lora_a": jnp.ones((6, 1)), "lora_b": jnp.ones((1, 5))}
    state = scale_by_loft_adam().init(params)
    for other in ({block: False}, {"second_moment": "diagonal"}):
        with pytest.raises(ValueError, match="The state was made with"):
            jax.eval_shape(scale_by_loft_adam(**other).update, params, state, params)


@every_optimizer
def test_arguments_of_other_transformations_are_taken(make):
    params = small_params()
    updates, _ = make().update(params, make().init(params), params, value=1.0)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


@pytest.mark.parametrize("name", ["scale_by_loft_adam", "scale_by_loft_adam_factored"])
@pytest.mark.parametrize("number", [np.float64, jnp.float64])
def test_wide_hyperparameters_promote_nothing(name, number):
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: x.astype(jnp.float32), small_params())
        tx = OPTIMIZERS[name](b1=number(0.9), b2=number(0.999), eps=number(1e-8))
        state = tx.init(params)
        updates, after = jax.eval_shape(tx.update, params, state, params)
        assert types(after) == types(state)
        assert types(updates) == types(params)


@pytest.mark.parametrize("name", [*LOFT, *BASELINES])
def test_wide_gradients_and_scales_promote_no_loft_state(name):
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: x.astype(jnp.float32), small_params())
        params["layer1"]["lora_a"] = params["layer1"]["lora_a"].astype(jnp.float64)  # mixed
        tx = OPTIMIZERS[name](pairs=LoraPairs(scale=16 / np.sqrt(np.float64(4))))
        state = tx.init(params)
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), params)
        _, after = jax.eval_shape(tx.update, wide, state, params)
        if name in LOFT and name != "loft_muon":  # the rest: Optax's own promotion
            assert types(after) == types(state)


def test_a_state_with_another_momentum_is_refused():
    params = small_params()
    for of_state, momentum, found in ((None, 0.9, "no"), (0.9, None, "a")):
        state = loft_sgd(0.1, of_state).init(params)
        with pytest.raises(ValueError, match=f"has {found} moment, but momentum is {momentum}"):
            loft_sgd(0.1, momentum).update(params, state, params)


def test_a_state_of_another_optimizer_is_refused():
    # Without non-LoRA parameters the shapes of the states do not tell them apart.
    params = {"lora_a": jnp.ones((6, 2)), "lora_b": jnp.ones((2, 5))}
    several = [loft_adamw(0.1), loft_muon(0.1), loft_sgd(0.1, 0.9), loft_sgd(0.1)]
    for of_state, other in itertools.permutations(several, 2):
        state, own = of_state.init(params), other.init(params)
        if type(state[0]) is type(own[0]):
            continue
        name = type(state[0]).__name__
        with pytest.raises(ValueError, match=f"The state is a {name}, that of another optimizer"):
            other.update(params, (state[0], *own[1:]), params)


@pytest.mark.parametrize("make", [lora_plus, loft_adamw], ids=["checked", "check_state"])
def test_the_path_of_a_leaf_that_changed_is_told_and_not_a_similar_one(make):
    of = lambda rank, rows: {"lora_a": jnp.ones((6, rank)), "lora_b": jnp.ones((rank, rows))}
    params = {"proj": of(2, 5), "q_proj": of(2, 5), "norm": jnp.ones(4)}
    for changed, path in (
        (params | {"q_proj": of(3, 5)}, "q_proj/lora_a"),
        (params | {"norm": jnp.ones(3)}, "norm"),
    ):
        with pytest.raises(ValueError, match=f"The state of {path} is not for a (factor|leaf) of"):
            make(0.1).update(changed, make(0.1).init(params), changed)


@every_optimizer
@pytest.mark.parametrize("leaf", [jnp.ones(3, jnp.int8), jnp.ones(3, complex), jnp.ones(3, bool)])
def test_a_leaf_that_is_no_real_float_is_refused(make, leaf):
    with pytest.raises(TypeError, match=f"codes/0: {leaf.dtype}"):
        make().init({**small_params(), "codes": [leaf]})


@every_optimizer
@pytest.mark.parametrize(
    ("broken", "bad"),
    [("params", np.nan), ("gradients", np.nan), ("gradients", np.inf), ("gradients", -np.inf)],
)
def test_what_is_not_finite_shows_in_the_updates(make, broken, bad):
    """A finite update beside a state that is broken would go unnoticed."""
    args = {"params": small_params(), "gradients": random_like(small_params(), 1)}
    args[broken] = jax.tree.map(lambda x: x.at[0, 0].set(bad), args[broken])
    state = make().init(args["params"])
    updates, _ = quick(make).update(args["gradients"], state, args["params"])
    for layer in ("layer0", "layer1"):
        assert any(~np.isfinite(x).all() for x in jax.tree.leaves(updates[layer]))


_layer = {"lora_a": jnp.ones((6, 2)), "lora_b": jnp.ones((2, 5))}
CHANGED = {
    "grown": ({"layer2": _layer}, "layer2/lora_[ab]"),
    "shrunk": ({"layer1": None}, "layer1/lora_[ab]"),
    "a layer renamed": ({"layer1": None, "other": _layer}, "other/lora_[ab]"),
    "factors renamed": (
        {"layer1": {"lora_A": _layer["lora_a"], "lora_B": _layer["lora_b"]}},
        "layer1/lora_[ABab]",
    ),
    "a leaf became a tree": ({"head": {"kernel": jnp.ones((5, 3))}}, "head"),
    "a tree became a leaf": ({"layer1": jnp.ones((6, 2))}, "layer1"),
}


@every_optimizer
@pytest.mark.parametrize(("change", "path"), CHANGED.values(), ids=CHANGED)
def test_a_tree_that_changed_between_steps_is_refused_by_path(make, change, path):
    params = small_params()
    changed = {k: v for k, v in {**params, **change}.items() if v is not None}
    tx = make()
    with pytest.raises(ValueError, match=f"(?m)(of |^  |/){path}"):
        jax.eval_shape(tx.update, changed, tx.init(params), params)
    state = tx.init(params)
    if jax.tree.structure(state) == jax.tree.structure(jax.eval_shape(tx.init, changed)):
        return  # it has no state of leaves
    with pytest.raises(ValueError, match=f"(?m)(of |^  |/){path}"):
        jax.eval_shape(tx.update, changed, state, changed)


@every_kind
def test_no_two_arrays_of_parameters_and_state_share_a_buffer(make):
    """A buffer that serves twice cannot be donated."""
    params, tx = small_params(), make()
    state = tx.init(params)
    after = quick(make).update(params, state, params)
    for arrays in (jax.tree.leaves((params, state)), jax.tree.leaves(after)):
        assert len({x.unsafe_buffer_pointer() for x in arrays}) == len(arrays)


@every_kind
def test_parameters_that_are_one_array_are_trained_as_copies(make):
    a, b = jnp.eye(4), random_like(jnp.zeros((4, 4)), 3)
    shared = {"layer0": {"lora_a": b, "lora_b": b}, "layer1": {"lora_a": b, "lora_b": a}, "w": b}
    copied = jax.tree.map(jnp.array, shared)
    gradients = small_gradients(copied, 2)
    tx = quick(make)
    assert_trees_identical(train(tx, shared, gradients)[0], train(tx, copied, gradients)[0])
