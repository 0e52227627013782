"""Attention as pure functions on arrays: lift these into your own model. Imports with jax and numpy alone."""

from iha_jax.ops.implementations import Features, target_platform
from iha_jax.ops.interleaved import (
    collapse_heads,
    interleave,
    interleaved_head_attention,
    mix_heads,
    resolve_interleaved_implementation,
)
from iha_jax.ops.rope import apply_rope
from iha_jax.ops.softmax_attention import dot_product_attention, resolve_attention_implementation

__all__ = [
    "Features",
    "apply_rope",
    "collapse_heads",
    "dot_product_attention",
    "interleave",
    "interleaved_head_attention",
    "mix_heads",
    "resolve_attention_implementation",
    "resolve_interleaved_implementation",
    "target_platform",
]
