"""From a list of candidates to rows of a table: prepare, check against the trusted result, time interleaved."""

import dataclasses
import gc
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np

from benchmarks.rivals import Skip
from benchmarks.timing import Spread, interleaved, paired_ratio, seconds_of

Arrays = dict[str, np.ndarray]


class Prepared(Protocol):
    """A compiled candidate with its inputs in place."""

    def results(self) -> Arrays:
        """What is checked against the trusted results, by the same names."""
        ...

    def run(self) -> float:
        """Runs once; its seconds."""
        ...

    def temporary_bytes(self) -> int | None:
        """Peak temporary memory beyond inputs and results."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Candidate:
    """One line of a registry. `group` is what is computed (candidates of a group must agree), `name` is by whom."""

    group: str
    name: str
    prepare: Callable[[Any], Prepared]
    memory_method: str = "XLA's memory analysis"

    @property
    def label(self) -> str:
        return f"{self.group} · {self.name}"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a candidate may use before it is skipped."""

    memory_bytes: int
    run_seconds: float


@dataclass(kw_only=True)
class Row:
    """One candidate at one size. `status`: timed, skipped (cannot run here or too large), slow, or wrong (disagrees
    with the trusted result, so not timed)."""

    group: str
    name: str
    status: str
    reason: str = ""
    error: float | None = None
    repetitions: int = 0
    seconds: Spread | None = None
    ratio: float | None = None  # to the baseline, median over rounds
    useful_flops: float = 0.0
    executed_flops: float | None = None  # of our own, where there is a closed form
    least_bytes: float | None = None
    temporary_bytes: int | None = None
    memory_method: str = ""
    workload: Any = None

    @property
    def label(self) -> str:
        return f"{self.group} · {self.name}"


class JaxPrepared:
    """A jax function compiled for fixed inputs."""

    def __init__(self, function: Callable[..., Any], arguments: Sequence[Any], names: Sequence[str], limits: Limits):
        try:
            self._compiled = jax.jit(function).lower(*arguments).compile()
        except (ValueError, NotImplementedError, RuntimeError) as error:
            raise Skip(f"does not compile here: {_first_line(error)}") from error
        self._arguments, self._names = tuple(arguments), tuple(names)
        needed = self.temporary_bytes()
        if needed is not None and needed > limits.memory_bytes:
            raise Skip(f"needs {needed / 2**30:.1f} GiB of temporaries, limit {limits.memory_bytes / 2**30:.1f}")

    def results(self) -> Arrays:
        results = jax.device_get(self._compiled(*self._arguments))
        return {name: np.asarray(x, np.float32) for name, x in zip(self._names, results, strict=True)}

    def run(self) -> float:
        return seconds_of(lambda: self._compiled(*self._arguments))

    def temporary_bytes(self) -> int | None:
        return xla_temporary_bytes(self._compiled)

    def close(self) -> None:
        self._arguments = ()


def xla_temporary_bytes(compiled: Any) -> int | None:
    analysis = compiled.memory_analysis()
    return None if analysis is None else int(analysis.temp_size_in_bytes)


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0][:240] if lines else type(error).__name__


def largest_error(got: Mapping[str, np.ndarray], trusted: Mapping[str, np.ndarray]) -> tuple[float, str]:
    """The worst of `max|got - trusted| / max|trusted|` over the results, and whose it is; infinite for NaN, another
    shape or a missing result."""
    worst, where = 0.0, ""
    for name, right in trusted.items():
        if name not in got or got[name].shape != right.shape:
            return np.inf, name
        error = float(np.max(np.abs(got[name] - right)) / max(float(np.max(np.abs(right))), 1e-30))
        if not error <= worst:
            worst, where = (error if np.isfinite(error) else np.inf), name
    return worst, where


@dataclass
class _Ready:
    row: Row
    prepared: Prepared


def _ready(
    candidate: Candidate, workload: Any, trusted: Mapping[str, Arrays], tolerance: float, limits: Limits
) -> _Ready | Row:
    """A candidate that may be timed, or the row that says why not."""
    row = Row(group=candidate.group, name=candidate.name, status="skipped", workload=workload)
    row.memory_method = candidate.memory_method
    try:
        prepared = candidate.prepare(workload)
    except Skip as reason:
        row.reason = str(reason)
        return row
    try:
        row.error, where = largest_error(prepared.results(), trusted[candidate.group])
        row.temporary_bytes = prepared.temporary_bytes()
        if row.error > tolerance:
            row.status, row.reason = "wrong", f"{where} is off by {row.error:.1e}, accepted {tolerance:.0e}; not timed"
        else:
            seconds = prepared.run()
            if seconds > limits.run_seconds:
                row.status, row.reason = "slow", f"one run took {seconds:.1f} s, limit {limits.run_seconds:g} s"
            else:
                return _Ready(row, prepared)
    except Skip as reason:
        row.reason = str(reason)
    prepared.close()
    return row


def measure(
    candidates: Sequence[Candidate],
    workload: Any,
    trusted: Mapping[str, Arrays],
    *,
    tolerance: float,
    limits: Limits,
    repetitions: int,
    baseline: str | None = None,
    pause: float = 0.02,
) -> list[Row]:
    """One row a candidate, in their order: checked against `trusted[group]`, then timed in turn, A B C A B C.

    `baseline` is the label that ratios refer to; the first timed candidate where it is None or was not timed.
    """
    rows: list[Row] = []
    ready: dict[str, _Ready] = {}
    try:
        for candidate in candidates:
            say(f"  preparing {candidate.label}")
            got = _ready(candidate, workload, trusted, tolerance, limits)
            rows.append(got.row if isinstance(got, _Ready) else got)
            if isinstance(got, _Ready):
                ready[candidate.label] = got
            else:
                say(f"    {got.status}: {got.reason}")
            gc.collect()
        say(f"  timing {len(ready)} candidates, {repetitions} rounds")
        seconds = interleaved({label: one.prepared.run for label, one in ready.items()}, repetitions, pause)
    finally:
        for one in ready.values():
            one.prepared.close()
    base = baseline if baseline in ready else next(iter(ready), None)
    for label, one in ready.items():
        assert base is not None
        one.row.status, one.row.repetitions = "timed", repetitions
        one.row.seconds, one.row.ratio = Spread.of(seconds[label]), paired_ratio(seconds[label], seconds[base])
    return rows


OUR_PREFIX = "ours "  # how names of our own candidates begin; the implementation's follows


def with_costs(
    rows: Sequence[Row],
    flops: Callable[[str], float],
    moved: Callable[[str], float | None],
    executed: Callable[[str, str], float | None],
) -> list[Row]:
    """The rows with useful FLOPs and least bytes of their groups filled in, and for those of ours that were timed what
    `executed(group, implementation)` says."""

    def filled(row: Row) -> Row:
        mine = row.seconds is not None and row.name.startswith(OUR_PREFIX)
        count = executed(row.group, row.name.removeprefix(OUR_PREFIX)) if mine else None
        return dataclasses.replace(
            row, useful_flops=flops(row.group), least_bytes=moved(row.group), executed_flops=count
        )

    return [filled(row) for row in rows]


def chosen(candidates: Sequence[Candidate], only: Sequence[str], without: Sequence[str]) -> list[Candidate]:
    """Candidates whose label contains one of `only` (any, if empty) and none of `without`."""
    kept = [c for c in candidates if not only or any(part in c.label for part in only)]
    return [c for c in kept if not any(part in c.label for part in without)]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
