"""Text for a language model: documents, a held-out part, and windows of tokens."""

import gzip
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import downloads
import numpy as np
from errors import UserError
from tokenizers import Tokenizer

T = TypeVar("T")

HELD_OUT_EVERY = 10
"""One document in so many is held out: training never sees it."""


def load_documents(source: str | None) -> list[str]:
    """Wikipedia articles where `source` is None, else a text file (.gz too) or a hub dataset."""
    if source is None:
        return split_documents(downloads.read_member(downloads.WIKIPEDIA).decode())
    if Path(source).is_file():
        return split_documents(_read_text(Path(source)))
    if re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", source) and not Path(source).suffix:
        return _from_hub(source)
    raise UserError(
        f"--data {source}: there is no such file, and it is not a hub dataset "
        "(owner/name or owner/name:configuration)."
    )


def split_documents(text: str) -> list[str]:
    """Articles of a Wikipedia extract or of WikiText; else paragraphs between empty lines."""
    if "<doc id=" in text:
        parts = re.findall(r"<doc [^>]*>\n(.*?)\n*</doc>", text, flags=re.DOTALL)
    elif re.search(r"^ ?= [^=\n]+ = ?$", text, flags=re.MULTILINE):
        parts = re.split(r"^(?= ?= [^=\n]+ = ?$)", text, flags=re.MULTILINE)
    else:
        parts = re.split(r"\n\s*\n", text)
    return [part.strip() for part in parts if part.strip()]


def hold_out(documents: Sequence[T]) -> tuple[list[T], list[T]]:
    """Documents (or questions) to train on, and every tenth, held out: no document is in both.

    Every tenth rather than the last tenth, because collections are often sorted: the end of the
    Wikipedia articles consists of stubs, which are easier to predict than the rest.
    """
    if len(documents) < 2:
        raise UserError(
            "The data are a single document, so none can be held out: pass --eval-data, or "
            "separate the documents of a text by empty lines."
        )
    # Counted from the end of the first ten, so that few documents give a held-out one as well.
    offset = min(HELD_OUT_EVERY, len(documents)) - 1
    held_out = documents[offset::HELD_OUT_EVERY]
    train = [d for i, d in enumerate(documents) if (i - offset) % HELD_OUT_EVERY]
    return train, list(held_out)


def windows(tokenizer: Tokenizer, documents: Sequence[str], length: int, name: str) -> np.ndarray:
    """Consecutive windows of `length` predictions: int32 `(count, length + 1)`.

    A window's last token is the next one's first, so that each token is predicted once.
    """
    encodings = tokenizer.encode_batch(
        [document + "\n\n" for document in documents], add_special_tokens=False
    )
    tokens = np.concatenate([np.asarray(encoding.ids, np.int32) for encoding in encodings])
    count = (len(tokens) - 1) // length
    if count < 1:
        raise UserError(
            f"The {name} text has {len(tokens)} tokens, fewer than one window of {length} + 1: "
            "give more text or a smaller --seq-len."
        )
    starts = length * np.arange(count)
    return tokens[starts[:, None] + np.arange(length + 1)]


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(
            f"Cannot read {path} ({error}): plain UTF-8 text is expected, or text compressed by "
            "gzip in a file whose name ends in .gz."
        ) from error


def _from_hub(source: str) -> list[str]:
    name, _, configuration = source.partition(":")
    try:
        # Optional and large, so not among the extras: it may be missing where types are checked.
        from datasets import load_dataset  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"--data {source} is no file, and a hub dataset needs the datasets package: "
            "pip install datasets, or pass a text file."
        ) from error
    try:
        rows = load_dataset(name, configuration or None, split="train")["text"]
    except Exception as error:  # no network, no such dataset, no text column: one remedy
        raise UserError(
            f"Cannot fetch the dataset {source} ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}). It needs a train split with a text column; check "
            "the name and the network, or pass a text file."
        ) from error
    return [row for row in rows if row.strip()]
