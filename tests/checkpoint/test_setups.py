"""A whole checkpoint of another setup is refused by the names of what differs, and left alone."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
from optimizers import random_like

from loft_jax import LoraPairs, loft_adamw, loft_muon
from loft_jax.checkpoint import CheckpointMismatch, Checkpoints, base_reference


def adapter_of(rank: int = 2, rows: int = 8, layers: int = 2) -> dict:
    layer = {"lora_a": jnp.ones((rows, rank)), "lora_b": jnp.ones((rank, 5))}
    return {f"layer{k}": dict(layer) for k in range(layers)}


def state_of(adapter: dict, tx: Any = None) -> dict:
    state = (tx or loft_adamw(0.1)).init(adapter)
    return {"adapter": adapter, "opt_state": state, "key": jax.random.key(0)}


def refusal(folder, saved: dict, wanted: dict, bases=(None, None)) -> str:
    """The message with which a checkpoint is refused; it stays where it is, and the only one."""
    with Checkpoints(folder, base=bases[0]) as checkpoints:
        checkpoints.save(1, **state_of(adapter_of()))
        checkpoints.save(2, **saved)
    with (
        Checkpoints(folder, base=bases[1]) as checkpoints,
        pytest.raises(CheckpointMismatch) as error,
    ):
        checkpoints.restore(**wanted)
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]
    text = str(error.value)
    assert str(folder / "2") in text and "another folder" in text
    return text


def test_another_rank(tmp_path, fault):
    text = refusal(tmp_path, state_of(adapter_of(8)), state_of(adapter_of(4)))
    assert "rank 8 saved, 4 wanted" in text
    assert "adapter: layer0/lora_a: shape (8, 8) saved, (8, 4) wanted" in text
    assert "opt_state: 0/basis/layer0/lora_a: shape" in text
    fault("another rank", "8 saved, 4 wanted", "refused: rank 8 saved, 4 wanted", "nothing")


def test_other_sizes_are_not_taken_for_another_rank(tmp_path):
    text = refusal(tmp_path, state_of(adapter_of(rows=6)), state_of(adapter_of()))
    assert "adapter: layer0/lora_a: shape (6, 2) saved, (8, 2) wanted" in text
    assert " saved, " not in text.partition("\n")[0]


@pytest.mark.parametrize(
    ("saved", "wanted", "said"),
    [
        (3, 2, "layer2/lora_a: saved, but not wanted"),
        (2, 3, "layer2/lora_b: wanted, but not saved"),
    ],
)
def test_other_layers(tmp_path, saved, wanted, said, fault):
    text = refusal(
        tmp_path, state_of(adapter_of(layers=saved)), state_of(adapter_of(layers=wanted))
    )
    assert f"adapter: {said}" in text
    fault("other layers", f"{saved} saved, {wanted} wanted", "refused by their paths", "nothing")


def test_another_optimizer(tmp_path, fault):
    adapter = adapter_of()
    text = refusal(tmp_path, state_of(adapter, loft_muon(0.1)), state_of(adapter))
    assert "opt_state: 0/nu/layer0/lora_a: wanted, but not saved" in text
    assert "adapter: " not in text
    text = refusal(tmp_path / "adam", state_of(adapter, optax.adam(0.1)), state_of(adapter))
    assert "opt_state: 0/basis/layer0/lora_a: wanted, but not saved" in text
    fault("another optimizer", "loft_muon, adam", "refused by the fields of its state", "nothing")


class OldState(NamedTuple):
    count: Any
    basis: Any
    momentum: Any
    nu: Any


def test_an_older_layout_of_the_optimizer_state(tmp_path, fault):
    adapter = adapter_of()
    new = loft_adamw(0.1).init(adapter)
    old = (OldState(new[0].count, new[0].basis, new[0].mu, new[0].nu), *new[1:])
    text = refusal(tmp_path, state_of(adapter) | {"opt_state": old}, state_of(adapter))
    assert "opt_state: 0/turn: wanted, but not saved" in text
    assert "opt_state: 0/mu/layer0/lora_a: wanted, but not saved" in text
    assert "opt_state: 0/momentum/layer0/lora_a: saved, but not wanted" in text
    assert "of loft_jax 0." in text
    fault("older layout of the state", "fields renamed", "refused by their names", "nothing")


def test_numbers_of_another_kind(tmp_path):
    saved = state_of(adapter_of()) | {"opt_state": {"count": jnp.float32(1)}}
    wanted = state_of(adapter_of()) | {"opt_state": {"count": jnp.int32(1)}}
    assert "opt_state: count: float32 saved, int32 wanted" in refusal(tmp_path, saved, wanted)


@pytest.mark.parametrize(
    ("saved", "wanted", "said"),
    [
        (jax.random.PRNGKey(0), jax.random.key(0), "no typed key saved, a .* key wanted"),
        (jax.random.key(0, impl="rbg"), jax.random.key(0), "a rbg key saved, a .* key wanted"),
        (None, jax.random.key(0), "nothing of it was saved"),
    ],
)
def test_other_random_keys(tmp_path, saved, wanted, said):
    import re

    state = state_of(adapter_of())
    text = refusal(tmp_path, state | {"key": saved}, state | {"key": wanted})
    assert re.search(f"key.*{said}", text), text


BASE = {"w": {"kernel": jnp.arange(12.0).reshape(3, 4)}, "norm": jnp.ones(4)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda: ("other", BASE), "name: 'base' saved, 'other' wanted"),
        (
            lambda: ("base", BASE | {"norm": BASE["norm"].at[2].set(1 + 2**-23)}),
            "norm: checksum",
        ),
        (lambda: ("base", BASE | {"norm": jnp.ones(4, jnp.bfloat16)}), "norm: dtype float32 saved"),
        (lambda: ("base", BASE | {"norm": jnp.ones(5)}), "norm: shape (4,) saved, (5,) wanted"),
        (lambda: ("base", {"w": BASE["w"]}), "norm: not in this base"),
        (lambda: ("base", BASE | {"bias": jnp.ones(1)}), "bias: not in the saved base"),
    ],
    ids=["name", "one bit of a weight", "dtype", "shape", "fewer", "more"],
)
def test_another_base(tmp_path, change, said, fault, request):
    state = state_of(adapter_of())
    bases = (base_reference("base", BASE), base_reference(*change()))
    text = refusal(tmp_path, state, state, bases)
    assert "another base" in text and said in text and "w/kernel" not in text
    fault("another base", request.node.callspec.id, "refused by name or path", "nothing")


def test_a_base_that_was_not_recorded_is_not_taken_on_trust(tmp_path):
    state = state_of(adapter_of())
    assert "saved without one" in refusal(tmp_path, state, state, (None, base_reference("b", BASE)))


def test_the_same_base_is_accepted_in_any_place_and_none_is_not_compared(tmp_path):
    state = state_of(adapter_of())
    with Checkpoints(tmp_path, base=base_reference("base", BASE)) as checkpoints:
        checkpoints.save(1, **state)
    for base in (base_reference("base", jax.device_get(BASE)), None):
        with Checkpoints(tmp_path, base=base) as checkpoints:
            assert checkpoints.restore(**state).step == 1


def test_a_long_list_is_cut_short(tmp_path):
    text = refusal(tmp_path, state_of(adapter_of(layers=9)), state_of(adapter_of(layers=1)))
    assert len(text.splitlines()) < 16 and "more" in text.splitlines()[-1]


def test_a_mismatch_of_the_newest_is_not_hidden_by_an_older_match(tmp_path):
    """`refusal` saves a fitting step 1 below each: it must not be what is restored."""
    refusal(tmp_path, state_of(random_like(adapter_of(3), 0)), state_of(adapter_of()))


def test_ranks_of_stacked_factors_and_of_factors_by_other_names(tmp_path):
    stacked = lambda rank: {"lora_a": jnp.ones((3, 6, rank)), "lora_b": jnp.ones((3, rank, 5))}
    text = refusal(tmp_path / "stacked", state_of(stacked(2)), state_of(stacked(1)))
    assert "rank 2 saved, 1 wanted" in text
    pairs = LoraPairs(rules=((r"down", r"up"),))
    named = lambda rank: {"down": jnp.ones((6, rank)), "up": jnp.ones((rank, 5))}
    state = lambda rank: state_of(named(rank), loft_adamw(0.1, pairs=pairs))
    text = refusal(tmp_path / "named", state(2), state(1))
    assert "adapter: down: shape (6, 2) saved, (6, 1) wanted" in text
