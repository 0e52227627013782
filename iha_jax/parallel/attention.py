"""Attention over a mesh: each device runs the operation on its own rows and heads, whatever kernel that is.

Rows of a batch never talk to each other, and heads only where a mechanism mixes them. So attention stands inside
`shard_map`: no compiler has to guess how a scan or a kernel splits, and the exchanges are the ones written here:

- MHA: none.
- IHA over `tensor`: every pseudo-head is a mix of all H heads. A device gathers q, k and v of all heads (3 B N H d
  values, the size of MHA's own q, k and v), makes the pseudo-heads of its own H/T heads alone, and, for a global
  collapse, the partial outputs of all heads are summed and scattered (B N H d values). Mixing on the source side
  instead would exchange pseudo-heads, P times as much.

Without a mesh, or on a mesh of one device, all of this is the plain operation.
"""

from collections.abc import Callable, Sequence

import jax

from iha_jax.array_types import Array
from iha_jax.parallel.rules import activation_spec, mesh_in_use

HEADS = "tensor"


def on_each_device(function: Callable[..., Array], arguments: Sequence[tuple[Array | None, str]], result: str) -> Array:
    """`function(*arrays)`, each device on its part: `arguments` are (array or None, dimensions such as "B N H d")."""
    mesh = mesh_in_use()
    if mesh is None:
        return function(*(x for x, _ in arguments))
    there = [x is not None for x, _ in arguments]

    def local(*arrays: Array) -> Array:
        remaining = iter(arrays)
        return function(*(next(remaining) if found else None for found in there))

    specs = tuple(activation_spec(dimensions) for x, dimensions in arguments if x is not None)
    # No check of varying axes: loops inside the operations start from constants.
    split = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=activation_spec(result), check_vma=False)
    return split(*(x for x, _ in arguments if x is not None))


def heads_split() -> bool:
    """Whether heads are split over devices here."""
    mesh = mesh_in_use()
    return mesh is not None and mesh.shape[HEADS] > 1


def gather_heads(x_BNHd: Array) -> Array:
    """[B, N, H/T, d] to [B, N, H, d], inside `on_each_device`."""
    return jax.lax.all_gather(x_BNHd, HEADS, axis=2, tiled=True)


def sum_and_scatter_heads(x_BNHd: Array) -> Array:
    """Partial sums [B, N, H, d] of every device to the total's own heads [B, N, H/T, d], inside `on_each_device`."""
    return jax.lax.psum_scatter(x_BNHd, HEADS, scatter_dimension=2, tiled=True)
