"""The PeftTrainer of google-tunix with `loft_adamw` in place of `optax.adamw`.

The model is tunix's LLaMA, tiny and of random weights, with adapters put into it by qwix. The
trainer is used as it comes: its loss, its checkpoints, its gradient accumulation, its log of the
learning rate, its mesh.
"""

import functools
import re
import shutil
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from optimizers import hasty_compiler as hasty_compiler

from loft_jax import LoraPairs, clip_by_projected_global_norm, loft_adamw
from loft_jax.adapters import LoraRule, lora_pairs, qwix_provider
from loft_jax.pairs.find import find_pairs

# Importing tunix turns this off for the whole process; the other tests keep Flax's own default.
ALWAYS_SHARD = flax.config.flax_always_shard_variable
pytest.importorskip("tunix", reason="google-tunix is not installed: pip install google-tunix")
qwix = pytest.importorskip("qwix", reason="qwix is not installed: it comes with google-tunix")
from tunix.models.llama3 import model as llama3  # noqa: E402  # may be absent
from tunix.sft import utils  # noqa: E402  # may be absent
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput  # noqa: E402  # may be absent

flax.config.update("flax_always_shard_variable", ALWAYS_SHARD)

pytestmark = [
    # They use names that Flax and JAX have since deprecated (`.value`, `iter_modules`,
    # `VariableState`, `pxla.thread_resources`), which this package cannot change.
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:(tunix|qwix)\."),
    # The same, where Flax and Optax name themselves as the place: nnx.Param(..., sharding=...) and
    # optax.global_norm in tunix.
    pytest.mark.filterwarnings("ignore:'sharding' is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:optax.global_norm is deprecated:DeprecationWarning"),
]

RANK, ALPHA = 4, 10.0  # not a power of two, by which floating point scales without rounding
PAIRS = LoraPairs(scale=ALPHA / RANK)
STEPS = 30
STOP = 13  # odd, so that the other factor is active first in the resumed run
TOKENS = np.random.default_rng(1).integers(0, 32, size=(8, 12))
LORA = nnx.LoRAParam


@pytest.fixture(autouse=True, scope="module")
def flax_as_tunix_sets_it():
    flax.config.update("flax_always_shard_variable", False)
    yield
    flax.config.update("flax_always_shard_variable", ALWAYS_SHARD)


@functools.cache
def base_llama() -> llama3.Llama3:
    config = llama3.ModelConfig(
        num_layers=2,
        vocab_size=32,
        embed_dim=16,
        hidden_dim=24,
        num_heads=4,
        head_dim=4,
        num_kv_heads=2,
        rope_theta=10_000,
        norm_eps=1e-5,
    )
    model = llama3.Llama3(config, rngs=nnx.Rngs(0))
    # tunix initializes the MLP with zeros, so its adapters would get no gradient.
    rng = np.random.default_rng(0)
    draw = lambda x: jnp.asarray(rng.normal(size=x.shape) / np.sqrt(x.shape[0]), x.dtype)
    weights = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda x: draw(x) if x.ndim > 1 else x, weights))
    return model


@functools.cache
def _adapted_llama(alpha: float, seed: int) -> llama3.Llama3:
    provider = qwix.LoraProvider(module_path=".*_proj", rank=RANK, alpha=alpha)
    example = model_input(half_batches(1)[0]) | {"cache": None}
    del example["input_mask"]
    base = nnx.clone(base_llama())
    return qwix.apply_lora_to_model(base, provider, rngs=nnx.Rngs(seed), **example)


def adapted_llama(alpha: float = ALPHA, seed: int = 1) -> llama3.Llama3:
    """The base, always the same, with new adapters on all seven projections of each layer."""
    return nnx.clone(_adapted_llama(alpha, seed))


def other_llama() -> llama3.Llama3:
    """The same base with other adapters than a run began with, to be restored into."""
    model = adapted_llama(seed=7)
    # Committed to its device, as Orbax restores the rest: else tunix's step is compiled twice.
    nnx.update(model, jax.device_put(nnx.state(model), jax.devices()[0]))
    return model


def half_batches(count: int) -> list[TrainingInput]:
    halves = [TrainingInput(x, np.ones(x.shape, bool)) for x in np.split(TOKENS, 2)]
    return [halves[k % 2] for k in range(count)]


def model_input(batch: TrainingInput) -> dict[str, Any]:
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,
        "positions": utils.build_positions_from_mask(batch.input_mask),
        "attention_mask": utils.make_causal_attn_mask(batch.input_mask),
    }


def make_trainer(
    model: nnx.Module,
    optimizer: optax.GradientTransformation,
    max_steps: int = STEPS,
    directory: Path | None = None,
    accumulate: int | None = None,
) -> PeftTrainer:
    config = TrainingConfig(
        eval_every_n_steps=STEPS,
        max_steps=max_steps,
        gradient_accumulation_steps=accumulate,
        checkpoint_root_directory=str(directory) if directory else None,
        # The last step is always written.
        checkpointing_options=ocp.CheckpointManagerOptions(save_interval_steps=1000),
    )
    return PeftTrainer(model, optimizer, config).with_gen_model_input_fn(model_input)


def losses_of(trainer: PeftTrainer, batches: list[TrainingInput] | None = None) -> np.ndarray:
    """Trains to the end; returns the loss of each step, as the trainer logged it."""
    trainer.train(batches or half_batches(STEPS))
    return trainer.metrics_logger.get_metric_history("", "loss", "train")


def everything_in(trainer: PeftTrainer) -> dict[str, Any]:
    """Adapters, base weights and optimizer state, copied."""
    states = nnx.state(trainer.model), nnx.state(trainer.optimizer)
    leaves = jax.tree_util.tree_leaves_with_path(tuple(map(nnx.to_pure_dict, states)))
    return {jax.tree_util.keystr(path): np.array(leaf) for path, leaf in leaves}


def assert_identical(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert got.keys() == expected.keys()
    differing = [path for path in got if not np.array_equal(got[path], expected[path])]
    assert not differing


@pytest.fixture(scope="module")
def uninterrupted() -> tuple[PeftTrainer, np.ndarray]:
    trainer = make_trainer(adapted_llama(), loft_adamw(1e-2, pairs=PAIRS))
    return trainer, losses_of(trainer)


def test_adapters_merge_into_the_same_model(assert_close):
    model, merged = adapted_llama(), nnx.clone(base_llama())
    adapters = nnx.state(model, LORA)
    rng = np.random.default_rng(2)
    nnx.update(
        model, jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype) / 4, adapters)
    )
    tree = find_pairs(nnx.to_pure_dict(nnx.state(model, LORA)), PAIRS)
    weights = dict(nnx.to_flat_state(nnx.state(merged, nnx.Param)))
    assert len(tree.pairs) == 2 * 7 and len(tree.leaves) == 2 * len(tree.pairs)
    for pair in tree.pairs:
        name = tree.paths[pair.a].removesuffix("_lora_a").split("/")
        weight = weights[tuple(int(key) if key.isdigit() else key for key in name)]
        a = pair.layout_a.matricize(tree.leaves[pair.a])
        b = pair.layout_b.matricize(tree.leaves[pair.b])
        weight[...] += pair.scale * (a @ b.mT).reshape(weight.shape)
    arguments = model_input(half_batches(1)[0])
    mask = arguments.pop("input_mask")
    run = nnx.jit(lambda model: model(cache=None, **arguments)[0])
    logits, expected, bare = run(model), run(merged), run(base_llama())
    assert mask.all() and jnp.abs(logits - bare).max() > 0.1
    assert_close(logits, expected, tolerance=1e-4)


def test_the_loss_falls_and_only_the_adapters_are_trained(uninterrupted):
    trainer, losses = uninterrupted
    assert len(losses) == STEPS and trainer.train_steps == STEPS
    assert losses[-2:].mean() < 0.6 * losses[:2].mean()
    before, after = adapted_llama(), trainer.model
    for kind, moves in ((LORA, True), (nnx.Not(LORA), False)):
        pairs_of_leaves = zip(
            jax.tree.leaves(nnx.state(before, kind)),
            jax.tree.leaves(nnx.state(after, kind)),
            strict=True,
        )
        moved = [not np.array_equal(old, new) for old, new in pairs_of_leaves]
        assert moved and set(moved) == {moves}


def test_the_example_in_the_readme_trains():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (block,) = re.findall(r"```py\n(.*?)```", readme, flags=re.DOTALL)
    config = TrainingConfig(eval_every_n_steps=100, max_steps=6)
    names = globals() | {"model": nnx.clone(base_llama()), "config": config}
    names |= {"batches": half_batches(6), "LoraRule": LoraRule}
    names |= {"lora_pairs": lora_pairs, "qwix_provider": qwix_provider}
    exec(block, names)
    losses = names["trainer"].metrics_logger.get_metric_history("", "loss", "train")
    assert len(losses) == 6 and losses[-1] < losses[0]


def test_training_does_not_depend_on_alpha_if_the_scale_is_specified(uninterrupted, assert_close):
    # alpha = rank is scale 1, the default of LoraPairs.
    steps = 12
    losses = uninterrupted[1][:steps]
    plain = losses_of(make_trainer(adapted_llama(alpha=RANK), loft_adamw(1e-2), steps))
    assert_close(losses, plain, tolerance=1e-3)
    forgotten = losses_of(make_trainer(adapted_llama(), loft_adamw(1e-2), steps))
    assert np.abs(forgotten - plain).max() > 1e-2


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> tuple[PeftTrainer, np.ndarray, Path]:
    """A run that ended early, and the folder that tunix wrote its checkpoint to."""
    directory = tmp_path_factory.mktemp("stopped")
    trainer = make_trainer(adapted_llama(), loft_adamw(1e-2, pairs=PAIRS), STOP, directory)
    return trainer, losses_of(trainer), directory


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(uninterrupted, stopped, tmp_path):
    (whole, losses), (first, losses_before, directory) = uninterrupted, stopped
    np.testing.assert_array_equal(losses_before, losses[:STOP])
    checkpoint = shutil.copytree(directory, tmp_path / "checkpoint")
    resumed = make_trainer(other_llama(), loft_adamw(1e-2, pairs=PAIRS), STEPS, checkpoint)
    assert resumed.train_steps == STOP
    assert_identical(everything_in(resumed), everything_in(first))
    np.testing.assert_array_equal(losses_of(resumed), losses[STOP:])
    assert_identical(everything_in(resumed), everything_in(whole))


def test_a_resumed_run_depends_on_the_saved_optimizer_state(uninterrupted, stopped, tmp_path):
    # So the test above would fail if tunix did not restore the optimizer state.
    (_, losses), (_, _, directory) = uninterrupted, stopped
    checkpoint = shutil.copytree(directory, tmp_path / "checkpoint")
    shutil.rmtree(checkpoint / str(STOP) / "optimizer_state")
    resumed = make_trainer(other_llama(), loft_adamw(1e-2, pairs=PAIRS), STEPS, checkpoint)
    got = losses_of(resumed)
    assert got[0] == losses[STOP]  # the adapters are those of the checkpoint
    assert np.abs(got - losses[STOP:]).max() > 1e-3


def test_accumulated_gradients_equal_the_whole_batch_and_resume(tmp_path, assert_close):
    optimizer = loft_adamw(1e-2, pairs=PAIRS)
    whole_batch = TrainingInput(TOKENS, np.ones(TOKENS.shape, bool))
    whole = make_trainer(adapted_llama(), optimizer, 6)
    expected = losses_of(whole, [whole_batch] * 6)
    first = make_trainer(adapted_llama(), optimizer, 3, tmp_path, accumulate=2)
    before = losses_of(first, half_batches(12))
    resumed = make_trainer(other_llama(), optimizer, 6, tmp_path, accumulate=2)
    assert_identical(everything_in(resumed), everything_in(first))
    after = losses_of(resumed, half_batches(12))
    assert_close(np.concatenate([before, after]), expected, tolerance=1e-3)
    # Steps of LoFT, not halves of a batch.
    assert resumed.optimizer.opt_state.inner_opt_state[0].count[...] == 6


def test_the_trainer_logs_the_learning_rate_of_a_chain():
    schedule = optax.linear_schedule(1e-2, 0.0, 4)
    optimizer = optax.chain(
        clip_by_projected_global_norm(1.0, pairs=PAIRS),
        optax.inject_hyperparams(loft_adamw)(learning_rate=schedule, pairs=PAIRS),
    )
    trainer = make_trainer(adapted_llama(), optimizer, 4)
    losses_of(trainer)
    logged = trainer.metrics_logger.get_metric_history("", "learning_rate", "train")
    # tunix logs a step during the next one, and reads the learning rate of that one.
    np.testing.assert_allclose(logged, [schedule(k) for k in (1, 2, 3, 3)], rtol=1e-6)


# tunix finds only a mesh set by this statement, not by jax.set_mesh.
@pytest.mark.filterwarnings("ignore:`with mesh:DeprecationWarning")
def test_a_run_on_a_mesh_differs_only_by_rounding_and_resumes(
    uninterrupted, tmp_path, assert_close
):
    _, losses = uninterrupted
    optimizer = loft_adamw(1e-2, pairs=PAIRS)
    with jax.make_mesh((2, 2), ("fsdp", "tp"), (jax.sharding.AxisType.Auto,) * 2) as mesh:

        def sharded_llama(**options: Any) -> llama3.Llama3:
            model = adapted_llama(**options)
            state = nnx.state(model)
            nnx.update(model, jax.device_put(state, nnx.get_named_sharding(state, mesh)))
            return model

        trainer = make_trainer(sharded_llama(), optimizer, 3, tmp_path)
        before = losses_of(trainer)
        resumed = make_trainer(sharded_llama(seed=7), optimizer, 6, tmp_path)
        assert_identical(everything_in(resumed), everything_in(trainer))
        after = losses_of(resumed)
    assert_close(np.concatenate([before, after]), losses[:6], tolerance=1e-3)
    # Each field of the optimizer state is sharded like its factor; the rank axis is not sharded.
    adapters = dict(nnx.to_flat_state(nnx.state(resumed.model, LORA)))
    fields = dict(nnx.to_flat_state(nnx.state(resumed.optimizer)))
    factors = {path: leaf for path, leaf in fields.items() if path[3:] in adapters}
    assert len(factors) == 3 * len(adapters)
    for path, leaf in factors.items():
        assert leaf[...].sharding.spec == adapters[path[3:]][...].sharding.spec
        assert not leaf[...].sharding.is_fully_replicated
