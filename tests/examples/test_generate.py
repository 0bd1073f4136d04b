"""Generation with a cache makes the tokens that the whole model predicts."""

import jax
import numpy as np
import pytest
from flax import nnx
from optimizers import hasty_compiler as hasty_compiler

from common.models import generate, llama_weights
from common.models.gpt2 import GPT2, GPT2Config
from common.models.llama import Llama
from common.models.llama_config import LayerKind, LlamaConfig, Rope


@pytest.fixture(scope="module")
def model(model_folder):
    return llama_weights.read_folder(model_folder).build()


def greedy(model, prompt: list[int], length: int) -> list[int]:
    """The most likely continuation, by the whole model for each token."""
    ids = list(prompt)
    for _ in range(length):
        padded = np.array([ids + [0] * (24 - len(ids))])
        ids.append(int(jax.jit(model)(padded)[0, len(ids) - 1].argmax()))
    return ids[len(prompt) :]


PROMPTS = [[5, 6, 7], [1], [9, 8, 7, 6, 5, 4, 3], [100, 200]]


def test_greedy_generation_is_that_of_the_whole_model(model):
    expected = [greedy(model, prompt, 8) for prompt in PROMPTS]
    for batch_size in (1, 3, 16):
        found = generate.complete(model, PROMPTS, length=8, batch_size=batch_size)
        assert found == expected
    stop = expected[0][3]
    found = generate.complete(model, PROMPTS, length=8, stop=[stop, 999])
    assert found == [ids[: ids.index(stop)] if stop in ids else ids for ids in expected]


SMALL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
GEMMA = LlamaConfig(
    **SMALL,
    num_hidden_layers=2,
    num_key_value_heads=2,
    head_dim=4,
    layer_kinds=(LayerKind(Rope(1e4), window=3), LayerKind(None)),
    sandwich_norm=True,
    qk_norm=True,
)
GPT = GPT2Config(**SMALL, num_hidden_layers=2, max_position_embeddings=64)


@pytest.mark.parametrize(("kind", "config"), [(Llama, GEMMA), (GPT2, GPT)], ids=["gemma", "gpt2"])
def test_other_families_generate_what_the_whole_model_predicts(kind, config):
    model = kind(config, rngs=nnx.Rngs(0))
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3]]
    expected = [greedy(model, prompt, 8) for prompt in prompts]
    assert generate.complete(model, prompts, length=8, batch_size=2) == expected


def test_drawn_tokens_have_the_models_probabilities(model):
    prompts = [[5, 6, 7]] * 2000
    draw = lambda **options: np.concatenate(
        generate.complete(model, prompts, length=1, batch_size=2000, **options)
    )
    logits = np.asarray(model(np.array(prompts[:1]))[0, -1], np.float64) / 2
    expected = np.exp(logits - logits.max())
    expected /= expected.sum()
    found = np.bincount(draw(temperature=2.0), minlength=256) / 2000
    assert np.abs(found - expected).max() < 5 * np.sqrt(expected.max() / 2000)
    # The fewest tokens whose probabilities add up to 0.6.
    order = np.argsort(-expected)
    kept = order[: np.searchsorted(np.cumsum(expected[order]), 0.6) + 1]
    drawn = draw(temperature=2.0, top_p=0.6, seed=1)
    assert set(drawn) <= set(kept.tolist()) and len(set(drawn)) > len(kept) // 2


def test_a_prompt_needs_a_token(model):
    with pytest.raises(ValueError, match="bos token"):
        generate.complete(model, [[1], []], length=1)


def test_text_is_continued(model, model_folder):
    tokenizer = llama_weights.read_folder(model_folder).tokenizer
    one, other, again = (
        generate.generate(model, tokenizer, "the th", length=5, seed=seed) for seed in (0, 1, 0)
    )
    assert one.startswith("the th") and one == again != other
