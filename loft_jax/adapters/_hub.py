"""Writes model cards and uploads what the exporters have written to the Hugging Face hub."""

import json
import os
from pathlib import Path
from typing import Any

from loft_jax.adapters import _merged, _mlx, _peft_load

# The library of the hub by a file that only its folders have, and how a reader loads the folder.
_FORMATS = {
    _peft_load.WEIGHTS: (
        "peft",
        "from peft import AutoPeftModelForCausalLM\n\n"
        'model = AutoPeftModelForCausalLM.from_pretrained("{repo_id}")',
    ),
    _mlx.WEIGHTS: (
        "mlx",
        "from mlx_lm import load\n\n"
        'model, tokenizer = load("{base_model}", adapter_path="path to this folder")',
    ),
    _merged.WEIGHTS: (
        "transformers",
        "from transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("{repo_id}")',
    ),
}
_GGUF = "llama-cli -m {base_model}.gguf --lora {file} -p 'Once upon a time'"


def write_model_card(
    folder: str | os.PathLike[str],
    *,
    base_model: str,
    repo_id: str = "owner/name",
    description: str = "",
    overwrite: bool = False,
) -> Path:
    """Writes README.md with the metadata that the hub shows, and how to load the folder.

    Args:
      folder: written by `save_peft`, `save_mlx`, `save_gguf` or `save_merged`.
      base_model: the hub id of the base model.
      repo_id: the hub id of this folder, for the example in the card.
      description: what the model was trained for, as Markdown.
      overwrite: whether to replace a README.md that exists.

    Returns:
      The file.

    Raises:
      FileExistsError: there is a README.md and `overwrite` is false.
      ValueError: the folder contains nothing that the exporters write.

    Example:
      >>> import tempfile
      >>> import numpy as np
      >>> from loft_jax.adapters import save_peft
      >>> up = {"lora_a": np.ones((6, 3)), "lora_b": np.ones((3, 4))}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _ = save_peft(folder, {"layers": {"0": {"mlp": {"up_proj": up}}}}, family="llama")
      ...     card = write_model_card(folder, base_model="me/base", repo_id="me/mine")
      ...     print(card.read_text().split("---")[1].strip())
      base_model: "me/base"
      base_model_relation: "adapter"
      library_name: "peft"
      tags: ["lora", "loft"]
    """
    folder = Path(folder)
    library, example = _format_of(folder)
    card = folder / "README.md"
    if card.exists() and not overwrite:
        raise FileExistsError(f"{card} exists. Pass overwrite=True to replace it")
    metadata = {
        "base_model": base_model,
        "base_model_relation": "finetune" if library == "transformers" else "adapter",
        "library_name": library,
        "tags": ["loft"] if library == "transformers" else ["lora", "loft"],
    }
    # JSON is YAML, and quotes what YAML would read as something else.
    header = "\n".join(f"{key}: {json.dumps(value)}" for key, value in metadata.items())
    language = "bash" if library == "gguf" else "python"
    example = example.format(base_model=base_model, repo_id=repo_id)
    kind = "Merged weights" if library == "transformers" else "An adapter"
    text = (
        f"---\n{header}\n---\n\n# {repo_id}\n\n{kind} of `{base_model}`, trained with LoFT "
        f"(arXiv:2505.21289).\n\n{description and description + chr(10) * 2}"
        f"```{language}\n{example}\n```\n"
    )
    card.write_text(text, encoding="utf-8")
    return card


def push_to_hub(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = True,
    token: str | None = None,
    message: str = "Upload the model",
) -> str:
    """Uploads a folder to the Hugging Face hub. Nothing is sent before all checks have passed.

    Args:
      folder: written by `save_peft`, `save_mlx`, `save_gguf` or `save_merged`.
      repo_id: the repository, ``owner/name``, which is created if necessary.
      private: whether a new repository is private.
      token: of the hub; None uses the one that ``hf auth login`` has stored.
      message: of the commit.

    Returns:
      The address of the commit.

    Raises:
      ValueError: the folder contains nothing that the exporters write, or no README.md.
      ConnectionError: the hub is offline (``HF_HUB_OFFLINE``). The folder is unchanged.
      ImportError: huggingface_hub is not installed.

    Example:
      >>> push_to_hub("out", "me/my-adapter")  # doctest: +SKIP
      'https://huggingface.co/me/my-adapter/commit/...'
    """
    folder = Path(folder)
    _format_of(folder)
    if not (folder / "README.md").is_file():
        raise ValueError(f"{folder} has no README.md. Write one with write_model_card")
    hub = _import_hub()
    if hub.constants.HF_HUB_OFFLINE:
        raise ConnectionError(
            f"HF_HUB_OFFLINE is set, so nothing was uploaded. {folder} is complete; upload it "
            "later with push_to_hub"
        )
    api = hub.HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=str(folder),
        commit_message=message,
        ignore_patterns=[".*"],  # temporary folders of a save that was killed
    )
    return str(commit.commit_url)


def _format_of(folder: Path) -> tuple[str, str]:
    """Returns the library and the example of a folder."""
    for file, (library, example) in _FORMATS.items():
        if (folder / file).is_file():
            return library, example
    if (folder / _merged.INDEX).is_file():
        return _FORMATS[_merged.WEIGHTS]
    if files := sorted(folder.glob("*.gguf")):
        return "gguf", _GGUF.replace("{file}", files[0].name)
    raise ValueError(
        f"{folder} contains none of {', '.join(_FORMATS)} and no *.gguf. Pass a folder of "
        "save_peft, save_mlx, save_gguf or save_merged"
    )


def _import_hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            'huggingface_hub is not installed: pip install "loft_jax[hub]"'
        ) from error
    return huggingface_hub
