"""Fused kernels, one device kind a file; `iha_jax.ops` imports them only where they are asked for."""
