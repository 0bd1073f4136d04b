"""Trained models as folders that Hugging Face transformers loads (`--merge`)."""

import json
import tempfile
from pathlib import Path
from typing import Any

from flax import nnx

from loft_jax.adapters import Family, save_merged

from . import llama_weights, vit_weights
from .llama_config import LlamaConfig

_ARCHITECTURES = {"vit": "ViTForImageClassification", "dinov2": "Dinov2ForImageClassification"}


def save_language_model(path: Path, model: Any, pretrained: llama_weights.Pretrained) -> None:
    """Writes weights, configuration and tokenizer.

    Args:
        path: the folder.
        model: without adapters.
        pretrained: whose configuration and tokenizer are written.
    """
    if pretrained.folder is not None:
        _save(path, model, pretrained.family, pretrained.folder)
        return
    with tempfile.TemporaryDirectory() as folder:
        _write_files_of_gguf(pretrained, Path(folder))
        _save(path, model, pretrained.family, Path(folder))


def save_image_classifier(
    path: Path,
    model: Any,
    pretrained: vit_weights.Pretrained,
    image_size: int,
    classes: tuple[str, ...],
) -> None:
    """Writes weights, configuration and preprocessing.

    Args:
        path: the folder.
        model: without adapters.
        pretrained: whose configuration is written.
        image_size: height and width in pixels, to which images are resized.
        classes: the names of the outputs.
    """
    kind = pretrained.config.kind
    labels = {str(index): name for index, name in enumerate(classes)}
    config = {
        **pretrained.hf_config,
        "architectures": [_ARCHITECTURES[kind]],
        "image_size": image_size,
        "id2label": labels,
        "label2id": {name: int(index) for index, name in labels.items()},
    }
    if kind == "dinov2":
        config["use_mask_token"] = False  # for masked images only, so our model has none
    preprocessor = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": image_size, "width": image_size},
        "resample": 3,  # bicubic
        "image_mean": pretrained.config.image_mean,
        "image_std": pretrained.config.image_std,
    }
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder) / "config.json", config)
        _write(Path(folder) / "preprocessor_config.json", preprocessor)
        _save(path, model, pretrained.peft_family, Path(folder))


def _save(path: Path, model: Any, family: Family, base: Path) -> None:
    save_merged(path, nnx.state(model, nnx.Param), family=family, base=base)


def _write_files_of_gguf(pretrained: llama_weights.Pretrained, folder: Path) -> None:
    """config.json and the tokenizer of a model that came without them."""
    assert isinstance(pretrained.config, LlamaConfig)
    of_tokens, tokenizer = pretrained.tokenizer_config, pretrained.tokenizer
    ids = {f"{name}_id": tokenizer.token_to_id(text) for name, text in of_tokens.special.items()}
    _write(folder / "config.json", pretrained.config.to_hf() | ids)
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", **of_tokens.special}
    _write(folder / "tokenizer_config.json", described)
    if of_tokens.template is not None:
        (folder / "chat_template.jinja").write_text(of_tokens.template)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
