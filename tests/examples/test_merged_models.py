"""Merged models load in transformers and compute what the trained model computes."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from optimizers import hasty_compiler as hasty_compiler

from common import methods
from common.data.chat import TokenizerConfig
from common.models import llama_weights, vit_weights
from common.models.llama import lora_rule
from common.models.llama_config import LayerKind, LlamaConfig, Rope
from common.models.merged import save_image_classifier, save_language_model
from common.models.vit import lora_rule as vit_lora_rule
from tests.examples import record_vit_logits

TOKENS = np.random.default_rng(0).integers(0, 256, (2, 9))
normal = jax.nn.initializers.normal(0.3)


def trained(model, method, rule):
    """The model with adapters that change it."""
    rule = methods.adapter_rule(method, rule)
    model = methods.adapt(model, method, rule, nnx.Rngs(0))
    draw = np.random.default_rng(1)
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
        change = draw.normal(size=leaf.shape) * (0.3 if path[-1] == "lora_b" else 0.1)
        leaf[...] = leaf[...] + change.astype(np.float32)
    return model


def assert_close(ours, expected):
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("method", ["loft", "rslora", "dora", "full"])
def test_a_merged_language_model_computes_what_the_trained_one_does(method, model_folder, tmp_path):
    pretrained = llama_weights.load(str(model_folder))
    plain = pretrained.build()
    model = trained(plain, method, lora_rule(["q", "v", "down"], rank=2, alpha=6))
    expected = model(TOKENS)
    if method != "full":
        assert np.abs(np.asarray(expected) - plain(TOKENS)).max() > 0.05
    save_language_model(tmp_path / "merged", methods.merge(model, method), pretrained)
    assert_close(llama_weights.load(str(tmp_path / "merged")).build()(TOKENS), expected)
    if method in ("dora", "full"):  # what is written does not depend on the method otherwise
        return
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert_close(theirs(torch.tensor(TOKENS)).logits.numpy(), expected)


@pytest.mark.parametrize("case", ["vit", "dinov2 on smaller images"])
def test_a_merged_image_classifier_computes_what_the_trained_one_does(case, tmp_path):
    recorded = record_vit_logits.read_recorded(case)
    folder = record_vit_logits.write_folder(recorded, tmp_path / "base")
    pretrained = vit_weights.load(str(folder))
    model = pretrained.build(12, 2)
    model = trained(model, "loft", vit_lora_rule(["q", "o", "fc2"], rank=2, alpha=4))
    model.classifier.bias[...] = np.array([1.0, -1.0], np.float32)
    images = recorded["images"]
    merged = methods.merge(model, "loft")
    save_image_classifier(tmp_path / "merged", merged, pretrained, 12, ("cat", "dog"))
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["id2label"] == {"0": "cat", "1": "dog"}
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    process = transformers.AutoImageProcessor.from_pretrained(tmp_path / "merged")
    pixels = process(list(images), return_tensors="pt")
    with torch.no_grad():
        logits = theirs.eval()(**pixels).logits.numpy()
    assert_close(logits, np.asarray(model(images)))
    assert theirs.config.id2label == {0: "cat", 1: "dog"}


def test_a_model_from_a_gguf_file_gets_a_configuration_and_its_tokenizer(model_folder, tmp_path):
    read = llama_weights.load(str(model_folder))
    of_tokens = TokenizerConfig("{{ messages[0].content }}", {"eos_token": "th"}, ("th",))
    as_gguf = llama_weights.dataclasses.replace(read, folder=None, tokenizer_config=of_tokens)
    save_language_model(tmp_path / "merged", as_gguf.build(), as_gguf)
    again = llama_weights.load(str(tmp_path / "merged"))
    assert again.config == as_gguf.config
    assert again.tokenizer_config == of_tokens
    assert again.tokenizer.to_str() == as_gguf.tokenizer.to_str()
    np.testing.assert_array_equal(again.build()(TOKENS), as_gguf.build()(TOKENS))
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    text = "the 12 thin thieves"
    assert theirs(text)["input_ids"] == as_gguf.tokenizer.encode(text).ids
    assert theirs.eos_token == "th"
    assert theirs.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi"


def test_a_config_is_read_as_it_was_written():
    config = LlamaConfig(layer_kinds=(LayerKind(Rope(5e5)),), rms_norm_eps=1e-6)
    assert LlamaConfig.from_hf(config.to_hf()) == config
