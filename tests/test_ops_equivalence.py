"""Streaming IHA and block-wise attention equal the reference: forward and every gradient, float32 and float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iha_jax.ops import blockwise, dot_product_attention, interleaved_head_attention
from iha_jax.ops import reference as loops
from iha_jax.ops.streaming import streaming_interleaved_attention

B, N, D, E = 2, 13, 6, 5  # batch, tokens, head width, value width
SEGMENTS = np.asarray([[1] * 4 + [2] * 6 + [0] * 3, [0, 7, 7, 7, 7, 7, 3, 3, 3, 3, 3, 3, 3]])
enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64


def normal(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape) for shape in shapes]


def value_and_gradients(function, arguments, weights, dtype):
    arguments = [jnp.asarray(x, dtype) for x in arguments]

    def loss(*arguments):
        out = function(*arguments)
        return jnp.sum(out * jnp.asarray(weights, dtype)), out

    gradients, out = jax.jit(jax.grad(loss, argnums=tuple(range(len(arguments))), has_aux=True))(*arguments)
    return [np.asarray(x) for x in (out, *gradients)]


def assert_all_close(got, expected, tolerance):
    for x, y in zip(got, expected, strict=True):
        assert x.shape == y.shape
        # A window of one token has weights of 1: its gradients of queries and keys are 0, and so must ours be.
        error = np.linalg.norm(x.astype(np.float64) - y) / (np.linalg.norm(y) or 1)
        assert error < tolerance, error


def compare(fast, slow, arguments, weights):
    """float32 and float64 of `fast` against float64 of `slow`."""
    with enable_x64(True):
        expected = value_and_gradients(slow, arguments, weights, jnp.float64)
        assert_all_close(value_and_gradients(fast, arguments, weights, jnp.float64), expected, 1e-10)
    assert_all_close(value_and_gradients(fast, arguments, weights, jnp.float32), expected, 1e-5)


def interleaved_arguments(H, K, P, collapse):
    shapes = [(B, N, H, D), (B, N, K, D), (B, N, K, E), (H, H, P), (K, H, P), (K, H, P)]
    return normal(0, *shapes, (H, H, P) if collapse == "global" else (H, P))


# A covering design: every value of every switch, and most pairs, in nine compilations.
CASES = [
    # H, K, P, collapse, causal, causality, window, rope_positions, segments, chunk
    (4, 2, 3, "global", True, "virtual", 3, "virtual", True, 2),
    (3, 3, 2, "per_head", True, "virtual", 1, "token", False, 5),
    (6, 3, 2, "global", True, "virtual", None, "virtual", False, 4),
    (4, 4, 2, "per_head", True, "token", 5, "virtual", True, 3),
    (4, 1, 3, "global", True, "token", None, None, True, 3),
    (2, 2, 5, "global", True, "virtual", 12, None, True, None),
    (3, 1, 3, "per_head", False, "virtual", 4, "virtual", True, 3),
    (2, 1, 3, "global", False, "token", 2, "token", False, None),
    (4, 2, 2, "per_head", False, "virtual", None, "token", True, 4),
]


def check_interleaved(H, K, P, collapse, causal, causality, window, rope_positions, segments, chunk):
    arguments = interleaved_arguments(H, K, P, collapse)
    settings = dict(
        causal=causal,
        causality=causality,
        window=window,
        rope_theta=rope_positions and 100.0,
        rope_positions=rope_positions or "virtual",
        segment_ids=jnp.asarray(SEGMENTS) if segments else None,
    )

    def streaming(q, k, v, *mixing):
        return streaming_interleaved_attention(q, k, v, mixing, **settings, chunk=chunk)

    slow = functools.partial(interleaved_head_attention, **settings, implementation="reference")
    compare(streaming, slow, arguments, normal(1, (B, N, H, E))[0])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_streaming_equals_reference(case):
    check_interleaved(*case)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    itertools.product(
        [True, False], ["virtual", "token"], [1, 3, 7, None], ["virtual", "token", None], [False, True], [1, 3, None]
    ),
    ids=str,
)
def test_streaming_equals_reference_on_every_combination(case):
    check_interleaved(4, 2, 3, "global", *case)


@pytest.mark.parametrize(
    ("tokens", "H", "K", "causal", "window", "segments"),
    [
        (13, 6, 2, True, None, True),
        (13, 3, 3, True, 4, False),
        (13, 4, 2, False, 3, True),
        (13, 2, 1, False, None, False),
        (131, 2, 1, True, None, True),  # three blocks
        (131, 2, 2, True, 67, False),
    ],
)
def test_blockwise_equals_reference(tokens, H, K, causal, window, segments):
    *arguments, weights = normal(2, (B, tokens, H, D), (B, tokens, K, D), (B, tokens, K, E), (B, tokens, H, E))
    ids = jnp.asarray(np.resize(SEGMENTS, (B, tokens))) if segments else None
    settings = dict(causal=causal, window=window, segment_ids=ids)
    fast = functools.partial(dot_product_attention, **settings, implementation="blockwise")
    compare(fast, functools.partial(loops.dot_product_attention, **settings), arguments, weights)


@pytest.mark.parametrize("segments", [True, False])
def test_heads_worked_on_in_turn_equal_reference(monkeypatch, segments):
    """The order a CPU takes for long contexts: one key head of one row after the other."""
    assert blockwise.heads_at_once(4, 2, N) == 4
    monkeypatch.setattr(blockwise, "CPU_SCORES", 1)
    assert blockwise.heads_at_once(4, 2, N) == 1
    *arguments, weights = normal(3, (B, N, 4, D), (B, N, 2, D), (B, N, 2, E), (B, N, 4, E))
    settings = dict(causal=True, window=None, segment_ids=jnp.asarray(SEGMENTS) if segments else None)
    fast = functools.partial(dot_product_attention, **settings)
    compare(fast, functools.partial(loops.dot_product_attention, **settings), arguments, weights)


@pytest.mark.parametrize("heads", [1, 7, 12])
def test_heads_at_once_divides_the_heads_and_bounds_the_scores(heads):
    for N in (64, 512, 2048, 8192):
        few, scores = blockwise.heads_at_once(heads, 3, N), 3 * blockwise.block_size(N) * N
        assert heads % few == 0
        assert few == 1 or few * scores <= blockwise.CPU_SCORES
        larger = [b for b in range(few + 1, heads + 1) if heads % b == 0]
        assert not larger or larger[0] * scores > blockwise.CPU_SCORES


@pytest.mark.parametrize("window", [N, N + 5])
def test_a_window_of_the_whole_context_is_no_window(window):
    arguments = [jnp.asarray(x, jnp.float32) for x in interleaved_arguments(2, 2, 3, "global")]
    np.testing.assert_array_equal(
        interleaved_head_attention(*arguments, window=window), interleaved_head_attention(*arguments)
    )
    np.testing.assert_array_equal(
        dot_product_attention(*arguments[:3], window=window), dot_product_attention(*arguments[:3])
    )


def test_bfloat16_stays_near_float32():
    arguments = [jnp.asarray(x, jnp.bfloat16) for x in interleaved_arguments(4, 2, 3, "global")]
    wide = [x.astype(jnp.float32) for x in arguments]
    for window in (3, None):
        run = functools.partial(interleaved_head_attention, window=window, rope_theta=100.0)
        out, expected = run(*arguments), run(*wide)
        assert out.dtype == jnp.bfloat16
        assert jnp.linalg.norm(out.astype(jnp.float32) - expected) < 0.03 * jnp.linalg.norm(expected)
    out, expected = dot_product_attention(*arguments[:3]), dot_product_attention(*wide[:3])
    assert out.dtype == jnp.bfloat16
    assert jnp.linalg.norm(out.astype(jnp.float32) - expected) < 0.01 * jnp.linalg.norm(expected)
