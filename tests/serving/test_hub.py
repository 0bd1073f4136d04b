"""Model cards and uploads, against a stand-in of the hub that records what it receives."""

import sys
import types
from pathlib import Path

import numpy as np
import pytest

from loft_jax.adapters import (
    push_to_hub,
    save_gguf,
    save_merged,
    save_mlx,
    save_peft,
    write_model_card,
)

UP = {"lora_a": np.ones((8, 3), np.float32), "lora_b": np.ones((3, 4), np.float32)}
ADAPTER = {"layers": {"0": {"mlp": {"up_proj": UP}}}}
BASE = {"model_type": "llama", "num_attention_heads": 2, "num_hidden_layers": 1}
WEIGHTS = {"norm": {"scale": np.ones(600, np.float32)}, "lm_head": {"kernel": np.ones((600, 2))}}
SAVE = {
    "peft": lambda folder: save_peft(folder, ADAPTER, family="llama"),
    "mlx": lambda folder: save_mlx(folder, ADAPTER, family="llama"),
    "gguf": lambda folder: save_gguf(folder / "a.gguf", ADAPTER, family="llama", base=BASE),
    "transformers": lambda folder: save_merged(
        folder, WEIGHTS, family="llama", dtype="float32", max_shard_bytes=3000
    ),
}


@pytest.mark.parametrize("library", SAVE)
def test_the_card_tells_what_the_folder_is(tmp_path, library):
    SAVE[library](tmp_path)
    card = write_model_card(
        tmp_path, base_model="me/base: 1", repo_id="me/mine", description="For *tests*."
    )
    text = card.read_text()
    header = text.split("---\n")[1]
    assert 'base_model: "me/base: 1"\n' in header and f'library_name: "{library}"' in header
    assert "For *tests*." in text and "me/" in text.split("```")[1]
    with pytest.raises(FileExistsError, match="README.md exists. Pass overwrite=True"):
        write_model_card(tmp_path, base_model="me/base")
    write_model_card(tmp_path, base_model="me/other", overwrite=True)
    assert "me/other" in card.read_text()


@pytest.fixture
def hub(monkeypatch):
    """A stand-in of huggingface_hub: the calls it received, and whether it is offline."""
    calls: list[tuple[str, dict]] = []

    class HfApi:
        def __init__(self, token=None):
            calls.append(("login", {"token": token}))

        def create_repo(self, repo_id, **options):
            calls.append(("create_repo", {"repo_id": repo_id, **options}))

        def upload_folder(self, **options):
            files = {path.name for path in Path(options["folder_path"]).iterdir()}
            calls.append(("upload_folder", {**options, "files": files}))
            return types.SimpleNamespace(commit_url="https://hub/commit/1")

    module = types.ModuleType("huggingface_hub")
    module.HfApi = HfApi  # pyright: ignore[reportAttributeAccessIssue]
    module.constants = types.SimpleNamespace(HF_HUB_OFFLINE=False)  # pyright: ignore
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return types.SimpleNamespace(calls=calls, module=module)


def test_a_folder_is_uploaded_to_a_private_repository(tmp_path, hub):
    save_peft(tmp_path, ADAPTER, family="llama")
    with pytest.raises(ValueError, match="has no README.md. Write one with write_model_card"):
        push_to_hub(tmp_path, "me/mine")
    write_model_card(tmp_path, base_model="me/base")
    assert push_to_hub(tmp_path, "me/mine", message="First") == "https://hub/commit/1"
    login, create, upload = hub.calls
    assert login == ("login", {"token": None})
    assert create == ("create_repo", {"repo_id": "me/mine", "private": True, "exist_ok": True})
    assert upload[1]["commit_message"] == "First"
    files = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert upload[1]["files"] == files


def test_nothing_is_sent_offline_or_from_another_folder(tmp_path, hub, monkeypatch):
    with pytest.raises(ValueError, match="contains none of adapter_model.safetensors"):
        push_to_hub(tmp_path, "me/mine")
    save_peft(tmp_path, ADAPTER, family="llama")
    write_model_card(tmp_path, base_model="me/base")
    hub.module.constants.HF_HUB_OFFLINE = True
    with pytest.raises(ConnectionError, match="nothing was uploaded"):
        push_to_hub(tmp_path, "me/mine")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r'pip install "loft_jax\[hub\]"'):
        push_to_hub(tmp_path, "me/mine")
    assert hub.calls == []
