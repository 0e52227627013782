"""The slow, obvious form of the mechanisms that IHA is compared with: Python loops, whole score arrays.

The oracle of the tests, as `reference.py` is for MHA and IHA, whose loops it builds on; it shares nothing with the fast
forms. Use it on tiny shapes only. Shapes: B batch, N tokens, H heads, K key/value heads, S heads of a projection,
d head width, e value width.
"""

import math

import jax.numpy as jnp

from iha_jax.array_types import Array, Float, Int
from iha_jax.ops.reference import one_head, seen_pairs, upcast, visible


def _seen(N: int, causal: bool, window: int | None, segment_ids: Array | None, B: int) -> Array:
    return seen_pairs(lambda n, m: visible(n, m, causal=causal, reach=window), list(range(N)), segment_ids, B)


def _mixed(heads: list[Array], mix: Array) -> list[Array]:
    """`sum_m mix[m, h] heads[m]` for each h."""
    out = []
    for h in range(mix.shape[1]):
        total = jnp.zeros_like(heads[0])
        for m, x in enumerate(heads):
            total = total + mix[m, h] * x
        out.append(total)
    return out


def talking_heads_attention(
    q: Float[Array, "B N H d"],
    k: Float[Array, "B N K d"],
    v: Float[Array, "B N K e"],
    logits_mix: Float[Array, "H H"],
    weights_mix: Float[Array, "H H"],
    *,
    causal: bool,
    window: int | None,
    segment_ids: Int[Array, "B N"] | None,
) -> Float[Array, "B N H e"]:
    """Shazeer et al. 2020: logits of all heads, mixed, masked, softmax, weights mixed, values summed."""
    (B, N, H, d), group, dtype = q.shape, q.shape[2] // k.shape[2], q.dtype
    q, k, v = upcast(q), upcast(k), upcast(v)
    seen = _seen(N, causal, window, segment_ids, B)
    logits = [jnp.sum(q[:, :, None, h] * k[:, None, :, h // group], axis=-1) / math.sqrt(d) for h in range(H)]
    weights = []
    for mixed in _mixed(logits, upcast(logits_mix)):
        largest = jnp.max(jnp.where(seen, mixed, -1e30), axis=-1, keepdims=True)
        raised = jnp.where(seen, jnp.exp(jnp.where(seen, mixed - largest, 0)), 0)
        total = jnp.sum(raised, axis=-1, keepdims=True)
        weights.append(raised / jnp.where(total > 0, total, 1))
    outputs = []
    for h, mixed in enumerate(_mixed(weights, upcast(weights_mix))):
        outputs.append(jnp.sum(mixed[..., None] * v[:, None, :, h // group], axis=2))
    return jnp.stack(outputs, axis=2).astype(dtype)


def differential_attention(
    q: Float[Array, "B N H d"],
    k: Float[Array, "B N K d"],
    v: Float[Array, "B N K/2 e"],
    lambda_: Float[Array, ""],
    *,
    causal: bool,
    window: int | None,
    segment_ids: Int[Array, "B N"] | None,
) -> Float[Array, "B N H/2 e"]:
    """Ye et al. 2024: head by head, attention of the even query and key heads less lambda times that of the odd."""
    (B, N, H, _), K, dtype = q.shape, k.shape[2], q.dtype
    q, k, v = upcast(q), upcast(k), upcast(v)
    seen = _seen(N, causal, window, segment_ids, B)
    outputs = []
    for h in range(H // 2):
        pair = h // (H // K)
        first = one_head(q[:, :, 2 * h], k[:, :, 2 * pair], v[:, :, pair], seen)
        second = one_head(q[:, :, 2 * h + 1], k[:, :, 2 * pair + 1], v[:, :, pair], seen)
        outputs.append(first - lambda_ * second)
    return jnp.stack(outputs, axis=2).astype(dtype)


def simplicial_attention(
    q: Float[Array, "B N H d"],
    k: Float[Array, "B N K d"],
    v: Float[Array, "B N K e"],
    k2: Float[Array, "B N K d"],
    v2: Float[Array, "B N K e"],
    *,
    causal: bool,
    windows: tuple[int, int] | None,
    segment_ids: Int[Array, "B N"] | None,
) -> Float[Array, "B N H e"]:
    """Clift et al. 2019: head by head, attention to all pairs of keys written out, one softmax over the visible."""
    (B, N, H, d), group, dtype = q.shape, q.shape[2] // k.shape[2], q.dtype
    q, k, v, k2, v2 = (upcast(x) for x in (q, k, v, k2, v2))
    w1, w2 = windows or (None, None)
    seen, seen2 = _seen(N, causal, w1, segment_ids, B), _seen(N, causal, w2, segment_ids, B)
    both = jnp.reshape(seen[:, :, :, None] & seen2[:, :, None, :], (B, N, N * N))  # the pair (j, k) at j * N + k
    outputs = []
    for h in range(H):
        key, key2, value, value2 = (x[:, :, h // group] for x in (k, k2, v, v2))
        keys = jnp.reshape(key[:, :, None] * key2[:, None], (B, N * N, d))
        values = jnp.reshape(value[:, :, None] * value2[:, None], (B, N * N, -1))
        outputs.append(one_head(q[:, :, h], keys, values, both))
    return jnp.stack(outputs, axis=2).astype(dtype)


def fuse_mixing(weight: Float[Array, "... S d"], mix: Float[Array, "S S"]) -> Float[Array, "... S d"]:
    """Each head of the result is a weighted sum of the heads of `weight`."""
    return jnp.stack(_mixed([weight[..., m, :] for m in range(weight.shape[-2])], mix), axis=-2)
