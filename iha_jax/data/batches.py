"""Batches as a function of (seed, step): grain indexes rows, nothing is remembered, any step can be reached at once."""

from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from iha_jax.data.rows import RowSource

Batch = dict[str, np.ndarray]


class _LocalRows(grain.MapDataset):
    """Some rows of every batch of B: element `s * len(rows) + i` is row `rows[i]` of batch s."""

    def __init__(self, parent: Any, batch_size: int, rows: Sequence[int]):
        super().__init__(parent)
        self._batch, self._rows = batch_size, tuple(int(row) for row in rows)

    def __len__(self) -> int:
        return len(self._parent) // self._batch * len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        batch, i = divmod(index, len(self._rows))
        return self._parent[batch * self._batch + self._rows[i]]


def example(row: Batch) -> Batch:
    """One row as `inputs`, `targets`, `segment_ids` (int32 [N]) and `loss_mask` (float32 [N]).

    The mask is 1 where input and target are of one document: a separator does not predict the next document. Of rows
    that say which tokens are `counted`, such a target must be one, too.
    """
    tokens, segments = row["tokens"], row["segment_ids"]
    inside = (segments[:-1] == segments[1:]) & (segments[:-1] > 0)
    return {
        "inputs": tokens[:-1],
        "targets": tokens[1:],
        "segment_ids": segments[:-1],
        "loss_mask": (inside & (row["counted"][1:] > 0) if "counted" in row else inside).astype(np.float32),
    }


def train_batches(
    rows: Sequence[RowSource],
    weights: Sequence[float],
    *,
    seed: int,
    batch_size: int,
    start_step: int,
    local_rows: Sequence[int] | None = None,
    workers: int = 0,
) -> Iterator[Batch]:
    """Endless batches from step `start_step` on, `local_rows` of each (ascending; None: all `batch_size` of them).

    Every epoch is shuffled anew. The rows of global batch s depend on `seed` and s alone, not on the number of
    processes or loader workers; a process reads no rows but its own.

    Raises:
      ValueError: for a `batch_size` below 1, local rows that are not of the batch, or a source without rows.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size}: expected at least 1")
    local_rows = range(batch_size) if local_rows is None else local_rows
    if not len(local_rows) or min(local_rows) < 0 or max(local_rows) >= batch_size:
        raise ValueError(f"local_rows = {list(local_rows)}: expected some of the {batch_size} rows of a batch")
    if not rows or any(len(r) == 0 for r in rows):
        raise ValueError("there are no rows to train on")
    sources = [grain.MapDataset.source(r).seed(seed + 1_000_003 * i).shuffle().repeat() for i, r in enumerate(rows)]
    mixed = sources[0] if len(sources) == 1 else grain.MapDataset.mix(sources, weights)
    batches = _LocalRows(mixed, batch_size, local_rows).map(example).batch(len(local_rows))
    # From a bucket a row is a request: many at a time. The order of batches does not depend on it.
    threads, ahead = (2, 8) if all(r.is_local for r in rows) else (32, 64)
    dataset = batches[start_step:].to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead))
    if workers:
        if not flags.FLAGS.is_parsed():  # grain's processes read flags of absl, which nobody here has parsed
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return iter(dataset)


def validation_batches(
    rows: RowSource, *, batch_size: int, num_rows: int | None, local_rows: Sequence[int] | None = None
) -> Iterator[Batch]:
    """The same `num_rows` rows (None: all; spread evenly over the split) every time, in order; `local_rows` of each
    batch, as in `train_batches`.

    The last batch is filled up with padding: segment 0, loss mask 0.
    """
    local_rows = range(batch_size) if local_rows is None else local_rows
    count = len(rows) if num_rows is None else min(num_rows, len(rows))
    chosen = [i * len(rows) // count for i in range(count)]
    empty = np.zeros(rows.context_length + 1, np.int32)
    padding = example({"tokens": empty, "segment_ids": empty})
    for start in range(0, count, batch_size):
        here = [start + row for row in local_rows]
        found = [example(rows[chosen[i]]) if i < count else padding for i in here]
        yield {name: np.stack([e[name] for e in found]) for name in found[0]}
