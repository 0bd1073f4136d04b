"""The language models equal Hugging Face's; new adapters do not change them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from optimizers import hasty_compiler as hasty_compiler

from common.models import llama_weights
from common.models.llama import TARGETS, LlamaConfig, lora_rule
from common.models.llama_weights import build_model, read_config
from loft_jax.adapters import add_lora, load_into, load_peft, lora_pairs, remove_lora, save_peft
from tests.examples import record_llama_logits as hugging_face
from tests.examples.tiny_llama import byte_tokenizer


def assert_same_logits(recorded: dict[str, Any]) -> None:
    """Ours equal the recorded ones up to float32 rounding through two layers."""
    model = build_model(read_config(recorded["config"]), recorded["tensors"])
    logits = model(jnp.asarray(recorded["ids"]))
    scale = np.abs(recorded["logits"]).max()
    np.testing.assert_allclose(logits, recorded["logits"], rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("case", hugging_face.CASES)
def test_logits_are_those_recorded_from_hugging_face(case):
    assert_same_logits(hugging_face.read_recorded(case))


@pytest.mark.parametrize("case", hugging_face.CASES)
def test_logits_are_those_of_hugging_face(case):
    # The packages are large and optional; the recorded logits above are always tested.
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    assert_same_logits(hugging_face.record(case))


FAMILIES = ("mistral", "qwen2 biases", "qwen3", "smollm3", "gemma3", "gpt2")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of PEFT about its use of transformers
@pytest.mark.parametrize("case", FAMILIES)
def test_peft_reads_and_writes_the_adapters_of_each_family(case, tmp_path):
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    recorded, theirs = hugging_face.record(case), hugging_face.make_model(case)
    pretrained = llama_weights.Pretrained(
        case, read_config(recorded["config"]), recorded["tensors"], byte_tokenizer()
    )
    rule = pretrained.lora_rule(["q", "k", "v", "o", "up", "down"], rank=2, alpha=6)
    model = add_lora(pretrained.build(), rule, rngs=nnx.Rngs(0))
    for number, (path, factor) in enumerate(nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))):
        if path[-1] == "lora_b":
            factor[...] = 0.1 * jax.random.normal(jax.random.key(number), factor.shape)
    adapter, pairs = nnx.state(model, nnx.LoRAParam), lora_pairs(rule)
    ids = recorded["ids"]
    logits = model(jnp.asarray(ids))
    assert np.abs(logits - recorded["logits"]).max() > 0.01

    save_peft(tmp_path / "ours", adapter, family=pretrained.family, pairs=pairs)
    with_adapter = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours")
    with torch.no_grad():
        of_peft = with_adapter(torch.from_numpy(ids)).logits.numpy()
    scale = np.abs(of_peft).max()
    np.testing.assert_allclose(logits, of_peft, rtol=0, atol=2e-5 * scale)

    with_adapter.save_pretrained(tmp_path / "theirs")
    zeros = jax.tree.map(jnp.zeros_like, adapter)
    read = load_into(zeros, load_peft(tmp_path / "theirs"), family=pretrained.family, pairs=pairs)
    for one, other in zip(jax.tree.leaves(read), jax.tree.leaves(adapter), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.fixture
def model():
    recorded = hugging_face.read_recorded("tied")
    return build_model(LlamaConfig.from_hf(recorded["config"]), recorded["tensors"])


IDS = jnp.arange(10)[None]


def adapted(model, targets, rank, alpha):
    return add_lora(model, lora_rule(targets, rank, alpha), rngs=nnx.Rngs(0))


def test_new_adapters_leave_the_logits_unchanged(model):
    np.testing.assert_array_equal(adapted(model, TARGETS, rank=2, alpha=4)(IDS), model(IDS))


def test_an_adapter_that_is_not_zero_equals_its_merged_weights(model):
    with_lora = adapted(model, TARGETS, rank=2, alpha=6)
    for path, factor in nnx.to_flat_state(nnx.state(with_lora, nnx.LoRAParam)):
        if path[-1] == "lora_b":
            factor[...] = 0.1 * jax.random.normal(jax.random.key(0), factor.shape)
    assert float(jnp.abs(with_lora(IDS) - model(IDS)).max()) > 0.1
    merged = remove_lora(with_lora, merge=True)
    np.testing.assert_allclose(with_lora(IDS), merged(IDS), rtol=1e-4, atol=1e-5)


def test_each_layer_draws_its_own_adapter(model):
    lora = adapted(model, ["up"], rank=2, alpha=2).layers.mlp.up_proj
    assert lora.lora_a.shape == (2, 16, 2) and lora.lora_b.shape == (2, 2, 24)
    assert not np.array_equal(*lora.lora_a[...])


def test_only_the_adapters_are_lora_parameters(model):
    with_lora = adapted(model, ["q", "down"], rank=2, alpha=2)
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(with_lora, nnx.LoRAParam))]
    assert len(paths) == 2 * 2  # targets, factors
    assert {path[-1] for path in paths} == {"lora_a", "lora_b"}
    assert {path[-2] for path in paths} == {"q_proj", "down_proj"}


@pytest.mark.parametrize(
    ("targets", "rank", "message"),
    [
        (["q", "head"], 2, "unknown target 'head'"),
        (["q", "k"], 17, "layers/self_attn/k_proj: rank 17 is above 16"),
    ],
)
def test_unfit_adapters_are_refused_by_name(model, targets, rank, message):
    with pytest.raises(ValueError, match=message):
        adapted(model, targets, rank=rank, alpha=1)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "gemma2"},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "yarn"}},
        {"model_type": "gemma3_text", "attn_logit_softcapping": 50.0},
        {"model_type": "gemma3_text", "use_bidirectional_attention": True},
        {"model_type": "gpt2", "activation_function": "relu"},
        {"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True},
    ],
)
def test_configs_that_would_be_computed_wrongly_are_refused(change):
    config = hugging_face.read_recorded("tied")["config"]
    with pytest.raises(ValueError, match="not supported"):
        read_config(config | change)
