"""The code and the commands of docs/serving.md run, where their programs are installed."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from serving import tiny_models
from serving.programs import llama_cpp_log_probs, mlx_log_probs, require

from examples.common.models.llama import LlamaConfig
from examples.common.models.llama_weights import build_model
from loft_jax.adapters import LoraRule, add_lora

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
    for line in block.splitlines()
]
IDS = np.array([3, 9, 27])


def test_each_command_is_known_here():
    programs = {shlex.split(command)[0] for command in COMMANDS}
    assert programs == {"llama-cli", "llama-server", "mlx_lm.generate", "mlx_lm.server", "vllm"}


@pytest.mark.filterwarnings("ignore")
def test_the_page_runs_from_top_to_bottom(tmp_path, monkeypatch, close):
    for name in ("torch", "transformers", "peft"):
        require(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tiny = tiny_models.make_model("llama")
    tiny_models.save_folder(tiny, tmp_path / "base")
    rule = LoraRule(path="layers/.*_proj", rank=3, alpha=7, batch=(0,))
    model = build_model(LlamaConfig.from_hf(tiny.torch.config.to_dict()), tiny.tensors)
    model = add_lora(model, rule, rngs=nnx.Rngs(0))
    draw = np.random.default_rng(0)
    adapter = jax.tree.map(
        lambda x: jax.numpy.asarray(0.3 * draw.normal(size=x.shape), x.dtype),
        nnx.state(model, nnx.LoRAParam),
    )
    nnx.update(model, adapter)
    names = {"model": model, "adapter": adapter, "rule": rule, "base": "base"}
    for block in PYTHON:
        exec(block, names)
    expected = np.asarray(jax.nn.log_softmax(model(jax.numpy.asarray(IDS[None]))[0]))
    for name in ("served", "served_merged"):
        torch_model = tiny_models.TinyModel("llama", names[name].eval())
        got = log_probs(torch_model)
        close(f"docs/serving.md, {name}", got, expected, 1e-4)
    assert names["problems"] == []
    if shutil.which("mlx_lm.generate", path=str(Path(sys.executable).parent)):
        run_mlx(tmp_path)
        for given in (("base", "out/mlx"), ("out/merged", None)):
            folder, with_adapter = (x and tmp_path / x for x in given)
            assert folder is not None
            got = mlx_log_probs(folder, IDS, with_adapter)
            close(f"docs/serving.md, mlx-lm with {given}", got, expected, 1e-4)
    try:
        import xllamacpp as xllamacpp
    except ImportError:
        return
    tiny_models.save_gguf_model(tiny, tmp_path / "base.gguf")
    got = llama_cpp_log_probs(tmp_path / "base.gguf", IDS, tmp_path / "out" / "adapter.gguf")
    close("docs/serving.md, llama.cpp", got, expected[-1], 1e-4)


def log_probs(model: tiny_models.TinyModel) -> np.ndarray:
    import torch

    with torch.no_grad():
        return torch.log_softmax(model.torch(torch.tensor(IDS[None])).logits[0], -1).numpy()


def run_mlx(folder: Path) -> None:
    """Runs the commands of mlx-lm that end by themselves."""
    for command in COMMANDS:
        program, *arguments = shlex.split(command)
        if program == "mlx_lm.generate":
            path = Path(sys.executable).parent / program
            done = subprocess.run(
                [path, *arguments], cwd=folder, capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, done.stderr[-2000:]
            assert "==========" in done.stdout
