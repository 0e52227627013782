"""The forward kernel of fused IHA on TPU: one query block a grid step, all heads in a loop, only the output written.

For every head: mix the queries once and each key block in the ring, attend, and add the head's share
`out[g] += sum_p collapse[g, h, p] o[h, p]` to all output heads. Shapes as in `interleaved_tpu_blocks`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from iha_jax.array_types import Array
from iha_jax.ops.pallas.interleaved_tpu_blocks import Blocks
from iha_jax.ops.pallas.interleaved_tpu_head import (
    Inputs,
    OnChip,
    Ref,
    attend,
    dot,
    from_lanes,
    mask,
    on_chip,
    receive,
    to_lanes,
)


def _kernel(inputs: Inputs, out_ref: Ref, chip: OnChip, sum_ref: Ref, *, blocks: Blocks) -> None:
    step = pl.program_id(2)
    arriving = pl.program_id(1) * blocks.part - blocks.before + step
    receive(inputs, chip, blocks, step, arriving)

    @pl.when(step >= blocks.ring - 1)  # all that the query block can see has arrived
    def _() -> None:
        chip.q[...] = to_lanes(inputs.q[0])
        mask(inputs, chip, blocks, arriving - blocks.after)
        sum_ref[...] = jnp.zeros(sum_ref.shape, sum_ref.dtype)

        def one(head: Array, _: int) -> int:
            out = attend(inputs, chip, blocks, step, head).out
            out_PCe = out.T.reshape(blocks.P, -1).astype(chip.q.dtype)
            sum_ref[...] += dot(inputs.collapse[head], out_PCe, 1, 0)
            return 0

        jax.lax.fori_loop(0, blocks.heads, one, 0)
        out_ref[0] = from_lanes(sum_ref[...], out_ref)


def forward(inputs: Inputs, blocks: Blocks) -> Array:
    """`[B, H, n*C, e]` from q, k, v of padded length and width; weights as in `Inputs`."""
    B, e, steps = inputs.q.shape[0], inputs.v.shape[-1], blocks.part + blocks.before + blocks.after
    return pl.pallas_call(
        functools.partial(_kernel, blocks=blocks),
        grid=(B, blocks.parts, steps),
        in_specs=[input_specs(inputs, blocks, blocks.before)],
        out_specs=own_block(blocks, blocks.heads, e, blocks.ring - 1),
        out_shape=jax.ShapeDtypeStruct((B, blocks.heads, blocks.n * blocks.size, e), inputs.q.dtype),
        scratch_shapes=[on_chip(blocks), pltpu.VMEM((blocks.heads, blocks.size * e), jnp.float32)],
        compiler_params=compiler_params(blocks),
        interpret=blocks.interpret,
        name="interleaved_forward",
    )(inputs)


def input_specs(inputs: Inputs, blocks: Blocks, lead: int) -> Inputs:
    """Which block of each input a step reads; the first key block of a part arrives `lead` steps after its start."""

    def tokens(x: Array, late: int) -> pl.BlockSpec:
        def index(b: Array, part: Array, step: Array) -> tuple:
            return b, 0, jnp.clip(part * blocks.part - lead + step - late, 0, blocks.n - 1), 0

        return pl.BlockSpec((1, x.shape[1], blocks.size, x.shape[3]), index)

    def whole(x: Array) -> pl.BlockSpec:
        return pl.BlockSpec(x.shape, lambda *_: (0,) * x.ndim, pipeline_mode=pl.Buffered(1))

    weights = {name: whole(getattr(inputs, name)) for name in ("alpha_q", "alpha_k", "alpha_v", "collapse")}
    return Inputs(
        q=tokens(inputs.q, blocks.after),
        k=tokens(inputs.k, 0),
        v=tokens(inputs.v, 0),
        **weights,
        ids=None if inputs.ids is None else pl.BlockSpec((1, blocks.n, blocks.size), lambda b, *_: (b, 0, 0)),
        cos=None if inputs.cos is None else whole(inputs.cos),
        sin=None if inputs.sin is None else whole(inputs.sin),
        gradient=None if inputs.gradient is None else tokens(inputs.gradient, blocks.after),
    )


def own_block(blocks: Blocks, heads: int, width: int, first: int) -> pl.BlockSpec:
    """A part's own blocks, one a step, from step `first` on; before and after that the nearest of them."""

    def index(b: Array, part: Array, step: Array) -> tuple:
        return b, 0, part * blocks.part + jnp.clip(step - first, 0, blocks.part - 1), 0

    return pl.BlockSpec((1, heads, blocks.size, width), index)


def compiler_params(blocks: Blocks) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=blocks.vmem_bytes
    )
