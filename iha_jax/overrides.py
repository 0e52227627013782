"""Lists of overrides, what a config file's `get_sweep()` returns, and the directories that such runs are kept in.

An override maps dotted names of a config to values, and `arm` to one of the file's arms:

    def get_sweep():
        rates = grid({"arm": ARMS, "optimizer.learning_rate": (3e-3, 1e-2)})
        shapes = zipped({"model.width": (64, 96), "model.mlp_width": (256, 384)})
        return product(rates, grid({"seed": range(3)})) + shapes

They are plain lists of dictionaries: `+` joins two, a comprehension filters one.
"""

import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Override = dict[str, Any]
_SHORT = {"optimizer.learning_rate": "lr"}  # lr0.003 instead of optimizer.learning_rate=0.003
_LONGEST = 120  # characters of a name; file systems take 255 bytes


def grid(values: Mapping[str, Iterable[Any]]) -> list[Override]:
    """Every combination of the values of each key; the last key varies fastest."""
    columns = _columns("grid", values)
    return [dict(zip(columns, combination, strict=True)) for combination in itertools.product(*columns.values())]


def zipped(values: Mapping[str, Iterable[Any]]) -> list[Override]:
    """The first value of every key, then the second of every key, and so on. Raises ValueError for unequal lengths."""
    columns = _columns("zipped", values)
    lengths = {key: len(column) for key, column in columns.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{key}: {length}" for key, length in lengths.items())
        raise ValueError(f"zipped: expected as many values of each key, found {listed}")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def product(*lists: Sequence[Override]) -> list[Override]:
    """Each override of the first list together with each of the next; the last list varies fastest.

    Raises:
      ValueError: when two lists set the same key.
    """
    joined: list[Override] = []
    for parts in itertools.product(*lists):
        keys = [key for part in parts for key in part]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise ValueError(f"product: {twice} is set by two of the lists")
        joined.append({key: value for part in parts for key, value in part.items()})
    return joined


def as_text(value: Any) -> str:
    """A value as it stands on a command line, in `--config.key=text`."""
    value = _plain(value)
    return value if isinstance(value, str) else repr(value)


def settings_name(settings: Mapping[str, Any]) -> str:
    """A directory name for a set of values: "lr0.003,model.width=96"; empty for none.

    It depends on these values alone, not on their order nor on other points of a sweep. Of lower-case letters, digits
    and `._=,+-`; a text with other characters, or a name too long, ends in a digest of the whole, so that different
    values have different names.
    """
    parts = []
    for key in sorted(settings):
        value = _value_name(_plain(settings[key]))
        parts.append(f"{_SHORT[key]}{value}" if key in _SHORT else f"{key}={value}")
    name = ",".join(parts)
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 9]}-{_digest(name)}"


def run_folder(arm: str, settings: Mapping[str, Any], seed: int) -> str:
    """Where a run is kept under its workdir: `<arm>/<settings>/seed<k>`, without the parts that are empty."""
    return "/".join(part for part in (arm, settings_name(settings), f"seed{seed}") if part)


def _columns(function: str, values: Mapping[str, Iterable[Any]]) -> dict[str, list[Any]]:
    for key, several in values.items():
        if isinstance(several, str) or not isinstance(several, Iterable):
            raise ValueError(f"{function}: {key} has {several!r}; expected several values, such as ({several!r},)")
    return {key: list(several) for key, several in values.items()}


def _plain(value: Any) -> Any:
    """NumPy's scalars as Python's, whose `repr` a command line understands."""
    if isinstance(value, tuple | list):
        return tuple(_plain(item) for item in value)
    return value.item() if hasattr(value, "item") else value


def _value_name(value: Any) -> str:
    if isinstance(value, tuple):
        return "+".join(_value_name(item) for item in value)
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if not isinstance(value, str):
        return str(value).lower()
    safe = re.sub(r"[^a-z0-9._-]+", "-", value.lower())
    return value if safe == value else f"{safe}-{_digest(value)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
