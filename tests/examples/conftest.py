"""Puts the examples on the path, and makes a tiny model and a tiny text for them."""

import json
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1] / "examples"), str(HERE)]


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """Caches go to the test's own folder; the hub and pip's downloads are out of reach."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A tiny random model as Hugging Face lays it out."""
    from safetensors.numpy import save_file
    from tiny_llama import CONFIG, byte_tokenizer, random_tensors

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
