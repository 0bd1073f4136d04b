"""Checks that every public name has an entry in the API reference, and a complete docstring.

Each problem is a warning, which fails the build (``sphinx-build -W``).
"""

import importlib
import inspect
from collections.abc import Iterator
from typing import Any

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

MODULES = (
    "loft_jax",
    "loft_jax.adapters",
    "loft_jax.baselines",
    "loft_jax.checkpoint",
    "loft_jax.sharding",
)
logger = logging.getLogger(__name__)


def public_names(module: str) -> Iterator[tuple[str, Any]]:
    """Yields the public names of a module, without its submodules, and what they name."""
    found = importlib.import_module(module)
    for name in getattr(found, "__all__", sorted(vars(found))):
        value = getattr(found, name)
        if not name.startswith("_") and not inspect.ismodule(value):
            yield name, value


def missing_sections(value: Any) -> list[str]:
    """Returns the sections that the docstring of a function or class lacks."""
    doc = inspect.getdoc(value) or ""
    if not doc:
        return ["a docstring"]
    wanted = ["Example:"]
    if inspect.isclass(value):
        # Records and exceptions need no example: the functions that return them show one.
        is_record = "Attributes:" in doc or issubclass(value, BaseException)
        needs_args = not is_record and inspect.signature(value).parameters
        wanted = [] if is_record else ["Example:", *(["Args:"] if needs_args else [])]
    elif inspect.isfunction(value):
        signature = inspect.signature(value)
        wanted += ["Args:"] if signature.parameters else []
        wanted += ["Returns:"] if signature.return_annotation is not None else []
        wanted += ["Raises:"]
    return [section for section in wanted if section not in doc]


def check(app: Sphinx, env: BuildEnvironment) -> None:
    documented = {name for name, *_ in env.domains["py"].get_objects()}
    for module in MODULES:
        for name, value in public_names(module):
            if f"{module}.{name}" not in documented:
                logger.warning("%s.%s is public but not in the API reference", module, name)
            if callable(value):
                for section in missing_sections(value):
                    logger.warning("the docstring of %s.%s lacks %s", module, name, section)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("env-check-consistency", check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
