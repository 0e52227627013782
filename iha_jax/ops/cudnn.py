"""Softmax attention by cuDNN's flash kernel on NVIDIA GPUs, through `jax.nn.dot_product_attention`.

Not yet run on hardware by this project: what is tested is the mapping of arguments onto the kernel's descriptor in the
program lowered for CUDA (mask, window, scale), and the refusals.

A window of W tokens is the pair `(W - 1, 0)` of `jax.nn`, which leaves the query's own token out of the count; the
descriptor then says W, the own token included, and only together with a causal mask. Packed segments are refused:
the public function has no segment ids, its boolean mask is dense (`[B, N, N]` in memory, and again as a gradient), and
cuDNN's packed layout is reached through private modules of jax alone. Values must be as wide as keys, so wider ones
(differential attention: 2d) are cut into parts of that width, one call each: every part has the same softmax, which is
computed once for each.

Shapes: B batch, N tokens, H query heads, K key/value heads, d head width, e value width, a multiple of d.
"""

import jax
import jax.numpy as jnp

from iha_jax.array_types import Array, Float


def cudnn_attention(
    q: Float[Array, "B N H d"],
    k: Float[Array, "B N K d"],
    v: Float[Array, "B N K e"],
    *,
    causal: bool,
    window: int | None,
) -> Float[Array, "B N H e"]:
    """`dot_product_attention` without segments; bfloat16 or float16 in, softmax in float32 inside.

    Raises:
      ValueError: at trace time, when jax finds no cuDNN or one that cannot run the call.
    """

    def attend(part: Array) -> Array:
        return jax.nn.dot_product_attention(
            q,
            k,
            part,
            is_causal=causal,
            local_window_size=None if window is None else (window - 1, 0),
            implementation="cudnn",
        )

    try:
        parts = [attend(part) for part in jnp.split(v, v.shape[-1] // k.shape[-1], axis=-1)]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)
    except RuntimeError as error:  # NotImplementedError is one
        if isinstance(error, jax.errors.JaxRuntimeError):
            raise
        raise ValueError(f"implementation = 'cudnn': {error}; expected 'blockwise' here") from error
