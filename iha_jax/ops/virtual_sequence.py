"""The virtual sequence of IHA without its data: who sees whom, where virtual tokens are rotated, how heads are mixed.

RoPE is linear in the head axis and additive in the position, so `rope(n*P + p) . mix = rope(p) . mix . rope(n*P)`:
queries and keys are rotated once, unmixed, by n*P, and after mixing by the fixed p. Inside a chunk virtual tokens stand
pseudo-major (p, c), which makes mixing and collapse plain matrix products over heads; only the mask needs the order.

Shapes: b batch times chunks of a step, H heads, S source heads (H or K), P pseudo-heads, C query tokens of a chunk,
M key tokens it can reach, d head width, e value width; x = P*C and y = P*M virtual tokens.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from iha_jax.array_types import Array
from iha_jax.ops.blockwise import same_segment
from iha_jax.ops.rope import rotate, rotation, rotation_of_range, working_dtype


def tokens_in_reach(window: int, P: int, causality: str) -> int:
    """Tokens before its own (and after, if not causal) of which a token sees pseudo-keys. Under virtual causality query
    (n, 0) sees pseudo-keys 1..P-1 of token n - window; for P = 1 there are none."""
    return window if causality == "virtual" and P > 1 else window - 1


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Everything about the virtual sequence but the data."""

    N: int
    P: int
    window: int | None
    causal: bool
    causality: str
    rope_theta: float | None
    rope_positions: str
    packed: bool = False  # whether there are segments

    @property
    def halo(self) -> tuple[int, int]:
        """Tokens before and after a chunk that its queries can reach."""
        assert self.window is not None
        reach = tokens_in_reach(self.window, self.P, self.causality)
        return reach, 0 if self.causal else reach

    def near(self, query_tokens: Array, key_tokens: Array) -> Array:
        """[x, y]: which pairs of virtual tokens, pseudo-major, causality and window allow."""
        unit = self.P if self.causality == "virtual" else 1

        def positions(tokens: Array) -> Array:
            offsets = jnp.arange(self.P)[:, None] if self.causality == "virtual" else jnp.zeros((self.P, 1), jnp.int32)
            return (tokens[None] * unit + offsets).reshape(-1)

        distance = positions(query_tokens)[:, None] - positions(key_tokens)[None]
        allowed = distance >= 0 if self.causal else jnp.ones_like(distance, bool)
        return allowed if self.window is None else allowed & (jnp.abs(distance) < self.window * unit)

    def rotate_tokens(self, x_BSNd: Array) -> Array:
        """RoPE by the token's part of the virtual position, before mixing."""
        if self.rope_theta is None:
            return x_BSNd
        stride = self.P if self.rope_positions == "virtual" else 1
        tables = rotation_of_range(self.N, stride, x_BSNd.shape[-1], self.rope_theta, working_dtype(x_BSNd))
        return rotate(x_BSNd, *tables)

    def mix(self, x_bSCd: Array, alpha_SHP: Array, rotated: bool = True) -> Array:
        """[b, S, C, d] to pseudo-major virtual tokens [b, H, P*C, d], with the pseudo-head's part of RoPE."""
        S, H, P = alpha_SHP.shape
        C, d = x_bSCd.shape[2:]
        mixed = _multiply_heads(alpha_SHP.reshape(S, H * P).T, x_bSCd).reshape(-1, H, P, C, d)
        if rotated and self.rope_theta is not None and self.rope_positions == "virtual":
            cos, sin = rotation(np.arange(P), d, self.rope_theta, working_dtype(x_bSCd))
            mixed = rotate(mixed, cos[:, None], sin[:, None])
        return mixed.reshape(-1, H, P * C, d)

    def scores(self, q_bHxd: Array, k_bHyd: Array) -> Array:
        """[b, H, y, x]: keys before queries. Then no matrix product of the backward pass, `dk = dS q` and so on, has
        to transpose the large side, which XLA does several times slower on a CPU."""
        q_bHdx = jnp.swapaxes(q_bHxd / math.sqrt(q_bHxd.shape[-1]), 2, 3)
        q_bHdx = jax.lax.optimization_barrier(q_bHdx)  # or the compiler moves the transposition onto the scores
        return jnp.einsum("bhyd,bhdx->bhyx", k_bHyd, q_bHdx, preferred_element_type=working_dtype(q_bHxd))

    def average(self, weights_bHyx: Array, v_bHye: Array) -> Array:
        """Weighted sums of values, [b, H, e, x]."""
        weights = weights_bHyx.astype(v_bHye.dtype)
        return jnp.einsum("bhye,bhyx->bhex", v_bHye, weights, preferred_element_type=weights_bHyx.dtype)

    def collapse(self, out_bHex: Array, R: Array) -> Array:
        """[b, H, e, P*C] to [b, H, C, e] with R [H, H, P] or [H, P]."""
        b, H, e, _ = out_bHex.shape
        out = jnp.swapaxes(out_bHex, 2, 3).astype(R.dtype)
        if R.ndim == 2:
            return jnp.einsum("hp,bhpce->bhce", R, out.reshape(b, H, self.P, -1, e))
        return _multiply_heads(R.reshape(R.shape[0], -1), out.reshape(b, H * self.P, -1, e))

    def together(self, key_ids_bM: Array, query_ids_bC: Array) -> Array:
        """[b, 1, y, x]: pairs of one segment; [b, 1, y, 1]: keys that exist, where no segments are given."""
        keys, queries = (jnp.tile(ids, (1, self.P)) for ids in (key_ids_bM, query_ids_bC))
        return same_segment(keys, queries)[:, None] if self.packed else (keys != 0)[:, None, :, None]


def _multiply_heads(weights_zS: Array, x_bSCd: Array) -> Array:
    """[b, z, C, d]: new heads as weighted sums of heads. As a product batched over b it needs no transposed copies."""
    b, S, C, d = x_bSCd.shape
    weights = jnp.broadcast_to(weights_zS, (b, *weights_zS.shape))
    return jnp.matmul(weights, x_bSCd.reshape(b, S, C * d)).reshape(b, -1, C, d)
