"""Save and restore are bit-exact for any tree, dtype, optimizer and mesh."""

import functools
import os
import threading
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optimizers import (
    OPTIMIZERS,
    assert_trees_identical,
    every_optimizer,
    random_like,
    small_params,
    types,
)
from optimizers import hasty_compiler as hasty_compiler

from loft_jax import loft_adamw
from loft_jax.adapters import LoraRule, add_lora, lora_pairs
from loft_jax.algorithm.step import Blocks
from loft_jax.checkpoint import CheckpointMismatch, Checkpoints, _storage, digests
from loft_jax.optimizers.options import make_options

WRAPPERS = {
    "MultiSteps": lambda: optax.MultiSteps(loft_adamw(0.1), 2),
    "schedules": lambda: optax.chain(
        optax.clip(1.0), loft_adamw(optax.linear_schedule(0.1, 0.0, 9))
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(loft_adamw)(0.1),
    "apply_if_finite": lambda: optax.apply_if_finite(loft_adamw(0.1), 3),
    "masked": lambda: optax.masked(
        optax.adam(0.1), {"head": True, "layer0": False, "layer1": False}
    ),
    "mu_dtype": lambda: loft_adamw(0.1, mu_dtype="bfloat16"),
    "no state": lambda: optax.identity(),
}
every_wrapper = pytest.mark.parametrize("make", WRAPPERS.values(), ids=WRAPPERS.keys())


def round_trip(folder, wanted=None, **state):
    """Saves, and restores in a new manager to ``wanted``, by default to the saved state."""
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.save(1, **state)
    with Checkpoints(folder, read_only=True) as checkpoints:
        found = checkpoints.restore(**(state if wanted is None else wanted))
    assert found is not None
    return found


def like(tree):
    """Returns a tree of other values, so that nothing is restored by chance."""
    return jax.tree.map(jnp.zeros_like, tree)


@every_optimizer
def test_the_state_of_every_optimizer(make, tmp_path):
    params = small_params()
    check_state(make(), params, tmp_path)


@every_wrapper
def test_the_state_of_every_wrapper(make, tmp_path):
    check_state(make(), small_params(), tmp_path)


def check_state(tx, params, folder):
    fresh = tx.init(params)
    state = jax.tree.map(
        lambda x: x + 1 if x.dtype == jnp.int32 else random_like(x, 7) if x.ndim else x, fresh
    )
    found = round_trip(
        folder, {"adapter": like(params), "opt_state": fresh}, adapter=params, opt_state=state
    )
    assert_trees_identical(found.adapter, params)
    assert_trees_identical(found.opt_state, state)
    assert types(found.opt_state) == types(state)  # including weak types


def test_the_state_of_a_flax_optimizer(tmp_path):
    rule = LoraRule(path=r"layers/\d+", rank=2, alpha=4)

    def make(seed):
        model = nnx.Sequential(nnx.Linear(6, 5, rngs=nnx.Rngs(0)), nnx.gelu)
        model = add_lora(model, rule, rngs=nnx.Rngs(seed))
        tx = loft_adamw(0.1, pairs=lora_pairs(rule))
        return model, nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)

    model, optimizer = make(1)

    @nnx.jit
    def train_step(model, optimizer):
        loss_fn = lambda model: jnp.sum(model(jnp.ones((3, 6))))
        grads = nnx.grad(loss_fn, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, grads)

    train_step(model, optimizer)
    other_model, other_optimizer = make(2)
    wanted = {
        "adapter": nnx.state(other_model, nnx.LoRAParam),
        "opt_state": nnx.state(other_optimizer),
    }
    state = {"adapter": nnx.state(model, nnx.LoRAParam), "opt_state": nnx.state(optimizer)}
    found = round_trip(tmp_path, wanted, **state)
    nnx.update(other_model, found.adapter)
    nnx.update(other_optimizer, found.opt_state)
    assert_trees_identical(nnx.state(other_model), nnx.state(model))
    assert_trees_identical(nnx.state(other_optimizer), nnx.state(optimizer))
    assert int(other_optimizer.step[...]) == 1
    names = {path.name for path in (tmp_path / "1").iterdir()}
    assert {"adapter", "opt_state", "meta"} <= names

    # `nnx.state` drops the options of the state; the optimizer's attributes have them.
    state["opt_state"] = (optimizer.opt_state, optimizer.step)
    _, fresh = make(3)
    found = round_trip(
        tmp_path / "2", state | {"opt_state": (fresh.opt_state, fresh.step)}, **state
    )
    fresh.opt_state, fresh.step = found.opt_state
    assert_trees_identical(nnx.state(fresh), nnx.state(optimizer))
    other = fresh.opt_state[0]._replace(options=make_options("diagonal", Blocks()))
    wanted = (other, *fresh.opt_state[1:]), fresh.step
    with (
        Checkpoints(tmp_path / "2") as checkpoints,
        pytest.raises(CheckpointMismatch, match="0/0/options: .*'calibrated' saved"),
    ):
        checkpoints.restore(**state | {"opt_state": wanted})


class Fields(NamedTuple):
    left: jax.Array
    right: object


DTYPES = (
    "bool int2 int4 int8 uint8 int16 int32 uint32 float8_e4m3fn bfloat16 float16 float32 complex64"
)


@pytest.mark.parametrize("dtype", DTYPES.split())
@pytest.mark.parametrize("shape", [(), (3,), (0, 4), (2, 3, 5), (1, 1)], ids=str)
def test_every_dtype_and_shape(dtype, shape, tmp_path):
    values = np.random.default_rng(0).integers(0, 2, shape) - (dtype in ("int4", "int8"))
    x = jnp.asarray(values, dtype) * jnp.asarray(1.5 if "float" in dtype else 1, dtype)
    tree = {"jax": x, "numpy": np.asarray(x), "pair": (x, [x, None])}
    found = round_trip(tmp_path, adapter=tree, opt_state=optax.EmptyState())
    assert_trees_identical(found.adapter, tree)
    assert isinstance(found.adapter["numpy"], np.ndarray)
    assert isinstance(found.adapter["jax"], jax.Array)


UNSTORABLE = ["uint4", "int1", "uint2", "float6_e2m3fn", "float8_e4m3", "float128", "datetime64[s]"]


@pytest.mark.parametrize("dtype", UNSTORABLE)
def test_a_dtype_that_cannot_be_stored_is_refused_by_path(dtype, tmp_path):
    x = np.zeros(3, getattr(ml_dtypes, dtype, dtype))
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(TypeError, match=r"adapter: layer/x has dtype .*, which cannot be saved"),
    ):
        checkpoints.save(1, adapter={"layer": {"x": x}}, opt_state=())


def test_a_leaf_that_was_donated_is_refused_by_path(tmp_path):
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    before = {"layer": {"x": jnp.ones(3)}}
    step(before)
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(ValueError, match="adapter: layer/x was deleted: it was donated to a step"),
    ):
        checkpoints.save(1, adapter=before, opt_state=())


def test_float64_and_numbers_that_jax_would_shorten(tmp_path, x64):
    tree = {"f": jnp.array([0.1, 1e300]), "i": jnp.array(2**40), "c": jnp.array([1j * 1e-300])}
    tree |= {"python": 0.1, "big": 2**40, "flag": True, "numpy": np.float64(0.1)}
    found = round_trip(tmp_path, adapter=tree, opt_state=())
    assert_trees_identical(jax.tree.map(np.asarray, found.adapter), jax.tree.map(np.asarray, tree))
    assert [type(found.adapter[k]) for k in ("python", "big", "flag")] == [float, int, bool]
    with jax.enable_x64(False), Checkpoints(tmp_path, read_only=True) as checkpoints:
        wanted = {k: jnp.zeros(tree[k].shape) if k == "f" else tree[k] for k in tree}
        with pytest.raises(CheckpointMismatch, match="adapter: f: float64 saved.*jax_enable_x64"):
            checkpoints.restore(adapter=wanted, opt_state=())


def test_special_values_keep_their_bits(tmp_path):
    bits = np.array([0x7FC00001, 0xFFC0DEAD, 0x80000000, 0x00000001, 0x7F800000], np.uint32)
    x = jax.lax.bitcast_convert_type(jnp.asarray(bits), jnp.float32)
    found = round_trip(tmp_path, adapter={"x": x}, opt_state=())
    assert (jax.lax.bitcast_convert_type(found.adapter["x"], jnp.uint32) == bits).all()


def test_names_and_nodes_of_all_kinds(tmp_path):
    x = jnp.arange(3.0)
    tree = Fields(
        {"a.b": x, "a/b": x + 1, "": x + 2, "..": x + 3, "ä %\n'\"": x + 4, "a" * 300: x + 5},
        [None, optax.MaskedNode(), (), {}, optax.EmptyState(), (x + 6, {"value": x + 7})],
    )
    found = round_trip(tmp_path, adapter=tree, opt_state=x)
    assert_trees_identical(found.adapter, tree)
    assert_trees_identical(found.opt_state, x)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_random_keys(impl, tmp_path):
    key = jax.random.key(3, impl=impl)
    keys = {"typed": key, "many": jax.random.split(key, (2, 3)), "old": jax.random.PRNGKey(5)}
    wanted = {"typed": jax.random.key(0, impl=impl), "many": jax.random.split(key, (2, 3))}
    wanted["old"] = jax.random.PRNGKey(0)
    found = round_trip(
        tmp_path,
        {"adapter": jnp.ones(1), "key": wanted},
        adapter=jnp.ones(1),
        opt_state=(),
        key=keys,
    )
    assert types_of_keys(found.key) == types_of_keys(keys)
    data = lambda tree: [jax.random.key_data(k) for k in jax.tree.leaves(tree)]
    assert all(map(np.array_equal, data(found.key), data(keys)))
    assert jax.random.normal(found.key["typed"]) == jax.random.normal(key)
    abstract = {"adapter": jnp.ones(1), "key": jax.eval_shape(lambda: wanted)}
    with Checkpoints(tmp_path) as checkpoints:
        again = checkpoints.restore(**abstract)
    assert all(map(np.array_equal, data(again.key), data(keys)))


def types_of_keys(tree):
    return jax.tree.map(lambda k: f"{k.dtype}{k.shape}", tree)


@pytest.mark.parametrize("data", [None, b"\x00\xff", {"epoch": 1, "order": [3, 1.5, "x", None]}, 7])
def test_positions_in_the_data(data, tmp_path):
    found = round_trip(tmp_path, {"adapter": {}}, adapter={}, opt_state=(), data=data)
    assert found.data == data and type(found.data) is type(data)


MESHES = {"8": (8,), "4x2": (4, 2), "2x4": (2, 4), "1x1": (1, 1)}
SPECS = {"8": P("x"), "4x2": P("x", "y"), "2x4": P("y", "x"), "1x1": P()}


def mesh_of(name, axis_type):
    shape = MESHES[name]
    return jax.make_mesh(
        shape,
        ("x", "y")[: len(shape)],
        axis_types=(axis_type,) * len(shape),
        devices=jax.devices()[: int(np.prod(shape))],
    )


def abstract(sharding, x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


@pytest.mark.parametrize("axis_types", [(AxisType.Auto, AxisType.Explicit)], ids=["Auto-Explicit"])
@pytest.mark.parametrize("to", MESHES)
@pytest.mark.parametrize("of", MESHES)
def test_from_any_mesh_to_any_other(of, to, axis_types, tmp_path):
    host = random_like({"w": jnp.zeros((16, 8)), "k": jnp.zeros((8, 16), jnp.bfloat16)}, 0)
    for order, (first, second) in enumerate([axis_types, axis_types[::-1]]):
        place = NamedSharding(mesh_of(of, first), SPECS[of])
        saved = jax.device_put(host, place)
        assert digests(saved) == digests(host) == digests(jax.device_get(host))
        sharding = NamedSharding(mesh_of(to, second), SPECS[to])
        wanted = jax.tree.map(functools.partial(abstract, sharding), host)
        key = jax.device_put(jax.random.key(1), NamedSharding(place.mesh, P()))
        wanted_key = jax.device_put(jax.random.key(0), NamedSharding(sharding.mesh, P()))
        found = round_trip(
            tmp_path / str(order),
            {"adapter": wanted, "opt_state": {"count": jnp.int32(0)}, "key": wanted_key},
            adapter=saved,
            opt_state={"count": jnp.int32(3)},
            key=key,
        )
        assert_trees_identical(jax.device_get(found.adapter), jax.device_get(host))
        assert all(x.sharding == sharding for x in jax.tree.leaves(found.adapter))
        assert found.key.sharding.is_equivalent_to(wanted_key.sharding, 0)
        # An uncommitted counter combines with arrays on any mesh.
        assert not found.opt_state["count"].committed
        assert (found.adapter["w"] * found.opt_state["count"]).sharding.mesh == sharding.mesh


def test_without_a_sharding_arrays_go_to_the_default_device(tmp_path):
    x = jax.device_put(jnp.arange(8.0), NamedSharding(mesh_of("8", AxisType.Auto), P("x")))
    wanted = {"adapter": jax.eval_shape(lambda: jnp.zeros(8))}
    found = round_trip(tmp_path, wanted, adapter=x, opt_state=())
    assert found.adapter.devices() == {jax.devices()[0]} and not found.adapter.committed
    assert (found.adapter == jnp.arange(8.0)).all()


@pytest.mark.parametrize("to", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("of", ["float32", "bfloat16", "float16"])
def test_the_targets_dtypes_are_followed(of, to, tmp_path):
    x = random_like(jnp.zeros((16, 8), of), 3)
    sharding = NamedSharding(mesh_of("4x2", AxisType.Auto), P("x", "y"))
    wanted = {
        "adapter": {
            "bound": jax.ShapeDtypeStruct(x.shape, to, sharding=sharding),
            "free": jnp.zeros(x.shape, to),
            "host": np.zeros(x.shape, to),
        }
    }
    found = round_trip(tmp_path, wanted, adapter={"bound": x, "free": x, "host": x}, opt_state=())
    for name, y in found.adapter.items():
        assert y.dtype == to, name
        assert (np.asarray(y) == np.asarray(x.astype(to))).all(), name
    assert found.adapter["bound"].sharding == sharding


def test_a_number_that_gives_way_to_other_dtypes_goes_on_doing_so(tmp_path):
    """As injected learning rates: otherwise they would promote bfloat16 updates to float32."""
    rate = jnp.asarray(0.1)
    assert rate.weak_type
    found = round_trip(tmp_path, adapter={"rate": rate}, opt_state=())
    assert (found.adapter["rate"] * jnp.ones(2, jnp.bfloat16)).dtype == jnp.bfloat16
    assert found.adapter["rate"] == rate


def test_steps_may_donate_what_is_being_saved(tmp_path):
    """A step must not write to donated buffers that Orbax still reads."""
    mesh = mesh_of("8", AxisType.Auto)
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 1.5 + 1, tree), donate_argnums=0)
    draw = functools.partial(jax.random.normal, shape=(512, 512))
    state = {
        "one": draw(jax.random.key(0)),
        "copies": jax.device_put(draw(jax.random.key(1)), NamedSharding(mesh, P())),
        "parts": jax.device_put(draw(jax.random.key(2)), NamedSharding(mesh, P("x"))),
    }
    expected = {}
    with Checkpoints(tmp_path, keep=100) as checkpoints:
        for number in range(1, 9):
            state = step(state)
            expected[number] = jax.tree.map(np.array, jax.tree.map(jnp.copy, state))
            checkpoints.save(number, adapter=state, opt_state=())
            for _ in range(3):
                state = step(state)
            jax.block_until_ready(state)
        for number in checkpoints.steps():
            found = checkpoints.restore(adapter=state, step=number)
            assert found is not None
            assert_trees_identical(jax.device_get(found.adapter), expected[number])


def test_numpy_arrays_may_change_while_they_are_saved(tmp_path, monkeypatch):
    """Those of a caller that updates in place. The files are written as late as possible."""
    begin, changed = _storage.begin, threading.Event()

    def begin_late(*args):
        def finish(meta):
            assert changed.wait(20)
            begin(*args)(meta)

        return finish

    monkeypatch.setattr(_storage, "begin", begin_late)
    adapter, state = {"w": np.arange(6.0)}, {"n": np.array(1)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, adapter=adapter, opt_state=state)
        adapter["w"] += 1
        state["n"] += 1
        changed.set()
    with Checkpoints(tmp_path) as checkpoints:
        found = checkpoints.restore(adapter=adapter, opt_state=state)
    assert found.adapter["w"].tolist() == [0, 1, 2, 3, 4, 5] and found.opt_state["n"] == 1


def test_what_the_host_reads_is_never_donated_in_place():
    """The property the test above relies on, without a race."""
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    for x in (jnp.zeros((512, 512)), jax.device_put(jnp.zeros((8, 512)), jax.devices()[3])):
        before, after = step(x), None
        read = np.asarray(before)  # no copy, on the CPU
        after = jax.block_until_ready(step(before))
        assert (read == 1).all() and (np.asarray(after) == 2).all()


def test_the_folder_is_readable_by_orbax_alone(tmp_path):
    """No pickles, no classes of this package: plain Orbax reads the adapter by path."""
    import orbax.checkpoint as ocp
    from orbax.checkpoint.experimental import v1

    layer = {"lora_a": jnp.ones((3, 2)), "lora_b": jnp.zeros((2, 3))}
    adapter = {"layer": layer}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, adapter=adapter, opt_state=loft_adamw(0.1).init(adapter))
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(os.fspath(tmp_path / "1" / "adapter"))
    for read in (found, v1.load(tmp_path / "1", checkpointable_name="adapter")):
        assert_trees_identical(read, {f"layer/{k}": np.asarray(x) for k, x in layer.items()})


def test_all_optimizers_of_the_table_are_covered():
    assert len(OPTIMIZERS) >= 24
