"""FLOPs that the named implementations execute: what `accounting.py` counts as useful, and what is computed beside it.

That is: masked pairs of the blocks that are visited, keys mixed again for every chunk that reaches them, chunks that
only pad a step, and in training what the backward pass recomputes. Chunk sizes come from the implementations' own
rules. Matrix products alone are counted, one multiply-add as 2 FLOPs; the compiler's own count adds element-wise work
(softmax, masks, RoPE, norms), 0 to 3 % at a head width of 128.

Letters: N tokens, B batch, H heads, K key/value heads, d head width, P pseudo-heads, C query tokens of a chunk, M key
tokens that it is computed against.
"""

from dataclasses import dataclass

from iha_jax.accounting import Flops, check_kind, flops_per_token
from iha_jax.config import IHA_KINDS, ModelConfig
from iha_jax.ops import Features, resolve_attention_implementation, resolve_interleaved_implementation
from iha_jax.ops.blockwise import block_size, window_block_size
from iha_jax.ops.streaming import Geometry, chunk_tokens, window_steps


@dataclass(frozen=True)
class Work:
    """What one attention layer computes for one row of N tokens, counted as often as it is computed.

    `scores` and `sums`: products of a query with a key, and of a weight with a value, of one head (`2 d` FLOPs each);
    the others: tokens whose queries, keys and values are mixed, and whose outputs are collapsed. A training step
    computes each forward, perhaps again for the backward pass, and twice for two gradients.
    """

    scores: float
    sums: float
    queries: float = 0
    keys: float = 0
    values: float = 0
    collapsed: float = 0


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

    Windowed: steps of n chunks (those that pad the last step included). A step mixes n C queries and n C + halo keys
    and values; each of its chunks has `(P C) (P M)` pairs, M = C + halo. Training: all 4 times, but collapse 3: its
    output is not needed again.

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
    steps = window_steps(space, C, batch, heads)
    tokens, M = steps.count * steps.tokens, C + steps.reach
    times, pairs = 4 if training else 1, tokens * P * P * M
    mixed = times * (tokens + steps.count * steps.reach)
    collapsed = (3 if training else 1) * tokens
    return Work(times * pairs, times * pairs, queries=times * tokens, keys=mixed, values=mixed, collapsed=collapsed)


def reference_work(N: int, P: int | None) -> Work:
    """The references compute every pair of (virtual) tokens and mask; `P` is None for MHA. Forward only."""
    pairs, mixed = (N * (P or 1)) ** 2, 0 if P is None else N
    return Work(pairs, pairs, queries=mixed, keys=mixed, values=mixed, collapsed=mixed)


def layer_work(
    model: ModelConfig, kind: str, *, batch_size: int = 1, training: bool = False, segments: bool = True
) -> Work:
    """What the implementation that `model` names for layers of `kind` ("auto" resolved for this platform; `segments`:
    whether documents are packed, which decides what can run) computes for a row.

    Raises:
      ValueError: for a layer kind or an implementation without a closed form here, and for training through a
        reference, which nobody should.
    """
    check_kind(kind)
    if kind not in (*IHA_KINDS, "mha", "mha_local", "fused_mixing"):
        raise ValueError(f"layer kind {kind!r}: executed FLOPs have no closed form")
    N, d, iha = model.context_length, model.head_width, model.iha
    window = {"mha_local": model.window, "iha_local": iha.window}.get(kind)
    window = None if window is None or window >= N else window
    features = Features(
        dtype=model.compute_dtype, tokens=N, head_width=d, value_width=d, window=window, segments=segments
    )
    if kind in IHA_KINDS:
        name = resolve_interleaved_implementation(iha.implementation, features)
        if name == "streaming":
            space = Geometry(N, iha.pseudo_heads, window, True, iha.causality, None, "token")
            return streaming_work(space, heads=model.num_heads, batch=batch_size, training=training)
    else:
        name = resolve_attention_implementation(model.implementation, features)
        if name == "blockwise":
            return blockwise_work(N, window, training=training)
    if name == "reference" and not training:
        return reference_work(N, iha.pseudo_heads if kind in IHA_KINDS else None)
    raise ValueError(
        f"layer kind {kind!r} through implementation {name!r}: executed FLOPs have no closed form"
        f"{' in training' if training else ''}; expected 'blockwise' or 'streaming'"
    )


def executed_flops_per_token(model: ModelConfig, *, batch_size: int = 1, training: bool = False) -> Flops:
    """FLOPs a token that the model's implementations execute for rows of N tokens, `batch_size` rows at a time.

    scores: `2 d H (scores + sums) / N` a layer; mixing: `2 d / N` times `H^2 P` (queries), `K H P` (keys, values) and
    `H^2 P` or `H P` (collapse) for each token mixed. Projections, MLP and output execute what is useful: once forward,
    three times in training. One training step without gradient accumulation; the loss in one piece.

    Raises:
      ValueError: as `layer_work` does; for training under a `remat` policy, which decides itself what to recompute.
    """
    if training and model.remat != "none":
        raise ValueError(f"remat = {model.remat!r}: executed training FLOPs have a closed form for 'none' alone")
    H, K, P, d, N = model.num_heads, model.num_kv_heads, model.iha.pseudo_heads, model.head_width, model.context_length
    collapse = H * H * P if model.iha.collapse == "global" else H * P
    works = [layer_work(model, kind, batch_size=batch_size, training=training) for kind in model.layer_kinds]
    useful, dense = flops_per_token(model), 3 if training else 1
    mixed = sum(w.queries * H * H * P + (w.keys + w.values) * K * H * P + w.collapsed * collapse for w in works)
    return Flops(
        projections=dense * useful.projections,
        scores=2.0 * d * H * sum(w.scores + w.sums for w in works) / N,
        mixing=2.0 * d * mixed / N,
        mlp=dense * useful.mlp,
        output=dense * useful.output,
    )
