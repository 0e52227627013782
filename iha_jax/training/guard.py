"""Counting skipped steps, and ending a run that skips too many in a row."""

from collections import deque
from collections.abc import Callable

import jax
import numpy as np

_BEHIND = 2  # steps: a flag is read when its step has long been computed, so that no step waits for it


class TrainingDiverged(RuntimeError):  # noqa: N818  it is what happened
    """Too many steps in a row had a loss or gradient that is not finite."""


class Guard:
    """Reads the `skipped` flag of every step, a little behind; `limit` of them in a row raise TrainingDiverged."""

    def __init__(self, limit: int, total: int, last_good: Callable[[], int | None]):
        """`total`: skipped steps so far; `last_good`: gives the step of the newest checkpoint, for the message."""
        self._limit, self._last_good = limit, last_good
        self.total = total
        self._row = 0
        self._unread: deque[tuple[int, jax.Array]] = deque()

    def watch(self, step: int, skipped: jax.Array) -> None:
        """`skipped`: bool [], the flag of `step`."""
        self._unread.append((step, skipped))
        self._read(_BEHIND)

    def catch_up(self) -> None:
        """Reads all flags, waiting for the steps they belong to: before anything is saved or reported."""
        self._read(0)

    def _read(self, leave: int) -> None:
        while len(self._unread) > leave:
            step, skipped = self._unread.popleft()
            if not bool(np.asarray(skipped)):
                self._row = 0
                continue
            self.total += 1
            self._row += 1
            if self._row >= self._limit:
                raise TrainingDiverged(
                    f"loss or gradient was not finite in {self._row} steps in a row, {step - self._row + 1} to {step}: "
                    f"none of them was applied; last good checkpoint: step {self._last_good()}"
                )
