"""Attention weights for looking at: with the values they give what the attention operations give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iha_jax.ops import (
    attention_weights,
    collapse_heads,
    dot_product_attention,
    interleaved_attention_weights,
    interleaved_head_attention,
    mix_heads,
)

B, N, H, K, P, D, E = 2, 5, 4, 2, 3, 6, 7
SEGMENTS = jnp.asarray([[1, 1, 2, 2, 2], [3, 3, 3, 0, 0]])


def normal(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize(
    ("causal", "window", "segment_ids"), [(True, None, None), (True, 3, SEGMENTS), (False, 2, None)], ids=str
)
def test_weights_of_mha_times_values_are_its_output(causal, window, segment_ids):
    q, k, v = normal((B, N, H, D), (B, N, K, D), (B, N, K, E))
    call = dict(causal=causal, window=window, segment_ids=segment_ids)
    weights = attention_weights(q, k, **call)
    assert weights.shape == (B, H, N, N)
    out = jnp.einsum("bhnm,bmhe->bnhe", weights, jnp.repeat(v, H // K, axis=2))
    np.testing.assert_allclose(out, dot_product_attention(q, k, v, **call, implementation="reference"), atol=1e-5)


@pytest.mark.parametrize(
    ("causal", "causality", "window", "rope_positions", "segment_ids"),
    [
        (True, "virtual", None, "virtual", None),
        (True, "virtual", 2, "token", SEGMENTS),
        (True, "token", 3, "virtual", None),
        (False, "token", 2, None, SEGMENTS),
        (False, "virtual", None, None, None),
    ],
    ids=str,
)
def test_weights_of_pseudo_pairs_times_pseudo_values_are_the_output(
    causal, causality, window, rope_positions, segment_ids
):
    shapes = [(B, N, H, D), (B, N, K, D), (B, N, K, E), (H, H, P), (K, H, P), (K, H, P), (H, H, P)]
    q, k, v, alpha_q, alpha_k, alpha_v, collapse = normal(*shapes)
    call = dict(
        causal=causal,
        causality=causality,
        window=window,
        rope_theta=rope_positions and 100.0,
        rope_positions=rope_positions or "virtual",
        segment_ids=segment_ids,
    )
    weights = interleaved_attention_weights(q, k, alpha_q, alpha_k, **call)
    assert weights.shape == (B, H, P, P, N, N)
    out = collapse_heads(jnp.einsum("bhprnm,bmhre->bnhpe", weights, mix_heads(v, alpha_v)), collapse)
    expected = interleaved_head_attention(
        q, k, v, alpha_q, alpha_k, alpha_v, collapse, **call, implementation="reference"
    )
    np.testing.assert_allclose(out, expected, atol=2e-5)


def test_the_order_of_the_virtual_sequence():
    """With a virtual mask and equal scores virtual query i sees keys 0 to i, each by 1 / (i + 1)."""
    q, k, alpha_q, alpha_k = (jnp.zeros(shape) for shape in ((1, N, H, D), (1, N, K, D), (H, H, P), (K, H, P)))
    weights = interleaved_attention_weights(q, k, alpha_q, alpha_k)
    virtual = weights.transpose(0, 1, 4, 2, 5, 3).reshape(1, H, N * P, N * P)
    expected = np.tril(np.ones((N * P, N * P))) / np.arange(1, N * P + 1)[:, None]
    np.testing.assert_allclose(virtual, np.broadcast_to(expected, virtual.shape), atol=1e-6)


def test_weights_are_float32_of_half_precision_and_zero_for_padding():
    q, k = (x.astype(jnp.bfloat16) for x in normal((B, N, H, D), (B, N, K, D)))
    weights = jax.jit(attention_weights)(q, k, segment_ids=SEGMENTS)
    assert weights.dtype == jnp.float32
    sums = np.broadcast_to((SEGMENTS != 0)[:, None], (B, H, N))
    np.testing.assert_allclose(weights.sum(-1), sums, atol=1e-6)
