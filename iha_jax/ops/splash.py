"""Softmax attention by jax's Splash kernel (Pallas, TPU): only blocks that the mask lets through are computed.

Compiled for TPU v5e and compared with the reference in interpret mode; not yet run on hardware by this project.

Splash asks that every query sees a key, that blocks divide the sequence, and that queries come scaled. So tokens are
added at the end as padding, padding is a segment of its own (0) whose tokens see one another, and their outputs are
then set to 0, which makes their gradients 0 too. The compiler cannot partition the kernel: with several devices call
it inside `jax.shard_map`.

Shapes: B batch, N tokens, M padded tokens, H query heads, K key/value heads, d head width, e value width.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from iha_jax.array_types import Array, Float, Int

LANES = 128  # block sizes are multiples of it
LARGEST_BLOCK = 512


def block_size(tokens: int, window: int | None) -> int:
    """The rule: `tokens` and `window` rounded up to 128; then the largest multiple of 128 that divides the tokens and
    exceeds neither 512 nor the window, so that nothing is padded further and little computed that a window hides."""
    padded = -(-tokens // LANES) * LANES
    limit = LARGEST_BLOCK if window is None else min(LARGEST_BLOCK, -(-window // LANES) * LANES)
    return max(size for size in range(LANES, limit + 1, LANES) if padded % size == 0)


def splash_attention(
    q: Float[Array, "B N H d"],
    k: Float[Array, "B N K d"],
    v: Float[Array, "B N K e"],
    *,
    causal: bool,
    window: int | None,
    segment_ids: Int[Array, "B N"] | None,
    interpret: bool = False,
) -> Float[Array, "B N H e"]:
    """`dot_product_attention` for float32 or bfloat16; `interpret` runs the kernel on any device, slowly."""
    N, d = q.shape[1], q.shape[-1]
    M = -(-N // LANES) * LANES
    attend = _kernel(q.shape[2], M, block_size(N, window), causal, window, interpret)

    def padded(x: Array) -> Array:
        return jnp.pad(x, [(0, 0), (0, M - N)] + [(0, 0)] * (x.ndim - 2))

    def heads_first(x: Array) -> Array:
        return jnp.swapaxes(padded(x), 1, 2)

    ids = segment_ids
    if ids is None and not causal and M > N:  # under causality nobody sees the added tokens, which are last
        ids = jnp.ones(q.shape[:2], jnp.int32)
    scaled = q * jnp.asarray(1 / math.sqrt(d), q.dtype)
    out = attend(heads_first(scaled), heads_first(k), heads_first(v), None if ids is None else padded(ids))
    out = jnp.swapaxes(out, 1, 2)[:, :N]
    return out if segment_ids is None else jnp.where((segment_ids != 0)[..., None, None], out, 0)


def _kernel(
    heads: int, M: int, size: int, causal: bool, window: int | None, interpret: bool
) -> Callable[[Array, Array, Array, Array | None], Array]:
    """Attention of scaled `q [B, H, M, d]`, `k [B, K, M, d]`, `v [B, K, M, e]`, segments [B, M] or None."""
    # Imported here: Pallas takes a second, and only TPU programs need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    if window is not None:  # splash counts the tokens on either side, without the query's own
        mask = masks.LocalMask((M, M), (window - 1, 0 if causal else window - 1), 0)
    else:
        mask = masks.CausalMask((M, M)) if causal else masks.FullMask((M, M))
    sizes = splash.BlockSizes(
        block_q=size,
        block_kv=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_q_dq=size,
        block_kv_dq=size,
    )
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * heads), block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )

    def one_row(q: Array, k: Array, v: Array, ids: Array | None) -> Array:
        out = kernel(q, k, v, None if ids is None else splash.SegmentIds(ids, ids))
        assert isinstance(out, Array)  # with residuals it would be a pair
        return out

    return jax.vmap(one_row)
