"""The slow, obvious form of every attention operation: Python loops over heads and pseudo-heads, whole score matrices.

It is the oracle of the tests and shares no mixing, masking or rotation code with the fast implementations. Use it on
tiny shapes only. Shapes: B batch, N tokens, H heads, K key/value heads, P pseudo-heads, d head width, e value width;
I queries and J keys of one head, tokens or virtual tokens.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from iha_jax.array_types import Array, Float, Int


def visible(i: int, j: int, *, causal: bool, reach: int | None) -> bool:
    """Whether position i sees position j: not later if causal, and nearer than `reach` if there is one."""
    if causal and j > i:
        return False
    return reach is None or abs(i - j) < reach


def rotated(x_BId: Array, positions: list[int], theta: float) -> Array:
    """Vectors turned by RoPE: the pair (j, j + d/2) by the angle `position / theta^(2j/d)`, a Python float."""
    half = x_BId.shape[-1] // 2
    out = [x_BId[..., 0]] * (2 * half)
    for j in range(half):
        angles = [position / theta ** (j / half) for position in positions]
        cosine = np.asarray([math.cos(angle) for angle in angles]).astype(x_BId.dtype)
        sine = np.asarray([math.sin(angle) for angle in angles]).astype(x_BId.dtype)
        first, second = x_BId[..., j], x_BId[..., j + half]
        out[j] = first * cosine - second * sine
        out[j + half] = second * cosine + first * sine
    return jnp.stack(out, axis=-1)


def one_head(q_BId: Array, k_BJd: Array, v_BJe: Array, seen_BIJ: Array) -> Array:
    """`sum_j softmax_j(<q_i, k_j> / sqrt(d)) v_j` over the keys seen; 0 for a query that sees none."""
    scores = jnp.sum(q_BId[:, :, None] * k_BJd[:, None], axis=-1) / math.sqrt(q_BId.shape[-1])
    scores = jnp.where(seen_BIJ, scores, -1e30)
    weights = jnp.where(seen_BIJ, jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True)), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1)
    return jnp.sum(weights[..., None] * v_BJe[:, None], axis=2)


def seen_pairs(sees: Callable[[int, int], bool], tokens: list[int], segment_ids: Array | None, B: int) -> Array:
    """[B, I, I]: whether position i sees j by `sees`, and their tokens share a segment that is not padding."""
    allowed = jnp.asarray([[sees(i, j) for j in range(len(tokens))] for i in range(len(tokens))])
    if segment_ids is None:
        return jnp.broadcast_to(allowed, (B, *allowed.shape))
    own = segment_ids[:, np.asarray(tokens)]
    return allowed & (own[:, :, None] == own[:, None, :]) & (own[:, :, None] != 0)


def upcast(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def dot_product_attention(
    q: Float[Array, "B N H d"],
    k: Float[Array, "B N K d"],
    v: Float[Array, "B N K e"],
    *,
    causal: bool = True,
    window: int | None = None,
    segment_ids: Int[Array, "B N"] | None = None,
) -> Float[Array, "B N H e"]:
    """`out[n, h] = sum_m softmax_m(<q[n, h], k[m, h // (H/K)]> / sqrt(d)) v[m, h // (H/K)]` over the visible m."""
    B, N, H, _ = q.shape
    group, dtype = H // k.shape[2], q.dtype
    q, k, v = upcast(q), upcast(k), upcast(v)
    seen = seen_pairs(lambda n, m: visible(n, m, causal=causal, reach=window), list(range(N)), segment_ids, B)
    heads = [one_head(q[:, :, h], k[:, :, h // group], v[:, :, h // group], seen) for h in range(H)]
    return jnp.stack(heads, axis=2).astype(dtype)


def interleaved_head_attention(
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
) -> Float[Array, "B N H e"]:
    """Interleaved Head Attention (arXiv 2602.21371, section 4), with the virtual sequence of each head written out."""
    alpha_q, alpha_k, alpha_v, collapse = (upcast(x) for x in mixing)
    B, N = q.shape[:2]
    P, dtype = alpha_q.shape[2], q.dtype
    q, k, v = upcast(q), upcast(k), upcast(v)

    virtual = [(n, p) for n in range(N) for p in range(P)]
    positions = [n * P + p if rope_positions == "virtual" else n for n, p in virtual]

    def sees(i: int, j: int) -> bool:
        if causality == "virtual":
            return visible(i, j, causal=causal, reach=None if window is None else window * P)
        return visible(virtual[i][0], virtual[j][0], causal=causal, reach=window)

    def sequence(x: Array, alpha: Array, h: int) -> Array:
        """The virtual sequence of head h, not yet rotated: [B, N*P, width]."""
        kinds = []
        for p in range(P):
            mixed = jnp.zeros_like(x[:, :, 0])
            for m in range(x.shape[2]):
                mixed = mixed + alpha[m, h, p] * x[:, :, m]
            kinds.append(mixed)
        return jnp.stack(kinds, axis=2).reshape(B, N * P, -1)

    seen = seen_pairs(sees, [n for n, _ in virtual], segment_ids, B)
    outputs = []  # of head h: [B, N*P, e]
    T = alpha_q.shape[1]  # target heads: H, unless the caller makes only some
    for h in range(T):
        queries, keys, values = sequence(q, alpha_q, h), sequence(k, alpha_k, h), sequence(v, alpha_v, h)
        if rope_theta is not None:
            queries, keys = rotated(queries, positions, rope_theta), rotated(keys, positions, rope_theta)
        outputs.append(one_head(queries, keys, values, seen))

    heads = []
    for g in range(collapse.shape[0]):
        out = jnp.zeros_like(outputs[0][:, :N])
        for h in range(T) if collapse.ndim == 3 else [g]:
            for p in range(P):
                weight = collapse[g, h, p] if collapse.ndim == 3 else collapse[g, p]
                out = out + weight * outputs[h][:, p::P]  # the virtual tokens (0, p), (1, p), ...
        heads.append(out)
    return jnp.stack(heads, axis=2).astype(dtype)
