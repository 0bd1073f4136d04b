"""Pairs are found by name, whatever the tree; what is half, ambiguous or misshapen is refused."""

import functools
import re

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from loft_jax import LoraAxes, LoraPairs, describe_pairs, loft_adamw
from loft_jax.adapters import LoraRule
from loft_jax.pairs.find import find_pairs, path_string

shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)

SECOND = LoraAxes(batch=(1,))

# Spelling of an adapter: the paths of a and b under its module.
STYLES = {
    "nnx": (("lora_a",), ("lora_b",)),
    "qwix": (("kernel_lora_a",), ("kernel_lora_b",)),
    "gemma": (("lora", "a"), ("lora", "b")),
    "maxtext": (("lora_a", "kernel"), ("lora_b", "kernel")),
    "maxtext_qwix": (("w_lora_a", "kernel"), ("w_lora_b", "kernel")),
    "keras": (("lora_kernel_a",), ("lora_kernel_b",)),
    "keras embeddings": (("lora_embeddings_a",), ("lora_embeddings_b",)),
}


@st.composite
def adapters(draw):
    """Shapes of both factors, what they are to be read as, and the axes to say, if any."""
    r = draw(st.integers(1, 3))
    m, n = draw(st.integers(r, 7)), draw(st.integers(1, 7))
    kind = draw(st.sampled_from(["matrix", "leading", "second", "rows_a", "rows_b"]))
    if kind == "matrix":
        return (m, r), (r, n), (m, n, r, ()), None
    if kind == "leading":
        batch = tuple(draw(st.lists(st.integers(4, 6), min_size=1, max_size=2)))  # never r
        return (*batch, m, r), (*batch, r, n), (m, n, r, batch), None
    if kind == "second":
        layers = draw(st.integers(1, 4))
        return (m, layers, r), (r, layers, n), (m, n, r, (layers,)), SECOND
    if kind == "rows_a":
        return (2, m, r), (r, n), (2 * m, n, r, ()), None
    return (m, r), (r, 2, n), (m, 2 * n, r, ()), None


@st.composite
def models(draw):
    """A nested tree with adapters and other leaves; its pairs; the axes to say."""
    names = st.sampled_from(["attention", "mlp", "q", "0", "1", "layer_2", "lora_layers", "a.b"])
    modules = draw(
        st.lists(st.lists(names, max_size=3).map(tuple), min_size=1, max_size=5, unique=True)
    )
    leaves, expected, axes = {}, {}, []
    for module in modules:
        style = STYLES[draw(st.sampled_from(sorted(STYLES)))]
        shape_a, shape_b, reading, say = draw(adapters())
        a, b = ("/".join((*module, "unit", *names)) for names in style)
        leaves[a], leaves[b] = shape(*shape_a), shape(*shape_b)
        expected[a, b] = reading
        if say is not None:
            axes.append((re.escape(a), say))
    for name in draw(st.lists(st.sampled_from(["kernel", "bias", "a", "lora_alpha", "lora_c"]))):
        other = "/".join((*draw(st.sampled_from(modules)), "other", name))
        leaves[other] = shape(*draw(st.lists(st.integers(0, 3), max_size=3)))
    return draw(st.permutations(sorted(leaves.items()))), expected, tuple(axes)


def nested(items):
    tree = {}
    for path, leaf in items:
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def readings(tree):
    return {(tree.paths[p.a], tree.paths[p.b]): (p.m, p.n, p.r, p.batch) for p in tree.pairs}


def test_heads_are_not_taken_for_experts():
    # Two heads, rank 2: (layers, heads, in, r) and (layers, r, heads, out), or experts?
    adapter = {"lora_a": jnp.ones((3, 2, 5, 2)), "lora_b": jnp.ones((3, 2, 2, 4))}
    shorter = {"lora_a": jnp.ones((3, 2, 5, 2)), "lora_b": jnp.ones((3, 2, 4))}
    assert find_pairs(adapter).pairs[0].batch == (3, 2)  # equal axes: layers of experts
    assert find_pairs(shorter).pairs[0].batch == (3,)
    wide = {"lora_a": jnp.ones((3, 2, 5, 2)), "lora_b": jnp.ones((3, 2, 2, 4, 7))}
    with pytest.raises(ValueError, match="ambiguous"):
        find_pairs(wide)
    told = LoraPairs(axes=LoraAxes(batch=(0,)))
    assert find_pairs(wide, told).pairs[0].batch == (3,)


@settings(deadline=None, max_examples=150)
@given(models())
def test_every_adapter_is_found_with_its_axes_and_nothing_else(model):
    items, expected, axes = model
    pairs = LoraPairs(axes=axes)
    found = find_pairs(nested(items), pairs)
    assert readings(found) == expected
    assert sorted(found.paths) == sorted(path for path, _ in items)
    assert find_pairs(nested(sorted(items)), pairs) == found
    for pair in found.pairs:
        for k, layout, rows in ((pair.a, pair.layout_a, pair.m), (pair.b, pair.layout_b, pair.n)):
            tall = jax.eval_shape(layout.matricize, found.leaves[k])
            assert tall.shape == (*pair.batch, rows, pair.r)
            shape = found.leaves[k].shape
            back = functools.partial(layout.unmatricize, shape=shape)
            assert jax.eval_shape(back, tall).shape == shape


@settings(deadline=None, max_examples=50)
@given(models(), st.data())
def test_a_factor_without_its_partner_is_named(model, data):
    items, expected, axes = model
    pair = data.draw(st.sampled_from(sorted(expected)))
    dropped, left = data.draw(st.permutations(pair))
    with pytest.raises(ValueError, match="unpaired or ambiguous") as error:
        find_pairs(
            nested((path, leaf) for path, leaf in items if path != dropped), LoraPairs(axes=axes)
        )
    assert f"{left}: no partner matches" in str(error.value)


REFUSED = {
    "other_rank": ({"lora_a": (6, 2), "lora_b": (3, 4)}, {}, "lora_a (6, 2), lora_b (3, 4): batch"),
    "other_batch": (
        {"lora_a": (4, 6, 2), "lora_b": (5, 2, 4)},
        {"axes": LoraAxes(batch=(0,))},
        "lora_a (4, 6, 2), lora_b (5, 2, 4): batch",
    ),
    "vector": ({"lora_a": (6,), "lora_b": (1, 4)}, {}, "lora_a (6,), lora_b (1, 4): a factor has"),
    "layers_or_rank": ({"lora_a": (2, 6, 2), "lora_b": (2, 2, 4)}, {}, "lora_b (2, 2, 4): ambig"),
    "layers_inside": ({"lora_a": (6, 3, 2), "lora_b": (2, 3, 4)}, {}, "lora_b (2, 3, 4): ambig"),
    "rank_above_both": ({"lora_a": (2, 5), "lora_b": (5, 3)}, {}, "rank 5 must be at least 1 and"),
    "torch_layout": ({"lora_a": (8, 64), "lora_b": (64, 8)}, {}, "LoraAxes(rank_a=0, rank_b=-1"),
    "rank_zero": ({"lora_a": (6, 0), "lora_b": (0, 4)}, {}, "rank 0 must be at least 1 and"),
    "only_batch": (
        {"lora_a": (6, 2), "lora_b": (2, 4)},
        {"axes": LoraAxes(batch=(0,))},
        "leave no matrix of (6, 2)",
    ),
    "no_such_axis": (
        {"lora_a": (6, 2), "lora_b": (2, 4)},
        {"axes": LoraAxes(batch=(2,))},
        "are not all axes of (6, 2)",
    ),
    "batch_axis_twice": (
        {"lora_a": (3, 6, 2), "lora_b": (3, 2, 4)},
        {"axes": LoraAxes(batch=(0, -3))},
        "the batch axes (0, 0) repeat an axis",
    ),
    "rank_axis_in_batch": (
        {"lora_a": (3, 6, 2), "lora_b": (3, 2, 4)},
        {"axes": LoraAxes(batch=(0,), rank_a=0)},
        "the rank axis 0 is among the batch axes",
    ),
    "two_rules": (
        {"x/lora_a": (6, 2), "x/lora_b": (2, 4)},
        {"rules": (("(.*)lora_a", "(.*)lora_b"), ("(x)/.*_a", "(x)/.*_b"))},
        "x/lora_a: matched 2 times",
    ),
    "both_roles": (
        {"x/lora_a": (6, 2), "x/lora_b": (2, 4)},
        {"rules": (("(.*)/.*", "(.*)/lora_b"),)},
        "x/lora_b: matched 2 times",
    ),
    "rule_without_groups": (
        {"x/lora_a": (6, 2), "x/lora_b": (2, 4), "y/lora_a": (6, 2), "y/lora_b": (2, 4)},
        {"rules": ((".*lora_a", ".*lora_b"),)},
        "x/lora_a, y/lora_a, x/lora_b, y/lora_b: more than two leaves in one pair",
    ),
    "no_adapter": ({"kernel": (6, 2), "bias": (2,)}, {}, "bias\n  kernel"),
    "bare_a_and_b": ({"q/a": (6, 2), "q/b": (2, 4)}, {}, "No low-rank pair was found"),
    "many": ({f"k{i:02}": (3,) for i in range(20)}, {}, "k11\n  and 8 more"),
}


@pytest.mark.parametrize(("shapes", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(shapes, options, message):
    tree = nested((path, shape(*sizes)) for path, sizes in shapes.items())
    with pytest.raises(ValueError, match=re.escape(message)):
        find_pairs(tree, LoraPairs(**options))


def test_all_faults_are_listed_at_once():
    bad, half = {"lora_a": shape(6, 2), "lora_b": shape(3, 4)}, {"lora_a": shape(6, 2)}
    with pytest.raises(ValueError, match=r"q/lora_a \(6, 2\)(.|\n)*v/lora_a \(6, 2\)"):
        find_pairs({"q": bad, "v": bad})
    with pytest.raises(ValueError, match=r"q/lora_a: no partner(.|\n)*v/lora_a: no partner"):
        find_pairs({"q": half, "v": half})


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        (LoraAxes(batch=(0,)), (6, 4, 2, (2,))),
        ((("(.*/|)lora_a", LoraAxes(batch=(0,))),), (6, 4, 2, (2,))),
        (LoraAxes(), (12, 8, 2, ())),
        (LoraAxes(batch=(-3,)), (6, 4, 2, (2,))),
        (LoraAxes(rank_a=0, rank_b=0), (12, 8, 2, ())),
        (LoraAxes(batch=(0,), rank_b=-2), (6, 4, 2, (2,))),
    ],
)
def test_axes_resolve_what_shapes_leave_open(axes, expected):
    tree = {"lora_a": shape(2, 6, 2), "lora_b": shape(2, 2, 4)}
    assert [*readings(find_pairs(tree, LoraPairs(axes=axes))).values()] == [expected]


def test_a_layer_of_a_stack_is_the_matrix_of_its_own():
    a, b = jnp.arange(36.0).reshape(6, 3, 2), jnp.arange(24.0).reshape(2, 3, 4)
    (pair,) = find_pairs({"lora_a": a, "lora_b": b}, LoraPairs(axes=SECOND)).pairs
    for layer in range(3):
        np.testing.assert_array_equal(pair.layout_a.matricize(a)[layer], a[:, layer])
        np.testing.assert_array_equal(pair.layout_b.matricize(b)[layer], b[:, layer].T)
    for layout, x in ((pair.layout_a, a), (pair.layout_b, b)):
        np.testing.assert_array_equal(layout.unmatricize(layout.matricize(x), x.shape), x)
    # (rank, heads, out): the rows are heads and out together.
    layout = find_pairs({"lora_a": a[:, 0], "lora_b": b}).pairs[0].layout_b
    np.testing.assert_array_equal(layout.matricize(b), b.reshape(2, 12).T)
    np.testing.assert_array_equal(layout.unmatricize(layout.matricize(b), b.shape), b)


def test_custom_rules_replace_the_defaults():
    tree = {"q": {"down": shape(6, 2), "up": shape(2, 4), "lora_a": shape(3)}}
    pairs = LoraPairs(rules=((r"(.*)/down", r"(.*)/up"),))
    assert readings(find_pairs(tree, pairs)) == {("q/down", "q/up"): (6, 4, 2, ())}


def test_the_first_scale_that_matches_counts():
    tree = nested((f"{m}/lora_{f}", shape(2, 2)) for m in ("attn", "mlp", "out") for f in "ab")
    pairs = LoraPairs(scale=(("attn/.*", 2.0), ("(attn|mlp)/.*", 0.5)))
    assert [pair.scale for pair in find_pairs(tree, pairs).pairs] == [2.0, 0.5, 1.0]
    assert {pair.scale for pair in find_pairs(tree, LoraPairs(scale=-4.0)).pairs} == {-4.0}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rules": [("a", "b")]}, TypeError, "not lists or arrays"),
        ({"axes": [(".*", LoraAxes())]}, TypeError, "not lists or arrays"),
        ({"rules": (("(", "b"),)}, ValueError, "'(' is not a regular expression"),
        ({"rules": (("a", "b", "c"),)}, ValueError, "rules is a tuple of pairs"),
        ({"rules": ("a", "b")}, ValueError, "mind the comma"),
        ({"scale": (".*", 2.0)}, ValueError, "mind the comma"),
        ({"scale": jnp.ones(())}, TypeError, "or arrays"),
        ({"axes": (".*", LoraAxes())}, ValueError, "mind the comma"),
        ({"axes": (("[", LoraAxes()),)}, ValueError, "'[' is not a regular expression"),
        ({"scale": (("*", 1.0),)}, ValueError, "'*' is not a regular expression"),
        ({"scale": 0.0}, ValueError, "a scale must be finite and not zero, got 0.0"),
        ({"scale": float("nan")}, ValueError, "got nan"),
        ({"scale": ((".*", float("inf")),)}, ValueError, "got inf"),
    ],
)
def test_misspelt_options_are_refused(options, error, message, monkeypatch):
    # As for users, who do not check annotations at run time.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(error, match=re.escape(message)):
        LoraPairs(**options)


def test_a_scale_in_a_tree_may_be_an_array_while_init_is_traced():
    params = {"q": {"lora_a": jnp.ones((6, 2)), "lora_b": jnp.ones((2, 5))}}
    tx = loft_adamw(1e-3, pairs=LoraPairs(scale={"q": jnp.asarray(2.0)}))
    jax.eval_shape(tx.init, params)


@pytest.mark.parametrize("container", [list, tuple, dict])
def test_a_callable_may_return_a_tree_with_any_root(container):
    one = {"lora_a": jnp.ones((6, 2)), "lora_b": jnp.ones((2, 5))}
    params = {"q": one, "v": one} if container is dict else container([one, one])
    values = {"q": 2.0, "v": 0.5} if container is dict else container([2.0, 0.5])
    scales = lambda scale: [x.scale for x in find_pairs(params, LoraPairs(scale=scale)).pairs]
    assert scales(lambda params: values) == [2.0, 0.5]
    assert scales(lambda params: jax.tree.map(lambda x: 2.0, params)) == [2.0, 2.0]
    assert scales(lambda params: ((".*", 3.0),)) == [3.0, 3.0]


def test_a_bad_scale_in_a_tree_is_told_with_its_path():
    params = {"q": {"lora_a": jnp.ones((6, 2)), "lora_b": jnp.ones((2, 5))}}
    with pytest.raises(ValueError, match=r"q/lora_a: .* finite and not zero, got 0\.0"):
        find_pairs(params, LoraPairs(scale={"q": 0.0}))


def test_equal_options_are_equal_and_hash_alike():
    build = lambda scale: LoraPairs(axes=(("x", LoraAxes(batch=(1,))),), scale=scale)
    assert build(2.0) == build(2.0) != build(3.0)
    assert len({build(2.0), build(2.0), build(3.0), LoraPairs(), LoraPairs()}) == 3


@pytest.mark.parametrize("empty", [{}, (), None, {"q": {"lora_a": None}}, nnx.State({})])
def test_trees_without_leaves_are_refused_unless_pairs_are_not_required(empty):
    with pytest.raises(ValueError, match=r"no parameters(.|\n)*wrt=nnx.LoRAParam"):
        loft_adamw(1e-3).init(empty)
    optional = LoraPairs(required=False)
    assert find_pairs(empty, optional).pairs == ()
    assert find_pairs(optax.MaskedNode(), optional).pairs == ()


def test_without_required_pairs_a_tree_trains_with_adamw():
    params, gradients = {"kernel": jnp.ones((3, 2))}, {"kernel": jnp.full((3, 2), 2.0)}
    found = []
    for tx in (loft_adamw(0.1, pairs=LoraPairs(required=False)), optax.adamw(0.1)):
        updates, _ = tx.update(gradients, tx.init(params), params)
        found.append(updates["kernel"])
    np.testing.assert_allclose(*found, rtol=1e-5)


def test_a_weight_next_to_its_adapter_is_refused():
    q = {"kernel": shape(6, 4), "lora_a": shape(6, 2), "lora_b": shape(2, 4)}
    tree = {"q": q}
    with pytest.raises(ValueError, match=r"nnx\.state\(model, nnx\.LoRAParam\)(.|\n)*q/kernel"):
        find_pairs(tree)
    assert len(find_pairs(tree, LoraPairs(train_weights=True)).pairs) == 1


def test_the_dotted_keys_of_maxtext_are_found():
    factors = {"lora_a.kernel": shape(16, 4), "lora_b.kernel": shape(4, 8)}
    mlp = {"kernel_lora_a": shape(16, 4), "kernel_lora_b": shape(4, 16)}
    tree = {"decoder": {"query": factors, "mlp": mlp}}
    assert set(readings(find_pairs(tree))) == {
        ("decoder/query/lora_a.kernel", "decoder/query/lora_b.kernel"),
        ("decoder/mlp/kernel_lora_a", "decoder/mlp/kernel_lora_b"),
    }


def test_layers_on_the_last_axis_are_told_which_axes_to_say():
    tree = {"lora_a": shape(6, 2, 3), "lora_b": shape(2, 4, 3)}
    with pytest.raises(ValueError, match=re.escape("LoraAxes(batch=(-1,), rank_a=1, rank_b=0)")):
        find_pairs(tree)
    last = LoraPairs(axes=LoraAxes(batch=(-1,), rank_a=1, rank_b=0))
    assert [*readings(find_pairs(tree, last)).values()] == [(6, 4, 2, (3,))]


def test_the_layout_of_pytorch_is_told_which_axes_to_say():
    tree = {"lora_a": shape(2, 6), "lora_b": shape(5, 2)}
    with pytest.raises(ValueError, match=re.escape("LoraAxes(rank_a=0, rank_b=-1)")):
        find_pairs(tree)
    told = LoraPairs(axes=LoraAxes(rank_a=0, rank_b=-1))
    assert [*readings(find_pairs(tree, told)).values()] == [(6, 5, 2, ())]


def test_pairs_are_a_spec_a_rule_or_several():
    tree = nested((f"{m}/lora_{f}", shape(2, 2)) for m in ("q", "v") for f in "ab")
    q, v = (LoraRule(path=name, rank=2, alpha=alpha) for name, alpha in (("q", 4), ("v", 8)))
    scales = lambda pairs: [pair.scale for pair in find_pairs(tree, pairs).pairs]
    assert scales(None) == [1.0, 1.0]
    assert scales(q) == [2.0, 1.0]
    assert scales((q, v)) == scales([q, v]) == [2.0, 4.0]
    for wrong in (LoraRule, 3, "q", [1], []):
        with pytest.raises(TypeError, match="takes a LoraPairs, a LoraRule or a sequence"):
            find_pairs(tree, wrong)


def test_scales_and_axes_may_be_trees_or_functions_of_the_parameters():
    stacked = {"lora_a": shape(2, 6, 2), "lora_b": shape(2, 2, 4)}
    tree = {"q": {"lora_a": shape(6, 2), "lora_b": shape(2, 4)}, "v": stacked}
    axes = {"q": None, "v": LoraAxes(batch=(0,))}
    scale = lambda params: {"q": 2.0, "v": {"lora_a": 0.5, "lora_b": None}}
    found = find_pairs(tree, LoraPairs(axes=axes, scale=scale)).pairs
    assert [(pair.batch, pair.scale) for pair in found] == [((), 2.0), ((2,), 0.5)]
    with pytest.raises(ValueError, match="scale is a pytree that is not a prefix"):
        find_pairs(tree, LoraPairs(scale={"q": 2.0}))


def test_both_factors_at_zero_are_warned_of_once():
    params = {"q": {"lora_a": jnp.zeros((6, 2)), "lora_b": jnp.zeros((2, 4))}}
    tx = loft_adamw(1e-3)
    with pytest.warns(UserWarning, match=r"Both factors of these pairs are zero(.|\n)*q/lora_a"):
        state = tx.init(params)
    tx.update(params, state, params)
    jax.jit(tx.init)(params)
    jax.eval_shape(tx.init, params)


def test_nnx_variables_have_the_paths_of_their_arrays():
    model = nnx.LoRALinear(6, 5, lora_rank=2, rngs=nnx.Rngs(0))
    state = nnx.state(model, nnx.LoRAParam)
    for tree in (state, nnx.to_pure_dict(state)):
        assert readings(find_pairs(tree)) == {("lora/lora_a", "lora/lora_b"): (6, 5, 2, ())}
    attributes = (jax.tree_util.GetAttrKey("lora_a"), jax.tree_util.GetAttrKey("value"))
    assert path_string(attributes) == "lora_a"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # qwix uses older Flax names
def test_qwix_adapters_are_found():
    # Not in the test extra: it wraps models, which the package itself never asks it to.
    qwix = pytest.importorskip("qwix")
    model = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
    provider = qwix.LoraProvider(module_path=".*", rank=2, alpha=2.0)
    model = qwix.apply_lora_to_model(model, provider, jnp.ones((1, 6)), rngs=nnx.Rngs(0))
    found = find_pairs(nnx.state(model, nnx.LoRAParam))
    assert readings(found) == {("kernel_lora_a", "kernel_lora_b"): (6, 5, 2, ())}


def test_description(capsys):
    tree = {
        "blocks": {"lora_a": shape(12, 64, 4), "lora_b": shape(12, 4, 4096)},
        "q": {"lora_a": jax.ShapeDtypeStruct((8, 16, 2), jnp.bfloat16), "lora_b": shape(2, 32)},
        "head": shape(10, 3),
    }
    found = describe_pairs(tree, LoraPairs(scale=(("q/.*", 0.5),)))
    assert capsys.readouterr().out == DESCRIPTION.lstrip("\n") == f"{found}\n"
    assert [(pair.path, pair.batch, pair.scale) for pair in found.pairs] == [
        ("blocks/lora_a", (12,), 1.0),
        ("q/lora_a", (), 0.5),
    ]
    assert found.others == {"head": 30}


DESCRIPTION = """
pair               U       V  batch  scale  calibrated  factored
blocks/lora_a   64×4  4096×4     12      1      3.6 MB    2.0 MB
q/lora_a       128×2    32×2      -    0.5      4.5 kB    3.8 kB
pairs: 2 with 200,000 parameters
non-LoRA leaves: 1 with 30 parameters: head
state of the pairs: calibrated 3.6 MB, factored 2.0 MB
"""
