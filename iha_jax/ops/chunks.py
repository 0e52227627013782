"""Cutting the token axis into chunks to scan over, each with the neighbors its window reaches."""

import jax.numpy as jnp

from iha_jax.array_types import Array


def chunk_rows(x: Array, size: int, axis: int = -2) -> Array:
    """Cuts `axis` (N tokens) into chunks: [n, ..., size, ...], n = ceil(N / size), zeros after the end."""
    axis %= x.ndim
    count = -(-x.shape[axis] // size)
    x = _pad(x, axis, 0, count * size - x.shape[axis])
    return jnp.moveaxis(x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :]), axis, 0)


def chunk_windows(x: Array, size: int, before: int, after: int, axis: int = -2) -> Array:
    """Like `chunk_rows`, but chunk i also holds `before` tokens before and `after` tokens after its own:
    [n, ..., before + size + after, ...]; zeros where the sequence has no such token."""
    axis %= x.ndim
    count = -(-x.shape[axis] // size)
    left, right = -(-before // size), -(-after // size)
    padded = _pad(x, axis, left * size, (count + right) * size - x.shape[axis])
    chunks = chunk_rows(padded, size, axis)
    # Shifted views of whole chunks, side by side, then cut to the tokens in reach: no gather, cheap to differentiate.
    joined = jnp.concatenate([chunks[i : i + count] for i in range(left + right + 1)], axis=axis + 1)
    start = left * size - before
    return joined[(slice(None),) * (axis + 1) + (slice(start, start + before + size + after),)]


def join_chunks(chunks: Array, N: int, axis: int = -2) -> Array:
    """The inverse of `chunk_rows`, cut to N tokens."""
    axis %= chunks.ndim
    x = jnp.moveaxis(chunks, 0, axis - 1)
    x = x.reshape(*x.shape[: axis - 1], -1, *x.shape[axis + 1 :])
    return x[(slice(None),) * (axis - 1) + (slice(0, N),)]


def _pad(x: Array, axis: int, before: int, after: int) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (before, after)
    return jnp.pad(x, widths)
