"""Checks of arguments at trace time: what was got, what was expected, under the argument's name."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from iha_jax.array_types import Array


def check_attention(q: Array, k: Array, v: Array, window: int | None, segment_ids: Array | None) -> None:
    """Ranks, head counts, dtypes, window and segments of `q [B, N, H, d]`, `k [B, N, K, d]`, `v [B, N, K, e]`."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_heads(name, x)
        if x.dtype != q.dtype:
            raise ValueError(f"{name} has dtype {x.dtype}; expected {q.dtype} as q has; cast one of them")
    B, N, H, d = q.shape
    K = k.shape[2]
    if k.shape != (B, N, K, d):
        raise ValueError(f"k has shape {k.shape}; expected [{B}, {N}, K, {d}] to go with q {q.shape}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v has shape {v.shape}; expected [{B}, {N}, {K}, e] to go with k {k.shape}")
    if K < 1 or H % K:
        raise ValueError(f"k has {K} key/value heads; expected a divisor of the {H} heads of q")
    check_window(window)
    if segment_ids is not None:
        if segment_ids.shape != (B, N):
            raise ValueError(f"segment_ids has shape {segment_ids.shape}; expected {(B, N)}, one id a token")
        if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
            raise ValueError(f"segment_ids has dtype {segment_ids.dtype}; expected integers, 0 for padding")


def check_heads(name: str, x: Array) -> None:
    """`[batch, tokens, heads, width]`, floating, with at least one token and head and a width of at least 1."""
    if x.ndim != 4:
        raise ValueError(f"{name} has shape {x.shape}; expected rank 4: [batch, tokens, heads, width]")
    if 0 in x.shape[1:]:
        raise ValueError(f"{name} has shape {x.shape}; expected at least one token, head and number of a head")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} has dtype {x.dtype}; expected a floating-point dtype")


def check_window(window: int | None) -> None:
    if window is not None and not _is_positive(window):
        raise ValueError(f"window = {window!r}; expected None or a positive number of tokens")


def check_windows(windows: tuple[int, int] | None) -> None:
    if windows is None:
        return
    if not isinstance(windows, tuple | list) or len(windows) != 2 or not all(map(_is_positive, windows)):
        raise ValueError(f"windows = {windows!r}; expected None or (w1, w2), two positive numbers of tokens")


def _is_positive(count: int) -> bool:
    return isinstance(count, int) and not isinstance(count, bool) and count > 0


def check_pseudo_heads(name: str, x: Array) -> None:
    """`[batch, tokens, heads, pseudo-heads, width]`."""
    if x.ndim != 5:
        raise ValueError(f"{name} has shape {x.shape}; expected rank 5: [batch, tokens, heads, pseudo-heads, width]")


def check_mixing(q: Array, k: Array, alphas: dict[str, Array], collapse: Array, T: int) -> None:
    """`alpha_q [H, T, P]`, `alpha_k, alpha_v [K, T, P]`, `collapse [H, T, P]` or `[T, P]`, all of the dtype of q."""
    H, K = q.shape[2], k.shape[2]
    shape = jax.numpy.shape(alphas["alpha_q"])
    if len(shape) != 3 or shape[:2] != (H, T) or shape[2] < 1:
        raise ValueError(f"alpha_q has shape {shape}; expected [{H}, {T}, P]: source head, head, pseudo-head")
    P = shape[2]
    for name in ("alpha_k", "alpha_v"):
        if alphas[name].shape != (K, T, P):
            raise ValueError(f"{name} has shape {alphas[name].shape}; expected {(K, T, P)}: key head, head, pseudo")
    if collapse.shape not in ((H, T, P), (T, P)):
        raise ValueError(f"collapse has shape {collapse.shape}; expected {(H, T, P)} (global) or {(T, P)} (per head)")
    for name, x in (*alphas.items(), ("collapse", collapse)):
        if x.dtype != q.dtype:
            raise ValueError(f"{name} has dtype {x.dtype}; expected {q.dtype} as q has; cast one of them")


def check_virtual_sequence(causality: str, rope_theta: float | None, rope_positions: str, width: int) -> None:
    check_choice("causality", causality, ("virtual", "token"))
    check_choice("rope_positions", rope_positions, ("virtual", "token"))
    if rope_theta is not None and not (rope_theta > 0 and width % 2 == 0):
        raise ValueError(f"rope_theta = {rope_theta}, head width {width}; expected theta > 0 and an even width")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} = {value!r}; expected one of {', '.join(map(repr, choices))}")


def check_head_mix(name: str, mix: Array, heads: int, dtype: jnp.dtype) -> None:
    """A square mixing of `heads` heads, [source head, target head]."""
    if mix.shape != (heads, heads):
        raise ValueError(f"{name} has shape {mix.shape}; expected {(heads, heads)}: source head, target head")
    if mix.dtype != dtype:
        raise ValueError(f"{name} has dtype {mix.dtype}; expected {dtype} as what it mixes has; cast one of them")
