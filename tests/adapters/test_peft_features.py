"""Features of PEFT beyond plain LoRA, with the real PEFT: exchanged, or refused with true advice.

Each advice in a message is carried out here, and its result is compared.
"""

import copy
import dataclasses
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters.test_peft import (
    CONFIG,
    TARGETS,
    WEIGHTS,
    factors,
    inputs,
    logits_of,
    nested,
    others_warn,
    random_tree,
    template_of,
    torch_model,
)
from safetensors.numpy import load_file, save_file

from loft_jax import LoraPairs
from loft_jax.adapters import FAMILIES, Family, load_into, load_peft, save_peft
from loft_jax.baselines import dora_weight

pytestmark = others_warn
RECORDED = Path(__file__).parent / "data" / "peft_llama"


def adapted_by_peft(hf: Any, base: Any, targets: Any = ("q_proj", "v_proj"), **options: Any) -> Any:
    """The model with an adapter of PEFT whose parameters have moved."""
    options = {"r": 3, "lora_alpha": 6, **options}
    config = hf.peft.LoraConfig(target_modules=list(targets), **options)
    model = hf.peft.get_peft_model(copy.deepcopy(base), config).eval()
    move(hf, model)
    return model


def move(hf: Any, model: Any) -> None:
    hf.torch.manual_seed(3)
    with hf.torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * hf.torch.randn_like(parameter))


def with_products(hf: Any, base: Any, loaded: Any, family: str = "llama") -> Any:
    """The base with the loaded adapter added to its weights, by our formulas."""
    model = copy.deepcopy(base)
    with hf.torch.no_grad():
        for name, (a, b, scale, magnitude) in loaded.factors.items():
            weight = model.get_submodule(name).weight
            kind = FAMILIES[family].kind(name)
            kernel = weight.detach().numpy()
            kernel = kernel.T if kind == "linear" else kernel
            if magnitude is None:
                kernel = kernel + scale * a @ b
            else:
                kernel = np.asarray(
                    dora_weight(*map(jnp.asarray, (kernel, magnitude, a, b)), scale=scale)
                )
            weight.copy_(hf.torch.tensor(kernel.T if kind == "linear" else kernel))
        for name, value in loaded.saved.items():
            model.get_parameter(name).copy_(hf.torch.tensor(value))
    return model


def folder_of(model: Any, folder: Path) -> Path:
    """The folder of a model of transformers."""
    model.save_pretrained(folder)
    return folder


# ------------------------------------------------------------------ exchanged both ways


FEATURES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "velora": ("llama", ("q_proj", "v_proj"), {"velora_config": "VeloraConfig"}),
    "MiCA": ("llama", ("q_proj", "v_proj"), {"init_lora_weights": "MiCA"}),
    "Gaussian": ("llama", ("q_proj", "v_proj"), {"init_lora_weights": "Gaussian"}),
    "orthogonal": ("llama", ("q_proj",), {"init_lora_weights": "orthogonal", "r": 4}),
    "EVA": ("llama", ("q_proj",), {"init_lora_weights": "eva"}),
    "DoRA": ("llama", ("q_proj", "down_proj"), {"use_dora": True}),
    "DoRA of Conv1D": ("gpt2", ("c_attn", "c_fc"), {"use_dora": True, "fan_in_fan_out": True}),
    "lora_only": ("gpt2", ("c_attn",), {"bias": "lora_only", "fan_in_fan_out": True}),
    "lora_only of BERT": ("bert", ("query", "value"), {"bias": "lora_only"}),
    "target_parameters": ("llama", (), {"target_parameters": ["q_proj.weight"]}),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_of_peft_is_read(hf, close, tmp_path, feature):
    name, targets, options = FEATURES[feature]
    if "velora_config" in options:
        options = options | {"velora_config": hf.peft.tuners.lora.VeloraConfig(num_groups=4)}
    base, x = torch_model(hf, name), inputs(hf, name)
    model = adapted_by_peft(hf, base, targets, **options)
    model.save_pretrained(tmp_path)
    ours = with_products(hf, base, load_peft(tmp_path), name)
    expected = logits_of(hf, model, x)
    assert np.abs(expected - logits_of(hf, base, x)).max() > 0.05
    close(f"PEFT's {feature}, read by us", logits_of(hf, ours, x), expected, 1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_dora_survives_a_round_trip(hf, close, tmp_path, name):
    base, x = torch_model(hf, name), inputs(hf, name)
    targets = ("q_proj", "up_proj") if name == "llama" else ("c_attn", "c_proj")
    options = {"use_dora": True, "fan_in_fan_out": name == "gpt2"}
    model = adapted_by_peft(hf, base, targets, **options)
    model.save_pretrained(tmp_path / "theirs")
    loaded = load_peft(tmp_path / "theirs")
    template: dict = template_of(loaded)
    for module, one in loaded.factors.items():
        place = template
        for key in module.split("."):
            place = place[key]
        place["lora_magnitude"] = jax.ShapeDtypeStruct(one.b.shape[1:], np.float32)
    tree = load_into(template, loaded, family=name)
    save_peft(tmp_path / "ours", tree, family=name, pairs=LoraPairs(scale=2.0))
    theirs, ours = (load_file(tmp_path / folder / WEIGHTS) for folder in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    for key, tensor in theirs.items():
        np.testing.assert_array_equal(ours[key], tensor)
    again = hf.peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    expected = logits_of(hf, model, x)
    close(f"PEFT with our DoRA of {name}", logits_of(hf, again, x), expected, 1e-5)


def test_dora_of_a_convolution_survives_a_round_trip(hf, tmp_path):
    base = torch_model(hf, "vit")
    model = adapted_by_peft(hf, base, ("projection",), use_dora=True)
    model.save_pretrained(tmp_path / "theirs")
    loaded = load_peft(tmp_path / "theirs")
    path = "embeddings/patch_embeddings/projection"
    template = nested(
        {
            f"{path}/lora_a": jax.ShapeDtypeStruct((4, 4, 3, 3), np.float32),
            f"{path}/lora_b": jax.ShapeDtypeStruct((3, 16), np.float32),
            f"{path}/lora_magnitude": jax.ShapeDtypeStruct((16,), np.float32),
        }
    )
    tree = load_into(template, loaded, family="vit")
    save_peft(tmp_path / "ours", tree, family="vit", pairs=LoraPairs(scale=2.0))
    theirs, ours = (load_file(tmp_path / folder / WEIGHTS) for folder in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    for key, tensor in theirs.items():
        np.testing.assert_array_equal(ours[key], tensor)


def test_a_trained_bias_is_written_as_lora_only(hf, close, tmp_path):
    base, x = torch_model(hf, "gpt2"), inputs(hf, "gpt2")
    path = "h/attn/c_attn"
    shapes = {f"{path}/{key}": leaf for key, leaf in factors(16, 48, 3, 2).items()}
    shapes[f"{path}/bias"] = jax.ShapeDtypeStruct((2, 48), np.float32)
    adapter = random_tree(nested(shapes))
    save_peft(tmp_path, adapter, family="gpt2")
    assert json.loads((tmp_path / CONFIG).read_text())["bias"] == "lora_only"
    loaded = load_peft(tmp_path)
    for one, other in zip(
        jax.tree.leaves(load_into(adapter, loaded, family="gpt2")),
        jax.tree.leaves(adapter),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
    peft = hf.peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    ours = with_products(hf, base, loaded, "gpt2")
    expected = logits_of(hf, ours, x)
    close("PEFT with our biases", logits_of(hf, peft, x), expected, 1e-4)


def test_an_adapter_of_an_embedding_and_of_the_head(hf, close, tmp_path):
    base, x = torch_model(hf, "llama"), inputs(hf, "llama")
    base.lm_head = copy.deepcopy(base.lm_head)
    base.lm_head.weight = hf.torch.nn.Parameter(1.1 * base.lm_head.weight.detach())
    base.config.tie_word_embeddings = False
    flat = {f"embed_tokens/{key}": leaf for key, leaf in factors(48, 16, 2).items()}
    flat |= {f"lm_head/{key}": leaf for key, leaf in factors(16, 48, 2).items()}
    adapter = random_tree(nested(flat))
    save_peft(tmp_path / "ours", adapter, family="llama", pairs=LoraPairs(scale=1.5))
    loaded = load_peft(tmp_path / "ours")
    peft = hf.peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    expected = logits_of(hf, with_products(hf, base, loaded), x)
    assert np.abs(expected - logits_of(hf, base, x)).max() > 0.1
    close("PEFT with our embedding and head", logits_of(hf, peft, x), expected, 1e-4)
    # As PEFT saves it by default, with the weights of the base.
    peft.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match="base_layer|save_embedding_layers=False. Pass base="):
        load_peft(tmp_path / "theirs")
    again = load_peft(tmp_path / "theirs", base=folder_of(base, tmp_path / "base"))
    for name, one in loaded.factors.items():
        np.testing.assert_array_equal(again.factors[name].a, one.a)
        np.testing.assert_array_equal(again.factors[name].b, one.b)
    other = {name: 2 * value.detach().numpy() for name, value in base.state_dict().items()}
    with pytest.raises(ValueError, match="differs from the base model"):
        load_peft(tmp_path / "theirs", base=other)
    # The other advice in the message.
    peft.save_pretrained(tmp_path / "without", save_embedding_layers=False)
    assert load_peft(tmp_path / "without").factors.keys() == loaded.factors.keys()


# ------------------------------------------------------------------ initializations


@pytest.mark.parametrize("kind", ["pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_an_initialization_from_the_base_is_converted(hf, close, tmp_path, kind, rslora):
    base, x = torch_model(hf, "llama"), inputs(hf, "llama")
    options = {"init_lora_weights": kind, "use_rslora": rslora}
    model = adapted_by_peft(hf, base, ("q_proj", "up_proj"), **options)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=f"init_lora_weights is '{kind}'.*Pass base="):
        load_peft(tmp_path / "adapter")
    loaded = load_peft(tmp_path / "adapter", base=folder_of(base, tmp_path / "base"))
    assert {one.rank for one in loaded.factors.values()} == {6}
    expected = logits_of(hf, model, x)
    ours = logits_of(hf, with_products(hf, base, loaded), x)
    close(f"PEFT's {kind}, converted by us", ours, expected, 1e-4)


def prepared(hf: Any, base: Any, kind: str, x: Any, monkeypatch: Any) -> Any:
    """A configuration of PEFT, and the base with what the initialization needs from data."""
    config = hf.peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj", "up_proj"], init_lora_weights=kind
    )
    if kind == "corda":
        # PEFT imports attr here, which it does not require. Its dataclass is Python's.
        if importlib.util.find_spec("attr") is None:
            attr = types.SimpleNamespace(dataclass=dataclasses.dataclass)
            monkeypatch.setitem(sys.modules, "attr", attr)
        from peft.tuners.lora.corda import preprocess_corda

        config.corda_config = hf.peft.tuners.lora.config.CordaConfig(corda_method="kpm")
        preprocess_corda(base, config, run_model=lambda: [base(row[None]) for row in x])
    if kind == "lora_ga":
        from peft.tuners.lora.loraga import preprocess_loraga

        config.lora_ga_config = hf.peft.tuners.lora.config.LoraGAConfig()
        preprocess_loraga(base, config, lambda: base(x).logits.square().mean().backward())
    return config


@pytest.mark.parametrize("kind", ["pissa_niter_8", "corda", "lora_ga"])
def test_the_advice_for_other_initializations_is_right(hf, close, tmp_path, monkeypatch, kind):
    base, x = torch_model(hf, "llama"), inputs(hf, "llama")
    original = copy.deepcopy(base)
    model = hf.peft.get_peft_model(base, prepared(hf, base, kind, x, monkeypatch)).eval()
    model.save_pretrained(tmp_path / "initial")
    move(hf, model)
    expected = logits_of(hf, model, x)
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(ValueError, match="path_initial_model_for_weight_conversion=initial"):
        load_peft(tmp_path / "trained")
    model.save_pretrained(
        tmp_path / "converted",
        path_initial_model_for_weight_conversion=str(tmp_path / "initial"),
    )
    loaded = load_peft(tmp_path / "converted")
    assert {one.rank for one in loaded.factors.values()} == {6}
    got = logits_of(hf, with_products(hf, original, loaded), x)
    close(f"PEFT's {kind}, converted by PEFT", got, expected, 1e-4)


def test_the_advice_for_loftq_is_right(hf, close, tmp_path, monkeypatch):
    """Merging in the process that trained it, and why no conversion is advised.

    PEFT quantizes on a GPU only, so a rounding of ours is in its place. All else is PEFT's.
    """

    def rounded(weight: Any, num_bits: int, reduced_rank: int, num_iter: int) -> tuple:
        step = weight.abs().max() / 2 ** (num_bits - 1)
        quantized = (weight / step).round() * step
        u, s, vh = hf.torch.linalg.svd(weight - quantized)
        left, right = u[:, :reduced_rank] * s[:reduced_rank].sqrt(), vh[:reduced_rank]
        return quantized, s[:reduced_rank, None].sqrt() * right, left

    monkeypatch.setattr("peft.tuners.lora.layer.loftq_init", rounded)
    base, x = torch_model(hf, "llama"), inputs(hf, "llama")
    original = copy.deepcopy(base)
    options = {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}}
    config = hf.peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "up_proj"], **options)
    model = hf.peft.get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "initial")
    move(hf, model)
    expected = logits_of(hf, model, x)
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(ValueError, match="wrong weights without a message. Merge it") as caught:
        load_peft(tmp_path / "trained")
    assert "path_initial" not in str(caught.value)
    model.save_pretrained(
        tmp_path / "converted",
        path_initial_model_for_weight_conversion=str(tmp_path / "initial"),
    )
    converted = with_products(hf, original, load_peft(tmp_path / "converted"))
    assert np.abs(logits_of(hf, converted, x) - expected).max() > 0.1
    folder_of(model.merge_and_unload(), tmp_path / "merged")
    merged = hf.transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    close("PEFT's loftq, merged by PEFT", logits_of(hf, merged, x), expected, 1e-4)


# ------------------------------------------------------------------ the advice to merge


def edit(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))


MERGED: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "bias is 'all'": ("gpt2", ("c_attn",), {"bias": "all", "fan_in_fan_out": True}),
}


@pytest.mark.parametrize("feature", MERGED)
def test_what_we_advise_to_merge_can_be_merged(hf, close, tmp_path, feature):
    name, targets, options = MERGED[feature]
    base, x = torch_model(hf, name), inputs(hf, name)
    model = adapted_by_peft(hf, base, targets, **options)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=feature) as caught:
        load_peft(tmp_path)
    assert "Merge it in PEFT (merge_and_unload)" in str(caught.value)
    expected = logits_of(hf, model, x)
    close(f"PEFT's {feature}, merged", logits_of(hf, model.merge_and_unload(), x), expected, 1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_replication": [[0, 2]]}, "replicated layers share their weights"),
        ({"alora_invocation_tokens": [1]}, "acts on a part of each sequence"),
        ({"use_new_method": True}, "not be scale . a @ b. Serve it with PEFT"),
    ],
)
def test_no_merging_is_advised_where_peft_cannot(tmp_path, fields, message):
    for file in RECORDED.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    edit(tmp_path, **fields)
    with pytest.raises(ValueError, match=message) as caught:
        load_peft(tmp_path)
    assert "merge_and_unload" not in str(caught.value)


SERVED: dict[str, dict[str, Any]] = {
    "layer_replication": {"layer_replication": [[0, 2], [0, 2]]},
    "alora_invocation_tokens": {"alora_invocation_tokens": [3, 4], "task_type": "CAUSAL_LM"},
}


@pytest.mark.parametrize("feature", SERVED)
def test_what_we_advise_to_serve_with_peft_can_be_served(hf, tmp_path, feature):
    base, x = torch_model(hf, "llama"), inputs(hf, "llama")
    x[:, 4:6] = hf.torch.tensor([3, 4])
    model = adapted_by_peft(hf, base, **SERVED[feature])
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{feature} is set.*Serve it with PEFT"):
        load_peft(tmp_path)
    again = hf.peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    expected = logits_of(hf, model, x)
    assert np.abs(expected - logits_of(hf, base, x)).max() > 0.05
    np.testing.assert_array_equal(logits_of(hf, again, x), expected)


def test_a_grouped_convolution_is_named(hf, tmp_path):
    base = hf.torch.nn.Sequential(hf.torch.nn.Conv2d(8, 12, 3, groups=2))
    config = hf.peft.LoraConfig(r=4, target_modules=["0"])
    model = hf.peft.get_peft_model(base, config).eval()
    move(hf, model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="an adapter on a grouped convolution.*Serve it with PEFT"):
        load_peft(tmp_path)
    with pytest.raises(NotImplementedError, match="groups"):  # so merging is no advice
        model.merge_and_unload()


def test_target_parameters_of_a_layer_that_stores_in_out_are_refused(hf, tmp_path):
    base = torch_model(hf, "gpt2")
    model = adapted_by_peft(hf, base, (), target_parameters=["attn.c_attn.weight"])
    model.save_pretrained(tmp_path)
    loaded = load_peft(tmp_path)
    with pytest.raises(ValueError, match="target_parameters of a layer that stores"):
        load_into(template_of(loaded), loaded, family="gpt2")
    expected = logits_of(hf, model, inputs(hf, "gpt2"))
    merged = logits_of(hf, model.merge_and_unload(), inputs(hf, "gpt2"))
    np.testing.assert_allclose(merged, expected, atol=1e-4)


# ------------------------------------------------------------------ what we write


def test_nested_modules_are_saved_under_the_outermost_name(hf, tmp_path):
    config = hf.transformers.BertConfig(
        vocab_size=48,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        tie_word_embeddings=False,
    )
    base = hf.transformers.BertForMaskedLM(config).eval()
    head = {
        "transform": {
            "dense": {"kernel": np.ones((16, 16)), "bias": np.ones(16)},
            "LayerNorm": {"scale": np.ones(16), "bias": np.ones(16)},
        },
        "decoder": {"kernel": np.ones((16, 48)), "bias": np.ones(48)},
        "bias": np.ones(48),
    }
    query = random_tree(factors(16, 16, 2))
    layer = {"attention": {"self": {"query": query}}}
    adapter = {
        "bert": {"encoder": {"layer": {"0": layer}}},
        "cls": {"predictions": jax.tree.map(lambda x: np.asarray(x, np.float32), head)},
    }
    save_peft(tmp_path, adapter, family="bert")
    saved = json.loads((tmp_path / CONFIG).read_text())["modules_to_save"]
    assert saved == ["cls.predictions"]
    loaded = hf.peft.PeftModel.from_pretrained(base, tmp_path).merge_and_unload()
    decoder = loaded.cls.predictions.decoder.weight.detach().numpy()
    np.testing.assert_array_equal(decoder, np.ones((48, 16)))
    again = load_into(adapter, load_peft(tmp_path), family="bert")
    assert jax.tree.structure(again) == jax.tree.structure(adapter)


def test_auto_peft_model_finds_the_class(hf, tmp_path):
    base = torch_model(hf, "vit")
    folder_of(base, tmp_path / "base")
    path = "layers/0/attention/q_proj"
    flat = {f"{path}/{key}": leaf for key, leaf in factors(16, 16, 2).items()}
    adapter = random_tree(nested(flat))
    given = {"family": "vit", "base_model": str(tmp_path / "base")}
    save_peft(tmp_path / "a", adapter, **given)
    with pytest.raises(ValueError, match="task"):
        hf.peft.AutoPeftModel.from_pretrained(tmp_path / "a")
    save_peft(tmp_path / "a", adapter, **given, model_class="ViTForImageClassification")
    loaded = hf.peft.AutoPeftModel.from_pretrained(tmp_path / "a")
    assert type(loaded.get_base_model()).__name__ == "ViTForImageClassification"


def test_pattern_keys_serve_old_and_new_versions_of_peft(tmp_path):
    """Up to 0.14 PEFT matches keys after a dot only, and otherwise looks the whole name up."""
    flat = {}
    for layer in (1, 11):
        path = f"layers/{layer}/self_attn/q_proj"
        flat |= {f"{path}/{key}": leaf for key, leaf in factors(8, 8, 1 + layer % 3).items()}
    flat |= {f"layers/2/mlp/up_proj/{key}": leaf for key, leaf in factors(8, 8, 3).items()}
    scales = (("layers/1/.*", 0.5), (".*", 2.0))
    save_peft(tmp_path, random_tree(nested(flat)), family="llama", pairs=LoraPairs(scale=scales))
    config, loaded = json.loads((tmp_path / CONFIG).read_text()), load_peft(tmp_path)
    for module, one in loaded.factors.items():
        rank = config["rank_pattern"].get(module, config["r"])  # as PEFT 0.14 finds it
        alpha = config["alpha_pattern"].get(module, config["lora_alpha"])
        assert (rank, alpha / rank) == (one.rank, one.scale)
    # A name that is the end of another one needs an anchor, which newer versions understand.
    family = Family(name="mine", prefix="", modules=(("one", "up"), ("two", "encoder.up")))
    tree = {name: random_tree(factors(8, 8, rank)) for name, rank in (("one", 2), ("two", 3))}
    tree["three"] = tree["two"]
    family = dataclasses.replace(family, modules=(*family.modules, ("three", "encoder.down")))
    save_peft(tmp_path / "both", tree, family=family)
    assert json.loads((tmp_path / "both" / CONFIG).read_text())["rank_pattern"] == {"^up": 2}
    ranks = {name: one.rank for name, one in load_peft(tmp_path / "both").factors.items()}
    assert ranks == {"up": 2, "encoder.up": 3, "encoder.down": 3}


def test_swiglu_of_transformers_4_has_names_of_its_own(hf, tmp_path):
    family = FAMILIES["dinov2_transformers4"]
    with pytest.raises(ValueError, match="has no such module"):
        family.hf_module("encoder/layer/0/mlp/gate_proj")
    name = "dinov2.encoder.layer.0.mlp.weights_in"
    assert family.hf_module("encoder/layer/0/mlp/weights_in") == name
    with pytest.raises(ValueError, match="has no such module"):
        FAMILIES["dinov2"].hf_module("encoder/layer/0/mlp/weights_in")


# ------------------------------------------------------------------ what we say


@pytest.mark.parametrize(
    ("old", "new"), [("vit_transformers4", "vit"), ("vit", "vit_transformers4")]
)
def test_the_family_of_another_version_is_named(tmp_path, old, new):
    path = "layers/0/attention/q_proj"
    flat = {f"{path}/{key}": leaf for key, leaf in factors(16, 16, 2).items()}
    adapter = random_tree(nested(flat))
    save_peft(tmp_path, adapter, family=old)
    with pytest.raises(ValueError, match=f"names in the file are those of family='{old}'"):
        load_into(adapter, load_peft(tmp_path), family=new)
    load_into(adapter, load_peft(tmp_path), family=old)


def test_a_backbone_without_its_head_is_named(tmp_path):
    path = "encoder/layer/0/attention/self/query"
    flat = {f"{path}/{key}": leaf for key, leaf in factors(16, 16, 2).items()}
    adapter = random_tree(nested(flat))
    bare = dataclasses.replace(FAMILIES["bert"], prefix="")
    save_peft(tmp_path, adapter, family=bare)
    with pytest.raises(ValueError, match=r"family=dataclasses.replace\(FAMILIES\['bert'\], pre"):
        load_into(adapter, load_peft(tmp_path), family="bert")
    load_into(adapter, load_peft(tmp_path), family=bare)


def test_an_adapter_in_a_named_folder_is_pointed_out(hf, tmp_path):
    base = torch_model(hf, "llama")
    config = hf.peft.LoraConfig(r=2, target_modules=["q_proj"])
    hf.peft.get_peft_model(base, config, adapter_name="mine").save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="has an adapter: mine"):
        load_peft(tmp_path)
    assert len(load_peft(tmp_path / "mine").factors) == 2


def test_keys_with_the_name_of_the_adapter_are_read(tmp_path):
    tensors = load_file(RECORDED / WEIGHTS)
    named = {key.replace(".weight", ".default.weight"): value for key, value in tensors.items()}
    save_file(named, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_bytes((RECORDED / CONFIG).read_bytes())
    ours, plain = load_peft(tmp_path), load_peft(RECORDED)
    assert ours.factors.keys() == plain.factors.keys()
    for name, one in plain.factors.items():
        np.testing.assert_array_equal(ours.factors[name].a, one.a)


def test_float64_trees_of_numpy_are_not_rounded(tmp_path):
    a, b = np.full((6, 2), 1 / 3), np.full((2, 4), 1 / 7)
    adapter = {"layers": {"0": {"mlp": {"up_proj": {"lora_a": a, "lora_b": b}}}}}
    save_peft(tmp_path, adapter, family="llama")
    again = load_into(adapter, load_peft(tmp_path), family="llama")
    for one, other in zip(jax.tree.leaves(again), (a, b), strict=True):
        assert one.dtype == np.float64
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit"])
def test_folded_scales_are_the_same_adapter(hf, close, tmp_path, name):
    """One rank, lora_alpha equal to r, no patterns: right also where only these are read."""
    base, x = torch_model(hf, name), inputs(hf, name)
    modules = [
        module
        for module, _ in base.named_modules()
        if module.endswith(tuple("." + target for target in TARGETS[name]))
    ]
    flat, scales = {}, []
    for number, module in enumerate(modules):
        weight = base.get_submodule(module).weight.shape
        conv1d = FAMILIES[name].kind(module) == "conv1d"
        fan_in, fan_out = weight if conv1d else weight[::-1]
        path = module.replace(".", "/")
        flat |= {f"{path}/{k}": v for k, v in factors(fan_in, fan_out, 2 + number % 2).items()}
        scales.append((f"{path}/lora_a", 0.5 + number % 3))
    adapter, pairs = random_tree(nested(flat)), LoraPairs(scale=tuple(scales))
    save_peft(tmp_path / "a", adapter, family=name, pairs=pairs)
    save_peft(tmp_path / "b", adapter, family=name, pairs=pairs, fold_scales=True)
    config = json.loads((tmp_path / "b" / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (3, 3, False)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    one, two = (
        hf.peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / folder)
        for folder in ("a", "b")
    )
    expected = logits_of(hf, one, x)
    close(f"PEFT with folded scales of {name}", logits_of(hf, two, x), expected, 1e-4)
    with pytest.raises(ValueError, match="fold_scales writes a scale of 1"):
        save_peft(tmp_path, adapter, family=name, use_rslora=True, fold_scales=True)
