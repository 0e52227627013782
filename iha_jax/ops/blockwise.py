"""Softmax attention in XLA, for any device, that visits visible blocks only and recomputes them in the backward pass.

Shapes: B batch, N tokens, H query heads, K key/value heads, G = H / K, d head width, e value width;
C query tokens of a chunk, M keys that a chunk can see, n chunks.
"""

import functools
import math

import jax
import jax.numpy as jnp

from iha_jax.array_types import Array, Float, Int
from iha_jax.ops.chunks import chunk_rows, chunk_windows, join_chunks
from iha_jax.ops.rope import working_dtype

MAX_BLOCKS = 8  # query blocks of different key lengths: each is compiled separately
MIN_BLOCK = 64


def blockwise_attention(
    q: Float[Array, "B N H d"],
    k: Float[Array, "B N K d"],
    v: Float[Array, "B N K e"],
    *,
    causal: bool,
    window: int | None,
    segment_ids: Int[Array, "B N"] | None,
) -> Float[Array, "B N H e"]:
    """`dot_product_attention`, each block of queries against the keys it can see; `window` is None or below N."""
    N, K = q.shape[1], k.shape[2]
    q_BKGNd = jnp.moveaxis(q, 1, 2).reshape(q.shape[0], K, -1, N, q.shape[-1])
    k_BKNd, v_BKNe = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)
    if window is None:
        out_BKGNe = _blocks(q_BKGNd, k_BKNd, v_BKNe, segment_ids, causal)
    else:
        out_BKGNe = _windows(q_BKGNd, k_BKNd, v_BKNe, segment_ids, causal, window)
    return jnp.moveaxis(out_BKGNe.reshape(q.shape[0], q.shape[2], N, -1), 1, 2).astype(q.dtype)


def masked_softmax_attention(scores: Array, visible: Array | None, values: Array, subscripts: str) -> Array:
    """`sum_m softmax_m(scores) values` where `visible`; rows that see nothing give exactly 0, gradients too."""
    if visible is not None:
        scores = jnp.where(visible, scores, -1e30)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    if visible is not None:
        weights = jnp.where(visible, weights, 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum(subscripts, weights.astype(values.dtype), values, preferred_element_type=scores.dtype)
    return out / jnp.where(total > 0, total, 1)


def block_size(N: int) -> int:
    """Query tokens of a block: at most `MAX_BLOCKS` blocks, none smaller than `MIN_BLOCK` tokens."""
    return max(MIN_BLOCK, -(-N // MAX_BLOCKS))


def _blocks(q: Array, k: Array, v: Array, segments: Array | None, causal: bool) -> Array:
    """Unwindowed: block i of the queries against keys [0, end of block i) only."""
    N, size = q.shape[3], block_size(q.shape[3])
    outputs = []
    for start in range(0, N, size):
        end = min(start + size, N)
        keys = end if causal else N
        part = functools.partial(_one_block, start=start, causal=causal)
        seen = None if segments is None else (segments[:, start:end], segments[:, :keys])
        outputs.append(jax.checkpoint(part)(q[..., start:end, :], k[:, :, :keys], v[:, :, :keys], seen))
    return jnp.concatenate(outputs, axis=3)


def _one_block(
    q: Array, k: Array, v: Array, segments: tuple[Array, Array] | None, *, start: int, causal: bool
) -> Array:
    dtype = working_dtype(q)
    scores = jnp.einsum("bkgcd,bkmd->bkgcm", q / math.sqrt(q.shape[-1]), k, preferred_element_type=dtype)
    visible = None
    if causal:
        rows, columns = jnp.arange(q.shape[3])[:, None] + start, jnp.arange(k.shape[2])[None]
        visible = columns <= rows
    if segments is not None:
        same = same_segment(*segments)[:, None, None]
        visible = same if visible is None else same & visible
    return masked_softmax_attention(scores, visible, v, "bkgcm,bkme->bkgce")


def same_segment(queries: Int[Array, "B C"], keys: Int[Array, "B M"]) -> Array:
    """[B, C, M]: whether a query and a key are of one segment, padding (0) being of none."""
    return (queries[..., :, None] == keys[..., None, :]) & (queries[..., :, None] != 0)


def _windows(q: Array, k: Array, v: Array, segments: Array | None, causal: bool, window: int) -> Array:
    """Windowed: chunks of queries, each against its own tokens and `window - 1` before (and after) them."""
    N, d = q.shape[3:]
    size = min(N, max(window, MIN_BLOCK))
    halo = (window - 1, 0 if causal else window - 1)
    ids = jnp.ones((1, N), jnp.int32) if segments is None else segments
    offset = jnp.arange(size)[:, None] - (jnp.arange(sum(halo) + size)[None] - halo[0])
    near = (jnp.abs(offset) < window) & ((offset >= 0) | (not causal))

    @jax.checkpoint
    def chunk(q_BKGCd: Array, k_BKMd: Array, v_BKMe: Array, ids_BC: Array, ids_BM: Array) -> Array:
        scores = jnp.einsum(
            "bkgcd,bkmd->bkgcm", q_BKGCd / math.sqrt(d), k_BKMd, preferred_element_type=working_dtype(q_BKGCd)
        )
        visible = near & same_segment(ids_BC, ids_BM)[:, None, None]
        return masked_softmax_attention(scores, visible, v_BKMe, "bkgcm,bkme->bkgce")

    inputs = (
        chunk_rows(q, size),
        chunk_windows(k, size, *halo),
        chunk_windows(v, size, *halo),
        chunk_rows(ids, size, axis=1),
        chunk_windows(ids, size, *halo, axis=1),
    )
    _, out = jax.lax.scan(lambda _, xs: (None, chunk(*xs)), None, inputs)
    return join_chunks(out, N)
