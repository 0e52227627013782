"""The command line of evaluation: restores a run and prints or writes what its tasks find."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from iha_jax.parallel.start import add_process_flags, common_flags, start_processes
from iha_jax.training.command import CACHE_HELP, REFUSED


@dataclass(frozen=True)
class Restored:
    """A run's config and the parameters of one of its steps."""

    config: Any
    parameters: Any
    step: int
    mesh: Any


def restore(workdir: str, step: int | None) -> Restored:
    """Raises ValueError, in every process when in one, for a directory that is no run, a step it does not have, or
    parameters that do not fit."""
    from etils import epath

    from iha_jax.parallel.mesh import mesh_for_evaluation
    from iha_jax.parallel.processes import agree
    from iha_jax.training.checkpoint import Checkpointer
    from iha_jax.training.run_directory import common_facts, load_run_config
    from iha_jax.training.state import abstract_parameters_on

    config = agree(lambda: load_run_config(workdir), lambda config: common_facts(config, workdir))
    mesh = mesh_for_evaluation(config.mesh)
    with Checkpointer(epath.Path(workdir) / "checkpoints", writable=False) as checkpoints:

        def choose() -> int:
            found = step if step is not None else checkpoints.latest_step()
            if found is None:
                raise ValueError(f"--workdir={workdir}: the run has no checkpoint yet")
            return found

        found = agree(choose, lambda found: {f"step of --workdir={workdir}": found})
        return Restored(
            config, checkpoints.restore_parameters(abstract_parameters_on(config, mesh), found), found, mesh
        )


def loss_task(run: Restored, flags: argparse.Namespace) -> dict[str, Any]:
    """Validation loss (nats a token) and bits per byte on the rows the training run was validated on."""
    import jax

    from iha_jax.data.corpus import open_tokenizer, open_validation_rows
    from iha_jax.evaluation.perplexity import evaluate
    from iha_jax.parallel.mesh import check_batch_sizes
    from iha_jax.parallel.processes import in_turns
    from iha_jax.training.step import make_eval_step

    config = run.config
    check_batch_sizes(config, run.mesh)
    tokenizer = open_tokenizer(config)
    rows = in_turns(lambda: open_validation_rows(config, tokenizer), lambda rows: {"digest of the rows": rows.digest})
    count = config.training.eval_rows if flags.eval_rows is None else flags.eval_rows
    with jax.set_mesh(run.mesh):
        return evaluate(
            jax.jit(make_eval_step(config)),
            run.parameters,
            rows,
            tokenizer.byte_lengths,
            run.mesh,
            batch_size=config.training.eval_batch_size,
            num_rows=count or None,
        )


def sample_task(run: Restored, flags: argparse.Namespace) -> dict[str, Any]:
    """A continuation of the prompt, which is taken as the beginning of a document."""
    import numpy as np

    from iha_jax.data.corpus import open_tokenizer
    from iha_jax.evaluation.generate import sample

    tokenizer = open_tokenizer(run.config)
    prompt = np.concatenate([[tokenizer.document_id], tokenizer.encode(flags.prompt)])
    tokens = sample(
        run.config.model,
        run.parameters,
        prompt,
        new_tokens=flags.new_tokens,
        temperature=flags.temperature,
        seed=flags.seed,
        stop_token=tokenizer.document_id,
    )
    return {
        "prompt": flags.prompt,
        "continuation": tokenizer.decode(tokens),
        "tokens": len(tokens),
        "temperature": flags.temperature,
        "seed": flags.seed,
    }


TASKS: dict[str, Callable[[Restored, argparse.Namespace], dict[str, Any]]] = {"loss": loss_task, "sample": sample_task}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="eval.py", description="Evaluate a checkpoint of a training run.")
    parser.add_argument("--workdir", required=True, help="the run directory")
    parser.add_argument("--step", type=int, help="which checkpoint; default: the last")
    parser.add_argument("--tasks", default="loss,sample", help=f"comma-separated, of {', '.join(TASKS)}")
    parser.add_argument("--out", help="write the results to this JSON file too")
    parser.add_argument("--eval_rows", type=int, help="validation rows; 0: all; default: as in training")
    parser.add_argument("--prompt", default="def ", help="what sample continues")
    parser.add_argument("--new_tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compilation_cache", default="", help=CACHE_HELP + " the workdir")
    add_process_flags(parser)
    return parser


def _task_names(flags: argparse.Namespace) -> list[str]:
    """The tasks asked for. Raises ValueError before the work is done for what could not be done or written after it."""
    from etils import epath

    from iha_jax.data.storage import is_local
    from iha_jax.parallel.processes import is_first

    names = [name for name in flags.tasks.split(",") if name]
    if not names or any(name not in TASKS for name in names):
        raise ValueError(f"--tasks={flags.tasks}: expected some of {', '.join(TASKS)}")
    if flags.new_tokens < 1 or not flags.temperature >= 0:
        raise ValueError(f"--new_tokens={flags.new_tokens} --temperature={flags.temperature}: expected at least 1, 0")
    out = epath.Path(flags.out) if flags.out and is_first() else None
    if out and (out.is_dir() or (is_local(out) and not out.parent.is_dir())):
        raise ValueError(f"--out={flags.out}: expected a file name in a directory that exists")
    return names


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Exit codes: 0 done, 2 refused input, else a failure."""
    flags = _parser().parse_args(arguments)

    # Only now: importing jax takes seconds, --help should not.
    from iha_jax.parallel.processes import agree, is_first
    from iha_jax.training.compilation_cache import use_cache

    try:
        start_processes(flags)
        names = agree(lambda: _task_names(flags), lambda _: common_flags(flags))
        use_cache(flags.compilation_cache, flags.workdir)
        run = restore(flags.workdir, flags.step)
        results = {name: TASKS[name](run, flags) for name in names}
    except ValueError as error:
        print(f"refused: {error}", file=sys.stderr)
        sys.exit(REFUSED)
    if is_first():
        _report(run.step, results, flags.out)
    sys.exit(0)


def _report(step: int, results: dict[str, dict[str, Any]], out: str | None) -> None:
    if "loss" in results:
        found = results["loss"]
        print(f"step {step}: loss {found['loss']:.4f} nats a token, {found['bits_per_byte']:.4f} bits per byte")
    if "sample" in results:
        found = results["sample"]
        print(
            f"--- {found['prompt']!r} continued by {found['tokens']} tokens\n{found['prompt']}{found['continuation']}"
        )
    if out:
        from etils import epath

        epath.Path(out).write_text(json.dumps({"step": step, "tasks": results}, indent=2) + "\n")
