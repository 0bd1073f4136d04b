"""The loop's parts: schedule, optimizers, and a step compiled once for every rate and seed."""

import jax
import numpy as np
import pytest
import training
import weights
from flax import nnx
from llama import lora_rule

from loft_jax.adapters import add_lora, lora_pairs


def adapted_model(folder, seed=0):
    """The tiny model with fresh adapters."""
    model = weights.load(str(folder)).build()
    return add_lora(model, RULE, rngs=nnx.Rngs(seed))


RULE = lora_rule(["q", "down"], rank=2, alpha=2)
WINDOWS = np.random.default_rng(0).integers(0, 256, (6, 9)).astype(np.int32)


def test_the_rate_rises_for_a_tenth_of_the_steps_then_falls_to_zero():
    rates = [training.learning_rate_at(step, 50, 2.0) for step in range(51)]
    np.testing.assert_allclose(rates[:5], [0.4, 0.8, 1.2, 1.6, 2.0])
    np.testing.assert_allclose(np.diff(rates[5:]), -2.0 / 45)
    assert rates[5] == 2.0 and rates[50] == 0


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_short_runs_have_positive_rates(steps):
    assert all(training.learning_rate_at(step, steps, 1.0) > 0 for step in range(steps))


@pytest.mark.parametrize("method", training.METHODS)
def test_training_changes_what_the_method_trains_and_nothing_else(model_folder, method):
    model = weights.load(str(model_folder)).build()
    if method != "full":
        model = adapted_model(model_folder)
    wrt = training.trainable(method)
    trainer = training.Trainer(
        model,
        training.next_token_loss,
        lambda rate: training.make_optimizer(method, rate, pairs=lora_pairs(RULE)),
        wrt,
    )
    before = {path: np.array(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model))}
    state = trainer.start(model)
    losses = []
    for _ in range(8):  # LoFT moves one factor a step, and one of them starts at zero
        state, loss = trainer.step(state, WINDOWS, 1e-2)
        losses.append(float(loss))
    assert losses[-1] < losses[0] and int(state.step) == 8
    trained = {path for path, _ in nnx.to_flat_state(nnx.state(model, wrt))}
    for path, leaf in nnx.to_flat_state(nnx.state(trainer.model(state.params))):
        assert np.array_equal(leaf[...], before[path]) == (path not in trained), path


def test_one_compilation_serves_every_rate_and_seed(model_folder):
    traces = []

    def optimizer(rate):
        traces.append(rate)
        return training.make_optimizer("lora", rate)

    trainer = training.Trainer(adapted_model(model_folder), training.next_token_loss, optimizer)
    results = []
    for seed, rate in ((0, 1e-3), (1, 1e-3), (1, 1e-2)):
        state = trainer.start(adapted_model(model_folder, seed))
        for _ in range(2):
            state, _ = trainer.step(state, WINDOWS, rate)
        results.append(float(jax.tree.leaves(state.params)[0].sum()))
    assert len(traces) == 2  # one for the state, one for the step
    assert len(set(results)) == 3


def test_evaluation_does_not_depend_on_the_batch_size(model_folder):
    model = adapted_model(model_folder)
    trainer = training.Trainer(
        model, training.next_token_loss, lambda rate: training.make_optimizer("lora", rate)
    )
    params = trainer.start(model).params
    one_by_one = trainer.evaluate(params, WINDOWS, 1)
    assert one_by_one.shape == (6,)
    np.testing.assert_allclose(trainer.evaluate(params, WINDOWS, 4), one_by_one, rtol=1e-5)


def test_a_model_that_knows_nothing_pays_the_entropy_of_the_vocabulary():
    losses = training.next_token_loss(lambda ids: np.zeros((*ids.shape, 7)), WINDOWS % 7)
    np.testing.assert_allclose(losses, np.full(6, np.log(7)), rtol=1e-6)
