"""Metrics reach TensorBoard, trackio and Weights & Biases."""

import json
import sqlite3
import struct
import time

import numpy as np
import pytest

from common import llm_settings, trackers
from common.errors import UserError
from common.llm_settings import LlmSettings
from common.runs import open_run

RECORDS = (
    {"step": 0, "sample": "some text"},
    {"step": 1, "loss": 2.5, "learning_rate": 0.1},
    {"step": 2, "tested": "photos", "accuracy": 0.5, "accuracy_of_class": {"cat": 1.0}},
)


def scalars(folder) -> dict[tuple[str, int], float]:
    """The numbers in TensorBoard's event files, by name and step, as TensorBoard shows them."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    found = {}
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:  # length, its checksum, the event, its checksum
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            if event.session_log.status == SessionLog.START:  # a resumed run
                found = {key: value for key, value in found.items() if key[1] < event.step}
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found[value.tag, event.step] = value.simple_value
    return found


def test_tensorboard_gets_the_numbers_of_a_run(tmp_path):
    pytest.importorskip("tensorboardX", reason="the extra tensorboard is not installed")
    settings = LlmSettings(log_to=("tensorboard",))
    with open_run(settings, tmp_path / "out", False, examples=np.zeros(2)) as run:
        for record in RECORDS:
            run.log(record)
    expected = {
        ("loss", 1): 2.5,
        ("learning_rate", 1): pytest.approx(0.1),
        ("photos/accuracy", 2): 0.5,
        ("photos/accuracy_of_class/cat", 2): 1.0,
    }
    assert scalars(tmp_path / "out" / "tensorboard") == expected
    # A resumed run repeats the steps after its checkpoint.
    tracker = trackers.open_tracker("tensorboard", tmp_path / "out", "id", {}, first_step=2)
    tracker.log({"loss": 1.5}, step=2)
    tracker.finish()
    del expected["photos/accuracy", 2], expected["photos/accuracy_of_class/cat", 2]
    assert scalars(tmp_path / "out" / "tensorboard") == expected | {("loss", 2): 1.5}


def test_without_a_tracker_none_is_opened(tmp_path):
    with open_run(LlmSettings(), tmp_path / "out", False, examples=np.zeros(2)) as run:
        run.log(RECORDS[1])
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {
        "settings.json",
        "metrics.jsonl",
        "checkpoints",
    }


def test_trackio_gets_the_numbers_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio", reason="the extra trackio is not installed")
    tracker = trackers.open_tracker("trackio", tmp_path / "loft-1", "abc", {"rank": 8}, 0)
    tracker.log({"loss": 2.5}, step=1)
    tracker.finish()
    (found,) = trackio.Api().runs(trackers.PROJECT)
    assert found.name == "loft-1-abc" and found.config["rank"] == 8
    (database,) = (tmp_path / "trackio").rglob("*.db")
    with sqlite3.connect(database) as connection:
        ((step, metrics),) = connection.execute("SELECT step, metrics FROM metrics")
    assert step == 1 and json.loads(metrics)["loss"] == 2.5


def test_weights_and_biases_records_a_run_without_a_network(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "loft-1").mkdir()
    tracker = trackers.open_tracker("wandb", tmp_path / "loft-1", "abc", {"rank": 8}, 0)
    tracker.log({"loss": 2.5}, step=1)
    tracker.finish()
    (file,) = (tmp_path / "loft-1" / "wandb").glob("offline-run-*-abc/run-abc.wandb")
    # A process of wandb writes the file, and may end after `finish`.
    deadline = time.monotonic() + 30
    while b"loss" not in (content := file.read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert b"loss" in content and b"2.5" in content and b"rank" in content


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(trackers.PACKAGES, "wandb", "a_package_that_nobody_has")
    with pytest.raises(
        UserError, match=r"needs the package a_package.*pip install -e '.\[wandb\]'"
    ):
        llm_settings.parse_arguments(["--log-to", "wandb"])
    with pytest.raises(UserError, match="--log-to mlflow: choose from tensorboard, trackio"):
        llm_settings.parse_arguments(["--log-to", "mlflow"])
