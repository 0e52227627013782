"""What the forward and the backward kernel do on chip, for one block of queries and the key blocks in the ring.

Layout: a block of unmixed vectors is `[heads, C*width]`, one token after another along the lanes, so that mixing is one
matrix product `[P, heads] x [heads, C*width]`; its result is read as `[P*C, width]`, pseudo-major virtual tokens.
Scores stand transposed, `[keys, queries]`: what belongs to a query is then a row, and sums and maxima over keys run
down the rows.

Shapes as in `interleaved_tpu_blocks`; S source heads, w a width, x virtual queries and y virtual keys of a block
(both P*C), R key blocks in the ring.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from iha_jax.array_types import Array
from iha_jax.ops.pallas.interleaved_tpu_blocks import Blocks

Ref = Any  # a block of memory inside a kernel
HIDDEN = -1e30  # added to the scores of pairs that do not see each other
LEAST = -1e29  # floor of a query's maximum: exp(HIDDEN - LEAST) is 0, so one that sees nothing has weights of 0


class Inputs(NamedTuple):
    """What comes from device memory in one step: query and arriving key blocks `[1, heads, C, width]`, all weights,
    head leading (`alpha_q, alpha_k, alpha_v [H, P, S]`, `collapse [H, H, P]` as head, output head, pseudo), the segment
    ids of the row `[1, n, C]` and the RoPE tables `[R, P*C, d]`; the last three are None where there are none."""

    q: Any
    k: Any
    v: Any
    alpha_q: Any
    alpha_k: Any
    alpha_v: Any
    collapse: Any
    ids: Any = None
    cos: Any = None
    sin: Any = None
    gradient: Any = None  # of the output: [1, H, C, e]


class OnChip(NamedTuple):
    """What stays on chip between steps or heads: see `on_chip`."""

    k: Any
    v: Any
    q: Any
    hidden: Any


def on_chip(blocks: Blocks) -> OnChip:
    """Rings of keys and values `[R, K, C*w]`, the query block `[H, C*d]`, and what to add to scores `[R, y, x]`."""
    C, d, e, dtype = blocks.size, blocks.padded(blocks.width), blocks.padded(blocks.value_width), blocks.dtype
    return OnChip(
        k=pltpu.VMEM((blocks.ring, blocks.key_heads, C * d), dtype),
        v=pltpu.VMEM((blocks.ring, blocks.key_heads, C * e), dtype),
        q=pltpu.VMEM((blocks.heads, C * d), dtype),
        hidden=pltpu.VMEM((blocks.ring, blocks.rows, blocks.rows), jnp.float32),
    )


def dot(a: Array, b: Array, over_a: int, over_b: int) -> Array:
    """Matrix product over one axis of each, accumulated in float32; float32 inputs are not rounded to bfloat16."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    if 1 in a.shape + b.shape:  # one head or pseudo-head: no bfloat16 product of a vector compiles into float32
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    axes = (((over_a,), (over_b,)), ((), ()))
    return jax.lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)


def to_lanes(block_SCw: Array) -> Array:
    """`[S, C, w]` to `[S, C*w]`."""
    return block_SCw.reshape(block_SCw.shape[0], -1)


def from_lanes(x_SCw: Array, like: Ref) -> Array:
    """`[S, C*w]` to `[S, C, w]`, the shape and dtype of a block on its way out."""
    return x_SCw.reshape(like.shape[1:]).astype(like.dtype)


def mix(alpha_PS: Array, block_SCw: Array, rows: int) -> Array:
    """Unmixed `[S, C*w]` to virtual tokens `[P*C, w]` in float32."""
    return dot(alpha_PS, block_SCw, 1, 0).reshape(rows, -1)


def rotate(x_xd: Array, inputs: Inputs, t: Array | int, *, back: bool = False) -> Array:
    """RoPE of virtual tokens of the ring's block t; `back` is its transpose."""
    if inputs.cos is None:
        return x_xd
    turned = pltpu.roll(x_xd, x_xd.shape[-1] // 2, 1) * inputs.sin[t]
    return x_xd * inputs.cos[t] - turned if back else x_xd * inputs.cos[t] + turned


def slot(step: Array, t: Array | int, blocks: Blocks) -> Array:
    """Where the ring holds block t, oldest first, once the block of this step has arrived."""
    return jax.lax.rem(step + 1 + t, jnp.int32(blocks.ring))


def receive(inputs: Inputs, chip: OnChip, blocks: Blocks, step: Array, arriving: Array) -> None:
    """Puts the arriving key block into the ring, zeros where the sequence has no such block."""
    place = slot(step, blocks.ring - 1, blocks)
    present = (arriving >= 0) & (arriving < blocks.n)

    @pl.when(present)
    def _() -> None:
        chip.k[place] = to_lanes(inputs.k[0])
        chip.v[place] = to_lanes(inputs.v[0])

    @pl.when(jnp.logical_not(present))
    def _() -> None:
        chip.k[place] = jnp.zeros(chip.k.shape[1:], chip.k.dtype)
        chip.v[place] = jnp.zeros(chip.v.shape[1:], chip.v.dtype)


def _ids(inputs: Inputs, blocks: Blocks, block: Array) -> tuple[Array, Array]:
    """Segment ids of a block's virtual tokens, as a column and as a row, from the row of its tokens: each is a sum over
    one nonzero number, which needs no transposition of odd shapes."""
    C = blocks.size
    row = inputs.ids[0, pl.ds(block, 1), :]
    down, along = (jax.lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    tokens = jnp.sum(jnp.where(down == along, row, 0), axis=1, keepdims=True)
    token_of = jax.lax.rem(jax.lax.broadcasted_iota(jnp.int32, (C, blocks.rows), 1), jnp.int32(C))
    mine = jax.lax.broadcasted_iota(jnp.int32, (C, blocks.rows), 0) == token_of
    return jnp.concatenate([tokens] * blocks.P, axis=0), jnp.sum(jnp.where(mine, tokens, 0), axis=0, keepdims=True)


def mask(inputs: Inputs, chip: OnChip, blocks: Blocks, query_block: Array) -> None:
    """Writes `chip.hidden` for this query block: causality, window, segments, and the ends of the sequence."""
    C, unit = blocks.size, blocks.unit

    def split(shape: tuple[int, int], axis: int) -> tuple[Array, Array]:
        index = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        token, pseudo = jax.lax.rem(index, jnp.int32(C)), jax.lax.div(index, jnp.int32(C))
        return token, token * unit + (pseudo if blocks.causality == "virtual" else 0)

    query = split((1, blocks.rows), 1)[1]
    token, key = split((blocks.rows, 1), 0)
    query = query + blocks.before * C * unit
    query_ids = None if inputs.ids is None else _ids(inputs, blocks, query_block)[1]

    def one(t: Array, _: int) -> int:
        block = query_block - blocks.before + t
        distance = query - (key + t * (C * unit))
        near = distance >= 0 if blocks.causal else jnp.abs(distance) < blocks.window * unit
        seen = near & (distance < blocks.window * unit)
        seen = seen & (token + block * C >= 0) & (token + block * C < blocks.tokens)
        if query_ids is not None:
            key_ids = _ids(inputs, blocks, jnp.clip(block, 0, blocks.n - 1))[0]
            seen = seen & (key_ids == query_ids) & (query_ids != 0)
        chip.hidden[t] = jnp.where(seen, 0.0, HIDDEN)
        return 0

    jax.lax.fori_loop(0, blocks.ring, one, 0)


class Attended(NamedTuple):
    """Of one head: rotated and scaled queries `[x, d]` in the input's dtype, each query's largest score and the inverse
    sum of its weights `[1, x]` (0 where it sees nothing), its outputs transposed `[e, x]`."""

    queries: Array
    maximum: Array
    inverse: Array
    out: Array


class Kept(NamedTuple):
    """Where `attend` leaves what the backward pass uses again: `[R, y, d]`, `[R, y, e]`, `[R, y, x]`."""

    keys: Any
    values: Any
    scores: Any


def attend(
    inputs: Inputs, chip: OnChip, blocks: Blocks, step: Array, head: Array, kept: Kept | None = None
) -> Attended:
    """Softmax attention of one head's virtual queries over the ring, online over key blocks."""
    rows, dtype = blocks.rows, chip.q.dtype
    queries = rotate(mix(inputs.alpha_q[head], chip.q[...], rows), inputs, blocks.before)
    queries = (queries / math.sqrt(blocks.width)).astype(dtype)

    def one(t: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        maximum, total, out = state
        place = slot(step, t, blocks)
        keys = rotate(mix(inputs.alpha_k[head], chip.k[place], rows), inputs, t).astype(dtype)
        values = mix(inputs.alpha_v[head], chip.v[place], rows).astype(dtype)
        scores = dot(keys, queries, 1, 1) + chip.hidden[t]
        if kept is not None:
            kept.keys[t], kept.values[t], kept.scores[t] = keys, values, scores
        larger = jnp.maximum(maximum, jnp.max(scores, axis=0, keepdims=True))
        weights, shrink = jnp.exp(scores - larger), jnp.exp(maximum - larger)
        out = out * shrink + dot(values, weights.astype(dtype), 0, 0)
        return larger, total * shrink + jnp.sum(weights, axis=0, keepdims=True), out

    start = (
        jnp.full((1, rows), LEAST, jnp.float32),
        jnp.zeros((1, rows), jnp.float32),
        jnp.zeros((blocks.padded(blocks.value_width), rows), jnp.float32),
    )
    maximum, total, out = jax.lax.fori_loop(0, blocks.ring, one, start)
    inverse = jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0)
    return Attended(queries, maximum, inverse, out * inverse)
