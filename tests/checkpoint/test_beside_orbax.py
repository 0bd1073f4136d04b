"""Saves beside those that the program makes with Orbax itself, which numbers them by process."""

import asyncio
import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from loft_jax.checkpoint import Checkpoints

STATE = {"adapter": {"w": np.arange(6.0)}, "opt_state": {"n": jnp.int32(1)}}


def save_in_time(folder: Path) -> None:
    """Saves step 1. Orbax would wait 300 s for a signal."""
    checkpoints = Checkpoints(folder)
    assert checkpoints.save(1, **STATE)
    saving = checkpoints._saving
    assert saving is not None
    saving._thread.join(60)
    assert not saving._thread.is_alive(), "the save waits for a signal"
    assert checkpoints.steps() == (1,)
    checkpoints.close()


def test_a_save_that_begins_while_one_of_orbax_ends(tmp_path, monkeypatch):
    """Orbax's save ends between the reading of its list of signals and the wait for them."""
    may_end, begun = threading.Event(), []
    start = threading.Thread.start

    def start_after_the_other_ended(thread):
        if thread.name == "np_type_handler":  # the thread of Orbax that waits for the signals
            begun.append(thread)
            may_end.set()
            other.wait_until_finished()
        start(thread)

    def hold():
        may_end.wait(100)

    options = ocp.AsyncOptions(post_finalization_callback=hold)
    with ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler(), async_options=options) as other:
        other.save(tmp_path / "other", args=ocp.args.StandardSave({"x": jnp.ones(3)}))
        monkeypatch.setattr(threading.Thread, "start", start_after_the_other_ended)
        save_in_time(tmp_path / "run")
        assert len(begun) == 2  # of both items
    assert (tmp_path / "other").exists()


class SlowCheckpointer(ocp.AsyncCheckpointer):
    """Creates the folder of a save, and sends its signals, when it may."""

    may_create = threading.Event()

    def get_temporary_path(self, directory):
        path = super().get_temporary_path(directory)
        create = path.create

        async def create_late():
            assert self.may_create.wait(100)
            return await create()

        path.create = create_late
        return path


def test_a_save_while_one_of_orbax_has_no_folder_yet(tmp_path):
    """As on a slow disk. Where its folder cannot be created, its signals never come."""
    with SlowCheckpointer(ocp.StandardCheckpointHandler()) as other:
        other.save(tmp_path / "other", args=ocp.args.StandardSave({"x": jnp.ones(3)}))
        try:
            save_in_time(tmp_path / "run")
            assert not (tmp_path / "other").exists()
        finally:
            other.may_create.set()
        other.wait_until_finished()
        assert (tmp_path / "other").exists()


def test_a_save_inside_an_event_loop(tmp_path):
    """As in a notebook."""

    async def cell():
        save_in_time(tmp_path)

    asyncio.run(cell())
