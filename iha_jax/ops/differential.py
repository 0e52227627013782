"""Differential attention (Diff Transformer V1, Ye et al. 2024, arXiv 2410.05258): one softmax less another.

    out[h] = (softmax(q1[h] k1[h]^T / sqrt(d)) - lambda softmax(q2[h] k2[h]^T / sqrt(d))) v[h]

Shapes: B batch, N tokens, H query heads, so H/2 differential heads; K key heads, K/2 value heads; d head width, e value
width (2 d in the paper).
"""

import jax.numpy as jnp

from iha_jax.array_types import Array, Float, Int
from iha_jax.ops import reference_baselines as reference
from iha_jax.ops.arguments import check_attention
from iha_jax.ops.implementations import Features
from iha_jax.ops.rope import working_dtype
from iha_jax.ops.softmax_attention import dot_product_attention, resolve_attention_implementation


def differential_attention(
    q: Float[Array, "B N H d"],
    k: Float[Array, "B N K d"],
    v: Float[Array, "B N K/2 e"],
    lambda_: Float[Array, ""],
    *,
    causal: bool = True,
    window: int | None = None,
    segment_ids: Int[Array, "B N"] | None = None,
    implementation: str = "auto",
) -> Float[Array, "B N H/2 e"]:
    """Differential attention (formula at the top of this file), neither normed nor scaled afterwards.

    Heads 2h and 2h + 1 of `q` are q1 and q2 of differential head h; key heads likewise are pairs. Head h reads key pair
    `h // (H / K)` and value head `h // (H / K)`, so devices that hold whole pairs of key heads need nothing of each
    other. `lambda_` is a scalar. One call of `dot_product_attention`, whose masks and implementations these are; the
    difference is taken in float32 (float64 for float64 inputs), the result has the dtype of `q`. Each half is first
    rounded to q's dtype.

    Raises:
      ValueError: at trace time, naming the argument, what was got and what was expected.
    """
    if q.ndim == k.ndim == v.ndim == 4:
        (B, N, H, _), K = q.shape, k.shape[2]
        if H % 2 or K % 2:
            raise ValueError(f"q has {H} heads and k {K}; expected even numbers: pairs of each")
        if v.shape[:3] != (B, N, K // 2):
            raise ValueError(
                f"v has shape {v.shape}; expected [{B}, {N}, {K // 2}, e], half as many heads as k {k.shape}"
            )
    if jnp.shape(lambda_):
        raise ValueError(f"lambda_ has shape {jnp.shape(lambda_)}; expected a scalar")
    twice = jnp.repeat(v, 2, axis=2) if v.ndim == 4 else v
    check_attention(q, k, twice, window, segment_ids)
    features = Features.of(q, twice, causal=causal, window=window, segment_ids=segment_ids)
    if resolve_attention_implementation(implementation, features) == "reference":
        return reference.differential_attention(q, k, v, lambda_, causal=causal, window=window, segment_ids=segment_ids)
    (B, N, H, d), K = q.shape, k.shape[2]
    # The queries of one key head side by side: [pair of key heads, differential head of the pair, group] to [pair,
    # group, differential head]. The keys are in that order already.
    by_key = jnp.swapaxes(q.reshape(B, N, K // 2, H // K, 2, d), 3, 4).reshape(B, N, H, d)
    both = dot_product_attention(
        by_key, k, twice, causal=causal, window=window, segment_ids=segment_ids, implementation=implementation
    )
    both = both.astype(working_dtype(both)).reshape(B, N, K // 2, 2, H // K, -1)
    out = both[:, :, :, 0] - lambda_ * both[:, :, :, 1]
    return out.reshape(B, N, H // 2, -1).astype(q.dtype)
