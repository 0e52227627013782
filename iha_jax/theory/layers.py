"""The attention layers of the constructions: MHA and IHA, bidirectional, no RoPE, with any attention between.

    MHA   out[n, h] = attend(x W_Q^h, x W_K^h, x W_V^h)[n]
    IHA   out[n, g] = sum_{h,p} R[g, h, p] attend(q~, k~, v~)[n*P + p, h],  q~ = interleave(mix_heads(x W_Q, alpha_q))

There is no output projection: heads are concatenated. Arrays are computed in float64 under `jax.enable_x64(True)`, as
`python -m iha_jax.theory` does, else in float32.

Shapes: B batch, N tokens, D model width, H heads, P pseudo-heads, d query and key width, e value width; I queries and J
keys of one head, tokens or virtual tokens.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from iha_jax.array_types import Array, Float
from iha_jax.ops import collapse_heads, dot_product_attention, interleave, mix_heads

Attention = Callable[[Array, Array, Array], Array]


class HeadWeights(NamedTuple):
    """The projections of all heads: query and key [H, D, d], value [H, D, e]."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray


class Mixing(NamedTuple):
    """alpha_q, alpha_k, alpha_v [H, H, P], indexed source head, head, pseudo-head; collapse [H, H, P]."""

    alpha_q: np.ndarray
    alpha_k: np.ndarray
    alpha_v: np.ndarray
    collapse: np.ndarray


def count_parameters(*arrays: tuple[np.ndarray, ...]) -> int:
    """Numbers in all arrays of some weights, zeros included."""
    return sum(array.size for group in arrays for array in group)


def softmax_attention(
    q: Float[Array, "B I H d"], k: Float[Array, "B J H d"], v: Float[Array, "B J H e"]
) -> Float[Array, "B I H e"]:
    """`sum_j softmax_j(<q_i, k_j> / sqrt(d)) v_j`, without a mask."""
    return dot_product_attention(q, k, v, causal=False)


def linear_attention(
    q: Float[Array, "B I H d"], k: Float[Array, "B J H d"], v: Float[Array, "B J H e"]
) -> Float[Array, "B I H e"]:
    """`sum_j <q_i, k_j> v_j`, neither scaled nor normalized."""
    return jnp.einsum("bihd,bjhd,bjhe->bihe", q, k, v)


def hard_attention(
    q: Float[Array, "B I H d"], k: Float[Array, "B J H d"], v: Float[Array, "B J H e"]
) -> Float[Array, "B I H e"]:
    """The mean of the values whose keys reach the highest score; equal scores share it."""
    scores = jnp.einsum("bihd,bjhd->bhij", q, k)
    best = (scores == scores.max(-1, keepdims=True)).astype(v.dtype)
    # Summed before it is divided: the mean of integers is then exact where it is an integer.
    return jnp.einsum("bhij,bjhe->bihe", best, v) / jnp.swapaxes(best.sum(-1), 1, 2)[..., None]


def cold_softmax_attention(inverse_temperature: float) -> Attention:
    """`sum_j softmax_j(inverse_temperature <q_i, k_j>) v_j`, which tends to `hard_attention` as the factor grows."""

    def attend(q: Array, k: Array, v: Array) -> Array:
        return softmax_attention(cold_queries(q, inverse_temperature), k, v)

    return attend


def cold_queries(q: Array, inverse_temperature: float) -> Array:
    """Queries whose scaled scores `<q, k> / sqrt(d)` are `inverse_temperature` times the unscaled ones of `q`."""
    return q * (inverse_temperature * math.sqrt(q.shape[-1]))


def project(x: Float[Array, "B N D"], weights: HeadWeights) -> tuple[Array, Array, Array]:
    """Queries and keys [B, N, H, d] and values [B, N, H, e] of all heads, not mixed."""
    q, k, v = (jnp.einsum("bnD,hDw->bnhw", jnp.asarray(x), jnp.asarray(w)) for w in weights)
    return q, k, v


# Compiled once for each shape: operation by operation, the compilations take most of the time.
@functools.partial(jax.jit, static_argnames="attend")
def multi_head_layer(x: Float[Array, "B N D"], weights: HeadWeights, attend: Attention) -> Float[Array, "B N H e"]:
    """MHA before the heads are concatenated."""
    return attend(*project(x, weights))


@functools.partial(jax.jit, static_argnames="attend")
def interleaved_layer(
    x: Float[Array, "B N D"], weights: HeadWeights, mixing: Mixing, attend: Attention
) -> Float[Array, "B N H e"]:
    """IHA (section 4) before the heads are concatenated: mix, interleave, attend once, collapse."""
    alphas = [jnp.asarray(alpha) for alpha in mixing[:3]]
    mixed = [mix_heads(part, alpha) for part, alpha in zip(project(x, weights), alphas, strict=True)]
    out = attend(*(interleave(part) for part in mixed))
    B, N, H, P = mixed[0].shape[:4]
    pseudo_heads = jnp.swapaxes(out.reshape(B, N, P, H, -1), 2, 3)
    return collapse_heads(pseudo_heads, jnp.asarray(mixing.collapse))


def routing_mixing(H: int) -> Mixing:
    """The mixing of both constructions, `P = H`: one query against all H keys, each with its own value.

    `alpha_q[m, h, j] = [m = h][j = 1]`, `alpha_k[m, h, j] = alpha_v[m, h, j] = [m = j]`, `R[g, h, j] = [g = h][j = 1]`.
    Head h then has the query of head h in its first pseudo-head and the key and value of head j in its j-th. (R adds no
    heads up, so the per-head form `R[h, j] = [j = 1]` would do, with `3H^3 + H^2` mixing weights for `4H^3`.)
    """
    heads = np.eye(H)
    own_first = np.zeros((H, H, H))
    own_first[:, :, 0] = heads
    by_pseudo_head = np.repeat(heads[:, None, :], H, axis=1)
    return Mixing(own_first, by_pseudo_head, by_pseudo_head, own_first)
