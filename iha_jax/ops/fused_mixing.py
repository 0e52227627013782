"""Fused head mixing: an H x H mixing of heads folded into the projections, then ordinary attention. A control.

Often called "IHA" in speed-run code, it has no pseudo-heads and no interleaving: it reparametrizes multi-head attention
and represents nothing that MHA does not; only the optimization differs.
"""

import jax.numpy as jnp

from iha_jax.array_types import Array, Float
from iha_jax.ops.arguments import check_head_mix


def fuse_mixing(weight: Float[Array, "... S d"], mix: Float[Array, "S S"]) -> Float[Array, "... S d"]:
    """`out[..., h, :] = sum_m mix[m, h] weight[..., m, :]`: the projection `weight [D, S, d]` with its heads mixed.

    `x @ fuse_mixing(W, mix)` is the mixing of the heads of `x @ W`, at no cost a token; it mixes activations
    `[B, N, S, d]` as well, where something stands between projection and mixing (QK-norm).

    Raises:
      ValueError: at trace time, naming the argument, what was got and what was expected.
    """
    if weight.ndim < 2:
        raise ValueError(f"weight has shape {weight.shape}; expected [..., heads, width]")
    if not jnp.issubdtype(weight.dtype, jnp.floating):
        raise ValueError(f"weight has dtype {weight.dtype}; expected a floating-point dtype")
    check_head_mix("mix", mix, weight.shape[-2], weight.dtype)
    return jnp.einsum("...md,mh->...hd", weight, mix)
