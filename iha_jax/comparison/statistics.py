"""Means over seeds with Student-t intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats


@dataclass(frozen=True)
class Estimate:
    """A mean over n seeds and the half-width of its 95 % interval, None for n = 1: one seed says nothing of spread."""

    mean: float
    half_width: float | None
    n: int

    @property
    def distinguishable(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.half_width is not None and abs(self.mean) > self.half_width

    def text(self, digits: int = 4) -> str:
        if self.half_width is None:
            return f"{self.mean:.{digits}f} (n={self.n}, no interval)"
        return f"{self.mean:.{digits}f} ± {self.half_width:.{digits}f} (n={self.n})"


def estimate(values: Sequence[float]) -> Estimate:
    """`mean ± t_{0.975, n-1} * s / sqrt(n)`, `s` the sample standard deviation. Raises ValueError for no values."""
    n = len(values)
    if n == 0:
        raise ValueError("no values to average")
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, None, 1)
    variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1)
    return Estimate(mean, float(stats.t.ppf(0.975, n - 1)) * math.sqrt(variance / n), n)


def paired_difference(values: dict[int, float], baseline: dict[int, float]) -> Estimate | None:
    """The mean of `values[seed] - baseline[seed]` over the seeds both have, with its interval; None for no seed."""
    shared = sorted(values.keys() & baseline.keys())
    return estimate([values[seed] - baseline[seed] for seed in shared]) if shared else None
