"""What llama.cpp and mlx-lm computed with our files, compared where they are not installed.

`record_fixture.py` has recorded it. The base and the adapter are those of adapters/data/peft_llama.
"""

import json
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from examples.common.models.llama import LlamaConfig
from examples.common.models.llama_weights import build_model
from loft_jax.adapters import (
    LoraRule,
    add_lora,
    load_into,
    load_peft,
    lora_pairs,
    save_gguf,
    save_mlx,
)

RECORDED = Path(__file__).parent / "data" / "served_llama.npz"
PEFT = Path(__file__).parents[1] / "adapters" / "data" / "peft_llama"


def read_base() -> tuple[dict, dict[str, np.ndarray], np.ndarray]:
    """Returns the configuration, the weights in float32, and token ids (2, length)."""
    with np.load(PEFT.with_suffix(".npz")) as file:
        names = [name for name in file.files if name.startswith("tensors/")]
        tensors = {name.removeprefix("tensors/"): file[name].astype(np.float32) for name in names}
        return json.loads(str(file["config"])), tensors, file["ids"]


def adapted_model() -> tuple[nnx.Module, list[LoraRule]]:
    """Returns our model with PEFT's adapter, and the rules."""
    config, tensors, _ = read_base()
    peft = load_peft(PEFT)
    rules = [
        LoraRule(path=f".*/{end}", rank=rank, alpha=peft.scale_of(end) * rank, batch=(0,))
        for end, rank in (("q_proj", 4), ("v_proj", 2), ("down_proj", 4))
    ]
    model = add_lora(build_model(LlamaConfig.from_hf(config), tensors), rules, rngs=nnx.Rngs(0))
    template = nnx.state(model, nnx.LoRAParam)
    nnx.update(model, load_into(template, peft, family="llama", pairs=lora_pairs(rules)))
    return model, rules


def save_both(folder: Path) -> tuple[Path, Path]:
    """Writes the adapter for both programs, and returns the file and the folder."""
    model, rules = adapted_model()
    adapter, (config, _, _) = nnx.state(model, nnx.LoRAParam), read_base()
    given = {"family": "llama", "pairs": rules}
    return (
        save_gguf(folder / "adapter.gguf", adapter, base=config, **given),
        save_mlx(folder / "mlx", adapter, **given),
    )


def read_both(file: Path, folder: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of both files by name."""
    tensors = {f"gguf/{tensor.name}": tensor.data for tensor in gguf.GGUFReader(file).tensors}
    mlx = load_file(folder / "adapters.safetensors")
    return tensors | {f"mlx/{name}": tensor for name, tensor in mlx.items()}


@pytest.mark.parametrize("program", ["llama.cpp", "mlx-lm"])
def test_our_model_equals_what_the_program_computed(close, program):
    model, _ = adapted_model()
    ids = read_base()[2]
    ours = jax.nn.log_softmax(model(jnp.asarray(ids)), axis=-1)
    with np.load(RECORDED) as recorded:
        theirs = recorded[program]
    ours = ours[:, -1] if program == "llama.cpp" else ours
    close(f"{program} with our adapter, as recorded", ours, theirs, 1e-4)


def test_our_files_are_those_that_the_programs_read(tmp_path):
    written = read_both(*save_both(tmp_path))
    with np.load(RECORDED) as recorded:
        names = [name for name in recorded.files if "/" in name]
        assert sorted(written) == sorted(names)
        for name in names:
            # The folding of scales is one product, rounded once.
            np.testing.assert_allclose(written[name], recorded[name], rtol=1e-6, atol=0)
