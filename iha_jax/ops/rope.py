"""Rotary position embeddings (RoPE), half-split form, with angles from float64.

`rotate(x)_j = x_j cos(a_j) - x_{j+d/2} sin(a_j)`, `rotate(x)_{j+d/2} = x_{j+d/2} cos(a_j) + x_j sin(a_j)` for
`j < d/2`, at angle `a_j = position * theta^(-2j/d)` (radians). A float32 product `position * frequency` would be off by
1e-2 in the cosine at position 163 839, so cosines and sines are made by numpy in float64 at trace time.
Shapes: B batch, N tokens, H heads, d head width.
"""

import jax
import jax.numpy as jnp
import numpy as np

from iha_jax.array_types import Array, Float, Int

_FINE = 1024  # positions tabled directly; longer runs are made of coarse and fine angles


def rotation(positions: np.ndarray, width: int, theta: float, dtype: jax.typing.DTypeLike) -> tuple[Array, Array]:
    """Cosines and sines `[len(positions), width / 2]` of static positions, computed in float64, rounded to `dtype`."""
    angles = np.asarray(positions, np.float64)[:, None] * theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    return jnp.asarray(np.cos(angles), dtype), jnp.asarray(np.sin(angles), dtype)


def rotation_of_range(
    count: int, stride: int, width: int, theta: float, dtype: jax.typing.DTypeLike
) -> tuple[Array, Array]:
    """`rotation` at 0, stride, 2 stride, ...; for long ranges by `cos(a + b) = cos a cos b - sin a sin b`, so that the
    compiled program holds two small tables rather than one of `count` rows."""
    if count <= _FINE:
        return rotation(np.arange(count) * stride, width, theta, dtype)
    coarse = np.arange(-(-count // _FINE)) * (_FINE * stride)
    cos_a, sin_a = (x[:, None] for x in rotation(coarse, width, theta, dtype))
    cos_b, sin_b = rotation(np.arange(_FINE) * stride, width, theta, dtype)
    cos, sin = cos_a * cos_b - sin_a * sin_b, sin_a * cos_b + cos_a * sin_b
    return cos.reshape(-1, width // 2)[:count], sin.reshape(-1, width // 2)[:count]


def rotation_at(
    positions: Int[Array, "..."], limit: int, stride: int, width: int, theta: float, dtype: jax.typing.DTypeLike
) -> tuple[Array, Array]:
    """Rows `positions` (a traced array of integers below `limit`) of `rotation_of_range`: `[..., width / 2]` twice."""
    if limit <= _FINE:
        cos, sin = rotation(np.arange(limit) * stride, width, theta, dtype)
        return cos[positions], sin[positions]
    coarse = np.arange(-(-limit // _FINE)) * (_FINE * stride)
    cos_a, sin_a = (x[positions // _FINE] for x in rotation(coarse, width, theta, dtype))
    cos_b, sin_b = (x[positions % _FINE] for x in rotation(np.arange(_FINE) * stride, width, theta, dtype))
    return cos_a * cos_b - sin_a * sin_b, sin_a * cos_b + cos_a * sin_b


def rotate(x: Float[Array, "... d"], cos: Float[Array, "..."], sin: Float[Array, "..."]) -> Float[Array, "... d"]:
    """Rotates the pairs (j, j + d/2) of the last axis; `cos` and `sin` broadcast against `x[..., : d // 2]`.

    Written as `x cos + (x with its halves swapped) (-sin, sin)`: joining computed halves runs element by element on a
    CPU, and so does its derivative."""
    cos, sin = cos.astype(working_dtype(x))[..., None, :], sin.astype(working_dtype(x))[..., None, :]
    halves = x.reshape(*x.shape[:-1], 2, x.shape[-1] // 2)
    turned = halves * cos + jnp.flip(halves, axis=-2) * (sin * jnp.asarray([[-1], [1]], sin.dtype))
    return turned.reshape(x.shape).astype(x.dtype)


def working_dtype(x: Array) -> jnp.dtype:
    """Float32 for half precision, else the array's own dtype: what angles, scores and softmax are computed in."""
    return jnp.promote_types(x.dtype, jnp.float32)


def apply_rope(
    x: Float[Array, "B N H d"], *, theta: float, positions: np.ndarray | None = None
) -> Float[Array, "B N H d"]:
    """Rotates queries or keys by their positions, `0 .. N-1` unless given (static numpy integers `[N]`).

    Raises:
      ValueError: for another rank, an odd width, integers, a non-positive `theta`, or `positions` of another length.
    """
    if x.ndim != 4 or x.shape[-1] % 2:
        raise ValueError(f"x has shape {x.shape}; expected [B, N, H, d] with an even head width d")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x has dtype {x.dtype}; expected a floating-point dtype")
    if not theta > 0:
        raise ValueError(f"theta = {theta}; expected a number above 0")
    N, width, dtype = x.shape[1], x.shape[-1], working_dtype(x)
    if positions is None:
        cos, sin = rotation_of_range(N, 1, width, theta, dtype)
    else:
        positions = np.asarray(positions)
        if positions.shape != (N,):
            raise ValueError(f"positions has shape {positions.shape}; expected ({N},), one a token of x {x.shape}")
        cos, sin = rotation(positions, width, theta, dtype)
    return rotate(x, cos[None, :, None], sin[None, :, None])
