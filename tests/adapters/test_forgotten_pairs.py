"""Without `pairs=` a scale is never read as 1 in silence, and axes are never misread."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx
from optimizers import hasty_compiler as hasty_compiler

from loft_jax import LoraAxes, LoraPairs, loft_adamw
from loft_jax.adapters import (
    LoraModel,
    LoraRule,
    adapt,
    add_lora,
    change_rank,
    load_into,
    load_peft,
    lora_pairs,
    merge,
    qwix_provider,
    renew,
    save_gguf,
    save_mlx,
    save_peft,
    split,
    unmerge,
)
from loft_jax.pairs.declared import declare_batch, declare_scale
from loft_jax.pairs.find import find_pairs

KEY = jax.random.key(0)
X = jnp.ones((2, 6))


def nnx_model() -> nnx.Module:
    return nnx.Sequential(nnx.Linear(6, 5, rngs=nnx.Rngs(0)), nnx.Linear(5, 4, rngs=nnx.Rngs(1)))


def of_nnx(rules, model=None):
    return nnx.state(add_lora(model or nnx_model(), rules, rngs=nnx.Rngs(2)), nnx.LoRAParam)


def of_linen(rules):
    model = LoraModel(nn.Sequential([nn.Dense(5), nn.Dense(4)]), rules)
    return split(model.init(KEY, X)["params"])[0]


def of_linen_context(rules):
    with adapt(rules):
        return split(nn.Sequential([nn.Dense(5), nn.Dense(4)]).init(KEY, X)["params"])[0]


def of_linen_variables(rules):
    model = LoraModel(nn.Sequential([nn.Dense(5), nn.Dense(4)]), rules)
    return split(model.init(KEY, X))[0]


def of_qwix(rules):
    qwix = pytest.importorskip("qwix", reason="qwix is not installed")
    model = qwix.apply_lora_to_model(nnx_model(), qwix_provider(rules), X, rngs=nnx.Rngs(2))
    return nnx.state(model, nnx.LoRAParam)


# qwix uses names that Flax has deprecated.
quiet = pytest.mark.filterwarnings("ignore::DeprecationWarning")
MAKERS = [
    of_nnx,
    of_linen,
    of_linen_context,
    of_linen_variables,
    pytest.param(of_qwix, marks=quiet),
]
every_maker = pytest.mark.parametrize("make", MAKERS)
LAYERS = r"layers[/_]\d"


@every_maker
def test_a_forgotten_scale_warns_and_names_the_adapters(make):
    adapter = make(LoraRule(path=LAYERS, rank=2, alpha=16))
    with pytest.warns(UserWarning, match="does not know the scale alpha / rank") as caught:
        loft_adamw(1e-3).init(adapter)
    (message,) = {str(warning.message) for warning in caught}
    assert message.count("made with scale 8, 1 is assumed") == 2


@every_maker
def test_no_warning_if_the_scale_is_specified_or_one(make):
    rule = LoraRule(path=LAYERS, rank=2, alpha=16)
    adapter = make(rule)
    spellings = [rule, [rule], lora_pairs(rule), LoraPairs(scale=8.0), LoraPairs(scale=3.0)]
    for pairs in spellings:  # a warning is an error here
        loft_adamw(1e-3, pairs=pairs).init(adapter)
    loft_adamw(1e-3).init(make(LoraRule(path=LAYERS, rank=2, alpha=2)))
    loft_adamw(1e-3).init(make(LoraRule(path=LAYERS, rank=2)))


def test_a_rule_that_matches_no_adapter_warns():
    adapter = of_nnx(LoraRule(path=LAYERS, rank=2, alpha=16))
    with pytest.warns(UserWarning, match="made with scale 8, 1 is assumed"):
        loft_adamw(1e-3, pairs=LoraRule(path="0", rank=2, alpha=16)).init(adapter)


def test_a_rule_whose_model_became_part_of_a_larger_one_warns():
    rule = LoraRule(path=LAYERS, rank=2, alpha=16)
    larger = {"inner": nnx.to_pure_dict(of_nnx(rule))}
    with pytest.warns(UserWarning, match=r"none for any of these adapters(.|\n)*inner/layers/0"):
        loft_adamw(1e-3, pairs=rule).init(larger)
    loft_adamw(1e-3, pairs=LoraPairs(scale=8.0)).init(larger)


@every_maker
def test_a_rule_gives_every_adapter_its_own_scale(make):
    first, second = LoraRule(path=".*0", rank=2, alpha=4), LoraRule(path=LAYERS, rank=1, alpha=5)
    adapter = make([first, second])
    assert [pair.scale for pair in find_pairs(adapter, [first, second]).pairs] == [2.0, 5.0]
    with pytest.warns(UserWarning) as caught:
        loft_adamw(1e-3).init(adapter)
    assert "made with scale 2," in str(caught[0].message)
    assert "made with scale 5," in str(caught[0].message)


def test_the_last_adapter_at_a_path_replaces_earlier_ones():
    of_nnx(LoraRule(path=LAYERS, rank=2, alpha=16))
    loft_adamw(1e-3).init(of_nnx(LoraRule(path=LAYERS, rank=2)))


def test_pairs_rule_trains_like_the_scale_of_the_rule():
    rule = LoraRule(path=LAYERS, rank=2, alpha=16)
    adapter = of_nnx(rule)
    gradients = jax.tree.map(jnp.ones_like, adapter)

    def updates(pairs):
        tx = loft_adamw(1e-3, pairs=pairs)
        return tx.update(gradients, tx.init(adapter), adapter)[0]

    expected = updates(LoraPairs(scale=8.0))
    for pairs in (rule, (rule,)):
        assert jax.tree.all(jax.tree.map(jnp.array_equal, updates(pairs), expected))


def test_split_and_merge_accept_rules():
    rule = LoraRule(path="q", rank=2, alpha=4, batch=(1,))
    adapter = {"q": {"lora_a": jnp.ones((6, 3, 2)), "lora_b": jnp.ones((2, 3, 5))}}
    base = {"q": {"kernel": jnp.zeros((6, 3, 5))}}
    assert split({"q": adapter["q"] | base["q"]}, rule) == (adapter, base)
    merged = merge(base, adapter, rule)["q"]["kernel"]
    assert merged.shape == (6, 3, 5) and bool((merged == 4.0).all())
    with pytest.raises(TypeError, match="pairs= takes a LoraPairs, a LoraRule"):
        merge(base, adapter, "q")


# ------------------------------------------------------------------------------ other readers

PATH = "layers/0/mlp/up_proj"
AT_PATH = LoraRule(path=PATH, rank=2, alpha=16)


def at_path(leaves):
    return {"layers": {"0": {"mlp": {"up_proj": leaves}}}}


UP = at_path({"lora_a": jnp.ones((8, 2)), "lora_b": jnp.ones((2, 4))})
BASE = at_path({"kernel": jnp.zeros((8, 4))})
LLAMA = {"model_type": "llama", "num_attention_heads": 1, "num_hidden_layers": 1}


def renewed(function, *args):
    # Without the check of the optimizer itself.
    state = loft_adamw(1e-3, pairs=LoraPairs(scale=8.0)).init(UP)
    return lambda folder, **pairs: function(BASE, UP, state, KEY, *args, **pairs)


READERS = {
    "merge": lambda folder, **pairs: merge(BASE, UP, **pairs),
    "unmerge": lambda folder, **pairs: unmerge(BASE, UP, **pairs),
    "renew": renewed(renew),
    "change_rank": renewed(change_rank, 1),
    "save_peft": lambda folder, **pairs: save_peft(folder / "a", UP, family="llama", **pairs),
    "save_mlx": lambda folder, **pairs: save_mlx(folder / "a", UP, family="llama", **pairs),
    "save_gguf": lambda folder, **pairs: save_gguf(
        folder / "a.gguf", UP, family="llama", base=LLAMA, **pairs
    ),
}


@pytest.mark.parametrize("name", READERS)
def test_every_reader_warns_of_a_forgotten_scale(name, tmp_path):
    declare_scale(f"{PATH}/lora_a", 8.0)
    with pytest.warns(UserWarning, match="does not know the scale alpha / rank") as caught:
        READERS[name](tmp_path)
    (warning,) = caught
    assert f"{PATH}/lora_a: made with scale 8, 1 is assumed" in str(warning.message)
    for pairs in (AT_PATH, LoraPairs(scale=8.0), LoraPairs(scale=3.0)):  # a warning is an error
        READERS[name](tmp_path, pairs=pairs)


@pytest.mark.parametrize("name", READERS)
def test_a_rule_of_another_model_warns(name, tmp_path):
    with pytest.warns(UserWarning, match=f"none for any of these adapters(.|\n)*{PATH}/lora_a"):
        READERS[name](tmp_path, pairs=LoraRule(path="layers/0", rank=2, alpha=16))


def test_a_file_with_another_scale_than_the_model_s_warns(tmp_path):
    loaded = load_peft(save_peft(tmp_path, UP, family="llama", pairs=LoraPairs(scale=0.5)))
    load_into(UP, loaded, family="llama")
    declare_scale(f"{PATH}/lora_a", 8.0)
    expected = f"{PATH}/lora_a: made with scale 8, the file has 0.5"
    with pytest.warns(UserWarning, match=expected):
        load_into(UP, loaded, family="llama")
    load_into(UP, loaded, family="llama", pairs=LoraPairs(scale=0.5))
    declare_scale(f"{PATH}/lora_a", 0.5)
    load_into(UP, loaded, family="llama")


def test_axes_misread_from_the_shapes_are_refused_by_every_reader(tmp_path):
    adapter = at_path({"lora_a": jnp.ones((3, 2, 3, 2)), "lora_b": jnp.ones((3, 2, 2, 3))})
    declare_batch(f"{PATH}/lora_a", (0,))
    expected = r"made with batch axes \(0,\), read with \(0, 1\)"
    with pytest.raises(ValueError, match=expected):
        merge(BASE, adapter)
    with pytest.raises(ValueError, match=expected):
        save_mlx(tmp_path, adapter, family="llama")


# ------------------------------------------------------------------------------ axes


def linear(key):
    return nnx.Linear(6, 4, use_bias=False, rngs=nnx.Rngs(key))


def heads(key):
    return nnx.LinearGeneral((2, 3), (2, 4), axis=(-2, -1), use_bias=False, rngs=nnx.Rngs(key))


def experts(key):
    return nnx.Einsum("ebd,edf->ebf", (2, 6, 4), rngs=nnx.Rngs(key))


def stacked(make, axes):
    """A layer stacked by a vmap on each of the axes, the last one outermost."""
    sizes = (5, 7)[: len(axes)]
    for axis in axes:
        make = nnx.vmap(make, out_axes=axis)
    return make(jax.random.split(KEY, sizes[::-1]))


@pytest.mark.parametrize("rank", [1, 2, 3, 5])
@pytest.mark.parametrize(
    ("axes", "positions"), [((0,), {0}), ((1,), {1}), ((0, 0), {0, 1}), ((0, 1), {0, 1})]
)
@pytest.mark.parametrize("make", [linear, heads, experts])
def test_forgotten_axes_are_refused_or_read_correctly(make, axes, positions, rank):
    adapter = of_nnx(LoraRule(path="", rank=rank), stacked(make, axes))
    if make is experts:  # their axis is the first that is not a stack's
        positions = positions | {min({0, 1, 2} - positions)}
    try:
        loft_adamw(1e-3).init(adapter)
    except ValueError as error:
        assert "ambiguous" in str(error) or "made with batch axes" in str(error)
    else:
        assert set(find_pairs(adapter).pairs[0].layout_a.batch) == positions
    known = LoraPairs(axes=LoraAxes(batch=tuple(sorted(positions))))
    assert set(find_pairs(adapter, known).pairs[0].layout_a.batch) == positions
    loft_adamw(1e-3, pairs=known).init(adapter)


def test_axes_misread_from_the_shapes_are_refused_by_name():
    # As many heads as ranks on both sides: (3, 2, 3, r) looks like two batch axes.
    adapter = of_nnx(LoraRule(path="", rank=2), stacked(heads, (0,)))
    assert find_pairs(adapter).pairs[0].layout_a.batch == (0, 1)
    with pytest.raises(
        ValueError, match=r"lora_a: made with batch axes \(0,\), read with \(0, 1\)"
    ):
        loft_adamw(1e-3).init(adapter)
    for pairs in (LoraRule(path="", rank=2, batch=(0,)), LoraPairs(axes=LoraAxes(batch=(0,)))):
        loft_adamw(1e-3, pairs=pairs).init(adapter)


class Scanned(nn.Module):
    axis: int

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            Layer, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=3
        )
        return scan(name="layers")(x, None)[0]


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(6, name="dense")(x), None


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("axis", [0, 1])
def test_forgotten_axes_of_a_linen_scan_are_refused_or_read_correctly(axis, rank):
    rule = LoraRule(path="layers/dense", rank=rank, batch=(axis,))
    adapter = split(LoraModel(Scanned(axis), rule).init(KEY, X)["params"])[0]
    assert find_pairs(adapter, rule).pairs[0].layout_a.batch == (axis,)
    if axis == 1 or rank == 3:
        with pytest.raises(ValueError, match="ambiguous"):
            loft_adamw(1e-3).init(adapter)
    else:
        loft_adamw(1e-3).init(adapter)
        assert find_pairs(adapter).pairs[0].layout_a.batch == (0,)


def test_axes_declared_for_another_adapter_at_the_same_path_are_ignored():
    of_nnx(LoraRule(path="", rank=2), stacked(linear, (0,)))
    loft_adamw(1e-3).init(of_nnx(LoraRule(path="", rank=2), linear(KEY)))
    of_nnx(LoraRule(path="", rank=2), stacked(linear, (0,)))
    loft_adamw(1e-3).init({"lora_a": jnp.ones((6, 2)), "lora_b": jnp.zeros((2, 4))})


def test_layers_stacked_on_the_last_axis_are_not_misread():
    # (2, 2, 5) and (2, 5, 5): rank 2 of five layers, or rank 5 of two.
    make = lambda key: nnx.Linear(2, 5, use_bias=False, rngs=nnx.Rngs(key))
    layer = nnx.vmap(make, out_axes=2)(jax.random.split(KEY, 5))
    rule = LoraRule(path="", rank=2, batch=(2,))
    adapter = of_nnx(rule, layer)
    assert find_pairs(adapter).pairs[0].layout_a.batch == (0,)
    with pytest.raises(ValueError, match=r"made with batch axes \(2,\), read with \(0,\)"):
        loft_adamw(1e-3).init(adapter)
    with pytest.raises(ValueError, match="the rank axis 2 is among the batch axes"):
        loft_adamw(1e-3, pairs=rule).init(adapter)
    pairs = LoraPairs(axes=LoraAxes(batch=(2,), rank_a=1))
    loft_adamw(1e-3, pairs=pairs).init(adapter)
