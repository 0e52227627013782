"""Loss spikes: going back to the last good checkpoint and leaving out the data that came before the spike."""

import json
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain, islice
from typing import Any

from etils import epath

from iha_jax.data.storage import write_text
from iha_jax.parallel.processes import is_first, of_first
from iha_jax.training.checkpoint import Checkpointer
from iha_jax.training.run_directory import CHECKPOINTS

FILE = "rollbacks.json"
_HISTORY = 64  # training losses that a new one is compared with
_ENOUGH = 16  # fewer are no basis


@dataclass(frozen=True)
class Rollback:
    """After step `restored`, the data of `skipped` steps are left out: those up to step `spike`."""

    spike: int
    restored: int
    skipped: int


class LossSpike(RuntimeError):  # noqa: N818  it is what happened
    """A training loss far above the recent ones."""

    def __init__(self, step: int, loss: float, usual: float):
        super().__init__(f"loss {loss:.4f} at step {step}, the recent median is {usual:.4f}")
        self.step = step


class SpikeDetector:
    """`observe` raises LossSpike for a loss more than `threshold` nats above the median of the last 64. 0: never."""

    def __init__(self, threshold: float, earlier: list[float | None]):
        """`earlier`: the logged losses up to now, so that a restart finds the same spikes; None: not finite."""
        self._threshold = threshold
        self._recent = deque((loss for loss in earlier if loss is not None), maxlen=_HISTORY)

    def observe(self, step: int, loss: float) -> None:
        """A loss that is not finite is not a spike (the step was skipped), and no measure for others either."""
        if not self._threshold or not math.isfinite(loss):
            return
        if len(self._recent) >= _ENOUGH:
            usual = statistics.median(self._recent)
            if loss > usual + self._threshold:
                raise LossSpike(step, loss, usual)
        self._recent.append(loss)


def read_rollbacks(directory: epath.Path) -> list[Rollback]:
    """The rollbacks of a run so far, oldest first."""
    path = directory / FILE
    return [Rollback(**entry) for entry in json.loads(path.read_text())] if path.exists() else []


def roll_back(directory: epath.Path, spike: LossSpike, limit: int) -> Rollback:
    """Records that the run in `directory` goes back to its newest checkpoint and leaves out the data up to the spike.

    Raises:
      LossSpike: the one given, when there were `limit` rollbacks already.
    """
    before = read_rollbacks(directory)
    if len(before) >= limit:
        spike.add_note(f"{len(before)} rollbacks were made, and config.training.max_rollbacks = {limit}")
        raise spike
    with Checkpointer(directory / CHECKPOINTS, writable=False) as checkpoints:
        restored = max(checkpoints.common_steps(), default=0)
    entry = Rollback(spike.step, restored, spike.step - restored)
    if is_first():
        write_text(directory / FILE, json.dumps([asdict(x) for x in [*before, entry]], indent=2))
    of_first(None)  # nobody reads it before it is there
    return entry


def data_step(step: int, rollbacks: list[Rollback]) -> int:
    """The position in the data of the batch that makes step `step + 1`: the step, and all that was left out before."""
    return step + sum(entry.skipped for entry in rollbacks if entry.restored <= step)


def batches_without_gaps(
    start_step: int, rollbacks: list[Rollback], batches_from: Callable[[int], Iterator[Any]]
) -> Iterator[Any]:
    """The batches of steps `start_step + 1`, ..., as `batches_from(position)` gives them, without what is left out."""
    later = sorted({entry.restored for entry in rollbacks if entry.restored > start_step})
    pieces = zip([start_step, *later], [*later, None], strict=True)

    def piece(start: int, stop: int | None) -> Iterator[Any]:
        batches = batches_from(data_step(start, rollbacks))
        return batches if stop is None else islice(batches, stop - start)

    return chain.from_iterable(piece(*bounds) for bounds in pieces)
