"""The command line of training: flags to one library call, and exceptions to exit codes."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from iha_jax.parallel.start import add_process_flags, start_processes
from iha_jax.training.start_up import StartUp

REFUSED = 2


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separates `--config.a.b=value` (returned as "a.b=value") from all other arguments."""
    prefix = "--config."
    overrides = [a.removeprefix(prefix) for a in arguments if a.startswith(prefix)]
    return overrides, [a for a in arguments if not a.startswith(prefix)]


def refuse(error: Exception) -> NoReturn:
    """Ends the process with exit code 2: the input was refused, and nothing was trained or written over."""
    print(f"refused: {error}", file=sys.stderr)
    sys.exit(REFUSED)


def _hand_over(spec: str, arguments: Sequence[str]) -> None:
    """Runs the program that a config file names as `PROGRAM`, where it describes something else than a language model:
    the same command trains whatever a config file holds. Returns where it names none."""
    from iha_jax.config_file import load_module

    try:
        program = getattr(load_module(spec.partition(":")[0]), "PROGRAM", "")
    except ValueError:
        return  # refused later, where several processes find it together
    if program:
        importlib.import_module(f"{program}.__main__").main(arguments)


CACHE_HELP = "folder or bucket of compiled programs, or off; default: JAX_COMPILATION_CACHE_DIR, else .jax_cache beside"


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Exit codes: 0 done, 75 preempted and saved (run the same command again), 2 refused input, else a failure."""
    overrides, rest = split_overrides(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train one model. Calling it again with the same workdir resumes at the last checkpoint.",
        epilog="Any field of configs/base.py can be set: --config.model.width=256 --config.training.steps=1000",
    )
    parser.add_argument("--config", required=True, help="a config file, or FILE:ARM where it has several arms")
    parser.add_argument("--workdir", required=True, help="the run directory")
    parser.add_argument("--compilation_cache", default="", help=CACHE_HELP + " the workdir")
    parser.add_argument("--profile_steps", default="", help="START:STOP, steps to trace into WORKDIR/profile")
    add_process_flags(parser)
    flags = parser.parse_args(rest)
    start_up = StartUp()
    _hand_over(flags.config, sys.argv[1:] if arguments is None else arguments)

    # Only now: importing jax takes seconds, --help should not.
    from iha_jax.config_file import load_config
    from iha_jax.parallel.processes import agree
    from iha_jax.training.checkpoint import CheckpointMismatch
    from iha_jax.training.compilation_cache import use_cache
    from iha_jax.training.loop import admit, train
    from iha_jax.training.run_directory import common_facts

    start_up.mark("imports")
    try:
        start_processes(flags)
        use_cache(flags.compilation_cache, flags.workdir)
        config = agree(lambda: load_config(flags.config, overrides), lambda config: common_facts(config, flags.workdir))
        job = admit(config, flags.workdir, flags.profile_steps)
    except ValueError as error:
        refuse(error)
    start_up.mark("data")
    try:
        sys.exit(train(job, start_up))
    except CheckpointMismatch as error:  # found when it is opened, before anything is compiled
        refuse(error)
