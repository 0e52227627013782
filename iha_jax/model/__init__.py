"""The decoder-only transformer. Imports with jax, flax and numpy alone."""

from iha_jax.model.attention import ATTENTION, InterleavedHeadAttention, MultiHeadAttention
from iha_jax.model.transformer import Transformer, abstract_parameters, bind, initialize

__all__ = [
    "ATTENTION",
    "InterleavedHeadAttention",
    "MultiHeadAttention",
    "Transformer",
    "abstract_parameters",
    "bind",
    "initialize",
]
