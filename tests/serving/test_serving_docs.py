"""The how-to pages on serving: code and commands run, where their programs are installed."""

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

HOWTO = Path(__file__).parents[2] / "docs" / "howto"
PAGES = [
    (HOWTO / f"serve_{name}.md").read_text()
    for name in ("transformers", "llama_cpp", "mlx", "vllm")
]
TEXT = "\n".join(PAGES)
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL)
    for line in block.splitlines()
]
MODELFILE = re.search(r"```\n(FROM .*?)```", TEXT, flags=re.DOTALL)
# https://ollama.readthedocs.io/en/modelfile/
INSTRUCTIONS = {"FROM", "PARAMETER", "TEMPLATE", "SYSTEM", "ADAPTER", "LICENSE", "MESSAGE"}
IDS = np.array([3, 9, 27])


def test_each_command_is_known_here():
    programs = {shlex.split(command)[0] for command in COMMANDS}
    llama_cpp = {"llama-cli", "llama-server", "python", "ollama"}
    assert programs == llama_cpp | {"mlx_lm.generate", "mlx_lm.server", "vllm"}


def check_modelfile(folder: Path) -> None:
    """Reads the Modelfile by the documented syntax: INSTRUCTION arguments, and FROM is required.

    Both files are GGUF of one architecture, a model and an adapter by their general.type, which a
    model may leave out.
    """
    gguf = require("gguf")
    assert MODELFILE is not None
    lines = [line.split(maxsplit=1) for line in MODELFILE[1].splitlines() if line]
    assert {name for name, _ in lines} <= INSTRUCTIONS
    given = dict(lines)
    assert len(given) == len(lines) and given.keys() >= {"FROM", "ADAPTER"}
    architectures = set()
    for name, path in given.items():
        reader = gguf.GGUFReader(folder / path)  # relative to the Modelfile
        kind = reader.get_field("general.type")
        assert ("model" if kind is None else kind.contents()) == {"FROM": "model"}.get(
            name, "adapter"
        )
        architectures.add(reader.get_field("general.architecture").contents())
    assert architectures == {"llama"}


@pytest.mark.filterwarnings("ignore")
def test_the_pages_run_from_top_to_bottom(tmp_path, monkeypatch, close):
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
    tiny_models.save_gguf_model(tiny, tmp_path / "base.gguf")
    check_modelfile(tmp_path)
    expected = np.asarray(jax.nn.log_softmax(model(jax.numpy.asarray(IDS[None]))[0]))
    for name in ("served", "served_merged"):
        torch_model = tiny_models.TinyModel("llama", names[name].eval())
        got = log_probs(torch_model)
        close(f"docs/howto/serve_*.md, {name}", got, expected, 1e-4)
    assert names["problems"] == []
    if shutil.which("mlx_lm.generate", path=str(Path(sys.executable).parent)):
        run_mlx(tmp_path)
        for given in (("base", "out/mlx"), ("out/merged", None)):
            folder, with_adapter = (x and tmp_path / x for x in given)
            assert folder is not None
            got = mlx_log_probs(folder, IDS, with_adapter)
            close(f"docs/howto/serve_*.md, mlx-lm with {given}", got, expected, 1e-4)
    try:
        import xllamacpp as xllamacpp
    except ImportError:
        return
    got = llama_cpp_log_probs(tmp_path / "base.gguf", IDS, tmp_path / "out" / "adapter.gguf")
    close("docs/howto/serve_*.md, llama.cpp", got, expected[-1], 1e-4)


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
