"""The transformer with a cache: whole prompts at once, then one token a row at a time.

A cache is a tuple of layers, each a dictionary of arrays [B, K, S, d]: apart from each other, so that a step writes one
token's place in each and copies none. Layers are unrolled for the same reason: a scan would cut every layer's weights
and cache out of a stack, and put the cache back, each token.
Shapes: B batch, N tokens of padded prompts, D model width, V vocabulary.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from iha_jax.array_types import Array, Float, Int
from iha_jax.config import ModelConfig
from iha_jax.evaluation.decoding.mechanisms import DECODING, Cache
from iha_jax.model import bind
from iha_jax.model.transformer import Block, Group, Parameters, Transformer
from iha_jax.parallel.rules import constrain

Caches = tuple[Cache, ...]


def prefill(
    config: ModelConfig, parameters: Parameters, tokens_BN: Int[Array, "B N"], lengths_B: Int[Array, "B"], length: int
) -> tuple[Float[Array, "B V"], Caches]:
    """Float32 logits of the token after each prompt, and the caches, with room for `length` tokens a row.

    Row b's prompt is `tokens_BN[b, : lengths_B[b]]`, at least one token; what stands after it is not seen by it. The
    outputs are the training model's own; caches are made of the same activations.

    Raises:
      ValueError: for a bidirectional model, or a `length` below N or above `config.context_length`.
    """
    N, size = tokens_BN.shape[1], len(config.layer_pattern)
    if not config.causal:
        raise ValueError("config.model.causal = False: a bidirectional model has no next token; expected a causal one")
    if not N <= length <= config.context_length:
        raise ValueError(f"length = {length}: expected {N} (the prompts) to {config.context_length} (the context)")
    model = bind(config, parameters)

    def run_group(group: Group, x_BND: Array, first_layer: Array | int) -> tuple[Array, Caches]:
        caches = []
        kinds = config.layer_pattern[: group.size]  # all of it, or the remainder's
        for i, (block, kind) in enumerate(zip(group.blocks(), kinds, strict=True)):
            given = block.attention_norm(x_BND)
            caches.append(DECODING[kind](config, kind).prefill(block.attention, given, lengths_B, length))
            x_BND = block(x_BND, None, first_layer + i)
        return x_BND, tuple(caches)

    x_BND = constrain(_embed(model, tokens_BN), "B N D")
    if config.scan_layers:
        stacked = model.groups, 1 + size * jnp.arange(config.num_groups)
        x_BND, found = jax.lax.scan(lambda x, group: run_group(group[0], x, group[1]), x_BND, stacked)
        caches = [jax.tree.map(lambda x, g=g: x[g], cache) for g in range(config.num_groups) for cache in found]
    else:
        caches = []
        for g in range(config.num_groups):
            x_BND, found = run_group(jax.tree.map(lambda leaf, g=g: leaf[g], model.groups), x_BND, 1 + size * g)
            caches += found
    if hasattr(model, "remainder"):
        x_BND, found = run_group(model.remainder, x_BND, 1 + size * config.num_groups)
        caches += found
    last_B1D = jnp.take_along_axis(x_BND, lengths_B[:, None, None] - 1, axis=1)
    return _logits(model, last_B1D), tuple(caches)


class Decoder:
    """The model taken apart into layers, once for many steps."""

    def __init__(self, config: ModelConfig, parameters: Parameters):
        self.config, self.model = config, bind(config, parameters)
        groups = [jax.tree.map(lambda leaf, g=g: leaf[g], self.model.groups) for g in range(config.num_groups)]
        if hasattr(self.model, "remainder"):
            groups.append(self.model.remainder)
        self.blocks: Sequence[Block] = [block for group in groups for block in group.blocks()]

    def step(
        self, caches: Caches, tokens_B: Int[Array, "B"], positions_B: Int[Array, "B"]
    ) -> tuple[Float[Array, "B V"], Caches]:
        """Float32 logits of the token after `tokens_B`, which stand at `positions_B` (from 0), and the caches."""
        x_B1D, written = constrain(_embed(self.model, tokens_B[:, None]), "B n D"), []
        for layer, (block, kind, cache) in enumerate(zip(self.blocks, self.config.layer_kinds, caches, strict=True), 1):
            mechanism = DECODING[kind](self.config, kind)
            out, cache = mechanism.step(block.attention, block.attention_norm(x_B1D), cache, positions_B, layer)
            written.append(cache)
            x_B1D = constrain(x_B1D + out, "B n D")
            x_B1D = constrain(x_B1D + block.mlp(block.mlp_norm(x_B1D)), "B n D")
        return _logits(self.model, x_B1D), tuple(written)


def _embed(model: Transformer, tokens_BN: Array) -> Array:
    return model.embedding[...][tokens_BN].astype(jnp.dtype(model.config.compute_dtype))


def _logits(model: Transformer, x_B1D: Array) -> Array:
    return model.logits(model.final_norm(x_B1D))[:, 0]
