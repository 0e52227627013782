"""The persistent compilation cache: which folder, and whether a start found its programs there."""

import os
from typing import Any, Self

import jax
from etils import epath

from iha_jax.data.storage import absolute, is_local
from iha_jax.data.text import default_cache

OFF = "off"
FOLDER = ".jax_cache"


def use_cache(choice: str, workdir: str) -> None:
    """Chooses jax's cache of compiled programs; call it before anything is compiled.

    `choice` is what `--compilation_cache` says: a folder or a bucket's, "off", or "" for the default: what jax was told
    already (JAX_COMPILATION_CACHE_DIR), else `.jax_cache` beside the run directory, else, where nothing may be written
    there, in the project's own cache. Runs beside each other, such as the seeds of an arm, then compile once.

    Raises:
      ValueError: for a folder that is a file.
    """
    if choice == OFF:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if not choice and (jax.config.values["jax_compilation_cache_dir"] or _noisy()):
        return
    folder = absolute(choice) if choice else default_folder(workdir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--compilation_cache={choice}: is a file; expected a directory, or {OFF!r}")
    jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
    if is_local(folder):
        # Dozens of small programs come before the first step; from a disk each is read faster than compiled.
        _default("jax_persistent_cache_min_compile_time_secs", 0.0)
    else:
        # A bucket is asked for programs that take longer than a request alone (jax's default is a second); and XLA,
        # which keeps an autotuning cache of its own in the folder, cannot write into one.
        _default("jax_persistent_cache_enable_xla_caches", "none")


def default_folder(workdir: str) -> epath.Path:
    """`.jax_cache` beside a run directory, or where that cannot be written, in ~/.cache/iha_jax."""
    parent = absolute(workdir).parent
    if is_local(parent):
        there = next(path for path in (parent, *parent.parents) if path.exists())
        return parent / FOLDER if os.access(there, os.W_OK) else default_cache("") / FOLDER
    # Above a bucket there is nothing to write in.
    return (parent if not os.fspath(parent).endswith("://") else absolute(workdir)) / FOLDER


def _default(name: str, value: Any) -> None:
    if name.upper() not in os.environ:
        jax.config.update(name, value)


def _noisy() -> bool:
    """Whether each program from the cache would print lines of warnings: on a CPU, before jax 0.10.2, which takes
    LLVM's tuning preferences for features that the machine lacks.

    Otherwise a CPU's programs are safe to keep, on a disk shared by different machines too: the instruction set is part
    of what a program is found by.
    """
    return jax.__version_info__ < (0, 10, 2) and jax.default_backend() == "cpu"


class Programs:
    """Counts, while active, the programs that jax looked for in its cache, and those it found; none without a cache."""

    REQUESTS, HITS = "/jax/compilation_cache/compile_requests_use_cache", "/jax/compilation_cache/cache_hits"

    def __init__(self) -> None:
        self._counts = {self.REQUESTS: 0, self.HITS: 0}

    @property
    def looked_for(self) -> int:
        return self._counts[self.REQUESTS]

    @property
    def found(self) -> int:
        return self._counts[self.HITS]

    def _count(self, event: str, **_: Any) -> None:
        if event in self._counts:
            self._counts[event] += 1

    def __enter__(self) -> Self:
        jax.monitoring.register_event_listener(self._count)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_listener(self._count)
