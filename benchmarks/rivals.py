"""Public implementations that ours are measured against: each a function `(workload, *inputs) -> output`.

Nothing of this is imported by `iha_jax`. A rival that cannot run here raises `Skip` with the reason.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks.workload import Workload, rotated
from iha_jax.ops import collapse_heads, interleave, mix_heads

# (q, k, v, window in keys) -> output: causal softmax attention of a public library
Attend = Callable[[jax.Array, jax.Array, jax.Array, int | None], jax.Array]


class Skip(Exception):  # noqa: N818 - not an error: the reason is printed in the table
    """A candidate is not measured here; the message is the reason."""


def jax_nn(implementation: str, q: jax.Array, k: jax.Array, v: jax.Array, window: int | None) -> jax.Array:
    """`jax.nn.dot_product_attention`; `local_window_size` does not count the query's own key."""
    if implementation == "cudnn" and jax.default_backend() != "gpu":
        raise Skip(f"cuDNN needs a GPU, this is a {jax.default_backend()}")
    size = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=True,
        local_window_size=size,
        implementation=implementation,  # type: ignore[arg-type]
    )


def tokamax(implementation: str, q: jax.Array, k: jax.Array, v: jax.Array, window: int | None) -> jax.Array:
    try:
        import tokamax  # pyright: ignore[reportMissingImports]
        from absl import flags
    except Exception as error:
        raise Skip(f"tokamax does not import ({error}); it is in the extra 'benchmarks'") from error
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # else tokamax reads our command line
    if window is not None and jax.default_backend() == "tpu":
        raise Skip("tokamax has no sliding window on TPU and runs dense there")
    size = None if window is None else (window - 1, 0)
    try:
        return tokamax.dot_product_attention(
            q,
            k,
            v,
            is_causal=True,
            local_window_size=size,
            implementation=implementation,  # type: ignore[arg-type]
        )
    except NotImplementedError as error:
        raise Skip(f"tokamax {implementation}: {error}") from error


def multi_head(attend: Attend, w: Workload, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return attend(rotated(w, q), rotated(w, k), v, None)


def multi_head_local(attend: Attend, w: Workload, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return attend(rotated(w, q), rotated(w, k), v, w.window * w.pseudo_heads)


def _virtual_sequence(attend: Attend, w: Workload, window: int | None, *arrays: jax.Array) -> jax.Array:
    """IHA as the definition reads: all N*P pseudo-tokens of every head, then one ordinary attention over them."""
    q, k, v, alpha_q, alpha_k, alpha_v, collapse = arrays
    queries = rotated(w, interleave(mix_heads(q, alpha_q)))  # position of a row is n*P + p: the virtual one
    keys = rotated(w, interleave(mix_heads(k, alpha_k)))
    out = attend(queries, keys, interleave(mix_heads(v, alpha_v)), window)
    B, N, H, d = q.shape
    return collapse_heads(jnp.swapaxes(out.reshape(B, N, w.pseudo_heads, H, d), 2, 3), collapse)


def virtual_sequence(attend: Attend, w: Workload, *arrays: jax.Array) -> jax.Array:
    return _virtual_sequence(attend, w, None, *arrays)


def virtual_sequence_local(attend: Attend, w: Workload, *arrays: jax.Array) -> jax.Array:
    return _virtual_sequence(attend, w, w.window * w.pseudo_heads, *arrays)


# Which of the above makes a library's attention into each mechanism.
FORMS = {
    "mha": multi_head,
    "mha_local": multi_head_local,
    "iha": virtual_sequence,
    "iha_local": virtual_sequence_local,
}

LIBRARIES: dict[str, Attend] = {
    "jax.nn xla": functools.partial(jax_nn, "xla"),
    "jax.nn cudnn": functools.partial(jax_nn, "cudnn"),
    "tokamax xla": functools.partial(tokamax, "xla"),
    "tokamax xla_chunked": functools.partial(tokamax, "xla_chunked"),
    "tokamax mosaic": functools.partial(tokamax, "mosaic"),
    "tokamax triton": functools.partial(tokamax, "triton"),
}
