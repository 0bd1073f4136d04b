"""The frozen base of a run, by name and checksums."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from loft_jax.checkpoint._leaves import LeafRecord, named_leaves, records


@dataclasses.dataclass(frozen=True)
class BaseReference:
    """Says which frozen weights an adapter belongs to. Made by `base_reference`.

    Attributes:
      name: what the weights are called, such as a repository and its revision.
      leaves: shape, dtype and digest of each weight by its path.
    """

    name: str
    leaves: Mapping[str, LeafRecord]

    @property
    def checksum(self) -> str:
        """One checksum of all weights, 16 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.to_json()["leaves"]).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """As `from_json` reads it."""
        leaves = {path: self.leaves[path].to_json() for path in sorted(self.leaves)}
        return {"name": self.name, "leaves": leaves}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "BaseReference":
        """The inverse of `to_json`."""
        leaves = {path: LeafRecord.from_json(leaf) for path, leaf in value["leaves"].items()}
        return BaseReference(value["name"], leaves)


def base_reference(name: str, params: Any) -> BaseReference:
    """Describes frozen weights so that a checkpoint can tell them from others.

    Args:
      name: what the weights are called.
      params: a pytree of arrays: the base as it is loaded, quantized if it is, on any mesh. In a
        run of several processes all call this together.

    Raises:
      ValueError: two leaves with the same path.
      TypeError: a leaf that is no array.

    Example:
      >>> import jax.numpy as jnp
      >>> base_reference("tiny", {"w": jnp.ones((2, 3))}).leaves["w"]
      LeafRecord(shape=(2, 3), dtype='float32', digest='46c7ed5b99a1a44d', key=None)
    """
    leaves, impls = named_leaves(params, "base")
    return BaseReference(name, records(leaves, impls))


def base_differences(saved: BaseReference | None, wanted: BaseReference) -> list[str]:
    """What differs between two bases, in words; empty if nothing does."""
    if saved is None:
        return ["it was saved without one: if all is well, open the folder without one"]
    lines = []
    if saved.name != wanted.name:
        lines.append(f"name: {saved.name!r} saved, {wanted.name!r} wanted")
    for path in sorted({*saved.leaves, *wanted.leaves}):
        old, new = saved.leaves.get(path), wanted.leaves.get(path)
        if old is None or new is None:
            lines.append(f"{path}: not in {'the saved' if old is None else 'this'} base")
            continue
        for field in ("shape", "dtype", "digest"):
            if getattr(old, field) != getattr(new, field):
                label = "checksum" if field == "digest" else field
                lines.append(
                    f"{path}: {label} {getattr(old, field)} saved, {getattr(new, field)} wanted"
                )
                break
    return lines
