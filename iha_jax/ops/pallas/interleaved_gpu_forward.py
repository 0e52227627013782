"""Forward kernel of fused IHA for GPUs: one program a (batch row, query block), the heads in turn.

For head h: mix the block's queries; for each key block in reach mix its keys and values, and attend by online softmax;
collapse into the block's rows of the output. Scores are kept in base 2: `exp(s) = 2^(s log2 e)`. Legend and the matrix
products of mixing: `interleaved_gpu_blocks`.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from iha_jax.array_types import Array
from iha_jax.ops.pallas.interleaved_gpu_blocks import (
    MASKED,
    Blocks,
    Ref,
    Source,
    cast,
    compiler_params,
    inner_products,
    pair,
    product,
    turn,
)

LOG2_E = math.log2(math.e)


def forward_kernel(
    blocks: Blocks,
    q_ref: Ref,  # [B, rows, d]
    k_ref: Ref,
    v_ref: Ref,  # [B, rows, e]
    ids_ref: Ref,  # [B, tokens]
    *refs: Ref,  # E of q, k, v and collapse; cosines and sines [X, d/2] if rotated; out [B, rows, e]; lse
) -> None:
    Eq, Ek, Ev, Er, *turning, out_ref, lse_ref = refs
    tables, parts, dtype = pair(turning), 1 + blocks.rotated, q_ref.dtype
    query, key = Source(blocks, blocks.H, q_ref, Eq, parts), Source(blocks, blocks.K, k_ref, Ek, parts)
    value, out = Source(blocks, blocks.K, v_ref, Ev), Source(blocks, blocks.H, out_ref, Er)
    b, i = pl.program_id(0), pl.program_id(1)
    query_ids = blocks.block_ids(ids_ref, b, i)
    first, last = blocks.range_around(i, *blocks.neighbors)

    def head(h: Array, _: None) -> None:
        queries = cast(turn(query.mix(b, i, h), tables), dtype)

        def attend(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            total, largest, weight = carry
            keys = cast(turn(key.mix(b, j, h), tables), dtype)
            visible = blocks.visible(query_ids, blocks.block_ids(ids_ref, b, j), i - j)
            s = jnp.where(visible, inner_products(queries, keys) * (blocks.scale * LOG2_E), MASKED)
            new = jnp.maximum(largest, jnp.max(s, axis=1))
            w = jnp.where(visible, jnp.exp2(s - new[:, None]), 0.0)
            shrink = jnp.exp2(largest - new)
            (values,) = cast(value.mix(b, j, h), dtype)
            total = total * shrink[:, None] + product(w.astype(dtype), values)
            return total, new, weight * shrink + jnp.sum(w, axis=1)

        X = blocks.X
        start = jnp.zeros((X, value.width), jnp.float32), jnp.full(X, MASKED, jnp.float32), jnp.zeros(X, jnp.float32)
        total, largest, weight = lax.fori_loop(first, last, attend, start)
        weight = jnp.where(weight > 0, weight, 1.0)  # rows that see nothing: padding
        lse_ref[b, h, i, :] = largest + jnp.log2(weight)
        out.add_adjoint(out_ref, (b, i, h), (total / weight[:, None],))

    lax.fori_loop(0, blocks.H, head, None)


def forward(blocks: Blocks, operands: tuple[Array, ...], interpret: bool) -> tuple[Array, Array]:
    """(out `[B, rows, e]` float32, lse `[B, H, blocks, X]` float32 in base 2) from the operands of `forward_kernel`."""
    B, _, width = operands[2].shape
    return pl.pallas_call(
        functools.partial(forward_kernel, blocks),
        grid=(B, blocks.count),
        out_shape=(
            jax.ShapeDtypeStruct((B, blocks.rows(blocks.H), width), jnp.float32),
            jax.ShapeDtypeStruct((B, blocks.H, blocks.count, blocks.X), jnp.float32),
        ),
        compiler_params=compiler_params(),
        interpret=interpret,
        name="interleaved_attention_forward",
    )(*operands)
