"""Batches as a function of (seed, step): grain indexes rows, nothing is remembered, any step can be reached at once."""

from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from iha_jax.data.rows import Rows

Batch = dict[str, np.ndarray]


class _GlobalSlice(grain.MapDataset):
    """This process's rows of every global batch: rows [p*b, (p+1)*b) of each B."""

    def __init__(self, parent: Any, batch_size: int, process_index: int, process_count: int):
        super().__init__(parent)
        self._batch, self._local = batch_size, batch_size // process_count
        self._offset = process_index * self._local

    def __len__(self) -> int:
        return len(self._parent) // self._batch * self._local

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        batch, row = divmod(index, self._local)
        return self._parent[batch * self._batch + self._offset + row]


def example(row: Batch) -> Batch:
    """One row as `inputs`, `targets`, `segment_ids` (int32 [N]) and `loss_mask` (float32 [N]).

    The mask is 1 where input and target are of one document: a separator does not predict the next document.
    """
    tokens, segments = row["tokens"], row["segment_ids"]
    return {
        "inputs": tokens[:-1],
        "targets": tokens[1:],
        "segment_ids": segments[:-1],
        "loss_mask": ((segments[:-1] == segments[1:]) & (segments[:-1] > 0)).astype(np.float32),
    }


def train_batches(
    rows: Sequence[Rows],
    weights: Sequence[float],
    *,
    seed: int,
    batch_size: int,
    start_step: int,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
) -> Iterator[Batch]:
    """Endless batches from step `start_step` on: this process's `batch_size / process_count` rows of each.

    Every epoch is shuffled anew. The rows of global batch s depend on `seed` and s alone, not on the number of
    processes or loader workers.

    Raises:
      ValueError: when `batch_size` does not divide over the processes, or a source has no rows.
    """
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f"batch_size = {batch_size}: expected a positive multiple of {process_count} processes")
    if not rows or any(len(r) == 0 for r in rows):
        raise ValueError("there are no rows to train on")
    sources = [grain.MapDataset.source(r).seed(seed + 1_000_003 * i).shuffle().repeat() for i, r in enumerate(rows)]
    mixed = sources[0] if len(sources) == 1 else grain.MapDataset.mix(sources, weights)
    local = _GlobalSlice(mixed, batch_size, process_index, process_count)
    batches = local.map(example).batch(batch_size // process_count)
    # From a bucket a row is a request: many at a time. The order of batches does not depend on it.
    threads, ahead = (2, 8) if all(r.is_local for r in rows) else (32, 64)
    dataset = batches[start_step:].to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead))
    if workers:
        if not flags.FLAGS.is_parsed():  # grain's processes read flags of absl, which nobody here has parsed
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return iter(dataset)


def validation_batches(rows: Rows, *, batch_size: int, num_rows: int | None) -> Iterator[Batch]:
    """The same `num_rows` rows (None: all; spread evenly over the split) every time, in order.

    The last batch is filled up with padding: segment 0, loss mask 0.
    """
    count = len(rows) if num_rows is None else min(num_rows, len(rows))
    chosen = [i * len(rows) // count for i in range(count)]
    for start in range(0, count, batch_size):
        found = [example(rows[i]) for i in chosen[start : start + batch_size]]
        found += [{name: np.zeros_like(x) for name, x in found[0].items()}] * (batch_size - len(found))
        yield {name: np.stack([e[name] for e in found]) for name in found[0]}
