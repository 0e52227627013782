"""Ending a process that hangs, with the stacks of all its threads on the terminal."""

import faulthandler
from typing import Self


class Watchdog:
    """While active, a process that calls neither `beat` nor leaves within `seconds` ends with exit code 1.

    The clock is faulthandler's: a thread in C that needs neither the interpreter nor its lock, so it also ends a
    process that waits inside a collective for a peer that hangs. 0 seconds: never.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds

    def beat(self) -> None:
        """Starts the clock anew: at every step, batch of evaluation, and whenever something else begins."""
        if self._seconds:  # to the process's own stderr, 2: what replaces sys.stderr may have no file behind it
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=2)

    def __enter__(self) -> Self:
        self.beat()
        return self

    def __exit__(self, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()
