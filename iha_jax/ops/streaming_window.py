"""Windowed streaming IHA with a backward pass written by hand: what is kept for it is one number a virtual query.

A step of the scan takes n chunks of C query tokens and mixes their heads, and those of the keys and values in reach,
once. Then chunk by chunk and head by head, with `s = q~ k~^T / sqrt(d)` (~ marks virtual tokens) and R the collapse:

    forward     lse = log sum_y exp s,  o~ = exp(s - lse) v~,  out = R o~
    backward    A = exp(s - lse),  o~ = A v~,  do~ = R^T dout,  dR = dout o~^T,  D = <o~, do~>
                dv~ = A^T do~,  ds = A (do~ v~^T - D),  dq~ = ds k~,  dk~ = ds^T q~

o~ is computed again for dR: kept, it would be P times the output. Mixing, RoPE and collapse are differentiated by jax.

Virtual tokens stand along the last axis, [width, tokens], and scores are [keys, queries]: then no product has the large
side, the scores, on the transposed left, which XLA's CPU product is slow at.

Shapes: B batch, N tokens, H heads, S source heads (H or K), P pseudo-heads, d head width, e value width; t = n C query
tokens of a step, M tokens of a chunk or a step with those in reach; z = n B H; x = P C and y = P M virtual tokens.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from iha_jax.array_types import Array
from iha_jax.ops.blockwise import same_segment
from iha_jax.ops.rope import rotate, rotation, working_dtype
from iha_jax.ops.virtual_sequence import Geometry

HIDDEN, LEAST = -1e30, -1e29  # a hidden score, and the least maximum: their difference has the exponential 0


@dataclasses.dataclass(frozen=True)
class Steps:
    """How the scan cuts the sequence: `count` steps of `chunks` chunks of `size` query tokens."""

    space: Geometry
    size: int
    chunks: int
    count: int

    @property
    def tokens(self) -> int:
        return self.size * self.chunks

    @property
    def reach(self) -> int:
        """Tokens before and after its own that a chunk, or a step, sees."""
        return sum(self.space.halo)

    def pad(self, x_BNSd: Array, reached: bool) -> Array:
        """Zeros after the end, up to whole steps; for what is `reached`, keys and values, the halo at both ends too."""
        before, after = self.space.halo if reached else (0, 0)
        after += self.count * self.tokens - self.space.N
        return jnp.pad(x_BNSd, [(0, 0), (before, after)] + [(0, 0)] * (x_BNSd.ndim - 2))

    def cut(self, x: Array, i: Array, reach: int = 0) -> Array:
        """Tokens of step i, and `reach` more, of a padded array [B, N, ...]."""
        return jax.lax.dynamic_slice_in_dim(x, i * self.tokens, self.tokens + reach, axis=1)

    def add(self, total: Array, x: Array, i: Array) -> Array:
        """The inverse of `cut`: adds to these tokens."""
        x = self.cut(total, i, self.reach) + x.astype(total.dtype)
        return jax.lax.dynamic_update_slice_in_dim(total, x, i * self.tokens, axis=1)

    def join(self, x: Array) -> Array:
        """[steps, B, t, ...] to [B, N, ...]."""
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, : self.space.N]

    def virtual(self, x_BMSd: Array, alpha_SHP: Array, first: int, rotated: bool) -> Array:
        """Mixed heads of a step's tokens, chunk by chunk: [z, d, P*M]. Positions count from the step's first query,
        the tokens here from `first`: scores depend on differences alone."""
        B, M, S, d = x_BMSd.shape
        H, P = alpha_SHP.shape[1:]
        space, reach = self.space, M - self.tokens
        if rotated and space.rope_theta is not None:
            positions = (np.arange(M) + first) * (P if space.rope_positions == "virtual" else 1)
            cos, sin = rotation(positions, d, space.rope_theta, working_dtype(x_BMSd))
            x_BMSd = rotate(x_BMSd, cos[:, None], sin[:, None])
        weights = jnp.broadcast_to(alpha_SHP.reshape(S, H * P).T, (B, H * P, S))
        mixed = jnp.matmul(weights, jnp.moveaxis(x_BMSd, 1, 3).reshape(B, S, d * M)).reshape(B, H, P, d, M)
        if rotated and space.rope_theta is not None and space.rope_positions == "virtual":
            mixed = _rotate_pseudo_heads(mixed, space.rope_theta)
        starts = range(0, self.tokens, self.size)
        chunks = jnp.stack([mixed[..., start : start + self.size + reach] for start in starts])
        return jnp.swapaxes(chunks, 3, 4).reshape(self.chunks * B * H, d, -1)

    def queries(self, q: Array, alpha: Array) -> Array:
        return self.virtual(q, alpha, 0, True) / math.sqrt(q.shape[-1])

    def keys(self, k: Array, alpha: Array) -> Array:
        return self.virtual(k, alpha, -self.space.halo[0], True)

    def values(self, v: Array, alpha: Array) -> Array:
        return self.virtual(v, alpha, 0, False)

    def visible(self, ids_BM: Array, heads: int) -> Array:
        """[z, y, x]: pairs that causality, window and segments allow, keys beyond the ends (id 0) excluded."""
        before = self.space.halo[0]
        starts = range(0, self.tokens, self.size)
        keys = jnp.concatenate([ids_BM[:, start : start + self.size + self.reach] for start in starts])
        queries = keys[:, before : before + self.size]
        near = self.space.near(jnp.arange(self.size), jnp.arange(self.size + self.reach) - before).T
        keys, queries = (jnp.tile(ids, (1, self.space.P)) for ids in (keys, queries))
        allowed = same_segment(keys, queries) if self.space.packed else (keys != 0)[:, :, None]
        return jnp.repeat(near & allowed, heads, axis=0)

    def collapse(self, out_zex: Array, R: Array, B: int) -> Array:
        """[B, t, H, e] with R [H, T, P], T heads here, or [T, P]."""
        out = out_zex.astype(R.dtype).reshape(self.chunks, B, R.shape[-2], -1, self.space.P, self.size)
        subscripts = "ghp,nbhepc->bncge" if R.ndim == 3 else "hp,nbhepc->bnche"
        out = jnp.einsum(subscripts, R, out)
        return out.reshape(B, self.tokens, *out.shape[3:])


def _rotate_pseudo_heads(x_BHPdM: Array, theta: float) -> Array:
    """RoPE by the pseudo-head's part of the virtual position, along the last axis but one."""
    B, H, P, d, M = x_BHPdM.shape
    cos, sin = (x[:, None, :, None] for x in rotation(np.arange(P), d, theta, working_dtype(x_BHPdM)))
    halves = x_BHPdM.reshape(B, H, P, 2, d // 2, M)
    signs = jnp.asarray([-1, 1], sin.dtype)[:, None, None]
    turned = halves * cos + jnp.flip(halves, axis=3) * (sin * signs)
    return turned.reshape(x_BHPdM.shape).astype(x_BHPdM.dtype)


def _product(x: Array, x_axis: int, y: Array, y_axis: int, dtype: jnp.dtype) -> Array:
    """Batched over the first axis, summed over one axis of each."""
    return jax.lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((0,), (0,))), preferred_element_type=dtype)


def _attend(q_zdx: Array, k_zdy: Array, v_zey: Array, visible: Array) -> tuple[Array, Array]:
    """o~ [z, e, x] and lse [z, 1, x]; a query that sees nothing has output 0."""
    dtype = working_dtype(q_zdx)
    scores = jnp.where(visible, _product(k_zdy, 1, q_zdx, 1, dtype), HIDDEN)
    largest = jnp.maximum(jnp.max(scores, axis=1, keepdims=True), LEAST)
    weights = jnp.exp(scores - largest)
    total = jnp.sum(weights, axis=1, keepdims=True)
    total = jnp.where(total > 0, total, 1)
    return _product(v_zey, 2, weights.astype(v_zey.dtype), 1, dtype) / total, largest + jnp.log(total)


def _attend_backward(
    q_zdx: Array, k_zdy: Array, v_zey: Array, visible: Array, lse: Array, d_out: Array
) -> tuple[Array, Array, Array, Array]:
    """o~, dq~, dk~ and dv~, in the layouts of `_attend`."""
    dtype = working_dtype(q_zdx)
    weights = jnp.exp(jnp.where(visible, _product(k_zdy, 1, q_zdx, 1, dtype), HIDDEN) - lse)
    rounded, d_rounded = weights.astype(v_zey.dtype), d_out.astype(v_zey.dtype)
    out = _product(v_zey, 2, rounded, 1, dtype)
    D = jnp.sum(out * d_out, axis=1, keepdims=True)
    d_scores = (weights * (_product(v_zey, 1, d_rounded, 1, dtype) - D)).astype(q_zdx.dtype)
    dq = _product(k_zdy, 2, d_scores, 1, dtype)
    # [z, y, width]: the compiler would otherwise turn these products over, and they would take a third longer.
    dk_zyd, dv_zye = jax.lax.optimization_barrier(
        (_product(d_scores, 2, q_zdx, 2, dtype), _product(rounded, 2, d_rounded, 2, dtype))
    )
    return out, dq, jnp.swapaxes(dk_zyd, 1, 2), jnp.swapaxes(dv_zye, 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def windowed(steps: Steps, q: Array, k: Array, v: Array, ids: Array, mixing: tuple[Array, ...]) -> Array:
    """[B, N, H, e] from unrotated q [B, N, H, d], k, v, ids [B, N] and the four mixing weights. Reverse mode only."""
    return _forward(steps, q, k, v, ids, mixing)[0]


def _forward(steps: Steps, q: Array, k: Array, v: Array, ids: Array, mixing: tuple[Array, ...]) -> tuple[Array, tuple]:
    alpha_q, alpha_k, alpha_v, R = mixing
    padded_q, reach = steps.pad(q, False), steps.reach
    padded_k, padded_v, padded_ids = (steps.pad(x, True) for x in (k, v, ids))

    def step(_: None, i: Array) -> tuple[None, tuple[Array, Array]]:
        # Ids stand behind the queries: masks depend on nothing that is trained, so under `jax.checkpoint` JAX would
        # compute those of all steps beforehand and keep them, more bytes than the virtual sequence has.
        step_q, step_ids = jax.lax.optimization_barrier((steps.cut(padded_q, i), steps.cut(padded_ids, i, reach)))
        virtual_q = steps.queries(step_q, alpha_q)
        virtual_k = steps.keys(steps.cut(padded_k, i, reach), alpha_k)
        virtual_v = steps.values(steps.cut(padded_v, i, reach), alpha_v)
        visible = steps.visible(step_ids, alpha_q.shape[1])
        out, lse = _attend(virtual_q, virtual_k, virtual_v, visible)
        return None, (steps.collapse(out, R, q.shape[0]), lse)

    _, (out, lse) = jax.lax.scan(step, None, jnp.arange(steps.count))
    return steps.join(out).astype(q.dtype), (q, k, v, ids, mixing, lse)


def _backward(steps: Steps, saved: tuple, d_out: Array) -> tuple[Array, Array, Array, None, tuple[Array, ...]]:
    q, k, v, ids, mixing, lse = saved
    alpha_q, alpha_k, alpha_v, R = mixing
    B, reach, dtype = q.shape[0], steps.reach, working_dtype(q)
    padded_q, padded_out = steps.pad(q, False), steps.pad(d_out, False)
    padded_k, padded_v, padded_ids = (steps.pad(x, True) for x in (k, v, ids))

    def step(sums: tuple, xs: tuple[Array, Array]) -> tuple[tuple, Array]:
        (dk, dv, d_mixing), (i, lse) = sums, xs
        virtual_q, pull_q = jax.vjp(steps.queries, steps.cut(padded_q, i), alpha_q)
        virtual_k, pull_k = jax.vjp(steps.keys, steps.cut(padded_k, i, reach), alpha_k)
        virtual_v, pull_v = jax.vjp(steps.values, steps.cut(padded_v, i, reach), alpha_v)
        visible = steps.visible(steps.cut(padded_ids, i, reach), alpha_q.shape[1])
        d_step = steps.cut(padded_out, i).astype(R.dtype)
        like = jax.ShapeDtypeStruct((virtual_q.shape[0], virtual_v.shape[1], virtual_q.shape[2]), dtype)
        (d_virtual,) = jax.linear_transpose(lambda out: steps.collapse(out, R, B), like)(d_step)
        out, *parts = _attend_backward(virtual_q, virtual_k, virtual_v, visible, lse, d_virtual)
        (dR,) = jax.linear_transpose(lambda R: steps.collapse(out, R, B), R)(d_step)
        like = (virtual_q, virtual_k, virtual_v)
        dq, dk_more, dv_more = (part.astype(x.dtype) for part, x in zip(parts, like, strict=True))
        (dq, d_alpha_q), (dk_more, d_alpha_k), (dv_more, d_alpha_v) = pull_q(dq), pull_k(dk_more), pull_v(dv_more)
        gradients = (d_alpha_q, d_alpha_k, d_alpha_v, dR)
        d_mixing = tuple(total + x.astype(dtype) for total, x in zip(d_mixing, gradients, strict=True))
        return (steps.add(dk, dk_more, i), steps.add(dv, dv_more, i), d_mixing), dq

    def zeros(x: Array) -> Array:
        return jnp.zeros(x.shape, dtype)

    sums = zeros(padded_k), zeros(padded_v), tuple(map(zeros, mixing))
    (dk, dv, d_mixing), dq = jax.lax.scan(step, sums, (jnp.arange(steps.count), lse))
    own = slice(steps.space.halo[0], steps.space.halo[0] + steps.space.N)
    d_mixing = tuple(x.astype(weights.dtype) for x, weights in zip(d_mixing, mixing, strict=True))
    return steps.join(dq), dk[:, own].astype(k.dtype), dv[:, own].astype(v.dtype), None, d_mixing


windowed.defvjp(_forward, _backward)
