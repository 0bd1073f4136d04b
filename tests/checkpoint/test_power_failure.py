"""A power failure at any moment of a save: what was not flushed to the disk is lost."""

import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from loft_jax.checkpoint import Checkpoints, _folder

pytestmark = pytest.mark.usefixtures("dropped_io_ends")


def state_of(step: int) -> dict:
    draw = np.random.default_rng(step).normal(size=(40, 30)).astype(np.float32)
    return {"adapter": {"w": jnp.asarray(draw)}, "opt_state": {"n": jnp.int32(step)}}


class LossyDisk:
    """Interposes `os.fsync` and `os.rename`, and knows what a power failure would leave.

    A file is on the disk if it was flushed after its last change, and so are the names in a folder.
    Of other files the length is left, as file systems with delayed allocation do. New names in a
    folder that was not flushed may be on the disk or not.
    """

    def __init__(self, folder: Path, monkeypatch):
        self.folder, self.flushed, self.images = folder, {}, []
        fsync, rename = os.fsync, os.rename

        def recording_fsync(descriptor):
            fsync(descriptor)
            self.flushed[os.fstat(descriptor).st_ino] = os.fstat(descriptor).st_mtime_ns
            self.images.append(self.image())

        def recording_rename(source, target):
            self.images.append(self.image())
            rename(source, target)
            self.images.append(self.image())

        monkeypatch.setattr(os, "fsync", recording_fsync)
        monkeypatch.setattr(os, "rename", recording_rename)

    def is_flushed(self, path: Path) -> bool:
        return self.flushed.get(path.stat().st_ino) == path.stat().st_mtime_ns

    def image(self) -> dict[str, bytes]:
        """Returns what is left of each file, by its path; the names of the steps are all kept."""
        left = {}
        for path in sorted(self.folder.rglob("*")):
            if path.is_file():
                content = path.read_bytes()
                left[str(path.relative_to(self.folder))] = (
                    content if self.is_flushed(path) else bytes(len(content))
                )
        return left


def restored_step(image: dict[str, bytes], folder: Path) -> int | None:
    """Returns the step that a run restores from an image, after checking its values."""
    for name, content in image.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    with Checkpoints(folder, take_over=True) as checkpoints:
        found = checkpoints.restore(**state_of(0))
    if found is not None:
        assert (found.adapter["w"] == state_of(found.step)["adapter"]["w"]).all()
    return None if found is None else found.step


@pytest.mark.parametrize("asynchronous", [True, False], ids=["async", "sync"])
def test_a_power_failure_costs_at_most_the_save_that_is_not_complete(
    tmp_path, monkeypatch, asynchronous, fault
):
    folder = tmp_path / "run"
    complete = []  # for each image, the newest step whose save was complete
    with monkeypatch.context() as patch:
        disk = LossyDisk(folder, patch)
        with Checkpoints(folder, keep=1, asynchronous=asynchronous) as checkpoints:
            for step in (1, 2, 3):
                checkpoints.save(step, **state_of(step))
                checkpoints.wait()
                complete += [step - 1] * (len(disk.images) - len(complete))
                disk.images.append(disk.image())
                complete.append(step)
    assert len(disk.images) > 30
    # All images that have a step of another set of files, else every fifth.
    steps = [{name.split("/")[0] for name in image} for image in disk.images]
    chosen = [k for k in range(len(steps)) if k % 5 == 0 or steps[k] != steps[k - 1]]
    for k in chosen:
        found = restored_step(disk.images[k], tmp_path / f"image {k}")
        assert (found or 0) >= complete[k], f"step {complete[k]} was complete and is lost"
    fault(
        "power failure",
        f"at {len(chosen)} of {len(disk.images)} flushes and renames",
        "resumes from the newest complete one",
        "steps since the last save",
    )


def test_without_the_flush_the_newest_checkpoint_is_lost(tmp_path, monkeypatch):
    """The test above can fail."""
    with monkeypatch.context() as patch:
        disk = LossyDisk(tmp_path / "run", patch)
        patch.setattr(_folder, "_flush", lambda path: None)
        with Checkpoints(tmp_path / "run", keep=1) as checkpoints:
            checkpoints.save(1, **state_of(1))
    with pytest.warns(match="is damaged"), pytest.raises(Exception, match="no checkpoint is intac"):
        restored_step(disk.images[-1] | disk.image(), tmp_path / "image")


def test_names_are_flushed_before_older_checkpoints_are_deleted(tmp_path, monkeypatch):
    """The folder itself, its parents that were created, and the step in it."""
    folder, flushed, deleted = tmp_path / "new" / "run", [], []
    flush, rmtree = _folder._flush, shutil.rmtree
    monkeypatch.setattr(_folder, "_flush", lambda path: (flush(path), flushed.append(path)))
    monkeypatch.setattr(
        shutil, "rmtree", lambda path, **options: (deleted.append(len(flushed)), rmtree(path))
    )
    with Checkpoints(folder, keep=1) as checkpoints:
        assert {tmp_path, tmp_path / "new"} <= {*flushed}
        for step in (1, 2):
            checkpoints.save(step, **state_of(step))
            checkpoints.wait()
            assert flushed[-1] == folder
    assert deleted == [len(flushed)]
