"""Rows of a task's test set: a JSONL file, a set that TFDS prepared, or one of a hub; nothing is downloaded unasked."""

import gzip
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from etils import epath

from iha_jax.evaluation.tasks import Options

Row = dict[str, Any]
T = TypeVar("T")
Located = tuple[str, Row]  # where a row is, for messages
SPLIT = "test"


def rows_of(
    task: str,
    options: Options,
    fields: Sequence[str | tuple[str, ...]],
    parse: Callable[[Row], T],
    *,
    hub: str,
    select: Callable[[Sequence[Located]], Sequence[Located]] = list,
) -> list[T]:
    """The first `options.limit` rows of those that `select` leaves of `options.data[task]`, checked and parsed.

    A place is a `.jsonl` or `.jsonl.gz` file (local or a bucket's), `hub:owner/name[:config]` (the `datasets` library),
    or else a TFDS name or a folder that TFDS prepared. A field given as a tuple is any one of these.

    Raises:
      ValueError: naming task, place and field, or the line of a file, of what is missing or malformed; also what
        `parse` raises.
    """
    limit = checked_limit(options)
    place = options.data.get(task)
    if place is None:
        raise ValueError(
            f"task {task}: no data. Expected for it a .jsonl file with fields {_names(fields)}, a TFDS name, "
            f"or {hub} (downloads; needs the library 'datasets')"
        )
    if place.endswith((".jsonl", ".jsonl.gz")):
        rows = _read_jsonl(task, place)
    elif place.startswith("hub:"):
        rows = _read_hub(task, place)
    else:
        rows = _read_tfds(task, place)
    if not rows:
        raise ValueError(f"task {task}: {place} holds no example")
    parsed = []
    for where, row in select(rows)[:limit]:
        for field in fields:
            choices = (field,) if isinstance(field, str) else field
            if not any(row.get(name) is not None for name in choices):
                raise ValueError(
                    f"task {task}: {where} has no field {' or '.join(map(repr, choices))}; it has {sorted(row)}"
                )
        try:
            parsed.append(parse(row))
        except ValueError as error:
            raise ValueError(f"task {task}: {where}: {error}") from error
    return parsed


def checked_limit(options: Options) -> int | None:
    """`options.limit`. Raises ValueError for one that leaves nothing."""
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"limit = {options.limit}: expected at least 1")
    return options.limit


def _names(fields: Sequence[str | tuple[str, ...]]) -> str:
    return ", ".join(field if isinstance(field, str) else " or ".join(field) for field in fields)


def _read_jsonl(task: str, place: str) -> list[Located]:
    path = epath.Path(place).expanduser()
    if not path.exists():
        raise ValueError(f"task {task}: no file {place}")
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if place.endswith(".gz") else raw).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"task {task}: {place} cannot be read as UTF-8 lines: {error}") from error
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON may hold U+2028
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"task {task}: {place}, line {number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"task {task}: {place}, line {number}: expected an object, found {type(row).__name__}")
        rows.append((f"{place}, line {number}", row))
    return rows


def _read_hub(task: str, place: str) -> list[Located]:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"task {task}: {place} needs the library 'datasets': pip install datasets") from error
    name, _, config = place.removeprefix("hub:").partition(":")
    try:
        found: Any = datasets.load_dataset(name, config or None, split=SPLIT)
    except Exception as error:  # whatever the hub, the network or the library raises
        raise ValueError(f"task {task}: {place}, split {SPLIT!r}, cannot be read: {error}") from error
    return [(f"{place}, example {i}", dict(row)) for i, row in enumerate(found)]


def _read_tfds(task: str, place: str) -> list[Located]:
    from iha_jax.data.text import open_builder

    try:
        builder = open_builder(place)
        found = builder.as_data_source(SPLIT)
    except Exception as error:  # TFDS raises many kinds for a set that is not there, not prepared or without the split
        raise ValueError(f"task {task}: {place}, split {SPLIT!r}, cannot be read with TFDS: {error}") from error
    return [(f"{place}, example {i}", {k: _plain(v) for k, v in found[i].items()}) for i in range(len(found))]


def _plain(value: Any) -> Any:
    """TFDS's bytes and arrays as text and lists."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
