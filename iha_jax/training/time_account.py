"""Where the wall time of a run went, over all its attempts, killed ones included."""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
from etils import epath

from iha_jax.data.storage import is_local, write_text
from iha_jax.parallel.processes import is_first
from iha_jax.training.spikes import LossSpike

FILE = "wall_time.json"
START = "start"  # imports, data, devices
RESTORE, COMPILE, PRODUCTIVE, EVALUATE, SAVE = "restore", "compile", "productive", "evaluate", "save"
_GROWTH = 0.02  # of an attempt: what a kill may hide of it
LOST = "lost"  # what earlier attempts did and the restored checkpoint does not hold
CATEGORIES: tuple[str, ...] = (START, RESTORE, COMPILE, PRODUCTIVE, EVALUATE, SAVE, LOST)


class TimeAccount:
    """Every moment since the process began belongs to one category, the last of `enter`: they add up to wall time.

    `wall_time.json` in the run directory says how long all attempts have run so far, written by process 0 at once and
    then whenever an attempt has grown by 2 % (in a bucket no more than once a minute): so the next attempt knows what a
    killed one has cost.
    """

    def __init__(self, directory: epath.Path, began: float, on_enter: Callable[[], None] = lambda: None):
        """`began`: when this attempt did, of `time.monotonic()`; `process_start()` for the first of a process.
        `on_enter`: called whenever another category begins, as a watchdog wants to be."""
        self._file = directory / FILE
        self._spent = dict.fromkeys(CATEGORIES, 0.0)
        self._earlier = self._read()
        self._category, self._since, self._began = START, began, began
        self._on_enter = on_enter
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._least = 0.1 if is_local(directory) else 60.0  # seconds between two writes
        self._writer = threading.Thread(target=self._keep_writing, daemon=True)

    def carry(self, metadata: Mapping[str, Any]) -> None:
        """Goes on from what the restored checkpoint says, `{}` for a new run; earlier time that it does not know of is
        lost."""
        with self._lock:
            carried = {name: float(metadata.get(_key(name), 0)) for name in CATEGORIES}
            carried[PRODUCTIVE] = float(metadata.get(_key(PRODUCTIVE), metadata.get("seconds", 0)))  # format 1: seconds
            carried[LOST] += max(0.0, self._earlier - sum(carried.values()))
            for name, seconds in carried.items():
                self._spent[name] += seconds

    def __enter__(self) -> Self:
        if is_first():
            self._writer.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind and not issubclass(kind, LossSpike) and jax.process_count() > 1:
            return  # this process ends, but tells the others first: the seconds of that count too
        self._stop.set()
        if self._writer.is_alive():
            self._writer.join()
            self._write()

    def enter(self, category: str) -> None:
        with self._lock:
            now = time.monotonic()
            self._spent[self._category] += now - self._since
            self._category, self._since = category, now
        self._on_enter()

    @property
    def productive(self) -> float:
        """Seconds of training alone."""
        return self.totals[_key(PRODUCTIVE)]

    @property
    def totals(self) -> dict[str, float]:
        """Seconds by category, as `<category>_seconds`: for checkpoints, validation rows and the last line of a run."""
        with self._lock:
            running = {self._category: time.monotonic() - self._since}
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
        self._write()
        while not self._stop.wait(max(self._least, _GROWTH * (time.monotonic() - self._began))):
            self._write()

    def _write(self) -> None:
        # A file system that fails for a moment must not end a run for its accounts.
        with contextlib.suppress(OSError):
            write_text(self._file, json.dumps({"seconds": self._earlier + time.monotonic() - self._began}))


def _key(category: str) -> str:
    return f"{category}_seconds"


def process_start() -> float:
    """When this process began, of `time.monotonic()`; where that cannot be read, now."""
    try:
        with open("/proc/self/stat", encoding="ascii") as file:
            ticks = int(file.read().rsplit(")", 1)[1].split()[19])
        with open("/proc/uptime", encoding="ascii") as file:
            uptime = float(file.read().split()[0])
        return time.monotonic() - (uptime - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return time.monotonic()
