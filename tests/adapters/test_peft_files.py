"""Files of PEFT without PEFT: a recorded adapter, all layouts, atomic writes, and errors."""

import itertools
import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from examples.common.models.llama import LlamaConfig
from examples.common.models.llama_weights import build_model
from loft_jax import LoraAxes, LoraPairs
from loft_jax.adapters import (
    LoadedAdapter,
    LoraRule,
    add_lora,
    load_into,
    load_peft,
    lora_pairs,
    save_merged,
    save_peft,
)
from loft_jax.adapters._family import Family

RECORDED = Path(__file__).parent / "data" / "peft_llama"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def abstract(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def random_tree(template: Any, seed: int = 0) -> Any:
    """Normal values in the shapes and dtypes of the template."""
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(draw.normal(size=x.shape), x.dtype), template)


def assert_same(got: Any, expected: Any) -> None:
    """Equal trees, values and dtypes."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def layer_zero(factors: Any) -> dict:
    """A tree with one adapted projection of a LLaMA."""
    return {"model": {"layers": {"0": {"self_attn": {"q_proj": factors}}}}}


# ------------------------------------------------------------------ the recorded adapter


def recorded_template() -> Any:
    """The tree of the recorded adapter, with stacked layers as in the model."""
    sizes = {"self_attn/q_proj": (16, 16, 4), "self_attn/v_proj": (16, 8, 2)}
    sizes |= {"mlp/down_proj": (24, 16, 4)}
    layers: dict = {}
    for path, (fan_in, fan_out, rank) in sizes.items():
        part, name = path.split("/")
        pair = {"lora_a": abstract(2, fan_in, rank), "lora_b": abstract(2, rank, fan_out)}
        layers.setdefault(part, {})[name] = {"lora": pair}
    return {"layers": layers}


def test_the_recorded_adapter_gives_the_recorded_logits(report):
    with np.load(RECORDED.with_suffix(".npz")) as file:
        tensors = {n.removeprefix("tensors/"): file[n] for n in file.files if "tensors/" in n}
        config, ids = json.loads(str(file["config"])), jnp.asarray(file["ids"])
        logits, base_logits = file["logits"], file["base_logits"]
    model = build_model(LlamaConfig.from_hf(config), tensors)
    np.testing.assert_allclose(model(ids), base_logits, atol=1e-4)
    peft = load_peft(RECORDED)
    assert peft.scale_of("q_proj") == pytest.approx(12 / 2)  # rsLoRA: alpha / sqrt(r)
    assert peft.scale_of("layers.1.self_attn.v_proj") == pytest.approx(12 / np.sqrt(2))
    assert peft.scale_of("down_proj") == pytest.approx(5 / 2)
    rules = [
        LoraRule(path=f".*/{end}", rank=rank, alpha=peft.scale_of(end) * rank, batch=(0,))
        for end, rank in (("q_proj", 4), ("v_proj", 2), ("down_proj", 4))
    ]
    model = add_lora(model, rules, rngs=nnx.Rngs(0))
    pairs = lora_pairs(rules)
    template = nnx.state(model, nnx.LoRAParam)
    adapter = load_into(template, peft, family="llama", pairs=pairs)
    nnx.update(model, adapter)
    largest = float(np.abs(model(ids) - logits).max())
    report(f"our llama with the recorded adapter: largest difference {largest:.1e} (at most 1e-04)")
    assert largest <= 1e-4


def test_the_recorded_adapter_is_written_identically(tmp_path):
    peft = load_peft(RECORDED)
    ends = ("q_proj", "v_proj", "down_proj")
    scales = tuple((f".*/{end}/.*", peft.scale_of(end)) for end in ends)
    pairs = LoraPairs(scale=scales, axes=LoraAxes(batch=(0,)))
    adapter = load_into(recorded_template(), peft, family="llama", pairs=pairs)
    save_peft(
        tmp_path,
        adapter,
        family="llama",
        pairs=pairs,
        use_rslora=True,
        task_type="CAUSAL_LM",
    )
    assert (tmp_path / WEIGHTS).read_bytes() == (RECORDED / WEIGHTS).read_bytes()
    old, new = (json.loads((folder / CONFIG).read_text()) for folder in (RECORDED, tmp_path))
    assert {key for key in old | new if old[key] != new[key]} == {
        *("target_modules", "rank_pattern", "alpha_pattern")  # by full names
    }
    assert new["alpha_pattern"] == {f"model.layers.{n}.mlp.down_proj": 5 for n in range(2)}
    assert new["rank_pattern"] == {f"model.layers.{n}.self_attn.v_proj": 2 for n in range(2)}
    assert (new["r"], new["lora_alpha"]) == (4, 12)


# ------------------------------------------------------------------ layouts

PLAIN = {"lora_a": abstract(6, 3), "lora_b": abstract(3, 8)}
STACKED = {"lora_a": abstract(2, 6, 3), "lora_b": abstract(2, 3, 8)}
ACROSS = abstract(3, 2, 8)
LAYOUTS: dict[str, tuple[Any, LoraPairs]] = {
    "plain": (layer_zero(PLAIN), LoraPairs()),
    "wrapped": (layer_zero({"lora": PLAIN}), LoraPairs()),
    "qwix": (
        layer_zero({"kernel_lora_a": abstract(6, 3), "kernel_lora_b": abstract(3, 8)}),
        LoraPairs(),
    ),
    "gemma.peft": (layer_zero({"lora": {"a": abstract(6, 3), "b": abstract(3, 8)}}), LoraPairs()),
    "MaxText": (
        layer_zero({"lora_a": {"kernel": abstract(6, 3)}, "lora_b": {"kernel": abstract(3, 8)}}),
        LoraPairs(),
    ),
    "params": ({"params": layer_zero(PLAIN)}, LoraPairs()),
    "names of one's own": (
        layer_zero({"down": abstract(6, 3), "up": abstract(3, 8)}),
        LoraPairs(rules=((r"(.*)/down", r"(.*)/up"),)),
    ),
    "heads out": (layer_zero({"lora_a": abstract(6, 3), "lora_b": abstract(3, 2, 4)}), LoraPairs()),
    "heads in": (layer_zero({"lora_a": abstract(2, 3, 3), "lora_b": abstract(3, 8)}), LoraPairs()),
    "rank first": (
        layer_zero({"lora_a": abstract(3, 6), "lora_b": abstract(8, 3)}),
        LoraPairs(axes=LoraAxes(rank_a=0, rank_b=-1)),
    ),
    "stacked": (
        {"layers": {"self_attn": {"q_proj": STACKED}}},
        LoraPairs(),
    ),
    "stacked on axis 1": (
        {"layers": {"self_attn": {"q_proj": {"lora_a": abstract(6, 2, 3), "lora_b": ACROSS}}}},
        LoraPairs(axes=LoraAxes(batch=(1,))),
    ),
    "layers_0": ({"layers_0": {"self_attn": {"q_proj": PLAIN}}}, LoraPairs()),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_survives_a_round_trip(tmp_path, layout, dtype):
    template, pairs = LAYOUTS[layout]
    template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), template)
    adapter = random_tree(template)
    assert save_peft(str(tmp_path), adapter, family="llama", pairs=pairs) == tmp_path
    peft = load_peft(tmp_path)
    factors = peft.factors["model.layers.0.self_attn.q_proj"]
    assert (factors.a.shape, factors.b.shape, factors.scale) == ((6, 3), (3, 8), 1.0)
    assert factors.a.dtype == dtype
    assert_same(load_into(template, peft, family="llama", pairs=pairs), adapter)
    numpy = jax.tree.map(np.asarray, adapter)
    filled = load_into(numpy, peft, family="llama", pairs=pairs)
    assert_same(filled, numpy)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(filled))


def test_the_file_has_the_layout_of_peft(tmp_path):
    a, b = np.arange(18, dtype=np.float32).reshape(6, 3), np.ones((3, 8), np.float32)
    heads = {"lora_a": a.reshape(2, 3, 3), "lora_b": b}
    save_peft(tmp_path, layer_zero(heads), family="llama", pairs=LoraPairs(scale=0.5))
    tensors = load_file(tmp_path / WEIGHTS)
    np.testing.assert_array_equal(tensors[f"{Q0}.lora_A.weight"], a.T)
    np.testing.assert_array_equal(tensors[f"{Q0}.lora_B.weight"], b.T)
    assert json.loads((tmp_path / CONFIG).read_text())["lora_alpha"] == 1.5


def test_a_user_defined_family(tmp_path):
    mine = Family(
        name="mine",
        prefix="",
        modules=((r"block_(?P<layer>\d+)/up", "decoder.{layer}.mlp.up_proj"),),
    )
    adapter = random_tree({"block_3": {"up": PLAIN}})
    save_peft(tmp_path, adapter, family=mine)
    peft = load_peft(tmp_path)
    assert list(peft.factors) == ["decoder.3.mlp.up_proj"]
    assert_same(load_into(adapter, peft, family=mine), adapter)


def test_a_filled_template_keeps_its_sharding(tmp_path):
    adapter = random_tree(layer_zero(PLAIN))
    save_peft(tmp_path, adapter, family="llama")
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    over = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    pair = {
        "lora_a": jax.ShapeDtypeStruct((6, 3), jnp.bfloat16, sharding=over),
        "lora_b": jax.ShapeDtypeStruct((3, 8), jnp.float32, sharding=whole),
    }
    filled = load_into(layer_zero(pair), load_peft(tmp_path), family="llama")
    a, b = jax.tree.leaves(filled)
    assert (a.sharding, b.sharding, a.dtype) == (over, whole, jnp.bfloat16)
    np.testing.assert_array_equal(b, jax.tree.leaves(adapter)[1])


def test_modules_saved_in_full_are_restored(tmp_path):
    template = {
        **layer_zero(PLAIN),
        "lm_head": {"kernel": abstract(6, 4), "bias": abstract(4)},
        "layers": {"input_layernorm": {"scale": abstract(2, 6)}},
    }
    adapter = random_tree(template)
    save_peft(tmp_path, adapter, family="llama")
    peft = load_peft(tmp_path)
    norms = [f"model.layers.{n}.input_layernorm" for n in range(2)]
    assert peft.config["modules_to_save"] == ["lm_head", *norms]
    assert peft.saved["lm_head.weight"].shape == (4, 6)
    assert peft.saved[f"{norms[1]}.weight"].shape == (6,)
    assert_same(load_into(template, peft, family="llama"), adapter)
    short = template | {"lm_head": {"kernel": abstract(6, 5), "bias": abstract(4)}}
    with pytest.raises(ValueError, match=r"lm_head.weight: the shape is \(4, 6\).*needs \(5, 6\)"):
        load_into(short, peft, family="llama")


# ------------------------------------------------------------------ what cannot be saved


@pytest.mark.parametrize(
    ("adapter", "options", "message"),
    [
        (PLAIN, {}, "the root: the family 'llama' has no such module"),
        ({"nowhere": PLAIN}, {}, "nowhere: the family 'llama' has no such module"),
        ({"layers": {"self_attn": {"q_proj": PLAIN}}}, {}, "layers/self_attn/q_proj/lora_a.*stack"),
        (layer_zero(STACKED), {}, "it has 1 axes"),
        (
            layer_zero(PLAIN) | {"params": layer_zero(PLAIN)},
            {},
            "another adapter is also written as",
        ),
        ({"lora": PLAIN}, {}, "lora: the family 'llama' has no such"),
        (
            layer_zero({**PLAIN, "kernel": abstract(6, 8)}),
            {},
            r"adapter alone: nnx\.state(.|\n)*q_proj/kernel",
        ),
        (layer_zero(PLAIN), {"family": "opt"}, "unknown family 'opt'. Use one of llama"),
        (layer_zero(PLAIN), {"task_type": "LM"}, "task_type 'LM'. Use one of SEQ_CLS"),
        (layer_zero(PLAIN), {"task_type": "SEQ_CLS"}, "SEQ_CLS.*classifier or score"),
        (
            layer_zero(PLAIN) | {"lm_head": {"kernel": abstract(2, 3, 4)}},
            {},
            "the kernel has 3 axes",
        ),
    ],
)
def test_adapters_that_cannot_be_saved_are_refused_by_name(tmp_path, adapter, options, message):
    with pytest.raises(ValueError, match=message):
        save_peft(tmp_path, random_tree(adapter), **({"family": "llama"} | options))
    assert not any(tmp_path.iterdir())


def test_a_diverged_adapter_is_refused(tmp_path):
    adapter = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan), layer_zero(PLAIN))
    with pytest.raises(ValueError, match="q_proj.lora_A.weight contains a NaN"):
        save_peft(tmp_path, adapter, family="llama")
    with pytest.raises(TypeError):
        save_peft(tmp_path, adapter, family=3)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("broken", ["write_text", "replace"])
def test_a_failed_write_keeps_the_old_files(tmp_path, monkeypatch, broken):
    old = random_tree(layer_zero(PLAIN))
    save_peft(tmp_path, old, family="llama")

    def fail(*_: Any, **__: Any):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*((Path, "write_text") if broken == "write_text" else (os, "replace")), fail)
        with pytest.raises(OSError, match="no space"):
            save_peft(tmp_path, random_tree(old, seed=1), family="llama")
    assert sorted(file.name for file in tmp_path.iterdir()) == [CONFIG, WEIGHTS]
    assert_same(load_into(old, load_peft(tmp_path), family="llama"), old)


def test_a_failed_rename_keeps_the_old_files(tmp_path, monkeypatch):
    old = random_tree(layer_zero(PLAIN))
    save_peft(tmp_path, old, family="llama")
    before = {name: (tmp_path / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    replace = os.replace
    # Two old files move out, then two new ones in; each of the four renames fails once.
    for failing in range(4):
        count = itertools.count()

        def fail(*paths: Any, count=count, failing=failing):
            if next(count) == failing:
                raise OSError("input/output error")
            replace(*paths)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", fail)
            with pytest.raises(OSError, match="input/output"):
                save_peft(tmp_path, random_tree(old, seed=1), family="llama")
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("new", [True, False])
def test_old_and_new_files_are_never_mixed(tmp_path, monkeypatch, new):
    folder = tmp_path / "adapter"
    trees = random_tree(layer_zero(PLAIN)), random_tree(layer_zero(PLAIN), seed=1)
    if not new:
        save_peft(folder, trees[0], family="llama", base_model="old")
    replace, seen = os.replace, []

    def contents() -> set[str]:
        found = set()
        if (folder / CONFIG).exists():
            found.add(json.loads((folder / CONFIG).read_text())["base_model_name_or_path"])
        if (folder / WEIGHTS).exists():
            a = load_file(folder / WEIGHTS)[f"{Q0}.lora_A.weight"].T
            old = jax.tree.leaves(trees[0])[0]
            found.add("old" if np.array_equal(a, old) else "new")
        return found

    def watched(*paths: Any):
        replace(*paths)
        seen.append(contents())

    monkeypatch.setattr(os, "replace", watched)
    save_peft(folder, trees[1], family="llama", base_model="new")
    assert seen[-1] == {"new"} and all(len(found) <= 1 for found in seen)
    assert len(seen) == (1 if new else 4)
    assert sorted(file.name for file in folder.iterdir()) == [CONFIG, WEIGHTS]
    assert [file.name for file in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_and_folders_have_the_modes_of_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        save_peft(tmp_path / "adapter", random_tree(layer_zero(PLAIN)), family="llama")
        weights = {"lm_head": {"kernel": np.ones((4, 6), np.float32)}}
        save_merged(tmp_path / "merged", weights, family="llama")
        save_merged(tmp_path / "merged", weights, family="llama")  # into a folder that exists
    finally:
        os.umask(before)
    for folder in (tmp_path / "adapter", tmp_path / "merged"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~umask
        files = list(folder.iterdir())
        assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o666 & ~umask}


def test_save_peft_refuses_a_whole_tree(tmp_path):
    tree = layer_zero({**PLAIN, "kernel": abstract(6, 8)})
    with pytest.raises(ValueError, match="Pass the adapter alone: .* loft_jax.adapters.split"):
        save_peft(tmp_path, random_tree(tree), family="llama")


def test_save_merged_refuses_factors_by_the_users_names(tmp_path):
    pairs = LoraPairs(rules=((r"(.*)/down", r"(.*)/up"),))
    weights = {"lm_head": {"kernel": np.ones((4, 6), np.float32), "down": np.ones((4, 1))}}
    with pytest.raises(ValueError, match="lm_head/down is a factor of an adapter"):
        save_merged(tmp_path, weights, family="llama", pairs=pairs)
    # Names that are factors by default are weights where the user's rules say so.
    family = Family(name="mine", prefix="", modules=(("head", "head"),))
    weights = {"head": {"lora_a": np.ones((4, 6), np.float32)}}
    save_merged(tmp_path, weights, family=family, pairs=pairs)
    assert list(load_file(tmp_path / "model.safetensors")) == ["head.lora_a"]
    for rule in (None, LoraRule(path="head", rank=2)):
        with pytest.raises(ValueError, match="head/lora_a is a factor of an adapter"):
            save_merged(tmp_path, weights, family=family, pairs=rule)


def test_save_peft_and_load_into_accept_rules(tmp_path):
    rule = LoraRule(path=".*/q_proj", rank=3, alpha=6)
    adapter = random_tree(layer_zero(PLAIN))
    save_peft(tmp_path, adapter, family="llama", pairs=rule)
    peft = load_peft(tmp_path)
    assert peft.scale_of("q_proj") == 2.0
    assert_same(load_into(adapter, peft, family="llama", pairs=[rule]), adapter)
    with pytest.raises(ValueError, match=r"the scale is 2.0, pairs= has 1.0"):
        load_into(adapter, peft, family="llama", pairs=LoraRule(path=".*/q_proj", rank=3))


def test_other_files_in_the_folder_are_kept(tmp_path):
    folder = tmp_path / "new" / "folder"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("mine")
    save_peft(folder, random_tree(layer_zero(PLAIN)), family="llama", base_model="me/llama")
    assert (folder / "README.md").read_text() == "mine"
    assert load_peft(folder).config["base_model_name_or_path"] == "me/llama"


def test_a_missing_safetensors_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r'pip install "loft_jax\[peft\]"'):
        load_peft(RECORDED)
    with pytest.raises(ImportError, match=r'pip install "loft_jax\[peft\]"'):
        save_peft(tmp_path, random_tree(layer_zero(PLAIN)), family="llama")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"modules": (("(", "x"),)}, "is not a valid regular expression"),
        ({"modules": ("layers", "x")}, "a pair|Type-check error"),
        ({"modules": [("layers", "x")]}, "tuples|Type-check error"),
        ({"modules": (), "kinds": (("x", "conv9d"),)}, "unknown kind 'conv9d'"),
        ({"modules": (), "prefix": "model."}, r"'model\.' begins or ends with a dot"),
    ],
)
def test_invalid_families_are_refused(fields, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Family(**{"name": "mine", "prefix": "", **fields})


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            {"norm": {"scale": np.array([1, np.inf], np.float32)}},
            "model.norm.weight contains a NaN or an inf",
        ),
        ({"norm": {"scale": np.array([1], np.int32)}}, "model.norm.weight has dtype int32"),
        ({"elsewhere": {"kernel": np.array([[1]], np.float32)}}, "elsewhere: the family 'llama'"),
        (
            {"lm_head": {"kernel": np.ones((1, 1, 1), np.float32)}},
            "lm_head/kernel: the kernel has 3",
        ),
        ({"lm_head": {"lora_a": np.array([[1]], np.float32)}}, "lm_head/lora_a is a factor"),
        (
            {
                "norm": {"scale": np.array([1], np.float32)},
                "model": {"norm": {"scale": np.array([1], np.float32)}},
            },
            "also written as model.norm.weight",
        ),
    ],
)
def test_weights_that_cannot_be_saved_are_refused_by_name(tmp_path, weights, message):
    with pytest.raises(ValueError, match=message):
        save_merged(tmp_path, weights, family="llama")
    assert not any(tmp_path.iterdir())


# ------------------------------------------------------------------ templates that do not fit


def small(**factors: Any) -> LoadedAdapter:
    peft = load_peft(RECORDED)
    values = {name: value for name, value in peft.factors.items() if "0.self_attn.q_proj" in name}
    return LoadedAdapter(peft.path, peft.config, values | factors, {})


FITTING = {"lora_a": abstract(16, 4), "lora_b": abstract(4, 16)}


@pytest.mark.parametrize(
    ("template", "pairs", "message"),
    [
        (
            layer_zero(FITTING) | {"lm_head": FITTING},
            None,
            "only the template has lm_head",
        ),
        (
            {"model": {"layers": {"1": {"self_attn": {"q_proj": FITTING}}}}},
            None,
            "only the file has model.layers.0.self_attn.q_proj; "
            "only the template has model.layers.1.self_attn.q_proj",
        ),
        (
            layer_zero(FITTING) | {"norm": {"scale": abstract(16)}},
            None,
            "only the template has model.norm.weight",
        ),
        (layer_zero(PLAIN), None, r"q_proj: \(in, rank, out\) is \(16, 4, 16\).*\(6, 3, 8\)"),
        (layer_zero(FITTING), LoraPairs(), r"the scale is 6.0, pairs= has 1.0. Use 6.0 there"),
    ],
)
def test_a_template_that_does_not_fit_is_refused_with_the_reason(template, pairs, message):
    with pytest.raises(ValueError, match=message):
        load_into(template, small(), family="llama", pairs=pairs)


def test_stacked_layers_must_have_the_same_scale():
    factors = load_peft(RECORDED).factors["model.layers.1.self_attn.q_proj"]._replace(scale=9.0)
    peft = small(**{"model.layers.1.self_attn.q_proj": factors})
    template = {"lora_a": abstract(2, 16, 4), "lora_b": abstract(2, 4, 16)}
    with pytest.raises(ValueError, match=r"scale is 9.0, that of model.layers.0.* is 6.0. Stacked"):
        load_into({"layers": {"self_attn": {"q_proj": template}}}, peft, family="llama")


def test_a_scale_is_found_by_the_end_of_a_name():
    peft = load_peft(RECORDED)
    assert peft.scale_of("q_proj") == peft.scale_of("model.layers.0.self_attn.q_proj") == 6.0
    with pytest.raises(KeyError, match="no adapter for 'k_proj'"):
        peft.scale_of("k_proj")
    with pytest.raises(KeyError, match="no adapter for 'proj'"):
        peft.scale_of("proj")
    name = "model.layers.1.self_attn.q_proj"
    mixed = small(**{name: peft.factors[name]._replace(scale=9.0)})
    with pytest.raises(KeyError, match=r"different scales \[6.0, 9.0\] for 'q_proj'"):
        mixed.scale_of("q_proj")
