"""`python -m iha_jax.sweep --config=configs/X.py --workdir=DIR [--dry_run | --index=I] [--config.a.b=value ...]`.

Trains one model a point of a config file's `get_sweep()` (helpers and naming: `iha_jax/overrides.py`), or one a run of
its `get_comparison()`. Without a flag the points run one after another, in processes of their own; what is finished is
not run again, and a point that fails is named while the rest still runs. `--dry_run` prints the commands instead. On a
cluster each task of an array runs one point (`launch/sweep.sbatch`); `--count` prints how many there are:

    python -m iha_jax.sweep --config=configs/X.py --workdir=DIR --index=$SLURM_ARRAY_TASK_ID

A point is kept in `DIR/<arm>/<settings>/seed<k>`, where `python -m iha_jax.compare --config=configs/X.py --workdir=DIR
--report_only` reads it (in a file with both functions, the points that are runs of the comparison). What follows `--`
goes to every `train.py` as it is.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import NoReturn

from iha_jax.comparison.arms import load_comparison, planned_runs
from iha_jax.comparison.runs import Run, plan_runs, sweep_points
from iha_jax.config import ConfigError
from iha_jax.config_file import load_module
from iha_jax.training.command import refuse, split_overrides


def sweep_runs(spec: str, overrides: Sequence[str]) -> list[Run]:
    """The runs that a config file asks for: its `get_sweep()`, else its `get_comparison()`; `spec` may name an arm.

    Of a comparison with the control "longer" that control is left out: its length is measured from the other runs.

    Raises:
      ConfigError: with everything wrong with the points, each named by its number.
    """
    path, _, arm = spec.partition(":")
    module = load_module(path)
    if hasattr(module, "get_sweep"):
        return plan_runs(path, sweep_points(path), overrides, arm)
    if hasattr(module, "get_comparison"):
        return planned_runs(load_comparison(spec), overrides)
    raise ConfigError([f"--config={path}: the file defines no get_sweep() and no get_comparison()"])


def run_one(workdir: str, run: Run, flags: Sequence[str]) -> NoReturn:
    """Trains `run` in this process, as `train.py` would, and ends with its exit code; 0 at once if it is finished."""
    from etils import epath

    from iha_jax.comparison.launch import check_runs
    from iha_jax.comparison.results import is_finished
    from iha_jax.training.command import main as train

    try:
        check_runs(workdir, [run])
    except ValueError as error:
        refuse(error)
    if is_finished(epath.Path(workdir) / run.folder):
        _say(f"{run.folder} is finished already")
        sys.exit(0)
    _say(run.folder)
    train([*run.flags(workdir), *flags])


def run_here(workdir: str, runs: Sequence[Run], flags: Sequence[str]) -> NoReturn:
    """Trains all runs, one after another. Exit codes: 0 all finished, 75 interrupted, 1 some failed, 2 refused."""
    from iha_jax.comparison.launch import Launcher, check_runs, run_all

    try:
        check_runs(workdir, runs)
    except ValueError as error:
        refuse(error)
    with Launcher() as launcher:
        code = run_all(workdir, runs, launcher, _say, keep_going=True, flags=flags)
    if not code:
        report = ["python", "-m", "iha_jax.compare", f"--config={runs[0].path}", f"--workdir={workdir}"]
        _say(f"all {len(runs)} runs are finished; a table: {shlex.join([*report, '--report_only'])}")
    sys.exit(code)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Exit codes: 0 done, 75 preempted (run it again), 2 refused input, 1 when points failed; with --index that of
    `train.py`."""
    own, after = _split(list(sys.argv[1:] if arguments is None else arguments))
    overrides, rest = split_overrides(own)
    parser = argparse.ArgumentParser(prog="python -m iha_jax.sweep", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", required=True, help="a config file with get_sweep() or get_comparison()")
    parser.add_argument("--workdir", help="runs go to WORKDIR/<arm>/<settings>/seed<k>")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--dry_run", action="store_true", help="print one command a point, run nothing")
    mode.add_argument("--index", type=int, help="run this point alone, from 0")
    mode.add_argument("--count", action="store_true", help="print the number of points")
    flags = parser.parse_args(rest)
    if flags.workdir is None and not flags.count:
        parser.error("the following arguments are required: --workdir")
    try:
        runs = sweep_runs(flags.config, overrides)
    except ConfigError as error:
        refuse(error)
    if flags.count:
        print(len(runs))
        sys.exit(0)
    workdir = str(flags.workdir)
    if flags.dry_run:
        for run in runs:
            print(shlex.join(["python", "train.py", *run.flags(workdir), *after]))
        sys.exit(0)
    if flags.index is None:
        run_here(workdir, runs, after)
    if not 0 <= flags.index < len(runs):
        refuse(ValueError(f"--index={flags.index}: the sweep has {len(runs)} points, 0 to {len(runs) - 1}"))
    run_one(workdir, runs[flags.index], after)


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The sweep's own arguments, and those after `--`."""
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def _say(text: str) -> None:
    print(f"[sweep] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
