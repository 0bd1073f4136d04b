"""What a checkpoint says of itself: one JSON object, committed together with the arrays."""

import base64
import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import loft_jax
from loft_jax.checkpoint._base import BaseReference
from loft_jax.checkpoint._leaves import LeafRecord

FORMAT = 1


class NotWhole(Exception):
    """A record is no valid one."""


@dataclasses.dataclass(frozen=True)
class Record:
    """Everything of a checkpoint but the arrays.

    Attributes:
      step: number of updates made.
      items: for each item ("adapter", "opt_state", "key") its arrays by path.
      data: position in the data.
      metrics: by name.
      base: the frozen base, None if none was named.
      version: of the package that wrote it.
    """

    step: int
    items: Mapping[str, Mapping[str, LeafRecord]]
    data: Any = None
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    base: BaseReference | None = None
    version: str = loft_jax.__version__

    def to_json(self) -> dict[str, Any]:
        """As `parse` reads it."""
        content = {
            "format": FORMAT,
            "loft_jax": self.version,
            "step": self.step,
            "data": encode_data(self.data),
            "metrics": dict(self.metrics),
            "base": None if self.base is None else self.base.to_json(),
            "items": {
                item: {path: leaf.to_json() for path, leaf in leaves.items()}
                for item, leaves in self.items.items()
            },
        }
        return {"content": content, "sha256": _checksum(content)}


def parse(text: str, step: int) -> Record:
    """Reads a record.

    Raises:
      NotWhole: it is not what `Record.to_json` made for that step.
      ValueError: a later version of this package wrote it.
    """
    try:
        whole = json.loads(text)
        content = whole["content"]
        if whole["sha256"] != _checksum(content):
            raise NotWhole("its record (meta) does not match its own checksum")
        if content["format"] > FORMAT:
            raise ValueError(
                f"written in format {content['format']} by loft_jax {content['loft_jax']}; this "
                f"version reads up to format {FORMAT}: update loft_jax"
            )
        if content["step"] != step:
            raise NotWhole(f"its record (meta) is that of step {content['step']}")
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise NotWhole(f"its record (meta) is not readable: {error}") from error
    base = content["base"]
    return Record(
        step,
        {
            item: {path: LeafRecord.from_json(leaf) for path, leaf in leaves.items()}
            for item, leaves in content["items"].items()
        },
        decode_data(content["data"]),
        content["metrics"],
        None if base is None else BaseReference.from_json(base),
        content["loft_jax"],
    )


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def encode_data(data: Any) -> dict[str, Any]:
    """The position in the data for JSON.

    Raises:
      TypeError: it is neither bytes nor what JSON gives back unchanged (tuples become lists).
    """
    if isinstance(data, bytes):
        return {"bytes": base64.b64encode(data).decode()}
    copy, same = None, False
    with contextlib.suppress(TypeError, ValueError):
        copy = json.loads(json.dumps(data, allow_nan=False))
        same = copy == data
    if not same:
        raise TypeError(
            f"data must be bytes, or numbers, strings, lists and dicts with string keys (no "
            f"tuples, arrays or NaN), got {data!r}"
        )
    return {"json": copy}  # The caller's may have moved on before the background has written it.


def decode_data(value: Mapping[str, Any]) -> Any:
    """The inverse of `encode_data`."""
    return base64.b64decode(value["bytes"]) if "bytes" in value else value["json"]
