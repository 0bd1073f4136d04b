"""A tiny model and a tiny text for the examples."""

import json
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """Moves caches to the test's folder, and disables the hub and pip downloads."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A tiny random model in Hugging Face's format."""
    from safetensors.numpy import save_file

    from tests.examples.tiny_llama import CONFIG, byte_tokenizer, random_tensors

    folder = tmp_path_factory.mktemp("tiny-llama")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    save_file(random_tensors(), folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """Forty short paragraphs."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    rows = [f"Paragraph {n}: the {n * 37 % 101} thin thieves thought.\n\n" for n in range(40)]
    path.write_text("".join(rows))
    return path
