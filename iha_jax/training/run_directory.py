"""A run directory: what is in it, when it may be used again, and who made it."""

import hashlib
import json
import os
import platform
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from etils import epath

from iha_jax.config import Config, ConfigError, as_dict, resolve
from iha_jax.data.storage import check_library, is_local, read_json, tidy, write_text
from iha_jax.parallel.processes import agree, is_first

CONFIG, PROVENANCE, CHECKPOINTS, EVALUATIONS = "config.json", "provenance.json", "checkpoints", "evaluations"
# Fields that cannot change a result: a used run directory accepts other values for them.
FREE = frozenset(
    {
        "data.cache_dir",
        "data.workers",
        "training.tensorboard",
        "training.wandb_project",
        "training.keep_checkpoints",
        "training.log_every",
        "training.max_skipped_steps",
        "training.max_rollbacks",
        "training.watchdog_seconds",
        "mesh.data",
        "mesh.fsdp",
        "mesh.context",
        "mesh.tensor",
    }
)
# Fields younger than the first release, with what an older run did.
_YOUNGER: dict[str, dict[str, Any]] = {
    "mesh": {"context": 1},
    "training": {
        "max_skipped_steps": 10,
        "spike_threshold": 0.0,
        "max_rollbacks": 3,
        "watchdog_seconds": 1800.0,
        "init_from_state": False,
    },
}
_SECONDS_TO_APPEAR = 20
_PACKAGES = ("iha_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tensorflow-datasets")


class RunDirectoryError(ValueError):
    """A run directory cannot be used for this."""


class DataMismatch(RunDirectoryError):  # noqa: N818  a mismatch is what it is
    """A run directory was trained on other data than is there now."""


@dataclass(frozen=True)
class RunDirectory:
    """An opened run directory."""

    path: epath.Path

    @property
    def checkpoints(self) -> epath.Path:
        return self.path / CHECKPOINTS


def check_run(workdir: str, config: Config) -> None:
    """Refuses, writing nothing, a workdir that is a file, holds something else, or a run of another config."""
    check_library(workdir)
    path = epath.Path(workdir)
    if path.exists() and not path.is_dir():
        raise RunDirectoryError(f"--workdir={workdir}: is a file; expected a directory, or a name that does not exist")
    for parent in path.parents if is_local(path) else ():  # a bucket has no folders that a file could be in the way of
        if parent.exists() and not parent.is_dir():
            raise RunDirectoryError(f"--workdir={workdir}: {parent} is a file, so nothing can be made under it")
    if not (path / CONFIG).exists():
        foreign = sorted(p.name for p in path.iterdir()) if path.exists() else []
        if foreign:
            raise RunDirectoryError(
                f"--workdir={workdir}: is not empty and is no run (no {CONFIG}, but {', '.join(foreign[:5])}); "
                f"use another directory"
            )
        return
    before, now = flat(as_dict(load_run_config(workdir))), flat(as_dict(config))
    changed = [
        f"  - {key}: {before[key]!r} in the run, {now[key]!r} now"
        for key in sorted(now)
        if key not in FREE and before[key] != now[key]
    ]
    if changed:
        raise RunDirectoryError(
            f"--workdir={workdir}: was started with another config:\n" + "\n".join(changed) + "\n"
            f"use another workdir, or the config it was started with (free to change: {', '.join(sorted(FREE))})"
        )


def check_data(workdir: str, digests: dict[str, str]) -> None:
    """Raises DataMismatch when corpus, tokenizer or packed rows are not those the run in `workdir` was started on."""
    path = epath.Path(workdir) / PROVENANCE
    before = read_json(path) if path.exists() else {}
    changed = [
        f"  - {name}: {before[name]} in the run, {digest} now"
        for name, digest in digests.items()
        if before.get(name, digest) != digest
    ]
    if changed:
        raise DataMismatch(f"--workdir={workdir}: was started on other data:\n" + "\n".join(changed))


def open_run(
    workdir: str, config: Config, *, mesh: dict[str, int], digests: dict[str, str], implementations: dict[str, str]
) -> RunDirectory:
    """Creates or reopens a run directory: `config.json` once, `provenance.json` with one more entry a start.

    Call `check_run` and `check_data` first: they refuse what must not be reopened. Process 0 writes for all.

    Raises:
      ValueError: when a process does not find what process 0 wrote.
    """
    run = RunDirectory(epath.Path(workdir))

    def record() -> None:
        provenance_path = run.path / PROVENANCE
        before = read_json(provenance_path) if provenance_path.exists() else {"runs": []}
        run.path.mkdir(parents=True, exist_ok=True)
        if not (run.path / CONFIG).exists():
            _write(run.path / CONFIG, as_dict(config))
        facts = {"mesh": mesh, "implementations": implementations}
        _write(provenance_path, before | digests | {"runs": [*before["runs"], _provenance() | facts]})

    agree(lambda: record() if is_first() else None)
    agree(lambda: _check_shared(run.path))
    return run


def _check_shared(path: epath.Path) -> None:
    for _ in range(_SECONDS_TO_APPEAR):  # network file systems are not at once the same everywhere
        if (path / CONFIG).exists():
            return
        time.sleep(1)
    raise RunDirectoryError(f"--workdir={path}: {CONFIG} of process 0 is not there; all processes need one shared disk")


def common_facts(config: Config, workdir: str) -> dict[str, Any]:
    """What must be the same in all processes of a run: config, run directory, this code, and the packages below it."""
    facts = {f"config.{name}": value for name, value in flat(as_dict(config)).items()}
    place = os.fspath(epath.Path(workdir).resolve() if is_local(workdir) else workdir)
    facts |= {"--workdir": place, "code of iha_jax": _code_digest()}
    return facts | {f"version of {name}": _version(name) for name in _PACKAGES if name != "iha_jax"}


def seen_from_here(workdir: str) -> dict[str, Any]:
    """What a process sees of a run directory, to be compared with what the others see."""
    return {f"{CONFIG} in --workdir={workdir}": "there" if (epath.Path(workdir) / CONFIG).exists() else "not there"}


def _code_digest() -> str:
    root, digest = Path(__file__).parent.parent, hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def evaluation_file(workdir: epath.PathLike, step: int) -> epath.Path:
    """Where `eval.py` writes what it finds of a step."""
    return epath.Path(workdir) / EVALUATIONS / f"step_{step}.json"


def note_start(run: RunDirectory, facts: dict[str, Any]) -> None:
    """Adds facts that are known only now to what this start noted in `provenance.json`."""
    if is_first():
        provenance = read_json(run.path / PROVENANCE)
        provenance["runs"][-1] |= facts
        _write(run.path / PROVENANCE, provenance)


def load_run_config(workdir: str) -> Config:
    """The config a run was started with. Raises RunDirectoryError when the directory is no run or its config is bad."""
    check_library(workdir)
    path = epath.Path(workdir) / CONFIG
    if not path.exists():
        raise RunDirectoryError(f"{workdir}: is not a run directory (no {CONFIG})")
    values = read_json(path)
    try:
        return resolve(_with_younger_fields(values))
    except ConfigError as error:
        raise RunDirectoryError(f"{path}: {error}") from error


def _with_younger_fields(values: dict[str, Any]) -> dict[str, Any]:
    sections = {name: values[name] for name in _YOUNGER if isinstance(values.get(name), dict)}
    return values | {name: _YOUNGER[name] | section for name, section in sections.items()}


def _write(path: epath.Path, values: dict[str, Any]) -> None:
    write_text(path, json.dumps(values, indent=2) + "\n")
    if is_local(path):
        tidy(path.parent)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model": {"width": 64}} as {"model.width": 64}."""
    found = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _provenance() -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": sys.argv,
        "host": socket.gethostname(),
        "code": code_revision(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "device_kind": device.device_kind,
        "device_platform": device.platform,
        "device_count": jax.device_count(),
        "process_count": jax.process_count(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def code_revision() -> dict[str, Any]:
    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    status = git("status", "--porcelain", "--untracked-files=no")
    return {"revision": git("rev-parse", "HEAD"), "modified": None if status is None else bool(status)}
