"""Validation loss and bits per byte over a fixed set of rows."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from iha_jax.data.batches import validation_batches
from iha_jax.data.rows import RowSource
from iha_jax.parallel.mesh import local_rows, place_batch


@dataclass(frozen=True)
class RowSums:
    """Sums over the counted tokens of each row (`nll` in nats, `tokens`, `text_bytes`: float64 [R]) and of each reach
    (float64 [K]), as `training.step.make_eval_step` defines them. `rows`: their numbers in the split; those without a
    counted token are left out."""

    rows: np.ndarray
    nll: np.ndarray
    tokens: np.ndarray
    text_bytes: np.ndarray
    reach_nll: np.ndarray
    reach_tokens: np.ndarray

    @property
    def loss(self) -> float:
        """Nats a token."""
        return float(self.nll.sum() / self.tokens.sum())

    @property
    def bits_per_byte(self) -> float:
        """`summed nll / (ln 2 * bytes the counted targets stand for)`: comparable across tokenizers. The document
        separator costs nats and stands for no bytes."""
        return float(self.nll.sum() / (math.log(2) * self.text_bytes.sum()))


def evaluate(
    eval_step: Callable[[Any, Any, Any], Any],
    parameters: Any,
    rows: RowSource,
    byte_lengths: np.ndarray,
    mesh: Mesh,
    *,
    batch_size: int,
    num_rows: int | None,
) -> RowSums:
    """The jitted `eval_step` over all batches of `validation_batches`.

    Raises:
      ValueError: when the rows hold no counted token.
    """
    lengths, here = np.asarray(byte_lengths, np.int32), local_rows(mesh, batch_size)
    found = []
    count = len(rows) if num_rows is None else min(num_rows, len(rows))
    for batch in validation_batches(rows, batch_size=batch_size, num_rows=num_rows, local_rows=here):
        found.append(jax.device_get(eval_step(parameters, place_batch(batch, mesh, batch_size), lengths)))

    def of_rows(name: str) -> np.ndarray:
        return np.concatenate([sums[name] for sums in found]).astype(np.float64)

    def of_reaches(name: str) -> np.ndarray:
        return np.stack([sums[name] for sums in found]).astype(np.float64).sum(0)

    nll, tokens, text_bytes = of_rows("nll"), of_rows("tokens"), of_rows("text_bytes")
    counted = np.flatnonzero(tokens)
    if not counted.size or not text_bytes.any():
        raise ValueError("the validation rows hold no token to predict; choose another split or more eval_rows")
    sums = nll[counted], tokens[counted], text_bytes[counted]
    return RowSums(counted * len(rows) // count, *sums, of_reaches("reach_nll"), of_reaches("reach_tokens"))
