"""`loft_jax.sharding`: where factors and any optimizer's state lie."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from layouts import LAYOUTS, abstract, parameters, shardings
from optimizers import OPTIMIZERS, every_optimizer

from loft_jax import LoraAxes, LoraPairs, loft_adamw
from loft_jax.adapters import LoraModel, LoraRule, add_lora, lora_pairs
from loft_jax.pairs.find import path_string
from loft_jax.sharding import adapter_shardings, factor_specs, state_shardings

LAYOUT = LAYOUTS["fsdp=4,tensor=2"]


@pytest.mark.parametrize(
    ("weight", "options", "a", "b"),
    [
        (P("f", "t"), {}, P("f", None), P(None, "t")),
        (P("f"), {}, P("f", None), P(None, None)),
        (None, {}, P(None, None), P(None, None)),
        (P(("d", "f"), "t"), {}, P(("d", "f"), None), P(None, "t")),
        (P("l", "f", "t"), {"batch": (0,)}, P("l", "f", None), P("l", None, "t")),
        (P("f", "l", "t"), {"batch": (1,)}, P("f", "l", None), P(None, "l", "t")),
        (P("f", "t", None), {"outputs": 2}, P("f", None), P(None, "t", None)),  # (in, heads, dim)
        (P("t", None, "f"), {"inputs": 2}, P("t", None, None), P(None, "f")),  # (heads, dim, out)
        (P("l", "e", "f", "t"), {"batch": (0, 1)}, P("l", "e", "f", None), P("l", "e", None, "t")),
    ],
)  # fmt: skip
def test_a_factor_is_split_like_the_axes_it_shares(weight, options, a, b):
    assert factor_specs(weight, **options) == (a, b)


def test_specs_that_fit_no_weight_are_refused():
    with pytest.raises(ValueError, match=r"is for more axes than the 2"):
        factor_specs(P("f", None, "t"))
    with pytest.raises(ValueError, match=r"batch \(5,\)"):
        factor_specs(P("f", None, "t"), batch=(5,))


def test_the_adapter_of_a_model_lies_as_its_weights_do():
    mesh = LAYOUT.mesh()
    kernel = lambda *axes: NamedSharding(mesh, P(*axes))
    weights = {
        "attention": {"q": {"kernel": kernel("fsdp", "tensor", None)}},
        "mlp": {"up": {"base": {"kernel": kernel(None, "fsdp", "tensor")}}},
        "head": {"kernel": kernel("tensor", "fsdp")},
    }
    like = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    adapter = {
        "attention": {"q": {"lora_a": like(16, 2), "lora_b": like(2, 4, 8)}},
        "mlp": {"up": {"lora_a": like(3, 16, 2), "lora_b": like(3, 2, 8)}},
        "head": {"kernel": like(8, 4)},
        "other": like(3),
    }
    found = adapter_shardings(adapter, weights)
    specs = jax.tree.map(lambda sharding: sharding.spec, found)
    assert specs == {
        "attention": {"q": {"lora_a": P("fsdp", None), "lora_b": P(None, "tensor", None)}},
        "mlp": {"up": {"lora_a": P(None, "fsdp", None), "lora_b": P(None, None, "tensor")}},
        "head": {"kernel": P("tensor", "fsdp")},
        "other": P(),
    }


@pytest.mark.parametrize(
    ("axes", "a", "b", "spec", "spec_a", "spec_b"),
    [
        (LoraAxes(rank_a=0, rank_b=-1), (2, 16), (8, 2), P("f", "t"), P(None, "f"), P("t", None)),
        (
            LoraAxes(batch=(0,), rank_a=1, rank_b=-1),
            (3, 2, 16),
            (3, 4, 8, 2),
            P("l", "f", None, "t"),
            P("l", None, "f"),
            P("l", None, "t", None),
        ),
    ],
)
def test_the_rank_is_whole_wherever_it_lies(axes, a, b, spec, spec_a, spec_b):
    mesh = jax.make_mesh((2, 2, 1), ("f", "t", "l"), devices=jax.devices()[:4])
    adapter = {"q": {"lora_a": jnp.ones(a), "lora_b": jnp.ones(b)}}
    weights = {"q": {"kernel": NamedSharding(mesh, spec)}}
    found = adapter_shardings(adapter, weights, LoraPairs(axes=axes))["q"]
    assert (found["lora_a"].spec, found["lora_b"].spec) == (spec_a, spec_b)


def test_a_weight_that_is_not_there_is_named():
    adapter = {"q": {"lora_a": jnp.ones((6, 2)), "lora_b": jnp.ones((2, 4))}}
    kernel = NamedSharding(LAYOUT.mesh(), P())
    with pytest.raises(ValueError, match=r"q/lora_a: there is no sharding .* q/kernel or q/base"):
        adapter_shardings(adapter, {"v": {"kernel": kernel}})
    with pytest.raises(ValueError, match="None of the weights has a NamedSharding"):
        adapter_shardings(adapter, {"q": {"kernel": jnp.ones((6, 4))}})
    wide = NamedSharding(LAYOUT.mesh(), P(None, None, "fsdp"))
    with pytest.raises(ValueError, match="q/lora_a: .* more axes than the 2"):
        adapter_shardings(adapter, {"q": {"kernel": wide}})


def wrapped(tx):
    labels = lambda params: jax.tree.map_with_path(
        lambda path, _: "rest" if "head" in str(path[0]) else "factors", params
    )
    return {
        "bare": tx,
        "accumulating": optax.MultiSteps(tx, 3).gradient_transformation(),
        "chained": optax.chain(optax.clip_by_global_norm(1.0), optax.apply_if_finite(tx, 3)),
        "partitioned": optax.partition({"factors": tx, "rest": optax.adafactor(1e-3)}, labels),
        "masked": optax.masked(tx, lambda p: {k: k != "head" for k in p}),
    }


WRAPPERS = list(wrapped(optax.adamw(1e-3)))


@every_optimizer
def test_the_state_lies_where_its_parameters_do(make):
    """Of every optimizer: wherever a state has its parameter's rows, it is sharded like them."""
    check_state(make())


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_state_lies_there_too(wrapper):
    check_state(wrapped(OPTIMIZERS["loft_adamw"]())[wrapper])


def check_state(tx):
    mesh = LAYOUT.mesh()
    params = abstract(parameters(), shardings(LAYOUT, mesh))
    found = state_shardings(tx, params)
    state = jax.eval_shape(tx.init, params)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    of_path = {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(params)}
    pairs = zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(found), strict=True)
    for (path, x), sharding in pairs:
        where = jax.tree_util.keystr(path)
        param = next((p for k, p in of_path.items() if where.endswith(k)), None)
        same_rows = param is not None and x.ndim == param.ndim
        spec = param.sharding.spec if same_rows else P()
        assert sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim), where
        sharding.shard_shape(x.shape)  # it divides


def test_a_jitted_init_makes_the_state_in_place():
    mesh = LAYOUT.mesh()
    params = jax.device_put(parameters(), shardings(LAYOUT, mesh))
    tx = loft_adamw(1e-3)
    wanted = state_shardings(tx, params)
    state = jax.jit(tx.init, out_shardings=wanted)(params)
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, state, wanted))
    nu = state[0].nu["stack"]["up"]["lora_b"]
    assert nu.addressable_shards[0].data.nbytes == nu.nbytes // 2


def test_an_axis_that_cannot_be_divided_is_whole():
    mesh = LAYOUT.mesh()
    split = lambda shape, *axes: jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=NamedSharding(mesh, P(*axes))
    )
    params = {"lora_a": split((8, 2), "fsdp", "tensor"), "lora_b": split((2, 4), None, "tensor")}
    found = state_shardings(loft_adamw(1e-3), params)[0]
    assert found.mu["lora_a"].spec == P("fsdp", "tensor")
    assert found.nu["lora_a"].spec == P("fsdp", None)  # three cross terms over two devices


def test_parameters_on_no_mesh_are_named():
    with pytest.raises(ValueError, match=r"no NamedSharding: q/lora_a, q/lora_b"):
        params = {"q": {"lora_a": jnp.ones((6, 2)), "lora_b": jnp.ones((2, 4))}}
        state_shardings(loft_adamw(1e-3), params)
    with pytest.raises(ValueError, match="1 shardings were given for 2"):
        state_shardings(loft_adamw(1e-3), params, {"q": NamedSharding(LAYOUT.mesh(), P())})
    with pytest.raises(ValueError, match="no parameters"):
        state_shardings(loft_adamw(1e-3), {})


class Model(nnx.Module):
    """A column- and a row-parallel layer, their kernels annotated as Flax has it."""

    def __init__(self, rngs):
        split = lambda *names: nnx.with_partitioning(nnx.initializers.lecun_normal(), names)
        self.up = nnx.Linear(16, 32, kernel_init=split("fsdp", "tensor"), rngs=rngs)
        self.down = nnx.Linear(32, 16, kernel_init=split("tensor", "fsdp"), rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.gelu(self.up(x)))


RULE = LoraRule(path="up|down", rank=2, alpha=4)


def test_nnx_metadata_says_where_adapter_and_state_lie():
    """Named axes of the kernels reach the factors, and from there the optimizer's state."""
    mesh = LAYOUT.mesh()
    with jax.set_mesh(mesh):
        model = nnx.eval_shape(lambda: add_lora(Model(nnx.Rngs(0)), RULE, rngs=nnx.Rngs(1)))
    adapter = nnx.state(model, nnx.LoRAParam)
    tx = loft_adamw(1e-3, pairs=lora_pairs(RULE))
    found = state_shardings(tx, adapter, nnx.get_named_sharding(adapter, mesh))
    state = jax.eval_shape(tx.init, adapter)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    nu = nnx.to_pure_dict(found[0].nu)
    assert nu["up"]["lora_a"].spec == P("fsdp", None)
    assert nu["down"]["lora_b"].spec == P(None, "fsdp")


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_an_nnx_optimizer_made_under_jit_lies_on_the_mesh(axis_type):
    """What Flax makes of its own metadata is what `state_shardings` says."""
    mesh = LAYOUT.mesh(axis_type)
    tx = loft_adamw(1e-3, pairs=lora_pairs(RULE))

    @nnx.jit
    def create():
        model = add_lora(Model(nnx.Rngs(0)), RULE, rngs=nnx.Rngs(1))
        return model, nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)

    with jax.set_mesh(mesh):
        model, optimizer = create()
    adapter = nnx.state(model, nnx.LoRAParam)
    wanted = state_shardings(tx, adapter, nnx.get_named_sharding(adapter, mesh))
    # By their paths: Flax has the fields in another order.
    by_path = lambda tree: {
        path_string(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }
    wanted, got = by_path(wanted), by_path(nnx.state(optimizer)["opt_state"])
    assert got.keys() == wanted.keys()
    for path, x in got.items():
        assert x.sharding.is_equivalent_to(wanted[path], x.ndim), path
    assert wanted["0/nu/down/lora_a"].spec == P("tensor", None)


def test_linen_boxes_say_it_too():
    mesh = LAYOUT.mesh()
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("fsdp", "tensor"))
    model = LoraModel(nn.Dense(32, kernel_init=init), LoraRule(path="", rank=2))
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 16)))
    params = {k: v for k, v in variables["params"].items() if k.startswith("lora")}
    tx = loft_adamw(1e-3)
    found = state_shardings(tx, params, nn.get_sharding(params, mesh))
    mu = nn.unbox(found[0].mu)
    assert mu["lora_a"].spec == P("fsdp", None)
    assert mu["lora_b"].spec == P(None, "tensor")
