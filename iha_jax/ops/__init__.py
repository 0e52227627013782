"""Attention as pure functions on arrays: lift these into your own model. Imports with jax and numpy alone."""

from iha_jax.ops.attention_weights import attention_weights, interleaved_attention_weights
from iha_jax.ops.differential import differential_attention
from iha_jax.ops.fused_mixing import fuse_mixing
from iha_jax.ops.implementations import Features, target_platform
from iha_jax.ops.interleaved import (
    collapse_heads,
    interleave,
    interleaved_head_attention,
    mix_heads,
    resolve_interleaved_implementation,
)
from iha_jax.ops.query_blocks import resolve_blocked_implementation
from iha_jax.ops.rope import apply_rope
from iha_jax.ops.simplicial import simplicial_attention
from iha_jax.ops.softmax_attention import dot_product_attention, resolve_attention_implementation
from iha_jax.ops.talking_heads import talking_heads_attention
from iha_jax.ops.virtual_sequence import tokens_in_reach

__all__ = [
    "Features",
    "apply_rope",
    "attention_weights",
    "collapse_heads",
    "differential_attention",
    "dot_product_attention",
    "fuse_mixing",
    "interleave",
    "interleaved_attention_weights",
    "interleaved_head_attention",
    "mix_heads",
    "resolve_attention_implementation",
    "resolve_blocked_implementation",
    "resolve_interleaved_implementation",
    "simplicial_attention",
    "talking_heads_attention",
    "target_platform",
    "tokens_in_reach",
]
