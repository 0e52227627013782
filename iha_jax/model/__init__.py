"""The transformer. Imports with jax, flax and numpy alone."""

from iha_jax.model.attention import (
    ATTENTION,
    DifferentialAttention,
    FusedMixingAttention,
    InterleavedHeadAttention,
    MultiHeadAttention,
    SimplicialAttention,
    TalkingHeadsAttention,
)
from iha_jax.model.transformer import Transformer, abstract_parameters, bind, initialize

__all__ = [
    "ATTENTION",
    "DifferentialAttention",
    "FusedMixingAttention",
    "InterleavedHeadAttention",
    "MultiHeadAttention",
    "SimplicialAttention",
    "TalkingHeadsAttention",
    "Transformer",
    "abstract_parameters",
    "bind",
    "initialize",
]
