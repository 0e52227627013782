"""The command over the experiments of one config file: `python -m iha_jax.relation_composition` and
`python -m iha_jax.learned_tasks`."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from etils import epath

from iha_jax.relation_composition.runs import check_points, run_point
from iha_jax.relation_composition.training import Split
from iha_jax.training.command import CACHE_HELP, refuse, split_overrides
from iha_jax.training.compilation_cache import use_cache
from iha_jax.training.preemption import Preemption

DONE, PREEMPTED = 0, 75


class Kind(NamedTuple):
    """One kind of experiments. `load_points` and `examples` raise ValueError for what cannot be used."""

    name: str  # of its package
    description: str
    folders: str  # how results lie in an experiment's folder
    load_points: Callable[[str, Sequence[str]], dict[str, list[Any]]]  # of a spec and overrides
    examples: Callable[[Any], Mapping[str, Split]]  # of an experiment
    report: Callable[[epath.Path, str, Sequence[Any]], str]  # of its folder, its name and its points


@dataclass(frozen=True)
class Grid:
    """One experiment whose input was found usable."""

    name: str
    folder: epath.Path
    points: list[Any]
    data: Mapping[str, Split]


def admit(kind: Kind, spec: str, workdir: str, overrides: Sequence[str]) -> list[Grid]:
    """Checks everything a user can get wrong, before anything is trained or written.

    Raises:
      ValueError: for a config, data or a workdir that cannot be used.
    """
    grids = kind.load_points(spec, overrides)
    folders = {name: epath.Path(workdir) / name for name in grids}
    for name, points in grids.items():
        check_points(folders[name], points)
    return [Grid(name, folders[name], points, kind.examples(points[0].experiment)) for name, points in grids.items()]


def train(kind: Kind, grids: Sequence[Grid]) -> int:
    """Trains what is not finished and prints the reports. Returns the exit code."""

    def say(text: str) -> None:
        print(f"[{kind.name}] {text}", file=sys.stderr, flush=True)

    with Preemption() as preemption:
        for grid in grids:
            for point in grid.points:
                if not run_point(grid.folder, point, grid.data, preemption, say):
                    say("preempted: the state is saved; the same command goes on from there")
                    return PREEMPTED
            print(kind.report(grid.folder, grid.name, grid.points), flush=True)
    return DONE


def run(kind: Kind, arguments: Sequence[str] | None = None) -> NoReturn:
    """Exit codes: 0 done, 75 preempted and saved (run it again), 2 refused input."""
    overrides, rest = split_overrides(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog=f"python -m iha_jax.{kind.name}", description=kind.description)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", required=True, help="a config file with get_experiment(name), or FILE:NAME,NAME")
    parser.add_argument("--workdir", required=True, help=f"results go to WORKDIR/<experiment>/{kind.folders}")
    parser.add_argument("--compilation_cache", default="", help=CACHE_HELP + " the workdir")
    parser.add_argument("--report_only", action="store_true", help="train nothing, rebuild the report")
    flags = parser.parse_args(rest)
    try:
        use_cache(flags.compilation_cache, flags.workdir)
        grids = admit(kind, flags.config, flags.workdir, overrides)
        if flags.report_only:
            for grid in grids:
                print(kind.report(grid.folder, grid.name, grid.points))
            sys.exit(DONE)
    except ValueError as error:
        refuse(error)
    sys.exit(train(kind, grids))
