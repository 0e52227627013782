"""Agreeing on the step after which all processes stop, once one of them is told to."""

import itertools
import threading

import jax

from iha_jax.parallel.processes import of_all, of_first, on_news, publish

_numbers = itertools.count()


class StopTogether:
    """Who is told to stop publishes the step it has reached; whoever sees a step published, publishes its own; when all
    have, all stop after the step that follows the furthest.

    Threads publish, so nobody waits for a process that waits for it on a device; whoever has published takes no
    further step before the conclusion is there, a second or two later. Until someone is told, asking costs no exchange.
    One process alone stops after the step during which it was told.
    """

    def __init__(self) -> None:
        """In every process, in the same order."""
        self.told = False
        self._changed = threading.Condition()
        self._reached: int | None = None  # None: not all are ready for the first step
        self._published = False
        self._last: int | None = None
        self._index, self._count = jax.process_index(), jax.process_count()
        self._key = f"stop_{of_first(next(_numbers))}_"
        on_news(self._read)

    def tell(self) -> None:
        """This process is to stop. From any thread but the main one."""
        self.told = True
        if self._count > 1:
            self._publish()

    def before_first_step(self, step: int) -> bool:
        """Whether any process was told before all were ready to go on from `step`. Waits for all of them."""
        told = any(of_all(self.told))
        with self._changed:
            self._reached = step
        return told

    def after(self, step: int) -> bool:
        """Whether all stop after `step`. Call it after every step, in every process."""
        if self._count == 1:
            return self.told
        with self._changed:
            self._changed.wait_for(lambda: not self._published or self._last is not None)
            self._reached = step
            return self._last is not None and step >= self._last

    def _read(self, news: dict[str, str]) -> None:
        """Of all that was published, once a second."""
        steps = [int(step) for key, step in news.items() if key.startswith(self._key)]
        if self.told or steps:
            self._publish()
        with self._changed:
            if len(steps) == self._count and self._last is None:
                self._last = max(steps) + 1
                self._changed.notify_all()

    def _publish(self) -> None:
        with self._changed:
            if self._reached is not None and not self._published:
                self._published = True
                publish(f"{self._key}{self._index}", str(self._reached))
