"""`python -m iha_jax.compare --config=configs/quickstart.py --workdir=DIR [--report_only] [--config.a.b=value ...]`.

Trains every arm and seed of a comparison config that is not finished yet, each in a process of its own, and writes
`comparison.md`, `comparison.csv` and `comparison.png`. Run it again to go on where it stopped.
"""

import argparse
import os
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from etils import epath

from iha_jax.comparison.arms import (
    Comparison,
    Run,
    load_comparison,
    longer_runs,
    longer_steps,
    planned_runs,
    run_config,
)
from iha_jax.comparison.launch import SIGNALS, Launcher
from iha_jax.comparison.report import report
from iha_jax.comparison.results import is_finished, read_results
from iha_jax.data.storage import check_library
from iha_jax.training.command import CACHE_HELP, refuse, split_overrides
from iha_jax.training.run_directory import check_run

FAILED, PREEMPTED = 1, 75


def check_runs(comparison: Comparison, workdir: str, runs: Sequence[Run]) -> None:
    """Raises ValueError, before anything is trained, when a run's directory cannot be used for it: above all when a
    finished run had another config, which would otherwise stand in the same table."""
    if epath.Path(workdir).exists() and not epath.Path(workdir).is_dir():
        raise ValueError(f"--workdir={workdir}: is a file; expected a directory")
    for run in runs:
        check_run(str(epath.Path(workdir) / run.folder), run_config(comparison, run))


def run_all(
    comparison: Comparison, workdir: str, runs: Sequence[Run], launcher: Launcher, flags: Sequence[str] = ()
) -> int:
    """Runs what is not finished, in order, with these further flags. Returns 0, 75 when interrupted (whatever was under
    way goes on next time), or the exit code of the first run that failed."""
    waiting = [run for run in runs if not is_finished(epath.Path(workdir) / run.folder)]
    if len(waiting) < len(runs):
        _say(f"{len(runs) - len(waiting)} of {len(runs)} runs are finished already")
    began = time.monotonic()
    for number, run in enumerate(waiting, 1):
        if launcher.interrupted:
            return _interrupted()
        _say(f"run {number} of {len(waiting)}: {run.folder}")
        command = [sys.executable, "-m", "iha_jax.training", f"--config={comparison.path}:{run.base_arm}"]
        command += [f"--workdir={epath.Path(workdir) / run.folder}", *flags, *(f"--config.{o}" for o in run.overrides)]
        code = launcher(command, dict(os.environ))
        if launcher.interrupted and code in (PREEMPTED, *(-number for number in SIGNALS)):
            return _interrupted()
        if code:
            _say(f"{run.folder} ended with exit code {code}. The same command goes on from there; that run alone:")
            _say("  " + shlex.join(command))
            return code if code > 0 else 128 - code
        elapsed = time.monotonic() - began
        left = elapsed / number * (len(waiting) - number)
        _say(f"finished {run.folder}; {elapsed:.0f} s so far, about {left:.0f} s left")
    return _interrupted() if launcher.interrupted else 0


def _interrupted() -> int:
    _say("interrupted; the same command goes on from here")
    return PREEMPTED


def control_longer(comparison: Comparison, workdir: str, runs: Sequence[Run]) -> list[Run]:
    """The runs of the `longer` control, their length measured from the finished first and last arms.

    Empty when the last arm takes no longer than the first: the control would be the first arm again.
    """
    finished = [result for result in read_results(workdir, runs).results if result.finished]
    first, last = (
        [result for result in finished if result.run.arm == arm] for arm in (comparison.arms[0], comparison.arms[-1])
    )
    seconds = [statistics.median(result.seconds_per_step for result in group) for group in (first, last)]
    own, other = first[0].config.training.steps, last[0].config.training.steps
    steps = longer_steps(other, *seconds)
    if steps <= own:
        _say(f"no {comparison.longer}: a step of {comparison.arms[-1]} takes no longer than one of the first arm")
        return []
    return longer_runs(comparison, runs, steps)


def _say(text: str) -> None:
    print(f"[compare] {text}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Exit codes: 0 done, 75 preempted (run it again), 2 refused input, else a run's failure."""
    overrides, rest = split_overrides(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m iha_jax.compare", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", required=True, help="a config file with get_comparison()")
    parser.add_argument("--workdir", required=True, help="runs go to WORKDIR/<arm>/seed<k>")
    parser.add_argument("--compilation_cache", default="", help=CACHE_HELP + " each run")
    parser.add_argument("--report_only", action="store_true", help="train nothing, rebuild the report")
    flags = parser.parse_args(rest)
    try:
        check_library(flags.workdir)
        comparison = load_comparison(flags.config)
        runs = planned_runs(comparison, overrides)
        if not flags.report_only:
            check_runs(comparison, flags.workdir, runs)
            cache = [f"--compilation_cache={flags.compilation_cache}"] if flags.compilation_cache else []
            with Launcher() as launcher:
                code = run_all(comparison, flags.workdir, runs, launcher, cache)
                if not code and "longer" in comparison.controls:
                    longer = control_longer(comparison, flags.workdir, runs)
                    check_runs(comparison, flags.workdir, longer)
                    code = run_all(comparison, flags.workdir, longer, launcher, cache)
            if code:
                sys.exit(code)
    except ValueError as error:
        refuse(error)
    try:
        print(report(comparison, flags.workdir, runs))
    except ValueError as error:
        if flags.report_only:
            refuse(error)
        _say(str(error))
        sys.exit(FAILED)
    sys.exit(0)


if __name__ == "__main__":
    main()
