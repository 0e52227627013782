"""Talking-heads attention (Shazeer et al. 2020, arXiv 2003.02436): heads exchange logits, then weights.

    J[h] = q[h] k[h]^T / sqrt(d)
    L[g] = sum_h logits_mix[h, g] J[h]         mixed before mask and softmax
    w[g] = softmax(mask(L[g]))
    out[f] = (sum_g weights_mix[g, f] w[g]) v[f]

Shapes: B batch, N tokens, H heads, K key/value heads, G = H / K, d head width, e value width; inside, C query tokens of
a block, M keys it can reach.
"""

import math

import jax.numpy as jnp

from iha_jax.array_types import Array, Float, Int
from iha_jax.ops import reference_baselines as reference
from iha_jax.ops.arguments import check_attention, check_head_mix
from iha_jax.ops.blockwise import same_segment
from iha_jax.ops.implementations import Features
from iha_jax.ops.query_blocks import (
    attend_in_blocks,
    attend_in_windows,
    block_of,
    resolve_blocked_implementation,
    span_of,
    token_ids,
    visible_softmax,
)
from iha_jax.ops.rope import working_dtype

SMALLEST_BLOCK = 64
LONG_WINDOW = 512  # tokens: with longer windows, blocks are shorter than the window where scores are many


def block_tokens(B: int, H: int, N: int, window: int | None, causal: bool) -> int:
    """Query tokens of a block; `window` is None or below N. Windowed: a block as long as the window keeps two copies of
    each key; shorter blocks keep more."""
    if window is None:
        return block_of(B * H * N, SMALLEST_BLOCK, span_of(N, SMALLEST_BLOCK, causal))
    smallest = max(SMALLEST_BLOCK, min(window, LONG_WINDOW))
    return block_of(2 * B * H * window, min(N, smallest), min(N, max(window, SMALLEST_BLOCK)))


def talking_heads_attention(
    q: Float[Array, "B N H d"],
    k: Float[Array, "B N K d"],
    v: Float[Array, "B N K e"],
    logits_mix: Float[Array, "H H"],
    weights_mix: Float[Array, "H H"],
    *,
    causal: bool = True,
    window: int | None = None,
    segment_ids: Int[Array, "B N"] | None = None,
    implementation: str = "auto",
) -> Float[Array, "B N H e"]:
    """Talking-heads attention (formula at the top of this file); head h reads key/value head `h // (H / K)`.

    `logits_mix` and `weights_mix` are indexed [source head, target head]. `causal`, `window` and `segment_ids` as in
    `dot_product_attention`. All heads' logits are needed together, so there is no flash form: a block of queries at a
    time, recomputed in the backward pass. Logits, softmax and mixing are computed in float32 (float64 for float64
    inputs), the result has the dtype of `q`. `implementation`: "reference" (loops, for tests), "blockwise", or "auto".

    Raises:
      ValueError: at trace time, naming the argument, what was got and what was expected.
    """
    check_attention(q, k, v, window, segment_ids)
    (B, N, H, d), K = q.shape, k.shape[2]
    check_head_mix("logits_mix", logits_mix, H, q.dtype)
    check_head_mix("weights_mix", weights_mix, H, q.dtype)
    window = None if window is not None and window >= N else window
    features = Features.of(q, v, causal=causal, window=window, segment_ids=segment_ids)
    if resolve_blocked_implementation(implementation, features) == "reference":
        return reference.talking_heads_attention(
            q, k, v, logits_mix, weights_mix, causal=causal, window=window, segment_ids=segment_ids
        )
    dtype = working_dtype(q)
    before, after = logits_mix.astype(dtype), weights_mix.astype(dtype)

    def attend(queries: tuple[Array, Array], keys: tuple[Array, Array, Array], near_CM: Array) -> Array:
        (q_BKGCd, ids_BC1), (k_BKMd, v_BKMe, ids_BM1) = queries, keys
        logits = jnp.einsum("bkgcd,bkmd->bkgcm", q_BKGCd / math.sqrt(d), k_BKMd, preferred_element_type=dtype)
        logits_BHCM = jnp.einsum("bhcm,hg->bgcm", logits.reshape(B, H, *logits.shape[3:]), before)
        visible = near_CM & same_segment(ids_BC1[..., 0], ids_BM1[..., 0])[:, None]
        weights = jnp.einsum("bgcm,gf->bfcm", visible_softmax(logits_BHCM, visible), after)
        weights = weights.reshape(logits.shape).astype(v_BKMe.dtype)
        return jnp.einsum("bkgcm,bkme->bkgce", weights, v_BKMe, preferred_element_type=dtype)

    ids = token_ids(segment_ids, B, N)
    queries = (jnp.moveaxis(q, 1, 2).reshape(B, K, H // K, N, d), ids)
    keys = (jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2), ids)
    size = block_tokens(B, H, N, window, causal)
    if window is None:

        def in_block(queries, keys, rows, columns):
            return attend(queries, keys, (columns <= rows[:, None]) | (not causal))

        out = attend_in_blocks(in_block, queries, keys, size=size, causal=causal)
    else:
        halo = (window - 1, 0 if causal else window - 1)
        offset = jnp.arange(size)[:, None] - (jnp.arange(sum(halo) + size) - halo[0])
        near = (jnp.abs(offset) < window) & ((offset >= 0) | (not causal))
        out = attend_in_windows(lambda queries, keys: attend(queries, keys, near), queries, (keys, *halo), size=size)
    return jnp.moveaxis(out.reshape(B, H, N, -1), 1, 2).astype(q.dtype)
