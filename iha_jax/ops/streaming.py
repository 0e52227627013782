"""Streaming IHA in XLA, for any device: pseudo-tokens exist only for one chunk of queries and the keys it can reach.

RoPE is linear in the head axis and additive in the position, so `rope(n*P + p) . mix = rope(p) . mix . rope(n*P)`:
queries and keys are rotated once, unmixed, by n*P, and after mixing by the fixed p. Inside a chunk virtual tokens stand
pseudo-major (p, c), which makes mixing and collapse plain matrix products over heads; only the mask needs the order.

Shapes: b batch times chunks of a step, H heads, S source heads (H or K), P pseudo-heads, C query tokens of a chunk,
M key tokens it can reach, d head width, e value width; x = P*C and y = P*M virtual tokens.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from iha_jax.array_types import Array, Float, Int
from iha_jax.ops.blockwise import same_segment
from iha_jax.ops.chunks import chunk_rows, chunk_windows, join_chunks
from iha_jax.ops.rope import rotate, rotation, rotation_of_range, working_dtype

VIRTUAL_QUERIES = 64  # a chunk has at least so many; larger chunks compute more scores that the window hides
SCORES_A_STEP = 2**20  # float32 scores held at once, 4 MiB: chunks are batched up to it, and stay in cache
VIRTUAL_KEYS_GLOBAL = 256  # virtual queries and keys of a chunk when there is no window


def tokens_in_reach(window: int, P: int, causality: str) -> int:
    """Tokens before its own (and after, if not causal) of which a token sees pseudo-keys. Under virtual causality query
    (n, 0) sees pseudo-keys 1..P-1 of token n - window; for P = 1 there are none."""
    return window if causality == "virtual" and P > 1 else window - 1


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Everything about the virtual sequence but the data."""

    N: int
    P: int
    window: int | None
    causal: bool
    causality: str
    rope_theta: float | None
    rope_positions: str
    packed: bool = False  # whether there are segments

    @property
    def halo(self) -> tuple[int, int]:
        """Tokens before and after a chunk that its queries can reach."""
        assert self.window is not None
        reach = tokens_in_reach(self.window, self.P, self.causality)
        return reach, 0 if self.causal else reach

    def near(self, query_tokens: Array, key_tokens: Array) -> Array:
        """[x, y]: which pairs of virtual tokens, pseudo-major, causality and window allow."""
        unit = self.P if self.causality == "virtual" else 1

        def positions(tokens: Array) -> Array:
            offsets = jnp.arange(self.P)[:, None] if self.causality == "virtual" else jnp.zeros((self.P, 1), jnp.int32)
            return (tokens[None] * unit + offsets).reshape(-1)

        distance = positions(query_tokens)[:, None] - positions(key_tokens)[None]
        allowed = distance >= 0 if self.causal else jnp.ones_like(distance, bool)
        return allowed if self.window is None else allowed & (jnp.abs(distance) < self.window * unit)

    def rotate_tokens(self, x_BSNd: Array) -> Array:
        """RoPE by the token's part of the virtual position, before mixing."""
        if self.rope_theta is None:
            return x_BSNd
        stride = self.P if self.rope_positions == "virtual" else 1
        tables = rotation_of_range(self.N, stride, x_BSNd.shape[-1], self.rope_theta, working_dtype(x_BSNd))
        return rotate(x_BSNd, *tables)

    def mix(self, x_bSCd: Array, alpha_SHP: Array, rotated: bool = True) -> Array:
        """[b, S, C, d] to pseudo-major virtual tokens [b, H, P*C, d], with the pseudo-head's part of RoPE."""
        S, H, P = alpha_SHP.shape
        C, d = x_bSCd.shape[2:]
        mixed = _multiply_heads(alpha_SHP.reshape(S, H * P).T, x_bSCd).reshape(-1, H, P, C, d)
        if rotated and self.rope_theta is not None and self.rope_positions == "virtual":
            cos, sin = rotation(np.arange(P), d, self.rope_theta, working_dtype(x_bSCd))
            mixed = rotate(mixed, cos[:, None], sin[:, None])
        return mixed.reshape(-1, H, P * C, d)

    def scores(self, q_bHxd: Array, k_bHyd: Array) -> Array:
        """[b, H, y, x]: keys before queries. Then no matrix product of the backward pass, `dk = dS q` and so on, has
        to transpose the large side, which XLA does several times slower on a CPU."""
        q_bHdx = jnp.swapaxes(q_bHxd / math.sqrt(q_bHxd.shape[-1]), 2, 3)
        q_bHdx = jax.lax.optimization_barrier(q_bHdx)  # or the compiler moves the transposition onto the scores
        return jnp.einsum("bhyd,bhdx->bhyx", k_bHyd, q_bHdx, preferred_element_type=working_dtype(q_bHxd))

    def average(self, weights_bHyx: Array, v_bHye: Array) -> Array:
        """Weighted sums of values, [b, H, e, x]."""
        weights = weights_bHyx.astype(v_bHye.dtype)
        return jnp.einsum("bhye,bhyx->bhex", v_bHye, weights, preferred_element_type=weights_bHyx.dtype)

    def collapse(self, out_bHex: Array, R: Array) -> Array:
        """[b, H, e, P*C] to [b, H, C, e] with R [H, H, P] or [H, P]."""
        b, H, e, _ = out_bHex.shape
        out = jnp.swapaxes(out_bHex, 2, 3).astype(R.dtype)
        if R.ndim == 2:
            return jnp.einsum("hp,bhpce->bhce", R, out.reshape(b, H, self.P, -1, e))
        return _multiply_heads(R.reshape(R.shape[0], -1), out.reshape(b, H * self.P, -1, e))

    def together(self, key_ids_bM: Array, query_ids_bC: Array) -> Array:
        """[b, 1, y, x]: pairs of one segment; [b, 1, y, 1]: keys that exist, where no segments are given."""
        keys, queries = (jnp.tile(ids, (1, self.P)) for ids in (key_ids_bM, query_ids_bC))
        return same_segment(keys, queries)[:, None] if self.packed else (keys != 0)[:, None, :, None]


def _multiply_heads(weights_zS: Array, x_bSCd: Array) -> Array:
    """[b, z, C, d]: new heads as weighted sums of heads. As a product batched over b it needs no transposed copies."""
    b, S, C, d = x_bSCd.shape
    weights = jnp.broadcast_to(weights_zS, (b, *weights_zS.shape))
    return jnp.matmul(weights, x_bSCd.reshape(b, S, C * d)).reshape(b, -1, C, d)


def chunk_tokens(N: int, P: int, window: int | None) -> int:
    """The rule. Windowed: half as many tokens as the window (then scores are 1.5 times those seen, and keys are
    mixed three times), but at least `VIRTUAL_QUERIES / P`. Unwindowed: `VIRTUAL_KEYS_GLOBAL / P`. Never more than N."""
    if window is None:
        return min(N, max(1, VIRTUAL_KEYS_GLOBAL // P))
    return min(N, max(-(-window // 2), VIRTUAL_QUERIES // P, 1))


def chunk_batches(count: int, scores: int) -> tuple[int, int]:
    """(steps of the scan, chunks of a step) for `count` chunks of `scores` scores each; the last step is padded."""
    steps = -(-count // max(1, min(count, SCORES_A_STEP // scores)))
    return steps, -(-count // steps)


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
    """`interleaved_head_attention`, chunk by chunk; `chunk` overrides `chunk_tokens`'s choice of query tokens."""
    N, P = q.shape[1], mixing[0].shape[-1]
    space = Geometry(N, P, window, causal, causality, rope_theta, rope_positions, segment_ids is not None)
    size = chunk or chunk_tokens(N, P, window)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    q, k = space.rotate_tokens(q), space.rotate_tokens(k)
    ids = jnp.ones((q.shape[0], N), jnp.int32) if segment_ids is None else segment_ids
    run = _unwindowed if window is None else _windowed
    out = run(space, size, q, k, v, ids, mixing)
    return jnp.swapaxes(out, 1, 2).astype(q.dtype)


def _windowed(space: Geometry, size: int, q: Array, k: Array, v: Array, ids: Array, mixing: tuple) -> Array:
    alpha_q, alpha_k, alpha_v, R = mixing
    before, after = space.halo
    reach = before + size + after
    near = space.near(jnp.arange(size), jnp.arange(reach) - before).T

    @jax.checkpoint
    def step(q_bHCd: Array, k_bKMd: Array, v_bKMe: Array, ids_bC: Array, ids_bM: Array) -> Array:
        scores = space.scores(space.mix(q_bHCd, alpha_q), space.mix(k_bKMd, alpha_k))
        visible = near & space.together(ids_bM, ids_bC)
        scores = jnp.where(visible, scores, -1e30)
        weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=2, keepdims=True)))
        weights = jnp.where(visible, weights, 0)
        total = jnp.sum(weights, axis=2, keepdims=True)
        out = space.average(weights, space.mix(v_bKMe, alpha_v, rotated=False))
        return space.collapse(out / jnp.where(total > 0, total, 1), R)

    chunks = (
        chunk_rows(q, size),
        chunk_windows(k, size, before, after),
        chunk_windows(v, size, before, after),
        chunk_rows(ids, size, axis=1),
        chunk_windows(ids, size, before, after, axis=1),
    )
    count, B = chunks[0].shape[:2]
    steps, together = chunk_batches(count, B * alpha_q.shape[1] * space.P**2 * size * reach)

    def batch(x: Array) -> Array:
        x = jnp.pad(x, [(0, steps * together - count)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(steps, together * B, *x.shape[2:])

    _, out = jax.lax.scan(lambda _, xs: (None, step(*xs)), None, tuple(map(batch, chunks)))
    return join_chunks(out.reshape(steps * together, B, *out.shape[2:])[:count], space.N)


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
