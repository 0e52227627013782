"""Talking heads, differential and simplicial attention as functions: float64 parity, window edges, bad arguments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iha_jax.ops import (
    differential_attention,
    dot_product_attention,
    fuse_mixing,
    query_blocks,
    reference_baselines,
    simplicial,
    simplicial_attention,
    talking_heads,
    talking_heads_attention,
)
from tests.test_ops_equivalence import SEGMENTS, B, D, E, N, compare, normal
from tests.test_ops_properties import influence, largest_array, refused


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(query_blocks, "SCORES_A_BLOCK", 1)
    monkeypatch.setattr(talking_heads, "SMALLEST_BLOCK", 5)
    monkeypatch.setattr(simplicial, "SMALLEST_BLOCK", 5)
    monkeypatch.setattr(simplicial, "SMALLEST_WINDOW_BLOCK", 3)


def shapes(run, H, K):
    query, key, value = (B, N, H, D), (B, N, K, D), (B, N, K, E)
    if run is talking_heads_attention:
        return [query, key, value, (H, H), (H, H)], (B, N, H, E)
    if run is differential_attention:
        return [query, key, (B, N, K // 2, E), ()], (B, N, H // 2, E)
    return [query, key, value, key, value], (B, N, H, E)


CASES = [
    # run, H, K, causal, windows, segments
    (talking_heads_attention, 4, 2, True, 4, True),
    (talking_heads_attention, 3, 1, False, 5, True),
    (differential_attention, 4, 2, False, 4, True),
    (differential_attention, 8, 4, True, None, True),
    (simplicial_attention, 4, 2, True, (5, 3), True),
    (simplicial_attention, 2, 1, False, (4, 3), True),
    (simplicial_attention, 2, 1, True, None, True),
]
MORE = [(simplicial_attention, 3, 1, True, (N + 4, 3), False)] + [
    (run, H, K, causal, window, segments)
    for run, H, K in ((talking_heads_attention, 6, 2), (differential_attention, 8, 4), (simplicial_attention, 4, 2))
    for causal in (True, False)
    for window in ((None, 1, 7) if run is not simplicial_attention else (None, (1, 1), (7, 2), (1, 5)))
    for segments in (False, True)
]


def check(run, H, K, causal, windows, segments):
    arguments, result = shapes(run, H, K)
    settings = {"windows" if run is simplicial_attention else "window": windows, "causal": causal}
    settings["segment_ids"] = jnp.asarray(SEGMENTS) if segments else None
    fast = functools.partial(run, **settings)
    slow = functools.partial(run, **settings, implementation="reference")
    compare(fast, slow, normal(0, *arguments), normal(1, result)[0])


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].__name__}-{case[1:]}")
def test_blocks_equal_the_reference(case, small_blocks):
    check(*case)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE, ids=lambda case: f"{case[0].__name__}-{case[1:]}")
def test_blocks_equal_the_reference_on_a_grid(case, small_blocks):
    check(*case)


def test_both_simplicial_windows_are_exact_to_the_token(small_blocks):
    q, k, v, k2, v2 = (jnp.asarray(x, jnp.float32) for x in normal(3, *shapes(simplicial_attention, 2, 2)[0]))
    q, k, v, k2, v2 = (x[:1] for x in (q, k, v, k2, v2))
    distance = np.arange(N)[:, None] - np.arange(N)
    for causal in (True, False):
        for windows in ((5, 3), (1, 4)):
            run = functools.partial(simplicial_attention, q, causal=causal, windows=windows)
            first = influence(lambda v: run(k, v, k2, v2), v)
            second = influence(lambda v2: run(k, v, k2, v2), v2)
            for seen, window in ((first, windows[0]), (second, windows[1])):
                np.testing.assert_array_equal(seen, (np.abs(distance) < window) & ((distance >= 0) | (not causal)))


def test_vmap_of_the_backward_pass_of_blocks_of_four(monkeypatch):
    """XLA for CPUs (jax 0.10) crashed here while the arrays of a block had six axes, seven under vmap."""
    monkeypatch.setattr(query_blocks, "SCORES_A_BLOCK", 1)
    monkeypatch.setattr(simplicial, "SMALLEST_WINDOW_BLOCK", 4)
    q, k, v, _, v2 = (jnp.asarray(x[:1], jnp.float32) for x in normal(3, *shapes(simplicial_attention, 4, 2)[0]))
    seen = influence(lambda k: simplicial_attention(q, k, v, k, v2, causal=False, windows=(5, 3)), k)
    np.testing.assert_array_equal(seen, np.abs(np.arange(N)[:, None] - np.arange(N)) < 5)


def test_talking_heads_window_is_exact_to_the_token(small_blocks):
    q, k, v, before, after = (jnp.asarray(x, jnp.float32) for x in normal(3, *shapes(talking_heads_attention, 2, 2)[0]))
    distance = np.arange(N)[:, None] - np.arange(N)
    for window in (1, 4):
        run = functools.partial(talking_heads_attention, q[:1], k[:1], window=window)
        seen = influence(lambda v: run(v, before, after), v[:1])
        np.testing.assert_array_equal(seen, (distance >= 0) & (distance < window))


def test_differential_with_lambda_zero_is_mha_over_the_even_heads():
    arguments, _ = shapes(differential_attention, 12, 4)
    q, k, v, _ = (jnp.asarray(x, jnp.float32) for x in normal(4, *arguments))
    out = differential_attention(q, k, v, jnp.float32(0), window=4)
    expected = dot_product_attention(q[:, :, ::2], k[:, :, ::2], v, window=4)
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_swapping_the_key_sets_of_simplicial_attention_changes_nothing():
    q, k, v, k2, v2 = (jnp.asarray(x, jnp.float32) for x in normal(5, *shapes(simplicial_attention, 2, 2)[0]))
    out = simplicial_attention(q, k, v, k2, v2, windows=(5, 3))
    np.testing.assert_allclose(out, simplicial_attention(q, k2, v2, k, v, windows=(3, 5)), rtol=1e-6)


def test_fused_mixing_equals_its_loops():
    weight, mix = (jnp.asarray(x, jnp.float32) for x in normal(6, (7, 3, 5), (3, 3)))
    np.testing.assert_allclose(fuse_mixing(weight, mix), reference_baselines.fuse_mixing(weight, mix), atol=1e-6)


@pytest.mark.parametrize("window", [None, 512])
def test_talking_heads_never_hold_all_logits_of_a_layer(window):
    tokens, heads = 8192, 20
    abstract = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in [(1, tokens, heads, 128)] * 3 + [(20, 20)] * 2]

    def loss(*arguments):
        return talking_heads_attention(*arguments, window=window).astype(jnp.float32).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=tuple(range(5))))(*abstract).jaxpr
    logits = tokens * tokens * heads if window is None else tokens * 2 * window * heads
    assert tokens * heads * 128 <= largest_array(jaxpr) < logits / (20 if window is None else 3)


def test_windowed_simplicial_holds_a_block_of_logits():
    tokens, heads = 8192, 4
    abstract = [jax.ShapeDtypeStruct((1, tokens, heads, 64), jnp.float32)] * 5

    def loss(*arguments):
        return simplicial_attention(*arguments, windows=(512, 32)).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=tuple(range(5))))(*abstract).jaxpr
    assert largest_array(jaxpr) < tokens * 512 * 32 * heads / 10


def test_bad_arguments_are_refused_at_trace_time():
    arguments = {
        run: [jnp.zeros(s, jnp.float32) for s in shapes(run, 4, 2)[0]]
        for run in (talking_heads_attention, differential_attention, simplicial_attention)
    }
    q, k, v, before, after = arguments[talking_heads_attention]
    for run, args in arguments.items():
        refused("q has shape", run, q[0], *args[1:])
        refused("k has shape", run, q, k[:, 1:], *args[2:])
        refused("segment_ids has", run, *args, segment_ids=jnp.ones((B, N)))
        refused("implementation.*'blockwise'", run, *args, implementation="blokwise")
        if run is not simplicial_attention:
            refused("window", run, *args, window=0)
    talk, differ, pairs = arguments
    refused("logits_mix has shape", talk, q, k, v, before[:3], after)
    refused("weights_mix has shape", talk, q, k, v, before, after[:, :3])
    refused("weights_mix has dtype", talk, q, k, v, before, after.astype(jnp.bfloat16))
    refused("expected even", differ, q[:, :, :3], k[:, :, :1], v, jnp.float32(0))
    refused(r"v has shape .*expected \[2, 13, 1, e\], half as many heads as k", differ, q, k, v, jnp.float32(0))
    refused("lambda_ has shape", differ, q, k, v[:, :, :1], jnp.zeros(2))
    refused("k2 is", pairs, q, k, v, k[:, :, :1], v)
    refused("v2 is", pairs, q, k, v, k, v.astype(jnp.bfloat16))
    for windows in (3, (3,), (0, 2), (3, True), (3, 2.0)):
        refused("window", pairs, q, k, v, k, v, windows=windows)
    refused("mix has shape", fuse_mixing, jnp.zeros((5, 3, 2)), jnp.zeros((2, 2)))
    refused("weight has shape", fuse_mixing, jnp.zeros(3), jnp.zeros((3, 3)))
