"""Settings in a file, for `--config`: TOML or JSON with a value for each flag.

    rank = 16
    learning-rate = 1e-3
    targets = ["q", "v"]
    remat = true

The `settings.json` of a run is such a file too.
"""

import argparse
import dataclasses
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import UserError


def read_config(path: Path, parser: argparse.ArgumentParser, kind: type) -> dict[str, Any]:
    """The settings in a file, checked as the flags of the same names are.

    Args:
        path: of a TOML file (`.toml`), or of a JSON file.
        parser: of the flags; the default of all of them is `argparse.SUPPRESS`.
        kind: a dataclass whose fields are the settings.

    Raises:
        UserError: the file cannot be read, or has a setting that is unknown or not allowed.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    values = {name.replace("-", "_"): value for name, value in _read(path).items()}
    if unknown := [name for name in values if name not in defaults]:
        raise UserError(
            f"--config {path}: {unknown[0]!r} is no setting of this script. Its settings are the "
            "flags that --help lists, without --config, --output and --resume."
        )
    parser.exit_on_error = False
    try:
        return vars(parser.parse_args(_as_flags(values, defaults)))
    except argparse.ArgumentError as error:
        raise UserError(f"--config {path}: {error}.") from error
    finally:
        parser.exit_on_error = True


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
        content = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (OSError, ValueError) as error:
        raise UserError(
            f"Cannot use --config {path} ({error}): pass a TOML file, or a JSON file such as the "
            "settings.json of a run."
        ) from error
    if isinstance(content, dict):
        content = content.get("settings", content)  # that of a run has more
    if not isinstance(content, dict):
        raise UserError(f"--config {path} does not contain an object with the settings.")
    return content


def _as_flags(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """The command line that gives the values that are not the default."""
    flags = []
    for name, value in values.items():
        default, flag = defaults[name], name.replace("_", "-")
        if value is None or value == default or (value == [] and default == ()):
            continue
        if isinstance(default, bool) and isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            text = ",".join(map(str, value)) if isinstance(value, list) else value
            flags.append(f"--{flag}={text}")
    return flags
