"""Noticing that the run should save and leave, at the same step in every process."""

import signal
import socket
import threading
from types import FrameType
from typing import Self

from iha_jax.parallel.processes import end
from iha_jax.parallel.stop import StopTogether

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preemption:
    """While active, the first SIGTERM or SIGINT, in any process, makes `requested` true in all of them after the same
    step; a second one ends its process at once, unsaved, with exit code 128 + its number.

    A thread takes the signals, from a socket that Python's handler in C writes them to: so they are seen while the main
    thread compiles or waits for a device, which keeps handlers written in Python from running. Where that runs, it is
    told at once, so that a signal during a step counts for that step.
    """

    def __init__(self) -> None:
        self._stop = StopTogether()

    def requested_before(self, step: int) -> bool:
        """Before the first step, which follows `step`: whether to leave without it. Waits for all processes."""
        return self._stop.before_first_step(step)

    def requested(self, step: int) -> bool:
        """Whether to save after this step and leave. Call it after every step, in every process."""
        return self._stop.after(step)

    def _listen(self) -> None:
        heard = 0
        while number := self._heard.recv(1):
            if number[0] not in SIGNALS:
                continue
            heard += 1
            if heard == 2:
                end(128 + number[0])
            self._stop.tell()

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self._stop.told = True

    def __enter__(self) -> Self:
        self._heard, self._told = socket.socketpair()
        self._told.setblocking(False)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        self._socket_before = signal.set_wakeup_fd(self._told.fileno(), warn_on_full_buffer=False)
        self._before = {s: signal.signal(s, self._notice) for s in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)
        signal.set_wakeup_fd(self._socket_before)
        self._told.close()
        self._listener.join()
        self._heard.close()
