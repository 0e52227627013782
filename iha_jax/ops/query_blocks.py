"""Mechanisms that need the scores of all heads, or of pairs of keys, at once: blocks of queries against their keys.

The caller's function sees one block of queries and the keys those can reach. It is recomputed in the backward pass, so
that the scores of one block exist at a time. Arrays have their token axis second to last: [..., N, width].
Shapes: N tokens, C query tokens of a block, M key tokens it can reach.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from iha_jax.array_types import Array
from iha_jax.ops.chunks import chunk_rows, chunk_windows, join_chunks
from iha_jax.ops.implementations import Features, resolve_implementation

MAX_PREFIXES = 8  # different key lengths of causal attention without a window: each is compiled separately
SCORES_A_BLOCK = 2**22  # float32 scores held at once, 16 MiB, unless blocks would get too small

Tree = Any  # arrays [..., tokens, width], nested in tuples


def resolve_blocked_implementation(name: str, features: Features) -> str:
    """What `implementation=name` of talking heads and simplicial attention runs for a call with these features.

    Raises:
      ValueError: for a name that does not exist or cannot run this call here.
    """
    return resolve_implementation("blocked_attention", name, features)


def block_of(scores_a_query: int, smallest: int, largest: int) -> int:
    """Query tokens of a block: as many as `SCORES_A_BLOCK` allows, from `smallest` to `largest`."""
    return min(largest, max(smallest, SCORES_A_BLOCK // scores_a_query))


def span_of(N: int, smallest: int, causal: bool) -> int:
    """Largest block without a window. Causal: one of at most `MAX_PREFIXES` spans, so that less is masked."""
    return min(N, max(smallest, -(-N // MAX_PREFIXES))) if causal else N


class Span(NamedTuple):
    """Queries `start` to `end`, cut into `count` blocks of C (the last one padded), each against the first M keys."""

    start: int
    end: int
    count: int
    C: int
    M: int


def spans(N: int, size: int, causal: bool) -> list[Span]:
    """What `attend_in_blocks` computes, in blocks of about `size`: if causal, at most `MAX_PREFIXES` spans of queries,
    each against the keys before its end; else one span against all keys."""
    span, found = span_of(N, size, causal), []
    for start in range(0, N, span):
        end = min(start + span, N)
        count = -(-(end - start) // size)
        found.append(Span(start, end, count, C=-(-(end - start) // count), M=end if causal else N))
    return found


def attend_in_blocks(
    attend: Callable[[Tree, Tree, Array, np.ndarray], Array], queries: Tree, keys: Tree, *, size: int, causal: bool
) -> Array:
    """`attend(queries of a block, keys, their positions [C], [M])` over all blocks of `spans`: [..., N, width]."""
    N = jax.tree.leaves(queries)[0].shape[-2]
    outputs = []
    for start, end, count, C, M in spans(N, size, causal):
        reachable, part_keys = np.arange(M), jax.tree.map(lambda x, M=M: x[..., :M, :], keys)

        def step(_: None, xs: tuple[Tree, Array], part_keys: Tree = part_keys, seen: np.ndarray = reachable) -> Any:
            return None, jax.checkpoint(lambda q, k, rows: attend(q, k, rows, seen))(xs[0], part_keys, xs[1])

        blocks = jax.tree.map(lambda x, s=start, e=end, C=C: chunk_rows(x[..., s:e, :], C), queries)
        rows = start + jnp.arange(count * C).reshape(count, C)
        outputs.append(join_chunks(jax.lax.scan(step, None, (blocks, rows))[1], end - start))
    return jnp.concatenate(outputs, axis=-2)


def attend_in_windows(attend: Callable[..., Array], queries: Tree, *keys: tuple[Tree, int, int], size: int) -> Array:
    """`attend(queries of a block, keys, ...)` over all blocks of `size` queries, joined: [..., N, width].

    Each of `keys` is (arrays, before, after): a block sees its own tokens, `before` before them and `after` after
    them, zeros where the sequence has no such token.
    """
    N = jax.tree.leaves(queries)[0].shape[-2]
    blocks = jax.tree.map(lambda x: chunk_rows(x, size), queries)
    reach = [jax.tree.map(lambda x, b=b, a=a: chunk_windows(x, size, b, a), tree) for tree, b, a in keys]
    _, out = jax.lax.scan(lambda _, xs: (None, jax.checkpoint(attend)(*xs)), None, (blocks, *reach))
    return join_chunks(out, N)


def token_ids(segment_ids: Array | None, B: int, N: int) -> Array:
    """Segment ids as [B, N, 1]; all in segment 1 where there are none, so that 0 also marks what blocks pad with."""
    return jnp.ones((B, N, 1), jnp.int32) if segment_ids is None else segment_ids[..., None]


def visible_softmax(scores: Array, visible: Array, axis: int | tuple[int, ...] = -1) -> Array:
    """Softmax over `axis` among the `visible`; weights, and gradients, of what sees nothing are exactly 0."""
    scores = jnp.where(visible, scores, -1e30)
    weights = jnp.where(visible, jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis, keepdims=True))), 0)
    total = weights.sum(axis, keepdims=True)
    return weights / jnp.where(total > 0, total, 1)
