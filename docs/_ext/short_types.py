"""Writes long types in signatures by the names that JAX and Optax give them."""

from typing import Any

import jax
import optax
from sphinx.application import Sphinx
from sphinx.util.typing import stringify_annotation

ALIASES = {
    "optax.ScalarOrSchedule": optax.ScalarOrSchedule,
    "DTypeLike": jax.typing.DTypeLike,
    "optax.Params": optax.Params,
}


def shorten(
    app: Sphinx, what: str, name: str, value: Any, options: Any, signature: str, result: str
) -> tuple[str, str] | None:
    if not signature:
        return None
    for alias, annotation in ALIASES.items():
        for mode in ("smart", "fully-qualified-except-typing"):
            signature = signature.replace(stringify_annotation(annotation, mode), alias)
    return signature, result


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-signature", shorten)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
