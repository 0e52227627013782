"""Attention mechanisms as Flax modules: one class a mechanism, one signature, one registry.

Shapes: B batch, N tokens, D model width, H heads, K key/value heads, d head width, P pseudo-heads.
A mechanism projects, calls one pure function of `iha_jax.ops`, and projects back. It knows no mesh and no cache.
"""

import jax.numpy as jnp
from flax import nnx

from iha_jax.array_types import Array, Float, Int
from iha_jax.config import ModelConfig
from iha_jax.model.init import initial_value
from iha_jax.model.layers import RMSNorm
from iha_jax.ops import apply_rope, dot_product_attention, interleaved_head_attention


class MultiHeadAttention(nnx.Module):
    """Causal multi-head attention with RoPE: `concat_h softmax(rope(x W_Q) rope(x W_K)^T / sqrt(d)) (x W_V) W_O`.

    Kind `mha` sees the whole context, `mha_local` a sliding window of `config.window` tokens. With K < H, query head h
    reads key/value head `h // (H // K)`. Segments, where given, see only themselves; segment 0 is padding.
    """

    def __init__(self, config: ModelConfig, kind: str, *, rngs: nnx.Rngs):
        D, H, K, d = config.width, config.num_heads, config.num_kv_heads, config.head_width
        self.config = config
        self.window = config.window if kind == "mha_local" else None
        self.query = nnx.Param(initial_value("attention/query", (D, H, d), config, rngs))
        self.key = nnx.Param(initial_value("attention/key", (D, K, d), config, rngs))
        self.value = nnx.Param(initial_value("attention/value", (D, K, d), config, rngs))
        self.output = nnx.Param(initial_value("attention/output", (H, d, D), config, rngs))
        if config.qk_norm:
            self.query_norm = RMSNorm("attention/query_norm", d, config, rngs=rngs)
            self.key_norm = RMSNorm("attention/key_norm", d, config, rngs=rngs)

    def project(self, x_BND: Array) -> tuple[Array, Array, Array]:
        """Queries [B, N, H, d], keys and values [B, N, K, d]: normalized if asked, neither mixed nor rotated."""
        q_BNHd = jnp.einsum("bnD,Dhd->bnhd", x_BND, self.query[...].astype(x_BND.dtype))
        k_BNKd = jnp.einsum("bnD,Dkd->bnkd", x_BND, self.key[...].astype(x_BND.dtype))
        v_BNKd = jnp.einsum("bnD,Dkd->bnkd", x_BND, self.value[...].astype(x_BND.dtype))
        if self.config.qk_norm:
            q_BNHd, k_BNKd = self.query_norm(q_BNHd), self.key_norm(k_BNKd)
        return q_BNHd, k_BNKd, v_BNKd

    def attend(self, q_BNHd: Array, k_BNKd: Array, v_BNKd: Array, segment_ids_BN: Array | None) -> Array:
        theta = self.config.rope_theta
        return dot_product_attention(
            apply_rope(q_BNHd, theta=theta),
            apply_rope(k_BNKd, theta=theta),
            v_BNKd,
            window=self.window,
            segment_ids=segment_ids_BN,
            implementation=self.config.implementation,
        )

    def __call__(
        self, x_BND: Float[Array, "B N D"], segment_ids_BN: Int[Array, "B N"] | None = None
    ) -> Float[Array, "B N D"]:
        out_BNHd = self.attend(*self.project(x_BND), segment_ids_BN)
        return jnp.einsum("bnhd,hdD->bnD", out_BNHd, self.output[...].astype(x_BND.dtype))


class InterleavedHeadAttention(MultiHeadAttention):
    """Interleaved Head Attention (arXiv 2602.21371, section 4): MHA whose heads first become P pseudo-heads each.

        q~[n, h, p] = sum_m alpha_query[m, h, p] q[n, m]     (likewise k~ and v~)
        o = softmax attention, head by head, over the N*P virtual tokens (n, p) at position n*P + p
        out[n, g] = sum_{h, p} collapse[g, h, p] o[n, h, p]  ("per_head": sum_p collapse[g, p] o[n, g, p])

    Kind `iha` sees the whole context, `iha_local` a sliding window of `config.iha.window` tokens. Adds `4 H^2 P`
    parameters to MHA's (global collapse, K = H).
    """

    def __init__(self, config: ModelConfig, kind: str, *, rngs: nnx.Rngs):
        super().__init__(config, kind, rngs=rngs)
        H, K, P = config.num_heads, config.num_kv_heads, config.iha.pseudo_heads
        self.window = config.iha.window if kind == "iha_local" else None
        self.alpha_query = nnx.Param(initial_value("attention/alpha_query", (H, H, P), config, rngs))
        self.alpha_key = nnx.Param(initial_value("attention/alpha_key", (K, H, P), config, rngs))
        self.alpha_value = nnx.Param(initial_value("attention/alpha_value", (K, H, P), config, rngs))
        collapse_shape = (H, H, P) if config.iha.collapse == "global" else (H, P)
        self.collapse = nnx.Param(initial_value("attention/collapse", collapse_shape, config, rngs))

    def attend(self, q_BNHd: Array, k_BNKd: Array, v_BNKd: Array, segment_ids_BN: Array | None) -> Array:
        iha, dtype = self.config.iha, q_BNHd.dtype
        mixing = (self.alpha_query, self.alpha_key, self.alpha_value, self.collapse)
        return interleaved_head_attention(
            q_BNHd,
            k_BNKd,
            v_BNKd,
            *(weight[...].astype(dtype) for weight in mixing),
            causality=iha.causality,
            window=self.window,
            rope_theta=None if iha.rope_positions == "none" else self.config.rope_theta,
            rope_positions="token" if iha.rope_positions == "none" else iha.rope_positions,
            segment_ids=segment_ids_BN,
            implementation=iha.implementation,
        )


ATTENTION = {
    "mha": MultiHeadAttention,
    "mha_local": MultiHeadAttention,
    "iha": InterleavedHeadAttention,
    "iha_local": InterleavedHeadAttention,
}
