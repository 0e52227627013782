"""Streaming IHA in XLA, for any device: pseudo-tokens exist only for one chunk of queries and the keys it can reach.

With a window: `streaming_window.py`. Without: here, by online softmax over key chunks.

Shapes: b batch times chunks of a step, H heads, S source heads (H or K), P pseudo-heads, C query tokens of a chunk,
M key tokens it can reach, d head width, e value width; x = P*C and y = P*M virtual tokens.
"""

import jax
import jax.numpy as jnp

from iha_jax.array_types import Array, Float, Int
from iha_jax.ops.chunks import chunk_rows, join_chunks
from iha_jax.ops.implementations import current_platform
from iha_jax.ops.rope import working_dtype
from iha_jax.ops.streaming_window import Steps, windowed
from iha_jax.ops.virtual_sequence import Geometry

VIRTUAL_QUERIES = 64  # a chunk has at least so many; larger chunks compute more scores that the window hides
SCORES_A_STEP = 2**20  # float32 scores held at once, 4 MiB: chunks are batched up to it
CPU_SCORES_A_STEP = 2**18  # 1 MiB, which stays in one core's cache
VIRTUAL_KEYS_GLOBAL = 256  # virtual queries and keys of a chunk when there is no window


def chunk_tokens(N: int, P: int, window: int | None) -> int:
    """The rule. Windowed: half as many tokens as the window (then scores are 1.5 times those seen), but at least
    `VIRTUAL_QUERIES / P`. Unwindowed: `VIRTUAL_KEYS_GLOBAL / P`. Never more than N."""
    if window is None:
        return min(N, max(1, VIRTUAL_KEYS_GLOBAL // P))
    return min(N, max(-(-window // 2), VIRTUAL_QUERIES // P, 1))


def window_steps(space: Geometry, size: int, batch: int, heads: int) -> Steps:
    """Chunks of `size` tokens, as many a step as `SCORES_A_STEP` holds (on a CPU `CPU_SCORES_A_STEP`), at least one,
    spread evenly; the last step is padded."""
    most = CPU_SCORES_A_STEP if current_platform() == "cpu" else SCORES_A_STEP
    count = -(-space.N // size)
    scores = batch * heads * space.P**2 * size * (size + sum(space.halo))
    steps = -(-count // max(1, min(count, most // scores)))
    return Steps(space, size, chunks=-(-count // steps), count=steps)


def streaming_interleaved_attention(
    q: Float[Array, "B N H d"],
    k: Float[Array, "B N K d"],
    v: Float[Array, "B N K e"],
    mixing: tuple[Array, Array, Array, Array],
    *,
    causal: bool,
    causality: str,
    window: int | None,
    rope_theta: float | None,
    rope_positions: str,
    segment_ids: Int[Array, "B N"] | None,
    chunk: int | None = None,
) -> Float[Array, "B N H e"]:
    """`interleaved_head_attention`, chunk by chunk; `chunk` overrides `chunk_tokens`'s choice of query tokens.

    With a window the derivative is written by hand (`jax.custom_vjp`): reverse mode only, no `jax.jvp`.
    """
    N, P = q.shape[1], mixing[0].shape[-1]
    space = Geometry(N, P, window, causal, causality, rope_theta, rope_positions, segment_ids is not None)
    size = chunk or chunk_tokens(N, P, window)
    ids = jnp.ones((q.shape[0], N), jnp.int32) if segment_ids is None else segment_ids
    if window is not None:
        return windowed(window_steps(space, size, q.shape[0], mixing[0].shape[1]), q, k, v, ids, mixing)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    q, k = space.rotate_tokens(q), space.rotate_tokens(k)
    out = _unwindowed(space, size, q, k, v, ids, mixing)
    return jnp.swapaxes(out, 1, 2).astype(q.dtype)


def _unwindowed(space: Geometry, size: int, q: Array, k: Array, v: Array, ids: Array, mixing: tuple) -> Array:
    """Two passes over key chunks a query chunk: log-sum-exp, without gradient, then weighted sums.

    With `w = exp(score - lse)` the output is `sum w v / sum w`; both sums are plain additions over key chunks, so the
    backward pass keeps no running maximum, and each key chunk is recomputed on its own.
    """
    alpha_q, alpha_k, alpha_v, R = mixing
    qs, ks, vs = (chunk_rows(x, size) for x in (q, k, v))
    segments = chunk_rows(ids, size, axis=1)
    starts = jnp.arange(qs.shape[0]) * size

    def pair(q_bHxd: Array, query: tuple[Array, Array], key: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        k_BKMd, ids_BM, start = key
        scores = space.scores(q_bHxd, space.mix(k_BKMd, alpha_k))
        near = space.near(query[1] + jnp.arange(size), start + jnp.arange(size)).T
        visible = near & space.together(ids_BM, query[0])
        return scores, visible

    def reachable(query_start: Array, key_start: Array) -> Array:
        return (key_start <= query_start) | (not space.causal)

    @jax.checkpoint
    def query_chunk(q_BHCd: Array, ids_BC: Array, query_start: Array, ks: Array, vs: Array) -> Array:
        mixed = space.mix(q_BHCd, alpha_q)
        query = (ids_BC, query_start)

        def add_to_lse(lse: Array, key: tuple[Array, Array, Array]) -> tuple[Array, None]:
            def visit(lse: Array) -> Array:
                scores, visible = pair(mixed, query, key)
                return jnp.logaddexp(lse, jax.nn.logsumexp(jnp.where(visible, scores, -1e30), axis=2))

            return jax.lax.cond(reachable(query_start, key[2]), visit, lambda lse: lse, lse), None

        lse = jnp.full(mixed.shape[:-1], -1e30, working_dtype(mixed))
        lse = jax.lax.stop_gradient(jax.lax.scan(add_to_lse, lse, jax.lax.stop_gradient((ks, segments, starts)))[0])

        zero_out, zero_total = (
            jnp.zeros((*lse.shape[:2], rows, lse.shape[2]), lse.dtype) for rows in (vs.shape[-1], 1)
        )
        zeros = zero_out, zero_total

        def weighted(mixed: Array, key: tuple[Array, Array, Array], v_BKMe: Array) -> tuple[Array, Array]:
            scores, visible = pair(mixed, query, key)
            weights = jnp.where(visible, jnp.exp(jnp.where(visible, scores, -1e30) - lse[:, :, None]), 0)
            out = space.average(weights, space.mix(v_BKMe, alpha_v, rotated=False))
            return out, jnp.sum(weights, axis=2, keepdims=True)

        # The condition stands inside the checkpoint: a condition's residuals would be kept for every key chunk.
        @jax.checkpoint
        def contribution(mixed: Array, key: tuple[Array, Array, Array], v_BKMe: Array) -> tuple[Array, Array]:
            return jax.lax.cond(reachable(query_start, key[2]), weighted, lambda *_: zeros, mixed, key, v_BKMe)

        def add(sums: tuple[Array, Array], xs: tuple) -> tuple[tuple[Array, Array], None]:
            return jax.tree.map(jnp.add, sums, contribution(mixed, *xs)), None

        (out, total), _ = jax.lax.scan(add, zeros, ((ks, segments, starts), vs))
        return space.collapse(out / jnp.where(total > 0, total, 1), R)

    _, out = jax.lax.scan(lambda _, xs: (None, query_chunk(*xs, ks, vs)), None, (qs, segments, starts))
    return join_chunks(out, space.N)
