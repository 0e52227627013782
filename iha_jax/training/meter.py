"""Counting what a run has cost so far: tokens, useful FLOPs, seconds; and the rows of `metrics.jsonl` made of them."""

import resource
import sys
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from iha_jax.accounting import peak_flops, training_flops_per_token
from iha_jax.config import Config
from iha_jax.training.optimizer import learning_rate_schedule
from iha_jax.training.time_account import PRODUCTIVE, TimeAccount

FLOPS_OFFSET = "flops_offset"  # what the steps of another run, gone on with here, cost more than such steps here


class Meter:
    """Totals since step 0, carried over restarts. `seconds` are those between `start` and `stop`: training alone
    counts, not compilation, evaluation or saving."""

    def __init__(self, config: Config, mesh: Mesh, carried: dict[str, Any], clock: TimeAccount):
        self._config, self._clock = config, clock
        self._schedule = learning_rate_schedule(config.optimizer, config.training.steps)
        self._flops_per_step = flops_per_step(config)
        self._flops_offset = carried.get(FLOPS_OFFSET, 0.0)
        peak = peak_flops(jax.devices()[0].device_kind)
        self._peak = peak * mesh.size if peak else None
        self._tokens = float(carried.get("tokens", 0))
        self._window = (0, self._tokens, clock.productive)  # steps, tokens and seconds at the last training row
        self._steps = 0
        self._unread: list[jax.Array] = []  # counted tokens of steps that may still be running

    def start(self) -> None:
        self._clock.enter(PRODUCTIVE)

    def stop(self, state: Any, then: str, *, wait: bool = False) -> None:
        """What follows is `then`, a category of wall time. Waits for the step if asked to, and always on a CPU, where
        queued steps would otherwise be paid for by whoever comes next."""
        if wait or jax.default_backend() == "cpu":
            jax.block_until_ready(state["step"])
        self._clock.enter(then)

    def count(self, metrics: dict[str, jax.Array]) -> None:
        """One more step. Its tokens, of the batches of all processes, are read when they are first needed."""
        self._unread.append(metrics["counted_tokens"])
        self._steps += 1

    def _read_counts(self) -> None:
        self._tokens += sum(float(tokens) for tokens in jax.device_get(self._unread))
        self._unread = []

    @property
    def totals(self) -> dict[str, float]:
        """What a checkpoint carries, so that a resumed run goes on counting. Waits for the last step."""
        self._read_counts()
        return {"tokens": self._tokens, FLOPS_OFFSET: self._flops_offset, **self._clock.totals}

    def training_row(self, step: int, metrics: dict[str, jax.Array], skipped: int) -> dict[str, Any]:
        """One `train` row: loss of this step, throughput since the last row. Waits for the step to finish. `skipped`:
        steps so far that changed nothing, the schedule included."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self._read_counts()
        before, self._window = self._window, (self._steps, self._tokens, self._clock.productive)
        steps, tokens, seconds = (now - then for now, then in zip(self._window, before, strict=True))
        flops_per_second = self._flops_per_step * steps / seconds
        return {
            "step": step,
            "split": "train",
            "loss": values["loss"],
            **self._costs(step),
            "tokens_per_second": tokens / seconds,
            "mfu": flops_per_second / self._peak if self._peak else None,
            "grad_norm": values["grad_norm"],
            "learning_rate": float(np.asarray(self._schedule(max(0, step - 1 - skipped)))),
            "skipped_steps": skipped,
        }

    def validation_row(self, step: int, numbers: dict[str, float]) -> dict[str, Any]:
        """One `val` row: losses and diagnostics at what cost."""
        costs = self._costs(step) | {"peak_memory_bytes": peak_memory_bytes()}
        return {"step": step, "split": "val", **numbers, **costs, **self._clock.totals}

    def _costs(self, step: int) -> dict[str, float]:
        self._read_counts()
        flops = self._flops_per_step * step + self._flops_offset
        return {"tokens": self._tokens, "flops": flops, "seconds": self._clock.productive}


def flops_per_step(config: Config) -> float:
    """Useful FLOPs of one training step, padding and uncounted tokens included."""
    return training_flops_per_token(config.model) * config.training.batch_size * config.model.context_length


def peak_memory_bytes() -> int:
    """The largest memory held so far: of the first local device where it says so, else of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
