"""Backward kernels of fused IHA for GPUs, in the manner of flash attention: everything on chip is computed again.

With `w = 2^(s - lse)`, `do~ = R^T dout` and `delta = sum_e do~ o~` the gradient of a score is
`ds = w (do~ v~^T - delta)`. `query_kernel`: a program owns query blocks; a first walk over the key blocks in reach
gives `o~` (for delta and the gradient of the collapse), a second one `dq~`. `key_kernel`: a program owns key blocks; it
walks over the query blocks that reach one, once for `dv~` and once for `dk~` (one walk with both sums overflows the
registers). Both go back to heads by `E^T` and add their part of the gradients of E.
Legend and the matrix products of mixing: `interleaved_gpu_blocks`.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from iha_jax.array_types import Array
from iha_jax.ops.pallas.interleaved_gpu_blocks import (
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
from iha_jax.ops.pallas.interleaved_gpu_forward import LOG2_E

SLOTS = 264  # programs of a kernel: two for each of an H100's 132 multiprocessors
ELEMENTS = 2  # of all the gradients of one E that programs sum for themselves, in those of q


def _weights(blocks: Blocks, left: tuple[Array, ...], right: tuple[Array, ...], visible: Array, lse: Array) -> Array:
    """Softmax weights from a saved log-sum-exp that broadcasts along the keys."""
    exponents = inner_products(left, right) * (blocks.scale * LOG2_E) - lse
    return jnp.where(visible, jnp.exp2(jnp.where(visible, exponents, 0.0)), 0.0)


def _scaled(x: tuple[Array, ...], scale: float) -> tuple[Array, ...]:
    return tuple(part * scale for part in x)


def _sources(blocks: Blocks, refs: list[Ref]) -> tuple[Source, Source, Source, Source, tuple[Ref, Ref] | None]:
    """Queries, keys, values and output gradients with their E, and the tables of RoPE."""
    q_ref, k_ref, v_ref, dout_ref, Eq, Ek, Ev, Er, *tables = refs
    H, K, parts = blocks.H, blocks.K, 1 + blocks.rotated
    query, key = Source(blocks, H, q_ref, Eq, parts), Source(blocks, K, k_ref, Ek, parts)
    return query, key, Source(blocks, K, v_ref, Ev), Source(blocks, H, dout_ref, Er), pair(tables)


def query_kernel(blocks: Blocks, slots: int, ids_ref: Ref, lse_ref: Ref, *refs: Ref) -> None:
    *operands, dq_ref, delta_ref, dEq_ref, dEr_ref = refs
    query, key, value, dout, tables = _sources(blocks, operands)
    dtype, X = query.rows_ref.dtype, blocks.X
    b, slot = pl.program_id(0), pl.program_id(1)
    share = -(-blocks.count // slots)

    def head(i: Array, h: Array) -> None:
        queries = cast(turn(query.mix(b, i, h), tables), dtype)
        (dmixed,) = cast(dout.mix(b, i, h), dtype)
        lse = lse_ref[b, h, i, :][:, None]
        query_ids = blocks.block_ids(ids_ref, b, i)
        first, last = blocks.range_around(i, *blocks.neighbors)
        place = (b, slot), i == slot * share

        def weights(j: Array) -> tuple[Array, tuple[Array, ...], Array]:
            keys = cast(turn(key.mix(b, j, h), tables), dtype)
            (values,) = cast(value.mix(b, j, h), dtype)
            visible = blocks.visible(query_ids, blocks.block_ids(ids_ref, b, j), i - j)
            return _weights(blocks, queries, keys, visible, lse), keys, values

        def attend(j: Array, total: Array) -> Array:
            w, _, values = weights(j)
            return total + product(w.astype(dtype), values)

        mixed = lax.fori_loop(first, last, attend, jnp.zeros((X, value.width), jnp.float32))
        delta = jnp.sum(mixed * dmixed, axis=1)
        delta_ref[b, h, i, :] = delta
        dout.add_outer(dEr_ref, (b, i, h), (mixed,), place)

        def back(j: Array, total: tuple[Array, ...]) -> tuple[Array, ...]:
            w, keys, values = weights(j)
            ds = (w * (product(dmixed, values, (1, 1)) - delta[:, None])).astype(dtype)
            return tuple(x + product(ds, part) for x, part in zip(total, keys, strict=True))

        zeros = (jnp.zeros((X, query.width), jnp.float32),) * query.parts
        dqueries = _scaled(lax.fori_loop(first, last, back, zeros), blocks.scale)
        dqueries = turn(dqueries, tables, back=True)
        query.add_adjoint(dq_ref, (b, i, h), dqueries)
        query.add_outer(dEq_ref, (b, i, h), dqueries, place)

    def block(i: Array, _: None) -> None:
        lax.fori_loop(0, blocks.H, lambda h, _: head(i, h), None)

    lax.fori_loop(slot * share, jnp.minimum((slot + 1) * share, blocks.count), block, None)


def key_kernel(blocks: Blocks, slots: int, ids_ref: Ref, lse_ref: Ref, delta_ref: Ref, *refs: Ref) -> None:
    *operands, dk_ref, dv_ref, dEk_ref, dEv_ref = refs
    query, key, value, dout, tables = _sources(blocks, operands)
    dtype, X = query.rows_ref.dtype, blocks.X
    b, slot = pl.program_id(0), pl.program_id(1)
    share = -(-blocks.count // slots)

    def head(j: Array, h: Array) -> None:
        keys = cast(turn(key.mix(b, j, h), tables), dtype)
        key_ids = blocks.block_ids(ids_ref, b, j)
        before, after = blocks.neighbors
        first, last = blocks.range_around(j, after, before)
        place = (b, slot), j == slot * share

        def weights(i: Array) -> tuple[Array, tuple[Array, ...], Array]:
            queries = cast(turn(query.mix(b, i, h), tables), dtype)
            (dmixed,) = cast(dout.mix(b, i, h), dtype)
            visible = blocks.visible(blocks.block_ids(ids_ref, b, i), key_ids, i - j, axis=1)
            return _weights(blocks, keys, queries, visible, lse_ref[b, h, i, :][None, :]), queries, dmixed

        def back_to_values(i: Array, total: Array) -> Array:
            w, _, dmixed = weights(i)
            return total + product(w.astype(dtype), dmixed)

        dvalues = lax.fori_loop(first, last, back_to_values, jnp.zeros((X, value.width), jnp.float32))
        value.add_adjoint(dv_ref, (b, j, h), (dvalues,))
        value.add_outer(dEv_ref, (b, j, h), (dvalues,), place)
        (values,) = cast(value.mix(b, j, h), dtype)

        def back_to_keys(i: Array, total: tuple[Array, ...]) -> tuple[Array, ...]:
            w, queries, dmixed = weights(i)
            ds = (w * (product(values, dmixed, (1, 1)) - delta_ref[b, h, i, :][None, :])).astype(dtype)
            return tuple(x + product(ds, part) for x, part in zip(total, queries, strict=True))

        zeros = (jnp.zeros((X, key.width), jnp.float32),) * key.parts
        dkeys = lax.fori_loop(first, last, back_to_keys, zeros)
        dkeys = turn(_scaled(dkeys, blocks.scale), tables, back=True)
        key.add_adjoint(dk_ref, (b, j, h), dkeys)
        key.add_outer(dEk_ref, (b, j, h), dkeys, place)

    def block(j: Array, _: None) -> None:
        lax.fori_loop(0, blocks.H, lambda h, _: head(j, h), None)

    lax.fori_loop(slot * share, jnp.minimum((slot + 1) * share, blocks.count), block, None)


def program_count(blocks: Blocks, B: int, width: int) -> int:
    """Programs a batch row, each with consecutive blocks and none without: `SLOTS / B`, or fewer where the gradients of
    E that they sum for themselves would be larger than `ELEMENTS` times q (small P with many heads)."""
    R = blocks.rows_of_block(blocks.H)
    room = ELEMENTS * blocks.N * blocks.H * width // (blocks.H * blocks.X * R)
    share = -(-blocks.count // max(1, min(SLOTS // B, room)))
    return -(-blocks.count // share)


def backward(
    blocks: Blocks, ids: Array, lse: Array, operands: tuple[Array, ...], interpret: bool
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Gradients of the rows of q, k, v and of the E of q, k, v and collapse, all float32.

    `operands`: rows of q, k, v and of the output's gradient, their E, and the tables of RoPE if any.
    """
    q, k, v = operands[:3]
    B, X = q.shape[0], blocks.X
    slots = program_count(blocks, B, q.shape[-1])

    def rows(x: Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, jnp.float32)

    def matrices(S: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((B, slots, blocks.H, X, blocks.rows_of_block(S)), jnp.float32)

    call = functools.partial(pl.pallas_call, grid=(B, slots), compiler_params=compiler_params(), interpret=interpret)
    dq, delta, dEq, dEr = call(
        functools.partial(query_kernel, blocks, slots),
        out_shape=(rows(q), rows(lse), matrices(blocks.H), matrices(blocks.H)),
        name="interleaved_attention_backward_queries",
    )(ids, lse, *operands)
    dk, dv, dEk, dEv = call(
        functools.partial(key_kernel, blocks, slots),
        out_shape=(rows(k), rows(v), matrices(blocks.K), matrices(blocks.K)),
        name="interleaved_attention_backward_keys",
    )(ids, lse, delta, *operands)
    return (dq, dk, dv), tuple(jnp.sum(x, axis=(0, 1)) for x in (dEq, dEk, dEv, dEr))
