"""`python -m iha_jax.relation_composition --config=configs/relation_composition.py[:reduced] --workdir=DIR`.

Trains every arm of an experiment at every learning rate, all seeds of one side by side, and writes `report.md`, `.csv`
and `.png` into `DIR/<experiment>`. Run it again to go on where it stopped: finished points are not run again.
`--config.experiment.seeds=10` and the like change the experiment, `--config.model.width=64` the model of all arms.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from etils import epath

from iha_jax.data.relation_composition import Examples
from iha_jax.relation_composition.experiment import Point, examples, load_points
from iha_jax.relation_composition.report import report
from iha_jax.relation_composition.runs import check_points, run_point
from iha_jax.training.command import CACHE_HELP, refuse, split_overrides
from iha_jax.training.compilation_cache import use_cache
from iha_jax.training.preemption import Preemption

DONE, PREEMPTED = 0, 75


@dataclass(frozen=True)
class Grid:
    """One experiment whose input was found usable."""

    name: str
    folder: epath.Path
    points: list[Point]
    data: dict[str, Examples]


def admit(spec: str, workdir: str, overrides: Sequence[str]) -> list[Grid]:
    """Checks everything a user can get wrong, before anything is trained or written.

    Raises:
      ValueError: for a config, data or a workdir that cannot be used.
    """
    grids = load_points(spec, overrides)
    folders = {name: epath.Path(workdir) / name for name in grids}
    for name, points in grids.items():
        check_points(folders[name], points)
    return [Grid(name, folders[name], points, examples(points[0].experiment)) for name, points in grids.items()]


def train(grids: Sequence[Grid]) -> int:
    """Trains what is not finished and prints the reports. Returns the exit code."""
    with Preemption() as preemption:
        for grid in grids:
            for point in grid.points:
                if not run_point(grid.folder, point, grid.data, preemption, _say):
                    _say("preempted: the state is saved; the same command goes on from there")
                    return PREEMPTED
            print(report(grid.folder, grid.name, grid.points), flush=True)
    return DONE


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Exit codes: 0 done, 75 preempted and saved (run it again), 2 refused input."""
    overrides, rest = split_overrides(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m iha_jax.relation_composition", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", required=True, help="a config file with get_experiment(name), or FILE:NAME,NAME")
    parser.add_argument("--workdir", required=True, help="results go to WORKDIR/<experiment>/<arm>/learning_rate=<r>")
    parser.add_argument("--compilation_cache", default="", help=CACHE_HELP + " the workdir")
    parser.add_argument("--report_only", action="store_true", help="train nothing, rebuild the report")
    flags = parser.parse_args(rest)
    try:
        use_cache(flags.compilation_cache, flags.workdir)
        grids = admit(flags.config, flags.workdir, overrides)
        if flags.report_only:
            for grid in grids:
                print(report(grid.folder, grid.name, grid.points))
            sys.exit(DONE)
    except ValueError as error:
        refuse(error)
    sys.exit(train(grids))


def _say(text: str) -> None:
    print(f"[relation_composition] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
