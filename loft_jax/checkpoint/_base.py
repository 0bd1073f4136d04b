"""References to the frozen base of a run, by name and checksums."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from loft_jax.checkpoint._leaves import LeafRecord, named_leaves, records


@dataclasses.dataclass(frozen=True)
class BaseReference:
    """Identifies the frozen weights that an adapter belongs to. Create it with `base_reference`.

    Attributes:
      name: name of the weights, such as a repository and its revision.
      leaves: shape, dtype and digest of each weight, by path.
    """

    name: str
    leaves: Mapping[str, LeafRecord]

    @property
    def checksum(self) -> str:
        """One checksum of all weights, 16 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.to_json()["leaves"]).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object that `from_json` reads."""
        leaves = {path: self.leaves[path].to_json() for path in sorted(self.leaves)}
        return {"name": self.name, "leaves": leaves}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "BaseReference":
        """Inverse of `to_json`."""
        leaves = {path: LeafRecord.from_json(leaf) for path, leaf in value["leaves"].items()}
        return BaseReference(value["name"], leaves)


def base_reference(name: str, params: Any) -> BaseReference:
    """Computes a reference to frozen weights, which checkpoints record and compare.

    Args:
      name: name of the weights, such as a repository and its revision.
      params: a pytree of arrays: the base as loaded (quantized or not), on any mesh. In a
        multi-process run, all processes must call this function together.

    Returns:
      The reference. Pass it as ``base`` to `Checkpoints`.

    Raises:
      ValueError: two leaves have the same path.
      TypeError: a leaf is not an array or a number.

    Example:
      >>> import jax.numpy as jnp
      >>> base_reference("tiny", {"w": jnp.ones((2, 3))}).leaves["w"]
      LeafRecord(shape=(2, 3), dtype='float32', digest='46c7ed5b99a1a44d', key=None)
    """
    leaves, impls = named_leaves(params, "base", stored=False)
    return BaseReference(name, records(leaves, impls))


def base_differences(saved: BaseReference | None, wanted: BaseReference) -> list[str]:
    """Returns the differences between two bases, one line each."""
    if saved is None:
        return ["it was saved without base=; to skip the comparison, open the folder without base="]
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
