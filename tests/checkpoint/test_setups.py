"""Intact checkpoints of another setup are refused by the names of what differs, and not moved."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
from optimizers import assert_trees_identical, random_like

from loft_jax import LoraPairs, ScaleByLoftAdamState, loft_adamw, loft_muon
from loft_jax.checkpoint import (
    CheckpointError,
    CheckpointMismatch,
    Checkpoints,
    _record,
    base_reference,
)
from loft_jax.pairs.declared import declare_scale


def adapter_of(rank: int = 2, rows: int = 8, layers: int = 2) -> dict:
    layer = {"lora_a": jnp.ones((rows, rank)), "lora_b": jnp.ones((rank, 5))}
    return {f"layer{k}": dict(layer) for k in range(layers)}


def state_of(adapter: dict, tx: Any = None) -> dict:
    state = (tx or loft_adamw(0.1)).init(adapter)
    return {"adapter": adapter, "opt_state": state, "key": jax.random.key(0)}


def refusal(folder, saved: dict, wanted: dict, bases=(None, None)) -> str:
    """Returns the message of the refusal. The checkpoint is not moved and no older one restored."""
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
    square = lambda width: {"lora_a": jnp.ones((width, 2)), "lora_b": jnp.ones((2, width))}
    text = refusal(tmp_path / "square", state_of(square(6)), state_of(square(8)))
    assert " saved, " not in text.partition("\n")[0]
    layers = lambda n: {"lora_a": jnp.ones((n, 6, 2)), "lora_b": jnp.ones((n, 2, 6))}
    text = refusal(tmp_path / "layers", state_of(layers(3)), state_of(layers(4)))
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
    """The state of `scale_by_loft_adam` before the fields ``active`` and ``options``."""

    count: Any
    turn: Any
    basis: Any
    mu: Any
    nu: Any


def in_old_layout(state: Any) -> Any:
    """Returns a state of `loft_adamw` or `loft_muon` as the layout before this version had it."""
    core, *rest = state
    if isinstance(core, ScaleByLoftAdamState):
        return (OldState(core.count, core.active, core.basis, core.mu, core.nu), *rest)
    factors = {"turn": core.active, "basis": core.basis, "mu": core.mu}
    inner = {"factors": {"inner_state": (factors,)}, "rest": {"inner_state": rest[2]}}
    return {"inner_states": inner}


def save_old_layout(folder: Path, adapter: dict, tx: Any) -> None:
    """Saves step 2 as the layout before this version, with a record of format 1."""
    with Checkpoints(folder) as checkpoints, pytest.MonkeyPatch.context() as patch:
        checkpoints.save(1, **state_of(adapter, tx))
        patch.setattr(_record, "FORMAT", 1)
        old = state_of(adapter, tx) | {"opt_state": in_old_layout(tx.init(adapter))}
        checkpoints.save(2, **old, data={"batch": 2})
    without_options(folder / "2")


def without_options(checkpoint: Path) -> None:
    """Removes the options from a record, as format 1 had none."""
    edit(checkpoint, lambda content: (content.pop("options"), content.update(format=1)))


def edit(checkpoint: Path, change: Callable[[dict], Any]) -> None:
    """Changes a record."""
    file = checkpoint / "meta" / "metadata"
    content = json.loads(file.read_text())["content"]
    change(content)
    text = json.dumps(content, sort_keys=True)
    checksum = hashlib.sha256(text.encode()).hexdigest()
    file.write_text(json.dumps({"content": content, "sha256": checksum}))


@pytest.mark.parametrize("make", [loft_adamw, loft_muon])
def test_the_layout_before_this_version(tmp_path, make, fault):
    adapter, tx = random_like(adapter_of(), 0) | {"head": jnp.ones((5, 3))}, make(0.1)
    save_old_layout(tmp_path, adapter, tx)
    wanted = state_of(random_like(adapter, 1), tx)
    for targets in (wanted, jax.eval_shape(lambda: wanted)):
        with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointMismatch) as error:
            checkpoints.restore(**targets)
        text = str(error.value)
        headline, *lines = text.splitlines()
        assert str(tmp_path / "2") in headline and "saved by loft_jax 0." in headline
        for said in (
            "layout of optimizer states before this version (`turn` where `active` is wanted)",
            "cannot be continued",
            "`restore(adapter=...)`",
            "`init`",
        ):
            assert said in headline
        assert "  opt_state: 0/active: wanted, but not saved" in lines
    # The error ends the search, and nothing is moved. The remedy of the message works.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]
    with Checkpoints(tmp_path) as checkpoints:
        found = checkpoints.restore(adapter=wanted["adapter"], key=wanted["key"])
    assert (found.step, found.opt_state, found.data) == (2, None, {"batch": 2})
    assert_trees_identical(found.adapter, adapter)
    fault("layout before this version", make.__name__, "refused by its name", "optimizer state")


def test_another_rank_in_the_layout_before_this_version(tmp_path):
    """The remedy of the old layout does not apply: the adapter does not fit either."""
    save_old_layout(tmp_path, adapter_of(2), loft_adamw(0.1))
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(CheckpointMismatch, match="rank 2 saved, 1 wanted"),
    ):
        checkpoints.restore(**state_of(adapter_of(1)))


def test_a_parameter_may_be_called_turn(tmp_path):
    adapter = {"turn": {"lora_a": jnp.ones((6, 2)), "lora_b": jnp.ones((2, 5))}, "active": {}}
    text = refusal(tmp_path, state_of(adapter), state_of(adapter_of()))
    assert "before this version" not in text


# Each has the shapes of the calibrated state of rank 1.
OPTIONS = {
    "second_moment='diagonal'": {"second_moment": "diagonal"},
    "second_moment='calibrated', calibrate=False": {"calibrate": False},
    "second_moment='calibrated', scale_gradient=False": {"scale_gradient": False},
}
WRAPPED = {
    "0/options": lambda tx: tx,
    "inner_opt_state/0/options": lambda tx: optax.MultiSteps(tx, 2),
    "1/0/options": lambda tx: optax.chain(optax.clip(1.0), tx),
}


@pytest.mark.parametrize("path", WRAPPED)
@pytest.mark.parametrize("said", OPTIONS)
def test_other_options_of_equal_shapes(tmp_path, said, path, fault):
    adapter = adapter_of(rank=1)
    wrap, default = WRAPPED[path], "second_moment='calibrated'"
    saved = state_of(adapter, wrap(loft_adamw(0.1, **OPTIONS[said])))
    wanted = state_of(adapter, wrap(loft_adamw(0.1)))
    assert jax.tree.leaves(jax.eval_shape(lambda: saved)) == jax.tree.leaves(
        jax.eval_shape(lambda: wanted)
    )
    line = f"opt_state: {path}: {said} saved, {default} wanted"
    assert refusal(tmp_path / "arrays", saved, wanted).splitlines()[1:] == [f"  {line}"]
    abstract = jax.eval_shape(lambda: wanted)
    assert refusal(tmp_path / "abstract", saved, abstract).splitlines()[1:] == [f"  {line}"]
    assert refusal(tmp_path / "reverse", wanted, saved).splitlines()[1:] == [
        f"  opt_state: {path}: {default} saved, {said} wanted"
    ]
    fault("other options", said, "refused by both options", "nothing")


def test_other_options_are_another_state_of_the_same_step(tmp_path):
    adapter = adapter_of(rank=1)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, **state_of(adapter))
        with pytest.raises(CheckpointError, match="was saved already, with other values"):
            checkpoints.save(1, **state_of(adapter, loft_adamw(0.1, calibrate=False)))


def test_options_and_other_shapes_are_both_named(tmp_path):
    adapter = adapter_of()
    factored = state_of(adapter, loft_adamw(0.1, second_moment="factored"))
    text = refusal(tmp_path, factored, state_of(adapter))
    assert "0/options: second_moment='factored' saved, second_moment='calibrated' wanted" in text
    assert "opt_state: 0/nu/layer0/lora_a: shape" in text


@pytest.mark.parametrize("tx", [loft_adamw(0.1), loft_muon(0.1)], ids=["options", "no options"])
def test_options_that_were_not_recorded_are_not_assumed(tmp_path, tx):
    """A record of format 1 fits only a state without options."""
    state = state_of(adapter_of(), tx)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, **state)
    without_options(tmp_path / "1")
    with Checkpoints(tmp_path) as checkpoints:
        if isinstance(state["opt_state"][0], ScaleByLoftAdamState):
            said = "0/options: no options recorded, second_moment='calibrated' wanted"
            with pytest.raises(CheckpointMismatch, match=said):
                checkpoints.restore(**state)
        else:
            assert checkpoints.restore(**state).step == 1


def test_another_scale(tmp_path, fault):
    state = state_of(adapter_of())
    declare_scale("layer0/lora_a", 2.0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, **state)
        assert checkpoints.restore(**state).step == 1
    declare_scale("layer0/lora_a", 32.0)
    said = "another scale(.|\n)*adapter: layer0/lora_a: scale 2 saved, 32 wanted"
    for targets in (state, {"adapter": jax.eval_shape(adapter_of)}):
        with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointMismatch, match=said):
            checkpoints.restore(**targets)
    assert (tmp_path / "1").exists()
    with Checkpoints(tmp_path, pairs=LoraPairs(scale=2.0)) as checkpoints:
        assert checkpoints.restore(**state).step == 1
    fault("another scale", "2 saved, 32 wanted", "refused by both scales", "nothing")


def test_another_scale_of_pairs_that_nothing_declared(tmp_path):
    state = state_of(adapter_of())
    with Checkpoints(tmp_path, pairs=LoraPairs(scale=2.0)) as checkpoints:
        checkpoints.save(1, **state)
    with (
        Checkpoints(tmp_path, pairs=LoraPairs(scale=0.5)) as checkpoints,
        pytest.raises(CheckpointMismatch, match="layer1/lora_a: scale 2 saved, 0.5 wanted"),
    ):
        checkpoints.restore(**state)
    with Checkpoints(tmp_path) as checkpoints:  # nothing to compare
        assert checkpoints.restore(**state).step == 1


def test_scales_that_were_not_recorded_are_not_compared(tmp_path):
    """Checkpoints of earlier versions have no record of them."""
    state = state_of(adapter_of())
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, **state)
    edit(tmp_path / "1", lambda content: content.pop("scales"))
    with Checkpoints(tmp_path, pairs=LoraPairs(scale=2.0)) as checkpoints:
        assert checkpoints.restore(**state).step == 1


def test_a_state_that_is_an_entry_of_the_saved_one(tmp_path):
    """As `(optimizer.opt_state, optimizer.step)` of an nnx optimizer."""
    state = state_of(adapter_of())
    whole = state | {"opt_state": (state["opt_state"], jnp.int32(3))}
    text = refusal(tmp_path / "part", whole, state)
    assert "whose entry '0' is this one: pass the whole tree" in text.splitlines()[0]
    text = refusal(tmp_path / "whole", state, whole)
    assert "only the entry '0' of this opt_state was saved" in text.splitlines()[0]


def test_numbers_of_another_kind(tmp_path):
    saved = state_of(adapter_of()) | {"opt_state": {"count": jnp.float32(1)}}
    wanted = state_of(adapter_of()) | {"opt_state": {"count": jnp.int32(1)}}
    assert "opt_state: count: float32 saved, int32 wanted" in refusal(tmp_path, saved, wanted)


@pytest.mark.parametrize(
    ("saved", "wanted", "said"),
    [
        (jax.random.PRNGKey(0), jax.random.key(0), "no typed key saved, a .* key wanted"),
        (jax.random.key(0, impl="rbg"), jax.random.key(0), "a rbg key saved, a .* key wanted"),
        (None, jax.random.key(0), "wanted, but not saved"),
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


def test_a_base_that_was_not_recorded_is_not_assumed(tmp_path):
    state = state_of(adapter_of())
    assert "saved without base=" in refusal(
        tmp_path, state, state, (None, base_reference("b", BASE))
    )


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
    """`refusal` saves a fitting step 1 first, which must not be restored."""
    refusal(tmp_path, state_of(random_like(adapter_of(3), 0)), state_of(adapter_of()))


def test_ranks_of_stacked_factors_and_of_factors_by_other_names(tmp_path):
    stacked = lambda rank: {"lora_a": jnp.ones((3, 6, rank)), "lora_b": jnp.ones((3, rank, 5))}
    text = refusal(tmp_path / "stacked", state_of(stacked(2)), state_of(stacked(1)))
    assert "rank 2 saved, 1 wanted" in text
    pairs = LoraPairs(rules=((r"down", r"up"),))
    named = lambda rank: {"down": jnp.ones((6, rank)), "up": jnp.ones((rank, 5))}
    state = lambda rank: state_of(named(rank), loft_adamw(0.1, pairs=pairs))
    text = refusal(tmp_path / "named", state(2), state(1))
    assert "rank 2 saved, 1 wanted" in text
    assert "adapter: down: shape (6, 2) saved, (6, 1) wanted" in text
