"""CPM-3, count permutation match-3, in one attention layer and an MLP (section 4 and appendix B of arXiv 2602.21371).

The output at i is the number of ordered pairs `(j1, j2)` in `[N]^2` with `x_i + G x_{j1} + x_{j2} = 0 (mod M)`.

Hard attention over `X^ = [x, I]`, of width 1 + N for `N = N_max`, writes all cyclic shifts of x to every position: the
*workspace*, row i holding `x_i, x_{i+1}, ..., x_{i-1}`. With C the cyclic shift, `(C x)_i = x_{i+1}`, and heads from 1,

    MHA, N heads                W_Q^h = [0; C^{h-1}],      W_K^h = [0; I],           W_V^h = [1; 0]
                                head h: C^{h-1} x;         2N^2(N + 1) + N(N + 1) parameters
    IHA, H = P = ceil(sqrt(N))  W_Q^m = [0; C^{(m-1)H}],   W_K^m = [0; (C^{m-1})^T], W_V^m: H x to number m of H
                                head h, number j: C^{(h-1)H + j-1} x;   2H(N + 1)N + (N + 1)H^2 + 4H^3 parameters

with the mixing of `layers.routing_mixing`. Values are scaled by H because H pseudo-keys tie. (The paper writes `3 N^3`
for MHA, W_V as wide as N; one number is enough.)

The *MLP* then counts: for each of the N^2 pairs of shifts `z = x_i + g x_{j1} + x_{j2}`, `g = G` modulo M, and hats of
ReLUs that are 1 at one of the T + 1 multiples of M and 0 at all other integers: `3 N^2 (N + 2)(T + 1)` parameters, of
order N^3 as MHA's attention is. So IHA's gain, N^2.5 against N^3, is in the attention alone: with the MLP both totals
are of order N^3, and MHA's is less than `1 + 2 / (3(T + 1))` times IHA's, whatever N.

*Order.* Only G modulo M matters, so the paper's `G > 2M` does not make the count sensitive to order: `G = 1 (mod M)` is
symmetric in j1 and j2. For tokens in [0, M) the exact condition is `gcd(G - 1, M) = 1` (two different tokens never
match in both orders) and `G mod M != 0` (x_{j1} counts). It is required unless `require_order_sensitive=False`.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from iha_jax.theory.layers import (
    Attention,
    HeadWeights,
    Mixing,
    hard_attention,
    interleaved_layer,
    multi_head_layer,
    routing_mixing,
)


class CPM3Error(ValueError):
    """A task or sequences that CPM-3 is not defined for."""


def is_order_sensitive(G: int, M: int) -> bool:
    """`gcd(G - 1, M) = 1` and `G mod M != 0`."""
    return math.gcd(G - 1, M) == 1 and G % M != 0


@dataclass(frozen=True)
class Task:
    """CPM-3 modulo M with factor G for sequences of 1 to N_max tokens in [0, M). Raises CPM3Error."""

    M: int
    G: int
    N_max: int
    require_order_sensitive: bool = True

    def __post_init__(self) -> None:
        for name in ("M", "G", "N_max"):
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
                raise CPM3Error(f"{name} = {value!r}; expected an integer of at least 1")
        if not self.require_order_sensitive or is_order_sensitive(self.G, self.M):
            return
        near = [G for G in range(max(1, self.G - self.M), self.G + self.M + 1) if is_order_sensitive(G, self.M)]
        near.sort(key=lambda G: abs(G - self.G))
        raise CPM3Error(
            f"G = {self.G} is not order-sensitive modulo M = {self.M}: gcd(G - 1, M) = {math.gcd(self.G - 1, self.M)}, "
            f"expected 1, and G mod M = {self.G % self.M}, expected not 0; nearest valid: "
            + (" or ".join(map(str, near[:2])) or "none for this M")
            + "; require_order_sensitive=False takes it as it is"
        )

    @property
    def factor(self) -> int:
        """G modulo M, in 1..M."""
        return (self.G - 1) % self.M + 1

    @property
    def padding(self) -> int:
        """Stands for a missing token: so far below 0 that no pair with it reaches the multiples of M, from 0 on."""
        return -(self.factor + 2) * self.M

    def padded(self, sequences: np.ndarray) -> np.ndarray:
        """Integers [B, N] with `padding` at the end: [B, N_max]. Rows may end in padding already. Raises CPM3Error.

        Tokens are in [0, M), at least one a row, at most N_max.
        """
        if sequences.ndim != 2 or 0 in sequences.shape or not np.issubdtype(sequences.dtype, np.integer):
            found = f"{sequences.dtype} {list(sequences.shape)}"
            raise CPM3Error(f"sequences are {found}; expected integers [B, N], not empty")
        if sequences.shape[1] > self.N_max:
            raise CPM3Error(f"sequences have {sequences.shape[1]} tokens; expected at most N_max = {self.N_max}")
        missing = sequences == self.padding
        wrong = sequences[((sequences < 0) | (sequences >= self.M)) & ~missing]
        if wrong.size:
            raise CPM3Error(f"token {wrong[0]} is out of range; expected 0 to M - 1 = {self.M - 1}")
        if missing[:, 0].any() or (missing[:, :-1] & ~missing[:, 1:]).any():
            raise CPM3Error(f"padding ({self.padding}) at the start of a sequence or inside; expected at its end alone")
        return np.pad(sequences, ((0, 0), (0, self.N_max - sequences.shape[1])), constant_values=self.padding)


def brute_force(task: Task, sequences: np.ndarray) -> np.ndarray:
    """The counts by definition: integers [B, N] to [B, N_max], 0 at padding. Raises CPM3Error."""
    x = task.padded(sequences)
    here = x != task.padding
    i, j1, j2 = x[:, :, None, None], x[:, None, :, None], x[:, None, None, :]
    pairs = here[:, :, None, None] & here[:, None, :, None] & here[:, None, None, :]
    return (((i + task.G * j1 + j2) % task.M == 0) & pairs).sum((2, 3))


def iha_heads(N_max: int) -> int:
    """`ceil(sqrt(N_max))`, in integers."""
    return math.isqrt(N_max - 1) + 1


def shift(N: int, steps: int) -> np.ndarray:
    """`C^steps`: row i selects position `i + steps` modulo N."""
    return np.roll(np.eye(N), steps, axis=1)


def mha_construction(N: int) -> HeadWeights:
    """N heads: query and key [N, 1 + N, N], value [N, 1 + N, 1]."""
    query, key = np.zeros((2, N, 1 + N, N))
    query[:, 1:] = [shift(N, h) for h in range(N)]
    key[:, 1:] = np.eye(N)
    value = np.zeros((N, 1 + N, 1))
    value[:, 0] = 1
    return HeadWeights(query, key, value)


def iha_construction(N: int) -> tuple[HeadWeights, Mixing]:
    """H = P = ceil(sqrt(N)): query and key [H, 1 + N, N], value [H, 1 + N, H]."""
    H = iha_heads(N)
    query, key = np.zeros((2, H, 1 + N, N))
    query[:, 1:] = [shift(N, m * H) for m in range(H)]
    key[:, 1:] = [shift(N, m).T for m in range(H)]
    value = np.zeros((H, 1 + N, H))
    value[:, 0] = H * np.eye(H)
    return HeadWeights(query, key, value), routing_mixing(H)


def with_positions(task: Task, sequences: np.ndarray) -> jax.Array:
    """`X^ = [x, I]` [B, N_max, 1 + N_max], x padded. Raises CPM3Error."""
    x = task.padded(sequences).astype(float)
    positions = np.broadcast_to(np.eye(task.N_max), (*x.shape, task.N_max))
    return jnp.asarray(np.concatenate([x[..., None], positions], axis=-1))


def workspace_by_mha(task: Task, sequences: np.ndarray, attend: Attention = hard_attention) -> jax.Array:
    """All cyclic shifts at every position by N_max heads: [B, N_max, N_max]. Raises CPM3Error."""
    return multi_head_layer(with_positions(task, sequences), mha_construction(task.N_max), attend)[..., 0]


def workspace_by_iha(task: Task, sequences: np.ndarray, attend: Attention = hard_attention) -> jax.Array:
    """The same by ceil(sqrt(N_max)) heads, whose outputs beyond N_max repeat the first shifts. Raises CPM3Error."""
    out = interleaved_layer(with_positions(task, sequences), *iha_construction(task.N_max), attend)
    return out.reshape(*out.shape[:2], -1)[..., : task.N_max]


class CountingMLP(NamedTuple):
    """`sum_u output[u] relu(<row, hidden[:, u]> + bias[u])`: hidden [N_max, U], bias [U], output [U]."""

    hidden: np.ndarray
    bias: np.ndarray
    output: np.ndarray


def hats(task: Task) -> int:
    """Multiples of M that `x_i + g x_{j1} + x_{j2}` can be: T + 1 with `T = floor((g + 2)(M - 1) / M)`."""
    return (task.factor + 2) * (task.M - 1) // task.M + 1


def counting_mlp(task: Task) -> CountingMLP:
    """For each pair of shifts and multiple tM: `relu(z - tM + 1) - 2 relu(z - tM) + relu(z - tM - 1)`."""
    N, kinks = task.N_max, [t * task.M + side for t in range(hats(task)) for side in (-1, 0, 1)]
    pairs = np.zeros((N, N, N))  # what of the row goes into z, for shifts a and b
    pairs[0] += 1
    for shift in range(N):
        pairs[shift, shift, :] += task.factor
        pairs[shift, :, shift] += 1
    hidden = np.repeat(pairs.reshape(N, N * N), len(kinks), axis=1)
    return CountingMLP(hidden, -np.tile(kinks, N * N).astype(float), np.tile([1.0, -2.0, 1.0], N * N * hats(task)))


@jax.jit
def count_matches(workspace: jax.Array, mlp: CountingMLP) -> jax.Array:
    """The MLP at every position: [B, N_max, N_max] to [B, N_max]."""
    hidden, bias, output = (jnp.asarray(part) for part in mlp)
    return jax.nn.relu(workspace @ hidden + bias) @ output


def counts_by_mha(task: Task, sequences: np.ndarray, attend: Attention = hard_attention) -> np.ndarray:
    """Workspace, then MLP: [B, N_max], as `brute_force` gives where attention is hard. Raises CPM3Error."""
    return _counts(task, sequences, workspace_by_mha(task, sequences, attend))


def counts_by_iha(task: Task, sequences: np.ndarray, attend: Attention = hard_attention) -> np.ndarray:
    """The same with IHA's workspace. Raises CPM3Error."""
    return _counts(task, sequences, workspace_by_iha(task, sequences, attend))


def _counts(task: Task, sequences: np.ndarray, workspace: jax.Array) -> np.ndarray:
    """Positions of padding are no part of the task: what the MLP says there is dropped."""
    counts = np.asarray(count_matches(workspace, counting_mlp(task)))
    return np.where(task.padded(sequences) == task.padding, 0, counts)


def mha_parameters(N: int) -> int:
    """Attention alone: `2N^2(N + 1) + N(N + 1)`."""
    return 2 * N**2 * (N + 1) + N * (N + 1)


def iha_parameters(N: int) -> int:
    """Attention alone: `2H(N + 1)N + (N + 1)H^2 + 4H^3` with `H = ceil(sqrt(N))`."""
    H = iha_heads(N)
    return 2 * H * (N + 1) * N + (N + 1) * H**2 + 4 * H**3


def mlp_parameters(task: Task) -> int:
    """`3 N^2 (T + 1) (N + 2)`: hidden weights, bias and output weights of the counting MLP."""
    return 3 * task.N_max**2 * hats(task) * (task.N_max + 2)
