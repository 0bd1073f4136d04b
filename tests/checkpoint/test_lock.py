"""One run writes to a folder: the lock, its holders alive and dead, and its takeover."""

import gc
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time

import jax.numpy as jnp
import pytest

from loft_jax.checkpoint import CheckpointError, Checkpoints, _folder, _lock

STATE = {"adapter": {"w": jnp.ones(3)}, "opt_state": {"n": jnp.int32(1)}}


@pytest.fixture
def other_process():
    """A process that runs, and that nobody reaps after its death before the test ends."""
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


def held_by(folder, **changes) -> None:
    """Writes the lock of another run."""
    holder = _lock._this_process() | {"since": "2026-01-01T00:00:00+00:00", "token": "other"}
    (folder / _lock.NAME).write_text(json.dumps(holder | changes))


def holder_of(folder) -> str:
    return json.loads((folder / _lock.NAME).read_text())["token"]


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(_lock, "RENEWAL_S", 0.05)
    monkeypatch.setattr(_lock, "PATIENCE_S", 0.3)


def test_a_second_run_is_refused_at_once_and_told_by_whom(tmp_path, other_process, fault):
    pid = other_process.pid
    held_by(tmp_path, process=pid, started=_lock._start_time(pid))
    begin = time.monotonic()
    said = f"in use by process {pid} on {re.escape(socket.gethostname())} since 2026-01-01T00"
    with pytest.raises(CheckpointError, match=said) as error:
        Checkpoints(tmp_path)
    assert time.monotonic() - begin < 5
    assert "read_only=True" in str(error.value) and "take_over=True" in str(error.value)
    with Checkpoints(tmp_path, read_only=True) as reader:
        assert reader.steps() == ()
    assert holder_of(tmp_path) == "other"
    fault("a second run on the folder", "this machine", "refused at once", "nothing")


def test_the_lock_of_a_dead_run_is_taken_over(tmp_path, other_process, fault):
    pid = other_process.pid
    held_by(tmp_path, process=pid, started=_lock._start_time(pid))
    other_process.kill()
    while _lock._start_time(pid) is not None:  # a zombie from then on
        time.sleep(0.01)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.save(1, **STATE)
        assert holder_of(tmp_path) != "other"
    assert not (tmp_path / _lock.NAME).exists()
    fault("the lock of a dead run", "killed, on this machine", "taken over", "nothing")


def test_a_process_number_that_was_given_away_is_no_holder(tmp_path):
    held_by(tmp_path, started="1")
    with Checkpoints(tmp_path):
        assert holder_of(tmp_path) != "other"


@pytest.mark.parametrize("change", [{"host": "elsewhere"}, {"machine": "another boot"}], ids=str)
def test_a_holder_on_another_machine_is_watched(tmp_path, impatient, change, fault):
    held_by(tmp_path, **change)
    stop = threading.Event()

    def renew():
        while not stop.wait(0.05):
            os.utime(tmp_path / _lock.NAME)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(CheckpointError, match=r"in use by process \d+ on"):
            Checkpoints(tmp_path)
    finally:
        stop.set()
        thread.join()
    with Checkpoints(tmp_path):
        assert holder_of(tmp_path) != "other"
    fault("a second run on the folder", "another machine", "refused if it renews its lock", "-")


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_an_unfinished_lock_is_watched(tmp_path, impatient, text):
    (tmp_path / _lock.NAME).write_text(text)
    with Checkpoints(tmp_path):
        assert holder_of(tmp_path)


@pytest.mark.parametrize("broken", ["the lock", "what follows"])
def test_a_lock_that_could_not_be_written_is_not_left(tmp_path, monkeypatch, broken):
    def fails(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if broken == "the lock":
            patch.setattr(_lock.Lock, "_text", fails)
        else:
            patch.setattr(_folder, "clear_unfinished", fails)
        with pytest.raises(CheckpointError, match="No space left"):
            Checkpoints(tmp_path)
    assert not (tmp_path / _lock.NAME).exists()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.save(1, **STATE)


def test_take_over_asks_nobody(tmp_path):
    held_by(tmp_path, process=os.getpid())
    with pytest.raises(CheckpointError, match=f"in use by process {os.getpid()}"):
        Checkpoints(tmp_path)
    with Checkpoints(tmp_path, take_over=True) as checkpoints:
        assert checkpoints.save(1, **STATE)


def test_the_holder_renews_its_lock(tmp_path, impatient):
    with Checkpoints(tmp_path) as checkpoints:
        before = (tmp_path / _lock.NAME).stat().st_mtime_ns
        end = time.monotonic() + 10
        while (tmp_path / _lock.NAME).stat().st_mtime_ns == before:
            assert time.monotonic() < end
            time.sleep(0.01)
        checkpoints.close()
        assert not (tmp_path / _lock.NAME).exists()
        assert checkpoints.save(1, **STATE)  # takes it again


def test_of_many_runs_that_begin_at_once_one_has_the_folder(tmp_path):
    locks, start, got = [_lock.Lock(tmp_path) for _ in range(8)], threading.Barrier(8), []

    def acquire(lock):
        start.wait()
        if lock._create():
            got.append(lock)

    threads = [threading.Thread(target=acquire, args=(lock,)) for lock in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1
    for lock in locks:
        lock.release()  # only the holder's counts
    assert not (tmp_path / _lock.NAME).exists()


def test_a_run_that_was_not_closed_releases_the_folder(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert (tmp_path / _lock.NAME).exists()
    del checkpoints
    gc.collect()
    assert not (tmp_path / _lock.NAME).exists()
    code = f"from loft_jax.checkpoint import Checkpoints; x = Checkpoints({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert not (tmp_path / _lock.NAME).exists()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning", "ignore:os.fork:RuntimeWarning")
def test_a_fork_neither_saves_nor_releases_the_folder(tmp_path):
    """As a program that forks workers."""
    (told, tell), checkpoints = os.pipe(), Checkpoints(tmp_path)
    if os.fork() == 0:
        try:
            with checkpoints:
                checkpoints.save(1, **STATE)
        except BaseException as error:
            os.write(tell, str(error).encode())
        os._exit(0)
    os.wait()
    os.close(tell)
    with open(told) as pipe:
        assert (
            f"was opened in process {os.getpid()}, of which this process is a fork" in pipe.read()
        )
    holder = holder_of(tmp_path)
    assert checkpoints.save(1, **STATE)
    assert checkpoints.steps() == (1,) and holder_of(tmp_path) == holder
    checkpoints.close()


def test_threads_that_share_an_object_save_one_after_the_other(tmp_path):
    refused = []

    def save(step):
        try:
            assert checkpoints.save(step, **STATE)
        except CheckpointError as error:
            refused.append(step)
            assert "is older than the newest checkpoint" in str(error)

    with Checkpoints(tmp_path, keep=9) as checkpoints:
        threads = [threading.Thread(target=save, args=(step,)) for step in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted([*checkpoints.steps(), *refused]) == list(range(8))
    assert len(list(tmp_path.iterdir())) == 8 - len(refused)


def test_a_folder_whose_name_orbax_cannot_take_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is not UTF-8.*Use another folder"):
        Checkpoints(tmp_path / os.fsdecode(b"\xff"))


def test_a_relative_folder_follows_no_change_of_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").mkdir()
    with Checkpoints("run") as checkpoints:
        monkeypatch.chdir("gone")
        (tmp_path / "gone").rmdir()
        checkpoints.save(1, **STATE)
        with pytest.raises(CheckpointError, match="other cannot be found: the working directory"):
            Checkpoints("other")
    assert (tmp_path / "run" / "1").exists()
