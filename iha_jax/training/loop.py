"""Training, from the first refusal to the last checkpoint, read from top to bottom."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from iha_jax.config import Config, ConfigError
from iha_jax.data.batches import train_batches
from iha_jax.data.corpus import Corpus, open_corpus
from iha_jax.parallel.mesh import check_batch_sizes, local_rows, make_mesh, place_batch
from iha_jax.parallel.processes import agree, in_turns, is_first
from iha_jax.parallel.rules import check_split
from iha_jax.training.banner import describe, kernels
from iha_jax.training.checkpoint import Checkpointer
from iha_jax.training.compilation_cache import Programs
from iha_jax.training.guard import Guard
from iha_jax.training.meter import Meter
from iha_jax.training.metrics import MetricsWriter, check_sinks
from iha_jax.training.optimizer import make_optimizer
from iha_jax.training.preemption import Preemption
from iha_jax.training.profile import Profile, profiled_steps
from iha_jax.training.progress import Progress, tell
from iha_jax.training.run_directory import check_data, check_run, note_start, open_run, seen_from_here
from iha_jax.training.saves import Saves
from iha_jax.training.spikes import LossSpike, SpikeDetector, batches_without_gaps, read_rollbacks, roll_back
from iha_jax.training.start_up import StartUp
from iha_jax.training.state import check_source, starting_state
from iha_jax.training.step import lower_train_step
from iha_jax.training.time_account import COMPILE, EVALUATE, RESTORE, SAVE, TimeAccount, process_start
from iha_jax.training.validation import Validation
from iha_jax.training.watchdog import Watchdog

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
    """Trains to `training.steps`, going on from the newest sound checkpoint of the run directory if there is one.

    After a loss spike, where `training.spike_threshold` asks for it, the run goes back to its newest checkpoint and
    leaves out the data that came before the spike.

    Returns the exit code: 0 when done and the last checkpoint was read back and found right, 75 when SIGTERM or SIGINT
    came and the state was saved.
    """
    began = process_start()
    with Preemption() as preemption:
        while True:
            try:
                return _attempt(job, preemption, start_up or StartUp(), began)
            except LossSpike as spike:
                rollback = roll_back(epath.Path(job.workdir), spike, job.config.training.max_rollbacks)
                left_out = f"leaving out the data of {rollback.skipped} steps"
                tell(f"WARNING: {spike}; going back to step {rollback.restored}, {left_out}")
            start_up, began = None, time.monotonic()


def _attempt(job: Job, preemption: Preemption, start_up: StartUp, began: float) -> int:
    """From the newest checkpoint, or from nothing, to the end of the run, a preemption or a loss spike."""
    config, training, mesh, corpus = job.config, job.config.training, job.mesh, job.corpus
    optimizer = make_optimizer(config.optimizer, training.steps)
    implementations = kernels(config, mesh)
    run = open_run(job.workdir, config, mesh=dict(mesh.shape), digests=corpus.digests, implementations=implementations)

    with (
        jax.set_mesh(mesh),
        Programs() as programs,
        Watchdog(training.watchdog_seconds) as watchdog,
        TimeAccount(run.path, began, watchdog.beat) as clock,
        Checkpointer(run.checkpoints, writable=True) as checkpoints,
        contextlib.ExitStack() as opened,
    ):
        # --- State: restored, warm-started or initial.
        clock.enter(RESTORE)
        state, carried = starting_state(config, optimizer, checkpoints, mesh, tell)
        clock.carry(carried)
        start_step = int(state["step"])
        sinks: Any = dict(tensorboard=training.tensorboard, wandb_project=training.wandb_project)
        writer = opened.enter_context(MetricsWriter(run.path, resume_step=start_step or None, **sinks))
        profile = opened.enter_context(Profile(run.path, job.profiled))
        progress = opened.enter_context(Progress(training.steps, start_step, quiet=not is_first()))
        progress.message(describe(config, mesh, start_step, corpus.describe()))
        start_up.mark("state")

        # --- Compile before the clock of training starts.
        clock.enter(COMPILE)
        compiling = time.perf_counter()
        train_step = lower_train_step(config, optimizer, state, mesh).compile()
        validate = Validation(config, corpus, mesh, watchdog.beat)
        progress.message(f"compiled the training step in {time.perf_counter() - compiling:.1f} s")
        start_up.mark("compile")

        # --- The pieces beside the loop, and what they share.
        meter = Meter(config, mesh, carried, clock)
        guard = Guard(training.max_skipped_steps, int(carried.get("skipped_steps", 0)), checkpoints.latest_step)
        spikes = SpikeDetector(training.spike_threshold, writer.training_losses())
        policy: Any = dict(every=training.checkpoint_every, keep=training.keep_checkpoints)
        own_step = start_step if start_step in checkpoints.common_steps() else None  # not another run's
        saves = Saves(checkpoints, **policy, verified=own_step, tell=progress.message)
        batches = batches_without_gaps(start_step, read_rollbacks(run.path), _batches_from(job))

        def settled() -> dict[str, Any]:
            """What a checkpoint remembers beside its state. The flags and rows up to it are settled first."""
            guard.catch_up()
            writer.flush()
            return meter.totals | {"skipped_steps": guard.total} | corpus.digests

        def evaluate(step: int) -> None:
            clock.enter(EVALUATE)
            row = meter.validation_row(step, validate(state["parameters"]))
            writer.write(row)
            progress.validated(step, row)
            clock.enter(SAVE)

        # --- Train. The order matters: log, evaluate, then save, so that a restored run never repeats or lacks a row.
        step, preempted = start_step, preemption.requested_before(start_step)
        if step % training.eval_every == 0 and not preempted and not writer.has_validation(step):
            evaluate(step)
            start_up.mark("validation")
            preempted = preemption.requested_before(step)
        while step < training.steps and not preempted:
            step += 1
            meter.start()
            with profile.step(step):
                state, metrics = train_step(state, place_batch(next(batches), mesh, training.batch_size))
            meter.count(metrics)
            guard.watch(step, metrics["skipped"])
            if step % training.log_every == 0 or step == training.steps:
                row = meter.training_row(step, metrics, guard.total)
                writer.write(row)
                progress.update(step, row)
                spikes.observe(step, row["loss"])
            meter.stop(state, SAVE, wait=step == start_step + 1 or profile.ends_at(step))
            if step == start_step + 1:
                start_up.mark("first step")
                note_start(run, start_up.facts(programs) | {"data": corpus.counts})
                progress.message(start_up.describe(programs))
            if profile.ends_at(step):
                progress.message(profile.close())
            preempted = preemption.requested(step)
            if step % training.eval_every == 0 and step < training.steps and not preempted:
                evaluate(step)
            saves.after_step(step, state, settled)

        # --- Leave: preempted, or done. The last checkpoint is sound before the row that says the run is finished.
        if step < training.steps:
            if step > start_step:
                saves.wait(step, state, settled)
            saved = f"step {step} is saved; " if step > start_step or own_step else ""
            progress.message(f"preempted: {saved}the same command goes on from there")
            return PREEMPTED
        clock.enter(SAVE)
        saves.finish(step, state, settled)
        if not writer.has_validation(step):
            evaluate(step)
        progress.message(clock.summary())
    return DONE


def _batches_from(job: Job) -> Callable[[int], Iterator[dict[str, np.ndarray]]]:
    """This process's batches from a position in the data on."""
    data, batch_size = job.config.data, job.config.training.batch_size
    return lambda position: train_batches(
        job.corpus.train,
        data.weights,
        seed=job.config.seed,
        batch_size=batch_size,
        start_step=position,
        local_rows=local_rows(job.mesh, batch_size),
        workers=data.workers,
    )
