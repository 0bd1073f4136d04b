"""Rules select layers by a regular expression, by PEFT's target_modules, or all linear ones."""

import re

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx
from optimizers import hasty_compiler as hasty_compiler

from loft_jax.adapters import (
    LoraLayer,
    LoraModel,
    LoraRule,
    add_lora,
    lora_pairs,
    qwix_provider,
    remove_lora,
    split,
)
from loft_jax.pairs.find import find_pairs
from loft_jax.pairs.spec import first_match


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.q_proj = nnx.Linear(6, 6, rngs=rngs)
        self.v_proj = nnx.Linear(6, 6, rngs=rngs)
        self.mlp = nnx.Dict(up=nnx.Linear(6, 6, rngs=rngs))

    def __call__(self, x):
        return self.mlp["up"](self.q_proj(x) * self.v_proj(x))


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([Block(rngs), Block(rngs)])
        self.eq_proj = nnx.Linear(6, 6, rngs=rngs)
        self.lm_head = nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.eq_proj(x))


BLOCK = {f"layers/{k}/{name}" for k in range(2) for name in ("q_proj", "v_proj", "mlp/up")}
Q_AND_V = {path for path in BLOCK if path.endswith("proj")}
FORMS = {
    "regex": (r"layers/\d/(q|v)_proj", Q_AND_V),
    "list": (["q_proj", "v_proj"], Q_AND_V),
    "tuple": (("q_proj", "v_proj"), Q_AND_V),
    "suffix": (["0/mlp/up", "eq_proj"], {"layers/0/mlp/up", "eq_proj"}),
    "suffix with dots": (["mlp.up"], {"layers/0/mlp/up", "layers/1/mlp/up"}),
    "whole path": (["layers/1/q_proj"], {"layers/1/q_proj"}),
    "all-linear": ("all-linear", BLOCK | {"eq_proj"}),
}
every_form = pytest.mark.parametrize("form", FORMS)


@every_form
def test_add_lora_adapts_the_layers_that_the_path_selects(form):
    path, expected = FORMS[form]
    rule = LoraRule(path=path, rank=2, alpha=6)
    model = add_lora(Model(nnx.Rngs(0)), rule, rngs=nnx.Rngs(1))
    found = {
        "/".join(map(str, keys))
        for keys, node in nnx.iter_modules(model)
        if isinstance(node, LoraLayer)
    }
    assert found == expected
    pairs = find_pairs(nnx.state(model, nnx.LoRAParam), rule).pairs
    assert [pair.scale for pair in pairs] == [3.0] * len(expected)


@every_form
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # qwix uses names deprecated in Flax
def test_qwix_adapts_the_layers_that_the_path_selects(form):
    qwix = pytest.importorskip("qwix", reason="qwix is not installed")
    path, expected = FORMS[form]
    rule = LoraRule(path=path, rank=2, alpha=6)
    model = qwix.apply_lora_to_model(
        Model(nnx.Rngs(0)), qwix_provider(rule), jnp.ones((2, 6)), rngs=nnx.Rngs(1)
    )
    tree = find_pairs(nnx.state(model, nnx.LoRAParam), rule)
    found = {tree.paths[pair.a].removesuffix("/kernel_lora_a") for pair in tree.pairs}
    assert found == expected
    assert [pair.scale for pair in tree.pairs] == [3.0] * len(expected)


def test_linen_layers_are_selected_by_names():
    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x)
            return nn.Dense(3, name="head")(nn.Dense(6, name="query")(x))

    x = jnp.ones((1, 2, 6))
    by_name = LoraModel(Linen(), LoraRule(path=["query"], rank=2)).init(jax.random.key(0), x)
    adapter = split(by_name["params"])[0]
    assert sorted(adapter) == ["attention", "query"] and list(adapter["attention"]) == ["query"]
    every = LoraModel(Linen(), LoraRule(path="all-linear", rank=2)).init(jax.random.key(0), x)
    adapter = split(every["params"])[0]
    assert sorted(adapter["attention"]) == ["key", "out", "query", "value"]
    assert "head" not in adapter and "query" in adapter


@pytest.mark.parametrize("head", ["lm_head", "head", "classifier", "score"])
def test_all_linear_excludes_heads(head):
    rule = LoraRule(path="all-linear", rank=2, alpha=6)
    assert not rule.matches(head) and not rule.matches(f"model/{head}")
    for path in (f"{head}/dense", f"{head}s", f"my{head}", "", "layers/0/q"):
        assert rule.matches(path)
    scale = lora_pairs([rule, LoraRule(path=head, rank=1, alpha=5)]).scale
    of = lambda path: first_match(scale, path)
    assert [of(f"{head}/lora_a"), of(f"{head}/kernel_lora_a")] == [5.0, 5.0]
    assert [of("lora_a"), of("layers/0/q/lora_a"), of(f"{head}/dense/lora_a")] == [3.0] * 3
    assert of(f"params/{head}/lora_a") == 5.0


def test_a_list_of_names_equals_a_tuple():
    rules = LoraRule(path=["q", "v"], rank=2), LoraRule(path=("q", "v"), rank=2)
    assert rules[0].path == ("q", "v")
    assert rules[0] == rules[1] and hash(rules[0]) == hash(rules[1])


def test_names_are_not_regular_expressions():
    rule = LoraRule(path=["q.*", "w+"], rank=2)
    assert not rule.matches("layers/query") and not rule.matches("ww")
    assert rule.matches("layers/w+") and rule.matches("layers/q/*")


@pytest.mark.parametrize("path", [[], (), [""], ["q", 3], None, 3, {"q"}])
def test_an_invalid_path_is_refused(path):
    with pytest.raises((ValueError, TypeError), match="path must be|Type-check error"):
        LoraRule(path=path, rank=2)


@pytest.mark.parametrize(
    ("path", "suggestion"),
    [
        ("q_proj", 'The paths of 2 layers end with it: use path=r".*/q_proj" or path=["q_proj"]'),
        ("mlp/up", 'use path=r".*/mlp/up" or path=["mlp/up"]'),
        ("q_proj|v_proj", 'The paths of 4 layers end with it: use path=r".*/(q_proj|v_proj)".'),
    ],
)
def test_a_rule_that_matches_only_ends_of_paths_gets_a_suggestion(path, suggestion):
    with pytest.raises(ValueError, match=re.escape(suggestion)):
        add_lora(Model(nnx.Rngs(0)), LoraRule(path=path, rank=2), rngs=nnx.Rngs(1))


@pytest.mark.parametrize("path", ["absent", ["absent"], ["q"]])
def test_a_rule_that_matches_no_end_gets_no_suggestion(path):
    with pytest.raises(ValueError, match="no layer follows the rule .*layers/0/q_proj") as caught:
        add_lora(Model(nnx.Rngs(0)), LoraRule(path=path, rank=2), rngs=nnx.Rngs(1))
    assert "end with it" not in str(caught.value)


def test_the_second_of_two_rules_for_a_layer_gets_no_suggestion():
    rules = [LoraRule(path=".*", rank=2), LoraRule(path="lm_head", rank=2)]
    with pytest.raises(ValueError, match="no layer follows the rule 'lm_head'") as caught:
        add_lora(Model(nnx.Rngs(0)), rules, rngs=nnx.Rngs(1))
    assert "end with it" not in str(caught.value)


def test_adding_and_removing_adapters_keeps_the_type_of_the_model():
    model = add_lora(Model(nnx.Rngs(0)), LoraRule(path=["up"], rank=2), rngs=nnx.Rngs(1))
    assert type(model) is Model
    assert type(remove_lora(model, merge=False)) is Model
    layer = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
    assert type(add_lora(layer, LoraRule(path="", rank=2), rngs=nnx.Rngs(1))) is LoraLayer


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_default_draws_have_a_mean_of_zero(dtype):
    drawn = LoraRule(path=".*", rank=256).init_a(jax.random.key(0), (4096, 256), dtype)
    assert drawn.dtype == dtype
    values = drawn.astype(jnp.float32)
    assert abs(values.mean()) < 4 * values.std() / values.size**0.5
