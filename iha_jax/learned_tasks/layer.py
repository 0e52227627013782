"""The layers of the theorems with weights to be learned: one of attention on `[x, I]`, then a linear map or an MLP.

Its forward is that of `iha_jax.theory.layers`, so every construction of the theory is a setting of its parameters.
Shapes: B batch, N tokens, D = r + N width of a token, H heads, d query and key width, e value width, F MLP width.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from iha_jax.array_types import Array, Float
from iha_jax.theory.layers import (
    HeadWeights,
    Mixing,
    interleaved_layer,
    linear_attention,
    multi_head_layer,
    softmax_attention,
)

Parameters = dict[str, Any]
Shapes = dict[str, dict[str, tuple[int, ...]]]
PROJECTIONS = ("query", "key", "value")
MIXING = ("alpha_query", "alpha_key", "alpha_value", "collapse")  # the names that the optimizer knows them by


@dataclass(frozen=True)
class Layer:
    """`head(concat_h attention(x)[h])`, at every token alike.

    Attention is MHA, or IHA with P = H pseudo-heads and the global collapse; it has no output projection, mask or RoPE.
    With `softmax`, scores are scaled by `1 / sqrt(d)` and the head is an MLP of width `mlp_width`; without, attention
    is linear and the head is `W a`.
    """

    interleaved: bool
    heads: int
    width: int  # D
    key_width: int  # d
    value_width: int  # e
    outputs: int
    softmax: bool
    mlp_width: int = 0

    @property
    def shapes(self) -> Shapes:
        H, D, inner = self.heads, self.width, self.heads * self.value_width
        widths = (self.key_width, self.key_width, self.value_width)
        attention: dict[str, tuple[int, ...]] = {
            name: (H, D, width) for name, width in zip(PROJECTIONS, widths, strict=True)
        }
        if self.interleaved:
            attention |= dict.fromkeys(MIXING, (H, H, H))
        head = mlp_shapes(inner, self.mlp_width, self.outputs) if self.softmax else linear_shapes(inner, self.outputs)
        return {"attention": attention, **head}

    @property
    def attention_parameters(self) -> int:
        """Mixing included; there is no output projection."""
        return sum(math.prod(shape) for shape in self.shapes["attention"].values())

    def initialize(self, key: Array) -> Parameters:
        return initialize(self.shapes, key)

    def __call__(self, parameters: Parameters, x_BNr: Float[Array, "B N r"]) -> Float[Array, "B N o"]:
        """Of x, to which the positions I are appended."""
        B, N, _ = x_BNr.shape
        x_BND = jnp.concatenate([x_BNr, jnp.broadcast_to(jnp.eye(N), (B, N, N))], axis=-1)
        attention, attend = parameters["attention"], softmax_attention if self.softmax else linear_attention
        weights = HeadWeights(*(attention[name] for name in PROJECTIONS))
        if self.interleaved:
            out = interleaved_layer(x_BND, weights, Mixing(*(attention[name] for name in MIXING)), attend)
        else:
            out = multi_head_layer(x_BND, weights, attend)
        out = out.reshape(B, N, -1)
        return mlp(parameters, out) if self.softmax else out @ parameters["output"]["kernel"]


@dataclass(frozen=True)
class GivenShifts:
    """The same MLP on all cyclic shifts of x [B, N, 1], which attention would have to find: nothing else is learned."""

    tokens: int
    mlp_width: int
    value_width: int = 0
    attention_parameters: int = 0

    def initialize(self, key: Array) -> Parameters:
        return initialize(mlp_shapes(self.tokens, self.mlp_width, 1), key)

    def __call__(self, parameters: Parameters, x_BNr: Float[Array, "B N r"]) -> Float[Array, "B N o"]:
        shifts = [jnp.roll(x_BNr[..., 0], -steps, axis=1) for steps in range(self.tokens)]
        return mlp(parameters, jnp.stack(shifts, axis=-1))


def linear_shapes(inputs: int, outputs: int) -> Shapes:
    return {"output": {"kernel": (inputs, outputs)}}


def mlp_shapes(inputs: int, width: int, outputs: int) -> Shapes:
    up: dict[str, tuple[int, ...]] = {"kernel": (inputs, width), "bias": (width,)}
    return {"mlp_up": up, "mlp_down": {"kernel": (width, outputs), "bias": (outputs,)}}


def mlp(parameters: Parameters, x: Array) -> Array:
    """`W2 relu(W1 x + b1) + b2`."""
    up, down = parameters["mlp_up"], parameters["mlp_down"]
    return jax.nn.relu(x @ up["kernel"] + up["bias"]) @ down["kernel"] + down["bias"]


def initialize(shapes: Shapes, key: Array) -> Parameters:
    """Float32: projections and kernels N(0, 1/sqrt(fan_in)), alphas N(0, 1/sqrt(H)), collapse N(0, 1/H), biases 0.

    Alphas are random, since pseudo-heads that start as copies would stay copies for ever.
    """
    found: Parameters = {}
    for part, values in shapes.items():
        found[part] = {}
        for name, shape in values.items():
            key, own = jax.random.split(key)
            fan_in = {"kernel": shape[0], "collapse": shape[0] ** 2}.get(name, shape[-2 if name in PROJECTIONS else 0])
            noise = jax.random.normal(own, shape, jnp.float32) / math.sqrt(fan_in)
            found[part][name] = jnp.zeros_like(noise) if name == "bias" else noise
    return found
