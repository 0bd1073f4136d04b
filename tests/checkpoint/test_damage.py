"""No damage to a file of the newest checkpoint leads to a wrong value."""

import functools
import os
import random
import shutil
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizers import assert_trees_identical, random_like

from loft_jax import loft_adamw
from loft_jax.checkpoint import (
    CheckpointDamaged,
    CheckpointError,
    CheckpointMismatch,
    Checkpoints,
    DamagedCheckpointWarning,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("dropped_io_ends"),
]

PARAMS = {"head": (5, 3), "layer": {"lora_a": (6, 2), "lora_b": (2, 5)}}


@functools.cache
def state_of(step: int) -> dict:
    """Returns the state of a step, unlike that of any other step. Do not modify it."""
    zeros = jax.tree.map(jnp.zeros, PARAMS, is_leaf=lambda x: isinstance(x, tuple))
    adapter = random_like(zeros, step)
    state = random_like(jax.eval_shape(loft_adamw(0.1).init, adapter), step + 100)
    return {"adapter": adapter, "opt_state": state, "key": jax.random.key(step)}


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory) -> Path:
    """A folder with steps 1 and 2."""
    folder = tmp_path_factory.mktemp("two")
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, **state_of(step), data={"batch": step}, metrics={"loss": step})
    return folder


@pytest.fixture
def folder(two_checkpoints, tmp_path) -> Path:
    return Path(shutil.copytree(two_checkpoints, tmp_path / "run"))


def restore_and_check(folder: Path) -> int:
    """Restores, checks that each value is that of its step, and returns the step."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Checkpoints(folder) as checkpoints:
            found = checkpoints.restore(**state_of(0))
    assert found is not None
    expected = state_of(found.step)
    assert_trees_identical(
        (found.adapter, found.opt_state), (expected["adapter"], expected["opt_state"])
    )
    assert (jax.random.key_data(found.key) == jax.random.key_data(expected["key"])).all()
    assert (found.data, found.metrics) == ({"batch": found.step}, {"loss": found.step})
    told = [w for w in caught if w.category is DamagedCheckpointWarning]
    if found.step == 2:
        assert not told and not (folder / "damaged").exists()
    else:
        assert len(told) == 1 and "2 is damaged" in str(told[0].message)
        assert (folder / "damaged" / "2").is_dir() and not (folder / "2").exists()
    return found.step


def damages(content: bytes, draw: random.Random) -> dict[str, bytes | None]:
    """Returns damaged versions of a file: missing, truncated, or with one bit flipped."""
    found: dict[str, bytes | None] = {"missing": None}
    if content:
        found |= {"truncated to half": content[: len(content) // 2], "truncated to 0": b""}
        for position in {0, len(content) - 1, *(draw.randrange(len(content)) for _ in range(1))}:
            flipped = bytearray(content)
            flipped[position] ^= 1 << draw.randrange(8)
            found[f"a bit flipped in byte {position}"] = bytes(flipped)
    return found


def test_every_file_missing_cut_or_flipped(two_checkpoints, tmp_path, fault):
    draw, outcomes = random.Random(0), {}
    files = sorted(p for p in (two_checkpoints / "2").rglob("*") if p.is_file())
    assert len(files) > 10
    folder = Path(shutil.copytree(two_checkpoints, tmp_path / "run"))
    for number, file in enumerate(files):
        name = file.relative_to(two_checkpoints)
        for kind, content in damages(file.read_bytes(), draw).items():
            # A new path for each case: TensorStore caches what it has read at a path.
            folder = folder.rename(tmp_path / f"{number} {kind}")
            original = (folder / name).read_bytes()
            if content is None:
                (folder / name).unlink()
            else:
                (folder / name).write_bytes(content)
            try:
                step = restore_and_check(folder)
            except Exception as error:
                raise AssertionError(f"{name}: {kind}") from error
            group = "with a bit flipped" if "flipped" in kind else kind
            outcomes.setdefault(group, {1: 0, 2: 0})[step] += 1
            if step == 1:
                (folder / "damaged" / "2").rename(folder / "2")
                (folder / "damaged").rmdir()
            (folder / name).write_bytes(original)
    assert restore_and_check(folder) == 2
    for kind, counts in outcomes.items():
        fault(
            f"file {kind}",
            f"{sum(counts.values())} cases in all {len(files)} files",
            f"{counts[1]} moved away, older one restored; {counts[2]} harmless",
            "at most one save",
        )
    assert all(counts[1] for counts in outcomes.values())


@pytest.mark.parametrize("item", ["adapter", "opt_state", "key"])
def test_a_flipped_bit_in_a_value_is_found_though_the_file_is_well_formed(folder, tmp_path, item):
    """Arrays of another run under the record of this one. Only the digests detect it."""
    other = dict(state_of(2))
    leaves, treedef = jax.tree.flatten(other[item])
    if item == "key":
        leaves[0] = jax.random.key(3)
    else:
        bits = jax.lax.bitcast_convert_type(leaves[-1], jnp.uint32)
        bits = bits.reshape(-1).at[0].set(bits.reshape(-1)[0] ^ 1).reshape(bits.shape)
        leaves[-1] = jax.lax.bitcast_convert_type(bits, leaves[-1].dtype)
    other[item] = jax.tree.unflatten(treedef, leaves)
    with Checkpoints(tmp_path / "other") as checkpoints:
        checkpoints.save(2, **other)
    shutil.rmtree(folder / "2" / item)
    shutil.copytree(tmp_path / "other" / "2" / item, folder / "2" / item)
    with Checkpoints(folder) as checkpoints, pytest.warns(DamagedCheckpointWarning, match=item):
        found = checkpoints.restore(**state_of(0))
    assert found is not None and found.step == 1


def test_the_adapter_alone_is_restored_though_the_optimizer_state_is_damaged(folder):
    for file in (folder / "2" / "opt_state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with Checkpoints(folder) as checkpoints:
        found = checkpoints.restore(adapter=state_of(0)["adapter"])
    assert found is not None and (found.step, found.opt_state, found.key) == (2, None, None)
    assert_trees_identical(found.adapter, state_of(2)["adapter"])


def test_all_damaged_is_an_error_that_lists_each(folder):
    for step in (1, 2):
        (folder / str(step) / "meta" / "metadata").write_text('{"content": {}}')
    with (
        Checkpoints(folder) as checkpoints,
        pytest.warns(DamagedCheckpointWarning),
        pytest.raises(CheckpointDamaged) as error,
    ):
        checkpoints.restore(**state_of(0))
    assert all(text in str(error.value) for text in (str(folder), "step 2: ", "step 1: ", "record"))
    assert sorted(path.name for path in (folder / "damaged").iterdir()) == ["1", "2"]
    with Checkpoints(folder) as checkpoints:  # a second start raises as well
        with pytest.raises(CheckpointDamaged, match="damaged/1: moved there earlier"):
            checkpoints.restore(**state_of(0))
        assert checkpoints.save(1, **state_of(1))
        assert checkpoints.restore(**state_of(0)).step == 1


def test_what_was_set_aside_before_is_kept(folder):
    (folder / "damaged" / "2").mkdir(parents=True)
    (folder / "2" / "meta" / "metadata").unlink()
    with Checkpoints(folder) as checkpoints, pytest.warns(DamagedCheckpointWarning, match="2-1"):
        checkpoints.restore(**state_of(0))
    assert sorted(path.name for path in (folder / "damaged").iterdir()) == ["2", "2-1"]


def test_a_reader_moves_nothing_and_saves_nothing(folder):
    (folder / "2" / "meta" / "metadata").unlink()
    before = sorted(folder.rglob("*"))
    with Checkpoints(folder, read_only=True) as checkpoints:
        with pytest.warns(DamagedCheckpointWarning):
            assert checkpoints.restore(**state_of(0)).step == 1
        with pytest.raises(CheckpointError, match="read_only"):
            checkpoints.save(3, **state_of(3))
    assert sorted(folder.rglob("*")) == before


def test_a_folder_of_something_else_is_not_taken_for_damage(tmp_path):
    (tmp_path / "5" / "model").mkdir(parents=True)
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(CheckpointMismatch, match="not written by loft_jax.*model"),
    ):
        checkpoints.restore(**state_of(0))
    assert (tmp_path / "5" / "model").is_dir()


def test_a_later_format_is_refused_and_not_moved(folder, monkeypatch):
    from loft_jax.checkpoint import _record

    with monkeypatch.context() as patch, Checkpoints(folder) as checkpoints:
        patch.setattr(_record, "FORMAT", _record.FORMAT + 1)
        checkpoints.save(3, **state_of(3))
    with Checkpoints(folder) as checkpoints, pytest.raises(CheckpointMismatch, match="update loft"):
        checkpoints.restore(**state_of(0))
    assert (folder / "3").is_dir()


@pytest.mark.parametrize("name", ["meta/metadata", "adapter/_METADATA"])
def test_what_cannot_be_read_now_is_neither_moved_nor_passed_over(folder, monkeypatch, name, fault):
    """Simulates a lost mount or a failing disk. File permissions do not apply to root."""
    opened = Path.open
    file = folder / "2" / name

    def failing(self, *args, **kwargs):
        if self == file:
            raise OSError(5, "Input/output error", str(self))
        return opened(self, *args, **kwargs)

    if name == "adapter/_METADATA":
        file.write_text("unreadable")
    monkeypatch.setattr(Path, "open", failing)
    with (
        Checkpoints(folder) as checkpoints,
        pytest.raises(CheckpointError, match="(?s)2 cannot be read.*Input/output error") as error,
    ):
        checkpoints.restore(**state_of(0))
    assert type(error.value) is CheckpointError
    assert (folder / "2").is_dir() and not (folder / "damaged").exists()
    fault("input/output error", f"at {name}", "error; nothing moved", "nothing")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user without permissions")
def test_files_of_another_user_are_not_taken_for_damage(folder):
    for path in [folder, *folder.parents][:4]:
        path.chmod(0o755)
    for path in (folder / "2" / "adapter").rglob("*"):
        path.chmod(0o600 if path.is_file() else 0o755)
    # First as root, so that all modules are imported: the other user cannot read them either.
    script = f"""
        import os
        import jax.numpy as jnp
        from loft_jax.checkpoint import Checkpoints, CheckpointError
        zeros = {{"layer": {{"lora_a": jnp.zeros((6, 2)), "lora_b": jnp.zeros((2, 5))}},
                 "head": jnp.zeros((5, 3))}}
        read = lambda: Checkpoints({str(folder)!r}, read_only=True).restore(adapter=zeros)
        assert read().step == 2
        os.setuid(65534)
        try:
            read()
        except CheckpointError as error:
            print(type(error).__name__, error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("CheckpointError") and "ermission" in done.stdout


def test_a_checkpoint_deleted_meanwhile_is_no_damage(folder, monkeypatch):
    """Its run, in another process, saved a newer one and deletes this one."""
    from loft_jax.checkpoint import _reading

    parse = _reading.parse

    def deleting(text, step):
        if step == 2:
            shutil.rmtree(folder / "2")
        return parse(text, step)

    monkeypatch.setattr(_reading, "parse", deleting)
    with Checkpoints(folder, read_only=True) as checkpoints:
        assert checkpoints.restore(**state_of(0)).step == 1


@pytest.mark.parametrize("step", [None, 2])
def test_where_all_that_was_listed_is_deleted_it_is_looked_again(folder, monkeypatch, step):
    """A reader of a running training must not mistake the race for an empty folder."""
    from loft_jax.checkpoint import _reading

    read, times = _reading.read, []

    def vanishing(*args):
        times.append(args[1])
        if len(times) <= vanish:
            raise _reading.Vanished
        return read(*args)

    monkeypatch.setattr(_reading, "read", vanishing)
    with Checkpoints(folder, read_only=True) as checkpoints:
        vanish = 3
        assert checkpoints.restore(**state_of(0), step=step).step in (1, 2)
        vanish = 1000
        with pytest.raises(CheckpointError, match="faster than they are read"):
            checkpoints.restore(**state_of(0), step=step)
    assert (folder / "1").is_dir() and (folder / "2").is_dir()


def test_targets_that_do_not_divide_are_no_damage(folder):
    """Resuming with a wrong sharding must not move the checkpoints away."""
    mesh = jax.make_mesh((4,), ("x",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split), state_of(0)["adapter"]
    )
    with (
        Checkpoints(folder) as checkpoints,
        pytest.raises(CheckpointMismatch, match="(?s)cannot be sharded like the targets.*lora_a"),
    ):
        checkpoints.restore(adapter=wanted)
    assert (folder / "2").is_dir() and not (folder / "damaged").exists()


def test_a_device_that_cannot_take_the_arrays_is_no_damage(folder, monkeypatch):
    """If placing the arrays on devices fails, the files are read on the host and found intact."""
    from loft_jax.checkpoint import _reading

    restore = _reading._read

    def failing(where, saved, wanted):
        if any(leaf is not None for leaf in wanted.values()):
            raise TypeError("no such device")
        return restore(where, saved, wanted)

    monkeypatch.setattr(_reading, "_read", failing)
    with (
        Checkpoints(folder) as checkpoints,
        pytest.raises(CheckpointError, match="(?s)cannot be read.*no such device"),
    ):
        checkpoints.restore(**state_of(0))
    assert (folder / "2").is_dir() and not (folder / "damaged").exists()


def test_numbers_of_numpy_and_python_are_checked_too(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, adapter={"x": np.float64(0.1), "n": 3}, opt_state=optax.EmptyState())
        found = checkpoints.restore(adapter={"x": np.float64(0), "n": 0})
    assert found.adapter == {"x": 0.1, "n": 3} and type(found.adapter["n"]) is int
