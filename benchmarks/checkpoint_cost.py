"""What fingerprints and the guard against numbers that are not finite cost, on this machine.

    python -m benchmarks.checkpoint_cost --megabytes=500

Saving: fingerprints of all arrays and the checksums of the written files, as a fraction of the time from the call of
`save` to a confirmed checkpoint. A step: with `make_train_step`'s guard against the same step without it, in turn.
Bars: 10 % and 2 % (docs/reliability.md).
"""

import argparse
import statistics
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from configs import base
from iha_jax.config import resolve
from iha_jax.training import manifest, step
from iha_jax.training.checkpoint import Checkpointer
from iha_jax.training.fingerprint import inspect
from iha_jax.training.optimizer import make_optimizer


def state_of(megabytes: int) -> dict[str, Any]:
    """Float32 arrays of 8 MiB, as a model and its two moments would be, in all `megabytes`."""
    keys = jax.random.split(jax.random.key(0), max(1, megabytes // 8))
    return jax.block_until_ready({str(i): jax.random.normal(key, (1024, 2048)) for i, key in enumerate(keys)})


def seconds(function: Any) -> float:
    began = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - began


def measure_saves(megabytes: int, repetitions: int) -> None:
    state, rows = state_of(megabytes), []
    inspect(state)  # compiled
    with tempfile.TemporaryDirectory() as folder, Checkpointer(folder, writable=True) as checkpoints:
        for number in range(1, repetitions + 1):
            prints = seconds(lambda: inspect(state))
            whole = seconds(lambda: (checkpoints.save(number, state, metadata={}), checkpoints.confirm())[1])
            path = epath.Path(folder) / str(number)
            sums = seconds(lambda: manifest.damage(path))
            rows.append((whole, prints, sums))
            checkpoints.delete(number)
    whole, prints, sums = (statistics.median(column) for column in zip(*rows, strict=True))
    print(f"saving {megabytes} MB: {whole:.2f} s; fingerprints {prints:.3f} s = {prints / whole:.1%}, ", end="")
    print(f"sizes and checksums of files {sums:.3f} s = {sums / whole:.1%}")


def measure_steps(repetitions: int) -> None:
    config = resolve(base.get_config())
    optimizer = make_optimizer(config.optimizer, config.training.steps)
    N = config.model.context_length
    batch = {
        "inputs": jnp.asarray(np.random.default_rng(0).integers(0, 256, (config.training.batch_size, N)), jnp.int32),
        "segment_ids": jnp.ones((config.training.batch_size, N), jnp.int32),
        "loss_mask": jnp.ones((config.training.batch_size, N)),
    }
    batch["targets"] = batch["inputs"]
    state = step.initial_state(config, optimizer)

    def compiled() -> Any:
        return jax.jit(step.make_train_step(config, optimizer)).lower(state, batch).compile()

    guarded, original = compiled(), step.unless_skipped
    step.unless_skipped = lambda finite, new, old: new
    try:
        plain = compiled()
    finally:
        step.unless_skipped = original
    times = [(seconds(lambda: plain(state, batch)), seconds(lambda: guarded(state, batch))) for _ in range(repetitions)]
    ratio = statistics.median(after / before for before, after in times)
    print(
        f"step: {statistics.median(before for before, _ in times) * 1e3:.1f} ms; with the guard {ratio:.3f} times that"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=500, help="of the state that is saved")
    parser.add_argument("--repetitions", type=int, default=7)
    flags = parser.parse_args()
    device = jax.devices()[0]
    print(f"{device.device_kind} ({device.platform}), jax {jax.__version__}")
    measure_saves(flags.megabytes, flags.repetitions)
    measure_steps(5 * flags.repetitions)


if __name__ == "__main__":
    main()
