"""Attention over a mesh: each device runs the operation on its own rows and heads, whatever kernel that is.

Rows of a batch never talk to each other, heads only where a mechanism mixes them, tokens only where they see each
other. So attention stands inside `shard_map`: no compiler has to guess how a scan or a kernel splits, and the exchanges
are the ones written here. B N H d counts what one device's rows hold, all tokens and heads; K key/value heads.

Over `tensor` (T devices) heads are split:

- MHA: nothing.
- IHA: every pseudo-head is a mix of all H heads.

  - Local layers (`swap_tokens`): all-to-all. Each device gives away its heads of the other devices' tokens and gets all
    heads of its own N/T tokens (B N (H + 2 K) d / T values), then their halo from its neighbors, as over `context`
    below; it mixes, attends and collapses those tokens alone and gives the outputs back (B N H d / T values).
  - Global layers: a device gathers q, k and v of all heads (B N (H + 2 K) d values, the size of MHA's own), makes the
    pseudo-heads of its own H/T heads alone, and, for a global collapse, the partial outputs of all heads are summed and
    scattered (B N H d values). Mixing on the source side instead would exchange pseudo-heads, P times as much.

Over `context` (C devices) tokens are split, N/C a device, side by side:

- Local layers (`halo`): keys, values and segment ids of the W tokens in reach come from the neighbor before (and after,
  if not causal): 2 B W K d values, before any mixing, whatever N is. A reach longer than N/C tokens is passed on from
  neighbor to neighbor, ceil(W C / N) times. Tokens that a row does not have are padding (segment 0). The operation
  also computes the queries of the halo, whose outputs are dropped: 1 + W C / N times the work.
- Global layers (`swap_heads`): all-to-all. Each device gives away its tokens of the other devices' heads and gets all N
  tokens of its own share of the heads (B N (H + 2 K) d / C values), attends by any kernel, and gives the outputs back
  (B N H d / C values). Heads that do not divide over the devices are filled up with zeros (20 heads on 8 devices run as
  24); key heads are repeated only as often as it takes to divide. Segment ids, one integer a token, are gathered.
  Gathering keys and values instead exchanges 2 B N K d values, less only where K (C - 1) < H, but holds whole rows on
  each device, needs kernels that know where their queries stand, and leaves the last device of a causal row with almost
  twice the mean work.
- Global IHA (`share_heads`): q, k and v of whole rows are gathered (B N (H + 2 K) d values), unmixed, each device makes
  the pseudo-heads of its share of the heads, and the outputs are summed and scattered over tokens (global collapse,
  B N H d values) or swapped back (per head).
- Talking heads mix the logits of all heads: refused (`rules.check_split`).

Backward each exchange is its own transpose: halos go back and are added, a gather becomes a sum and scatter, an
all-to-all the opposite one. Where `remat` recomputes attention, it exchanges again. Without a mesh, or on a mesh of one
device, all of this is the plain operation.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from iha_jax.array_types import Array
from iha_jax.parallel.rules import activation_spec, mesh_in_use, shards

HEADS, TOKENS = "tensor", "context"  # in the order of the mesh: devices of HEADS are next to each other

Argument = tuple[Array | None, str]  # and its dimensions, such as "B N H d"
Exchange = Callable[[Callable[..., Array], list[Argument]], Array]


def on_each_device(
    function: Callable[..., Array], arguments: Sequence[Argument], result: str, exchange: Exchange
) -> Array:
    """`function(*arrays)`, each device on its part, with what `exchange` brings.

    Dimensions tell an exchange what an array is: queries and outputs are "B N H d", keys and values "B N K d", segment
    ids (or None) "B N"; anything else is weights.
    """
    mesh = mesh_in_use()
    if mesh is None:
        return function(*(x for x, _ in arguments))

    def local(*arrays: Array) -> Array:
        remaining = iter(arrays)
        own = [(None if x is None else next(remaining), dimensions) for x, dimensions in arguments]
        return exchange(function, own)

    specs = tuple(activation_spec(dimensions) for x, dimensions in arguments if x is not None)
    # No check of varying axes: loops inside the operations start from constants.
    split = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=activation_spec(result), check_vma=False)
    return split(*(x for x, _ in arguments if x is not None))


def heads_split() -> bool:
    """Whether heads are split over devices here."""
    return shards("H") > 1


def gather_heads(x_BNHd: Array) -> Array:
    """[B, N, H/T, d] to [B, N, H, d], inside `on_each_device`."""
    return jax.lax.all_gather(x_BNHd, HEADS, axis=2, tiled=True)


def sum_and_scatter_heads(x_BNHd: Array) -> Array:
    """Partial sums [B, N, H, d] of every device to the total's own heads [B, N, H/T, d], inside `on_each_device`."""
    return jax.lax.psum_scatter(x_BNHd, HEADS, scatter_dimension=2, tiled=True)


def swap_tokens(reach: int, *, causal: bool) -> Exchange:
    """For local operations that mix all heads: all heads of a share of the tokens for the own heads of all tokens, then
    the halo of that share. `reach` and `causal` are those of `halo`, which alone is left where heads are not split."""

    def exchange(function: Callable[..., Array], arguments: list[Argument]) -> Array:
        T = shards("H")

        def share(x: Array | None, dimensions: str) -> Argument:
            names = dimensions.split()
            if x is None or "N" not in names:
                return x, dimensions
            if "H" in names or "K" in names:
                return jax.lax.all_to_all(x, HEADS, split_axis=1, concat_axis=2, tiled=True), dimensions
            own = x.shape[1] // T  # segment ids are the same on all of these devices
            return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(HEADS) * own, own, 1), dimensions

        if T == 1:
            return halo(reach, causal=causal)(function, arguments)
        out = halo(reach, causal=causal, over=(TOKENS, HEADS))(function, [share(*argument) for argument in arguments])
        return jax.lax.all_to_all(out, HEADS, split_axis=2, concat_axis=1, tiled=True)

    return exchange


def halo(reach: int, *, causal: bool, over: tuple[str, ...] = (TOKENS,)) -> Exchange:
    """For operations by which a token sees at most `reach` tokens before its own and, if not causal, after it.

    Tokens are split over the mesh axes `over`, the last one fastest.
    """

    def exchange(function: Callable[..., Array], arguments: list[Argument]) -> Array:
        mesh = mesh_in_use()
        assert mesh is not None
        devices = math.prod(mesh.shape[axis] for axis in over)
        B, n = _named(arguments, "H").shape[:2]
        left = min(reach, (devices - 1) * n)
        right = 0 if causal else left

        def widen(x: Array | None, dimensions: str) -> Array | None:
            if "N" not in dimensions.split():
                return x
            if x is None:  # without segments too, the tokens that a row does not have must not be seen
                x = jnp.ones((B, n), jnp.int32)
            if "H" in dimensions.split():  # the halo's outputs are dropped, so its queries need not come
                return jnp.pad(x, [(0, 0), (left, right), (0, 0), (0, 0)])
            before, after = _from_neighbor(x, left, 1, over, devices), _from_neighbor(x, right, -1, over, devices)
            return jnp.concatenate([*before, x, *after], axis=1)

        if not left:
            return function(*(x for x, _ in arguments))
        return function(*(widen(*argument) for argument in arguments))[:, left : left + n]

    return exchange


def swap_heads(function: Callable[..., Array], arguments: list[Argument]) -> Array:
    """For operations on each head alone: all tokens of a share of the heads for the own tokens of all heads."""
    H, K, C = _named(arguments, "H").shape[2], _named(arguments, "K").shape[2], shards("N")
    if C == 1:
        return function(*(x for x, _ in arguments))
    repeats = min(r for r in range(1, H // K + 1) if H // K % r == 0 and (K * r % C == 0 or K * r == H))

    def whole(x: Array | None, dimensions: str) -> Array | None:
        names = dimensions.split()
        if x is None or "N" not in names:
            return x
        if "H" not in names and "K" not in names:
            return jax.lax.all_gather(x, TOKENS, axis=1, tiled=True)
        x = _filled_up(jnp.repeat(x, repeats, axis=2) if "K" in names else x, axis=2)
        return jax.lax.all_to_all(x, TOKENS, split_axis=2, concat_axis=1, tiled=True)

    return _swap_back(function(*(whole(*argument) for argument in arguments)), H)


def share_heads(summed: bool) -> Exchange:
    """For operations that mix all heads into each: whole rows on every device, whose weights make a share of the heads.

    `summed`: each device's outputs are its part of a sum over all heads; else they are its own heads.
    """

    def exchange(function: Callable[..., Array], arguments: list[Argument]) -> Array:
        if shards("N") == 1:
            return function(*(x for x, _ in arguments))
        heads = next(x.shape[names.split().index("H")] for x, names in arguments if x is not None and _is_weight(names))

        def whole(x: Array | None, dimensions: str) -> Array | None:
            if x is None or "N" in dimensions.split():
                return None if x is None else jax.lax.all_gather(x, TOKENS, axis=1, tiled=True)
            if not _is_weight(dimensions):
                return x
            axis = dimensions.split().index("H")
            x = _filled_up(x, axis)
            share = x.shape[axis] // shards("N")
            return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(TOKENS) * share, share, axis)

        out = function(*(whole(*argument) for argument in arguments))
        return jax.lax.psum_scatter(out, TOKENS, scatter_dimension=1, tiled=True) if summed else _swap_back(out, heads)

    return exchange


def _from_neighbor(x: Array, tokens: int, step: int, over: tuple[str, ...], devices: int) -> list[Array]:
    """The `tokens` [B, tokens, ...] that stand before (step 1) or after (-1) a device's own, in order, as pieces; zeros
    where the row has none. Only neighbors exchange: what lies further is passed on."""
    n, pieces, sent = x.shape[1], [], x
    neighbors = [(i, i + step) for i in range(devices) if 0 <= i + step < devices]
    while tokens > 0:
        take = min(tokens, n)
        sent = sent[:, -take:] if step == 1 else sent[:, :take]
        sent = jax.lax.ppermute(sent, over, neighbors)
        pieces, tokens = [sent, *pieces] if step == 1 else [*pieces, sent], tokens - take
    return pieces


def _swap_back(x_BNhd: Array, H: int) -> Array:
    """All tokens of a share of the heads to a device's own tokens of all H heads."""
    return jax.lax.all_to_all(x_BNhd, TOKENS, split_axis=1, concat_axis=2, tiled=True)[:, :, :H]


def _filled_up(x: Array, axis: int) -> Array:
    """`x` with zeros after the end of `axis`, so that it divides over the devices."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % shards("N"))
    return jnp.pad(x, widths)


def _named(arguments: list[Argument], head: str) -> Array:
    """The first argument over tokens and heads "H" or "K"."""
    return next(x for x, names in arguments if x is not None and {"N", head} <= set(names.split()))


def _is_weight(dimensions: str) -> bool:
    """Whether these are the dimensions of weights that are split by heads."""
    return "H" in dimensions.split() and "N" not in dimensions.split()
