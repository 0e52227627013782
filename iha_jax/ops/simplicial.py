"""2-simplicial attention (Clift et al. 2019, arXiv 1909.00668; Roy et al. 2025, arXiv 2507.02754): queries see pairs.

    logit[i, j, k] = sum_d q[i, d] k[j, d] k2[k, d] / sqrt(d)
    out[i] = sum_{j, k} softmax_{j, k}(logit[i]) (v[j] * v2[k])        one softmax over all visible pairs (j, k)

The trilinear form is not invariant under RoPE: give it unrotated queries and keys.
With `q'[i, k] = q[i] * k2[k]` the logits are those of ordinary attention with several queries a token, and so they are
computed: one matrix product for the logits, one for `sum_j weight v[j]`, and sums over the second keys.
Shapes: B batch, N tokens, H heads, K key/value heads, d head width, e value width; inside, C query tokens of a block, M
first and R second keys it can reach.
"""

import math

import jax.numpy as jnp
import numpy as np

from iha_jax.array_types import Array, Float, Int
from iha_jax.ops import reference_baselines as reference
from iha_jax.ops.arguments import check_attention, check_windows
from iha_jax.ops.blockwise import same_segment
from iha_jax.ops.implementations import Features
from iha_jax.ops.query_blocks import (
    attend_in_blocks,
    attend_in_windows,
    block_of,
    resolve_blocked_implementation,
    span_of,
    token_ids,
    visible_softmax,
)
from iha_jax.ops.rope import working_dtype

SMALLEST_BLOCK = 8  # dense
SMALLEST_WINDOW_BLOCK = 16

Keys = tuple[Array, Array, Array]  # keys [B, H, M, d], values [B, H, M, e], segments [B, M, 1]


def block_tokens(B: int, H: int, N: int, windows: tuple[int, int] | None, causal: bool) -> int:
    """Query tokens of a block; `windows` are at most N, the larger one first, or None where both hide nothing."""
    if windows is None:
        return block_of(B * H * N * N, SMALLEST_BLOCK, span_of(N, SMALLEST_BLOCK, causal))
    return block_of(2 * B * H * windows[0] * second_keys(windows, causal), SMALLEST_WINDOW_BLOCK, min(N, windows[0]))


def second_keys(windows: tuple[int, int], causal: bool) -> int:
    """R: second keys of one query, those beyond the ends of the sequence included."""
    return windows[1] if causal else 2 * windows[1] - 1


def settled(windows: tuple[int, int] | None, N: int) -> tuple[int, int] | None:
    """Windows of at most N, None where both hide nothing; the larger first, since the key sets are interchangeable."""
    larger = None if windows is None else (min(max(windows), N), min(min(windows), N))
    return None if larger == (N, N) else larger


def simplicial_attention(
    q: Float[Array, "B N H d"],
    k: Float[Array, "B N K d"],
    v: Float[Array, "B N K e"],
    k2: Float[Array, "B N K d"],
    v2: Float[Array, "B N K e"],
    *,
    causal: bool = True,
    windows: tuple[int, int] | None = None,
    segment_ids: Int[Array, "B N"] | None = None,
    implementation: str = "auto",
) -> Float[Array, "B N H e"]:
    """2-simplicial attention (formula at the top of this file); head h reads key/value head `h // (H / K)`.

    Token i sees the pair (j, k) when it sees both: `i - w1 < j <= i` and `i - w2 < k <= i` for `windows = (w1, w2)`
    (`|i - j| < w1`, `|i - k| < w2` if not causal; at least N: all), and all three are of one segment that is not 0.
    `windows=None` is dense: `N^2` pairs a token, for short sequences only. Blocks of queries, recomputed in the
    backward pass. Logits and softmax are computed in float32 (float64 for float64 inputs), the result has the dtype of
    `q`. `implementation`: "reference" (loops, for tests), "blockwise", or "auto".

    Raises:
      ValueError: at trace time, naming the argument, what was got and what was expected.
    """
    check_attention(q, k, v, None, segment_ids)
    for name, x, like, other in (("k2", k2, "k", k), ("v2", v2, "v", v)):
        if x.shape != other.shape or x.dtype != other.dtype:
            raise ValueError(f"{name} is {x.dtype}{x.shape}; expected {other.dtype}{other.shape} as {like} is")
    check_windows(windows)
    features = Features.of(q, v, causal=causal, window=windows and windows[0], segment_ids=segment_ids)
    if resolve_blocked_implementation(implementation, features) == "reference":
        return reference.simplicial_attention(q, k, v, k2, v2, causal=causal, windows=windows, segment_ids=segment_ids)
    if windows is not None and windows[1] > windows[0]:  # the smaller window second
        k, v, k2, v2 = k2, v2, k, v
    windows = settled(windows, q.shape[1])
    # Keys are repeated, small beside the logits, rather than grouped: a block's arrays then have five axes, six under
    # vmap. XLA for CPUs (jax 0.10) crashes in a product of matrices fused with a product and a sum over seven.
    ids, group = token_ids(segment_ids, q.shape[0], q.shape[1]), q.shape[2] // k.shape[2]
    k, v, k2, v2 = (jnp.repeat(jnp.moveaxis(x, 1, 2), group, axis=1) for x in (k, v, k2, v2))
    queries, first, second = (jnp.moveaxis(q, 1, 2), ids), (k, v, ids), (k2, v2, ids)
    if windows is None:
        out = _dense(queries, first, second, causal)
    else:
        out = _windowed(queries, first, second, causal, windows)
    return jnp.moveaxis(out, 2, 1).astype(q.dtype)


def _dense(queries: tuple[Array, Array], first: Keys, second: Keys, causal: bool) -> Array:
    B, H, N, _ = queries[0].shape

    def attend(queries: tuple[Array, Array], keys: tuple[Keys, Keys], rows: Array, columns: np.ndarray) -> Array:
        near_CM = (jnp.asarray(columns) <= rows[:, None]) | (not causal)
        seen = near_CM & same_segment(queries[1][..., 0], keys[0][2][..., 0])
        k2_BHRd, v2_BHRe, _ = keys[1]
        return _attend(queries[0], keys[0], seen, (k2_BHRd[:, :, None], v2_BHRe[:, :, None]), seen)

    return attend_in_blocks(attend, queries, (first, second), size=block_tokens(B, H, N, None, causal), causal=causal)


def _windowed(queries: tuple[Array, Array], first: Keys, second: Keys, causal: bool, windows: tuple[int, int]) -> Array:
    B, H, N, _ = queries[0].shape
    halos = [(w - 1, 0 if causal else w - 1) for w in windows]
    reach, size = second_keys(windows, causal), block_tokens(B, H, N, windows, causal)
    offset = np.arange(size)[:, None] - (np.arange(sum(halos[0]) + size) - halos[0][0])
    near_CM = jnp.asarray((np.abs(offset) < windows[0]) & ((offset >= 0) | (not causal)))

    def own(x: Array) -> Array:
        """[..., C + reach - 1, width] to each query's own second keys, [..., C, reach, width]."""
        return jnp.stack([x[..., r : r + size, :] for r in range(reach)], axis=-2)

    def attend(queries: tuple[Array, Array], first: Keys, second: Keys) -> Array:
        ids_BC = queries[1][..., 0]
        k2, v2, ids2 = (own(x) for x in second)
        seen = near_CM & same_segment(ids_BC, first[2][..., 0])
        seen2 = (ids2[..., 0] == ids_BC[..., None]) & (ids_BC[..., None] != 0)
        return _attend(queries[0], first, seen, (k2, v2), seen2)

    return attend_in_windows(attend, queries, (first, *halos[0]), (second, *halos[1]), size=size)


def _attend(q_BHCd: Array, first: Keys, seen_BCM: Array, second: tuple[Array, Array], seen_BCR: Array) -> Array:
    """One block; `second`: keys [B, H, C or 1, R, d] and values [B, H, C or 1, R, e] of each query."""
    (k_BHMd, v_BHMe, _), (k2_BHCRd, v2_BHCRe), dtype = first, second, working_dtype(q_BHCd)
    q_BHCRd = (q_BHCd / math.sqrt(q_BHCd.shape[-1]))[..., None, :] * k2_BHCRd
    logits = jnp.einsum("bhcrd,bhmd->bhcrm", q_BHCRd, k_BHMd, preferred_element_type=dtype)
    visible = (seen_BCR[..., None] & seen_BCM[:, :, None])[:, None]
    weights = visible_softmax(logits, visible, axis=(-2, -1)).astype(v_BHMe.dtype)
    values = jnp.einsum("bhcrm,bhme->bhcre", weights, v_BHMe, preferred_element_type=dtype)
    return jnp.sum(values * v2_BHCRe, axis=-2)
