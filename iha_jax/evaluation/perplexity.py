"""Validation loss and bits per byte over a fixed set of rows."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from iha_jax.data.batches import validation_batches
from iha_jax.data.rows import RowSource
from iha_jax.parallel.mesh import local_rows, place_batch


def evaluate(
    eval_step: Callable[[Any, Any, Any], Any],
    parameters: Any,
    rows: RowSource,
    byte_lengths: np.ndarray,
    mesh: Mesh,
    *,
    batch_size: int,
    num_rows: int | None,
) -> dict[str, float]:
    """Mean loss in nats a token, and bits per UTF-8 byte, over all counted tokens of `validation_batches`.

    `bits_per_byte = summed nll / (ln 2 * bytes the counted targets stand for)`: comparable across tokenizers. The
    document separator costs nats and stands for no bytes.

    Raises:
      ValueError: when the rows hold no counted token.
    """
    nll = tokens = text_bytes = 0.0
    lengths = np.asarray(byte_lengths, np.int32)
    here = local_rows(mesh, batch_size)
    for batch in validation_batches(rows, batch_size=batch_size, num_rows=num_rows, local_rows=here):
        sums = jax.device_get(eval_step(parameters, place_batch(batch, mesh, batch_size), lengths))
        nll += float(sums["nll"])
        tokens += float(sums["tokens"])
        text_bytes += float(sums["text_bytes"])
    if not tokens or not text_bytes:
        raise ValueError("the validation rows hold no token to predict; choose another split or more eval_rows")
    return {"loss": nll / tokens, "bits_per_byte": nll / (math.log(2) * text_bytes)}
