"""Reads a file, or a data set of the Hugging Face hub, as records or as plain text.

JSON, JSON Lines, Parquet and gzip are recognized by their content, not by the name of the file.
"""

import dataclasses
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError

_JSON_NAMES = (".json", ".jsonl", ".ndjson")
_TABLE_NAMES = (".csv", ".tsv", ".xlsx")
_FILE_NAMES = (*_JSON_NAMES, *_TABLE_NAMES, ".txt", ".gz", ".parquet")
"""Names that are files, not hub datasets."""

_HUB_ID = r"[\w.-]+/[\w.-]+(:[\w.-]*){0,2}"


@dataclasses.dataclass(frozen=True)
class Record:
    """One row of a data set: its named fields, and its place for error messages."""

    where: str
    fields: Mapping[str, Any]


def read(source: str, flag: str = "--data") -> str | list[Record]:
    """The records of a file or hub data set, or the text of a plain text file.

    Args:
        source: a path, or `owner/name`, `owner/name:configuration` or
            `owner/name:configuration:split` for a data set of the hub.
        flag: the flag that gave the source, for error messages.
    """
    path = Path(source)
    if path.is_file():
        return read_file(path)
    if re.fullmatch(_HUB_ID, source) and path.suffix not in _FILE_NAMES:
        return _read_hub(source, flag)
    raise UserError(
        f"{flag} {source}: there is no such file, and it is not a hub dataset "
        "(owner/name, owner/name:configuration or owner/name:configuration:split)."
    )


def set_name(source: str) -> str:
    """The name of a test set.

    'boolq' for data/boolq/test.json, 'gsm8k' for gsm8k.jsonl, 'sketch' for the folder test/sketch,
    and the id of a hub dataset.
    """
    path = Path(source)
    if path.is_dir():
        return path.resolve().name
    if not path.is_file():
        return source
    stem = path.name.split(".")[0]
    return path.resolve().parent.name if stem in ("test", "validation", "dev") else stem


def read_file(path: Path) -> str | list[Record]:
    """The records of a JSON, JSON Lines or Parquet file, else its text; gzip is unpacked."""
    if path.suffix in _TABLE_NAMES:
        raise UserError(
            f"{path} is a table, which is not supported: convert it to JSON Lines, for example "
            "with pandas' read_csv(...).to_json(..., orient='records', lines=True)."
        )
    try:
        data = path.read_bytes()
        if data.startswith(b"PAR1"):
            return _read_parquet(path)
        if data.startswith(b"\x1f\x8b") or path.suffix == ".gz":
            data = gzip.decompress(data)
        text = data.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(
            f"Cannot read {path} ({error}): pass UTF-8 text, JSON or JSON Lines, plain or "
            "compressed by gzip, or Parquet."
        ) from error
    name = path.with_suffix("") if path.suffix == ".gz" else path
    is_json = name.suffix in _JSON_NAMES or re.match(r'\s*(\[\s*)?\{\s*["}]', text)
    return _json_records(text, path) if is_json else text


def _json_records(text: str, path: Path) -> list[Record]:
    """The objects of a JSON array, of JSON Lines, or of one list in a single object."""
    records = []
    for line, value in _json_values(text, path):
        where = f"{path}, line {line}"
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected an object with named fields, found {value!r:.80}.")
        records.append(Record(where, value))
    if len(records) == 1:
        # {"version": "1.0", "data": [{...}, {...}]}
        lists = {
            name: value
            for name, value in records[0].fields.items()
            if isinstance(value, list) and value and all(isinstance(row, dict) for row in value)
        }
        if len(lists) == 1 and not lists.keys() & {"messages", "conversations"}:
            ((name, rows),) = lists.items()
            records = [Record(f"{path}, {name}[{index}]", row) for index, row in enumerate(rows)]
    if not records:
        raise UserError(f"{path} contains no records.")
    return records


def _json_values(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """The values of a JSON array, or those that follow each other, each with its line."""
    decode = json.JSONDecoder().raw_decode
    place = _skip_space(text, 0)
    array = text.startswith("[", place)
    place = _skip_space(text, place + 1) if array else place
    line, counted = 1, 0
    while place < len(text) and not (array and text[place] == "]"):
        line, counted = line + text.count("\n", counted, place), place
        try:
            value, place = decode(text, place)
        except json.JSONDecodeError as error:
            raise UserError(
                f"Cannot read {path}, line {error.lineno}: it is not valid JSON ({error.msg})."
            ) from error
        yield line, value
        place = _skip_space(text, place)
        if array and text.startswith(",", place):
            place = _skip_space(text, place + 1)
        elif array and not text.startswith("]", place):
            line += text.count("\n", counted, place)
            raise UserError(f"Cannot read {path}, line {line}: expected , or ] in the JSON array.")
    if array and place >= len(text):
        raise UserError(f"Cannot read {path}: its JSON array has no end; the file is truncated.")


def _skip_space(text: str, place: int) -> int:
    """The next place that is not white space."""
    while place < len(text) and text[place].isspace():
        place += 1
    return place


def _read_parquet(path: Path) -> list[Record]:
    try:
        # The package is large and not part of the extras, so a type checker may not find it.
        from pyarrow import ArrowException, parquet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(f"{path} is a Parquet file: pip install pyarrow to read it.") from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except ArrowException as error:
        raise UserError(f"Cannot read {path}: {error}. Fetch it again.") from error
    if not rows:
        raise UserError(f"{path} contains no records.")
    return [Record(f"{path}, row {index}", row) for index, row in enumerate(rows)]


def _read_hub(source: str, flag: str) -> list[Record]:
    name, configuration, split = [*source.split(":"), "", ""][:3]
    split = split or "train"
    try:
        # The package is large and not part of the extras, so a type checker may not find it.
        from datasets import load_dataset  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"{flag} {source} is not a file, and a hub dataset needs the datasets package: "
            "pip install datasets, or pass a file."
        ) from error
    try:
        rows = list(load_dataset(name, configuration or None, split=split))
    except Exception as error:  # no network, no dataset, no such split: one message for all
        raise UserError(
            f"Cannot fetch the {split} split of the dataset {source} ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}). Check the name and the network, or pass a file."
        ) from error
    return [Record(f"{source}, row {index}", row) for index, row in enumerate(rows)]
