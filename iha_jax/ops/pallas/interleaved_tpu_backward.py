"""The backward kernel of fused IHA on TPU: one pass that recomputes each query block's attention and writes gradients.

With A the weights, G the mixed gradient of one head's output, `delta = sum_e O G` and `dS = A (V G^T - delta)`:

    dV = A G,  dK = dS Q,  dQ = dS^T K                  then RoPE back, and through the mixing of each:
    dk[s] += sum_p alpha_k[s, h, p] dK[p]               dalpha_k[s, h, p] += <k[s], dK[p]>, and so for q, v
    dcollapse[g, h, p] += <gradient[g], O[h, p]>

Gradients of keys and values gather in float32 in rings beside the keys and values themselves; a block leaves, complete,
after the last query block that sees it. So nothing is saved by the forward pass and each block is read and written
once. A part also visits the query blocks of its neighbors that see its keys, for the keys' sake alone.
Shapes as in `interleaved_tpu_blocks` and `interleaved_tpu_head`.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from iha_jax.array_types import Array
from iha_jax.ops.pallas.interleaved_tpu_blocks import Blocks
from iha_jax.ops.pallas.interleaved_tpu_forward import compiler_params, input_specs, own_block
from iha_jax.ops.pallas.interleaved_tpu_head import (
    Inputs,
    Kept,
    OnChip,
    attend,
    dot,
    from_lanes,
    mask,
    on_chip,
    receive,
    rotate,
    slot,
    to_lanes,
)


class Gradients(NamedTuple):
    """Of everything differentiable in `Inputs`, by the same names. Those of the weights are float32 with leading axes
    [B, parts], one sum each."""

    q: Any
    k: Any
    v: Any
    alpha_q: Any
    alpha_k: Any
    alpha_v: Any
    collapse: Any


class Sums(NamedTuple):
    """Float32 sums and copies on chip: gradients of keys and values `[R, K, C*w]` and of queries `[H, C*d]`, the
    output's gradient `[H, C*e]`, and what one head's attention leaves."""

    k: Any
    v: Any
    q: Any
    gradient: Any
    kept: Kept


def _sums(blocks: Blocks) -> Sums:
    C, d, e = blocks.size, blocks.padded(blocks.width), blocks.padded(blocks.value_width)
    R, rows, K = blocks.ring, blocks.rows, blocks.key_heads
    kept = Kept(
        pltpu.VMEM((R, rows, d), blocks.dtype),
        pltpu.VMEM((R, rows, e), blocks.dtype),
        pltpu.VMEM((R, rows, rows), jnp.float32),
    )
    return Sums(
        k=pltpu.VMEM((R, K, C * d), jnp.float32),
        v=pltpu.VMEM((R, K, C * e), jnp.float32),
        q=pltpu.VMEM((blocks.heads, C * d), jnp.float32),
        gradient=pltpu.VMEM((blocks.heads, C * e), blocks.dtype),
        kept=kept,
    )


def _kernel(inputs: Inputs, out: Gradients, chip: OnChip, sums: Sums, *, blocks: Blocks) -> None:
    step, first = pl.program_id(2), pl.program_id(1) * blocks.part
    arriving = first - _lead(blocks) + step
    query_block = arriving - blocks.after
    own = (query_block >= first) & (query_block < first + blocks.part)
    receive(inputs, chip, blocks, step, arriving)
    newest = slot(step, blocks.ring - 1, blocks)
    for ring in (sums.k, sums.v):
        ring[newest] = jnp.zeros(ring.shape[1:], ring.dtype)

    @pl.when(step == 0)
    def _() -> None:
        for x in out[3:]:
            x[...] = jnp.zeros(x.shape, x.dtype)

    @pl.when((step >= blocks.ring - 1) & (query_block >= 0) & (query_block < blocks.n))
    def _() -> None:
        chip.q[...] = to_lanes(inputs.q[0])
        sums.gradient[...] = to_lanes(inputs.gradient[0])
        mask(inputs, chip, blocks, query_block)
        sums.q[...] = jnp.zeros(sums.q.shape, sums.q.dtype)

        def one(head: Array, _: int) -> int:
            _head(inputs, out, chip, sums, blocks, step, head, own)
            return 0

        jax.lax.fori_loop(0, blocks.heads, one, 0)

    @pl.when(own)
    def _() -> None:
        out.q[0] = from_lanes(sums.q[...], out.q)

    oldest, leaving = slot(step, 0, blocks), arriving - (blocks.ring - 1)

    @pl.when((leaving >= first) & (leaving < first + blocks.part))
    def _() -> None:
        out.k[0] = from_lanes(sums.k[oldest], out.k)
        out.v[0] = from_lanes(sums.v[oldest], out.v)


def _head(
    inputs: Inputs, out: Gradients, chip: OnChip, sums: Sums, blocks: Blocks, step: Array, head: Array, own: Array
) -> None:
    rows, dtype, P = blocks.rows, chip.q.dtype, blocks.P
    attended = attend(inputs, chip, blocks, step, head, sums.kept)
    gradient = dot(inputs.collapse[head], sums.gradient[...], 0, 0).reshape(rows, -1)
    delta = jnp.sum(attended.out * gradient.T, axis=0, keepdims=True)
    gradient = gradient.astype(dtype)

    def add_own(target: Any, share: Array) -> None:
        target[0, 0, head] += jnp.where(own, share, 0)

    def through_mixing(x: Array, alpha: Array, target: Any, to: Any, unmixed: Array) -> None:
        x = x.reshape(P, -1).astype(dtype)
        target[...] += dot(alpha, x, 0, 0)
        add_own(to, dot(x, unmixed, 1, 1))

    def one(t: Array, queries: Array) -> Array:
        place = slot(step, t, blocks)
        weights = jnp.exp(sums.kept.scores[t] - attended.maximum) * attended.inverse
        scores = weights * (dot(sums.kept.values[t], gradient, 1, 1) - delta)
        scores = scores.astype(dtype)
        values = dot(weights.astype(dtype), gradient, 1, 0)
        keys = rotate(dot(scores, attended.queries, 1, 0), inputs, t, back=True)
        through_mixing(keys, inputs.alpha_k[head], sums.k.at[place], out.alpha_k, chip.k[place])
        through_mixing(values, inputs.alpha_v[head], sums.v.at[place], out.alpha_v, chip.v[place])
        return queries + dot(scores, sums.kept.keys[t], 0, 0)

    queries = jax.lax.fori_loop(0, blocks.ring, one, jnp.zeros((rows, chip.q.shape[-1] // blocks.size), jnp.float32))
    queries = rotate(queries / math.sqrt(blocks.width), inputs, blocks.before, back=True)
    through_mixing(queries, inputs.alpha_q[head], sums.q, out.alpha_q, chip.q[...])
    add_own(out.collapse, dot(sums.gradient[...], attended.out.T.reshape(P, -1).astype(dtype), 1, 1))


def _lead(blocks: Blocks) -> int:
    """Blocks before its own whose keys a part needs: its keys may be seen from `after` blocks before, which in turn see
    `before` blocks before them."""
    return blocks.before + blocks.after


def backward(inputs: Inputs, blocks: Blocks) -> Gradients:
    """Gradients from `inputs.gradient [B, H, n*C, e]`, the output's."""
    B, H, d, e = inputs.q.shape[0], blocks.heads, inputs.q.shape[-1], inputs.v.shape[-1]
    lead, K = _lead(blocks), blocks.key_heads

    def weights(x: Array) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
        spec = pl.BlockSpec((1, 1, *x.shape), lambda b, part, step: (b, part, 0, 0, 0))
        return jax.ShapeDtypeStruct((B, blocks.parts, *x.shape), jnp.float32), spec

    def tokens(x: Array, heads: int, width: int, first: int) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
        return jax.ShapeDtypeStruct(x.shape, x.dtype), own_block(blocks, heads, width, first)

    outputs = Gradients(
        tokens(inputs.q, H, d, lead + blocks.after),
        tokens(inputs.k, K, d, 2 * lead),
        tokens(inputs.v, K, e, 2 * lead),
        *(weights(x) for x in (inputs.alpha_q, inputs.alpha_k, inputs.alpha_v, inputs.collapse)),
    )
    (gradients,) = pl.pallas_call(
        functools.partial(_kernel, blocks=blocks),
        grid=(B, blocks.parts, blocks.part + 2 * lead),
        in_specs=[input_specs(inputs, blocks, lead)],
        out_specs=[Gradients(*(spec for _, spec in outputs))],
        out_shape=[Gradients(*(shape for shape, _ in outputs))],
        scratch_shapes=[on_chip(blocks), _sums(blocks)],
        compiler_params=compiler_params(blocks),
        interpret=blocks.interpret,
        name="interleaved_backward",
    )(inputs)
    return gradients
