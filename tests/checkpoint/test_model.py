"""Any sequence of saves, failures, kills, damage and readers, against a model of a few lines.

LOFT_JAX_EXAMPLES=100000 pytest -n 0 tests/checkpoint/test_model.py -k numpy
"""

import collections
import functools
import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from numpy_storage import IN_MEMORY
from numpy_storage import numpy_storage as numpy_storage

from loft_jax.checkpoint import (
    CheckpointDamaged,
    CheckpointError,
    Checkpoints,
    DamagedCheckpointWarning,
    UndeletedCheckpointWarning,
    _folder,
    _lock,
)

EXAMPLES = int(os.environ.get("LOFT_JAX_EXAMPLES", "0"))
STEPS = collections.Counter()


@functools.cache
def state_of(value: int, devices: int = 0) -> dict:
    """Arrays that follow from a number, on the host or on a mesh."""
    w = np.random.default_rng(value).normal(size=(8, 3)).astype(np.float32)
    if devices:
        mesh = jax.make_mesh((devices,), ("x",), devices=jax.devices()[:devices])
        w = jax.device_put(w, NamedSharding(mesh, P("x")))
    return {"adapter": {"w": w}, "opt_state": {"value": np.int64(value)}}


def fails(*_):
    raise OSError(28, "No space left on device")


class Runs(RuleBasedStateMachine):
    """Keeps two checkpoints, those of every fifth step, and the one with the smallest loss."""

    files = ("meta/metadata", "adapter/manifest.ocdbt", "opt_state/_METADATA")

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=IN_MEMORY)) / "run"
        self.step = 0
        # The model: what is saved, {step: value}; the value is also the loss.
        self.saved: dict[int, int] = {}
        self.any_damaged = False

    @initialize()
    def open(self):
        self.run = Checkpoints(self.folder, best="loss", keep_every=5)

    def trim(self):
        best = min(self.saved, key=lambda step: (self.saved[step], step))
        kept = {*sorted(self.saved)[-2:], best, *(step for step in self.saved if step % 5 == 0)}
        self.saved = {step: value for step, value in self.saved.items() if step in kept}

    def save(self, step, value, devices=0):
        state = state_of(value, devices)
        return self.run.save(step, **state, data=value, metrics={"loss": float(value)})

    @rule(value=st.integers(0, 99), devices=st.sampled_from([0, 2, 8]))
    def saves(self, value, devices):
        STEPS["save"] += 1
        self.step = max(self.saved, default=self.step) + 1
        assert self.save(self.step, value, devices)
        self.run.wait()
        self.saved[self.step] = value
        self.trim()

    @precondition(lambda self: self.saved)
    @rule(same=st.booleans())
    def saves_a_step_again(self, same):
        STEPS["save again"] += 1
        step = max(self.saved)
        if same:
            assert not self.save(step, self.saved[step])
        else:
            with pytest.raises(CheckpointError, match="was saved already"):
                self.save(step, self.saved[step] + 100)

    @rule()
    def has_no_room(self):
        STEPS["no room"] += 1
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_folder, "publish", fails)
            self.save(max(self.saved, default=self.step) + 1, 5)
            with pytest.raises(CheckpointError, match="could not be saved"):
                self.run.wait()

    @rule(value=st.integers(0, 99))
    def cannot_delete(self, value):
        STEPS["cannot delete"] += 1
        before = {**self.saved}
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore", UndeletedCheckpointWarning)
            patch.setattr(_folder, "delete", lambda _, steps: [f"{step}" for step in steps])
            self.saves(value, 0)
        self.saved = before | self.saved

    @rule(when=st.sampled_from(["idle", "saving", "deleting"]), value=st.integers(0, 99))
    def is_killed(self, when, value):
        """Nothing runs after the kill: neither the rest of a save nor the release of the lock."""
        STEPS["kill"] += 1
        with pytest.MonkeyPatch.context() as patch:
            if when == "saving":
                patch.setattr(_folder, "publish", fails)
            if when == "deleting":
                patch.setattr(_folder, "_remove", lambda path: None)
            if when != "idle":
                step = max(self.saved, default=self.step) + 1
                self.save(step, value)
                try:
                    self.run.wait()
                    self.step, self.saved[step] = step, value
                    self.trim()
                except CheckpointError:
                    assert when == "saving"
            lock = json.loads((self.folder / _lock.NAME).read_text())
            self.run.close()
            (self.folder / _lock.NAME).write_text(json.dumps(lock | {"started": "1"}))
        self.open()

    @precondition(lambda self: self.saved)
    @rule(file=st.integers(0, 2))
    def is_damaged(self, file):
        STEPS["damage"] += 1
        newest = max(self.saved)
        (self.folder / str(newest) / self.files[file]).write_bytes(b"\x00")
        # A new path: TensorStore remembers what it has read.
        self.run.close()
        self.folder = self.folder.rename(self.folder.with_name(f"run {STEPS['damage']}"))
        self.open()
        del self.saved[newest]
        self.any_damaged, self.step = True, max(self.step, newest)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.restores(0)
        assert [w.category for w in caught] == [DamagedCheckpointWarning]

    @rule(devices=st.sampled_from([0, 1, 4]))
    def restores(self, devices):
        STEPS["restore"] += 1
        self.check_restored(self.run, devices)

    @rule(devices=st.sampled_from([0, 1, 4]))
    def is_read(self, devices):
        STEPS["reader"] += 1
        with Checkpoints(self.folder, read_only=True) as reader:
            self.check_restored(reader, devices)

    @rule()
    def refuses_a_second_run(self):
        STEPS["second run"] += 1
        with pytest.raises(CheckpointError, match="is in use by"):
            Checkpoints(self.folder)

    def check_restored(self, run, devices):
        targets = state_of(0, devices)
        if not self.saved and self.any_damaged:
            with pytest.raises(CheckpointDamaged):
                run.restore(**targets)
            return
        found = run.restore(**targets)
        assert (found is None) == (not self.saved)
        if found is not None:
            assert found.step == max(self.saved)
            value = self.saved[found.step]
            assert np.array_equal(found.adapter["w"], state_of(value)["adapter"]["w"])
            assert int(found.opt_state["value"]) == found.data == value
            if devices:
                assert found.adapter["w"].sharding == targets["adapter"]["w"].sharding

    @invariant()
    def holds_what_the_model_has(self):
        if hasattr(self, "run"):
            assert self.run.steps() == tuple(sorted(self.saved))
            if self.saved:
                best = min(self.saved, key=lambda step: (self.saved[step], step))
                assert self.run.best_step() == best

    def teardown(self):
        self.run.close()
        shutil.rmtree(self.folder.parent)


class RunsOnNumpyFiles(Runs):
    files = ("meta/metadata", "adapter/arrays", "opt_state/arrays")


def check(machine: type[Runs], examples: int) -> str:
    """Runs examples against the model, and returns how many and what they did."""
    STEPS.clear()
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=10,
            deadline=None,
            database=None,
            derandomize=not EXAMPLES,
            suppress_health_check=list(HealthCheck),
        ),
    )
    return f"{examples} examples, {sum(STEPS.values())} steps: {dict(sorted(STEPS.items()))}"


def test_any_sequence_with_orbax_is_what_the_model_says(report):
    report(f"checkpoints against the model: {check(Runs, EXAMPLES or 12)}")


@pytest.mark.usefixtures("numpy_storage")
def test_any_sequence_with_numpy_files_is_what_the_model_says(report):
    said = check(RunsOnNumpyFiles, EXAMPLES or 2000)
    report(f"checkpoints of NumPy files against the model: {said}")
