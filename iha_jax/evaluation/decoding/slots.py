"""Where a cache keeps which token: token n in slot `n mod slots`, so that as many of the last tokens are there.

A cache with a slot for every position is the ring that never comes round. Shapes: B batch, N tokens of padded prompts,
K key/value heads, S slots, d width. Heads stand before slots: all that is read is then a plain product of matrices.
"""

import jax
import jax.numpy as jnp

from iha_jax.array_types import Array, Float, Int


def fill(x_BNKd: Float[Array, "B N K d"], lengths_B: Int[Array, "B"], slots: int) -> Float[Array, "B K S d"]:
    """The cache after a prompt: the last `slots` of the first `lengths_B` tokens. Other slots hold anything finite."""
    x_BKNd, N = jnp.swapaxes(x_BNKd, 1, 2), x_BNKd.shape[1]
    if slots >= N:
        return jnp.pad(x_BKNd, ((0, 0), (0, 0), (0, slots - N), (0, 0)))
    tokens_BS = jnp.maximum(tokens_in_slots(lengths_B - 1, slots), 0)
    return jnp.take_along_axis(x_BKNd, tokens_BS[:, None, :, None], axis=2)


def write(
    cache_BKSd: Float[Array, "B K S d"], x_BKd: Float[Array, "B K d"], positions_B: Int[Array, "B"]
) -> Float[Array, "B K S d"]:
    """The cache with each row's token at its position, in place of the one that has left."""
    place = jax.vmap(lambda cache, x, slot: jax.lax.dynamic_update_slice_in_dim(cache, x[:, None], slot, axis=1))
    return place(cache_BKSd, x_BKd.astype(cache_BKSd.dtype), positions_B % cache_BKSd.shape[2])


def tokens_in_slots(positions_B: Int[Array, "B"], slots: int) -> Int[Array, "B S"]:
    """Which token each slot holds once those up to `positions_B` are written; negative: none yet."""
    last = positions_B[:, None]
    return last - (last - jnp.arange(slots)) % slots


def ages(positions_B: Int[Array, "B"], slots: int) -> tuple[Int[Array, "B S"], Array]:
    """How many tokens before the one at `positions_B` each slot's token stands, and whether there is one."""
    tokens_BS = tokens_in_slots(positions_B, slots)
    return positions_B[:, None] - tokens_BS, tokens_BS >= 0
