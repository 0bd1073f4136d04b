"""The record of a checkpoint: one JSON object, committed together with the arrays."""

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

# Format 1 did not have the options.
FORMAT = 2


class Damaged(Exception):
    """A checkpoint is damaged. The message says how."""


@dataclasses.dataclass(frozen=True)
class Record:
    """Everything in a checkpoint except the arrays.

    Attributes:
      step: number of updates made.
      items: the arrays of each item ("adapter", "opt_state", "key"), by path.
      options: the options of each item by path, see `options_by_path`; None in format 1.
      data: position in the data.
      metrics: by name.
      base: the frozen base; None if the run did not specify one.
      version: version of the package that wrote the checkpoint.
      scales: of the adapter's pairs by path, as far as known, see `known_scales`.
    """

    step: int
    items: Mapping[str, Mapping[str, LeafRecord]]
    options: Mapping[str, Mapping[str, str]] | None
    data: Any = None
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    base: BaseReference | None = None
    version: str = loft_jax.__version__
    scales: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object that `parse` reads."""
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
            "options": self.options,
            "scales": dict(self.scales),
        }
        return {"content": content, "sha256": _checksum(content)}


def parse(text: str, step: int) -> Record:
    """Parses and verifies a record.

    Raises:
      Damaged: the text is not what `Record.to_json` returned for that step.
      ValueError: a later version of this package wrote the record.
    """
    try:
        whole = json.loads(text)
        content = whole["content"]
        if whole["sha256"] != _checksum(content):
            raise Damaged("its record (meta) does not match its checksum")
        if content["format"] > FORMAT:
            raise ValueError(
                f"written in format {content['format']} by loft_jax {content['loft_jax']}. This "
                f"version reads up to format {FORMAT}: update loft_jax."
            )
        if content["step"] != step:
            raise Damaged(f"its record (meta) belongs to step {content['step']}")
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"its record (meta) is unreadable: {error}") from error
    base = content["base"]
    return Record(
        step,
        {
            item: {path: LeafRecord.from_json(leaf) for path, leaf in leaves.items()}
            for item, leaves in content["items"].items()
        },
        content.get("options"),
        decode_data(content["data"]),
        content["metrics"],
        None if base is None else BaseReference.from_json(base),
        content["loft_jax"],
        content.get("scales", {}),  # earlier versions did not record them
    )


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def encode_data(data: Any) -> dict[str, Any]:
    """Encodes the position in the data as JSON.

    Raises:
      TypeError: the position is neither bytes nor unchanged by JSON (tuples become lists).
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
    return {"json": copy}  # a copy: the caller may change the original before it is written


def decode_data(value: Mapping[str, Any]) -> Any:
    """Inverse of `encode_data`."""
    return base64.b64decode(value["bytes"]) if "bytes" in value else value["json"]
