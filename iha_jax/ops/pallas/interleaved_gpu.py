"""Fused IHA for NVIDIA GPUs. TODO docstring
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from iha_jax.array_types import Array, Float, Int
from iha_jax.ops.pallas.interleaved_gpu_backward import backward
from iha_jax.ops.pallas.interleaved_gpu_blocks import VIRTUAL_TOKENS, Blocks, power_of_two
from iha_jax.ops.pallas.interleaved_gpu_forward import forward
from iha_jax.ops.rope import rotate, rotation, rotation_of_range


def block_tokens(N: int, P: int) -> int:
    """The block rule: as many tokens as fill `VIRTUAL_TOKENS` rows, at least one, no more than there are."""
    return min(N, max(1, VIRTUAL_TOKENS // P))


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
    interpret: bool = False,
    block: int | None = None,
) -> Float[Array, "B N H e"]:
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"q has dtype {q.dtype}; the fused GPU kernel expects float32 or bfloat16; else use 'streaming'")
    B, N, H, d = q.shape
    alpha_q, alpha_k, alpha_v, collapse = mixing
    K, e, P = k.shape[2], v.shape[3], alpha_q.shape[2]
    virtual = rope_theta is not None and rope_positions == "virtual"
    blocks = Blocks(
        N=N, H=H, K=K, P=P, C=block or block_tokens(N, P), window=window, causal=causal, causality=causality,
        rotated=virtual, scale=1 / math.sqrt(d),
    )  # fmt: skip
    tables = ()
    if rope_theta is not None:
        cos, sin = rotation_of_range(N, P if virtual else 1, d, rope_theta, jnp.float32)
        q, k = (rotate(x, cos[:, None], sin[:, None]) for x in (q, k))
    if virtual:
        pseudo = np.minimum(np.arange(blocks.X), blocks.C * P - 1) % P
        tables = tuple(_widened(x, power_of_two(d // 2)) for x in rotation(pseudo, d, rope_theta, jnp.float32))
    if collapse.ndim == 2:
        collapse = jnp.eye(H, dtype=collapse.dtype)[:, :, None] * collapse
    ids = jnp.ones((B, N), jnp.int32) if segment_ids is None else segment_ids.astype(jnp.int32)
    ids = jnp.pad(ids, [(0, 0), (0, blocks.count * blocks.C - N)])
    rows = (_rows(blocks, q, 1 + virtual), _rows(blocks, k, 1 + virtual), _rows(blocks, v, 1))
    E = tuple(_block_diagonal(blocks, alpha) for alpha in (alpha_q, alpha_k, alpha_v, collapse))
    out = _attention(Static(blocks, interpret), rows, ids, E, tables)
    return out[:, : N * H].reshape(B, N, H, -1)[..., :e]


@dataclasses.dataclass(frozen=True)
class Static:
    blocks: Blocks
    interpret: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: Static, rows: tuple, ids: Array, E: tuple, tables: tuple) -> Array:
    return _attention_forward(static, rows, ids, E, tables)[0]


def _attention_forward(static: Static, rows: tuple, ids: Array, E: tuple, tables: tuple) -> tuple[Array, tuple]:
    out, lse = forward(static.blocks, (*rows, ids, *E, *tables), static.interpret)
    return out.astype(rows[0].dtype), (rows, ids, E, tables, lse)


def _attention_backward(static: Static, saved: tuple, dout: Array) -> tuple:
    rows, ids, E, tables, lse = saved
    drows, dE = backward(static.blocks, ids, lse, (*rows, dout, *E, *tables), static.interpret)
    return (
        tuple(dx.astype(x.dtype) for dx, x in zip(drows, rows, strict=True)),
        None,
        tuple(dx.astype(x.dtype) for dx, x in zip(dE, E, strict=True)),
        None,
    )


_attention.defvjp(_attention_forward, _attention_backward)


def _widened(x: Array, width: int, parts: int = 1) -> Array:
    """Zeros after the last axis' `parts` equal parts, so that each has `width`."""
    x = x.reshape(*x.shape[:-1], parts, -1)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])
    return x.reshape(*x.shape[:-2], -1)


def _rows(blocks: Blocks, x: Array, parts: int) -> Array:
    """[B, N, S, width] to [B, rows, parts * power of two]: no copy where the shapes fit already."""
    B, N, S, width = x.shape
    x = _widened(x, power_of_two(width // parts), parts).reshape(B, N * S, -1)
    return jnp.pad(x, [(0, 0), (0, blocks.rows(S) - N * S), (0, 0)])


def _block_diagonal(blocks: Blocks, alpha: Array) -> Array:
    """alpha [S, H, P] to E [H, X, R]: `E[h, t*P + p, u*S + m] = [t = u] alpha[m, h, p]`, zeros beyond."""
    S, H, P = alpha.shape
    E = jnp.einsum("tu,mhp->htpum", jnp.eye(blocks.C, dtype=alpha.dtype), alpha)
    E = E.reshape(H, blocks.C * P, blocks.C * S)
    return jnp.pad(E, [(0, 0), (0, blocks.X - blocks.C * P), (0, blocks.rows_of_block(S) - blocks.C * S)])
