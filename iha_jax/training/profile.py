"""A profiler trace of some steps, on request; XProf, TensorBoard's profile plugin and Perfetto open it."""

import contextlib
import os
from typing import Any, Self

import jax
from etils import epath

from iha_jax.training.staging import Staging

FOLDER = "profile"


def profiled_steps(text: str, steps: int) -> range:
    """The steps that `--profile_steps=START:STOP` names, both included and counted from the start of training, not of
    this process; none for an empty text. Raises ValueError for what is no such pair within 1 to `steps`."""
    if not text:
        return range(0)
    start, colon, stop = text.partition(":")
    wanted = range(int(start), int(stop) + 1) if colon and start.isdecimal() and stop.isdecimal() else range(0)
    if not wanted or wanted[0] < 1 or wanted[-1] > steps:
        raise ValueError(f"--profile_steps={text}: expected START:STOP with 1 <= START <= STOP <= {steps} (steps)")
    return wanted


class Profile:
    """Traces the steps it is given into `<run directory>/profile`, by process 0 alone.

    Each is a step of the trace by its number. A run that begins or is preempted within them traces those it does.
    Outside of them `step` and `ends_at` do nothing.
    """

    def __init__(self, directory: epath.Path, steps: range):
        self._directory = directory / FOLDER
        self._steps = steps if jax.process_index() == 0 else range(0)
        self._staging: Staging | None = None  # there while a trace is running

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def step(self, number: int) -> contextlib.AbstractContextManager[Any]:
        """What a step runs in."""
        if number not in self._steps:
            return contextlib.nullcontext()
        if self._staging is None:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._staging = Staging(self._directory, resume=False)
            jax.profiler.start_trace(os.fspath(self._staging.folder))
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def ends_at(self, number: int) -> bool:
        """Whether this is the last of the steps: wait for its results and close."""
        return self._staging is not None and number == self._steps[-1]

    def close(self) -> str:
        """Ends the trace, if one is running, and says how to look at it."""
        if self._staging is not None:
            staging, self._staging = self._staging, None
            jax.profiler.stop_trace()
            staging.close()
        return f"wrote the trace of the profiled steps; to see it: xprof --logdir={self._directory}"
