"""A save counts if the files hold what was to be saved."""

import jax.numpy as jnp
import numpy as np
import pytest
from optimizers import assert_trees_identical

from loft_jax.checkpoint import CheckpointError, Checkpoints, _reading, _storage

TREE = {str(k): np.full((k, 2), k, np.float32) for k in range(9)}  # one is empty
STATE = {"adapter": TREE, "opt_state": {"mu": jnp.ones((3, 2), jnp.bfloat16), "n": jnp.int32(1)}}


def other_value(write, folder, arrays, meta):
    write(folder, {**arrays, "adapter": {**arrays["adapter"], "3": TREE["3"] + 1}}, meta)


def other_shape(write, folder, arrays, meta):
    write(folder, {**arrays, "adapter": {**arrays["adapter"], "3": TREE["3"].T}}, meta)


def lost_array(write, folder, arrays, meta):
    write(folder, {**arrays, "adapter": {k: x for k, x in TREE.items() if k not in "03"}}, meta)


def half_of_orbax_own_file(write, folder, arrays, meta):
    write(folder, arrays, meta)
    file = folder / "adapter" / "_METADATA"  # without it, Orbax reads what it is asked for
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def half_file(write, folder, arrays, meta):
    write(folder, arrays, meta)
    largest = max((folder / "adapter").rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


def inject(patch, fault):
    """Lets saves write in the background with a fault."""
    begin = _storage.begin
    write = lambda folder, arrays, meta: begin(folder, arrays)(meta)
    patch.setattr(_storage, "begin", lambda *args: lambda meta: fault(write, *args, meta))


@pytest.mark.parametrize(
    "fault", [other_value, other_shape, lost_array, half_of_orbax_own_file, half_file]
)
@pytest.mark.parametrize("batch", [1, 2**28], ids=["in parts", "at once"])
def test_a_save_whose_files_are_not_what_was_to_be_saved_fails(tmp_path, monkeypatch, fault, batch):
    monkeypatch.setattr(_reading, "_BATCH_BYTES", batch)
    with Checkpoints(tmp_path) as checkpoints:
        with monkeypatch.context() as patch:
            inject(patch, fault)
            checkpoints.save(1, **STATE)
            with pytest.raises(CheckpointError, match="step 1 could not be saved"):
                checkpoints.wait()
        assert checkpoints.save(1, **STATE)
        assert checkpoints.steps() == (1,)


@pytest.mark.parametrize("batch", [1, 100, 2**28])
def test_trees_are_read_back_in_parts(tmp_path, monkeypatch, batch):
    """As those of more than 256 MB are."""
    monkeypatch.setattr(_reading, "_BATCH_BYTES", batch)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, **STATE)
    with Checkpoints(tmp_path) as checkpoints:
        found = checkpoints.restore(**STATE)
    assert_trees_identical((found.adapter, found.opt_state), (TREE, STATE["opt_state"]))


@pytest.mark.parametrize("batch", [1, 2**28])
def test_where_arrays_are_stored_otherwise_orbax_reads_them_back(tmp_path, monkeypatch, batch):
    """As a later version may store them."""
    monkeypatch.setattr(_reading, "_BATCH_BYTES", batch)

    def elsewhere(folder, paths):
        raise ValueError("NOT_FOUND")

    monkeypatch.setattr(_storage, "read_back", elsewhere)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.save(1, **STATE)
        assert checkpoints.steps() == (1,)
        with monkeypatch.context() as patch:
            inject(patch, other_value)
            checkpoints.save(2, **STATE)
            with pytest.raises(CheckpointError, match="other values when it is read back"):
                checkpoints.wait()


def test_all_arrays_are_read_past_orbax(tmp_path):
    """Where Orbax reads them instead, a save takes longer, and nothing tells."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, **STATE)
    found = _storage.read_back(tmp_path / "1" / "adapter", [k for k in TREE if k != "0"])
    assert_trees_identical(found | {"0": TREE["0"]}, TREE)
    found = _storage.read_back(tmp_path / "1" / "opt_state", ["mu", "n"])
    assert_trees_identical(found, {k: np.asarray(x) for k, x in STATE["opt_state"].items()})
