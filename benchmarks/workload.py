"""What is measured: sizes, inputs, useful FLOPs and the trusted result of each attention mechanism.

Shapes: B batch, N tokens, H heads, d head width, P pseudo-heads, W window in tokens.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from configs import base
from iha_jax.accounting import flops_per_token
from iha_jax.config import ModelConfig, resolve
from iha_jax.executed import attention_flops, layer_work
from iha_jax.ops import apply_rope, dot_product_attention, interleaved_head_attention

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One size. `rope_theta` is None for no RoPE; MHA rotates by token, IHA by virtual position `n*P + p`."""

    batch: int
    tokens: int
    heads: int
    head_width: int
    pseudo_heads: int
    window: int
    dtype: str
    rope_theta: float | None
    backward: bool = True

    @property
    def itemsize(self) -> int:
        return 2 if self.dtype == "bfloat16" else 4

    @property
    def title(self) -> str:
        rope = "RoPE" if self.rope_theta else "no RoPE"
        direction = "forward and backward" if self.backward else "forward"
        return (
            f"B = {self.batch}, N = {self.tokens}, H = {self.heads}, d = {self.head_width}, P = {self.pseudo_heads}, "
            f"W = {self.window}, {self.dtype}, {rope}, {direction}"
        )


def matched_window(tokens: int, pseudo_heads: int) -> int:
    """`max(1, N // (2 P^2))`: a local IHA layer then has the visible pairs of a global MHA layer (paper, section 4)."""
    return max(1, tokens // (2 * pseudo_heads**2))


@dataclass(frozen=True)
class Mechanism:
    """`attend(workload, *inputs, implementation=...)`. Its implementation `trusted` is tested against the loops of
    `iha_jax.ops.reference`, and holds no whole score matrix, so that it runs at every size. `weights(workload)`: shapes
    and scales of inputs beyond q, k, v."""

    attend: Callable[..., jax.Array]
    trusted: str
    weights: Callable[[Workload], dict[str, tuple[tuple[int, ...], float]]] = lambda w: {}


def rotated(w: Workload, x: jax.Array) -> jax.Array:
    return x if w.rope_theta is None else apply_rope(x, theta=w.rope_theta)


def mha(w: Workload, q: jax.Array, k: jax.Array, v: jax.Array, **options: object) -> jax.Array:
    return dot_product_attention(rotated(w, q), rotated(w, k), v, **options)  # type: ignore[arg-type]


def mha_local(w: Workload, q: jax.Array, k: jax.Array, v: jax.Array, **options: object) -> jax.Array:
    return mha(w, q, k, v, window=w.window * w.pseudo_heads, **options)


def iha(w: Workload, *arrays: jax.Array, **options: object) -> jax.Array:
    return interleaved_head_attention(*arrays, rope_theta=w.rope_theta, **options)  # type: ignore[arg-type]


def iha_local(w: Workload, *arrays: jax.Array, **options: object) -> jax.Array:
    return iha(w, *arrays, window=w.window, **options)


def _mixing(w: Workload) -> dict[str, tuple[tuple[int, ...], float]]:
    shape, H, P = (w.heads, w.heads, w.pseudo_heads), w.heads, w.pseudo_heads
    return {
        "alpha_q": (shape, H**-0.5),
        "alpha_k": (shape, H**-0.5),
        "alpha_v": (shape, H**-0.5),
        "collapse": (shape, (H * P) ** -0.5),
    }


# Names are the layer kinds of `iha_jax.config`, so that the accounting knows them. mha_local sees W P tokens: as many
# keys as a pseudo-query of iha_local does.
MECHANISMS = {
    "mha": Mechanism(mha, "blockwise"),
    "mha_local": Mechanism(mha_local, "blockwise"),
    "iha": Mechanism(iha, "streaming", _mixing),
    "iha_local": Mechanism(iha_local, "streaming", _mixing),
}


@functools.cache
def inputs(w: Workload, mechanism: str) -> Arrays:
    """Float32 arrays whose values the workload's dtype represents exactly: q, k, v, weights, and last the cotangent."""
    rng = np.random.default_rng(0)
    shape = (w.batch, w.tokens, w.heads, w.head_width)
    shapes = {"q": (shape, 1.0), "k": (shape, 1.0), "v": (shape, 1.0)} | MECHANISMS[mechanism].weights(w)
    shapes["cotangent"] = (shape, 1.0)
    dtype = ml_dtypes.bfloat16 if w.dtype == "bfloat16" else np.float32
    return {
        name: (scale * rng.standard_normal(size, np.float32)).astype(dtype).astype(np.float32)
        for name, (size, scale) in shapes.items()
    }


def with_gradients(function: Callable[..., jax.Array], w: Workload) -> Callable[..., tuple[jax.Array, ...]]:
    """`(output, gradient of every input)` of `function(workload, *inputs)` from `(*inputs, cotangent)`; the output
    alone where the workload is forward only."""

    def both(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        *given, cotangent = arrays
        if not w.backward:
            return (function(w, *given),)
        out, pull = jax.vjp(functools.partial(function, w), *given)
        return (out, *pull(cotangent))

    return both


def result_names(w: Workload, mechanism: str) -> list[str]:
    """Names of what `with_gradients` returns."""
    given = [name for name in inputs(w, mechanism) if name != "cotangent"]
    return ["output", *(f"gradient of {name}" for name in given)] if w.backward else ["output"]


def trusted_results(w: Workload, mechanism: str) -> Arrays:
    """Output and gradients in float32 with full-precision matmuls, whatever the workload's dtype."""
    with jax.default_matmul_precision("highest"):
        attend = functools.partial(MECHANISMS[mechanism].attend, implementation=MECHANISMS[mechanism].trusted)
        step = jax.jit(with_gradients(attend, w))
        results = jax.device_get(step(*(jnp.asarray(x) for x in inputs(w, mechanism).values())))
    return dict(zip(result_names(w, mechanism), results, strict=True))


def tolerance(w: Workload) -> float:
    """Largest accepted error of a result, relative to its largest magnitude; accelerators multiply float32 in TF32 or
    bfloat16 passes unless told otherwise."""
    if w.dtype == "bfloat16":
        return 3e-2
    return 1e-4 if jax.default_backend() == "cpu" else 1e-2


@functools.cache
def model_config(w: Workload, mechanism: str) -> ModelConfig:
    """One layer of this kind and size, for the accounting."""
    config: Any = base.get_config()
    config.model.update(
        context_length=w.tokens,
        num_layers=1,
        num_heads=w.heads,
        width=w.heads * w.head_width,
        layer_pattern=(mechanism,),
    )
    config.model.window = min(w.tokens, w.window * w.pseudo_heads)
    config.model.iha.update(pseudo_heads=w.pseudo_heads, window=min(w.tokens, w.window))
    return resolve(config).model


def useful_flops(w: Workload, mechanism: str) -> float:
    """Scores of visible pairs, mixing and collapse, forward and (twice that) backward; no projections."""
    flops = flops_per_token(model_config(w, mechanism))
    return (3 if w.backward else 1) * w.batch * w.tokens * (flops.scores + flops.mixing)


def executed_flops(w: Workload, mechanism: str, implementation: str) -> float | None:
    """What an implementation computes: masked pairs of its blocks and what its backward pass recomputes included. None
    for the reference's backward pass, which nobody should time."""
    if implementation == "reference" and w.backward:
        return None
    model = model_config(w, mechanism)
    iha = dataclasses.replace(model.iha, implementation=implementation)
    model = dataclasses.replace(model, compute_dtype=w.dtype, implementation=implementation, iha=iha)
    work = layer_work(model, mechanism, batch_size=w.batch, training=w.backward, segments=False)
    return w.batch * sum(attention_flops(model, work))


def least_bytes(w: Workload, mechanism: str) -> int:
    """Bytes that any implementation moves to and from memory: every input read and every result written once, and for
    the backward pass inputs, output and cotangent read again."""
    arrays = inputs(w, mechanism)
    given = sum(x.size for name, x in arrays.items() if name != "cotangent")
    out = arrays["cotangent"].size
    return w.itemsize * (given + out + (2 * given + 2 * out if w.backward else 0))
