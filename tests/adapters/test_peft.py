"""Exchange of adapters with PEFT in both directions, and of merged models with transformers.

The tests need PyTorch, transformers and PEFT. `test_peft_files.py` uses a recorded adapter instead.
"""

import copy
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from optimizers import hasty_compiler as hasty_compiler
from safetensors.numpy import load_file

from examples.common.models.llama import LlamaConfig
from examples.common.models.llama_weights import build_model
from loft_jax import LoraPairs
from loft_jax.adapters import (
    FAMILIES,
    LoraRule,
    add_lora,
    load_into,
    load_peft,
    lora_pairs,
    remove_lora,
    save_merged,
    save_peft,
)
from loft_jax.adapters._family import LAYER

RECORDED = Path(__file__).parent / "data" / "peft_llama"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

# The libraries on PyTorch warn of their own deprecations.
others_warn = pytest.mark.filterwarnings("ignore")


def random_tree(template: Any, seed: int = 0, scale: float = 0.3) -> Any:
    """Normal values in the shapes and dtypes of the template."""
    draw = np.random.default_rng(seed)
    leaf = lambda x: jnp.asarray(scale * draw.normal(size=x.shape), x.dtype)
    return jax.tree.map(leaf, template)


def nested(flat: dict[str, Any]) -> dict:
    """Nested dicts from paths joined by /."""
    tree: dict = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        place = tree
        for key in parents:
            place = place.setdefault(key, {})
        place[last] = leaf
    return tree


def factors(fan_in: int, fan_out: int, rank: int, *stack: int, dtype: Any = jnp.float32) -> dict:
    """Abstract factors of a linear layer."""
    return {
        "lora_a": jax.ShapeDtypeStruct((*stack, fan_in, rank), dtype),
        "lora_b": jax.ShapeDtypeStruct((*stack, rank, fan_out), dtype),
    }


def assert_same(got: Any, expected: Any) -> None:
    """Equal trees, values and dtypes."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


# ------------------------------------------------------------------ the real PEFT

TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
}
IMAGE = {"image_size": 8, "patch_size": 4, **TINY}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {"vocab_size": 48, "num_key_value_heads": 2, "tie_word_embeddings": True, **TINY},
    ),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {
            "vocab_size": 48,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 32,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
    ),
    "bert": ("BertConfig", "BertForSequenceClassification", {"vocab_size": 48, **TINY}),
    "vit": ("ViTConfig", "ViTForImageClassification", IMAGE),
    "dinov2": ("Dinov2Config", "Dinov2ForImageClassification", IMAGE),
}
TARGETS = {
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "gpt2": ("c_attn", "c_proj", "c_fc"),
    "bert": ("query", "value", "attention.output.dense", "intermediate.dense"),
    "vit": ("q_proj", "v_proj", "fc1", "fc2"),
    "dinov2": ("q_proj", "k_proj", "o_proj", "fc1"),
}
FAMILY_NAMES = list(MODELS)


def torch_model(hf: Any, name: str, seed: int = 0) -> Any:
    """A tiny random model, far from its initialization."""
    config, model, options = MODELS[name]
    hf.torch.manual_seed(seed)
    model = getattr(hf.transformers, model)(getattr(hf.transformers, config)(**options)).eval()
    with hf.torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * hf.torch.randn_like(parameter))
    return model


def inputs(hf: Any, name: str) -> Any:
    """Token ids, or images."""
    draw = np.random.default_rng(7)
    if MODELS[name][0].startswith(("ViT", "Dino")):
        return hf.torch.tensor(draw.normal(size=(2, 3, 8, 8)), dtype=hf.torch.float32)
    return hf.torch.tensor(draw.integers(0, 48, (2, 12)))


def logits_of(hf: Any, model: Any, x: Any) -> np.ndarray:
    with hf.torch.no_grad():
        return model(x).logits.numpy()


def targets_of(hf: Any, model: Any, name: str) -> dict[str, tuple[int, int]]:
    """The modules to adapt: (in, out) by their name."""
    found = {}
    for module_name, module in model.named_modules():
        if module_name.endswith(tuple("." + target for target in TARGETS[name])):
            out_in = tuple(module.weight.shape)
            conv1d = isinstance(module, hf.transformers.pytorch_utils.Conv1D)
            found[module_name] = out_in if conv1d else out_in[::-1]
    assert found
    return found


def our_llama(model: Any) -> Any:
    """The model of the example with the weights of the PyTorch model."""
    config = LlamaConfig.from_hf(model.config.to_dict())
    tensors = {key: value.detach().numpy() for key, value in model.state_dict().items()}
    return build_model(config, tensors)


@others_warn
def test_peft_with_our_adapter_equals_our_llama(hf, close, tmp_path):
    torch_base = torch_model(hf, "llama")
    model = our_llama(torch_base)
    rule = LoraRule(path="layers/.*_proj", rank=3, alpha=7, batch=(0,))
    model = add_lora(model, rule, rngs=nnx.Rngs(0))
    adapter = random_tree(nnx.state(model, nnx.LoRAParam))
    nnx.update(model, adapter)
    save_peft(tmp_path, adapter, family="llama", pairs=lora_pairs(rule))
    assert json.loads((tmp_path / CONFIG).read_text())["lora_alpha"] == 7
    x = inputs(hf, "llama")
    ours = model(jnp.asarray(x.numpy()))
    base_logits = logits_of(hf, torch_base, x)
    assert np.abs(ours - base_logits).max() > 0.1  # the adapter does something
    loaded = hf.peft.PeftModel.from_pretrained(torch_base, tmp_path)
    close("PEFT with our adapter of llama", logits_of(hf, loaded, x), ours, 1e-4)


@others_warn
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_peft_merges_our_adapter_correctly(hf, close, tmp_path, name, use_rslora):
    """Modules of different ranks and scales, and the last layer of one kind not adapted."""
    base = torch_model(hf, name)
    x = inputs(hf, name)
    targets = targets_of(hf, base, name)
    targets.popitem()
    flat, pairs = {}, []
    for number, (module, (fan_in, fan_out)) in enumerate(targets.items()):
        path = module.replace(".", "/")
        flat |= {f"{path}/{k}": v for k, v in factors(fan_in, fan_out, 2 + number % 2).items()}
        pairs.append((f"{path}/lora_a", 0.25 + number % 3))
    adapter = random_tree(nested(flat))
    save_peft(
        tmp_path,
        adapter,
        family=name,
        pairs=LoraPairs(scale=tuple(pairs)),
        use_rslora=use_rslora,
    )
    expected = copy.deepcopy(base)
    with hf.torch.no_grad():
        for (module, _), (_, scale) in zip(targets.items(), pairs, strict=True):
            place = adapter
            for key in module.split("."):
                place = place[key]
            product = scale * np.asarray(place["lora_a"]) @ np.asarray(place["lora_b"])
            weight = expected.get_submodule(module).weight
            conv1d = isinstance(
                expected.get_submodule(module), hf.transformers.pytorch_utils.Conv1D
            )
            weight += hf.torch.tensor(product if conv1d else product.T)
    loaded = hf.peft.PeftModel.from_pretrained(base, tmp_path)
    wanted = logits_of(hf, expected, x)
    rs = ", rsLoRA" if use_rslora else ""
    close(f"PEFT with our adapter of {name}{rs}", logits_of(hf, loaded, x), wanted, 1e-4)
    merged = loaded.merge_and_unload().state_dict()
    largest = max(
        float((merged[key] - value).abs().max()) for key, value in expected.state_dict().items()
    )
    close(f"weights that PEFT merged of {name}{rs}", largest, 0.0, 1e-6)
    assert merged.keys() == expected.state_dict().keys()


@others_warn
def test_peft_adapts_only_the_named_modules(hf, tmp_path):
    """The list is so long that PEFT shortens it, and names of layer 1 are ends of those of 11."""
    options = MODELS["llama"][2] | {"num_hidden_layers": 12}
    base = hf.transformers.LlamaForCausalLM(hf.transformers.LlamaConfig(**options))
    flat, wanted = {}, {}
    for module, size in targets_of(hf, base, "llama").items():
        if (layer := int(module.split(".")[2])) in (1, 10, 11):
            wanted[module] = 2 if layer == 1 else 3
            shapes = factors(*size, wanted[module])
            flat |= {f"{module.replace('.', '/')}/{key}": leaf for key, leaf in shapes.items()}
    assert len(wanted) == 21
    scale = (("model/layers/11/.*", 0.5), (".*", 2.0))
    save_peft(tmp_path, random_tree(nested(flat)), family="llama", pairs=LoraPairs(scale=scale))
    loaded = hf.peft.PeftModel.from_pretrained(base, tmp_path).base_model
    assert sorted(loaded.targeted_module_names) == sorted(wanted)
    for module, rank in wanted.items():
        layer = loaded.model.get_submodule(module)
        assert layer.r == {"default": rank}
        assert layer.scaling == {"default": 0.5 if ".11." in module else 2.0}


VARIANTS = {
    "alpha": {"r": 4, "lora_alpha": 10},
    "rslora": {"r": 3, "lora_alpha": 7, "use_rslora": True},
}
PATTERNS = {
    "llama": ({"v_proj": 2, "layers.1.self_attn.q_proj": 3}, {"down_proj": 5}),
    "gpt2": ({"attn.c_proj": 2}, {r"h\.0\.mlp\.c_fc": 5}),
    "bert": ({"value": 2}, {".*intermediate.dense": 1}),
    "vit": ({"fc1": 2}, {"q_proj": 5}),
    "dinov2": ({"k_proj": 2}, {"layer.1.mlp.fc1": 5}),
}


def trained_by_peft(hf: Any, name: str, options: dict[str, Any], folder: Path) -> tuple[Any, Any]:
    """The base and PEFT's model after a few steps of training, saved to the folder."""
    base = torch_model(hf, name)
    x = inputs(hf, name)
    targets = list(TARGETS[name])
    config = hf.peft.LoraConfig(target_modules=targets, **options)
    adapted = hf.peft.get_peft_model(copy.deepcopy(base), config)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = hf.torch.optim.Adam(trained, lr=0.02)
    for _ in range(4):
        optimizer.zero_grad()
        adapted(x).logits.square().mean().backward()
        optimizer.step()
    adapted.save_pretrained(folder)
    return base, adapted.eval()


def template_of(peft: Any) -> dict:
    """The unstacked tree that an adapter fills."""
    flat = {}
    for module, (a, b, *_) in peft.factors.items():
        path = module.replace(".", "/")
        shapes = factors(a.shape[0], b.shape[1], a.shape[1])
        flat |= {f"{path}/{key}": value for key, value in shapes.items()}
    return nested(flat)


@others_warn
@pytest.mark.parametrize("variant", [*VARIANTS, "patterns"])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_an_adapter_of_peft_survives_a_round_trip(hf, tmp_path, name, variant):
    """Each merged weight equals that of PEFT, and our files equal those of PEFT."""
    rank_pattern, alpha_pattern = PATTERNS[name]
    patterns = {"r": 4, "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}
    options = {"task_type": None, **(VARIANTS.get(variant) or patterns)}
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    _, adapted = trained_by_peft(hf, name, options, theirs)
    peft = load_peft(theirs)
    tree = load_into(template_of(peft), peft, family=name)
    for module, (a, b, scale, _) in peft.factors.items():
        place = tree
        for key in module.split("."):
            place = place[key]
        np.testing.assert_array_equal(np.asarray(place["lora_a"]), a)
        delta = adapted.get_submodule(f"base_model.model.{module}").get_delta_weight("default")
        delta = delta.detach().numpy()
        conv1d = delta.shape == (a.shape[0], b.shape[1]) and FAMILIES[name].kind(module) == "conv1d"
        np.testing.assert_allclose(scale * a @ b, delta if conv1d else delta.T, atol=1e-6)
        assert peft.scale_of(module) == scale

    scales = tuple((f"{m.replace('.', '/')}/.*", f.scale) for m, f in peft.factors.items())
    pairs = LoraPairs(scale=scales)
    load_into(template_of(peft), peft, family=name, pairs=pairs)  # the same scale as in the file
    rslora = bool(options.get("use_rslora"))
    save_peft(ours, tree, family=name, pairs=pairs, use_rslora=rslora)
    before, after = load_file(theirs / WEIGHTS), load_file(ours / WEIGHTS)
    assert list(before) == list(after)
    for key, tensor in before.items():
        assert tensor.shape == after[key].shape
        np.testing.assert_array_equal(tensor, after[key])
    old, new = (json.loads((folder / CONFIG).read_text()) for folder in (theirs, ours))
    assert list(old) == list(new)  # the same fields in the same order
    # PEFT writes short names and expressions, which could match further modules.
    by_name = {"target_modules", "auto_mapping"}
    if variant == "patterns":
        by_name |= {"rank_pattern", "alpha_pattern", "r", "lora_alpha"}
    assert {key for key in old if old[key] != new[key]} <= by_name
    again = load_peft(ours)
    assert {m: f.scale for m, f in again.factors.items()} == pytest.approx(
        {m: f.scale for m, f in peft.factors.items()}, rel=1e-12
    )
    header = lambda folder: (folder / WEIGHTS).read_bytes()[8:40]
    assert b'"__metadata__":{"format":"pt"}' in header(theirs)
    assert header(theirs) == header(ours)


@others_warn
def test_our_llama_with_an_adapter_of_peft_equals_peft(hf, close, tmp_path):
    options = {"r": 4, "lora_alpha": 9, "use_rslora": True}
    base, adapted = trained_by_peft(hf, "llama", options, tmp_path)
    model = our_llama(base)
    peft = load_peft(tmp_path)
    rule = LoraRule(path="layers/.*_proj", rank=4, alpha=9, rslora=True, batch=(0,))
    model = add_lora(model, rule, rngs=nnx.Rngs(0))
    template = nnx.state(model, nnx.LoRAParam)
    nnx.update(model, load_into(template, peft, family="llama", pairs=lora_pairs(rule)))
    x = inputs(hf, "llama")
    ours = model(jnp.asarray(x.numpy()))
    assert np.abs(ours - logits_of(hf, base, x)).max() > 0.1
    close("our llama with PEFT's adapter", ours, logits_of(hf, adapted, x), 1e-4)


@others_warn
@pytest.mark.parametrize("name", ["vit", "bert"])
def test_a_trained_head_is_exchanged_too(hf, close, tmp_path, name):
    """PEFT loads a head that we save in full, and we load one that PEFT saves."""
    base = torch_model(hf, name)
    targets = targets_of(hf, base, name)
    flat: dict[str, Any] = {
        f"{module.replace('.', '/')}/{key}": leaf
        for module, size in targets.items()
        for key, leaf in factors(*size, 2).items()
    }
    flat["classifier/kernel"] = jax.ShapeDtypeStruct((16 * (1 + (name == "dinov2")), 2), np.float32)
    flat["classifier/bias"] = jax.ShapeDtypeStruct((2,), np.float32)
    adapter = random_tree(nested(flat))
    save_peft(tmp_path, adapter, family=name, task_type="SEQ_CLS" if name == "bert" else None)
    loaded = hf.peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    merged = loaded.merge_and_unload()
    np.testing.assert_array_equal(
        merged.classifier.weight.detach().numpy(), np.asarray(adapter["classifier"]["kernel"]).T
    )
    np.testing.assert_array_equal(
        merged.classifier.bias.detach().numpy(), adapter["classifier"]["bias"]
    )
    again = hf.peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    again.save_pretrained(tmp_path / "again")
    assert_same(load_into(nested(flat), load_peft(tmp_path / "again"), family=name), adapter)
    x = inputs(hf, name)
    wanted = logits_of(hf, merged, x)
    close(f"PEFT with our head of {name}", logits_of(hf, again, x), wanted, 1e-4)


@others_warn
def test_peft_requires_the_head_of_the_task(hf, tmp_path):
    """This is why save_peft refuses the task without the head."""
    layer = random_tree({"query": factors(16, 16, 2)})
    adapter = {"bert": {"encoder": {"layer": {"0": {"attention": {"self": layer}}}}}}
    with pytest.raises(ValueError, match="SEQ_CLS.*classifier or score"):
        save_peft(tmp_path, adapter, family="bert", task_type="SEQ_CLS")
    save_peft(tmp_path, adapter, family="bert")
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"task_type": "SEQ_CLS"}))
    with pytest.raises(KeyError, match="classifier"):
        hf.peft.PeftModel.from_pretrained(torch_model(hf, "bert"), tmp_path)


@others_warn
def test_a_convolution_survives_a_round_trip_through_peft(hf, tmp_path):
    path = "vit/embeddings/patch_embeddings/projection"
    template = nested(
        {
            f"{path}/lora_a": jax.ShapeDtypeStruct((4, 4, 3, 2), np.float32),
            f"{path}/lora_b": jax.ShapeDtypeStruct((2, 16), np.float32),
        }
    )
    adapter = random_tree(template)
    save_peft(tmp_path, adapter, family="vit", pairs=LoraPairs(scale=0.5))
    base = torch_model(hf, "vit")
    before = base.vit.embeddings.patch_embeddings.projection.weight.detach().numpy().copy()
    merged = hf.peft.PeftModel.from_pretrained(base, tmp_path).merge_and_unload()
    after = merged.vit.embeddings.patch_embeddings.projection.weight.detach().numpy()
    a, b = jax.tree.leaves(adapter)
    kernel = 0.5 * np.asarray(jnp.matmul(a, b, precision="highest"))  # height, width, in, out
    np.testing.assert_allclose(after - before, kernel.transpose(3, 2, 0, 1), atol=1e-6)
    assert_same(load_into(template, load_peft(tmp_path), family="vit"), adapter)


@others_warn
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_all_names_of_a_family_exist_in_transformers(hf, name):
    """The table has an entry for each module with parameters, and no other entries."""
    config_name, _, options = MODELS[name]
    prefix = {"llama": "Llama", "gpt2": "GPT2", "bert": "Bert", "vit": "ViT", "dinov2": "Dinov2"}
    heads = {
        # Gemma 3 has all norms that a member of the family can have.
        "llama": (
            *("ForCausalLM", "ForSequenceClassification", "ForTokenClassification"),
            *("gemma3", "qwen3_moe"),
        ),
        "gpt2": (
            *("LMHeadModel", "ForSequenceClassification"),
            *("ForTokenClassification", "ForQuestionAnswering"),
        ),
        "bert": ("ForSequenceClassification", "ForPreTraining", "ForQuestionAnswering", "Model"),
        "vit": ("ForImageClassification", "Model"),
        "dinov2": ("ForImageClassification", "swiglu"),
    }
    kinds = {"Linear": "linear", "Conv1D": "conv1d", "Conv2d": "conv2d", "Embedding": "embedding"}
    family, seen = FAMILIES[name], set()
    for head in heads[name]:
        swiglu = {"use_swiglu_ffn": True} if head == "swiglu" else {}
        others = {"gemma3": "Gemma3TextConfig", "qwen3_moe": "Qwen3MoeConfig"}
        config_type = others.get(head, config_name)
        experts = {"num_experts": 2} if head == "qwen3_moe" else {}
        config = getattr(hf.transformers, config_type)(
            **options, **swiglu, **experts, pad_token_id=0
        )
        head = head.replace("swiglu", "ForImageClassification")
        bare = dataclasses.replace(family, prefix="") if head == "Model" else family
        others = {"gemma3": "Gemma3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
        model_type = others.get(head, prefix[name] + head)
        model = getattr(hf.transformers, model_type)(config)
        for module_name, module in model.named_modules():
            if module_name.endswith(".experts"):  # each parameter is a stack with a name
                names = [f"{module_name}.{k}" for k, _ in module.named_parameters(recurse=False)]
                assert [family.hf_module(k.replace(".", "/")) for k in names] == names
                assert {family.kind(k) for k in names} == {"experts"}
                seen |= {re.sub(r"\.\d+\.", f".{LAYER}.", k) for k in names}
                continue
            if next(module.parameters(recurse=False), None) is None:
                continue
            assert bare.hf_module(module_name.replace(".", "/")) == module_name
            seen.add(re.sub(r"\.\d+\.", f".{LAYER}.", module_name))
            if head == "Model":
                assert family.hf_module(module_name.replace(".", "/")).endswith(module_name)
                seen.add(f"{family.prefix}." + re.sub(r"\.\d+\.", f".{LAYER}.", module_name))
            if (kind := kinds.get(type(module).__name__)) is not None:
                assert family.kind(module_name) == kind
    written = {template.replace("{prefix}", family.prefix + ".") for _, template in family.modules}
    assert written <= seen


def as_flax(hf: Any, model: Any) -> dict:
    """The parameters of a PyTorch model in the layout of Flax, at the same paths."""
    nn = hf.torch.nn
    flat = {}
    for module_name, module in model.named_modules():
        for parameter, value in module.named_parameters(recurse=False):
            value = value.detach().numpy()
            if parameter == "weight":
                if isinstance(module, nn.Linear):
                    parameter, value = "kernel", value.T
                elif isinstance(module, hf.transformers.pytorch_utils.Conv1D):
                    parameter = "kernel"
                elif isinstance(module, nn.Conv2d):
                    parameter, value = "kernel", value.transpose(2, 3, 1, 0)
                else:
                    parameter = "embedding" if isinstance(module, nn.Embedding) else "scale"
            flat[f"{module_name.replace('.', '/')}/{parameter}"] = jnp.asarray(value)
    return nested(flat)


@others_warn
@pytest.mark.parametrize("name", [*FAMILY_NAMES, "vit_transformers4", "dinov2_transformers4"])
def test_transformers_loads_merged_weights(hf, close, tmp_path, name):
    """This includes the names of transformers 4, which transformers 5 converts."""
    plain = name.removesuffix("_transformers4")
    model = torch_model(hf, plain)
    weights = as_flax(hf, model)
    if plain == "llama":
        weights.pop("lm_head", None)
    save_merged(tmp_path, weights, family=name)
    model.config.save_pretrained(tmp_path)
    names = [key for key in load_file(tmp_path / "model.safetensors") if "attention" in key]
    if name != plain:
        assert any(".attention.attention.query." in key for key in names)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    x = inputs(hf, plain)
    wanted = logits_of(hf, model, x)
    close(f"transformers with merged {name}", logits_of(hf, loaded.eval(), x), wanted, 1e-4)


@others_warn
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_with_merged_weights_equals_our_llama(hf, close, tmp_path, tied):
    base = torch_model(hf, "llama")
    base.config.tie_word_embeddings = tied
    model = our_llama(base)
    rule = LoraRule(path="layers/.*/(q|v|down)_proj", rank=3, alpha=6, batch=(0,))
    model = add_lora(model, rule, rngs=nnx.Rngs(0))
    nnx.update(model, random_tree(nnx.state(model, nnx.LoRAParam)))
    x = inputs(hf, "llama")
    ours = model(jnp.asarray(x.numpy()))
    with pytest.raises(ValueError, match="lora_a is a factor of an adapter. Merge"):
        save_merged(tmp_path, nnx.state(model, nnx.Param), family="llama")
    merged = remove_lora(model, merge=True)
    save_merged(tmp_path, nnx.state(merged, nnx.Param), family="llama")
    base.config.save_pretrained(tmp_path)
    loaded = hf.transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    what = f"transformers with our merged llama, head {'tied' if tied else 'untied'}"
    close(what, logits_of(hf, loaded, x), ours, 1e-4)
