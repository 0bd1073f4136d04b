"""Records the logits of Hugging Face's models, for `test_vit.py`.

    pip install torch transformers
    python tests/examples/record_vit_logits.py

Writes `data/vit_logits.npz`: for each case its config, random weights, images and logits.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

PATH = Path(__file__).parent / "data" / "vit_logits.npz"

_SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 4,
    "num_labels": 3,
}
CASES: dict[str, dict[str, Any]] = {
    "vit": {"model_type": "vit", "image_size": 12, "intermediate_size": 24},
    "vit without biases of q, k, v": {
        "model_type": "vit",
        "image_size": 12,
        "intermediate_size": 24,
        "qkv_bias": False,
    },
    "dinov2": {"model_type": "dinov2", "image_size": 12, "mlp_ratio": 2},
    # Its position table for 5 x 5 patches is interpolated.
    "dinov2 on smaller images": {"model_type": "dinov2", "image_size": 20, "mlp_ratio": 2},
    "dinov2 on larger images": {"model_type": "dinov2", "image_size": 8, "mlp_ratio": 2},
}
IMAGE_SIZE = 12


def save(case: str, folder: Path) -> dict[str, np.ndarray]:
    """Saves a case's model with save_pretrained; returns uint8 images and their logits."""
    import torch
    from transformers import (
        Dinov2Config,
        Dinov2ForImageClassification,
        ViTConfig,
        ViTForImageClassification,
    )

    options = _SHAPE | CASES[case]
    kinds = {
        "vit": (ViTConfig, ViTForImageClassification, 0.5, 0.5),
        "dinov2": (
            Dinov2Config,
            Dinov2ForImageClassification,
            np.array([0.485, 0.456, 0.406]),
            np.array([0.229, 0.224, 0.225]),
        ),
    }
    make_config, make_model, mean, std = kinds[options.pop("model_type")]
    torch.manual_seed(0)
    model = make_model(make_config(**options)).eval()
    images = np.random.default_rng(0).integers(0, 256, (2, IMAGE_SIZE, IMAGE_SIZE, 3))
    pixels = torch.tensor(((images / 255 - mean) / std).transpose(0, 3, 1, 2), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():  # the initial values would hide differences
            parameter.add_(0.3 * torch.randn_like(parameter))
            parameter.copy_(parameter.half())  # so that the file can hold them in 16 bits
        logits = model(pixels).logits.numpy()
    model.save_pretrained(folder)
    return {"images": images.astype(np.uint8), "logits": logits}


def record(case: str) -> dict[str, Any]:
    """A case's config and tensors from the saved files, images and logits."""
    from safetensors.numpy import load_file

    with tempfile.TemporaryDirectory() as folder:
        recorded = save(case, Path(folder))
        config = json.loads((Path(folder) / "config.json").read_text())
        tensors = load_file(Path(folder) / "model.safetensors")
    return {"config": config, "tensors": tensors} | recorded


def read_recorded(case: str) -> dict[str, Any]:
    """A case of the recorded file."""
    with np.load(PATH) as file:
        prefix = f"{case}/tensors/"
        tensors = {n.removeprefix(prefix): file[n] for n in file.files if n.startswith(prefix)}
        rest = {name: file[f"{case}/{name}"] for name in ("images", "logits")}
        return {"config": json.loads(str(file[f"{case}/config"])), "tensors": tensors} | rest


def write_folder(recorded: dict[str, Any], folder: Path) -> Path:
    """Writes a recorded model in Hugging Face's format."""
    from safetensors.numpy import save_file

    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(recorded["config"]))
    save_file(recorded["tensors"], folder / "model.safetensors")
    return folder


def main() -> None:
    """Writes the file."""
    arrays: dict[str, Any] = {}
    for case in CASES:
        recorded = record(case)
        arrays[f"{case}/config"] = json.dumps(recorded["config"])
        arrays[f"{case}/images"] = recorded["images"]
        arrays[f"{case}/logits"] = recorded["logits"]
        for name, tensor in recorded["tensors"].items():
            arrays[f"{case}/tensors/{name}"] = tensor.astype(np.float16)
    PATH.parent.mkdir(exist_ok=True)
    np.savez_compressed(PATH, **arrays)


if __name__ == "__main__":
    main()
