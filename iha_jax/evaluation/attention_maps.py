"""What the layers of a trained model attend to, as whole matrices: for looking at (memory grows with the square of N).

Shapes: B batch, N tokens, H heads, K key/value heads, P pseudo-heads (1 in MHA), d head width.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from iha_jax.array_types import Array, Float, Int
from iha_jax.config import ModelConfig
from iha_jax.evaluation.decoding.transformer import Decoder
from iha_jax.model import InterleavedHeadAttention, MultiHeadAttention
from iha_jax.model.transformer import Block, Parameters
from iha_jax.ops import attention_weights, interleaved_attention_weights

KINDS = ("mha", "mha_local", "fused_mixing", "iha", "iha_local")


@dataclass(frozen=True)
class AttentionMap:
    """What one layer does with a batch of texts; float32.

    `weights[b, h, p, r, n, m]` is how much pseudo-query p of token n attends to pseudo-key r of token m in head h; it
    sums to 1 over (r, m). `value_weights[b, g, s, n, m]` is what of the unmixed values v = x W_V reaches a head's
    output:

        out[n, g] = sum_{s, m} value_weights[g, s, n, m] v[m, s]
        MHA: value_weights[g, s, n, m] = weights[g, n, m] if s = g // (H / K), else 0
        IHA: value_weights[g, s, n, m] = sum_{h, p, r} collapse[g, h, p] weights[h, p, r, n, m] alpha_value[s, h, r]

    So MHA and IHA can be looked at side by side. IHA's can be negative and need not sum to 1.
    """

    layer: int  # from 0, as in `model.by_layer`
    kind: str
    weights: Float[Array, "B H P P N N"]
    value_weights: Float[Array, "B H K N N"]


def attention_maps(
    config: ModelConfig,
    parameters: Parameters,
    tokens: Int[Array, "B N"],
    segment_ids: Int[Array, "B N"] | None = None,
) -> list[AttentionMap]:
    """The maps of every layer, with the windows, RoPE, QK-norm and mixing weights that the layer itself uses.

    Segments see only themselves; 0 is padding, which neither attends nor is attended to: its weights are 0.

    Raises:
      ValueError: for a model with layers of another kind than `KINDS` (talking heads, differential and simplicial
        attention have no one softmax over tokens a head), naming them.
    """
    others = sorted(set(config.layer_kinds) - set(KINDS))
    if others:
        raise ValueError(f"no attention maps of {', '.join(others)} layers; expected a model of {', '.join(KINDS)}")
    decoder = Decoder(config, parameters)
    x_BND = decoder.model.embedding[...][tokens].astype(jnp.dtype(config.compute_dtype))
    found = []
    for layer, (block, kind) in enumerate(zip(decoder.blocks, config.layer_kinds, strict=True)):
        x_BND, weights, value_weights = _through(kind, block, x_BND, segment_ids)
        found.append(AttentionMap(layer, kind, weights, value_weights))
    return found


@functools.partial(jax.jit, static_argnames="kind")
def _through(kind: str, block: Block, x_BND: Array, segment_ids_BN: Array | None) -> tuple[Array, Array, Array]:
    """The activations after a layer, its `weights` and its `value_weights`. Compiled once a kind of layer."""
    attention, given_BND = block.attention, block.attention_norm(x_BND)
    maps = _interleaved if isinstance(attention, InterleavedHeadAttention) else _softmax
    weights, value_weights = maps(attention, given_BND, segment_ids_BN)
    return block(x_BND, segment_ids_BN, 0), weights, value_weights  # no kind of `KINDS` depends on its layer's number


def _softmax(attention: MultiHeadAttention, x_BND: Array, segment_ids_BN: Array | None) -> tuple[Array, Array]:
    q_BNHd, k_BNKd, _ = attention.project(x_BND)
    weights_BHNM = attention_weights(
        *attention.rotate(q_BNHd, k_BNKd),
        causal=attention.config.causal,
        window=attention.window,
        segment_ids=segment_ids_BN,
    )
    H, K = q_BNHd.shape[2], k_BNKd.shape[2]
    own_HK = jax.nn.one_hot(jnp.arange(H) // (H // K), K)
    return weights_BHNM[:, :, None, None], jnp.einsum("bhnm,hs->bhsnm", weights_BHNM, own_HK)


def _interleaved(
    attention: InterleavedHeadAttention, x_BND: Array, segment_ids_BN: Array | None
) -> tuple[Array, Array]:
    config, iha = attention.config, attention.config.iha
    q_BNHd, k_BNKd, _ = attention.project(x_BND)
    alpha_query, alpha_key = (w[...].astype(q_BNHd.dtype) for w in (attention.alpha_query, attention.alpha_key))
    rotated = "none" not in (config.positions, iha.rope_positions)
    weights_BHPRNM = interleaved_attention_weights(
        q_BNHd,
        k_BNKd,
        alpha_query,
        alpha_key,
        causal=config.causal,
        causality=iha.causality,
        window=attention.window,
        rope_theta=config.rope_theta if rotated else None,
        rope_positions=iha.rope_positions if rotated else "token",
        segment_ids=segment_ids_BN,
    )
    collapse = attention.collapse[...]
    if iha.collapse == "per_head":
        collapse = jnp.eye(len(collapse))[:, :, None] * collapse
    reached = jnp.einsum("ghp,bhprnm,shr->bgsnm", collapse, weights_BHPRNM, attention.alpha_value[...])
    return weights_BHPRNM, reached
