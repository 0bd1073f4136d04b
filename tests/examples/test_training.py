"""Schedule, optimizers, and a step that is compiled once for all learning rates and seeds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optimizers import hasty_compiler as hasty_compiler

from common import losses, methods, training
from common.data import text
from common.models import llama_weights as weights
from common.models.llama import Llama, LlamaConfig, lora_rule
from loft_jax.adapters import add_lora, lora_pairs


def adapted_model(folder, seed=0):
    """The tiny model with fresh adapters."""
    model = weights.load(str(folder)).build()
    return add_lora(model, RULE, rngs=nnx.Rngs(seed))


RULE = lora_rule(["q", "down"], rank=2, alpha=2)
WINDOWS = np.random.default_rng(0).integers(0, 256, (6, 9)).astype(np.int32)


def test_the_learning_rate_rises_for_a_tenth_of_the_steps_then_falls_to_zero():
    rates = [training.learning_rate_at(step, 50, 2.0) for step in range(51)]
    np.testing.assert_allclose(rates[:5], [0.4, 0.8, 1.2, 1.6, 2.0])
    np.testing.assert_allclose(np.diff(rates[5:]), -2.0 / 45)
    assert rates[5] == 2.0 and rates[50] == 0


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_short_runs_have_positive_learning_rates(steps):
    assert all(training.learning_rate_at(step, steps, 1.0) > 0 for step in range(steps))


def untied_model(folder):
    """The tiny model with a separate head."""
    pretrained = weights.load(str(folder))
    tensors = dict(pretrained.tensors)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    config = dataclasses.replace(pretrained.config, tie_word_embeddings=False)
    return dataclasses.replace(pretrained, config=config, tensors=tensors).build()


@pytest.mark.parametrize("method", [name for name, m in methods.METHODS.items() if m.for_text])
def test_a_method_lowers_the_loss_and_changes_what_it_trains_alone(model_folder, method):
    model = methods.adapt(untied_model(model_folder), method, RULE, nnx.Rngs(0))
    head = "lm_head" if method == "head" else None
    wrt = methods.trainable(method, head)
    pairs = lora_pairs(methods.adapter_rule(method, RULE))
    trainer = training.Trainer(
        model,
        text.next_token_loss,
        lambda rate: methods.make_optimizer(method, rate, pairs=pairs),
        wrt,
    )
    before = {path: np.array(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model))}
    state = trainer.start(model)
    found = []
    for _ in range(8):  # LoFT updates one factor per step, and one factor starts at zero
        state, loss = trainer.step(state, WINDOWS, methods.default_learning_rate(method, 1e-3))
        found.append(float(loss))
    assert found[-1] < found[0] and int(state.step) == 8
    trained = {path for path, _ in nnx.to_flat_state(nnx.state(model, wrt))}
    kinds = {path[-1] for path in trained}
    assert kinds == {
        "full": {"kernel", "scale", "embedding"},
        "head": {"kernel"},
        "dora": {"lora_a", "lora_b", "lora_magnitude"},
    }.get(method, {"lora_a", "lora_b"})
    for path, leaf in nnx.to_flat_state(nnx.state(trainer.model(state.params))):
        assert np.array_equal(leaf[...], before[path]) == (path not in trained), path


def test_a_new_dora_computes_what_the_pretrained_model_does(model_folder):
    model = weights.load(str(model_folder)).build()
    adapted = methods.adapt(model, "dora", RULE, nnx.Rngs(0))
    np.testing.assert_allclose(adapted(WINDOWS), model(WINDOWS), rtol=1e-5, atol=1e-5)


def test_a_new_head_has_a_learning_rate_of_its_own():
    kernel = np.ones(3, np.float32)
    params = {"layers": {"kernel": kernel}, "classifier": {"kernel": kernel}}
    tx = methods.make_optimizer("full", 1e-2, head="classifier", head_ratio=10.0)
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    np.testing.assert_allclose(updates["layers"]["kernel"], -1e-2, rtol=1e-5)
    np.testing.assert_allclose(updates["classifier"]["kernel"], -1e-1, rtol=1e-5)


def test_one_compilation_serves_every_learning_rate_and_seed(model_folder):
    traces = []

    def optimizer(rate):
        traces.append(rate)
        return methods.make_optimizer("lora", rate)

    trainer = training.Trainer(adapted_model(model_folder), text.next_token_loss, optimizer)
    results = []
    for seed, rate in ((0, 1e-3), (1, 1e-3), (1, 1e-2)):
        state = trainer.start(adapted_model(model_folder, seed))
        for _ in range(2):
            state, _ = trainer.step(state, WINDOWS, rate)
        results.append(float(jax.tree.leaves(state.params)[0].sum()))
    assert len(traces) == 2  # one for the state, one for the step
    assert len(set(results)) == 3


def weighted_loss(model, windows):
    """The loss of the tokens below 100, as a sum and a number for each window."""
    weights = windows[:, 1:] < 100
    found = losses.token_losses(model, windows[:, :-1], windows[:, 1:])
    return (found * weights).sum(axis=-1), weights.sum(axis=-1)


@pytest.mark.parametrize("loss", [text.next_token_loss, weighted_loss])
def test_a_batch_in_parts_makes_the_step_of_the_whole_batch(model_folder, loss, x64):
    model = jax.tree.map(lambda x: x.astype(np.float64), adapted_model(model_folder))
    batch = np.random.default_rng(3).integers(0, 256, (6, 9)).astype(np.int32)

    def after(accumulate):
        # The update is the gradient. The float32 softmax of attention treats each row alone.
        sgd = lambda rate: optax.sgd(rate)
        trainer = training.Trainer(model, loss, sgd, nnx.Param, accumulate=accumulate)
        state, value = trainer.step(trainer.start(model), batch, 1.0)
        return float(value), jax.tree.leaves(state.params)

    value, params = after(1)
    changed = [np.abs(a - b).max() for a, b in zip(params, jax.tree.leaves(model), strict=True)]
    assert max(changed) > 0.01
    for accumulate in (2, 6):
        of_parts, params_of_parts = after(accumulate)
        assert of_parts == pytest.approx(value, rel=1e-12)
        for one, other in zip(params_of_parts, params, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-10)


def test_evaluation_does_not_depend_on_the_batch_size(model_folder):
    model = adapted_model(model_folder)
    trainer = training.Trainer(
        model, text.next_token_loss, lambda rate: methods.make_optimizer("lora", rate)
    )
    params = trainer.start(model).params
    one_by_one = trainer.evaluate(params, WINDOWS, 1)
    assert one_by_one.shape == (6,)
    np.testing.assert_allclose(trainer.evaluate(params, WINDOWS, 4), one_by_one, rtol=1e-5)


def test_a_model_that_is_not_trained_is_evaluated(model_folder):
    model = adapted_model(model_folder)
    find = lambda wrt: training.Trainer(
        model,
        text.next_token_loss,
        lambda rate: methods.METHODS["lora"].optimizer(rate, None),
        wrt,
    ).evaluate(nnx.as_pure(nnx.state(model, wrt)), WINDOWS, 4)
    np.testing.assert_allclose(find(nnx.Nothing()), find(nnx.LoRAParam), rtol=1e-6)


class Ignorant:
    """A model whose logits are zero."""

    def hidden(self, tokens, **_):
        return np.zeros((*tokens.shape, 3), np.float32)

    def head(self, hidden):
        return np.zeros((*hidden.shape[:-1], 7))


def test_a_model_that_knows_nothing_pays_the_entropy_of_the_vocabulary():
    found = text.next_token_loss(Ignorant(), WINDOWS % 7)
    np.testing.assert_allclose(found, np.full(6, np.log(7)), rtol=1e-6)


def test_a_step_on_a_cpu_holds_no_float32_copy_of_16_bit_weights():
    """XLA would move such copies of all layers out of the loop over the layers."""
    shape = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 16}
    rule = lora_rule(("q",), 2, 2)
    model = Llama(LlamaConfig(**shape, **heads), rngs=nnx.Rngs(0), remat=True)
    nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(model)))
    model = add_lora(model, rule, rngs=nnx.Rngs(1))
    trainer = training.Trainer(
        model, text.next_token_loss, lambda rate: methods.METHODS["lora"].optimizer(rate, None)
    )
    state, batch = trainer.start(model), np.zeros((1, 1, 9), np.int32)
    compiled = trainer._step.lower(state, trainer.frozen, batch, np.float32(0)).compile()
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(trainer.frozen))
    assert compiled.memory_analysis().temp_size_in_bytes < weights
