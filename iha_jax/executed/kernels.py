"""What the kernels of softmax attention compute: the blocks that causality and window leave something of, whole."""

from iha_jax.executed.xla import Work
from iha_jax.ops import splash

CUDNN_TILE = 128  # queries and keys of a tile: assumed, since cuDNN is closed and chooses by shape and GPU


def visible_blocks(N: int, size: int, window: int | None, *, causal: bool = True) -> int:
    """Blocks of `size` queries by `size` keys in which some pair is visible."""
    n, reach = -(-N // size), N if window is None else window - 1
    total = 0
    for i in range(n):
        first = max(0, i * size - reach) // size
        last = i if causal else min(n - 1, ((i + 1) * size - 1 + reach) // size)
        total += last - first + 1
    return total


def splash_work(N: int, window: int | None, *, causal: bool = True, training: bool = False) -> Work:
    """Visible blocks of `splash.block_size`, of N rounded up to 128; segments hide no block, they only mask.

    Training: one kernel for the gradients of keys and values, one for that of queries, each computing scores and the
    gradient of weights: scores `1 + 2 + 2 = 5` times, sums `1 + 2 + 1 = 4`.
    """
    size = splash.block_size(N, window)
    pairs = visible_blocks(-(-N // splash.LANES) * splash.LANES, size, window, causal=causal) * size**2
    return Work(*((5 * pairs, 4 * pairs) if training else (pairs, pairs)))


def cudnn_work(N: int, window: int | None, *, causal: bool = True, training: bool = False) -> Work:
    """Visible tiles of `CUDNN_TILE` by `CUDNN_TILE`, an assumption.

    Training, as flash attention does it in one backward kernel (Dao et al.): scores forward, again, and two gradients,
    4 times; sums forward and two gradients, 3 times.
    """
    pairs = visible_blocks(N, CUDNN_TILE, window, causal=causal) * CUDNN_TILE**2
    return Work(*((4 * pairs, 3 * pairs) if training else (pairs, pairs)))
