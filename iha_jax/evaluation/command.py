"""The command line of evaluation: restores a run and prints or writes what its tasks find."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

REFUSED = 2


@dataclass(frozen=True)
class Restored:
    """A run's config and the parameters of one of its steps."""

    config: Any
    parameters: Any
    step: int
    mesh: Any


def restore(workdir: str, step: int | None) -> Restored:
    """Raises ValueError for a directory that is no run, a step it does not have, or parameters that do not fit."""
    from etils import epath

    from iha_jax.parallel.mesh import mesh_for_evaluation
    from iha_jax.training.checkpoint import Checkpointer
    from iha_jax.training.run_directory import load_run_config
    from iha_jax.training.state import abstract_parameters_on

    config = load_run_config(workdir)
    mesh = mesh_for_evaluation(config.mesh)
    with Checkpointer(epath.Path(workdir) / "checkpoints", keep=None) as checkpoints:
        found = step if step is not None else checkpoints.latest_step()
        if found is None:
            raise ValueError(f"--workdir={workdir}: the run has no checkpoint yet")
        return Restored(
            config, checkpoints.restore_parameters(abstract_parameters_on(config, mesh), found), found, mesh
        )


def loss_task(run: Restored, flags: argparse.Namespace) -> dict[str, Any]:
    """Validation loss (nats a token) and bits per byte on the rows the training run was validated on."""
    import jax

    from iha_jax.data.batches import validation_batches
    from iha_jax.data.corpus import open_tokenizer, open_validation_rows
    from iha_jax.evaluation.perplexity import evaluate
    from iha_jax.parallel.mesh import check_batch_sizes
    from iha_jax.training.step import make_eval_step

    config = run.config
    check_batch_sizes(config, run.mesh)
    tokenizer = open_tokenizer(config)
    rows = open_validation_rows(config, tokenizer)
    count = config.training.eval_rows if flags.eval_rows is None else flags.eval_rows
    batches = validation_batches(rows, batch_size=config.training.eval_batch_size, num_rows=count or None)
    with jax.set_mesh(run.mesh):
        return evaluate(jax.jit(make_eval_step(config)), run.parameters, batches, tokenizer.byte_lengths, run.mesh)


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
    return parser


def _check_out(out: str | None) -> None:
    """Refuses before the work is done what could not be written after it."""
    from etils import epath

    if out and (epath.Path(out).is_dir() or not epath.Path(out).parent.is_dir()):
        raise ValueError(f"--out={out}: expected a file name in a directory that exists")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Exit codes: 0 done, 2 refused input, else a failure."""
    flags = _parser().parse_args(arguments)
    try:
        names = [name for name in flags.tasks.split(",") if name]
        unknown = [name for name in names if name not in TASKS]
        if unknown or not names:
            raise ValueError(f"--tasks={flags.tasks}: expected some of {', '.join(TASKS)}")
        if flags.new_tokens < 1 or not flags.temperature >= 0:
            raise ValueError(
                f"--new_tokens={flags.new_tokens} --temperature={flags.temperature}: expected at least 1, 0"
            )
        _check_out(flags.out)
        run = restore(flags.workdir, flags.step)
        results = {name: TASKS[name](run, flags) for name in names}
    except ValueError as error:
        print(f"refused: {error}", file=sys.stderr)
        sys.exit(REFUSED)
    if "loss" in results:
        found = results["loss"]
        print(f"step {run.step}: loss {found['loss']:.4f} nats a token, {found['bits_per_byte']:.4f} bits per byte")
    if "sample" in results:
        found = results["sample"]
        print(
            f"--- {found['prompt']!r} continued by {found['tokens']} tokens\n{found['prompt']}{found['continuation']}"
        )
    if flags.out:
        from etils import epath

        epath.Path(flags.out).write_text(json.dumps({"step": run.step, "tasks": results}, indent=2) + "\n")
    sys.exit(0)
