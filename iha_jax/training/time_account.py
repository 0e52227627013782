"""Where the wall time of a run went, over all its attempts, killed ones included."""

import contextlib
import json
import os
import threading
import time
from collections.abc import Mapping
from typing import Any, Self

import jax
from etils import epath

from iha_jax.data.storage import is_local, write_text

FILE = "wall_time.json"
START, RESTORE, COMPILE, PRODUCTIVE, EVALUATE, SAVE, LOST = (
    "start",  # imports, data, devices
    "restore",
    "compile",
    "productive",
    "evaluate",
    "save",
    "lost",  # work of earlier attempts that the restored checkpoint does not hold
)
CATEGORIES = (START, RESTORE, COMPILE, PRODUCTIVE, EVALUATE, SAVE, LOST)


class TimeAccount:
    """Every moment since the process began belongs to one category, the one last `enter`ed: they add up to wall time.

    `wall_time.json` in the run directory says how long all attempts have run so far, written by process 0 every second
    (every minute in a bucket): so the next attempt knows what a killed one has cost.
    """

    def __init__(self, directory: epath.Path, carried: Mapping[str, Any]):
        """`carried`: the metadata of the restored checkpoint, `{}` for a new run."""
        self._file = directory / FILE
        self._spent = {name: float(carried.get(_key(name), 0)) for name in CATEGORIES}
        self._earlier = self._read()
        self._spent[LOST] += max(0.0, self._earlier - sum(self._spent.values()))
        self._category, self._since = START, _process_start()
        self._began = self._since
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._every = 1.0 if is_local(directory) else 60.0
        self._writer = threading.Thread(target=self._keep_writing, daemon=True)

    def __enter__(self) -> Self:
        if jax.process_index() == 0:
            self._writer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._writer.is_alive():
            self._writer.join()
            self._write()

    def enter(self, category: str) -> None:
        with self._lock:
            now = time.time()
            self._spent[self._category] += now - self._since
            self._category, self._since = category, now

    @property
    def totals(self) -> dict[str, float]:
        """Seconds by category, as `<category>_seconds`: for checkpoints, validation rows and the last line of a run."""
        with self._lock:
            running = {self._category: time.time() - self._since}
        return {_key(name): spent + running.get(name, 0.0) for name, spent in self._spent.items()}

    def summary(self) -> str:
        """One line for the terminal."""
        totals = self.totals
        wall = sum(totals.values())
        parts = (f"{name} {totals[_key(name)] / wall:.0%}" for name in CATEGORIES if totals[_key(name)] >= wall / 200)
        return f"wall time {wall:,.0f} s: {', '.join(parts)}"

    def _read(self) -> float:
        try:
            return float(json.loads(self._file.read_text())["seconds"])
        except (OSError, ValueError, LookupError, TypeError):
            return 0.0

    def _keep_writing(self) -> None:
        while not self._stop.wait(self._every):
            self._write()

    def _write(self) -> None:
        # A file system that fails for a moment must not end a run for its accounts.
        with contextlib.suppress(OSError):
            write_text(self._file, json.dumps({"seconds": self._earlier + time.time() - self._began}))


def _key(category: str) -> str:
    return f"{category}_seconds"


def _process_start() -> float:
    """When this process began, as `time.time()`; where that cannot be read, now."""
    try:
        with open("/proc/self/stat", encoding="ascii") as file:
            ticks = int(file.read().rsplit(")", 1)[1].split()[19])
        with open("/proc/uptime", encoding="ascii") as file:
            uptime = float(file.read().split()[0])
        return time.time() - (uptime - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return time.time()
