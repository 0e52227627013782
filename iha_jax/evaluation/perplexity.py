"""Validation loss and bits per byte over a fixed set of rows."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from jax.sharding import Mesh

from iha_jax.parallel.mesh import place_batch


def evaluate(
    eval_step: Callable[[Any, Any], Any],
    parameters: Any,
    batches: Iterable[dict[str, np.ndarray]],
    byte_lengths: np.ndarray,
    mesh: Mesh,
) -> dict[str, float]:
    """Mean loss in nats a token, and bits per UTF-8 byte, over all counted tokens of `batches`.

    `bits_per_byte = summed nll / (ln 2 * bytes the counted targets stand for)`: comparable across tokenizers. The
    document separator costs nats and stands for no bytes.

    Raises:
      ValueError: when the batches hold no counted token.
    """
    nll = tokens = text_bytes = 0.0
    for batch in batches:
        nll += float(eval_step(parameters, place_batch(batch, mesh)))
        tokens += float(batch["loss_mask"].sum())
        text_bytes += float((byte_lengths[batch["targets"]] * batch["loss_mask"]).sum())
    if not tokens or not text_bytes:
        raise ValueError("the validation rows hold no token to predict; choose another split or more eval_rows")
    return {"loss": nll / tokens, "bits_per_byte": nll / (math.log(2) * text_bytes)}
