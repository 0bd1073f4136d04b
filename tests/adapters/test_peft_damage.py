"""Damaged or unsupported files of PEFT are refused by name."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from loft_jax.adapters import load_peft
from loft_jax.adapters._safetensors import read_tensors

RECORDED = Path(__file__).parent / "data" / "peft_llama"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
A0, B0 = f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"
ONE = np.ones((1,), np.float32)


def edit_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))


def edit_tensors(folder: Path, new: Mapping[str, Any]) -> None:
    """Adds or replaces tensors in the file, and removes those that are None."""
    tensors = {**load_file(folder / WEIGHTS), **new}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / WEIGHTS)


def raw(folder: Path, edit: Any) -> None:
    (folder / WEIGHTS).write_bytes(edit((folder / WEIGHTS).read_bytes()))


BAD_FILES: dict[str, tuple[Any, str]] = {
    "no config": (lambda f: (f / CONFIG).unlink(), f"{CONFIG} is missing"),
    "config no JSON": (lambda f: (f / CONFIG).write_text("{"), f"{CONFIG}: not valid JSON"),
    "config no text": (lambda f: (f / CONFIG).write_bytes(b"\xff\x00"), f"{CONFIG}: not valid"),
    "config a list": (lambda f: (f / CONFIG).write_text("[]"), f"{CONFIG}: expected a JSON object"),
    "config deep": (lambda f: (f / CONFIG).write_text("[" * 100_000), f"{CONFIG}: not valid JSON"),
    "config empty": (lambda f: (f / CONFIG).write_text("{}"), "peft_type is None"),
    "other type": (lambda f: edit_config(f, peft_type="LOHA"), "peft_type is 'LOHA'"),
    "rank": (lambda f: edit_config(f, r=3), r"lora_A.weight.*rank 3. The two files"),
    "rank pattern": (lambda f: edit_config(f, rank_pattern={"q_proj": 5}), rf"{A0}.*rank 5"),
    "rank 0": (lambda f: edit_config(f, r=0), "r must be an integer of at least 1"),
    "rank true": (lambda f: edit_config(f, r=True), "r must be an integer"),
    "alpha text": (lambda f: edit_config(f, lora_alpha="8"), "lora_alpha must be a finite"),
    "alpha NaN": (lambda f: edit_config(f, lora_alpha=float("nan")), "lora_alpha must be"),
    "alpha huge": (lambda f: edit_config(f, lora_alpha=10**400), "lora_alpha must be"),
    "alpha 0": (lambda f: edit_config(f, alpha_pattern={"q_proj": 0}), "alpha_pattern must be"),
    "pattern list": (lambda f: edit_config(f, rank_pattern=[1]), "rank_pattern must be an object"),
    "pattern regex": (lambda f: edit_config(f, rank_pattern={"(": 1}), "regular expressions"),
    "rslora": (lambda f: edit_config(f, use_rslora="yes"), "use_rslora must be"),
    "to save": (lambda f: edit_config(f, modules_to_save="head"), "modules_to_save must be a list"),
    "dora": (lambda f: edit_config(f, use_dora=True), "lora_magnitude_vector is missing"),
    "lora_bias": (lambda f: edit_config(f, lora_bias=True), "lora_bias is set"),
    "lora_bias of another type": (lambda f: edit_config(f, lora_bias="yes"), "lora_bias must be"),
    "bias": (lambda f: edit_config(f, bias="all"), "bias is 'all'"),
    "replication": (lambda f: edit_config(f, layer_replication=[[0, 1]]), "layer_replication is"),
    "megatron": (lambda f: edit_config(f, megatron_config={"a": 1}), "megatron_config is set"),
    "parameters": (lambda f: edit_config(f, target_parameters="w"), "target_parameters must be"),
    "tokens": (lambda f: edit_config(f, trainable_token_indices=[1]), "trainable_token_indices"),
    "future": (lambda f: edit_config(f, use_new_method=True), "use_new_method is set"),
    "pissa": (lambda f: edit_config(f, init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"{WEIGHTS} is missing"),
    "pickle": (
        lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"),
        "adapter_model.bin is a pickle.*safe_serialization=True",
    ),
    "truncated": (lambda f: raw(f, lambda b: b[:-1]), f"{WEIGHTS}: not a complete"),
    "longer": (lambda f: raw(f, lambda b: b + b"x"), f"{WEIGHTS}: not a complete"),
    "empty": (lambda f: raw(f, lambda b: b""), f"{WEIGHTS}: not a complete"),
    "text": (lambda f: raw(f, lambda b: b"<html>" * 9), f"{WEIGHTS}: not a complete"),
    "header": (lambda f: raw(f, lambda b: b[:8] + b"[" + b[9:]), f"{WEIGHTS}: not a complete"),
    "pickle renamed": (lambda f: raw(f, lambda b: b"\x80\x04" + b), f"{WEIGHTS}: not a complete"),
    "lost A": (lambda f: edit_tensors(f, {A0: None}), f"{WEIGHTS}: {A0} is missing"),
    "lost B": (lambda f: edit_tensors(f, {B0: None}), f"{WEIGHTS}: {B0} is missing"),
    "wide A": (lambda f: edit_tensors(f, {A0: np.ones((5, 16), np.float32)}), f"{A0}.*rank 4"),
    "flat A": (lambda f: edit_tensors(f, {A0: ONE}), rf"{A0}: lora_A \(1,\)"),
    "cube": (
        lambda f: edit_tensors(f, {A0: ONE.reshape(1, 1, 1), B0: ONE.reshape(1, 1, 1)}),
        rf"{A0}: lora_A \(1, 1, 1\)",
    ),
    "NaN": (
        lambda f: edit_tensors(f, {A0: np.full((4, 16), np.nan, np.float32)}),
        f"{A0} contains a NaN",
    ),
    "integers": (lambda f: edit_tensors(f, {A0: ONE.astype(np.int8)}), f"{A0} has dtype I8"),
    "unknown key": (lambda f: edit_tensors(f, {f"{Q0}.what": ONE}), f"{Q0}.what: neither"),
    "no prefix": (lambda f: edit_tensors(f, {"q.lora_C": ONE}), "q.lora_C: a key of PEFT must"),
    "no prefix, factor": (
        lambda f: edit_tensors(f, {"q.lora_A.weight": ONE}),
        "q.lora_A.weight: a key of PEFT must start",
    ),
    "magnitude": (
        lambda f: edit_tensors(f, {f"{Q0}.lora_magnitude_vector": ONE}),
        "although use_dora in adapter_config.json is False",
    ),
    "B's bias": (lambda f: edit_tensors(f, {f"{Q0}.lora_B.bias": ONE}), "Pass base="),
    "embedding": (
        lambda f: edit_tensors(f, {"base_model.model.model.embed_tokens.lora_embedding_A": ONE}),
        "embed_tokens.lora_B.weight is missing",
    ),
    "embedding saved": (
        lambda f: edit_tensors(f, {"base_model.model.model.embed_tokens.weight": ONE}),
        "save_embedding_layers=False",
    ),
    "no factor": (lambda f: save_file({}, f / WEIGHTS), "the file contains no lora_A and lora_B"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused_by_name(tmp_path, case):
    folder = tmp_path / "adapter"
    shutil.copytree(RECORDED, folder)
    spoil, message = BAD_FILES[case]
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load_peft(folder)
    assert str(folder) in str(caught.value)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="Pass a folder"):
        load_peft(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="Pass a folder"):
        load_peft(RECORDED / WEIGHTS)


# ------------------------------------------------------------------ damage at random


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("damaged")
    shutil.copytree(RECORDED, folder, dirs_exist_ok=True)
    return folder


def assert_refused_or_same(folder: Path) -> None:
    whole = load_peft(RECORDED)
    try:
        peft = load_peft(folder)
    except ValueError as error:
        assert WEIGHTS in str(error)
        return
    assert peft.factors.keys() == whole.factors.keys()
    for name, (a, b, scale, _) in whole.factors.items():
        np.testing.assert_array_equal(peft.factors[name].a, a)
        np.testing.assert_array_equal(peft.factors[name].b, b)
        assert peft.factors[name].scale == scale


WHOLE = (RECORDED / WEIGHTS).read_bytes()
HEADER = 8 + int.from_bytes(WHOLE[:8], "little")
often = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@often
@given(length=st.integers(0, len(WHOLE) - 1))
def test_a_truncated_file_is_refused(damaged, length):
    (damaged / WEIGHTS).write_bytes(WHOLE[:length])
    with pytest.raises(ValueError, match=WEIGHTS):
        load_peft(damaged)


@often
@given(position=st.integers(0, HEADER - 1), garbage=st.binary(min_size=1, max_size=12))
def test_garbage_in_the_header_is_refused_or_harmless(damaged, position, garbage):
    spoilt = bytearray(WHOLE)
    garbage = garbage[: HEADER - position]
    spoilt[position : position + len(garbage)] = garbage
    (damaged / WEIGHTS).write_bytes(spoilt)
    assert_refused_or_same(damaged)


@often
@given(position=st.integers(0, HEADER * 8 - 1))
def test_a_flipped_bit_of_the_header_is_refused_or_harmless(damaged, position):
    spoilt = bytearray(WHOLE)
    spoilt[position // 8] ^= 1 << position % 8
    (damaged / WEIGHTS).write_bytes(spoilt)
    assert_refused_or_same(damaged)


@often
@given(position=st.integers(HEADER, len(WHOLE) - 1), garbage=st.binary(min_size=1, max_size=12))
def test_garbage_among_the_values_changes_values_only(damaged, position, garbage):
    """The format has no checksum, so only a NaN or an infinity is noticed."""
    spoilt = bytearray(WHOLE)
    spoilt[position : position + len(garbage)] = garbage
    (damaged / WEIGHTS).write_bytes(spoilt[: len(WHOLE)])
    try:
        peft = load_peft(damaged)
    except ValueError as error:
        assert re.search("NaN or an infinity", str(error))
    else:
        assert peft.factors.keys() == load_peft(RECORDED).factors.keys()


@often
@given(garbage=st.binary(max_size=200))
def test_random_bytes_as_configuration_are_refused(damaged, garbage):
    (damaged / WEIGHTS).write_bytes(WHOLE)
    try:
        (damaged / CONFIG).write_bytes(garbage)
        with pytest.raises(ValueError, match=CONFIG):
            load_peft(damaged)
    finally:
        shutil.copy(RECORDED / CONFIG, damaged)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
FIELDS = st.sampled_from(sorted(json.loads((RECORDED / CONFIG).read_text())))


@often
@given(fields=st.dictionaries(FIELDS, ANYTHING, min_size=1, max_size=3))
def test_any_value_in_the_configuration_is_refused_or_read(damaged, fields):
    (damaged / WEIGHTS).write_bytes(WHOLE)
    shutil.copy(RECORDED / CONFIG, damaged)
    edit_config(damaged, **fields)
    try:
        peft = load_peft(damaged)
    except ValueError as error:
        assert str(damaged) in str(error)
    else:
        assert peft.factors.keys() == load_peft(RECORDED).factors.keys()
    finally:
        shutil.copy(RECORDED / CONFIG, damaged)


@often
@given(
    pattern=st.dictionaries(st.text("q_projv.*+?()[]{}|\\\\d^$1", max_size=16), st.integers(1, 9))
)
def test_any_pattern_is_refused_or_read(damaged, pattern):
    (damaged / WEIGHTS).write_bytes(WHOLE)
    shutil.copy(RECORDED / CONFIG, damaged)
    edit_config(damaged, alpha_pattern=pattern)
    try:
        peft = load_peft(damaged)
    except ValueError as error:
        assert CONFIG in str(error)
    else:
        assert all(one.scale > 0 for one in peft.factors.values())
    finally:
        shutil.copy(RECORDED / CONFIG, damaged)


def test_a_large_configuration_is_read_without_much_work_or_refused(tmp_path):
    """A megabyte of names, as keys and as modules to save."""
    shutil.copytree(RECORDED, tmp_path, dirs_exist_ok=True)
    names = [f"model.layers.{number}.self_attn.q_proj" for number in range(25_000)]
    edit_config(tmp_path, modules_to_save=names, target_modules=names)
    assert load_peft(tmp_path).factors.keys() == load_peft(RECORDED).factors.keys()
    edit_config(tmp_path, target_parameters=[f"{name}.weight" for name in names])
    assert load_peft(tmp_path).factors.keys() == load_peft(RECORDED).factors.keys()
    edit_config(tmp_path, target_parameters=None)
    edit_config(tmp_path, rank_pattern=dict.fromkeys(names, 4))
    assert (tmp_path / CONFIG).stat().st_size > 2**20
    with pytest.raises(ValueError, match=r"q_proj.lora_A|rank 4"):  # v_proj has rank 2
        load_peft(tmp_path)
    key = ".*" * 30 + "q_proj"
    edit_config(tmp_path, rank_pattern={}, alpha_pattern={key: 4})
    with pytest.raises(ValueError, match="could take too long"):
        load_peft(tmp_path)


def test_loaded_arrays_do_not_depend_on_the_file(tmp_path):
    """The arrays are not views of a file that may change."""
    shutil.copytree(RECORDED, tmp_path, dirs_exist_ok=True)
    tensors = read_tensors(tmp_path / WEIGHTS)
    before = tensors[A0].copy()
    (tmp_path / WEIGHTS).write_bytes(bytes(len(WHOLE)))
    np.testing.assert_array_equal(tensors[A0], before)
