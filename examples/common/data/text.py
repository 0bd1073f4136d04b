"""Text for a language model: documents, windows of tokens, and the loss of the next token."""

import re
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from tokenizers import Tokenizer

from .. import downloads, losses
from ..batches import held_out_places
from ..errors import UserError
from . import forms, sources
from .sources import Record

T = TypeVar("T")


def load_documents(source: str | None, flag: str = "--data") -> list[str]:
    """Wikipedia articles if `source` is None, else those of a file or a hub dataset."""
    return documents(wikipedia() if source is None else sources.read(source, flag))


def wikipedia() -> str:
    """2 MB of English Wikipedia articles, downloaded once."""
    return downloads.read_member(downloads.WIKIPEDIA).decode()


def documents(content: str | Sequence[Record]) -> list[str]:
    """The documents in a text, or those in the field `text` of records, which are not split."""
    if isinstance(content, str):
        return split_documents(content)
    texts = (forms.document(record).strip() for record in content)
    return [text for text in texts if text]


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
