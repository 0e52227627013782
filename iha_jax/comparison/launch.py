"""Starting runs one after another as processes of their own, and stopping when asked to."""

import signal
import subprocess
from types import FrameType
from typing import Self

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Launcher:
    """While active, SIGTERM and SIGINT are passed on to the running command and set `interrupted`.

    Each command has a session of its own: a terminal's Ctrl-C would otherwise reach it twice, and the second leaves
    a training run unsaved.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._before = {s: signal.signal(s, self._notice) for s in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = True
        if self._process is not None:
            self._process.send_signal(number)  # nothing happens if it has ended

    def __call__(self, command: list[str], environment: dict[str, str]) -> int:
        """Runs a command to its end and returns its exit code, minus the signal's number if one killed it."""
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        self._process = process
        if self.interrupted:  # between the caller's last look and here
            process.terminate()
        try:
            return process.wait()
        finally:
            self._process = None
