"""`python -m iha_jax.compare --config=configs/quickstart.py --workdir=DIR [--report_only] [--config.a.b=value ...]`.

Trains every arm and seed of a comparison config that is not finished yet, each in a process of its own, and writes
`comparison.md`, `comparison.csv` and `comparison.png`. Run it again to go on where it stopped.
"""

import argparse
import shlex
import statistics
import sys
from collections.abc import Sequence
from typing import NoReturn

from iha_jax.comparison.arms import Comparison, load_comparison, longer_runs, longer_steps, planned_runs
from iha_jax.comparison.launch import FAILED, Launcher, check_evaluation, check_runs, evaluate_all, run_all
from iha_jax.comparison.report import report
from iha_jax.comparison.results import read_results
from iha_jax.comparison.runs import Run
from iha_jax.data.storage import check_library
from iha_jax.training.command import CACHE_HELP, refuse, split_overrides


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


def _run(comparison: Comparison, workdir: str, runs: Sequence[Run], flags: list[str], evaluation: list[str]) -> int:
    """Trains what is not finished, the controls after it, and evaluates all if asked to. Returns the exit code."""
    check_runs(workdir, runs)
    with Launcher() as launcher:
        code = run_all(workdir, runs, launcher, _say, flags=flags)
        if not code and "longer" in comparison.controls:
            longer = control_longer(comparison, workdir, runs)
            check_runs(workdir, longer)
            code = run_all(workdir, longer, launcher, _say, flags=flags)
            runs = [*runs, *longer]
        if not code and evaluation:
            code = evaluate_all(workdir, runs, launcher, _say, flags=[*evaluation, *flags])
    return code


def _say(text: str) -> None:
    print(f"[compare] {text}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Exit codes: 0 done, 75 preempted (run it again), 2 refused input, else a run's failure."""
    overrides, rest = split_overrides(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m iha_jax.compare", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", required=True, help="a config file with get_comparison(), or get_sweep()")
    parser.add_argument(
        "--workdir", required=True, help="runs go to WORKDIR/<arm>/seed<k>, or WORKDIR/<arm>/<settings>/seed<k>"
    )
    parser.add_argument("--compilation_cache", default="", help=CACHE_HELP + " each run")
    parser.add_argument("--report_only", action="store_true", help="train nothing, rebuild the report")
    parser.add_argument(
        "--evaluate",
        default="",
        metavar="FLAGS",
        help="of eval.py, for every finished run: '--tasks=loss,ruler --limit=9'",
    )
    flags = parser.parse_args(rest)
    try:
        check_library(flags.workdir)
        comparison = load_comparison(flags.config)
        runs = planned_runs(comparison, overrides)
        if not flags.report_only:
            evaluation = shlex.split(flags.evaluate)
            check_evaluation(evaluation)
            cache = [f"--compilation_cache={flags.compilation_cache}"] if flags.compilation_cache else []
            if code := _run(comparison, flags.workdir, runs, cache, evaluation):
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
