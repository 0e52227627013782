"""Interleaved Head Attention (IHA), arXiv 2602.21371, section 4: mix heads, interleave, attend once, collapse.

    q~[n, h, p] = sum_m alpha_q[m, h, p] q[n, m]            mix: H pseudo-queries of each of P kinds; k~, v~ likewise
    (n, p) -> virtual position n*P + p                      interleave: N*P virtual tokens a head
    o = softmax(rope(q~) rope(k~)^T / sqrt(d)) v~           one ordinary attention a head, causal and windowed
    out[n, g] = sum_{h, p} collapse[g, h, p] o[n, h, p]     collapse: back to H heads

Shapes: B batch, N tokens, H heads, K key/value heads, P pseudo-heads, d head width, e value width.
"""

from collections.abc import Callable

import jax.numpy as jnp

from iha_jax.array_types import Array, Float, Int
from iha_jax.ops import reference
from iha_jax.ops.arguments import (
    check_attention,
    check_heads,
    check_mixing,
    check_pseudo_heads,
    check_virtual_sequence,
)
from iha_jax.ops.implementations import Features, current_platform, resolve_implementation
from iha_jax.ops.streaming import streaming_interleaved_attention


def resolve_interleaved_implementation(name: str, features: Features) -> str:
    """What `implementation=name` of `interleaved_head_attention` runs for a call with these features.

    Raises:
      ValueError: for a name that does not exist or cannot run such a call here.
    """
    return resolve_implementation("interleaved_head_attention", name, features)


def mix_heads(x: Float[Array, "B N S d"], alpha: Float[Array, "S H P"]) -> Float[Array, "B N H P d"]:
    """`out[n, h, p] = sum_m alpha[m, h, p] x[n, m]`: the pseudo-heads of each head (section 4, step 2).

    Raises:
      ValueError: at trace time, naming the argument, what was got and what was expected; so do the two below.
    """
    check_heads("x", x)
    if alpha.ndim != 3 or alpha.shape[0] != x.shape[2] or 0 in alpha.shape:
        raise ValueError(
            f"alpha has shape {alpha.shape}; expected [{x.shape[2]}, H, P]: source head, head, pseudo-head"
        )
    if alpha.dtype != x.dtype:
        raise ValueError(f"alpha has dtype {alpha.dtype}; expected {x.dtype} as x has; cast one of them")
    return jnp.einsum("bnmd,mhp->bnhpd", x, alpha)


def interleave(x: Float[Array, "B N H P d"]) -> Float[Array, "B N*P H d"]:
    """Token n, pseudo-head p to virtual token `n*P + p` (section 4, step 3)."""
    check_pseudo_heads("x", x)
    B, N, H, P, d = x.shape
    return jnp.swapaxes(x, 2, 3).reshape(B, N * P, H, d)


def collapse_heads(
    x: Float[Array, "B N H P d"], collapse: Float[Array, "H H P"] | Float[Array, "H P"]
) -> Float[Array, "B N H d"]:
    """`out[n, g] = sum_{h,p} R[g, h, p] x[n, h, p]` (global), or `out[n, h] = sum_p R[h, p] x[n, h, p]` (per head)."""
    check_pseudo_heads("x", x)
    H, P = x.shape[2:4]
    if collapse.shape[-2:] != (H, P) or collapse.ndim not in (2, 3):
        raise ValueError(f"collapse has shape {collapse.shape}; expected [G, {H}, {P}] (global) or {(H, P)} (per head)")
    if collapse.dtype != x.dtype:
        raise ValueError(f"collapse has dtype {collapse.dtype}; expected {x.dtype} as x has; cast one of them")
    if collapse.ndim == 3:
        return jnp.einsum("bnhpd,ghp->bngd", x, collapse)
    return jnp.einsum("bnhpd,hp->bnhd", x, collapse)


def interleaved_head_attention(
    q: Float[Array, "B N H d"],
    k: Float[Array, "B N K d"],
    v: Float[Array, "B N K e"],
    alpha_q: Float[Array, "H H P"],
    alpha_k: Float[Array, "K H P"],
    alpha_v: Float[Array, "K H P"],
    collapse: Float[Array, "H H P"] | Float[Array, "H P"],
    *,
    causal: bool = True,
    causality: str = "virtual",
    window: int | None = None,
    rope_theta: float | None = None,
    rope_positions: str = "virtual",
    segment_ids: Int[Array, "B N"] | None = None,
    target_heads: int | None = None,
    implementation: str = "auto",
) -> Float[Array, "B N H e"]:
    """IHA from unmixed, unrotated queries, keys and values to collapsed outputs (formula at the top of this file).

    Args:
      causality: the unit of the mask. "virtual": virtual token i sees j when `0 <= i - j < window * P`, so inside a
        token pseudo-query p sees pseudo-keys up to p. "token": token n sees all P pseudo-keys of token m when
        `0 <= n - m < window`. With `causal=False` both use the absolute difference.
      window: in tokens, the query's own included; None, or at least N: all.
      rope_theta: base of RoPE on mixed queries and keys, None for none; `rope_positions`: "virtual" (n*P + p) or
        "token" (n).
      segment_ids: integers, a token sees its own segment; 0 is padding: output and gradients exactly 0.
      target_heads: T, where a device makes the pseudo-heads of T heads only, out of all H: then `alpha_q` is [H, T, P],
        `alpha_k, alpha_v` are [K, T, P], and `collapse` [H, T, P] gives the part [B, N, H, e] of the sum that these T
        heads contribute, [T, P] their outputs [B, N, T, e]. None: T = H.
      implementation: "reference" (loops, for tests), "streaming" (XLA on any device; holds the pseudo-tokens of one
        chunk and its window at a time, the backward pass recomputes them), "fused" (one Pallas kernel, TPUs and GPUs;
        not yet run on hardware), or "auto", which takes what `implementations.TABLE` says.

    Scores and softmax are computed in float32 (float64 for float64 inputs); the result has the dtype of `q`.

    Raises:
      ValueError: at trace time, naming the argument, what was got and what was expected.
    """
    check_attention(q, k, v, window, segment_ids)
    alphas = {"alpha_q": alpha_q, "alpha_k": alpha_k, "alpha_v": alpha_v}
    check_mixing(q, k, alphas, collapse, q.shape[2] if target_heads is None else target_heads)
    check_virtual_sequence(causality, rope_theta, rope_positions, q.shape[-1])
    features = Features.of(q, v, causal=causal, window=window, segment_ids=segment_ids)
    chosen = resolve_interleaved_implementation(implementation, features)
    return _attend(chosen)(
        q,
        k,
        v,
        (alpha_q, alpha_k, alpha_v, collapse),
        causal=causal,
        causality=causality,
        window=features.window,
        rope_theta=rope_theta,
        rope_positions=rope_positions,
        segment_ids=segment_ids,
    )


def _attend(implementation: str) -> Callable[..., Array]:
    if implementation == "reference":
        return reference.interleaved_head_attention
    if implementation == "streaming":
        return streaming_interleaved_attention
    # "fused", imported here: Pallas takes a second, and each kernel is for one platform.
    if current_platform() == "tpu":
        from iha_jax.ops.pallas.interleaved_tpu import fused_interleaved_attention
    else:
        from iha_jax.ops.pallas.interleaved_gpu import fused_interleaved_attention
    return fused_interleaved_attention
