"""Training, from the first refusal to the last checkpoint, read from top to bottom."""

import time
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from iha_jax.config import Config, ConfigError
from iha_jax.data.batches import train_batches
from iha_jax.data.corpus import Corpus, open_corpus
from iha_jax.parallel.mesh import check_batch_sizes, local_rows, make_mesh, place_batch
from iha_jax.parallel.processes import agree, in_turns, is_first, of_first
from iha_jax.parallel.rules import check_split
from iha_jax.training.banner import describe, kernels
from iha_jax.training.checkpoint import Checkpointer
from iha_jax.training.compilation_cache import Programs
from iha_jax.training.meter import Meter
from iha_jax.training.metrics import MetricsWriter, check_sinks
from iha_jax.training.optimizer import make_optimizer
from iha_jax.training.preemption import Preemption
from iha_jax.training.profile import Profile, profiled_steps
from iha_jax.training.progress import Progress
from iha_jax.training.run_directory import check_data, check_run, note_start, open_run, seen_from_here
from iha_jax.training.start_up import StartUp
from iha_jax.training.state import check_source, starting_state
from iha_jax.training.step import lower_train_step
from iha_jax.training.validation import Validation

DONE, PREEMPTED = 0, 75


@dataclass(frozen=True)
class Job:
    """A run whose input was found usable."""

    config: Config
    workdir: str
    mesh: Mesh
    corpus: Corpus
    profiled: range = range(0)  # steps of the profiler trace


def admit(config: Config, workdir: str, profile_steps: str = "") -> Job:
    """Checks everything a user can get wrong, before anything is compiled or written in the run directory.

    Raises:
      ValueError: (ConfigError, RunDirectoryError, ...) saying what cannot be used and what would be; in every process,
        when it is raised in one.
    """
    mesh = agree(lambda: _check(config, workdir), lambda _: seen_from_here(workdir))
    profiled = profiled_steps(profile_steps, config.training.steps)
    corpus = in_turns(lambda: open_corpus(config), lambda corpus: corpus.digests)
    agree(lambda: check_data(workdir, corpus.digests))
    return Job(config, workdir, mesh, corpus, profiled)


def _check(config: Config, workdir: str) -> Mesh:
    mesh = make_mesh(config.mesh)
    check_batch_sizes(config, mesh)
    check_split(config.model, mesh)
    if not config.model.causal:
        raise ConfigError(
            ["config.model.causal = False: each token would see the one it must predict; language models need True"]
        )
    kernels(config, mesh)
    check_run(workdir, config)
    check_source(config)
    check_sinks(config.training.tensorboard, config.training.wandb_project)
    return mesh


def train(job: Job, start_up: StartUp | None = None) -> int:
    """Trains to `training.steps`, resuming at the last checkpoint of the run directory if there is one.

    Returns the exit code: 0 when done, 75 when SIGTERM or SIGINT came and the state was saved.
    """
    config, mesh, corpus = job.config, job.mesh, job.corpus
    start_up = start_up or StartUp()
    optimizer = make_optimizer(config.optimizer, config.training.steps)
    implementations = kernels(config, mesh)
    run = open_run(job.workdir, config, mesh=dict(mesh.shape), digests=corpus.digests, implementations=implementations)

    with (
        jax.set_mesh(mesh),
        Preemption() as preemption,
        Programs() as programs,
        Checkpointer(run.checkpoints, keep=config.training.keep_checkpoints) as checkpoints,
        MetricsWriter(
            run.path,
            resume_step=checkpoints.latest_step(),
            tensorboard=config.training.tensorboard,
            wandb_project=config.training.wandb_project,
        ) as writer,
        Profile(run.path, job.profiled) as profile,
    ):
        # --- State: restored, warm-started or initial.
        state, carried = starting_state(config, optimizer, checkpoints, mesh)
        start_step = int(state["step"])
        progress = Progress(config.training.steps, start_step, quiet=not is_first())
        progress.message(describe(config, mesh, start_step))
        start_up.mark("state")

        # --- Compile before the clock starts.
        began = time.perf_counter()
        train_step = lower_train_step(config, optimizer, state, mesh).compile()
        validate = Validation(config, corpus, mesh)
        progress.message(f"compiled the training step in {time.perf_counter() - began:.1f} s")
        start_up.mark("compile")

        # --- Train. The order matters: log, evaluate, then save, so that a restored run never repeats or lacks a row.
        meter = Meter(config, mesh, carried)
        batches = train_batches(
            corpus.train,
            config.data.weights,
            seed=config.seed,
            batch_size=config.training.batch_size,
            start_step=start_step,
            local_rows=local_rows(mesh, config.training.batch_size),
            workers=config.data.workers,
        )
        if start_step == 0:
            writer.write(meter.validation_row(0, validate(state["parameters"])))
            start_up.mark("validation")
        meter.start()
        for step in range(start_step + 1, config.training.steps + 1):
            with profile.step(step):
                batch = place_batch(next(batches), mesh, config.training.batch_size)
                state, metrics = train_step(state, batch)
            meter.count(metrics)
            last = step == config.training.steps
            if step % config.training.log_every == 0 or last:
                row = meter.training_row(step, metrics)
                writer.write(row)
                progress.update(step, row)
            first, traced = step == start_step + 1, profile.ends_at(step)
            meter.stop(state, wait=first or traced)
            if first:
                start_up.mark("first step")
                note_start(run, start_up.facts(programs))
                progress.message(start_up.describe(programs))
            if traced:
                progress.message(profile.close())
            if step % config.training.eval_every == 0 and not last:
                row = meter.validation_row(step, validate(state["parameters"]))
                writer.write(row)
                progress.message(_validation_line(row))
            preempted = preemption.requested(step)
            if step % config.training.checkpoint_every == 0 or last or preempted:
                writer.flush()
                checkpoints.save(step, state, metadata=meter.totals | corpus.digests)
            if preempted and not last:
                checkpoints.wait()
                progress.message(f"preempted: saved step {step}; the same command resumes there")
                progress.close()
                return PREEMPTED
            meter.start()

        # --- The last checkpoint is on disk before the row that says the run is finished.
        checkpoints.wait()
        if of_first((writer.last_row("val") or {}).get("step")) != config.training.steps:
            row = meter.validation_row(config.training.steps, validate(state["parameters"]))
            writer.write(row)
            progress.message(_validation_line(row))
        progress.close()
    return DONE


def _validation_line(row: dict[str, Any]) -> str:
    return f"step {row['step']}: validation loss {row['loss']:.4f}, {row['bits_per_byte']:.4f} bits per byte"
