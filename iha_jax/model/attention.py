"""Attention mechanisms as Flax modules: one class a mechanism, one signature, one registry.

Shapes: B batch, N tokens, D model width, H heads, K key/value heads, d head width, P pseudo-heads.
A mechanism projects, calls one pure function of `iha_jax.ops`, and projects back. It knows no mesh and no cache.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from iha_jax.array_types import Array, Float, Int
from iha_jax.config import ModelConfig
from iha_jax.model.init import initial_value
from iha_jax.model.layers import RMSNorm, weight_product
from iha_jax.ops import (
    Features,
    apply_rope,
    differential_attention,
    dot_product_attention,
    fuse_mixing,
    interleaved_head_attention,
    resolve_attention_implementation,
    resolve_blocked_implementation,
    resolve_interleaved_implementation,
    simplicial_attention,
    talking_heads_attention,
    tokens_in_reach,
)
from iha_jax.parallel.attention import (
    Exchange,
    gather_heads,
    halo,
    heads_split,
    on_each_device,
    share_heads,
    sum_and_scatter_heads,
    swap_heads,
    swap_tokens,
)


class MultiHeadAttention(nnx.Module):
    """Multi-head attention with RoPE: `concat_h softmax(rope(x W_Q) rope(x W_K)^T / sqrt(d)) (x W_V) W_O`.

    Kind `mha` sees the whole context, `mha_local` a sliding window of `config.window` tokens. With K < H, query head h
    reads key/value head `h // (H // K)`. Segments, where given, see only themselves; segment 0 is padding. Causal, or
    both ways with `config.causal=False`. `config.positions="none"` leaves out RoPE.
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
        q_BNHd = weight_product("bnD,Dhd->bnhd", x_BND, self.query[...])
        k_BNKd = weight_product("bnD,Dkd->bnkd", x_BND, self.key[...])
        v_BNKd = weight_product("bnD,Dkd->bnkd", x_BND, self.value[...])
        if self.config.qk_norm:
            q_BNHd, k_BNKd = self.query_norm(q_BNHd), self.key_norm(k_BNKd)
        return q_BNHd, k_BNKd, v_BNKd

    def rotate(self, q_BNHd: Array, k_BNKd: Array) -> tuple[Array, Array]:
        if self.config.positions == "none":
            return q_BNHd, k_BNKd
        theta = self.config.rope_theta
        return apply_rope(q_BNHd, theta=theta), apply_rope(k_BNKd, theta=theta)

    def attend(
        self, q_BNHd: Array, k_BNKd: Array, v_BNKd: Array, segment_ids_BN: Array | None, *mixing: Array
    ) -> Array:
        """Attention of the heads and tokens it is given, which on a mesh are one device's."""
        return dot_product_attention(
            *self.rotate(q_BNHd, k_BNKd),
            v_BNKd,
            causal=self.config.causal,
            window=self.window,
            segment_ids=segment_ids_BN,
            implementation=self.config.implementation,
        )

    def __call__(
        self, x_BND: Float[Array, "B N D"], segment_ids_BN: Int[Array, "B N"] | None, layer: Array | int
    ) -> Float[Array, "B N D"]:
        """`layer`: the number of this layer in the model, from 1; an array where layers are scanned."""
        q_BNHd, k_BNKd, v_BNKd = self.project(x_BND)
        arguments = [(q_BNHd, "B N H d"), (k_BNKd, "B N K d"), (v_BNKd, "B N K d"), (segment_ids_BN, "B N")]
        arguments += self.mixing(x_BND.dtype)
        return self.project_back(on_each_device(self.attend, arguments, "B N H d", self.exchange()))

    def exchange(self) -> Exchange:
        """What devices give each other where tokens are split over them."""
        return swap_heads if self.window is None else halo(self.window - 1, causal=self.config.causal)

    def mixing(self, dtype: jnp.dtype) -> list[tuple[Array, str]]:
        """Weights that `attend` takes after the segments, with their dimensions."""
        return []

    def project_back(self, out_BNHd: Array) -> Array:
        return weight_product("bnhd,hdD->bnD", out_BNHd, self.output[...])

    @staticmethod
    def kernel(config: ModelConfig, features: Features) -> str:
        """The implementation that layers of this class use here ("auto" resolved)."""
        return resolve_attention_implementation(config.implementation, features)


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

    def mixing(self, dtype: jnp.dtype) -> list[tuple[Array, str]]:
        """In a global layer each device has the pseudo-heads of its own heads H, and so those slices of the mixing
        weights; in a local one the pseudo-heads of all heads, of its own tokens."""
        weights = (self.alpha_query, self.alpha_key, self.alpha_value, self.collapse)
        own = "H" if self.window is None else "h"
        of_sources = f"s {own} p"
        of_outputs = f"g {own} p" if self.config.iha.collapse == "global" else f"{own} p"
        dimensions = (of_sources, of_sources, of_sources, of_outputs)
        return [(weight[...].astype(dtype), names) for weight, names in zip(weights, dimensions, strict=True)]

    def attend(
        self, q_BNHd: Array, k_BNKd: Array, v_BNKd: Array, segment_ids_BN: Array | None, *mixing: Array
    ) -> Array:
        iha = self.config.iha
        positions = "none" if self.config.positions == "none" else iha.rope_positions
        if gathers := heads_split() and self.window is None:
            q_BNHd, k_BNKd, v_BNKd = (gather_heads(x) for x in (q_BNHd, k_BNKd, v_BNKd))
        out_BNHd = interleaved_head_attention(
            q_BNHd,
            k_BNKd,
            v_BNKd,
            *mixing,
            causal=self.config.causal,
            causality=iha.causality,
            window=self.window,
            rope_theta=None if positions == "none" else self.config.rope_theta,
            rope_positions="token" if positions == "none" else positions,
            segment_ids=segment_ids_BN,
            target_heads=mixing[0].shape[1],
            implementation=iha.implementation,
        )
        return sum_and_scatter_heads(out_BNHd) if gathers and iha.collapse == "global" else out_BNHd

    def exchange(self) -> Exchange:
        iha = self.config.iha
        if self.window is None:
            return share_heads(summed=iha.collapse == "global")
        return swap_tokens(tokens_in_reach(self.window, iha.pseudo_heads, iha.causality), causal=self.config.causal)

    @staticmethod
    def kernel(config: ModelConfig, features: Features) -> str:
        return resolve_interleaved_implementation(config.iha.implementation, features)


class TalkingHeadsAttention(MultiHeadAttention):
    """Talking heads (Shazeer et al. 2020): MHA whose heads mix logits before the softmax and weights after it.

        L[g] = sum_h logits_mix[h, g] q[h] k[h]^T / sqrt(d);  out[f] = sum_g weights_mix[g, f] softmax(L[g]) v[f]

    Kind `talking_heads`. Adds `2 H^2` parameters to MHA's.
    """

    def __init__(self, config: ModelConfig, kind: str, *, rngs: nnx.Rngs):
        super().__init__(config, kind, rngs=rngs)
        H = config.num_heads
        self.logits_mix = nnx.Param(initial_value("attention/logits_mix", (H, H), config, rngs))
        self.weights_mix = nnx.Param(initial_value("attention/weights_mix", (H, H), config, rngs))

    def mixing(self, dtype: jnp.dtype) -> list[tuple[Array, str]]:
        return [(self.logits_mix[...].astype(dtype), "h h"), (self.weights_mix[...].astype(dtype), "h h")]

    def attend(
        self, q_BNHd: Array, k_BNKd: Array, v_BNKd: Array, segment_ids_BN: Array | None, *mixing: Array
    ) -> Array:
        return talking_heads_attention(
            *self.rotate(q_BNHd, k_BNKd),
            v_BNKd,
            *mixing,
            causal=self.config.causal,
            segment_ids=segment_ids_BN,
            implementation=_blocked(self.config),
        )

    @staticmethod
    def kernel(config: ModelConfig, features: Features) -> str:
        """All logits are needed, so no kernel of dot-product attention fits: block-wise, unless the reference."""
        return resolve_blocked_implementation(_blocked(config), features)


class DifferentialAttention(MultiHeadAttention):
    """Diff Transformer V1 (Ye et al. 2024): H/2 heads, each one softmax less lambda times another, values of 2d.

        A[h] = softmax(q1[h] k1[h]^T / sqrt(d)) - lambda softmax(q2[h] k2[h]^T / sqrt(d))
        out[h] = (1 - lambda_init) RMSNorm(A[h] v[h])
        lambda = exp(lambda_query_1 . lambda_key_1) - exp(lambda_query_2 . lambda_key_2) + lambda_init
        lambda_init = 0.8 - 0.6 exp(-0.3 (layer - 1)), layers counted from 1

    The projections are MHA's: its query heads 2h and 2h + 1 are q1[h] and q2[h], its key heads likewise, and pairs of
    its value heads are the values. The norm (epsilon 1e-5) has one scale of width 2d for all heads. Kind
    `differential`. Adds `6 d` parameters to MHA's.
    """

    def __init__(self, config: ModelConfig, kind: str, *, rngs: nnx.Rngs):
        super().__init__(config, kind, rngs=rngs)
        d = config.head_width
        self.lambda_query_1 = nnx.Param(initial_value("attention/lambda_query_1", (d,), config, rngs))
        self.lambda_key_1 = nnx.Param(initial_value("attention/lambda_key_1", (d,), config, rngs))
        self.lambda_query_2 = nnx.Param(initial_value("attention/lambda_query_2", (d,), config, rngs))
        self.lambda_key_2 = nnx.Param(initial_value("attention/lambda_key_2", (d,), config, rngs))
        self.head_norm = RMSNorm("attention/head_norm", 2 * d, config, epsilon=1e-5, rngs=rngs)

    def __call__(
        self, x_BND: Float[Array, "B N D"], segment_ids_BN: Int[Array, "B N"] | None, layer: Array | int
    ) -> Float[Array, "B N D"]:
        q_BNHd, k_BNKd, v_BNKd = self.project(x_BND)
        lambda_init, lambda_ = self.lambdas(layer)
        B, N, _, d = q_BNHd.shape
        q, k, v = (x.reshape(B, N, -1, 2 * d) for x in (q_BNHd, k_BNKd, v_BNKd))  # pairs of heads stay together
        arguments = [(q, "B N H d"), (k, "B N K d"), (v, "B N K d"), (segment_ids_BN, "B N")]
        arguments += [(lambda_, "")]
        out_BNhe = on_each_device(self.attend, arguments, "B N H e", self.exchange())
        return self.project_back(self.normalize(out_BNhe, lambda_init).reshape(q_BNHd.shape))

    def lambdas(self, layer: Array | int) -> tuple[Array, Array]:
        """lambda_init and lambda of a layer, float32 scalars."""
        lambda_init = 0.8 - 0.6 * jnp.exp(-0.3 * (jnp.asarray(layer, jnp.float32) - 1))
        first = jnp.exp(jnp.sum(self.lambda_query_1[...] * self.lambda_key_1[...]))
        second = jnp.exp(jnp.sum(self.lambda_query_2[...] * self.lambda_key_2[...]))
        return lambda_init, first - second + lambda_init

    def normalize(self, out_BNhe: Array, lambda_init: Array) -> Array:
        return self.head_norm(out_BNhe) * (1 - lambda_init).astype(out_BNhe.dtype)

    def attend(
        self, q_BNHd: Array, k_BNKd: Array, v_BNKd: Array, segment_ids_BN: Array | None, *mixing: Array
    ) -> Array:
        """Queries, keys and values as pairs of heads: [B, N, H/2 or K/2, 2 d]."""
        q_BNHd, k_BNKd = (x.reshape(*x.shape[:2], -1, self.config.head_width) for x in (q_BNHd, k_BNKd))
        return differential_attention(
            *self.rotate(q_BNHd, k_BNKd),
            v_BNKd,
            *mixing,
            causal=self.config.causal,
            segment_ids=segment_ids_BN,
            implementation=self.config.implementation,
        )

    @staticmethod
    def kernel(config: ModelConfig, features: Features) -> str:
        wide = dataclasses.replace(features, value_width=2 * config.head_width)
        return resolve_attention_implementation(config.implementation, wide)


class SimplicialAttention(MultiHeadAttention):
    """2-simplicial attention (Clift et al. 2019; Roy et al. 2025): a query attends to pairs of tokens.

        logit[i, j, k] = sum_d q[i] k[j] k2[k] / sqrt(d);  out[i] = sum_{j, k} softmax_{j, k}(logit[i]) (v[j] * v2[k])

    without RoPE, under which the trilinear form is not invariant. Kind `simplicial` sees all pairs (short sequences),
    `simplicial_local` those of `config.simplicial.window` by `config.simplicial.second_window` tokens. Adds
    `2 D K d` parameters to MHA's.
    """

    def __init__(self, config: ModelConfig, kind: str, *, rngs: nnx.Rngs):
        super().__init__(config, kind, rngs=rngs)
        D, K, d = config.width, config.num_kv_heads, config.head_width
        local = config.simplicial.window, config.simplicial.second_window
        self.windows = local if kind == "simplicial_local" else None
        self.second_key = nnx.Param(initial_value("attention/second_key", (D, K, d), config, rngs))
        self.second_value = nnx.Param(initial_value("attention/second_value", (D, K, d), config, rngs))
        if config.qk_norm:
            self.second_key_norm = RMSNorm("attention/second_key_norm", d, config, rngs=rngs)

    def project_second(self, x_BND: Array) -> tuple[Array, Array]:
        """The second keys and values [B, N, K, d]; the keys normalized if asked."""
        k2_BNKd = weight_product("bnD,Dkd->bnkd", x_BND, self.second_key[...])
        v2_BNKd = weight_product("bnD,Dkd->bnkd", x_BND, self.second_value[...])
        return self.second_key_norm(k2_BNKd) if self.config.qk_norm else k2_BNKd, v2_BNKd

    def __call__(
        self, x_BND: Float[Array, "B N D"], segment_ids_BN: Int[Array, "B N"] | None, layer: Array | int
    ) -> Float[Array, "B N D"]:
        q_BNHd, *keys_and_values = *self.project(x_BND), *self.project_second(x_BND)
        arguments = [(q_BNHd, "B N H d"), *((x, "B N K d") for x in keys_and_values), (segment_ids_BN, "B N")]
        return self.project_back(on_each_device(self.attend_to_pairs, arguments, "B N H d", self.exchange()))

    def exchange(self) -> Exchange:
        return swap_heads if self.windows is None else halo(max(self.windows) - 1, causal=self.config.causal)

    def attend_to_pairs(
        self, q_BNHd: Array, k_BNKd: Array, v_BNKd: Array, k2_BNKd: Array, v2_BNKd: Array, segment_ids_BN: Array | None
    ) -> Array:
        return simplicial_attention(
            q_BNHd,
            k_BNKd,
            v_BNKd,
            k2_BNKd,
            v2_BNKd,
            causal=self.config.causal,
            windows=self.windows,
            segment_ids=segment_ids_BN,
            implementation=_blocked(self.config),
        )

    @staticmethod
    def kernel(config: ModelConfig, features: Features) -> str:
        return TalkingHeadsAttention.kernel(config, features)  # for the same reason


class FusedMixingAttention(MultiHeadAttention):
    """MHA whose projections' heads are mixed, `W'[:, h] = sum_m mix[m, h] W[:, m]`, each projection by its own mix.

    A reparametrization of MHA, not IHA: a control. With QK-norm, which comes before mixing, queries and keys are mixed
    after their norms, since no weight can hold that. Kind `fused_mixing`. Adds `H^2 + 2 K^2` parameters to MHA's.
    """

    def __init__(self, config: ModelConfig, kind: str, *, rngs: nnx.Rngs):
        super().__init__(config, kind, rngs=rngs)
        H, K = config.num_heads, config.num_kv_heads
        self.mix_query = nnx.Param(initial_value("attention/mix_query", (H, H), config, rngs))
        self.mix_key = nnx.Param(initial_value("attention/mix_key", (K, K), config, rngs))
        self.mix_value = nnx.Param(initial_value("attention/mix_value", (K, K), config, rngs))

    def project(self, x_BND: Array) -> tuple[Array, Array, Array]:
        dtype, mixes = x_BND.dtype, (self.mix_query, self.mix_key, self.mix_value)
        if self.config.qk_norm:
            q_BNHd, k_BNKd, v_BNKd = (
                fuse_mixing(x, mix[...].astype(dtype)) for x, mix in zip(super().project(x_BND), mixes, strict=True)
            )
            return q_BNHd, k_BNKd, v_BNKd
        weights = (self.query, self.key, self.value)
        q_BNHd, k_BNKd, v_BNKd = (
            weight_product("bnD,Dhd->bnhd", x_BND, fuse_mixing(weight[...], mix[...]))
            for weight, mix in zip(weights, mixes, strict=True)
        )
        return q_BNHd, k_BNKd, v_BNKd


def _blocked(config: ModelConfig) -> str:
    """The implementation name for mechanisms that have no other fast form than the block-wise one."""
    return "reference" if config.implementation == "reference" else "auto"


ATTENTION = {
    "mha": MultiHeadAttention,
    "mha_local": MultiHeadAttention,
    "iha": InterleavedHeadAttention,
    "iha_local": InterleavedHeadAttention,
    "talking_heads": TalkingHeadsAttention,
    "differential": DifferentialAttention,
    "simplicial": SimplicialAttention,
    "simplicial_local": SimplicialAttention,
    "fused_mixing": FusedMixingAttention,
}
