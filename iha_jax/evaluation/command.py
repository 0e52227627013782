"""The command line of evaluation: restores a run, and prints and writes what its tasks find."""

import argparse
import contextlib
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn

from iha_jax.parallel.start import add_process_flags, common_flags, start_processes
from iha_jax.training.command import CACHE_HELP, refuse

DEFAULT_TASKS = "loss,sample"

if TYPE_CHECKING:  # importing jax takes seconds, --help should not
    from iha_jax.evaluation.tasks import Options, TaskResult


def parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parser = argparse.ArgumentParser(prog="eval.py", description="Evaluate a checkpoint of a training run.")
    parser.add_argument("--workdir", required=True, help="the run directory")
    parser.add_argument("--step", type=int, help="which checkpoint; default: the last")
    parser.add_argument("--tasks", default=DEFAULT_TASKS, help="comma-separated; a wrong name lists them all")
    parser.add_argument("--out", help="write the results to this JSON file; default: WORKDIR/evaluations/step_N.json")
    parser.add_argument("--batch_size", type=int, default=16, help="prompts generated or scored at once")
    parser.add_argument("--too_long", choices=("truncate", "refuse"), default="truncate", help="prompts, on the left")
    parser.add_argument("--compilation_cache", default="", help=CACHE_HELP + " the workdir")
    tasks = parser.add_argument_group("tasks", "each has its own defaults")
    tasks.add_argument("--data", action="append", default=[], metavar="NAME=PATH", help="a task's file; repeatable")
    tasks.add_argument("--limit", type=int, help="the first examples of a task alone")
    tasks.add_argument("--shots", type=int, help="solved examples in the prompt")
    tasks.add_argument(
        "--chat", action="store_true", help="prompts as a user's turn, for models tuned on conversations"
    )
    tasks.add_argument("--lengths", default="", help="of prompts, in tokens, comma-separated")
    tasks.add_argument("--allow_code_execution", action="store_true", help="run generated programs, in a sandbox")
    tasks.add_argument("--eval_rows", type=int, help="loss: validation rows; 0: all; default: as in training")
    tasks.add_argument("--prompt", default="def ", help="sample: what is continued")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--samples", type=int, help="of each prompt")
    sampling.add_argument("--max_tokens", "--new_tokens", type=int, help="of each sample, at most")
    sampling.add_argument("--temperature", type=float, help="0: always the likeliest token")
    sampling.add_argument("--top_k", type=int, help="the likeliest tokens alone; 0: all")
    sampling.add_argument("--top_p", type=float, help="the likeliest tokens that make up this probability")
    sampling.add_argument("--seed", type=int, default=0)
    add_process_flags(parser)
    return parser


def _options(flags: argparse.Namespace) -> "Options":
    """Raises ValueError, naming all flags whose values cannot be used."""
    from iha_jax.evaluation.tasks import DATA, Options

    lowest = dict(batch_size=1, limit=1, shots=0, eval_rows=0, samples=1, max_tokens=1, top_k=0, temperature=0)
    problems = [
        f"--{name}={value}: expected {low} or more"
        for name, low in lowest.items()
        if (value := getattr(flags, name)) is not None and not value >= low
    ]
    if flags.top_p is not None and not 0 < flags.top_p <= 1:
        problems.append(f"--top_p={flags.top_p}: expected more than 0 and at most 1")
    pairs = [pair.partition("=") for pair in flags.data]
    problems += [
        f"--data={''.join(p)}: expected NAME=PATH, such as gsm8k=test.jsonl" for p in pairs if not p[0] or not p[2]
    ]
    unknown = [name for name, _, _ in pairs if name and name not in DATA]
    problems += [f"--data={name}=...: expected one of {', '.join(DATA)}" for name in unknown]
    lengths = [part for part in flags.lengths.split(",") if part]
    if not all(part.isdigit() and int(part) for part in lengths):
        problems.append(f"--lengths={flags.lengths}: expected numbers of tokens, such as 1024,2048")
    if problems:
        raise ValueError("\n  ".join(problems))
    given = ("limit", "shots", "samples", "max_tokens", "temperature", "top_k", "top_p", "seed", "chat", "eval_rows")
    given += ("prompt", "allow_code_execution")
    return Options(
        data={name: path for name, _, path in pairs},
        lengths=tuple(map(int, lengths)),
        **{name: getattr(flags, name) for name in given},
    )


def _check(flags: argparse.Namespace) -> "tuple[list[str], Options]":
    """The tasks asked for. Raises ValueError before the work is done for what could not be done or written after it."""
    from etils import epath

    from iha_jax.data.storage import is_local
    from iha_jax.evaluation.tasks import load_task
    from iha_jax.parallel.processes import is_first

    names = list(dict.fromkeys(name for name in flags.tasks.split(",") if name))
    for name in names or [""]:
        try:
            load_task(name)
        except ValueError as error:
            raise ValueError(f"--tasks={flags.tasks}: {error}") from error
    options = _options(flags)
    out = epath.Path(flags.out) if flags.out and is_first() else None
    if out and (out.is_dir() or (is_local(out) and not out.parent.is_dir())):
        raise ValueError(f"--out={flags.out}: expected a file name in a directory that exists")
    return names, options


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Exit codes: 0 done, 2 refused input, else a failure."""
    arguments = sys.argv[1:] if arguments is None else arguments
    flags = parser().parse_args(arguments)

    from etils import epath

    from iha_jax.evaluation.results import table, write_results
    from iha_jax.evaluation.run import RunModel, restore
    from iha_jax.evaluation.tasks import load_task
    from iha_jax.parallel.processes import agree, is_first
    from iha_jax.training.compilation_cache import use_cache
    from iha_jax.training.run_directory import evaluation_file

    results: dict[str, TaskResult] = {}
    try:
        start_processes(flags)
        names, options = agree(lambda: _check(flags), lambda _: common_flags(flags))
        use_cache(flags.compilation_cache, flags.workdir)
        run = restore(flags.workdir, flags.step)
        model = RunModel(run, batch_size=flags.batch_size, too_long=flags.too_long)
        path = epath.Path(flags.out) if flags.out else evaluation_file(flags.workdir, run.step)
        for name in names:
            results[name] = load_task(name)(model, options)
            if is_first():  # after each task: a later one may fail
                write_results(path, run, results, arguments, add=not flags.out)
    except ValueError as error:
        _tell_others(error)
        refuse(error)
    if is_first():
        _print_samples(results)
        print(f"step {run.step}, {path}\n{table(results)}")
    sys.exit(0)


def _tell_others(error: ValueError) -> None:
    """What one process alone refuses, the others learn where they would next agree on something."""
    from iha_jax.parallel.processes import Disagreement, agree

    def refused() -> NoReturn:
        raise error

    if not isinstance(error, Disagreement):
        with contextlib.suppress(ValueError):
            agree(refused)


def _print_samples(results: "Mapping[str, TaskResult]") -> None:
    for record in results["sample"].records if "sample" in results else ():
        print(f"--- {record['prompt']!r} continued by {record['tokens']} tokens")
        print(f"{record['prompt']}{record['continuation']}")
