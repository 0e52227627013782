"""Norm and feed-forward layers. Shapes: B batch, N tokens, D model width, F feed-forward width."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from iha_jax.array_types import Array, Float
from iha_jax.config import ModelConfig
from iha_jax.model.init import initial_value

WEIGHT_PRODUCT = "weight product"  # what `remat = "dots"` keeps for the backward pass


def weight_product(subscripts: str, x: Array, weights: Array) -> Array:
    """`einsum(subscripts, x, weights)` in x's type, named for `remat` policies."""
    return checkpoint_name(jnp.einsum(subscripts, x, weights.astype(x.dtype)), WEIGHT_PRODUCT)


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + epsilon) * scale` over the last axis, computed in float32, returned in x's dtype."""

    def __init__(self, name: str, width: int, config: ModelConfig, *, epsilon: float | None = None, rngs: nnx.Rngs):
        self.epsilon = config.norm_epsilon if epsilon is None else epsilon
        self.scale = nnx.Param(initial_value(f"{name}/scale", (width,), config, rngs))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x32 = x.astype(jnp.float32)
        inverse_rms = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.epsilon)
        return (x32 * inverse_rms * self.scale[...]).astype(x.dtype)


class Mlp(nnx.Module):
    """Feed-forward layer without biases: `gelu(x U) V`, or with SwiGLU `(silu(x G) * (x U)) V`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, F = config.width, config.mlp_width
        self.up = nnx.Param(initial_value("mlp/up", (D, F), config, rngs))
        if config.mlp == "swiglu":
            self.gate = nnx.Param(initial_value("mlp/gate", (D, F), config, rngs))
        self.down = nnx.Param(initial_value("mlp/down", (F, D), config, rngs))
        self.kind = config.mlp

    def __call__(self, x_BND: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        up_BNF = weight_product("bnD,DF->bnF", x_BND, self.up[...])
        if self.kind == "swiglu":
            hidden_BNF = jax.nn.silu(weight_product("bnD,DF->bnF", x_BND, self.gate[...])) * up_BNF
        else:
            hidden_BNF = jax.nn.gelu(up_BNF)
        return weight_product("bnF,FD->bnD", hidden_BNF, self.down[...])
