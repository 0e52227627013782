"""`python -m iha_jax.plan --config=configs/X.py[:arm] --topology=v5p:4x4x8 [--out=FILE] [--config.a.b=value ...]`.

Compiles the training step for a machine that is not here and prints what it needs: memory, FLOPs, collectives, time.

    --topology=v5e:16x16 --num_slices=2      two slices joined by the data-center network; config.mesh.data spans them
    --topology=h100:16x8                     16 nodes of 8 GPUs, by fake CPU devices: shardings and collectives only
    --topology=v5p:4x4x8 --sweep_topologies  every slice of that generation up to this one
    --topology=v5p:4x4x8 --search            mesh shapes, micro-batches and remat policies; the fastest that fit
    --sweep_topologies --search              the fastest setting of each slice by closed forms, nothing compiled

TPUs need libtpu (pip install libtpu) and no TPU. Nothing is written but --out.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from iha_jax.parallel.topology import Topology, environment, parse_topology
from iha_jax.training.command import refuse, split_overrides

FAILED = 1


def progress() -> Callable[[str], None]:
    """Prints what is going on, with the seconds since the start."""
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[plan {time.monotonic() - began:4.0f} s] {text}", file=sys.stderr, flush=True)

    return say


def prepare(topology: Topology) -> None:
    """Sets what jax reads when it starts. Raises TopologyError when it started already."""
    if "jax" in sys.modules and topology.platform == "gpu":
        raise RuntimeError("jax is imported already: fake devices have to be asked for before")
    os.environ.update(environment(topology))


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Exit codes: 0 planned (the step may not fit: `fits`), 2 refused input, 1 a step that cannot be compiled."""
    overrides, rest = split_overrides(sys.argv[1:] if arguments is None else arguments)
    flags = _parser().parse_args(rest)
    say = progress()
    try:
        _check_out(flags.out)
        topology = parse_topology(flags.topology, flags.num_slices)
    except ValueError as error:
        refuse(error)
    prepare(topology)
    text, found = _plan(flags, overrides, topology, say)
    print(text)
    if flags.out:
        _write(flags.out, {"config": flags.config, "overrides": overrides} | found)
    sys.exit(0)


def _plan(
    flags: argparse.Namespace, overrides: Sequence[str], topology: Topology, say: Callable[[str], None]
) -> tuple[str, dict[str, Any]]:
    """What to print and what to write."""
    say("starting jax")
    # Only now: jax reads the environment when it is imported.
    from iha_jax.config_file import load_config
    from iha_jax.planning.compiled import PlanError
    from iha_jax.planning.plan import make_plan
    from iha_jax.planning.report import as_json, table
    from iha_jax.planning.search import search, sweep, sweep_estimates

    try:
        config = load_config(flags.config, overrides)
        if flags.sweep_topologies and flags.search:
            return sweep_estimates(config, topology, flags.efficiency)
        if flags.sweep_topologies:
            return sweep(flags.config, overrides, topology, say, flags.efficiency)
        if flags.search:
            return search(config, topology, say, compiled=flags.compiled, efficiency=flags.efficiency)
        plan = make_plan(config, topology, say, flags.efficiency, code=not flags.skip_code)
        return table(plan), as_json(plan)
    except PlanError as error:
        print(f"cannot be compiled: {error}", file=sys.stderr)
        sys.exit(FAILED)
    except ValueError as error:
        refuse(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m iha_jax.plan", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", required=True, help="a config file, or FILE:ARM where it has several arms")
    parser.add_argument("--topology", required=True, help="such as v5p:4x4x8, v5e:16x16 or h100:16x8")
    parser.add_argument("--num_slices", type=int, default=1, help="slices of that topology")
    parser.add_argument("--out", default="", help="a file for the plan as JSON")
    parser.add_argument("--sweep_topologies", action="store_true", help="plan for every smaller slice too")
    parser.add_argument("--search", action="store_true", help="search for the fastest settings that fit")
    parser.add_argument("--compiled", type=int, default=3, help="how many settings a search compiles")
    parser.add_argument("--skip_code", action="store_true", help="end once memory is assigned: some times faster")
    parser.add_argument("--efficiency", type=_efficiency, default=0.6, help="of peak FLOP/s in matrix products (0.6)")
    return parser


def _efficiency(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a number above 0, at most 1")
    return value


def _check_out(path: str) -> None:
    if path and (Path(path).is_dir() or not Path(path).parent.is_dir()):
        raise ValueError(f"--out={path}: expected a file in a folder that exists")


def _write(path: str, found: dict[str, Any]) -> None:
    """Whole or not at all."""
    partial = Path(f"{path}.partial")
    partial.write_text(json.dumps(found, indent=2) + "\n")
    partial.replace(path)


if __name__ == "__main__":
    main()
