"""The language models equal Hugging Face's; new adapters do not change them."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from optimizers import hasty_compiler as hasty_compiler

from common.models.llama import TARGETS, LlamaConfig, lora_rule
from common.models.llama_weights import build_model, read_config
from loft_jax.adapters import add_lora, remove_lora
from tests.examples import record_llama_logits as hugging_face


def assert_same_logits(recorded: dict[str, Any]) -> None:
    """Ours equal the recorded ones up to float32 rounding through two layers."""
    model = build_model(read_config(recorded["config"]), recorded["tensors"])
    logits = model(jnp.asarray(recorded["ids"]))
    scale = np.abs(recorded["logits"]).max()
    np.testing.assert_allclose(logits, recorded["logits"], rtol=0, atol=1e-5 * scale)


def read_recorded(case: str) -> dict[str, Any]:
    """A case of the recorded file."""
    with np.load(hugging_face.PATH) as file:
        prefix = f"{case}/tensors/"
        return {
            "config": json.loads(str(file[f"{case}/config"])),
            "tensors": {
                n.removeprefix(prefix): file[n] for n in file.files if n.startswith(prefix)
            },
            "ids": file[f"{case}/ids"],
            "logits": file[f"{case}/logits"],
        }


@pytest.mark.parametrize("case", hugging_face.CASES)
def test_logits_are_those_recorded_from_hugging_face(case):
    assert_same_logits(read_recorded(case))


@pytest.mark.parametrize("case", hugging_face.CASES)
def test_logits_are_those_of_hugging_face(case):
    # The packages are large and optional; the recorded logits above are always tested.
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    assert_same_logits(hugging_face.record(case))


@pytest.fixture
def model():
    recorded = read_recorded("tied")
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
    config = read_recorded("tied")["config"]
    with pytest.raises(ValueError, match="not supported"):
        read_config(config | change)
