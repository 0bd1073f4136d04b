"""Packed sequences train as unpacked ones do, and little of a batch is padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from optimizers import hasty_compiler as hasty_compiler

from common import batches
from common.data import packing
from common.data.answers import Tokens
from common.models.llama import Llama, LlamaConfig


def sequences(lengths, seed: int = 0) -> list[Tokens]:
    """Random sequences, in which about half of the predictions are trained."""
    draw = np.random.default_rng(seed)
    return [Tokens(draw.integers(0, 64, n, np.int32), draw.random(n) < 0.5) for n in lengths]


def log_normal(count: int, median: float, spread: float, longest: int, seed: int) -> list[int]:
    """Lengths as those of instruction data are distributed."""
    lengths = np.random.default_rng(seed).lognormal(np.log(median), spread, count)
    return np.clip(lengths.astype(int), 1, longest).tolist()


def exact_attention(q, k, v, *, mask, scale):
    """Attention in the precision of its inputs; JAX's computes its softmax in float32."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.where(mask, jnp.einsum("bqhd,bkhd->bhqk", q, k) * scale, -jnp.inf)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)


def test_packed_loss_and_gradients_are_those_of_unpacked_sequences(monkeypatch):
    monkeypatch.setattr(jax.nn, "dot_product_attention", exact_attention)
    some = sequences([5, 3, 7, 2, 6])
    packed = packing.arrange(some, [[2, 1], [0, 3], [4]], 9)
    apart = packing.arrange(some, [[place] for place in range(5)], 9)
    with jax.enable_x64(True):
        shape = {"vocab_size": 64, "hidden_size": 8, "intermediate_size": 12, "head_dim": 4}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
        model = Llama(LlamaConfig(**shape, **heads), rngs=nnx.Rngs(0))
        model = jax.tree.map(lambda x: x.astype(jnp.float64), model)
        model.embed_tokens.dtype = jnp.float64
        graphdef, params = nnx.split(model, nnx.Param)

        def of_packed(params):
            total, weight = packing.weighted_loss(nnx.merge(graphdef, params), packed)
            return total.sum() / weight.sum()

        def of_unpacked(params):
            # A causal model ignores the padding after a row's only sequence.
            logits = nnx.merge(graphdef, params)(apart["tokens"])
            targets = jax.nn.one_hot(apart["targets"], 64, dtype=jnp.float64)
            losses = -(jax.nn.log_softmax(logits) * targets).sum(-1)
            return (losses * apart["weights"]).sum() / apart["weights"].sum()

        (ours, of_ours), (theirs, of_theirs) = jax.jit(
            lambda params: [jax.value_and_grad(f)(params) for f in (of_packed, of_unpacked)]
        )(params)
    assert ours.dtype == jnp.float64 and apart["weights"].sum() > 5
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    for mine, other in zip(jax.tree.leaves(of_ours), jax.tree.leaves(of_theirs), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("capacity", "lengths"),
    [
        (128, log_normal(2000, 40, 0.6, 128, 0)),
        (512, log_normal(3000, 150, 0.8, 512, 1)),
        (64, [1] * 200),
        (64, log_normal(60, 8, 0.5, 30, 2)),
    ],
    ids=["short", "long", "single", "few"],
)
def test_no_row_is_padded_by_more_than_a_tenth(capacity, lengths, seed):
    rows = packing.pack(lengths, capacity, seed)
    assert sorted(place for row in rows for place in row) == list(range(len(lengths)))
    filled = [sum(lengths[place] for place in row) for row in rows]
    assert max(filled) <= capacity
    assert len(rows) <= 1 + 1.01 * sum(lengths) / capacity  # the least possible, or nearly
    # What does not fill the last rows stays in them, or is filled up with sequences of others.
    repeated = packing.pack(lengths, capacity, seed, repeat=True)
    added = [row[len(alone) :] for row, alone in zip(repeated, rows, strict=True)]
    assert [row[: len(alone)] for row, alone in zip(repeated, rows, strict=True)] == rows
    assert not any(
        more for more, tokens in zip(added, filled, strict=True) if tokens >= 0.9 * capacity
    )
    filled = [sum(lengths[place] for place in row) for row in repeated]
    assert 0.9 * capacity <= min(filled) and max(filled) <= capacity
    assert all(len(set(row)) == len(row) for row in repeated)
    assert packing.pack(lengths, capacity, seed, repeat=True) == repeated


def test_sequences_that_cannot_share_a_row_have_rows_of_their_own():
    rows = packing.pack([6, 6, 6, 10], capacity=10, seed=0)
    assert sorted(map(len, rows)) == [1, 1, 1, 1]
    assert packing.pack([6, 6, 6, 10], capacity=10, seed=0, repeat=True) == rows
    assert packing.pack([], capacity=10, seed=0, repeat=True) == []


def fewest_rows(lengths: list[int], capacity: int) -> int:
    """The fewest rows that hold the sequences, found by trying all subsets of them."""
    # (rows, tokens in the last one) of the best order of a subset, whose bits are its sequences.
    best = {0: (1, 0)}
    for subset in range(1, 1 << len(lengths)):
        found = []
        for place, length in enumerate(lengths):
            if subset >> place & 1:
                rows, used = best[subset & ~(1 << place)]
                fits = used + length <= capacity
                found.append((rows, used + length) if fits else (rows + 1, length))
        best[subset] = min(found)
    return best[(1 << len(lengths)) - 1][0]


@pytest.mark.parametrize("seed", range(5))
def test_rows_with_room_for_two_sequences_are_as_few_as_possible(seed):
    lengths = np.random.default_rng(seed).integers(86, 200, 9).tolist()
    assert len(packing.pack(lengths, 256, seed)) == fewest_rows(lengths, 256)


def test_each_sequence_is_in_a_segment_of_its_own():
    some = sequences([4, 3, 5])
    rows = packing.arrange(some, [[0, 1], [2]], 6)
    assert rows["segments"].tolist() == [[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 0, 0]]
    assert rows["positions"].tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 0]]
    assert rows["tokens"][0, :5].tolist() == [*some[0].ids[:-1], *some[1].ids[:-1]]
    assert rows["targets"][0, :5].tolist() == [*some[0].ids[1:], *some[1].ids[1:]]
    assert rows["weights"][1].tolist() == [*some[2].trained[1:], 0, 0]
    assert packing.padding(rows) == pytest.approx(3 / 12)


def test_every_step_has_the_rows_of_packed_batches():
    """Batches of packed rows depend on the seed and the step alone, so that a run can resume."""
    lengths = log_normal(300, 20, 0.6, 64, 3)
    some = sequences([n + 1 for n in lengths])
    rows = packing.arrange(some, packing.pack(lengths, 64, 0, repeat=True), 64)
    again = packing.arrange(some, packing.pack(lengths, 64, 0, repeat=True), 64)
    steps = range(len(rows["tokens"]) // 4)
    of_steps = [packing.padding(batches.batch_at(rows, 4, 0, step)) for step in steps]
    assert packing.worst_padding(rows, 4, 0) == pytest.approx(max(of_steps))
    for step in (0, 5, 40):
        batch = batches.batch_at(rows, 4, 0, step)
        assert packing.padding(batch) <= 0.1
        np.testing.assert_array_equal(
            batch["tokens"], batches.batch_at(again, 4, 0, step)["tokens"]
        )
