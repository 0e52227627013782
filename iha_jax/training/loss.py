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
    hidden_BND = model.hidden(batch["inputs"], batch.get("segment_ids"))
    sums = functools.partial(_sums, model, z_loss=z_loss)
    if not chunk or chunk == hidden_BND.shape[1]:
        return sums(hidden_BND, batch["targets"], batch["loss_mask"])

    def step(totals: tuple[Array, Array], xs: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], None]:
        objective, nll = jax.checkpoint(sums)(*xs)
        return (totals[0] + objective, totals[1] + nll), None

    zero = jnp.zeros((), jnp.float32)
    xs = chunked(hidden_BND, chunk), chunked(batch["targets"], chunk), chunked(batch["loss_mask"], chunk)
    return jax.lax.scan(step, (zero, zero), xs)[0]


def token_losses(model: Transformer, batch: dict[str, Any], *, chunk: int) -> Float[Array, "B N"]:
    """Negative log-likelihood of every target in nats, float32, 0 where `loss_mask` is; `chunk` as in `summed_loss`."""
    hidden_BND = model.hidden(batch["inputs"], batch.get("segment_ids"))
    if not chunk or chunk == hidden_BND.shape[1]:
        return _log_losses(model, hidden_BND, batch["targets"])[0] * batch["loss_mask"]
    xs = chunked(hidden_BND, chunk), chunked(batch["targets"], chunk)
    chunks = jax.lax.map(lambda x: _log_losses(model, *x)[0], xs)
    return joined(chunks) * batch["loss_mask"]


def chunked(x: Array, chunk: int) -> Array:
    """[B, N, ...] to [N / chunk, B, chunk, ...]; each chunk has tokens of all devices that tokens are split over."""
    devices = shards("N")
    x = x.reshape(x.shape[0], devices, -1, chunk // devices, *x.shape[2:])
    return jnp.moveaxis(x, 2, 0).reshape(-1, x.shape[0], chunk, *x.shape[4:])


def joined(chunks: Array) -> Array:
    """The inverse of `chunked`."""
    devices = shards("N")
    count, B, chunk = chunks.shape[:3]
    x = chunks.reshape(count, B, devices, chunk // devices, *chunks.shape[3:])
    return jnp.moveaxis(x, 0, 2).reshape(B, count * chunk, *chunks.shape[3:])


def _log_losses(
    model: Transformer, hidden_BCD: Float[Array, "B C D"], targets_BC: Int[Array, "B C"]
) -> tuple[Array, Array]:
    """`(logsumexp(logits) - logits[target], logsumexp(logits))`, each [B, C]."""
    logits_BCV = model.logits(hidden_BCD)
    log_z_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
    target_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
    return log_z_BC - target_BC, log_z_BC


def _sums(
    model: Transformer, hidden_BCD: Array, targets_BC: Array, mask_BC: Float[Array, "B C"], *, z_loss: float
) -> tuple[Array, Array]:
    losses_BC, log_z_BC = _log_losses(model, hidden_BCD, targets_BC)
    nll = jnp.sum(losses_BC * mask_BC)
    return nll + z_loss * jnp.sum(jnp.square(log_z_BC) * mask_BC), nll
