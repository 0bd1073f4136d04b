"""Adapters of experts, trained tokens and biases of adapters, exchanged with the real PEFT."""

import copy
import json
import re
from typing import Any

import jax
import numpy as np
import pytest
from adapters.test_peft import (
    CONFIG,
    WEIGHTS,
    factors,
    logits_of,
    nested,
    others_warn,
    random_tree,
    torch_model,
)
from adapters.test_peft_features import adapted_by_peft, folder_of, move, with_products
from safetensors.numpy import load_file, save_file
from serving import readers

from loft_jax import LoraAxes, LoraPairs
from loft_jax.adapters import (
    check_servable,
    load_into,
    load_peft,
    save_gguf,
    save_merged,
    save_mlx,
    save_peft,
)

pytestmark = others_warn

EXPERTS, HIDDEN, INNER = 3, 16, 12
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"intermediate_size": INNER, "num_local_experts": EXPERTS}),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            "intermediate_size": 24,
            "moe_intermediate_size": INNER,
            "shared_expert_intermediate_size": 8,
            "num_experts": EXPERTS,
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {"intermediate_size": 24, "moe_intermediate_size": INNER, "num_experts": EXPERTS},
    ),
}
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def mixture(hf: Any, name: str) -> Any:
    """A tiny random model with two layers of experts, of which each token uses two."""
    kind, options = MIXTURES[name]
    shared = {"vocab_size": 48, "hidden_size": HIDDEN, "num_hidden_layers": 2, "head_dim": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    config = getattr(hf.transformers, f"{kind}Config")(**shared, **heads, **options)
    hf.torch.manual_seed(0)
    model = getattr(hf.transformers, f"{kind}ForCausalLM")(config).eval()
    with hf.torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * hf.torch.randn_like(parameter))
    return model


def tokens(hf: Any) -> Any:
    return hf.torch.tensor(np.random.default_rng(7).integers(0, 48, (2, 12)))


def with_expert_products(hf: Any, base: Any, loaded: Any) -> Any:
    """The base with all products added, those of experts one by one."""
    model = copy.deepcopy(base)
    with hf.torch.no_grad():
        for name, one in loaded.factors.items():
            if one.b.ndim == 2:
                product = one.scale * one.a @ one.b
                model.get_submodule(name).weight.add_(hf.torch.tensor(product.T))
                continue
            for expert, (a, b) in enumerate(zip(one.a, one.b, strict=True)):
                weight = model.get_parameter(name)[expert]
                weight.add_(hf.torch.tensor((one.scale * a @ b).T))
    return model


def stacked_template(loaded: Any) -> dict:
    """A tree with the layers, and in them the experts, stacked as in `nnx.scan` of einsums."""
    flat, layers = {}, 2
    for name, one in loaded.factors.items():
        path = re.sub(r"^model\.|\.\d+", "", name).replace(".", "/")
        for key, leaf in (("lora_a", one.a), ("lora_b", one.b)):
            flat[f"{path}/{key}"] = jax.ShapeDtypeStruct((layers, *leaf.shape), leaf.dtype)
    return nested(flat)


def pairs_of(loaded: Any) -> LoraPairs:
    """The scales and batch axes of `stacked_template`."""
    scales, axes = {}, {}
    for name, one in loaded.factors.items():
        path = re.sub(r"^model\.|\.\d+", "", name).replace(".", "/")
        scales[f"{path}/.*"] = one.scale
        axes[f"{path}/.*"] = LoraAxes(batch=(0, 1) if one.b.ndim == 3 else (0,))
    return LoraPairs(scale=tuple(scales.items()), axes=tuple(axes.items()))


ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"target_parameters": BOTH}),
    "qwen2_moe": ("qwen2_moe", {"target_parameters": BOTH}),
    "qwen3_moe, rsLoRA": ("qwen3_moe", {"target_parameters": BOTH, "use_rslora": True}),
    "patterns": (
        "qwen3_moe",
        {
            "target_parameters": BOTH,
            "rank_pattern": {"experts.down_proj": 2},
            "alpha_pattern": {"gate_up_proj": 9, "q_proj": 1},
        },
    ),
    "gate and up alone": ("qwen3_moe", {"target_parameters": BOTH[:1]}),
    "down alone": ("qwen3_moe", {"target_parameters": ["down_proj"]}),
    "router": (
        "mixtral",
        {
            "target_parameters": ["mlp.gate.weight", *BOTH],
            "rank_pattern": {"mlp.gate.weight": 2},
            "alpha_pattern": {"mlp.gate": 5},  # matches no parameter, so it is without effect
        },
    ),
    # PEFT converts these for transformers 5: one stack instead of a layer for each expert.
    "names of transformers 4": (
        "qwen3_moe",
        {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]},
    ),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_experts_are_exchanged(hf, close, tmp_path, case):
    name, options = ADAPTERS[case]
    base, x = mixture(hf, name), tokens(hf)
    config = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj"], **options}
    theirs = hf.peft.get_peft_model(copy.deepcopy(base), hf.peft.LoraConfig(**config)).eval()
    move(hf, theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = logits_of(hf, theirs, x)
    assert np.abs(expected - logits_of(hf, base, x)).max() > 0.1
    loaded = load_peft(tmp_path / "theirs")
    ours = logits_of(hf, with_expert_products(hf, base, loaded), x)
    close(f"PEFT's experts, {case}, read by us", ours, expected, 1e-4)
    # Written from stacked layers of stacked experts: the same tensors, and PEFT computes the same.
    pairs = pairs_of(loaded)
    tree = load_into(stacked_template(loaded), loaded, family="llama", pairs=pairs)
    save_peft(
        tmp_path / "ours",
        tree,
        family="llama",
        pairs=pairs,
        use_rslora=options.get("use_rslora", False),
    )
    before, after = (load_file(tmp_path / folder / WEIGHTS) for folder in ("theirs", "ours"))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        np.testing.assert_array_equal(after[key], tensor)
    again = hf.peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    close(f"PEFT with our experts, {case}", logits_of(hf, again, x), expected, 1e-5)
    if case == "mixtral":  # what we advise to do for programs that have no adapters of experts
        folder = folder_of(again.merge_and_unload(), tmp_path / "merged")
        merged = hf.transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        close("our experts, merged by PEFT", logits_of(hf, merged, x), expected, 1e-5)


def expert_adapter(**options: Any) -> tuple[dict, LoraPairs]:
    """One layer of two stacks of experts of rank 2."""
    draw = np.random.default_rng(0)
    sizes = {"gate_up_proj": (HIDDEN, 2 * INNER), "down_proj": (INNER, HIDDEN)}
    stacks = {
        name: {
            "lora_a": draw.normal(size=(EXPERTS, fan_in, 2)).astype(np.float32),
            "lora_b": draw.normal(size=(EXPERTS, 2, fan_out)).astype(np.float32),
        }
        for name, (fan_in, fan_out) in sizes.items()
    }
    pairs = LoraPairs(axes=LoraAxes(batch=(0,)), **options)
    return {"layers": {"0": {"mlp": {"experts": stacks}}}}, pairs


def test_experts_are_cast_folded_and_padded(tmp_path):
    adapter, _ = expert_adapter()
    stacks = adapter["layers"]["0"]["mlp"]["experts"]
    stacks["down_proj"] = {
        "lora_a": np.ones((EXPERTS, INNER, 1), np.float32),
        "lora_b": np.ones((EXPERTS, 1, HIDDEN), np.float32),
    }
    _, pairs = expert_adapter(scale=((".*/down_proj/.*", 0.5), (".*", 2.0)))
    given = {"family": "llama", "pairs": pairs, "fold_scales": True, "dtype": "bfloat16"}
    save_peft(tmp_path, adapter, **given)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (2, 2, {})
    loaded = load_peft(tmp_path)
    for name, scale in (("gate_up_proj", 2.0), ("down_proj", 0.5)):
        one = loaded.factors[f"model.layers.0.mlp.experts.{name}"]
        a, b = (x.astype(np.float64) for x in (one.a, one.b))
        expected = scale * stacks[name]["lora_a"] @ stacks[name]["lora_b"]
        error = np.linalg.norm(one.scale * a @ b - expected) / np.linalg.norm(expected)
        assert error < 4e-3, name


def test_experts_that_do_not_fit_are_named(tmp_path):
    adapter, pairs = expert_adapter()
    with pytest.raises(ValueError, match=r"stack of experts.*need an axis of experts.*LoraAxes"):
        one = {"lora_a": np.ones((HIDDEN, 2)), "lora_b": np.ones((2, 12))}
        save_peft(tmp_path, {"layers": {"0": {"mlp": {"experts": {"down_proj": one}}}}}, **LLAMA)
    stacks = adapter["layers"]["0"]["mlp"]["experts"]
    dora = {**stacks["down_proj"], "lora_magnitude": np.ones((EXPERTS, HIDDEN), np.float32)}
    with pytest.raises(ValueError, match="no DoRA for experts"):
        tree = {"layers": {"0": {"mlp": {"experts": {"down_proj": dora}}}}}
        save_peft(tmp_path, tree, pairs=pairs, **LLAMA)
    kernel = {"kernel": np.ones((EXPERTS, INNER, HIDDEN), np.float32)}
    with pytest.raises(ValueError, match="stack of experts, which transformers saves one by one"):
        tree = {"layers": {"0": {"mlp": {"experts": {"down_proj": kernel}}}}}
        save_merged(tmp_path / "merged", tree, **LLAMA)
    for save in (save_gguf, save_mlx):
        base = {"base": {"model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 1}}
        given = LLAMA | (base if save is save_gguf else {})
        with pytest.raises(ValueError, match=r"no adapters of experts.*save_peft and merge them"):
            save(tmp_path / "a.gguf", adapter, pairs=pairs, **given)
    loaded = load_peft(save_peft(tmp_path / "peft", adapter, pairs=pairs, **LLAMA))
    fewer = jax.tree.map(lambda x: x[:2], adapter)
    with pytest.raises(ValueError, match=r"\(experts, in, rank, out\) is \(3, 12, 2, 16\), in .*2"):
        load_into(fewer, loaded, pairs=pairs, **LLAMA)


LLAMA = {"family": "llama"}


def test_files_of_experts_that_are_ambiguous_are_refused(tmp_path):
    adapter, pairs = expert_adapter()
    save_peft(tmp_path, adapter, pairs=pairs, **LLAMA)
    config = json.loads((tmp_path / CONFIG).read_text())
    owner = "model.layers.0.mlp.experts"

    def refused(match: str, **fields: Any) -> None:
        (tmp_path / CONFIG).write_text(json.dumps(config | fields))
        with pytest.raises(ValueError, match=match):
            load_peft(tmp_path)

    refused("has 2 adapters, and target_parameters names down_proj", target_parameters=BOTH[1:])
    refused("names no parameter of it", target_parameters=None)
    # Which of two is the inner one is known only of the names in transformers.
    others = [f"{owner}.one", f"{owner}.two"]
    refused("Which is which depends on the model.*Merge it in PEFT", target_parameters=others)
    refused("rank 5. The two files do not belong", r=5)


def test_experts_with_exchanged_axes_are_refused_and_can_be_merged(hf, tmp_path):
    """A model that stores (experts, in, out) without saying so: PEFT exchanges the axes."""
    torch = hf.torch

    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            draw = lambda *shape: torch.nn.Parameter(torch.randn(*shape))
            self.gate_up_proj = draw(EXPERTS, HIDDEN, 2 * INNER)
            self.down_proj = draw(EXPERTS, INNER, HIDDEN)

        def forward(self, x):
            gate, up = (x @ self.gate_up_proj).chunk(2, -1)
            return (gate * up) @ self.down_proj

    base = torch.nn.Sequential(torch.nn.ModuleDict({"experts": Experts()}))
    base.forward = lambda x: base[0]["experts"](x)
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    model = adapted_by_peft(hf, base, (), target_parameters=targets)
    x = torch.randn(EXPERTS, 5, HIDDEN)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="do not have the layout.*Merge it in PEFT"):
        load_peft(tmp_path)
    wrapped = model.get_base_model()[0]["experts"]
    expected = wrapped(x).detach().numpy()
    merged = model.merge_and_unload()[0]["experts"]
    np.testing.assert_allclose(merged(x).detach().numpy(), expected, rtol=1e-3, atol=1e-2)
    assert type(merged).__name__ == "Experts"


def test_servers_are_told_apart_on_experts(tmp_path):
    adapter, pairs = expert_adapter()
    save_peft(tmp_path, adapter, pairs=pairs, **LLAMA)
    for server, silent in (("vllm", True), ("sglang", False)):
        problems = check_servable(tmp_path, server)
        assert [one.silent for one in problems] == [silent]
        assert "experts" in problems[0].message and "Merge it in PEFT" in problems[0].message
    assert check_servable(tmp_path, "llama.cpp") == []
    # The silent difference of vLLM, by its rules: of models that it does not mark.
    for name, one in load_peft(tmp_path).factors.items():
        expected = (one.scale * one.a @ one.b).swapaxes(1, 2)
        right, wrong = (readers.vllm_experts(tmp_path, marked=x)[name] for x in (True, False))
        np.testing.assert_allclose(right, expected, atol=1e-5)
        assert np.abs(wrong - expected).max() > 0.5


# ------------------------------------------------------------------ trained tokens

IDS = [5, 1, 40]


def llama(hf: Any, *, tied: bool) -> Any:
    model = torch_model(hf, "llama")
    if not tied:
        model.lm_head.weight = hf.torch.nn.Parameter(1.1 * model.lm_head.weight.detach())
        model.config.tie_word_embeddings = False
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("indices", [IDS, {"embed_tokens": IDS}], ids=["list", "object"])
def test_trained_tokens_are_exchanged(hf, close, tmp_path, tied, indices):
    base, x = llama(hf, tied=tied), hf.torch.tensor([[5, 9, 1, 40, 5, 2, 7]])
    theirs = adapted_by_peft(hf, base, ("q_proj",), trainable_token_indices=indices)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = logits_of(hf, theirs, x)
    with pytest.raises(ValueError, match=r"trainable_tokens_delta is relative.*Pass base="):
        load_peft(tmp_path / "theirs")
    loaded = load_peft(tmp_path / "theirs", base=folder_of(base, tmp_path / "base"))
    own = with_products(hf, base, loaded)
    if tied:
        assert own.lm_head.weight is own.model.embed_tokens.weight
    close(f"PEFT's trained tokens, tied {tied}, read by us", logits_of(hf, own, x), expected, 1e-5)
    flat = {
        f"model/layers/{k}/self_attn/q_proj/{key}": leaf
        for k in range(2)
        for key, leaf in (factors(16, 16, 3).items())
    }
    template = nested(flat | {"embed_tokens/embedding": jax.ShapeDtypeStruct((48, 16), np.float32)})
    tree = load_into(template, loaded, **LLAMA)
    given = {"pairs": LoraPairs(scale=2.0), "trainable_tokens": np.array(IDS), **LLAMA}
    save_peft(tmp_path / "ours", tree, **given)
    before, after = (load_file(tmp_path / folder / WEIGHTS) for folder in ("theirs", "ours"))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        np.testing.assert_array_equal(after[key], tensor)
    again = hf.peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    close(f"PEFT with our tokens, tied {tied}", logits_of(hf, again, x), expected, 1e-6)


def test_trained_tokens_of_a_resized_embedding(hf, close, tmp_path):
    """New tokens, the usual reason to train some: PEFT saves the resized embedding too."""
    small = llama(hf, tied=True)
    folder = folder_of(small, tmp_path / "small")
    base = hf.transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    base.resize_token_embeddings(51, mean_resizing=False)
    model = adapted_by_peft(hf, base, ("q_proj",), trainable_token_indices=[48, 49, 50])
    model.save_pretrained(tmp_path / "adapter")
    x = hf.torch.tensor([[48, 9, 49, 50, 2]])
    assert any("lm_head.token_adapter" in key for key in load_file(tmp_path / "adapter" / WEIGHTS))
    loaded = load_peft(tmp_path / "adapter")
    assert loaded.saved.keys() == {"model.embed_tokens.weight"}  # without the head, which is tied
    got = logits_of(hf, with_products(hf, base, loaded), x)
    close("PEFT's new tokens, read by us", got, logits_of(hf, model, x), 1e-5)


@pytest.mark.parametrize(
    ("indices", "match"),
    [
        ([5, 1], "names 2 tokens up to 5"),
        ([5, 1, 48], r"up to 48 and the embedding of the base is \(48, 16\)"),
        ({"lm_head": [5, 1, 40]}, "names 0 tokens"),
        ([5, 1, 1], "must be a list of different token ids"),
        ([5, 1, -1], "must be a list of different token ids"),
        ([5, 1, True], "must be a list of different token ids"),
        ("all", "must be a list of different token ids"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(tmp_path, indices, match):
    adapter = {"embed_tokens": {"embedding": np.zeros((48, 16), np.float32)}}
    adapter |= nested({f"layers/0/mlp/up_proj/{k}": v for k, v in factors(16, 24, 2).items()})
    adapter = random_tree(adapter)
    save_peft(tmp_path, adapter, trainable_tokens=IDS, **LLAMA)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["trainable_token_indices"] == {"model.embed_tokens": IDS}
    (tmp_path / CONFIG).write_text(json.dumps(config | {"trainable_token_indices": indices}))
    with pytest.raises(ValueError, match=match):
        load_peft(tmp_path, base={"model.embed_tokens.weight": np.zeros((48, 16), np.float32)})


@pytest.mark.parametrize(
    ("names", "ids", "match"),
    [
        (("embed_tokens/embedding",), [1, 48], "no rows of model.embed_tokens.weight"),
        (("embed_tokens/embedding",), [1, 1], "must be different token ids"),
        (("embed_tokens/embedding",), [], "must be different token ids"),
        (("embed_tokens/embedding",), np.array([0.5]), "must be different token ids"),
        ((), [1], "needs one embedding in the adapter, got none"),
    ],
)
def test_tokens_that_cannot_be_saved_are_refused(tmp_path, names, ids, match):
    flat = {f"layers/0/mlp/up_proj/{k}": v for k, v in factors(16, 24, 2).items()}
    flat |= {name: jax.ShapeDtypeStruct((48, 16), np.float32) for name in names}
    with pytest.raises(ValueError, match=match):
        save_peft(tmp_path, random_tree(nested(flat)), trainable_tokens=ids, **LLAMA)


# ------------------------------------------------------------------ biases of adapters


def test_biases_of_adapters_become_biases_of_layers(hf, close, tmp_path):
    base = torch_model(hf, "gpt2")
    x = tokens(hf)
    options = {"lora_bias": True, "fan_in_fan_out": True}
    model = adapted_by_peft(hf, base, ("c_attn", "c_fc"), **options)
    model.save_pretrained(tmp_path / "theirs")
    expected = logits_of(hf, model, x)
    with pytest.raises(ValueError, match=r"lora_B.bias is relative.*Pass base="):
        load_peft(tmp_path / "theirs")
    loaded = load_peft(tmp_path / "theirs", base=folder_of(base, tmp_path / "base"))
    assert {name.rpartition(".")[2] for name in loaded.saved} == {"bias"}
    got = logits_of(hf, with_products(hf, base, loaded, "gpt2"), x)
    close("PEFT's lora_bias, read by us", got, expected, 1e-5)
    # Written as trained biases, which PEFT has too.
    flat = {}
    for name, one in loaded.factors.items():
        path = name.replace(".", "/")
        flat |= {f"{path}/lora_a": one.a, f"{path}/lora_b": one.b}
        flat[f"{path}/bias"] = loaded.saved[f"{name}.bias"]
    save_peft(tmp_path / "ours", nested(flat), family="gpt2", pairs=LoraPairs(scale=2.0))
    assert json.loads((tmp_path / "ours" / CONFIG).read_text())["bias"] == "lora_only"
    again = hf.peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    close("PEFT with lora_bias as biases", logits_of(hf, again, x), expected, 1e-5)


def test_a_bias_of_an_adapter_on_a_layer_without_one_is_refused(hf, tmp_path):
    base = torch_model(hf, "llama")
    model = adapted_by_peft(hf, base, lora_bias=True)
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match="the layer has none.*nor could PEFT.*Serve it with PEFT"):
        load_peft(tmp_path / "a", base=folder_of(base, tmp_path / "base"))
    # The advice: PEFT computes it, and does not merge it.
    again = hf.peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a").eval()
    x = tokens(hf)
    np.testing.assert_array_equal(logits_of(hf, again, x), logits_of(hf, model, x))
    with pytest.raises(Exception, match="bias"):
        model.merge_and_unload()


def test_biases_that_do_not_fit_are_refused(tmp_path):
    save_peft(
        tmp_path,
        random_tree(nested({f"h/0/attn/c_attn/{k}": v for k, v in factors(16, 48, 2).items()})),
        family="gpt2",
    )
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"lora_bias": True}))
    tensors, name = load_file(tmp_path / WEIGHTS), "transformer.h.0.attn.c_attn"
    base = {f"{name}.bias": np.zeros(48, np.float32)}

    def refused(match: str, key: str, size: int) -> None:
        bias = {f"base_model.model.{key}.lora_B.bias": np.zeros(size, np.float32)}
        save_file(tensors | bias, tmp_path / WEIGHTS)
        with pytest.raises(ValueError, match=match):
            load_peft(tmp_path, base=base)

    refused(r"has a bias \(47,\), the base has \(48,\)", name, 47)
    refused("lora_B.bias has no factors", "transformer.h.1.attn.c_attn", 48)


# ------------------------------------------------------------------ embeddings of tied heads


def trained_embedding() -> dict:
    flat = {f"layers/0/self_attn/q_proj/{k}": v for k, v in factors(16, 16, 2).items()}
    return random_tree(
        nested(flat | {"embed_tokens/embedding": jax.ShapeDtypeStruct((48, 16), np.float32)})
    )


@pytest.mark.parametrize("given", ["argument", "folder"])
def test_a_head_stays_tied_to_a_trained_embedding(hf, close, tmp_path, given):
    base, x, adapter = llama(hf, tied=True), tokens(hf), trained_embedding()
    options: dict[str, Any] = {"tied_head": True}
    if given == "folder":
        options = {"base_model": str(folder_of(base, tmp_path / "base"))}
    save_peft(tmp_path / "ours", adapter, **options, **LLAMA)
    loaded = load_peft(tmp_path / "ours")
    assert loaded.saved.keys() == {"model.embed_tokens.weight"}
    expected = logits_of(hf, with_products(hf, base, loaded), x)
    peft = hf.peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    close("PEFT with our embedding of a tied head", logits_of(hf, peft, x), expected, 1e-5)
    # PEFT's own file of it is the same.
    peft.save_pretrained(tmp_path / "theirs")
    before, after = (load_file(tmp_path / folder / WEIGHTS) for folder in ("ours", "theirs"))
    assert before.keys() == after.keys()
    assert load_peft(tmp_path / "theirs").saved.keys() == loaded.saved.keys()
    # For contrast: without this, PEFT leaves the head as it was.
    save_peft(tmp_path / "untied", adapter, **LLAMA)
    peft = hf.peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "untied").eval()
    assert np.abs(logits_of(hf, peft, x) - expected).max() > 1


def test_factors_of_a_tied_embedding_are_refused(tmp_path):
    adapter = random_tree({"embed_tokens": factors(48, 16, 2)})
    with pytest.raises(ValueError, match="head of this base is tied to it.*save_merged"):
        save_peft(tmp_path, adapter, tied_head=True, **LLAMA)
    save_peft(tmp_path, adapter, tied_head=False, **LLAMA)
