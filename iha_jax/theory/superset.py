"""IHA contains MHA, strictly for P >= 2 (section 4 and appendix B of arXiv 2602.21371): no mask, no RoPE, softmax.

*Contained.* `alpha_q = alpha_k = alpha_v = [m = h]` for every pseudo-head, `R[g, h, p] = [g = h][p = p0]`: each of the
N tokens appears P times with equal keys and values, so every softmax weight is split into P equal ones; the sum stays.

*Strict.* When all tokens are equal, `X = 1 x^T`, the softmax weights of MHA act on equal values, so a head returns
`x W_V`: linear in x. An IHA head whose pseudo-heads have signs `s = (+1, -1, ..., -1)` in queries and keys and `t` in
values, read at the first pseudo-query, returns with `S = <q, k> / sqrt(d)`, `q = x W_Q`, `k = x W_K`, `v = x W_V`

    (t_1 e^S + sum_{p>1} t_p e^{-S}) / (e^S + (P - 1) e^{-S}) v

For `t = (1, 1)`, the appendix's example, that is v: linear after all. For `t = (1, -1)` it is `tanh(S) v`, which is
not linear. For `t = s` and any P it is `tanh(S - log(P - 1) / 2) v`.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from iha_jax.array_types import Array, Float
from iha_jax.ops import dot_product_attention, interleaved_head_attention
from iha_jax.theory.layers import (
    HeadWeights,
    Mixing,
    interleaved_layer,
    multi_head_layer,
    project,
    softmax_attention,
)
from iha_jax.theory.statements import Outcome, Statement

TOLERANCE = 1e-12
NOT_LINEAR = 1e-2


def random_heads(rng: np.random.Generator, H: int, D: int, d: int, e: int) -> HeadWeights:
    """Normal weights of H heads, query and key [H, D, d], value [H, D, e]."""
    return HeadWeights(*(rng.normal(size=(H, D, width)) for width in (d, d, e)))


def containing_mixing(H: int, P: int, selected: int = 0) -> Mixing:
    """Identity copies with R picking pseudo-head `selected` (from 0): IHA with it is MHA with the same projections."""
    copies = np.repeat(np.eye(H)[:, :, None], P, axis=2)
    return Mixing(copies, copies, copies, copies * (np.arange(P) == selected))


def signed_mixing(H: int, signs: Sequence[float], value_signs: Sequence[float]) -> Mixing:
    """Own head only: `signs[p]` in queries and keys, `value_signs[p]` in values of pseudo-head p; R picks the first."""
    own = np.eye(H)[:, :, None]
    first = np.arange(len(signs)) == 0
    return Mixing(own * signs, own * signs, own * value_signs, own * first)


@jax.jit
def public_interleaved_layer(x: Float[Array, "B N D"], weights: HeadWeights, mixing: Mixing) -> Float[Array, "B N H e"]:
    """`interleaved_layer` with softmax attention, by the public operation as a whole."""
    return interleaved_head_attention(*project(x, weights), *map(jnp.asarray, mixing), causal=False)


def on_repeated_token(
    layer: Callable[[Float[Array, "1 N D"]], Float[Array, "1 N H e"]], N: int
) -> Callable[[np.ndarray], np.ndarray]:
    """`x [D]` to what the layer returns at the last of N tokens that all are x: [H, e]."""
    return lambda x: np.asarray(layer(jnp.asarray(np.tile(x, (1, N, 1))))[0, -1])


def deviation_from_linearity(function: Callable[[np.ndarray], np.ndarray], x: np.ndarray, y: np.ndarray) -> float:
    """`max |f(2x - 3y) - 2 f(x) + 3 f(y)|`, relative to the largest of these terms; 0 for a linear f.

    A change of sign alone would not tell: `tanh(<q, k> / sqrt(d)) v` is odd in x as linear maps are.
    """
    terms = function(2 * x - 3 * y), 2 * function(x), 3 * function(y)
    return float(np.abs(terms[0] - terms[1] + terms[2]).max() / max(np.abs(term).max() for term in terms))


def signed_closed_form(x: np.ndarray, weights: HeadWeights, value_signs: Sequence[float]) -> np.ndarray:
    """The formula at the top of this file, for all heads: [H, e]."""
    q, k, v = (np.einsum("D,hDw->hw", x, w) for w in weights)
    score = (q * k).sum(-1) / np.sqrt(q.shape[-1])
    opposite, P = np.exp(-2 * score), len(value_signs)
    factor = (value_signs[0] + sum(value_signs[1:]) * opposite) / (1 + (P - 1) * opposite)
    return factor[:, None] * v


def check_contained() -> Outcome:
    """Random MHA layers as IHA layers, by the pieces and by the public operation, for several H and P."""
    rng, worst, shapes = np.random.default_rng(0), 0.0, [(3, 1), (1, 2), (2, 5)]
    for H, P in shapes:
        weights = random_heads(rng, H, D=7, d=3, e=5)
        x = jnp.asarray(rng.normal(size=(2, 5, 7)))
        expected = multi_head_layer(x, weights, softmax_attention)
        scale = jnp.abs(expected).max()
        for selected in range(P):
            mixing = containing_mixing(H, P, selected)
            whole = public_interleaved_layer(x, weights, mixing)
            pieces = interleaved_layer(x, weights, mixing, softmax_attention)
            worst = max(worst, *(float(jnp.abs(out - expected).max() / scale) for out in (whole, pieces)))
    return Outcome(worst <= TOLERANCE, f"H, P = {shapes}: largest relative difference {worst:.1e}")


def check_mha_is_linear() -> Outcome:
    """MHA on equal tokens is `x W_V`, with and without a causal mask."""
    rng, worst = np.random.default_rng(1), 0.0
    weights = random_heads(rng, H=3, D=7, d=3, e=5)
    x, y = rng.normal(size=(2, 7))
    for attend in (softmax_attention, dot_product_attention):  # no mask, and a causal one
        layer = on_repeated_token(functools.partial(multi_head_layer, weights=weights, attend=attend), N=5)
        error = np.abs(layer(x) - np.einsum("D,hDw->hw", x, weights.value)).max()
        worst = max(worst, float(error), deviation_from_linearity(layer, x, y))
    return Outcome(worst <= TOLERANCE, f"deviation from linearity, and from x W_V: at most {worst:.1e}")


def _signed_layer(value_signs: Sequence[float]) -> tuple[float, float]:
    """How far that IHA is from linear on equal tokens, and from its closed form."""
    rng, P = np.random.default_rng(2), len(value_signs)
    weights = random_heads(rng, H=3, D=7, d=3, e=5)
    weights = weights._replace(
        query=weights.query / 4, key=weights.key / 4
    )  # scores of order 1: tanh far from its ends
    mixing = signed_mixing(3, [1.0] + [-1.0] * (P - 1), value_signs)
    layer = on_repeated_token(functools.partial(public_interleaved_layer, weights=weights, mixing=mixing), N=5)
    x, y = rng.normal(size=(2, 7))
    error = np.abs(layer(x) - signed_closed_form(x, weights, value_signs)).max()
    return deviation_from_linearity(layer, x, y), float(error)


def check_appendix_example() -> Outcome:
    """The appendix's pseudo-values of one sign: the weights sum to one over equal values, so the map is linear."""
    gap, error = _signed_layer([1.0, 1.0])
    return Outcome(max(gap, error) <= TOLERANCE, f"values (+v, +v): deviation from linearity {gap:.1e}; equals v")


def check_corrected_example() -> Outcome:
    """Pseudo-values `+v` and `-v` give `tanh(S) v`; and the same for more pseudo-heads."""
    found = {P: _signed_layer([1.0] + [-1.0] * (P - 1)) for P in (2, 3, 5)}
    holds = all(gap > NOT_LINEAR and error <= TOLERANCE for gap, error in found.values())
    gaps = ", ".join(f"{gap:.2f} at P = {P}" for P, (gap, _) in found.items())
    worst = max(error for _, error in found.values())
    return Outcome(holds, f"values (+v, -v): deviation {gaps}; off tanh(S - log(P - 1)/2) v by {worst:.1e}")


STATEMENTS = (
    Statement("superset: any MHA is an IHA, for every P", check_contained),
    Statement("superset: MHA is linear on equal tokens", check_mha_is_linear),
    Statement("superset: the appendix's example of a nonlinear IHA is linear after all", check_appendix_example),
    Statement(
        "superset: with opposite pseudo-values IHA is not linear, so the inclusion is strict", check_corrected_example
    ),
)
