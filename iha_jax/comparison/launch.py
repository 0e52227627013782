"""Starting runs one after another as processes of their own, and stopping when asked to."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Self

from etils import epath

from iha_jax.comparison.results import is_finished
from iha_jax.comparison.runs import Run
from iha_jax.data.storage import read_json
from iha_jax.evaluation.command import parser as evaluation_flags
from iha_jax.training.run_directory import check_run, evaluation_file

SIGNALS = (signal.SIGTERM, signal.SIGINT)
FAILED, PREEMPTED = 1, 75


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


def check_runs(workdir: str, runs: Sequence[Run]) -> None:
    """Raises ValueError, before anything is trained, when a run's directory cannot be used for it: above all when a
    finished run had another config, which would otherwise stand in the same table."""
    if epath.Path(workdir).exists() and not epath.Path(workdir).is_dir():
        raise ValueError(f"--workdir={workdir}: is a file; expected a directory")
    for run in runs:
        check_run(str(epath.Path(workdir) / run.folder), run.config())


def run_all(
    workdir: str,
    runs: Sequence[Run],
    launcher: Launcher,
    say: Callable[[str], None],
    *,
    keep_going: bool = False,
    flags: Sequence[str] = (),
) -> int:
    """Runs what is not finished, in order, each by `train.py`'s command with `flags` added.

    Returns 0, 75 when interrupted (whatever was under way goes on next time), or the exit code of the first run that
    failed. With `keep_going` the others still run, the failed ones are named at the end, and the code is 1, or 75 when
    all of them were preempted.
    """
    waiting = [run for run in runs if not is_finished(epath.Path(workdir) / run.folder)]
    if len(waiting) < len(runs):
        say(f"{len(runs) - len(waiting)} of {len(runs)} runs are finished already")
    environment = _environment(workdir)
    began, failed = time.monotonic(), {}
    for number, run in enumerate(waiting, 1):
        if launcher.interrupted:
            break
        say(f"run {number} of {len(waiting)}: {run.folder}")
        command = [sys.executable, "-m", "iha_jax.training", *run.flags(workdir), *flags]
        code = launcher(command, environment)
        if launcher.interrupted and code in (PREEMPTED, *(-number for number in SIGNALS)):
            break
        if code:
            say(f"{run.folder} ended with exit code {code}. The same command goes on from there; that run alone:")
            say("  " + shlex.join(command))
            failed[run.folder] = code if code > 0 else 128 - code
            if not keep_going:
                return failed[run.folder]
            continue
        elapsed = time.monotonic() - began
        left = elapsed / number * (len(waiting) - number)
        say(f"finished {run.folder}; {elapsed:.0f} s so far, about {left:.0f} s left")
    if failed:
        listed = "".join(f"\n  {folder} (exit code {code})" for folder, code in failed.items())
        say(f"{len(failed)} of {len(waiting)} runs did not end well:{listed}")
    if launcher.interrupted:
        say("interrupted; the same command goes on from here")
        return PREEMPTED
    return 0 if not failed else PREEMPTED if set(failed.values()) == {PREEMPTED} else FAILED


def _environment(workdir: str) -> dict[str, str]:
    """All runs share compiled programs."""
    cache = str((epath.Path(workdir) / ".jax_cache").resolve())
    return {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} | os.environ


def evaluate_all(
    workdir: str, runs: Sequence[Run], launcher: Launcher, say: Callable[[str], None], *, flags: Sequence[str]
) -> int:
    """Evaluates every finished run at its last step by `eval.py`'s command with `flags`, unless that very command has
    been done. Returns 0, 75 when interrupted, or the exit code of the first that failed."""
    for run in runs:
        folder = epath.Path(workdir) / run.folder
        command = [f"--workdir={folder}", *flags]
        if launcher.interrupted:
            break
        if not is_finished(folder) or _is_done(folder, run.config().training.steps, command):
            continue
        say(f"evaluating {run.folder}: {shlex.join(flags)}")
        code = launcher([sys.executable, "-m", "iha_jax.evaluation", *command], _environment(workdir))
        if code and not launcher.interrupted:
            say(f"evaluating {run.folder} ended with exit code {code}")
            return code if code > 0 else 128 - code
    return PREEMPTED if launcher.interrupted else 0


def _is_done(folder: epath.Path, step: int, command: list[str]) -> bool:
    """Whether all tasks of an evaluation are there, each found by this very command."""
    path = evaluation_file(folder, step)
    found = read_json(path)["tasks"] if path.exists() else {}
    names = [name for name in evaluation_flags().parse_args(command).tasks.split(",") if name]
    return all(name in found and shlex.split(found[name]["command"])[1:] == command for name in names)


def check_evaluation(flags: Sequence[str]) -> None:
    """Raises ValueError for flags of `eval.py` that make no sense for many runs; others that it does not know end the
    process with exit code 2."""
    asked = evaluation_flags().parse_args(["--workdir=RUN", *flags])
    if asked.out or asked.step is not None or asked.workdir != "RUN":
        raise ValueError("--evaluate: --workdir, --step and --out are each run's own: its last step, in its directory")
