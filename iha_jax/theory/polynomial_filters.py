"""Polynomial filters `[X, A X, ..., A^{k-1} X]` in one layer of linear attention.

Section 4 and appendix B of arXiv 2602.21371. `A [N, N]` of full rank, `X [N, r]`; the layer reads
`X^ = [X, I]`, of width r + N, and has no softmax. Heads from 1:

    MHA, k heads                 W_Q^h = [0; A^{h-1}],      W_K^h = [0; I],           W_V^h = [I; 0]
                                 head h: A^{h-1} X;         2N(N + r)k + r(N + r)k parameters
    IHA, H = P = ceil(sqrt(k))   W_Q^m = [0; A^{(m-1)H}],   W_K^m = [0; (A^{m-1})^T], W_V^m: X to block m of r H numbers
                                 head h, block j: A^{(h-1)H + j-1} X;   2N(N + r)H + r(N + r)H^2 + 4H^3 parameters

with the mixing of `layers.routing_mixing`. The first k of IHA's H^2 blocks are the filters.

*Lower bound*, for layers whose attention matrices M do not depend on X and whose values read X alone, as in both
constructions: the layer computes `sum_h M_h X B_h`, the filters are `sum_i A^i X E_i` with independent `E_i`, so the
span of the M_h must hold every power: its dimension must reach the rank of the k vectors `vec(A^i)`. H heads of MHA
span at most H dimensions, and of IHA, whose H P^2 matrices are sums of the H^2 products `Q^m (K^m')^T`, at most H^2.
That rank is `min(k, degree of the minimal polynomial of A)`: full rank of A, the paper's condition, does not make it k.
For A = I one head is enough for any k, and with wider values N heads are for any A. Layers whose scores read X too are
outside this argument.
"""

import itertools
import math

import jax.numpy as jnp
import numpy as np

from iha_jax.array_types import Array
from iha_jax.theory.layers import (
    HeadWeights,
    Mixing,
    count_parameters,
    interleaved_layer,
    linear_attention,
    multi_head_layer,
    project,
    routing_mixing,
)
from iha_jax.theory.statements import Outcome, Statement

TOLERANCE = 1e-10


class PolynomialFilterError(ValueError):
    """A matrix, signal or number of filters that the constructions do not take."""


def check_filters(A: np.ndarray, k: int, X: np.ndarray | None = None) -> None:
    """Raises PolynomialFilterError unless A is square, finite and of full rank, k >= 1, and X is [N, r] with r >= 1."""
    check_count(k)
    if A.ndim != 2 or A.shape[0] != A.shape[1] or A.size == 0:
        raise PolynomialFilterError(f"A has shape {A.shape}; expected a square matrix [N, N]")
    if not np.isfinite(A).all():
        raise PolynomialFilterError("A holds numbers that are not finite")
    N, rank = len(A), np.linalg.matrix_rank(A)
    if rank < N:
        raise PolynomialFilterError(f"A has rank {rank}; expected full rank {N}")
    if X is not None and (X.ndim != 2 or X.shape[0] != N or X.shape[1] < 1):
        raise PolynomialFilterError(f"X has shape {X.shape}; expected [{N}, r], r at least 1, to go with A {A.shape}")


def check_count(k: int) -> None:
    """Raises PolynomialFilterError unless k is a positive integer."""
    if not isinstance(k, int | np.integer) or isinstance(k, bool) or k < 1:
        raise PolynomialFilterError(f"k = {k!r}; expected the number of filters, an integer of at least 1")


def iha_heads(k: int) -> int:
    """`ceil(sqrt(k))`, in integers."""
    check_count(k)
    return math.isqrt(k - 1) + 1


def filters(A: np.ndarray, X: np.ndarray, k: int) -> np.ndarray:
    """`[X, A X, ..., A^{k-1} X]` by k - 1 products: [k, N, r]."""
    found = [X]
    while len(found) < k:
        found.append(A @ found[-1])
    return np.stack(found)


def mha_construction(A: np.ndarray, r: int, k: int) -> HeadWeights:
    """k heads: query and key [k, r + N, N], value [k, r + N, r]. Raises PolynomialFilterError."""
    check_filters(A, k)
    N = len(A)
    query, key = np.zeros((2, k, r + N, N))
    query[:, r:] = powers(A, range(k))
    key[:, r:] = np.eye(N)
    value = np.zeros((k, r + N, r))
    value[:, :r] = np.eye(r)
    return HeadWeights(query, key, value)


def iha_construction(A: np.ndarray, r: int, k: int) -> tuple[HeadWeights, Mixing]:
    """H = P = ceil(sqrt(k)): query and key [H, r + N, N], value [H, r + N, r H]. Raises PolynomialFilterError."""
    check_filters(A, k)
    N, H = len(A), iha_heads(k)
    query, key = np.zeros((2, H, r + N, N))
    query[:, r:] = powers(A, range(0, H * H, H))
    key[:, r:] = np.swapaxes(powers(A, range(H)), 1, 2)
    value = np.zeros((H, r + N, H, r))
    for m in range(H):
        value[m, :r, m] = np.eye(r)
    return HeadWeights(query, key, value.reshape(H, r + N, H * r)), routing_mixing(H)


def powers(A: np.ndarray, exponents: range) -> np.ndarray:
    """`A^i` for each exponent: [n, N, N]."""
    return np.stack([np.linalg.matrix_power(A, i) for i in exponents])


def with_positions(X: np.ndarray) -> Array:
    """`X^ = [X, I]` with a batch axis: [1, N, r + N]."""
    return jnp.asarray(np.concatenate([X, np.eye(len(X))], axis=1)[None])


def filters_by_mha(A: np.ndarray, X: np.ndarray, k: int) -> np.ndarray:
    """What the MHA of k heads computes: [k, N, r]. Raises PolynomialFilterError."""
    check_filters(A, k, X)
    out = multi_head_layer(with_positions(X), mha_construction(A, X.shape[1], k), linear_attention)
    return np.moveaxis(np.asarray(out[0]), 1, 0)


def filters_by_iha(A: np.ndarray, X: np.ndarray, k: int) -> np.ndarray:
    """What the IHA of ceil(sqrt(k)) heads computes: [k, N, r]. Raises PolynomialFilterError."""
    check_filters(A, k, X)
    (N, r), H = X.shape, iha_heads(k)
    weights, mixing = iha_construction(A, r, k)
    out = interleaved_layer(with_positions(X), weights, mixing, linear_attention)
    return np.moveaxis(np.asarray(out[0]).reshape(N, H * H, r), 1, 0)[:k]


def mha_parameters(N: int, r: int, k: int) -> int:
    """`2N(N + r)k + r(N + r)k`."""
    return k * (2 * N * (N + r) + r * (N + r))


def iha_parameters(N: int, r: int, k: int) -> int:
    """`2N(N + r)H + r(N + r)H^2 + 4H^3` with `H = ceil(sqrt(k))`."""
    H = iha_heads(k)
    return 2 * N * (N + r) * H + r * (N + r) * H**2 + 4 * H**3


def crossover_size(r: int, k: int) -> int | None:
    """The smallest N at which, and beyond which, IHA has fewer parameters than MHA; None for k <= 2, where none has.

    The difference is `(N + r)(2N(k - H) - r(H^2 - k)) - 4H^3`: where it is positive, it grows with N.
    """
    if iha_heads(k) >= k:
        return None
    N = 1
    while iha_parameters(N, r, k) >= mha_parameters(N, r, k):
        N += 1
    return N


def dimension(matrices: np.ndarray) -> int:
    """Dimension of the span of matrices [n, N, N], each first scaled to norm 1."""
    rows = matrices.reshape(len(matrices), -1)
    return int(np.linalg.matrix_rank(rows / np.linalg.norm(rows, axis=1, keepdims=True)))


def mha_heads_needed(A: np.ndarray, k: int) -> int:
    """The lower bound at the top of this file: the dimension of the span of `I, A, ..., A^{k-1}`."""
    check_filters(A, k)
    return dimension(powers(A, range(k)))


def fewest_heads_mha(A: np.ndarray, r: int, k: int) -> HeadWeights:
    """MHA of `n = mha_heads_needed(A, k)` heads of value width k r, to be summed: as many as the lower bound asks for.

    With `A^i = sum_{j<n} c[i, j] A^j`, head j gives `c[i, j] A^j X` in block i: value [n, r + N, k r].
    """
    n, N = mha_heads_needed(A, k), len(A)
    basis = powers(A, range(k)).reshape(k, -1).T
    c = np.linalg.lstsq(basis[:, :n], basis)[0]
    value = np.zeros((n, r + N, k * r))
    value[:, :r] = np.einsum("ji,ab->jaib", c, np.eye(r)).reshape(n, r, k * r)
    return mha_construction(A, r, n)._replace(value=value)


def attention_matrices(x: Array, weights: HeadWeights, mixing: Mixing | None = None) -> np.ndarray:
    """All matrices `q k^T` [n, N, N] of a layer: H of MHA, or H P^2 of IHA, one for each pair of pseudo-heads."""
    q, k, _ = (np.asarray(part[0]) for part in project(x, weights))
    if mixing is None:
        return np.einsum("nhd,mhd->hnm", q, k)
    q, k = np.einsum("nsd,shp->hpnd", q, mixing.alpha_q), np.einsum("nsd,shp->hpnd", k, mixing.alpha_k)
    return np.einsum("hpnd,hqmd->hpqnm", q, k).reshape(-1, len(x[0]), len(x[0]))


def example_matrices(N: int) -> dict[str, np.ndarray]:
    """Matrices of full rank whose powers neither vanish nor grow: distinct kinds of spectrum."""
    rng = np.random.default_rng(N)
    normal = rng.normal(size=(N, N))
    return {
        "orthogonal": np.linalg.qr(normal)[0],
        "symmetric": (normal + normal.T) / np.abs(np.linalg.eigvalsh(normal + normal.T)).max(),
        "not normal": normal / np.abs(np.linalg.eigvals(normal)).max(),
        "cyclic shift": np.roll(np.eye(N), 1, axis=1),
    }


def check_reconstruction() -> Outcome:
    """Both constructions against repeated products, each filter relative to its largest number."""
    rng, worst, shapes = (
        np.random.default_rng(0),
        {"MHA": 0.0, "IHA": 0.0},
        [(1, 1, 2), (5, 2, 3), (7, 3, 10), (11, 1, 17)],
    )
    for N, r, k in shapes:
        X = rng.normal(size=(N, r))
        for A in example_matrices(N).values():
            expected = filters(A, X, k)
            scale = np.abs(expected).max((1, 2), keepdims=True)
            for kind, build in (("MHA", filters_by_mha), ("IHA", filters_by_iha)):
                worst[kind] = max(worst[kind], float((np.abs(build(A, X, k) - expected) / scale).max()))
    evidence = ", ".join(f"{kind} off by {error:.1e}" for kind, error in worst.items())
    return Outcome(max(worst.values()) <= TOLERANCE, f"N, r, k = {shapes}, 4 matrices each: {evidence}")


def check_parameters() -> Outcome:
    """Heads and parameters of the closed forms against the arrays."""
    cases, holds = [(5, 2, k) for k in range(1, 18)] + [(7, 3, 10), (11, 1, 26)], True
    for N, r, k in cases:
        A = example_matrices(N)["orthogonal"]
        mha, (iha, mixing) = mha_construction(A, r, k), iha_construction(A, r, k)
        holds &= count_parameters(mha) == mha_parameters(N, r, k) and len(mha.query) == k
        holds &= count_parameters(iha, mixing) == iha_parameters(N, r, k)
        holds &= len(iha.query) == mixing.alpha_q.shape[2] == math.ceil(math.sqrt(k))
    return Outcome(holds, f"{len(cases)} pairs of constructions, k from 1 to 26")


def check_lower_bound() -> Outcome:
    """k independent powers, one dimension a head of MHA, H^2 of IHA."""
    N, k, rng = 11, 9, np.random.default_rng(0)
    A, x = example_matrices(N)["orthogonal"], with_positions(rng.normal(size=(N, 1)))
    singular = np.linalg.svd(powers(A, range(k)).reshape(k, -1) / math.sqrt(N), compute_uv=False)
    needed, H, P = mha_heads_needed(A, k), 3, 3
    weights = HeadWeights(*rng.normal(size=(3, H, N + 1, N)))
    mixing = Mixing(*rng.normal(size=(4, H, H, P)))
    mha, iha = dimension(attention_matrices(x, weights)), dimension(attention_matrices(x, weights, mixing))
    evidence = (
        f"{k} powers at N = {N}: rank {needed} (smallest singular value {singular[-1]:.2f} of norms 1); "
        f"{H} heads span {mha} dimensions in MHA, {iha} in IHA ({H * P * P} matrices)"
    )
    return Outcome((needed, mha, iha) == (k, H, H * H), evidence)


def check_full_rank_is_not_enough() -> Outcome:
    """Fewer heads than k for matrices of full rank whose powers repeat, and they do compute all k filters."""
    N, r, k, found, worst = 5, 2, 9, [], 0.0
    X = np.random.default_rng(0).normal(size=(N, r))
    swap = np.eye(N)[[1, 0, 2, 3, 4]]
    for A in (np.eye(N), swap, *example_matrices(N).values()):
        weights = fewest_heads_mha(A, r, k)
        out = multi_head_layer(with_positions(X), weights, linear_attention).sum(2)
        blocks = np.moveaxis(np.asarray(out[0]).reshape(N, k, r), 1, 0)
        expected = filters(A, X, k)
        scale = np.abs(expected).max((1, 2), keepdims=True)
        worst, found = max(worst, float((np.abs(blocks - expected) / scale).max())), [*found, len(weights.query)]
    evidence = f"N = {N}, k = {k}: identity {found[0]} head, a swap {found[1]}, others {found[2:]}; off by {worst:.1e}"
    return Outcome(found == [1, 2, N, N, N, N] and worst <= TOLERANCE, evidence)


def check_crossover() -> Outcome:
    """IHA has fewer parameters from the crossover size on, more or as many below it, and never for k <= 2."""
    sizes = {k: crossover_size(1, k) for k in (1, 2, 3, 4, 5, 9, 16, 64, 256)}
    holds = sizes[1] is None and sizes[2] is None
    for r, k in itertools.product((1, 3, 7), sizes):
        size = crossover_size(r, k)
        cheaper = [iha_parameters(N, r, k) < mha_parameters(N, r, k) for N in range(1, 200)]
        holds &= cheaper == [size is not None and size <= N for N in range(1, 200)]
    return Outcome(
        holds, f"r = 1: fewer parameters from N = {', '.join(f'{n} (k = {k})' for k, n in sizes.items() if n)}"
    )


STATEMENTS = (
    Statement("polynomial filters: k heads of MHA and ceil(sqrt(k)) of IHA compute them", check_reconstruction),
    Statement("polynomial filters: closed forms for heads and parameters equal the arrays", check_parameters),
    Statement(
        "polynomial filters: k independent powers need k heads of MHA, sqrt(k) of IHA (scores blind to X)",
        check_lower_bound,
    ),
    Statement("polynomial filters: full rank of A does not make its powers independent", check_full_rank_is_not_enough),
    Statement("polynomial filters: IHA is smaller from a crossover size on", check_crossover),
)
