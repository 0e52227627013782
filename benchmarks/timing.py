"""Timings of several candidates, interleaved in time: A B C, A B C, ... so that a disturbance meets all of them."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


def interleaved(
    runs: Mapping[str, Callable[[], float]], repetitions: int, pause: float = 0.0
) -> dict[str, list[float]]:
    """Seconds of each run, `repetitions` times round; a run returns its own seconds. `pause` (seconds, between runs)
    lets the threads of the one before fall asleep."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repetitions):
        for name, run in runs.items():
            if pause:
                time.sleep(pause)
            seconds[name].append(run())
    return seconds


@dataclass(frozen=True)
class Spread:
    """Median, quartiles and extremes of a sample, seconds."""

    median: float
    lower: float
    upper: float
    least: float
    most: float

    @classmethod
    def of(cls, sample: Sequence[float]) -> "Spread":
        least, lower, median, upper, most = (float(x) for x in np.percentile(sample, (0, 25, 50, 75, 100)))
        return cls(median, lower, upper, least, most)


def paired_ratio(sample: Sequence[float], base: Sequence[float]) -> float:
    """Median over rounds of this sample's seconds over the base's of the same round."""
    return float(np.median(np.asarray(sample) / np.asarray(base)))


def seconds_of(run: Callable[[], object]) -> float:
    """Wall-clock of one call until its result is there."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def matmul_rate(dtype: str, size: int | None = None, repetitions: int = 7) -> float:
    """FLOPs a second of jax's square matmul on the default device, best of several: what this machine can do here."""
    if size is None:
        size = 2048 if jax.default_backend() == "cpu" else 8192
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype))
    multiply = jax.jit(jnp.matmul).lower(x, x).compile()
    jax.block_until_ready(multiply(x, x))
    return 2 * size**3 / min(seconds_of(lambda: multiply(x, x)) for _ in range(repetitions))
