"""Fused IHA for NVIDIA GPUs, in Pallas: mixing, attention within the window and collapse in one kernel; two backward.

NEVER RUN ON HARDWARE. Proved in interpret mode on the CPU and lowered for CUDA; its kernels at the paper's shape were
compiled for an H100 by the Triton compiler, without a GPU (figures below). Times below are estimates.

**Back end.** Triton. `jax.experimental.pallas.triton` works in jax 0.10 and 0.12 alike; since 0.11 it is deprecated for
Mosaic GPU and warns when lowering. Mosaic GPU calls itself highly unstable, runs on Hopper and later only, and needs
layouts and barriers by hand, which cannot be trusted without a GPU; Triton needs only whole tiles and products. Both
lower without a GPU (jax 0.12 wants an abstract device named).

**How a GPU mixes.** Tensor cores multiply tiles whose sides are powers of two, and Triton cannot cut or reorder a tile,
so the TPU's `[P, H] x [H, C*d]`, cut into P*C rows, is out; so is padding P (20 to 32 costs 2.56 times the scores).
Here the virtual tokens of a block stay in their order, C*P of them in X = 64 rows (60 at P = 20), and mixing is one
product with a block-diagonal `E [X, C*H]` (`interleaved_gpu_blocks`): C times the multiply-adds of dense mixing, but as
cheap as one tile of scores where C*H is about 64, and every operand is read as it lies in memory. RoPE by the fixed p
follows on the product's float32 result. The collapse is the adjoint of the same product, since `collapse[g, h, p]` is
indexed like an alpha. A per-head collapse runs as a global one with zeros.

**Sum over heads.** `out[n, g]` sums over all h. One program takes a block and walks over the heads, adding to its own
float32 rows of the output, which stay in L2: no atomics, one order of additions, same bits every time. So do dq, dk and
dv. Gradients of E are summed by each program for itself, then by XLA. Saved for the backward pass: the inputs and the
log-sum-exp, X numbers a block and head. No array of N*P vectors exists; the largest is twice q (gradients of E).

**Bytes and FLOPs**, N = 8192, H = P = 20, d = 128, W = 10, one sequence, H100 (989 TFLOP/s, 50 MB of L2, 5.5 TB/s from
it assumed). Unit: a 64 x 64 x 128 product, 1.05 MFLOP; 54 620 pairs of block and head, each with five key blocks.

- Forward, 22 units a pair (flash attention alone: 10): 1.3 TFLOP, 1.3 ms at peak; 14 GB from L2, 2.6 ms.
- Backward, 101 units (50 + 51; with pseudo-tokens in memory 35 to 45): 5.8 TFLOP, 5.9 ms at peak.
- Device memory sees q, k, v and the output, 42 MB each; written out, the pseudo-tokens are 839 MB a tensor.

At half of peak that is about 14 ms against about 2.2 for cuDNN's MHA (1.2 TFLOP) and about 10 for the virtual sequence
written out (4 ms of cuDNN, 18 GB of traffic). So the kernel saves memory, and by estimate not time: recomputed mixing
is half of its products. Cheaper in time would be pseudo-tokens of a bounded slab of the sequence, mixed once and kept
in L2. For small P the window is long and the halo is read and mixed again by every block: at P = 2, W = 1024 a pair
reads 11 MB. There `streaming` or a pre-mixed form will be faster.

**Block rule.** C = max(1, 64 // P) tokens for queries and keys alike, X = 64 (more only where P > 64), 4 warps (one
warp group: `wgmma` is 64 rows tall), 2 stages. Compiled from the lowered IR by Triton 3.9 for sm_90a on 2026-11-24:
forward, queries, keys take 82, 99 and 99 KB of the 228 KiB of shared memory and 255 registers a thread, so two programs
share a multiprocessor; all products became `wgmma`, loads of q, k, v asynchronous copies. 255 is the limit: of about
1 400 instructions of the forward loop, 95 loads and 67 stores are spills. One backward walk for both dk and dv spilled
twice as much, hence two. P = 8 compiles too; P = 2 and float32 were lowered only.
Products of float32 inputs run on the CUDA cores in full precision: exact, and slow.
"""

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
    """`interleaved_head_attention` in one kernel, for bfloat16 and float32 on an NVIDIA GPU; never run on one yet.

    out[n, g] = sum_{h,p} collapse[g, h, p] o[n, h, p], `o` the softmax attention of the mixed, interleaved heads
    (arXiv 2602.21371, section 4), causal or not, windowed or not, with every switch of `interleaved_head_attention`,
    where arguments are explained and checked. Differentiable in q, k, v and the mixing weights, by kernels too.

    Args:
      mixing: (alpha_q [H, H, P], alpha_k [K, H, P], alpha_v [K, H, P], collapse [H, H, P] or [H, P]).
      interpret: run the kernels as plain jax operations, on any device: for tests.
      block: query and key tokens of a block, instead of the block rule's.

    Products take operands of the inputs' dtype and add up in float32; softmax and RoPE are float32; the result has the
    dtype of `q`.

    Raises:
      ValueError: for dtypes other than float32 and bfloat16; from jax, on a device other than a GPU if not interpreted.
    """
    N, H, d = q.shape[1:]
    e, P = v.shape[3], mixing[0].shape[2]
    blocks = plan(
        (q, k, v),
        P,
        causal=causal,
        causality=causality,
        window=window,
        rope_theta=rope_theta,
        rope_positions=rope_positions,
        block=block,
    )
    virtual, tables = blocks.rotated, ()
    if rope_theta is not None:  # rope(n*P + p) = rope(p) rope(n*P): the second here, the first after mixing
        cos, sin = rotation_of_range(N, P if virtual else 1, d, rope_theta, jnp.float32)
        q, k = rotate(q, cos[:, None], sin[:, None]), rotate(k, cos[:, None], sin[:, None])
        if virtual:
            pseudo = np.arange(blocks.X) % P
            tables = tuple(_widened(x, power_of_two(d // 2)) for x in rotation(pseudo, d, rope_theta, jnp.float32))
    *alphas, collapse = mixing
    if collapse.ndim == 2:
        collapse = jnp.eye(H, dtype=collapse.dtype)[:, :, None] * collapse
    ids = jnp.ones(q.shape[:2], jnp.int32) if segment_ids is None else segment_ids.astype(jnp.int32)
    ids = jnp.pad(ids, [(0, 0), (0, blocks.count * blocks.C - N)])
    rows = (_rows(blocks, q, 1 + virtual), _rows(blocks, k, 1 + virtual), _rows(blocks, v, 1))
    E = tuple(_block_diagonal(blocks, alpha) for alpha in (*alphas, collapse))
    out = _attention(blocks, interpret, rows, ids, E, tables)
    return out[:, : N * H].reshape(*q.shape[:3], -1)[..., :e]


def plan(
    qkv: tuple[Array, Array, Array] | tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct],
    P: int,
    *,
    causal: bool,
    causality: str,
    window: int | None,
    rope_theta: float | None,
    rope_positions: str,
    block: int | None = None,
) -> Blocks:
    """The geometry `fused_interleaved_attention` uses; arguments and errors are its own."""
    q, k, _ = qkv
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"q has dtype {q.dtype}; expected float32 or bfloat16; implementation='streaming' has others")
    return Blocks(
        N=q.shape[1],
        H=q.shape[2],
        K=k.shape[2],
        P=P,
        C=block or block_tokens(q.shape[1], P),
        window=window,
        causal=causal,
        causality=causality,
        rotated=rope_theta is not None and rope_positions == "virtual",
        scale=1 / math.sqrt(q.shape[3]),
    )


def _attention_alone(blocks: Blocks, interpret: bool, rows: tuple, ids: Array, E: tuple, tables: tuple) -> Array:
    return _attention_forward(blocks, interpret, rows, ids, E, tables)[0]


def _attention_forward(
    blocks: Blocks, interpret: bool, rows: tuple, ids: Array, E: tuple, tables: tuple
) -> tuple[Array, tuple]:
    out, lse = forward(blocks, (*rows, ids, *E, *tables), interpret)
    return out.astype(rows[0].dtype), (rows, ids, E, tables, lse)


def _attention_backward(blocks: Blocks, interpret: bool, saved: tuple, dout: Array) -> tuple:
    rows, ids, E, tables, lse = saved
    drows, dE = backward(blocks, ids, lse, (*rows, dout, *E, *tables), interpret)

    def cast(gradients: tuple, primals: tuple) -> tuple:
        return tuple(dx.astype(x.dtype) for dx, x in zip(gradients, primals, strict=True))

    return cast(drows, rows), None, cast(dE, E), None


_attention = jax.custom_vjp(_attention_alone, nondiff_argnums=(0, 1))
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
