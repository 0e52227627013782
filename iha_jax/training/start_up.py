"""Time to the first step: where it went, for the terminal and for `provenance.json`."""

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the clock is to start before jax is imported
    from iha_jax.training.compilation_cache import Programs


class StartUp:
    """A clock that runs from its making to the end of the first step; `mark` names the phase that has just ended.

    `{"imports": 3.1, "data": 0.2, "state": 1.0, "compile": 4.0, "first step": 0.1}` in seconds; they add up to the time
    since the clock was made.
    """

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def mark(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def facts(self, programs: "Programs") -> dict[str, Any]:
        """What `provenance.json` keeps."""
        seconds = {phase: round(value, 3) for phase, value in self.seconds.items()}
        return {"start_seconds": seconds, "compiled_programs": programs.looked_for, "cached_programs": programs.found}

    def describe(self, programs: "Programs") -> str:
        phases = ", ".join(f"{phase} {value:.1f}" for phase, value in self.seconds.items())
        cached = f"{programs.found} of {programs.looked_for} programs from the compilation cache"
        cache = cached if programs.looked_for else "no compilation cache"
        return f"first step after {sum(self.seconds.values()):.1f} s ({phases}); {cache}"
