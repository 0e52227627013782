"""What MHA and IHA attend to, as whole matrices: for looking at, not for training (memory grows with the square of N).

Shapes: B batch, N tokens, H heads, K key/value heads, P pseudo-heads, d head width; x and y virtual tokens, in the
pseudo-major order of `virtual_sequence.py`.
"""

import jax
import jax.numpy as jnp

from iha_jax.array_types import Array, Float, Int
from iha_jax.ops.arguments import check_attention, check_mixing, check_virtual_sequence
from iha_jax.ops.blockwise import same_segment
from iha_jax.ops.virtual_sequence import Geometry


def attention_weights(
    q: Float[Array, "B N H d"],
    k: Float[Array, "B N K d"],
    *,
    causal: bool = True,
    window: int | None = None,
    segment_ids: Int[Array, "B N"] | None = None,
) -> Float[Array, "B H N N"]:
    """`A[h, n, m] = softmax_m(<q[n, h], k[m, h // (H/K)]> / sqrt(d))`: what `dot_product_attention` weighs values by.

    Who sees whom is as there; weights that the mask hides are 0, and so are all of a query that sees nothing. Float32,
    or float64 for float64 inputs.

    Raises:
      ValueError: at trace time, naming the argument, what was got and what was expected; so does the one below.
    """
    check_attention(q, k, k, window, segment_ids)
    space = Geometry(q.shape[1], 1, window, causal, "token", None, "token", segment_ids is not None)
    keys = jnp.repeat(jnp.swapaxes(k, 1, 2), q.shape[2] // k.shape[2], axis=1)
    return _weights(space, jnp.swapaxes(q, 1, 2), keys, segment_ids)


def interleaved_attention_weights(
    q: Float[Array, "B N H d"],
    k: Float[Array, "B N K d"],
    alpha_q: Float[Array, "H H P"],
    alpha_k: Float[Array, "K H P"],
    *,
    causal: bool = True,
    causality: str = "virtual",
    window: int | None = None,
    rope_theta: float | None = None,
    rope_positions: str = "virtual",
    segment_ids: Int[Array, "B N"] | None = None,
) -> Float[Array, "B H P P N N"]:
    """`A[h, p, r, n, m]`: how much pseudo-query p of token n attends to pseudo-key r of token m in head h.

    One softmax spans all keys of a query, so each `A[h, p, :, n, :]` sums to 1. With `v~ = mix_heads(v, alpha_v)`,
    `o[n, h, p] = sum_{r, m} A[h, p, r, n, m] v~[m, h, r]` is what `interleaved_head_attention` collapses. In the order
    of the virtual sequence, [B, H, N*P, N*P]: `A.transpose(0, 1, 4, 2, 5, 3).reshape(B, H, N * P, N * P)`.

    Arguments are those of `interleaved_head_attention`, dtypes and weights of 0 as above.
    """
    check_attention(q, k, k, window, segment_ids)
    # There are no values and no collapse here: others of their shapes stand in.
    check_mixing(q, k, {"alpha_q": alpha_q, "alpha_k": alpha_k, "alpha_v": alpha_k}, alpha_q, q.shape[2])
    check_virtual_sequence(causality, rope_theta, rope_positions, q.shape[-1])
    (B, N, H, _), P = q.shape, alpha_q.shape[2]
    space = Geometry(N, P, window, causal, causality, rope_theta, rope_positions, segment_ids is not None)
    queries, keys = (
        space.mix(space.rotate_tokens(jnp.swapaxes(x, 1, 2)), alpha) for x, alpha in ((q, alpha_q), (k, alpha_k))
    )
    return jnp.swapaxes(_weights(space, queries, keys, segment_ids).reshape(B, H, P, N, P, N), 3, 4)


def _weights(space: Geometry, q_BHxd: Array, k_BHyd: Array, segment_ids: Array | None) -> Array:
    """[B, H, x, y]."""
    scores_BHxy = jnp.swapaxes(space.scores(q_BHxd, k_BHyd), 2, 3)
    tokens = jnp.arange(space.N)
    seen = space.near(tokens, tokens)
    if segment_ids is not None:
        ids = jnp.tile(segment_ids, (1, space.P))
        seen = seen & same_segment(ids, ids)[:, None]
    return jax.nn.softmax(scores_BHxy, where=seen)
