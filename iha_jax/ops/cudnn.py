"""Softmax attention by cuDNN's flash kernel on NVIDIA GPUs, through `jax.nn.dot_product_attention`.

Not yet run on hardware by this project: what is tested is the mapping of arguments onto the kernel's descriptor in the
program lowered for CUDA (mask, window, scale), and the refusals.

A window of W tokens is the pair `(W - 1, 0)` of `jax.nn`, which leaves the query's own token out of the count; the
descriptor then says W, the own token included, and only together with a causal mask. Packed segments are refused:
the public function has no segment ids, its boolean mask is dense (`[B, N, N]` in memory, and again as a gradient), and
cuDNN's packed layout is reached through private modules of jax alone.

Shapes: B batch, N tokens, H query heads, K key/value heads, d head width.
"""

import jax

from iha_jax.array_types import Array, Float


def cudnn_attention(
    q: Float[Array, "B N H d"],
    k: Float[Array, "B N K d"],
    v: Float[Array, "B N K d"],
    *,
    causal: bool,
    window: int | None,
) -> Float[Array, "B N H d"]:
    """`dot_product_attention` without segments; bfloat16 or float16 in, softmax in float32 inside.

    Raises:
      ValueError: at trace time, when jax finds no cuDNN or one that cannot run the call.
    """
    try:
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            is_causal=causal,
            local_window_size=None if window is None else (window - 1, 0),
            implementation="cudnn",
        )
    except RuntimeError as error:  # NotImplementedError is one
        if isinstance(error, jax.errors.JaxRuntimeError):
            raise
        raise ValueError(f"implementation = 'cudnn': {error}; expected 'blockwise' here") from error
