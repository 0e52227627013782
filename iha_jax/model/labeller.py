"""A sequence labeller: one bidirectional layer of any registered attention, a scalar logit a token.

The small encoder of the paper's relation-composition experiment (appendix D), not the language model: learned positions
instead of RoPE, LayerNorm, and biases in all linear maps. Biases are put around the attention classes of `ATTENTION`,
which have none. Shapes: B batch, N tokens, D model width, H heads, K key/value heads, d head width.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from iha_jax.array_types import Array, Float, Int
from iha_jax.config import IHA_KINDS, SIMPLICIAL_KINDS, ModelConfig
from iha_jax.model.attention import ATTENTION, MultiHeadAttention, SimplicialAttention
from iha_jax.model.init import EMBEDDING_STD
from iha_jax.model.transformer import Parameters


class OutputBias(MultiHeadAttention):
    """Attention whose output projection has a bias."""

    def __init__(self, config: ModelConfig, kind: str, *, rngs: nnx.Rngs):
        super().__init__(config, kind, rngs=rngs)
        self.output_bias = nnx.Param(jnp.zeros(config.width))

    def project_back(self, out_BNHd: Array) -> Array:
        return super().project_back(out_BNHd) + self.output_bias[...]


class Biases(OutputBias):
    """The same for queries, keys and values, before whatever the mechanism does with them."""

    def __init__(self, config: ModelConfig, kind: str, *, rngs: nnx.Rngs):
        super().__init__(config, kind, rngs=rngs)
        H, K, d = config.num_heads, config.num_kv_heads, config.head_width
        self.query_bias = nnx.Param(jnp.zeros((H, d)))
        self.key_bias = nnx.Param(jnp.zeros((K, d)))
        self.value_bias = nnx.Param(jnp.zeros((K, d)))

    def project(self, x_BND: Array) -> tuple[Array, Array, Array]:
        q_BNHd, k_BNKd, v_BNKd = super().project(x_BND)
        return q_BNHd + self.query_bias[...], k_BNKd + self.key_bias[...], v_BNKd + self.value_bias[...]


class PairBiases(Biases, SimplicialAttention):
    """The same for the second keys and values of 2-simplicial attention."""

    def __init__(self, config: ModelConfig, kind: str, *, rngs: nnx.Rngs):
        super().__init__(config, kind, rngs=rngs)
        K, d = config.num_kv_heads, config.head_width
        self.second_key_bias = nnx.Param(jnp.zeros((K, d)))
        self.second_value_bias = nnx.Param(jnp.zeros((K, d)))

    def project_second(self, x_BND: Array) -> tuple[Array, Array]:
        k2_BNKd, v2_BNKd = super().project_second(x_BND)
        return k2_BNKd + self.second_key_bias[...], v2_BNKd + self.second_value_bias[...]


@functools.cache
def with_biases(kind: str) -> type[MultiHeadAttention]:
    """The class of `ATTENTION[kind]` with biases on its projections: all, or for IHA that of the output alone.

    The paper's parameter counts fit an IHA without biases on queries, keys and values.
    """
    biases = OutputBias if kind in IHA_KINDS else PairBiases if kind in SIMPLICIAL_KINDS else Biases
    return type(f"{ATTENTION[kind].__name__}WithBiases", (biases, ATTENTION[kind]), {})


class Labeller(nnx.Module):
    """`x = E[token] + P[place]; x += attention(norm(x)); x += W2 gelu(W1 norm(x)); logit = w x`, one a token.

    Kind of attention, widths and vocabulary are those of `config`, whose first layer this is; `context_length` is the
    number of places. All linear maps have biases (see `with_biases`). Float32.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, F, kind = config.width, config.mlp_width, config.layer_kinds[0]
        small, linear = jax.nn.initializers.normal(EMBEDDING_STD), functools.partial(nnx.Linear, rngs=rngs)
        self.token_embedding = nnx.Embed(config.vocab_size, D, embedding_init=small, rngs=rngs)
        self.position_embedding = nnx.Embed(config.context_length, D, embedding_init=small, rngs=rngs)
        self.attention_norm = nnx.LayerNorm(D, epsilon=config.norm_epsilon, rngs=rngs)
        self.attention = with_biases(kind)(config, kind, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(D, epsilon=config.norm_epsilon, rngs=rngs)
        self.mlp_up, self.mlp_down, self.head = linear(D, F), linear(F, D), linear(D, 1)

    def __call__(
        self, tokens_BN: Int[Array, "B N"], segment_ids_BN: Int[Array, "B N"] | None = None
    ) -> Float[Array, "B N"]:
        """The logit of label 1 for every token, each seeing all tokens of its segment; segment 0 is padding."""
        x_BND = self.token_embedding(tokens_BN) + self.position_embedding(jnp.arange(tokens_BN.shape[1]))
        x_BND = x_BND + self.attention(self.attention_norm(x_BND), segment_ids_BN, 1)
        x_BND = x_BND + self.mlp_down(jax.nn.gelu(self.mlp_up(self.mlp_norm(x_BND))))
        return self.head(x_BND)[..., 0]


@functools.cache
def _graph(config: ModelConfig) -> Any:
    return nnx.split(nnx.eval_shape(lambda: Labeller(config, rngs=nnx.Rngs(params=jax.random.key(0)))))[0]


def initialize_labeller(config: ModelConfig, key: Array) -> Parameters:
    """Initial parameters as nested dictionaries; attention as in `model.init`, the rest by flax, biases 0."""
    return nnx.to_pure_dict(nnx.state(Labeller(config, rngs=nnx.Rngs(params=key)), nnx.Param))


def bind_labeller(config: ModelConfig, parameters: Parameters) -> Labeller:
    """The labeller with these parameters, which may be tracers; float32, without a mesh."""
    return nnx.merge(_graph(config), parameters)
