"""Which checkpoints are kept, which is best, and that none is overwritten."""

import json
import math
import shutil
import threading

import jax.numpy as jnp
import numpy as np
import pytest
from optimizers import assert_trees_identical

from loft_jax.checkpoint import (
    CheckpointDamaged,
    CheckpointError,
    Checkpoints,
    DamagedCheckpointWarning,
    _folder,
)


def state_of(step: int) -> dict:
    return {"adapter": {"w": jnp.full((2, 3), step)}, "opt_state": {"count": jnp.int32(step)}}


def save_all(checkpoints: Checkpoints, losses: dict[int, float | None]) -> None:
    for step, loss in losses.items():
        metrics = None if loss is None else {"loss": loss, "other": 0.0}
        assert checkpoints.save(step, **state_of(step), metrics=metrics)


LOSSES = {1: 3.0, 2: 1.0, 3: 2.0, 4: math.nan, 5: None, 6: 5.0}


@pytest.mark.parametrize("asynchronous", [True, False], ids=["async", "sync"])
@pytest.mark.parametrize(
    ("options", "kept", "best"),
    [
        ({}, (5, 6), None),
        ({"keep": 1}, (6,), None),
        ({"keep": 3, "best": "loss"}, (2, 4, 5, 6), 2),
        ({"keep": 2, "best": "loss", "best_mode": "max"}, (5, 6), 6),
        ({"keep": 10, "best": "loss"}, (1, 2, 3, 4, 5, 6), 2),
        ({"keep": 1, "best": "other"}, (1, 6), 1),  # of equals, the first
        ({"keep": 1, "keep_every": 2}, (2, 4, 6), None),
        ({"keep": 2, "keep_every": 4, "best": "loss"}, (2, 4, 5, 6), 2),
    ],
)
def test_the_last_and_the_best_are_kept(tmp_path, options, kept, best, asynchronous):
    with Checkpoints(tmp_path, asynchronous=asynchronous, **options) as checkpoints:
        save_all(checkpoints, LOSSES)
        assert checkpoints.steps() == kept
        assert (checkpoints.latest_step(), checkpoints.best_step()) == (6, best)
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == list(kept)


def test_a_run_taken_up_again_knows_the_best(tmp_path):
    with Checkpoints(tmp_path, best="loss", keep=1) as checkpoints:
        save_all(checkpoints, {1: 2.0, 2: 1.0, 3: 4.0})
    with Checkpoints(tmp_path, best="loss", keep=1) as checkpoints:
        assert checkpoints.best_step() == 2
        save_all(checkpoints, {4: 3.0})
        assert checkpoints.steps() == (2, 4)
        save_all(checkpoints, {5: 0.5})
        assert (checkpoints.steps(), checkpoints.best_step()) == ((5,), 5)
        found = checkpoints.restore(**state_of(0), step=5)
        assert found is not None and found.metrics == {"loss": 0.5, "other": 0.0}


def test_the_older_one_is_kept_until_the_new_one_is_whole(tmp_path):
    """With keep=1: a failed save must not delete its predecessor."""
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, **state_of(1))
        checkpoints.wait()
        with pytest.raises(CheckpointError), pytest.MonkeyPatch.context() as patch:
            patch.setattr("os.rename", _fails)
            patch.setattr("os.replace", _fails)
            checkpoints.save(2, **state_of(2))
            checkpoints.wait()
        assert checkpoints.steps() == (1,)
        assert checkpoints.save(3, **state_of(3))
        assert checkpoints.steps() == (3,)


def _fails(*_, **__):
    raise OSError(28, "No space left on device")


def test_damaged_ones_do_not_count(tmp_path):
    with Checkpoints(tmp_path, best="loss") as checkpoints:
        save_all(checkpoints, {1: 3.0, 2: 2.0, 3: 1.0})
        assert checkpoints.steps() == (2, 3)
        (tmp_path / "3" / "meta" / "metadata").write_text("{}")
    with Checkpoints(tmp_path, best="loss") as checkpoints:
        with pytest.warns(DamagedCheckpointWarning):
            found = checkpoints.restore(**state_of(0))
        assert found is not None and found.step == 2
        assert (checkpoints.steps(), checkpoints.best_step()) == ((2,), 2)
        save_all(checkpoints, {3: 5.0})
        assert checkpoints.steps() == (2, 3)


def test_the_same_state_is_not_saved_twice_and_no_other_takes_its_place(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.save(4, **state_of(4), data={"batch": 1})
        assert not checkpoints.save(4, **state_of(4), data={"batch": 1})
        for other in ({**state_of(5), "data": {"batch": 1}}, {**state_of(4), "data": None}):
            with pytest.raises(CheckpointError, match="was saved already, with other values"):
                checkpoints.save(4, **other)
        found = checkpoints.restore(**state_of(0))
        assert found is not None and int(found.opt_state["count"]) == 4
    with Checkpoints(tmp_path) as checkpoints:
        assert not checkpoints.save(4, **state_of(4), data={"batch": 1})


def test_a_step_before_the_newest_is_refused_rather_than_lost(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        save_all(checkpoints, {3: None, 6: None})
        found = checkpoints.restore(**state_of(0), step=3)
        assert found is not None and found.step == 3
        with pytest.raises(CheckpointError, match="step 4 is older than the newest checkpoint, 6"):
            checkpoints.save(4, **state_of(4))
        with pytest.raises(CheckpointError, match=r"no step 5. Saved steps: \[3, 6\]"):
            checkpoints.restore(**state_of(0), step=5)


def test_steps_between_are_passed_over_unless_forced(tmp_path):
    with Checkpoints(tmp_path, save_every=3, keep=9) as checkpoints:
        saved = [checkpoints.save(step, **state_of(step)) for step in range(1, 7)]
        assert saved == [False, False, True, False, False, True]
        assert checkpoints.save(7, **state_of(7), force=True)
        assert checkpoints.steps() == (3, 6, 7)


def test_other_things_in_the_folder_are_left_alone(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "settings.json").write_text("{}")
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        save_all(checkpoints, {1: None, 2: None})
        assert checkpoints.steps() == (2,)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "notes", "settings.json"]


def test_an_empty_folder_has_nothing(tmp_path):
    with Checkpoints(tmp_path, best="loss") as checkpoints:
        assert checkpoints.restore(**state_of(0)) is None
        assert checkpoints.steps() == ()
        assert checkpoints.latest_step() is None and checkpoints.best_step() is None


def test_a_copied_folder_restores(tmp_path):
    with Checkpoints(tmp_path / "a") as checkpoints:
        save_all(checkpoints, {1: None})
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "a")
    with Checkpoints(tmp_path / "b") as checkpoints:
        assert checkpoints.restore(**state_of(0)).step == 1


@pytest.mark.parametrize(
    "options",
    [{"keep": 0}, {"keep_every": 0}, {"save_every": 0}, {"timeout_s": 0}, {"best_mode": "least"}],
)
def test_options_out_of_range_are_refused(tmp_path, options):
    with pytest.raises(Exception, match=next(iter(options))):
        Checkpoints(tmp_path, **options)


def test_arguments_that_cannot_be_saved_are_refused_and_nothing_is_written(tmp_path):
    with Checkpoints(tmp_path, best="loss") as checkpoints:
        good = state_of(1)
        for error, change, text in [
            (ValueError, {"metrics": {"los": 1.0}}, "lack 'loss'"),
            (ValueError, {"step": -1}, "must not be negative"),
            (TypeError, {"data": {"position": (1, 2)}}, "data must be"),
            (TypeError, {"data": {1: 2}}, "data must be"),
            (TypeError, {"data": math.nan}, "data must be"),
            (TypeError, {"adapter": {"w": "text"}}, "adapter: w is not an array"),
            (TypeError, {"adapter": {"w": jnp.ones(2), "f": len}}, "adapter: f is not an array"),
            (ValueError, {"adapter": {"a/b": 1.0, "a": {"b": 2.0}}}, "adapter: two leaves.*'a/b'"),
        ]:
            with pytest.raises(error, match=text):
                checkpoints.save(**{"step": 1} | good | change)
        assert checkpoints.steps() == ()


def test_a_best_whose_record_cannot_be_read_now_is_not_deleted(tmp_path, monkeypatch):
    """Simulates a mount that is lost for a moment. The checkpoint may still be the best."""
    with Checkpoints(tmp_path, keep=1, best="loss") as checkpoints:
        save_all(checkpoints, {1: 0.1, 2: 0.5})
    read = _folder.record_text

    def failing(folder, step):
        if step == 1:
            raise OSError(5, "Input/output error")
        return read(folder, step)

    with Checkpoints(tmp_path, keep=1, best="loss") as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(_folder, "record_text", failing)
            save_all(checkpoints, {3: 0.4})
        assert checkpoints.steps() == (1, 3)
        assert checkpoints.best_step() == 1
        save_all(checkpoints, {4: 0.6})
        assert checkpoints.steps() == (1, 4)


def test_a_step_that_another_run_has_saved_is_not_overwritten(tmp_path):
    """A run that hung, and the run that replaced it."""
    with Checkpoints(tmp_path, keep=4) as hung:
        save_all(hung, {1: None})
        hung.wait()
        with Checkpoints(tmp_path, keep=4, take_over=True) as successor:
            save_all(successor, {2: None})
            successor.wait()
            with pytest.raises(CheckpointError, match="was taken over by process"):
                hung.save(3, **state_of(7))
            assert_trees_identical(successor.restore(**state_of(0)).adapter, state_of(2)["adapter"])
        with pytest.raises(CheckpointError, match="step 2 was saved already, with other values"):
            hung.save(2, **state_of(7))
        assert hung.steps() == (1, 2)


def test_a_run_that_is_taken_over_while_it_saves_does_not_finish(tmp_path, monkeypatch):
    written, taken_over = threading.Event(), threading.Event()
    with Checkpoints(tmp_path) as hung:
        check = hung._ownership.check

        def late_check():
            written.set()
            taken_over.wait(20)
            check()

        monkeypatch.setattr(hung._ownership, "check", late_check)
        hung.save(3, **state_of(3))
        assert written.wait(20)
        with Checkpoints(tmp_path, take_over=True) as successor:
            taken_over.set()
            with pytest.raises(CheckpointError, match="(?s)step 3 could not be saved.*taken over"):
                hung.wait()
            assert successor.steps() == ()


def test_a_position_that_moves_on_at_once_is_saved_as_it_was(tmp_path, monkeypatch):
    """The record is written in the background, here as late as possible."""
    written, dumps = threading.Event(), json.dumps

    def late_dumps(*args, **options):
        if threading.current_thread() is not threading.main_thread():
            written.wait(10)
        return dumps(*args, **options)

    monkeypatch.setattr(json, "dumps", late_dumps)
    position = {"batch": 1, "order": [3, 4]}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, **state_of(1), data=position)
        position["batch"] = 2
        position["order"].append(5)
        written.set()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(**state_of(0)).data == {"batch": 1, "order": [3, 4]}


def test_a_step_may_be_an_integer_of_numpy(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.save(np.int64(3), **state_of(3))
        assert checkpoints.steps() == (3,)


def test_of_a_damaged_step_that_was_asked_for_others_are_not_given_up(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        save_all(checkpoints, {1: None, 2: None})
        checkpoints.wait()
        (tmp_path / "2" / "meta" / "metadata").write_text("{}")
        whole = pytest.raises(CheckpointDamaged, match="step 2 is damaged. Omit step=")
        with pytest.warns(DamagedCheckpointWarning), whole:
            checkpoints.restore(**state_of(0), step=2)
        assert checkpoints.restore(**state_of(0)).step == 1
