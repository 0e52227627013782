"""Softmax attention in XLA, for any device, that visits visible blocks only and recomputes them in the backward pass.

Forward, a block of queries at a time: `S = q k^T / sqrt(d)`, `lse = log sum_m exp S`, `out = exp(S - lse) v`. Backward,
from `lse` and `D = <out, dout>`: `A = exp(S - lse)`, `dS = A (dout v^T - D)`, `dq = dS k`, `dk = dS^T q`,
`dv = A^T dout` (Dao et al., FlashAttention, section B.4). Products are written so that the scores are never transposed
in memory: XLA's CPU matrix product is several times slower on a transposed left side.

Shapes: B batch, N tokens, H query heads, K key/value heads, G = H / K, d head width, e value width;
C query tokens of a chunk, M keys that a chunk can see, n chunks, b heads (of any row) worked on at a time.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from iha_jax.array_types import Array, Float, Int
from iha_jax.ops.chunks import chunk_rows, chunk_windows, join_chunks
from iha_jax.ops.rope import working_dtype

MAX_BLOCKS = 8  # query blocks of different key lengths: each is compiled separately
MIN_BLOCK = 64
CPU_SCORES = 2**18  # scores of a query block that a CPU works on at once, 1 MiB in float32: they stay in cache


def blockwise_attention(
    q: Float[Array, "B N H d"],
    k: Float[Array, "B N K d"],
    v: Float[Array, "B N K e"],
    *,
    causal: bool,
    window: int | None,
    segment_ids: Int[Array, "B N"] | None,
) -> Float[Array, "B N H e"]:
    """`dot_product_attention`, each block of queries against the keys it can see; `window` is None or below N.

    Without a window the derivative is written by hand (`jax.custom_vjp`): reverse mode only, no `jax.jvp`.
    """
    N, K = q.shape[1], k.shape[2]
    q_BKGNd = jnp.moveaxis(q, 1, 2).reshape(q.shape[0], K, -1, N, q.shape[-1])
    k_BKNd, v_BKNe = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)
    if window is None:
        out_BKGNe = _blocks(causal, q_BKGNd, k_BKNd, v_BKNe, segment_ids)
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


def window_block_size(N: int, window: int) -> int:
    """Query tokens of a windowed block: as many as the window, none smaller than `MIN_BLOCK` tokens."""
    return min(N, max(window, MIN_BLOCK))


def heads_at_once(heads: int, group: int, N: int) -> int:
    """Key heads (over all batch rows) whose scores of one query block a CPU holds at once: the largest divisor of
    `heads` with `group * block_size(N) * N` scores each that stays within `CPU_SCORES`, at least 1."""
    most = max(1, CPU_SCORES // (group * block_size(N) * N))
    return max(b for b in range(1, heads + 1) if heads % b == 0 and b <= most)


def same_segment(queries: Int[Array, "B C"], keys: Int[Array, "B M"]) -> Array:
    """[B, C, M]: whether a query and a key are of one segment, padding (0) being of none."""
    return (queries[..., :, None] == keys[..., None, :]) & (queries[..., :, None] != 0)


def _unwindowed(causal: bool, q: Array, k: Array, v: Array, segments: Array | None) -> Array:
    """Block i of the queries against keys [0, end of block i) only."""
    return _forward(causal, q, k, v, segments)[0]


def _forward(causal: bool, q: Array, k: Array, v: Array, segments: Array | None) -> tuple[Array, tuple]:
    out, lse = _by_heads(functools.partial(_forward_heads, causal), segments, q, k, v)
    out = out.astype(q.dtype)
    return out, (q, k, v, segments, out, lse)


def _backward(causal: bool, saved: tuple, d_out: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, segments, out, lse = saved
    D = jnp.sum(out.astype(lse.dtype) * d_out, axis=-1, keepdims=True)
    dq, dk, dv = _by_heads(functools.partial(_backward_heads, causal), segments, q, k, v, lse, D, d_out)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_blocks = jax.custom_vjp(_unwindowed, nondiff_argnums=(0,))
_blocks.defvjp(_forward, _backward)


def _by_heads(run: Callable[..., tuple], segments: Array | None, *arrays: Array) -> tuple:
    """`run` on arrays [B, K, ...]: all heads at once, or on a CPU `heads_at_once` of them after each other.

    Only on a CPU, where one device has all heads: elsewhere batch and heads may be sharded, and scanning over them
    would gather them."""
    B, K, group, N = arrays[0].shape[:4]
    few = heads_at_once(B * K, group, N)
    ids = () if segments is None else (jnp.broadcast_to(segments[:, None], (B, K, N)),)
    flat = tuple(x.reshape(B * K, *x.shape[2:]) for x in (*arrays, *ids))

    def in_turn(*flat: Array) -> tuple:
        split = tuple(x.reshape(B * K // few, few, *x.shape[1:]) for x in flat)
        return jax.tree.map(lambda x: x.reshape(B * K, *x.shape[2:]), jax.lax.map(lambda xs: run(*xs), split))

    out = run(*flat) if few == B * K else jax.lax.platform_dependent(*flat, cpu=in_turn, default=run)
    return jax.tree.map(lambda x: x.reshape(B, K, *x.shape[1:]), out)


def _spans(N: int, causal: bool) -> list[tuple[slice, slice]]:
    """Query tokens and the key tokens they can see, block by block."""
    size = block_size(N)
    blocks = [slice(start, min(start + size, N)) for start in range(0, N, size)]
    return [(block, slice(0, block.stop if causal else N)) for block in blocks]


def _visible(rows: slice, keys: slice, causal: bool, group: int, ids: tuple[Array, ...]) -> Array | None:
    """[b or 1, G * C, M], or None where every pair is visible."""
    visible = None
    if causal:
        tokens = jnp.arange(rows.start, rows.stop)
        visible = (jnp.arange(keys.stop)[None] <= tokens[:, None])[None]
    if ids:
        same = same_segment(ids[0][:, rows], ids[0][:, keys])
        visible = same if visible is None else same & visible
    return None if visible is None else jnp.tile(visible, (1, group, 1))


def _rows(x: Array, rows: slice) -> Array:
    """[b, G, N, w] to the queries of a block, [b, G * C, w]."""
    return x[:, :, rows].reshape(x.shape[0], -1, x.shape[-1])


def _multiply(x: Array, y: Array, dtype: jnp.dtype) -> Array:
    return jnp.matmul(x, y, preferred_element_type=dtype)


def _join_rows(parts: list[Array], group: int) -> Array:
    return jnp.concatenate([x.reshape(x.shape[0], group, -1, x.shape[-1]) for x in parts], axis=2)


def _forward_heads(causal: bool, q: Array, k: Array, v: Array, *ids: Array) -> tuple[Array, Array]:
    """`out [b, G, N, e]` and `lse [b, G, N, 1]`, both of the working dtype; a query that sees nothing has output 0."""
    dtype, group = working_dtype(q), q.shape[1]
    q, k_T = q / math.sqrt(q.shape[-1]), jnp.swapaxes(k, 1, 2)
    outputs, sums = [], []
    for rows, keys in _spans(q.shape[2], causal):
        visible = _visible(rows, keys, causal, group, ids)
        scores = _multiply(_rows(q, rows), k_T[..., keys], dtype)
        if visible is not None:
            scores = jnp.where(visible, scores, -1e30)
        largest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        if ids and visible is not None:  # only segments leave queries that see nothing
            weights = jnp.where(visible, weights, 0)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        total = jnp.where(total > 0, total, 1)
        outputs.append(_multiply(weights.astype(v.dtype), v[:, keys], dtype) / total)
        sums.append(largest + jnp.log(total))
    return _join_rows(outputs, group), _join_rows(sums, group)


def _backward_heads(
    causal: bool, q: Array, k: Array, v: Array, lse: Array, D: Array, d_out: Array, *ids: Array
) -> tuple[Array, Array, Array]:
    """`dq [b, G, N, d]`, `dk [b, N, d]`, `dv [b, N, e]` of the working dtype."""
    dtype, group, scale = working_dtype(q), q.shape[1], 1 / math.sqrt(q.shape[-1])
    q = q * scale
    k_T, v_T = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    dk_T, dv_T = jnp.zeros(k_T.shape, dtype), jnp.zeros(v_T.shape, dtype)
    dq = []
    for rows, keys in _spans(q.shape[2], causal):
        q_block, d_block = _rows(q, rows), _rows(d_out, rows)
        visible = _visible(rows, keys, causal, group, ids)
        scores = _multiply(q_block, k_T[..., keys], dtype) - _rows(lse, rows)
        weights = jnp.exp(scores) if visible is None else jnp.where(visible, jnp.exp(scores), 0)
        d_scores = weights * (_multiply(d_block, v_T[..., keys], dtype) - _rows(D, rows))
        weights, d_scores = weights.astype(v.dtype), d_scores.astype(q.dtype)
        dq.append(_multiply(d_scores, k[:, keys], dtype) * scale)
        dk_T = dk_T.at[..., keys].add(_multiply(jnp.swapaxes(q_block, 1, 2), d_scores, dtype))
        dv_T = dv_T.at[..., keys].add(_multiply(jnp.swapaxes(d_block, 1, 2), weights, dtype))
    return _join_rows(dq, group), jnp.swapaxes(dk_T, 1, 2), jnp.swapaxes(dv_T, 1, 2)


def _windows(q: Array, k: Array, v: Array, segments: Array | None, causal: bool, window: int) -> Array:
    """Windowed: chunks of queries, each against its own tokens and `window - 1` before (and after) them."""
    N, d = q.shape[3:]
    size = window_block_size(N, window)
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
