"""Fused IHA on TPU: mixes, attends within the window and collapses in one Pallas kernel, forward and backward.

Queries, keys and values of all heads are read once, the output is written once; pseudo-heads, scores and outputs of
pseudo-queries exist on chip alone, and the forward pass saves nothing for the backward one, which recomputes them.
Mechanism and arguments: `iha_jax.ops.interleaved`. How blocks pass through the chip: `interleaved_tpu_blocks`.

**This code has never run on a TPU.** It is compiled for v4, v5e, v5p and v6e ahead of time, and its numbers are checked
in Pallas's interpret mode on a CPU; speed on hardware is unknown.

Shapes: B batch, N tokens, H heads, K key/value heads, P pseudo-heads, d head width, e value width.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from iha_jax.array_types import Array, Float, Int
from iha_jax.ops.implementations import current_chip
from iha_jax.ops.pallas.interleaved_tpu_backward import backward
from iha_jax.ops.pallas.interleaved_tpu_blocks import (
    SMALLEST_BLOCK,
    Blocks,
    choose_block,
    split,
    tpu_info,
)
from iha_jax.ops.pallas.interleaved_tpu_forward import forward
from iha_jax.ops.pallas.interleaved_tpu_head import Inputs


def fused_interleaved_attention(
    q: Float[Array, "B N H d"],
    k: Float[Array, "B N K d"],
    v: Float[Array, "B N K e"],
    mixing: tuple[Array, Array, Array, Array],
    *,
    causal: bool,
    causality: str,
    window: int | None,
    rope_theta: float | None,
    rope_positions: str,
    segment_ids: Int[Array, "B N"] | None,
    interpret: bool | pltpu.InterpretParams = False,
    chip: str | None = None,
    block: int | None = None,
) -> Float[Array, "B N H e"]:
    """`interleaved_head_attention` in one kernel; `mixing` is (alpha_q, alpha_k, alpha_v, collapse).

    Every switch of `interleaved_head_attention` is supported. The window's keys and values of all heads, and in the
    backward pass their float32 gradients, have to fit on chip: `choose_block` says how many bytes that is. So no window
    (`window=None`) is accepted for sequences that fit as a whole. At H = 20, d = 128 in bfloat16 the largest windows of
    the FLOP-matched schedule at N = 8192 (1024 tokens at P = 2) fit on v5e, v5p and v6e, and are refused on v4.

    Head widths that are no multiple of 128 are padded with zeros, and so is a sequence that is no multiple of the
    block; that copies q, k and v.

    Args:
      interpret: run as ordinary XLA operations on any device; slow, for tests.
      chip: what it is compiled for, "v4", "v5e", "v5p", "v6e" or "7x"; by default what `target_platform` names, else
        the device at hand.
      block: tokens of a block, to override `choose_block`'s.

    Raises:
      ValueError: for a dtype other than float32 and bfloat16, where no TPU is at hand or named, and where the window
        does not fit on chip.
    """
    blocks = plan(
        (q, k, v),
        mixing[0].shape[-1],
        causal=causal,
        causality=causality,
        window=window,
        rope_theta=rope_theta,
        rope_positions=rope_positions,
        interpret=interpret,
        chip=chip,
        block=block,
    )
    N, H, tokens = q.shape[1], q.shape[2], blocks.n * blocks.size
    halves = 1 if rope_theta is None else 2
    q, k = (_pad(x, tokens, blocks.padded(x.shape[-1]), halves) for x in (q, k))
    ids = None
    if segment_ids is not None:
        ids = jnp.pad(segment_ids.astype(jnp.int32), ((0, 0), (0, tokens - N))).reshape(-1, blocks.n, blocks.size)
    alpha_q, alpha_k, alpha_v, collapse = mixing
    if collapse.ndim == 2:  # per head: the global one with zeros between heads
        collapse = jnp.eye(H, dtype=collapse.dtype)[:, :, None] * collapse[:, None]
    weights = (*(x.transpose(1, 2, 0) for x in (alpha_q, alpha_k, alpha_v)), collapse.transpose(1, 0, 2))
    out: Any = _attend(blocks, (q, k, _pad(v, tokens, blocks.padded(v.shape[-1]), 1), *weights), ids)
    return jnp.swapaxes(out, 1, 2)[:, :N, :, : v.shape[-1]]


def plan(
    qkv: tuple[Array, Array, Array] | tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct],
    P: int,
    *,
    causal: bool,
    causality: str,
    window: int | None,
    rope_theta: float | None,
    rope_positions: str,
    interpret: bool | pltpu.InterpretParams = False,
    chip: str | None = None,
    block: int | None = None,
) -> Blocks:
    """The geometry `fused_interleaved_attention` would use; arguments and errors are its own."""
    q, k, v = qkv
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"q has dtype {q.dtype}; the fused TPU kernel expects float32 or bfloat16")
    if block is not None and (block < 1 or (block % SMALLEST_BLOCK and not interpret)):
        raise ValueError(f"block = {block}; expected a positive multiple of {SMALLEST_BLOCK}")
    N, info = q.shape[1], None if interpret else tpu_info(chip or current_chip())
    blocks = Blocks(
        tokens=N,
        size=block or SMALLEST_BLOCK,
        heads=q.shape[2],
        key_heads=k.shape[2],
        P=P,
        width=q.shape[3],
        value_width=v.shape[3],
        window=N if window is None else min(window, N),
        causal=causal,
        causality=causality,
        rope_theta=rope_theta,
        rope_positions=rope_positions,
        dtype=jnp.dtype(q.dtype),
        chip=str(info.chip_version) if info else None,
        vmem_bytes=info.vmem_capacity_bytes if info else None,
        interpret=interpret,
    )
    return split(blocks if block else choose_block(blocks), q.shape[0])


def _pad(x: Array, tokens: int, width: int, parts: int) -> Array:
    """`[B, N, S, w]` to `[B, S, tokens, width]`, the layout of the kernel, which XLA gives projections from the start:
    nothing is copied. Zeros after the last token and after each of `parts` parts of the width: RoPE's pairs stay
    half a width apart."""
    x = jnp.swapaxes(x, 1, 2)
    B, S, N, w = x.shape
    if (tokens, width) == (N, w):
        return x
    x = x.reshape(B, S, N, parts, w // parts)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, tokens - N), (0, 0), (0, (width - w) // parts)))
    return x.reshape(B, S, tokens, width)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(blocks: Blocks, arrays: tuple[Array, ...], ids: Array | None) -> Array:
    return forward(_inputs(blocks, arrays, ids), blocks)


def _inputs(blocks: Blocks, arrays: tuple[Array, ...], ids: Array | None) -> Inputs:
    cos, sin = blocks.rotations() or (None, None)
    return Inputs(*arrays, ids=ids, cos=cos, sin=sin)


def _attend_forward(blocks: Blocks, arrays: tuple[Array, ...], ids: Array | None) -> tuple[Array, tuple]:
    return _attend(blocks, arrays, ids), (arrays, ids)


def _attend_backward(blocks: Blocks, saved: tuple, gradient: Array) -> tuple:
    arrays, ids = saved
    q, k, v, *weights = backward(_inputs(blocks, arrays, ids)._replace(gradient=gradient), blocks)
    summed = (jnp.sum(x, axis=(0, 1)).astype(q.dtype) for x in weights)
    return (q, k, v, *summed), None


_attend.defvjp(_attend_forward, _attend_backward)
