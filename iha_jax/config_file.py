"""Reading config files: `configs/X.py:arm` plus overrides such as `model.width=64` gives a checked `Config`.

A config file is Python and is executed: run only your own. It defines `get_config()` or, with several arms,
`get_config(arm="...")`, returning an `ml_collections.ConfigDict`.
"""

import ast
import difflib
import importlib.util
import inspect
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from iha_jax.config import Config, ConfigError, resolve


def load_config(spec: str, overrides: Sequence[str] = ()) -> Config:
    """The checked config of `spec` ("configs/X.py" or "configs/X.py:arm") with `overrides` ("model.width=64").

    Raises:
      ConfigError: for a missing file, an unknown arm, and everything wrong with overrides or values, all at once.
    """
    path, _, arm = spec.partition(":")
    module = load_module(path)
    values = _call_get_config(module, path, arm).to_dict()
    problems: list[str] = []
    for override in overrides:
        apply_override(values, override, problems)
    try:
        config = resolve(values)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    if problems:
        raise ConfigError(problems)
    return config


def load_module(path: str) -> ModuleType:
    """Executes a config file and returns it as a module; the file's grandparent folder is importable meanwhile."""
    file = Path(path)
    if not file.is_file():
        folder = file.parent if file.parent.is_dir() else Path("configs")
        found = ", ".join(sorted(str(p) for p in folder.glob("*.py"))) or "none here"
        raise ConfigError([f"--config={path}: no such file; config files: {found}"])
    root = str(file.resolve().parent.parent)
    if root not in sys.path:
        sys.path.insert(0, root)
    module_spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    if module_spec is None or module_spec.loader is None:
        raise ConfigError([f"--config={path}: expected a Python file"])
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


def default_arm(path: str) -> str:
    """The arm that `get_config()` of a config file stands for; empty when the file has no arms."""
    parameters = list(inspect.signature(getattr(load_module(path), "get_config", lambda: None)).parameters.values())
    return parameters[0].default if parameters and isinstance(parameters[0].default, str) else ""


def _call_get_config(module: ModuleType, path: str, arm: str) -> Any:
    get_config = getattr(module, "get_config", None)
    if get_config is None:
        raise ConfigError([f"--config={path}: the file defines no get_config()"])
    takes_arm = bool(inspect.signature(get_config).parameters)
    arms = tuple(getattr(module, "ARMS", ()))
    if arm and not takes_arm:
        raise ConfigError([f"--config={path}:{arm}: the file has no arms; use --config={path}"])
    if arm and arms and arm not in arms:
        close = difflib.get_close_matches(arm, arms, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError([f"--config={path}:{arm}: unknown arm; its arms: {', '.join(arms)}{hint}"])
    return get_config(arm) if arm else get_config()


def apply_override(values: dict[str, Any], override: str, problems: list[str]) -> None:
    """Sets one value in place, as "section.key=value" says; what is wrong with it is added to `problems`."""
    name, equals, text = override.partition("=")
    *sections, key = name.split(".")
    if not equals or not key:
        problems.append(f"--config.{override}: expected --config.section.key=value")
        return
    place: Any = values
    for depth, part in enumerate([*sections, key]):
        if not isinstance(place, Mapping) or part not in place:
            where = ".".join(["config", *sections[:depth]])
            known = list(place) if isinstance(place, Mapping) else []
            close = difflib.get_close_matches(part, known, n=1)
            hint = f"did you mean {where}.{close[0]}?" if close else f"valid keys: {', '.join(known) or 'none'}"
            problems.append(f"--config.{override}: {where} has no key {part!r}; {hint}")
            return
        if depth < len(sections):
            place = place[part]
    if isinstance(place[key], Mapping):
        problems.append(f"--config.{override}: config.{name} is a section with keys {', '.join(place[key])}")
        return
    place[key] = _parse(text, place[key])  # type: ignore[index]


def _parse(text: str, default: Any) -> Any:
    """Reads `text` as the kind of value the default is; what cannot be read stays text, for `resolve` to refuse."""
    if isinstance(default, str):
        return text
    if isinstance(default, tuple | list) and not text.startswith(("(", "[")):
        return tuple(_parse(item, default[0] if default else "") for item in text.split(",") if item)
    if text.lower() in ("true", "false") and isinstance(default, bool):
        return text.lower() == "true"
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return float(text) if text.lower().lstrip("+-") in ("nan", "inf", "infinity") else text
    return tuple(value) if isinstance(value, list) else value
