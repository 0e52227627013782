"""A decoder-only transformer: the whole forward pass on one screen.

Shapes: B batch, N tokens, D model width, V vocabulary, G whole repetitions of the layer pattern.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from iha_jax.array_types import Array, Float, Int
from iha_jax.config import ModelConfig
from iha_jax.model.attention import ATTENTION
from iha_jax.model.init import initial_value
from iha_jax.model.layers import WEIGHT_PRODUCT, Mlp, RMSNorm
from iha_jax.parallel.rules import constrain

Parameters = dict[str, Any]

REMAT = {
    "full": jax.checkpoint_policies.nothing_saveable,
    # By name: JAX's own policies for products would also keep those inside attention, scores among them.
    "dots": jax.checkpoint_policies.save_only_these_names(WEIGHT_PRODUCT),
}


class Block(nnx.Module):
    """One pre-norm layer: `x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, config: ModelConfig, kind: str, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm("attention_norm", config.width, config, rngs=rngs)
        self.attention = ATTENTION[kind](config, kind, rngs=rngs)
        self.mlp_norm = RMSNorm("mlp_norm", config.width, config, rngs=rngs)
        self.mlp = Mlp(config, rngs=rngs)

    def __call__(self, x_BND: Array, segment_ids_BN: Array | None, layer: Array | int) -> Array:
        """`layer`: the number of this layer in the model, from 1; an array where layers are scanned."""
        x_BND = constrain(x_BND + self.attention(self.attention_norm(x_BND), segment_ids_BN, layer), "B N D")
        return constrain(x_BND + self.mlp(self.mlp_norm(x_BND)), "B N D")


class Group(nnx.Module):
    """The layers of one repetition of the layer pattern, `block_0`, `block_1`, ..., to be applied in order."""

    def __init__(self, config: ModelConfig, kinds: tuple[str, ...], layer_keys: Array):
        self.size = len(kinds)
        for i, kind in enumerate(kinds):
            setattr(self, f"block_{i}", Block(config, kind, rngs=nnx.Rngs(params=layer_keys[i])))

    def blocks(self) -> list[Block]:
        return [getattr(self, f"block_{i}") for i in range(self.size)]


class Transformer(nnx.Module):
    """Embedding, `num_layers` blocks, final norm, logits.

    The layer pattern's whole repetitions are stacked (leading axis G) and scanned; the layers left over form
    `remainder`. Parameters are float32; `compute_dtype` is what activations are in; logits are float32.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        size, groups = len(config.layer_pattern), config.num_groups
        key = rngs.params.key[...]
        layer_keys = jax.vmap(lambda layer: jax.random.fold_in(key, layer))(jnp.arange(1, config.num_layers + 1))
        group_keys = layer_keys[: groups * size].reshape(groups, size)
        self.embedding = nnx.Param(initial_value("embedding", (config.vocab_size, config.width), config, rngs))
        self.groups = jax.vmap(lambda keys: Group(config, config.layer_pattern, keys))(group_keys)
        left_over = config.layer_kinds[groups * size :]
        if left_over:
            self.remainder = Group(config, left_over, layer_keys[groups * size :])
        self.final_norm = RMSNorm("final_norm", config.width, config, rngs=rngs)
        if not config.tie_embeddings:
            shape = (config.width, config.vocab_size)
            self.unembedding = nnx.Param(initial_value("unembedding", shape, config, rngs))

    def hidden(self, inputs_BN: Array, segment_ids_BN: Array | None = None) -> Array:
        """Token ids [B, N] to final-normed activations [B, N, D], of which `logits` makes predictions."""
        config = self.config
        dtype = jnp.dtype(config.compute_dtype)

        def run_block(block: Block, x_BND: Array, layer: Array | int) -> Array:
            return block(x_BND, segment_ids_BN, layer)

        if config.remat != "none":  # layer by layer: the backward pass holds what is inside one layer at a time
            run_block = jax.checkpoint(run_block, policy=REMAT[config.remat])

        def run_group(group: Group, x_BND: Array, first_layer: Array | int) -> Array:
            for i, block in enumerate(group.blocks()):
                x_BND = run_block(block, x_BND, first_layer + i)
            return x_BND

        table_VD = constrain(self.embedding[...].astype(dtype), "V D")
        x_BND = constrain(table_VD[inputs_BN], "B N D")
        size, groups = len(config.layer_pattern), config.num_groups
        if config.scan_layers:
            stacked = self.groups, 1 + size * jnp.arange(groups)
            x_BND, _ = jax.lax.scan(lambda x, group: (run_group(group[0], x, group[1]), None), x_BND, stacked)
        else:
            for g in range(groups):
                x_BND = run_group(jax.tree.map(lambda leaf, g=g: leaf[g], self.groups), x_BND, 1 + size * g)
        if hasattr(self, "remainder"):
            x_BND = run_group(self.remainder, x_BND, 1 + size * groups)
        return self.final_norm(x_BND)

    def logits(self, hidden_BND: Float[Array, "B N D"]) -> Float[Array, "B N V"]:
        """Float32 predictions of the next token, from `hidden`'s result."""
        table_DV = self.embedding[...].T if self.config.tie_embeddings else self.unembedding[...]
        table_DV = table_DV.astype(hidden_BND.dtype)
        logits_BNV = jnp.einsum("bnD,Dv->bnv", hidden_BND, table_DV, preferred_element_type=jnp.float32)
        return constrain(logits_BNV, "B N V")

    def __call__(
        self, inputs_BN: Int[Array, "B N"], segment_ids_BN: Int[Array, "B N"] | None = None
    ) -> Float[Array, "B N V"]:
        return self.logits(self.hidden(inputs_BN, segment_ids_BN))


@functools.cache
def _abstract(config: ModelConfig) -> tuple[Any, Parameters]:
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(params=jax.random.key(0))))
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def abstract_parameters(config: ModelConfig) -> Parameters:
    """The parameter tree as nested dictionaries of `jax.ShapeDtypeStruct`; allocates nothing."""
    return _abstract(config)[1]


def initialize(config: ModelConfig, key: Array) -> Parameters:
    """Initial parameters as nested dictionaries with string keys; the values are described in `model.init`."""
    return nnx.to_pure_dict(nnx.state(Transformer(config, rngs=nnx.Rngs(params=key)), nnx.Param))


def bind(config: ModelConfig, parameters: Parameters) -> Transformer:
    """The model with these parameters, which may be tracers: `bind(config, parameters)(inputs, segment_ids)`."""
    return nnx.merge(_abstract(config)[0], parameters)
