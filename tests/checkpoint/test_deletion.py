"""Deleting older checkpoints: what fails is told as that, and readers notice nothing."""

import os
import shutil
import threading
import warnings

import jax.numpy as jnp
import pytest

from loft_jax.checkpoint import (
    CheckpointError,
    Checkpoints,
    DamagedCheckpointWarning,
    UndeletedCheckpointWarning,
    _processes,
    _reading,
    _record,
)


def state_of(step: int) -> dict:
    return {"adapter": {"w": jnp.full((2, 3), step)}, "opt_state": {"count": jnp.int32(step)}}


@pytest.mark.parametrize("call", ["rename", "unlink"])
def test_a_failed_deletion_is_told_as_itself_and_tried_again(tmp_path, monkeypatch, call, fault):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, **state_of(1))
        checkpoints.wait()
        original = getattr(os, call)

        def failing(path, *args, **options):
            if ".deleting-" in f"{path} {args}" or call == "unlink":
                raise PermissionError(1, "Operation not permitted")
            return original(path, *args, **options)

        with monkeypatch.context() as patch:
            checkpoints.save(2, **state_of(2))
            checkpoints._saving.result()
            patch.setattr(os, call, failing)
            said = pytest.warns(UndeletedCheckpointWarning, match="(?s)1.*Operation not permitted")
            with said as caught:
                checkpoints.wait()
        assert not any("could not be saved" in str(w.message) for w in caught)
        assert 2 in checkpoints.steps()
        checkpoints.save(3, **state_of(3))
        assert checkpoints.steps() == (3,)
    assert [path.name for path in tmp_path.iterdir()] == ["3"]
    fault("a deletion fails", f"os.{call}", "warning; the save counts; tried again", "nothing")


@pytest.mark.parametrize("left", [["_CHECKPOINT_METADATA"], ["key"], ["commit_success.txt"], []])
def test_a_part_that_a_deletion_left_is_no_other_setup(tmp_path, left):
    """As versions before left it when they were killed in a deletion. Now it has another name."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, **state_of(1))
    (tmp_path / "2").mkdir()
    for name in left:
        (tmp_path / "2" / name).mkdir()
    with (
        Checkpoints(tmp_path, read_only=True) as reader,
        pytest.warns(DamagedCheckpointWarning, match="2 is damaged"),
    ):
        assert reader.restore(**state_of(0)).step == 1


def test_a_killed_deletion_leaves_no_step(tmp_path, monkeypatch):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, **state_of(1))
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", lambda *_, **__: os._exit)  # does nothing
            checkpoints.save(2, **state_of(2))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UndeletedCheckpointWarning)
                checkpoints.wait()
        (left,) = tmp_path.glob("1.deleting-*")
        with Checkpoints(tmp_path, read_only=True) as reader:
            assert reader.steps() == (2,)
    with Checkpoints(tmp_path):
        assert not left.exists()


def test_a_reader_looks_again_where_a_newer_step_has_come(tmp_path, monkeypatch):
    """A file system whose renames are not atomic: a part of a step is seen."""
    with Checkpoints(tmp_path, keep=5) as run:
        run.save(1, **state_of(1))
        run.wait()
        read = _reading.read

        def half_deleted(folder, step, *args):
            if step == 1:
                run.save(2, **state_of(2))
                run.wait()
                raise _record.Damaged("a part is missing")
            return read(folder, step, *args)

        monkeypatch.setattr(_reading, "read", half_deleted)
        with Checkpoints(tmp_path, read_only=True) as reader:
            assert reader.restore(**state_of(0)).step == 2


def test_readers_beside_a_run_that_deletes_see_whole_checkpoints(tmp_path, fault):
    done, read = threading.Event(), []

    def reader():
        with Checkpoints(tmp_path, read_only=True) as checkpoints:
            while not done.is_set():
                found = checkpoints.restore(**state_of(0))
                if found is not None:
                    assert (found.adapter["w"] == found.step).all()
                    read.append(found.step)

    errors = []

    def catching():
        try:
            reader()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=catching) for _ in range(2)]
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(0, **state_of(0))
        checkpoints.wait()
        for thread in threads:
            thread.start()
        for step in range(1, 25):
            checkpoints.save(step, **state_of(step))
    done.set()
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert read == sorted(read) or len(threads) > 1
    assert len(read) > 10
    fault("a reader beside a deletion", f"{len(read)} restores", "whole checkpoints", "nothing")


def test_two_runs_of_one_process_tell_their_own_failures(tmp_path, monkeypatch):
    """Ending the failed save of one neither waits for the other's nor swallows its failure."""
    release, publish = threading.Event(), os.rename

    def failing(source, target, **options):
        if "slow" in str(source):
            assert release.wait(20)
        raise OSError(5, f"of {'slow' if 'slow' in str(source) else 'quick'}")

    with Checkpoints(tmp_path / "slow") as slow, Checkpoints(tmp_path / "quick") as quick:
        monkeypatch.setattr(os, "rename", failing)
        slow.save(1, **state_of(1))
        quick.save(1, **state_of(1))
        with pytest.raises(CheckpointError, match="of quick"):
            quick.wait()
        assert not release.is_set()
        release.set()
        with pytest.raises(CheckpointError, match="of slow"):
            slow.wait()
        monkeypatch.setattr(os, "rename", publish)
        assert quick.save(2, **state_of(2)) and slow.save(2, **state_of(2))


def test_a_failure_in_another_process_is_a_failure_here(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, **state_of(1))
        with monkeypatch.context() as patch:
            patch.setattr(_processes, "worst", lambda code: 1)
            with pytest.raises(CheckpointError, match="step 1.*failed in another process"):
                checkpoints.wait()
