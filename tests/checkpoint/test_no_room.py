"""A failed save raises an error that names the folder, and leaves earlier checkpoints intact."""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from optimizers import assert_trees_identical

from loft_jax.checkpoint import CheckpointError, Checkpoints

pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("dropped_io_ends"),
]
every_mode = pytest.mark.parametrize("asynchronous", [True, False], ids=["async", "sync"])


def state_of(step: int, size: int = 100) -> dict:
    """Returns values that do not compress."""
    draw = np.random.default_rng(step).integers(0, 2**31, size)
    return {"adapter": {"w": jnp.asarray(draw, jnp.int32)}, "opt_state": {"n": jnp.int32(step)}}


def restore_and_check(folder: Path, step: int, size: int = 100) -> None:
    with Checkpoints(folder, read_only=True) as checkpoints:
        found = checkpoints.restore(**state_of(0, size))
    assert found is not None and found.step == step
    assert_trees_identical(found.adapter, state_of(step, size)["adapter"])


@contextlib.contextmanager
def full_disk(tmp_path: Path):
    """A file system of 2 MB."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root can mount a small file system; the limit on files runs everywhere")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@contextlib.contextmanager
def short_files(tmp_path: Path):
    """Limits files to 1 MB: larger writes fail as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        yield tmp_path
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


@every_mode
@pytest.mark.parametrize("limit", [full_disk, short_files])
def test_a_save_without_room_is_an_error_and_the_next_with_room_succeeds(
    tmp_path, limit, asynchronous, fault
):
    with limit(tmp_path) as place:
        folder = place / "run"
        with Checkpoints(folder, asynchronous=asynchronous) as checkpoints:
            assert checkpoints.save(1, **state_of(1))
            with pytest.raises(CheckpointError, match="step 2 could not be saved") as error:
                checkpoints.save(2, **state_of(2, 2_000_000))
                checkpoints.wait()
            assert str(folder) in str(error.value) and "space" in str(error.value)
            assert checkpoints.steps() == (1,)
            restore_and_check(folder, 1)
            assert checkpoints.save(3, **state_of(3))
            checkpoints.wait()
            assert sorted(path.name for path in folder.iterdir()) == ["1", "3", "writer.lock"]
        restore_and_check(folder, 3)
    fault(
        "no room",
        {"full_disk": "tmpfs of 2 MB", "short_files": "RLIMIT_FSIZE of 1 MB"}[limit.__name__]
        + f", {'a' if asynchronous else ''}synchronous",
        "error; earlier ones intact; saves once there is space",
        "that save",
    )


@pytest.mark.parametrize("told_by", ["save", "steps", "close"])
def test_an_asynchronous_failure_is_told_at_the_latest_by_the_next_call(tmp_path, told_by):
    with short_files(tmp_path):
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(1, **state_of(1))
        checkpoints.save(2, **state_of(2, 2_000_000))
        with pytest.raises(CheckpointError, match="step 2 could not be saved"):
            if told_by == "save":
                checkpoints.save(3, **state_of(3))
            else:
                getattr(checkpoints, told_by)()
        checkpoints.close()
    restore_and_check(tmp_path, 1)


def test_what_a_failed_save_still_writes_does_not_touch_the_next(tmp_path):
    """Threads of Orbax may go on after the first failure. The parts would mix in one folder."""
    with Checkpoints(tmp_path) as checkpoints:
        with short_files(tmp_path):
            checkpoints.save(2, **state_of(2, 2_000_000))
            abandoned = checkpoints._saving._unfinished
            with pytest.raises(CheckpointError, match="step 2 could not be saved"):
                checkpoints.wait()
        checkpoints.save(2, **state_of(2))
        (abandoned / "adapter").mkdir(parents=True, exist_ok=True)
        (abandoned / "adapter" / "manifest.ocdbt").write_text("late")
        checkpoints.wait()
    restore_and_check(tmp_path, 2)
    with Checkpoints(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


def test_close_does_not_hide_the_error_that_ends_a_run(tmp_path):
    with (
        short_files(tmp_path),
        pytest.raises(KeyError) as error,
        Checkpoints(tmp_path) as checkpoints,
    ):
        checkpoints.save(2, **state_of(2, 2_000_000))
        raise KeyError("of the run")
    assert "step 2 could not be saved" in "".join(error.value.__notes__)


@every_mode
def test_a_folder_that_vanishes_is_an_error_and_is_made_again(tmp_path, asynchronous, fault):
    folder, before = tmp_path / "run", set(threading.enumerate())
    with Checkpoints(folder, asynchronous=asynchronous) as checkpoints:
        checkpoints.save(1, **state_of(1))
        checkpoints.wait()
        shutil.rmtree(folder)
        folder.write_text("a file")
        with pytest.raises(CheckpointError, match=str(folder)):
            checkpoints.save(2, **state_of(2))
            checkpoints.wait()
        folder.unlink()
        assert checkpoints.save(3, **state_of(3))
        checkpoints.wait()
    restore_and_check(folder, 3)
    # A thread that still waits for the folder would keep the program from exiting.
    waiting = [t for t in set(threading.enumerate()) - before if not t.daemon]
    for thread in waiting:
        thread.join(5)  # those of executors end a little later
    assert not [thread for thread in waiting if thread.is_alive()]
    fault(
        "folder vanished",
        f"a file in its place, {'a' if asynchronous else ''}synchronous",
        "error; saves once it can be created",
        "what was in it",
    )


@pytest.mark.parametrize("where", ["file", "below a file", "/proc/loft_jax"])
def test_a_folder_that_cannot_be_is_an_error_at_once(tmp_path, where, fault):
    (tmp_path / "file").write_text("")
    folder = {"file": tmp_path / "file", "below a file": tmp_path / "file" / "run"}.get(
        where, where
    )
    with pytest.raises(
        CheckpointError, match="(?s)Cannot write checkpoints.*Use a writable folder"
    ) as error:
        Checkpoints(folder)
    assert str(folder) in str(error.value)
    fault("folder cannot be written", where, "error at the start", "nothing")


def test_a_folder_without_permission_is_an_error_at_once(tmp_path, monkeypatch):
    tmp_path.chmod(0o555)
    if os.geteuid() == 0:  # permissions do not apply to root
        monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(CheckpointError, match="no permission"):
        Checkpoints(tmp_path)


def test_a_reader_needs_no_folder(tmp_path):
    with Checkpoints(tmp_path / "none", read_only=True) as checkpoints:
        assert checkpoints.restore(**state_of(0)) is None
        assert checkpoints.steps() == ()
    assert not (tmp_path / "none").exists()


def test_what_killed_saves_left_is_cleared_away(tmp_path, monkeypatch):
    """At once: in the background, it could delete what another run saves by then."""
    rmtree = shutil.rmtree

    def slow_rmtree(*args, **options):
        time.sleep(0.2)
        rmtree(*args, **options)

    monkeypatch.setattr(shutil, "rmtree", slow_rmtree)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, **state_of(1))
    left = tmp_path / "9.orbax-checkpoint-tmp"
    left.mkdir()
    (left / "part").write_bytes(b"half")
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == (1,)
    assert left.exists()
    with Checkpoints(tmp_path) as checkpoints:
        assert not left.exists()
        checkpoints.save(2, **state_of(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]
