"""What the implementations in XLA compute: blocks of the block-wise forms, chunks of streaming IHA, the references.

Block and chunk sizes come from the implementations' own rules. Letters: N tokens, B batch, H heads, P pseudo-heads,
d head width, C query tokens of a block or chunk, M key tokens that it is computed against.
"""

from dataclasses import dataclass

from iha_jax.ops import query_blocks, simplicial, talking_heads
from iha_jax.ops.blockwise import block_size, window_block_size
from iha_jax.ops.streaming import Geometry, chunk_batches, chunk_tokens


@dataclass(frozen=True)
class Work:
    """What one attention layer computes for one row of N tokens, counted as often as it is computed.

    `scores` and `sums`: products of a query with a key, and of a weight with d numbers of a value, of one head (`2 d`
    FLOPs each); `queries`, `keys`, `values`, `collapsed`: tokens whose queries, keys and values are mixed, and whose
    outputs are collapsed; `exchanged`: logits or weights of one head that are made from those of all heads (talking
    heads, `2 H` each). A training step computes each forward, perhaps again for the backward pass, and twice for two
    gradients.
    """

    scores: float
    sums: float
    queries: float = 0
    keys: float = 0
    values: float = 0
    collapsed: float = 0
    exchanged: float = 0


def blockwise_work(N: int, window: int | None, *, causal: bool = True, training: bool = False) -> Work:
    """Unwindowed: blocks of C queries against the keys up to their end (all, if not causal): `sum_blocks C M`.
    Windowed: `ceil(N / C)` blocks against `M = C + W - 1` keys (`C + 2 W - 2` if not causal), zeros beyond the ends.

    Training: scores forward, once more, and two gradients: 4 times. Sums, windowed: the same, by `jax.checkpoint`;
    unwindowed, by the hand-written backward: forward and two gradients, 3 times.
    """
    if window is None or window >= N:
        sums = 3
        C = block_size(N)
        ends = [min(start + C, N) for start in range(0, N, C)]
        pairs = sum((end - start) * (end if causal else N) for start, end in zip(range(0, N, C), ends, strict=True))
    else:
        C, sums = window_block_size(N, window), 4
        pairs = -(-N // C) * C * (C + (window - 1) * (1 if causal else 2))
    return Work(scores=(4 if training else 1) * pairs, sums=(sums if training else 1) * pairs)


def streaming_work(
    space: Geometry, *, heads: int, batch: int = 1, chunk: int | None = None, training: bool = False
) -> Work:
    """IHA by chunks of C query tokens. Batch and heads count because chunks are batched by the size of their scores.

    Windowed: n chunks (those that pad a step included), each mixing C queries and M = C + halo keys and values, with
    `(P C) (P M)` pairs. Training: all 4 times, but collapse 3: its output is not needed again.

    Unwindowed: each query chunk visits the key chunks it can reach, mixing them each time, keys twice: a pass for the
    log-sum-exp (scores) and one for the sums (scores and sums). Training: forward; both passes again; scores, keys and
    values again for each key chunk; and two gradients of the second pass. Scores `2 + 2 + 1 + 2 = 7` times (of `C M`
    pairs), sums `1 + 1 + 2 = 4`, keys 7, values `1 + 1 + 1 + 2 = 5`, queries 4, collapse 3.
    """
    N, P = space.N, space.P
    C = chunk or chunk_tokens(N, P, space.window)
    n = -(-N // C)
    if space.window is None:
        visits = n * (n + 1) // 2 if space.causal else n * n
        mixed, pairs = visits * C, visits * (P * C) ** 2
        if training:
            return Work(7 * pairs, 4 * pairs, queries=4 * n * C, keys=7 * mixed, values=5 * mixed, collapsed=3 * n * C)
        return Work(2 * pairs, pairs, queries=n * C, keys=2 * mixed, values=mixed, collapsed=n * C)
    M = C + sum(space.halo)
    steps, together = chunk_batches(n, batch * heads * P * P * C * M)
    n = steps * together
    times, pairs = 4 if training else 1, n * P * C * P * M
    return Work(
        *(times * pairs, times * pairs),
        queries=times * n * C,
        keys=times * n * M,
        values=times * n * M,
        collapsed=(3 if training else 1) * n * C,
    )


def talking_heads_work(
    N: int, window: int | None, *, heads: int, batch: int = 1, causal: bool = True, training: bool = False
) -> Work:
    """Unwindowed: the blocks of `query_blocks.spans`, `count C M` pairs each. Windowed: `ceil(N / C)` blocks against
    `M = C + W - 1` keys (`C + 2 W - 2` if not causal). Heads exchange logits, then weights: twice a pair.

    Training: all 4 times (forward, again, two gradients), but sums 3, for the block's output is not needed again.
    """
    window = None if window is None or window >= N else window
    C = talking_heads.block_tokens(batch, heads, N, window, causal)
    if window is None:
        pairs = sum(span.count * span.C * span.M for span in query_blocks.spans(N, C, causal))
    else:
        pairs = -(-N // C) * C * (C + (window - 1) * (1 if causal else 2))
    return Work(*((4 * pairs, 3 * pairs) if training else (pairs, pairs)), exchanged=(8 if training else 2) * pairs)


def simplicial_work(
    N: int,
    windows: tuple[int, int] | None,
    *,
    heads: int,
    batch: int = 1,
    causal: bool = True,
    training: bool = False,
) -> Work:
    """Triples of a query, a first and a second key. Dense: `count C M^2` for each of `query_blocks.spans`. Windowed:
    `ceil(N / C)` blocks of `C M R`, with `M = C + w1 - 1` first keys and each query's own `R = w2` second keys (`C + 2
    w1 - 2` and `2 w2 - 1` if not causal), w1 the larger window. Products of a query with a second key, `1 / M` of
    these, are left out. Training: all 4 times.
    """
    windows = simplicial.settled(windows, N)
    C = simplicial.block_tokens(batch, heads, N, windows, causal)
    if windows is None:
        triples = sum(span.count * span.C * span.M**2 for span in query_blocks.spans(N, C, causal))
    else:
        M = C + (windows[0] - 1) * (1 if causal else 2)
        triples = -(-N // C) * C * M * simplicial.second_keys(windows, causal)
    return Work(*((4 if training else 1) * triples,) * 2)


def reference_work(N: int, P: int | None = None) -> Work:
    """The references compute every pair of (virtual) tokens and mask; `P` is None without mixing. Forward only."""
    pairs, mixed = (N * (P or 1)) ** 2, 0 if P is None else N
    return Work(pairs, pairs, queries=mixed, keys=mixed, values=mixed, collapsed=mixed)
