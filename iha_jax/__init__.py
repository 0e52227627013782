"""Interleaved Head Attention against multi-head attention: pretraining from scratch in JAX/Flax, fairly compared."""

__version__ = "0.1.0"
