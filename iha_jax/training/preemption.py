"""Noticing that the run should save and leave."""

import signal
from types import FrameType
from typing import Self


class Preemption:
    """While active, the first SIGTERM or SIGINT only sets `requested`; a second one leaves at once, unsaved."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.requested = False

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        for s in self.SIGNALS:
            signal.signal(s, signal.SIG_DFL)

    def __enter__(self) -> Self:
        self._before = {s: signal.signal(s, self._notice) for s in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)
