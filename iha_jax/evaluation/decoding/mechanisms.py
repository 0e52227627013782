"""What each attention mechanism keeps of the tokens it has seen, and how one more token attends to it.

A class a mechanism, one signature, one registry with the keys of `ATTENTION`. The layer with its parameters is the
training model's own: it projects, mixes, norms and projects back; only attention to a cache is here.
Shapes: B batch, N tokens of padded prompts, D model width, H heads, K key/value heads, G = H / K, d head width,
S slots, P pseudo-heads (p of the query, q of the key).
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from iha_jax.array_types import Array, Float, Int
from iha_jax.config import ModelConfig
from iha_jax.evaluation.decoding.slots import ages, fill, write
from iha_jax.ops import tokens_in_reach
from iha_jax.ops.query_blocks import visible_softmax
from iha_jax.ops.rope import rotate, rotation, rotation_at, rotation_of_range, working_dtype
from iha_jax.parallel.rules import constrain

Cache = dict[str, Array]  # of one layer: name -> [B, K, S, d]


class CachedAttention:
    """Multi-head attention: keys rotated at their positions, and values. `mha_local` keeps the last W tokens."""

    def __init__(self, config: ModelConfig, kind: str):
        self.config = config
        self.window = config.window if kind == "mha_local" else None
        self.stride = None if config.positions == "none" else 1  # of RoPE positions, a token; None: no RoPE

    def slots(self, length: int) -> dict[str, int]:
        """Slots of each cached array where no position is beyond `length`."""
        slots = length if self.window is None else min(self.window, length)
        return {"key": slots, "value": slots}

    def prefill(self, attention: Any, x_BND: Float[Array, "B N D"], lengths_B: Int[Array, "B"], length: int) -> Cache:
        """The cache after prompts of `lengths_B` tokens; `x_BND` is what the attention layer is given."""
        _, k_BNKd, v_BNKd = attention.project(x_BND)
        if self.stride is not None:
            cos, sin = rotation_of_range(x_BND.shape[1], self.stride, *self._angles(k_BNKd))
            k_BNKd = rotate(k_BNKd, cos[None, :, None], sin[None, :, None])
        return self._filled({"key": k_BNKd, "value": v_BNKd}, lengths_B, length)

    def step(
        self, attention: Any, x_B1D: Float[Array, "B 1 D"], cache: Cache, positions_B: Int[Array, "B"], layer: int
    ) -> tuple[Float[Array, "B 1 D"], Cache]:
        """The layer's output for one token a row, at `positions_B`, and the cache with it."""
        q_BHd, k_BKd, v_BKd = (x[:, 0] for x in attention.project(x_B1D))
        q_BHd, k_BKd = self._rotate(q_BHd, positions_B), self._rotate(k_BKd, positions_B)
        cache = self._written(cache, {"key": k_BKd, "value": v_BKd}, positions_B)
        return self._attend(attention, q_BHd, cache, positions_B, layer), cache

    def _attend(self, attention: Any, q_BHd: Array, cache: Cache, positions_B: Array, layer: int) -> Array:
        logits_BKGS = self._logits(q_BHd, cache["key"])
        weights = visible_softmax(logits_BKGS, self._visible(cache["key"], positions_B))
        return attention.project_back(self._average(weights, cache["value"]).reshape(q_BHd[:, None].shape))

    def _logits(self, q_BHd: Array, k_BKSd: Array) -> Array:
        """[B, K, G, S], in the type that softmax is computed in."""
        B, K, _, d = k_BKSd.shape
        q_BKGd = (q_BHd / math.sqrt(d)).reshape(B, K, -1, d)
        return jnp.einsum("bkgd,bksd->bkgs", q_BKGd, k_BKSd, preferred_element_type=working_dtype(q_BHd))

    def _average(self, weights_BKGS: Array, v_BKSe: Array) -> Array:
        """[B, K, G, e], in the type of the values."""
        return jnp.einsum("bkgs,bkse->bkge", weights_BKGS.astype(v_BKSe.dtype), v_BKSe)

    def _visible(self, cached: Array, positions_B: Array) -> Array:
        """[B, 1, 1, S]: a ring holds no token that is out of reach, so what is there is visible."""
        return ages(positions_B, cached.shape[2])[1][:, None, None]

    def _rotate(self, x_BSd: Array, positions_B: Array) -> Array:
        if self.stride is None:
            return x_BSd
        cos, sin = rotation_at(positions_B, self.config.context_length, self.stride, *self._angles(x_BSd))
        return rotate(x_BSd, cos[:, None], sin[:, None])

    def _angles(self, x: Array) -> tuple[int, float, Any]:
        return self.config.head_width, self.config.rope_theta, working_dtype(x)

    def _filled(self, arrays: dict[str, Array], lengths_B: Array, length: int) -> Cache:
        slots = self.slots(length)
        return {name: constrain(fill(x, lengths_B, slots[name]), "B K s d") for name, x in arrays.items()}

    def _written(self, cache: Cache, arrays: dict[str, Array], positions_B: Array) -> Cache:
        return {name: constrain(write(cache[name], x, positions_B), "B K s d") for name, x in arrays.items()}


class CachedTalkingHeads(CachedAttention):
    """As MHA; logits of all heads are mixed before the softmax, weights after it."""

    def _attend(self, attention: Any, q_BHd: Array, cache: Cache, positions_B: Array, layer: int) -> Array:
        logits = self._logits(q_BHd, cache["key"])
        dtype, (B, K, G, S) = logits.dtype, logits.shape
        before, after = (weight.astype(dtype) for weight, _ in attention.mixing(q_BHd.dtype))
        logits_BHS = jnp.einsum("bhs,hg->bgs", logits.reshape(B, K * G, S), before)
        weights = visible_softmax(logits_BHS, self._visible(cache["key"], positions_B)[:, 0])
        weights = jnp.einsum("bgs,gf->bfs", weights, after).reshape(logits.shape)
        return attention.project_back(self._average(weights, cache["value"]).reshape(q_BHd[:, None].shape))


class CachedDifferential(CachedAttention):
    """As MHA; query and key heads 2h and 2h + 1 are the two groups of head h, pairs of value heads its values."""

    def _attend(self, attention: Any, q_BHd: Array, cache: Cache, positions_B: Array, layer: int) -> Array:
        k, v = cache["key"], cache["value"]
        (B, H, d), (K, S) = q_BHd.shape, k.shape[1:3]
        lambda_init, lambda_ = attention.lambdas(layer)
        by_key = jnp.swapaxes(q_BHd.reshape(B, K // 2, H // K, 2, d), 2, 3).reshape(B, H, d)
        weights = visible_softmax(self._logits(by_key, k), self._visible(k, positions_B))
        weights = weights.reshape(B, K // 2, 2, H // K, S)
        weights = weights[:, :, 0] - lambda_ * weights[:, :, 1]
        out = jnp.einsum("bkgs,bkisd->bkgid", weights.astype(v.dtype), v.reshape(B, K // 2, 2, S, d))
        out = attention.normalize(out.reshape(B, 1, H // 2, 2 * d), lambda_init)
        return attention.project_back(out.reshape(B, 1, H, d))


class CachedSimplicial(CachedAttention):
    """Keys and values of both sets, unrotated; `simplicial_local` keeps as many tokens of each as its window has."""

    def __init__(self, config: ModelConfig, kind: str):
        super().__init__(config, kind)
        local = config.simplicial.window, config.simplicial.second_window
        self.windows = local if kind == "simplicial_local" else None

    def slots(self, length: int) -> dict[str, int]:
        first, second = (length, length) if self.windows is None else (min(w, length) for w in self.windows)
        return {"key": first, "value": first, "second_key": second, "second_value": second}

    def prefill(self, attention: Any, x_BND: Float[Array, "B N D"], lengths_B: Int[Array, "B"], length: int) -> Cache:
        arrays = (*attention.project(x_BND)[1:], *attention.project_second(x_BND))
        return self._filled(dict(zip(self.slots(length), arrays, strict=True)), lengths_B, length)

    def step(
        self, attention: Any, x_B1D: Float[Array, "B 1 D"], cache: Cache, positions_B: Int[Array, "B"], layer: int
    ) -> tuple[Float[Array, "B 1 D"], Cache]:
        q_BHd, *new = (x[:, 0] for x in (*attention.project(x_B1D), *attention.project_second(x_B1D)))
        cache = self._written(cache, dict(zip(self.slots(1), new, strict=True)), positions_B)
        k, v, k2, v2 = (cache[name] for name in self.slots(1))
        (B, K, _, d), dtype = k.shape, working_dtype(q_BHd)
        q_BKGd = (q_BHd / math.sqrt(d)).reshape(B, K, -1, d)
        logits = jnp.einsum("bkgrd,bksd->bkgrs", q_BKGd[..., None, :] * k2[:, :, None], k, preferred_element_type=dtype)
        seen, seen2 = (self._visible(x, positions_B) for x in (k, k2))  # [B, 1, 1, S], [B, 1, 1, R]
        weights = visible_softmax(logits, seen[..., None, :] & seen2[..., None], axis=(-2, -1)).astype(v.dtype)
        values = jnp.einsum("bkgrs,bksd->bkgrd", weights, v, preferred_element_type=dtype)
        out = jnp.sum(values * v2[:, :, None], axis=-2).astype(q_BHd.dtype)
        return attention.project_back(out.reshape(B, 1, -1, d)), cache


class CachedInterleaved(CachedAttention):
    """IHA: keys unmixed, rotated by the token's part n*P of their virtual positions, and unmixed values.

    RoPE commutes with mixing, so one cached key makes all its pseudo-keys, and the cache is no larger than MHA's. The
    rest of the rotation is the queries': `<rope(p) q~, rope(q) k~> = <rope(p - q) q~, k~>`. Values are never mixed:
    weights w[h, p, q, s] are collapsed and mixed instead,

        out[g] = sum_{m, s} (sum_{h, q} alpha_value[m, h, q] sum_p collapse[g, h, p] w[h, p, q, s]) value[m, s]

    work that does not grow with d. `iha_local` keeps `tokens_in_reach` tokens and the query's own.
    """

    def __init__(self, config: ModelConfig, kind: str):
        super().__init__(config, kind)
        iha = config.iha
        self.window = iha.window if kind == "iha_local" else None
        self.virtual = config.positions != "none" and iha.rope_positions == "virtual"
        if config.positions == "none" or iha.rope_positions == "none":
            self.stride = None
        elif self.virtual:
            self.stride = iha.pseudo_heads

    def slots(self, length: int) -> dict[str, int]:
        iha, slots = self.config.iha, length
        if self.window is not None:
            slots = min(tokens_in_reach(self.window, iha.pseudo_heads, iha.causality) + 1, length)
        return {"key": slots, "value": slots}

    def _attend(self, attention: Any, q_BHd: Array, cache: Cache, positions_B: Array, layer: int) -> Array:
        alpha_q, alpha_k, alpha_v, R = (weight for weight, _ in attention.mixing(q_BHd.dtype))
        k_BKSd, v_BKSd, dtype = cache["key"], cache["value"], working_dtype(q_BHd)
        (B, K, S, d), (_, H, P) = k_BKSd.shape, alpha_k.shape
        q_BHPd = jnp.einsum("bmd,mhp->bhpd", q_BHd / math.sqrt(d), alpha_q)
        mixed = _multiply_heads(alpha_k.reshape(K, H * P).T, k_BKSd.reshape(B, K, S * d)).reshape(B, H, P, S, d)
        logits_BHqSp = jnp.einsum("bhqsd,bhqpd->bhqsp", mixed, self._turned(q_BHPd), preferred_element_type=dtype)
        weights = visible_softmax(logits_BHqSp, self._visible_virtual(k_BKSd, positions_B), axis=(2, 3))
        if R.ndim == 3:
            weights = jnp.einsum("bhxp,ghp->bhxg", weights.reshape(B, H, P * S, P), R.astype(dtype))
            weights = _multiply_heads(alpha_v.reshape(K, H * P).astype(dtype), weights.reshape(B, H * P, -1))
            weights = weights.reshape(B, K * S, -1).astype(v_BKSd.dtype)  # [B, (m, s), g]
            out_BHd = jnp.einsum("bxg,bxd->bgd", weights, v_BKSd.reshape(B, K * S, d))
        else:
            weights = jnp.einsum("bhqsp,hp,mhq->bmsh", weights, R.astype(dtype), alpha_v.astype(dtype))
            weights = weights.reshape(B, K * S, -1).astype(v_BKSd.dtype)
            out_BHd = jnp.einsum("bxh,bxd->bhd", weights, v_BKSd.reshape(B, K * S, d))
        return attention.project_back(out_BHd[:, None])

    def _turned(self, q_BHPd: Array) -> Array:
        """[B, H, q, p, d]: pseudo-query p as pseudo-key q, itself not rotated by q, has to see it."""
        B, H, P, d = q_BHPd.shape
        q_BHqpd = jnp.broadcast_to(q_BHPd[:, :, None], (B, H, P, P, d))
        if not self.virtual:
            return q_BHqpd
        difference = np.arange(P) - np.arange(P)[:, None]
        cos, sin = (x.reshape(P, P, -1) for x in rotation(difference.reshape(-1), *self._angles(q_BHPd)))
        return rotate(q_BHqpd, cos, sin)

    def _visible_virtual(self, cached: Array, positions_B: Array) -> Array:
        """[B, 1, q, S, p]."""
        iha, (age_BS, there_BS) = self.config.iha, ages(positions_B, cached.shape[2])
        age, there, P = age_BS[:, None, None, :, None], there_BS[:, None, None, :, None], iha.pseudo_heads
        if iha.causality == "token":
            return there if self.window is None else there & (age < self.window)
        distance = age * P + (np.arange(P) - np.arange(P)[:, None])[:, None]
        seen = there & (distance >= 0)
        return seen if self.window is None else seen & (distance < self.window * P)


def _multiply_heads(weights_zS: Array, x_BSx: Array) -> Array:
    """[B, z, x]: batched over B, which needs no transposed copies."""
    return jnp.matmul(jnp.broadcast_to(weights_zS, (x_BSx.shape[0], *weights_zS.shape)), x_BSx)


DECODING: dict[str, type[CachedAttention]] = {
    "mha": CachedAttention,
    "mha_local": CachedAttention,
    "iha": CachedInterleaved,
    "iha_local": CachedInterleaved,
    "talking_heads": CachedTalkingHeads,
    "differential": CachedDifferential,
    "simplicial": CachedSimplicial,
    "simplicial_local": CachedSimplicial,
    "fused_mixing": CachedAttention,  # its layer mixes where it projects
}
