"""The language-model loss. Shapes: B batch, N tokens, D model width, C tokens of a row handled at once."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from iha_jax.array_types import Array, Float, Int
from iha_jax.model import Transformer
from iha_jax.parallel.rules import shards


def summed_loss(model: Transformer, batch: dict[str, Any], *, z_loss: float, chunk: int) -> tuple[Array, Array]:
    """Sums over the tokens that count (`loss_mask`): `(objective, negative log-likelihood)`, float32, in nats.

    `nll = logsumexp(logits) - logits[target]`; `objective = nll + z_loss * logsumexp(logits)^2`. Dividing both by the
    token count of the *whole* batch, not of a micro-batch, makes gradient accumulation exact. With `chunk` > 0 the
    logits of only `chunk` tokens of each row exist at a time, and are recomputed in the backward pass; where tokens are
    split over devices, a chunk has as many tokens of each device, so that none moves.
    """
    segment_ids = batch.get("segment_ids")
    hidden_BND = model.hidden(batch["inputs"], segment_ids)
    sums = functools.partial(_sums, model, z_loss=z_loss)
    if not chunk or chunk == hidden_BND.shape[1]:
        return sums(hidden_BND, batch["targets"], batch["loss_mask"])

    devices = shards("N")

    def chunked(x: Array) -> Array:
        x = x.reshape(x.shape[0], devices, -1, chunk // devices, *x.shape[2:])
        return jnp.moveaxis(x, 2, 0).reshape(-1, x.shape[0], chunk, *x.shape[4:])

    def step(totals: tuple[Array, Array], xs: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], None]:
        objective, nll = jax.checkpoint(sums)(*xs)
        return (totals[0] + objective, totals[1] + nll), None

    zero = jnp.zeros((), jnp.float32)
    xs = (chunked(hidden_BND), chunked(batch["targets"]), chunked(batch["loss_mask"]))
    return jax.lax.scan(step, (zero, zero), xs)[0]


def _sums(
    model: Transformer,
    hidden_BCD: Float[Array, "B C D"],
    targets_BC: Int[Array, "B C"],
    mask_BC: Float[Array, "B C"],
    *,
    z_loss: float,
) -> tuple[Array, Array]:
    logits_BCV = model.logits(hidden_BCD)
    log_z_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
    target_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
    nll = jnp.sum((log_z_BC - target_BC) * mask_BC)
    return nll + z_loss * jnp.sum(jnp.square(log_z_BC) * mask_BC), nll
