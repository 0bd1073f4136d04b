"""The example on a mesh, in one process and in two; one of the two is killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from optimizers import hasty_compiler as hasty_compiler

import finetune_llm
import multi_device
from common import meshes, methods, training
from common.data import text
from common.models import llama_weights as weights
from common.models.llama import lora_rule
from loft_jax.adapters import add_lora, lora_pairs

HERE = Path(__file__).parent
STEPS = 16  # enough that two processes are not done before one is killed
MESH = "fsdp=4,tensor=2"


@pytest.fixture(scope="module")
def arguments(model_folder, text_file) -> list[str]:
    """Flags for a short run."""
    flags = f"--steps {STEPS} --eval-every 8 --save-every 2 --batch-size 4 --seq-len 8 --rank 2"
    flags += " --dropout 0.1"  # whose masks do not depend on the mesh
    return [*flags.split(), "--model", str(model_folder), "--data", str(text_file)]


def run(*arguments) -> int:
    """The script's exit status, in this process with its eight devices."""
    return multi_device.main([str(argument) for argument in arguments])


def metrics(folder: Path) -> list[dict]:
    """The complete lines of metrics.jsonl."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def losses(folder: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in metrics(folder) if "loss" in r}


def adapter(folder: Path) -> list[np.ndarray]:
    with ocp.StandardCheckpointer() as checkpointer:
        return [np.asarray(x) for x in jax.tree.leaves(checkpointer.restore(folder / "adapter"))]


@pytest.fixture(scope="module")
def uninterrupted(arguments, tmp_path_factory) -> Path:
    """A run of one process with eight devices; tests must not change its folder."""
    folder = tmp_path_factory.mktemp("mesh") / "out"
    assert run(*arguments, "--mesh", MESH, "--output", folder) == 0
    return folder


def assert_same_run(folder: Path, other: Path) -> None:
    """Asserts equal losses at every step, up to the order of summation over devices.

    The factors are not compared in float32, because Adam's update of a coordinate without a
    gradient consists of rounding errors. tests/sharding compares them in float64.
    """
    ours, theirs = losses(folder), losses(other)
    assert list(ours) == list(theirs) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5)
    of = lambda folder: [r["eval_loss"] for r in metrics(folder) if "eval_loss" in r]
    np.testing.assert_allclose(of(folder), of(other), rtol=1e-5)


def test_a_mesh_trains_as_one_device_does(uninterrupted, arguments, tmp_path):
    assert finetune_llm.main([*arguments, "--output", str(tmp_path / "one")]) == 0
    assert_same_run(uninterrupted, tmp_path / "one")
    names = {path.name for path in uninterrupted.iterdir()}
    assert {"curve.png", "adapter", "peft", "checkpoints"} <= names


def test_weights_adapters_and_state_are_split(model_folder):
    model = weights.load(str(model_folder)).build()
    rule = lora_rule(["q", "down"], rank=2, alpha=2)
    model = add_lora(model, rule, rngs=nnx.Rngs(0))
    mesh = meshes.make_mesh(meshes.parse_mesh(MESH))
    meshes.place_model(model, mesh, lora_pairs(rule))
    attention, mlp = model.layers.self_attn, model.layers.mlp
    spec = lambda variable: variable[...].sharding.spec
    assert spec(attention.q_proj.base.kernel) == P(None, "fsdp", "tensor")
    assert spec(attention.q_proj.lora_a) == P(None, "fsdp", None)
    assert spec(attention.q_proj.lora_b) == P(None, None, "tensor")
    assert spec(mlp.down_proj.lora_a) == P(None, "tensor", None)
    assert spec(model.embed_tokens.embedding) == P("tensor", "fsdp")
    make = lambda rate: methods.make_optimizer("loft", rate, pairs=lora_pairs(rule))
    trainer = training.Trainer(model, text.next_token_loss, make)
    state = trainer.start(model)
    for _ in range(2):
        nu = state.opt_state[1][0].nu["layers"]["self_attn"]["q_proj"]["lora_a"]
        assert nu.sharding.spec == P(None, "fsdp", None)
        assert nu.addressable_shards[0].data.shape == (2, 16 // 4, 3)
        state, _ = trainer.step(state, np.zeros((4, 9), np.int32), 1e-3)


def processes(folder: Path, arguments: list[str], *options: str) -> list[subprocess.Popen]:
    """Two processes of four devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    script = HERE.parents[1] / "examples" / "multi_device.py"
    command = [sys.executable, "-u", script, *arguments, "--output", folder, "--mesh", MESH]
    command += ["--coordinator", address, "--processes", "2", *options]
    # pytest uses eight devices; these processes choose how many.
    flags = [x for x in os.environ["XLA_FLAGS"].split() if "device_count" not in x]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # as `hasty_compiler` does here
    return [
        subprocess.Popen(
            [str(part) for part in (*command, "--process", number)],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for number in (0, 1)
    ]


@pytest.fixture
def two(tmp_path, arguments):
    started = []

    def start(*flags: str) -> list[subprocess.Popen]:
        started.extend(processes(tmp_path / "two", arguments, *flags))
        return started

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_two_processes_train_and_one_that_dies_ends_the_other(two, uninterrupted, tmp_path, report):
    """Two processes train as one does, and one process resumes the run on another mesh."""
    folder, began = tmp_path / "two", time.monotonic()
    first, second = two("--timeout", "10")
    while len(losses(folder)) < 5:
        assert first.poll() is None and second.poll() is None, first.communicate()[0]
        time.sleep(0.05)
    os.kill(second.pid, signal.SIGKILL)
    killed = time.monotonic()
    printed, _ = first.communicate(timeout=120)
    waited = time.monotonic() - killed
    done = losses(folder)
    assert first.returncode != 0
    assert "another process" in printed or "another task died" in printed
    assert f"--resume --output {folder}" in printed
    assert "left=" in printed and "left=" not in second.communicate()[0]  # one progress bar
    expected = losses(uninterrupted)
    np.testing.assert_allclose(list(done.values()), [expected[k] for k in done], rtol=1e-5)

    assert run("--resume", "--output", folder, "--mesh", "data=2,fsdp=2,tensor=2") == 0
    assert_same_run(folder, uninterrupted)
    report(
        f"two processes of four devices: {len(done)} steps in {killed - began:.0f} s with start "
        f"and compilation; one killed, the other ended after {waited:.0f} s (timeout 10 s)"
    )


def test_sigterm_saves_ends_with_75_and_is_resumed_bit_exactly(
    uninterrupted, arguments, tmp_path, monkeypatch
):
    folder, step = tmp_path / "out", training.Trainer.step

    def preempted(trainer, state, *args):
        if int(state.step) == 2:
            signal.raise_signal(signal.SIGTERM)
        return step(trainer, state, *args)

    with monkeypatch.context() as patch:
        patch.setattr(training.Trainer, "step", preempted)
        assert run(*arguments, "--mesh", MESH, "--output", folder) == 75
    assert list(losses(folder)) == [1, 2, 3]  # step 3 is saved in spite of --save-every 2
    assert run("--resume", "--mesh", MESH, "--output", folder) == 0
    assert losses(folder) == losses(uninterrupted)
    for x, y in zip(adapter(folder), adapter(uninterrupted), strict=True):
        np.testing.assert_array_equal(x, y)


def test_another_base_is_refused(uninterrupted, model_folder, tmp_path, capsys):
    """A run cannot be resumed with other frozen weights, although no checkpoint contains them."""
    import shutil

    from safetensors.numpy import load_file, save_file

    copied = shutil.copytree(uninterrupted, tmp_path / "out")
    other = shutil.copytree(model_folder, tmp_path / "model")
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1e-3
    save_file(tensors, other / "model.safetensors")
    settings = copied / "settings.json"
    settings.write_text(settings.read_text().replace(str(model_folder), str(other)))
    assert run("--resume", "--mesh", MESH, "--output", copied) == 1
    assert "layers/mlp/up_proj" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mesh", "fsdp=3"], "--mesh data=1 x fsdp=3 x tensor=1 needs 3 devices, but there"),
        (["--mesh", "layers=8"], "'layers=8' is not one of data, fsdp, tensor with a size"),
        (["--mesh", "fsdp=8", "--batch-size", "4"], "4 examples cannot be split over data x"),
        (["--mesh", MESH, "--quantize", "nf4"], "--quantize works on one device only"),
        (["--processes", "2", "--coordinator", "x:1", "--process", "0"], "need --output"),
        (["--processes", "2"], "need --coordinator, --processes and --process"),
    ],
)
def test_what_cannot_work_is_explained(arguments, tmp_path, capsys, flags, message):
    output = [] if "--processes" in flags else ["--output", tmp_path / "out"]
    assert run(*arguments, *output, *flags) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
