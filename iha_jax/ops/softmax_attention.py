"""Softmax attention: causal or bidirectional, sliding window, packed segments, grouped key/value heads.

Shapes: B batch, N tokens, H query heads, K key/value heads, d head width, e value width.
"""

from iha_jax.array_types import Array, Float, Int
from iha_jax.ops import reference
from iha_jax.ops.arguments import check_attention
from iha_jax.ops.blockwise import blockwise_attention
from iha_jax.ops.cudnn import cudnn_attention
from iha_jax.ops.implementations import Features, resolve_implementation
from iha_jax.ops.splash import splash_attention


def resolve_attention_implementation(name: str, features: Features) -> str:
    """What `implementation=name` of `dot_product_attention` runs for a call with these features.

    Raises:
      ValueError: for a name that does not exist or cannot run such a call here.
    """
    return resolve_implementation("dot_product_attention", name, features)


def dot_product_attention(
    q: Float[Array, "B N H d"],
    k: Float[Array, "B N K d"],
    v: Float[Array, "B N K e"],
    *,
    causal: bool = True,
    window: int | None = None,
    segment_ids: Int[Array, "B N"] | None = None,
    implementation: str = "auto",
) -> Float[Array, "B N H e"]:
    """`out[n, h] = sum_m softmax_m(<q[n, h], k[m, h // (H/K)]> / sqrt(d)) v[m, h // (H/K)]` over the visible m.

    Token m is visible to token n when `m <= n` (if `causal`), `|n - m| < window` (if given: tokens, the own one
    included; `window >= N` means none), and both are in the same segment (if given: integers, 0 is padding, which sees
    nothing, is seen by nothing, and whose output and gradients are exactly 0).

    Scores and softmax are computed in float32 (float64 for float64 inputs); the result has the dtype of `q`.
    `implementation`: "reference" (loops, for tests), "blockwise" (each block of queries against the keys it can see;
    the backward pass recomputes; any device), "cudnn" (NVIDIA GPUs; half precision, no segments, windows only causal),
    "splash" (TPUs; bfloat16 and float32), or "auto", which takes what `implementations.TABLE` says.

    Raises:
      ValueError: at trace time, for ranks, head counts, dtypes or windows that do not fit, naming the argument, and for
        an implementation that cannot run the call here, naming what can.
    """
    check_attention(q, k, v, window, segment_ids)
    features = Features.of(q, v, causal=causal, window=window, segment_ids=segment_ids)
    chosen, window = resolve_attention_implementation(implementation, features), features.window
    if chosen == "reference":
        return reference.dot_product_attention(q, k, v, causal=causal, window=window, segment_ids=segment_ids)
    if chosen == "cudnn":
        return cudnn_attention(q, k, v, causal=causal, window=window)
    if chosen == "splash":
        return splash_attention(q, k, v, causal=causal, window=window, segment_ids=segment_ids)
    return blockwise_attention(q, k, v, causal=causal, window=window, segment_ids=segment_ids)
