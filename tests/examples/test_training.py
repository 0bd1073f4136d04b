"""Optimizers, dropout, and a step that is compiled once for all learning rates and seeds."""

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
    magnitude = {"lora_magnitude"} if methods.METHODS[method].dora else set()
    assert kinds == {
        "full": {"kernel", "scale", "embedding"},
        "head": {"kernel"},
    }.get(method, {"lora_a", "lora_b"} | magnitude)
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


def test_weight_decay_is_decoupled_and_spares_biases_and_norms():
    params = {
        "layers": {"kernel": np.ones(3, np.float32), "scale": np.ones(3, np.float32)},
        "classifier": {"kernel": np.ones(3, np.float32), "bias": np.ones(3, np.float32)},
    }
    zeros = jax.tree.map(np.zeros_like, params)
    options = {"head": "classifier", "head_ratio": 10.0, "weight_decay": 0.5}
    for max_norm in (1.0, None):
        tx = methods.make_optimizer("full", 1e-2, max_norm=max_norm, **options)
        updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params)
        np.testing.assert_allclose(updates["layers"]["kernel"], -5e-3, rtol=1e-6)
        np.testing.assert_allclose(updates["classifier"]["kernel"], -5e-2, rtol=1e-6)
        assert not updates["layers"]["scale"].any() and not updates["classifier"]["bias"].any()


@pytest.mark.parametrize("method", ["loft", "muon", "altlora", "lora-rite"])
def test_optimizers_of_adapters_decay_them(method):
    eye = np.eye(3, 2, dtype=np.float32)
    params = {"lora_a": eye, "lora_b": eye.T}
    zeros = jax.tree.map(np.zeros_like, params)
    tx = methods.make_optimizer(method, 0.5, weight_decay=0.2)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params)
    moved = [name for name, update in updates.items() if np.any(update)]
    for name in moved:
        np.testing.assert_allclose(updates[name], -0.1 * params[name], rtol=1e-6)
    alternates = method in ("loft", "muon", "altlora")
    assert len(moved) == (1 if alternates else 2)


def test_gradients_are_clipped_at_the_norm_that_is_given():
    params = {"kernel": np.zeros(4, np.float32)}
    gradients = {"kernel": np.full(4, 3.0, np.float32)}  # of norm 6

    def first_moment(max_norm):
        tx = methods.make_optimizer("full", 1e-2, max_norm=max_norm)
        _, state = jax.jit(tx.update)(gradients, tx.init(params), params)
        return optax.tree_utils.tree_get(state, "mu")["kernel"]

    np.testing.assert_allclose(first_moment(None), 0.3, rtol=1e-6)
    np.testing.assert_allclose(first_moment(2.0), 0.1, rtol=1e-6)


@pytest.mark.parametrize("method", ["loft", "no-alternation", "neither", "muon", "lora-rite"])
def test_methods_of_the_weight_are_clipped_alike_however_it_is_factored(method):
    """All scalings of the factors have the first step of the clipped weight."""
    rng = np.random.default_rng(0)
    a, b, gradient = (rng.normal(size=shape) for shape in ((5, 2), (2, 4), (5, 4)))

    def step(size):
        params = {"lora_a": size * a, "lora_b": b / size}
        grads = {"lora_a": gradient @ params["lora_b"].T, "lora_b": params["lora_a"].T @ gradient}
        tx = methods.clip_by_norm(method, 1.0, None)
        clipped, _ = jax.jit(tx.update)(grads, tx.init(params), params)
        return clipped["lora_b"] / grads["lora_b"]

    np.testing.assert_allclose(step(100.0), step(1.0), rtol=1e-5)
    of_b = a @ np.linalg.pinv(a) @ gradient
    both = of_b + gradient @ np.linalg.pinv(b) @ b
    norm = np.linalg.norm(of_b if methods.METHODS[method].alternate else both)
    np.testing.assert_allclose(step(1.0), 1 / norm, rtol=1e-5)


# ---------------------------------------------------------------------------- dropout


@pytest.fixture(scope="module")
def with_dropout(model_folder):
    """Makes trainers of a model with dropout; each compiles anew, as in a new process."""

    def make(method="lora", dropout=0.5, accumulate=1):
        rule = dataclasses.replace(RULE, dropout=dropout, init_b=jax.nn.initializers.ones)
        model = methods.adapt(weights.load(str(model_folder)).build(), method, rule, nnx.Rngs(0))
        sgd = lambda rate: optax.sgd(rate)
        trainer = training.Trainer(model, text.next_token_loss, sgd, accumulate=accumulate)
        return trainer, trainer.start(model)

    return make


def test_dropout_draws_a_mask_for_each_step_and_a_resumed_run_draws_the_same(with_dropout):
    trainer, state = with_dropout()
    found = []
    for _ in range(3):
        state, loss = trainer.step(state, WINDOWS, 0.0)  # the parameters stay
        found.append(float(loss))
    assert len(set(found)) == 3
    anew, start = with_dropout()
    # As from a checkpoint, which has the step.
    resumed = start._replace(step=jnp.int32(2))
    assert float(anew.step(resumed, WINDOWS, 0.0)[1]) == found[2]


def test_dropout_is_off_in_evaluation_and_in_generation(with_dropout):
    (trainer, state), (plain, same) = with_dropout(), with_dropout(dropout=0.0)
    params = jax.tree.map(np.asarray, state.params)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, same.params)
    expected = plain.evaluate(params, WINDOWS, 4)
    np.testing.assert_array_equal(trainer.evaluate(params, WINDOWS, 4), expected)
    logits = [one.model(params)(WINDOWS) for one in (trainer, plain)]
    np.testing.assert_array_equal(*logits)
    assert float(trainer.step(state, WINDOWS, 0.0)[1]) != pytest.approx(expected.mean(), abs=1e-4)


def test_the_parts_of_a_batch_have_masks_of_their_own(with_dropout):
    twice = np.concatenate([WINDOWS[:3]] * 2)
    trainer, state = with_dropout(accumulate=2)
    both = float(trainer.step(state, twice, 0.0)[1])
    trainer, state = with_dropout()
    first = float(trainer.step(state, WINDOWS[:3], 0.0)[1])
    assert both != first
    # The second part has the mask of a step that comes second.
    trainer, state = with_dropout()
    second = float(trainer.step(state._replace(step=jnp.int32(1)), WINDOWS[:3], 0.0)[1])
    assert both == pytest.approx((first + second) / 2, rel=1e-6)


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
