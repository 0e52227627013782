"""A 32-bit fingerprint of every array of a state, the same however the array is sharded.

Element i, with bits b, contributes `mix(b xor i * c)`; a fingerprint is the sum of the contributions modulo 2^32. `mix`
is a bijection of 32 bits (MurmurHash3's finalizer), so one changed element always changes the sum; any other change,
elements or arrays swapped included, goes unnoticed with a chance of 2^-32. Sums of integers do not depend on their
order, and so not on the mesh. The number of elements is not in the sum: shapes are compared by name before.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from iha_jax.array_types import Array

_WORD = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def fingerprint(x: Array) -> Array:
    """uint32 [] of the values of an array of any shape; elements of 8 bytes count as two."""
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = lax.bitcast_convert_type(x, _WORD[min(x.dtype.itemsize, 4)]).astype(jnp.uint32)
    z = bits ^ (_linear_index(bits.shape) * jnp.uint32(0x9E3779B1))
    z = (z ^ (z >> 16)) * jnp.uint32(0x85EBCA6B)
    z = (z ^ (z >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(z ^ (z >> 16), dtype=jnp.uint32)


def _linear_index(shape: tuple[int, ...]) -> Array:
    """Row-major position of every element, modulo 2^32."""
    index, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        index += lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    return index


def is_finite(x: Array) -> Array:
    """bool []: no NaN and no infinity; True of integers."""
    return jnp.isfinite(jnp.max(jnp.abs(x))) if x.size and jnp.issubdtype(x.dtype, jnp.floating) else jnp.array(True)


@jax.jit
def _inspect(tree: Any) -> tuple[Any, Any]:
    return jax.tree.map(fingerprint, tree), jax.tree.map(is_finite, tree)


def inspect(named: dict[str, Array]) -> tuple[dict[str, int], list[str]]:
    """(fingerprint by name, names of the arrays that are not finite). Waits for the arrays."""
    # One call for all arrays: they are read at once, where they are, whatever their sharding.
    prints, finite = jax.device_get(_inspect(named))
    return {name: int(x) for name, x in prints.items()}, sorted(n for n, ok in finite.items() if not np.asarray(ok))
