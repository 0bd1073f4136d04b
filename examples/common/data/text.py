"""Text for a language model: documents, windows of tokens, and the loss of the next token."""

import gzip
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from tokenizers import Tokenizer

from .. import downloads, losses
from ..batches import held_out_places
from ..errors import UserError

T = TypeVar("T")


def load_documents(source: str | None, flag: str = "--data") -> list[str]:
    """Wikipedia articles if `source` is None, else a text file (.gz too) or a hub dataset."""
    if source is None:
        return split_documents(downloads.read_member(downloads.WIKIPEDIA).decode())
    if Path(source).is_file():
        return split_documents(_read_text(Path(source)))
    if re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", source) and not Path(source).suffix:
        return _from_hub(source, flag)
    raise UserError(
        f"{flag} {source}: there is no such file, and it is not a hub dataset "
        "(owner/name or owner/name:configuration)."
    )


def split_documents(text: str) -> list[str]:
    """Splits a Wikipedia extract or WikiText into articles, other text at empty lines."""
    if "<doc id=" in text:
        parts = re.findall(r"<doc [^>]*>\n(.*?)\n*</doc>", text, flags=re.DOTALL)
    elif re.search(r"^ ?= [^=\n]+ = ?$", text, flags=re.MULTILINE):
        parts = re.split(r"^(?= ?= [^=\n]+ = ?$)", text, flags=re.MULTILINE)
    else:
        parts = re.split(r"\n\s*\n", text)
    return [part.strip() for part in parts if part.strip()]


def hold_out(documents: Sequence[T]) -> tuple[list[T], list[T]]:
    """Splits documents or questions into a training part and a held-out part."""
    if len(documents) < 2:
        raise UserError(
            "The data are a single document, so none can be held out: pass --eval-data, or "
            "separate the documents of a text by empty lines."
        )
    places = held_out_places(len(documents))
    train = [document for place, document in enumerate(documents) if place not in places]
    return train, [documents[place] for place in places]


def windows(tokenizer: Tokenizer, documents: Sequence[str], length: int, name: str) -> np.ndarray:
    """Consecutive windows of `length` predictions: int32 `(count, length + 1)`.

    The last token of a window is the first token of the next, so each token is predicted once.
    """
    encodings = tokenizer.encode_batch(
        [document + "\n\n" for document in documents], add_special_tokens=False
    )
    tokens = np.concatenate([np.asarray(encoding.ids, np.int32) for encoding in encodings])
    count = (len(tokens) - 1) // length
    if count < 1:
        raise UserError(
            f"The {name} text has {len(tokens)} tokens, fewer than one window of {length} + 1: "
            "use more text or a smaller --seq-len."
        )
    starts = length * np.arange(count)
    return tokens[starts[:, None] + np.arange(length + 1)]


def token_losses(model: Any, windows: jax.Array) -> jax.Array:
    """The loss of each predicted token in nats: ids `(n, length + 1)` to float32 `(n, length)`."""
    return losses.token_losses(model, windows[:, :-1], windows[:, 1:])


def next_token_loss(model: Any, windows: jax.Array) -> jax.Array:
    """Mean loss per token of each window: ids `(n, length + 1)` to float32 `(n,)`."""
    return token_losses(model, windows).mean(axis=-1)


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(
            f"Cannot read {path} ({error}): pass UTF-8 text, plain or compressed by gzip in a "
            "file named *.gz."
        ) from error


def _from_hub(source: str, flag: str) -> list[str]:
    name, _, configuration = source.partition(":")
    try:
        # The package is large and not part of the extras, so a type checker may not find it.
        from datasets import load_dataset  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"{flag} {source} is not a file, and a hub dataset needs the datasets package: "
            "pip install datasets, or pass a text file."
        ) from error
    try:
        rows = load_dataset(name, configuration or None, split="train")["text"]
    except Exception as error:  # no network, no dataset, no text column: one message for all
        raise UserError(
            f"Cannot fetch the dataset {source} ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}). It needs a train split with a text column; check "
            "the name and the network, or pass a text file."
        ) from error
    return [row for row in rows if row.strip()]
