"""Records what llama.cpp and mlx-lm compute with our files, which `test_recorded.py` compares.

    pip install -c constraints.txt -e ".[test,serving]"
    PYTHONPATH=tests:.:examples python tests/serving/record_fixture.py

Writes `data/served_llama.npz`: log-probabilities after the prompts (llama.cpp) and at all positions
(mlx-lm), the tensors of both files, and the versions of the programs.
"""

import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
from serving.programs import llama_cpp_log_probs, mlx_log_probs
from serving.test_recorded import RECORDED, read_base, read_both, save_both
from serving.tiny_models import TinyModel, save_folder, save_gguf_model


def main() -> None:
    """Writes the file."""
    import torch
    import transformers

    config, tensors, ids = read_base()
    module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    tensors = {name: torch.tensor(tensor) for name, tensor in tensors.items()}
    module.load_state_dict(tensors, strict=False)  # without the tied head
    model = TinyModel("llama", module)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adapter, mlx = save_both(folder)
        base = folder / "base.gguf"
        save_gguf_model(model, base)
        save_folder(model, folder / "base")
        np.savez_compressed(
            RECORDED,
            versions=f"xllamacpp {version('xllamacpp')}, mlx-lm {version('mlx-lm')}",
            **{
                "llama.cpp": np.array([llama_cpp_log_probs(base, row, adapter) for row in ids]),
                "mlx-lm": np.array([mlx_log_probs(folder / "base", row, mlx) for row in ids]),
            },
            **read_both(adapter, mlx),
        )


if __name__ == "__main__":
    main()
