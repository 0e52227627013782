"""What the attention operations promise: masks exact to the token, nothing leaks, superset cases, RoPE far out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iha_jax.ops import (
    apply_rope,
    collapse_heads,
    dot_product_attention,
    interleave,
    interleaved_head_attention,
    mix_heads,
)
from iha_jax.ops.streaming import streaming_interleaved_attention

N, H, P, D = 11, 3, 3, 4


def normal(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def inputs(batch=1):
    return normal(0, *[(batch, N, H, D)] * 3, *[(H, H, P)] * 4)


def identity_copies():
    return jnp.broadcast_to(jnp.eye(H)[:, :, None], (H, H, P))


def influence(function, values):
    """[N, N]: whether output token n depends on value token m."""
    jacobian = jax.jit(jax.jacrev(lambda v: function(v).sum((0, 2, 3))))(values)  # [N, 1, N, K, e]
    return np.asarray(jnp.abs(jacobian).sum((1, 3, 4)) > 0)


@pytest.mark.parametrize("window", [1, 3, 10, None])
@pytest.mark.parametrize("causality", ["virtual", "token"])
def test_a_token_sees_exactly_its_window(causality, window):
    q, k, v, *mixing = inputs()
    seen = influence(lambda v: interleaved_head_attention(q, k, v, *mixing, causality=causality, window=window), v)
    distance = np.arange(N)[:, None] - np.arange(N)
    # Virtual causality: query (n, 0) still sees pseudo-keys 1..P-1 of token n - window.
    farthest = N if window is None else window if causality == "virtual" else window - 1
    np.testing.assert_array_equal(seen, (distance >= 0) & (distance <= farthest))


@pytest.mark.parametrize("implementation", ["reference", "streaming"])
def test_window_edge_is_exact_to_the_pseudo_head(implementation):
    """Which pseudo-values of which token reach pseudo-query p, by mixing weights that single out one of each."""
    q, k, v, alpha_q, alpha_k, alpha_v, _ = inputs()
    window, query, run = 2, 7, functools.partial(interleaved_head_attention, implementation=implementation)

    @jax.jit
    def reached(pick_query, pick_value):
        collapse = jnp.broadcast_to(pick_query, (H, P))
        out = lambda v: run(q, k, v, alpha_q, alpha_k, alpha_v * pick_value, collapse, window=window)  # noqa: E731
        return jnp.abs(jax.grad(lambda v: out(v)[:, query].sum())(v)).sum((0, 2, 3)) > 0

    for p in range(P):
        for p_key in range(P):
            distance = (query - np.arange(N)) * P + p - p_key
            expected = (distance >= 0) & (distance < window * P)
            np.testing.assert_array_equal(reached(jnp.eye(P)[p], jnp.eye(P)[p_key]), expected)


@pytest.mark.parametrize("window", [1, 4, None])
@pytest.mark.parametrize("causal", [True, False])
def test_mha_window_is_exact_to_the_token(causal, window):
    q, k, v = inputs()[:3]
    seen = influence(lambda v: dot_product_attention(q, k, v, causal=causal, window=window), v)
    distance = np.arange(N)[:, None] - np.arange(N)
    reach = N if window is None else window
    np.testing.assert_array_equal(seen, (np.abs(distance) < reach) & ((distance >= 0) | (not causal)))


@pytest.mark.parametrize("mechanism", ["mha", "mha_local", "iha", "iha_local"])
def test_segments_and_padding_do_not_leak(mechanism):
    q, k, v, *mixing = inputs()
    ids = jnp.asarray([[5] * 4 + [2] * 4 + [0] * 3])
    window = 3 if mechanism.endswith("local") else None

    def run(q, k, v, **settings):
        if mechanism.startswith("mha"):
            return dot_product_attention(q, k, v, causal=False, window=window, **settings)
        return interleaved_head_attention(q, k, v, *mixing, causal=False, window=window, **settings)

    out = run(q, k, v, segment_ids=ids)
    assert not np.asarray(out[:, 8:]).any()
    alone = run(*(x[:, 4:8] for x in (q, k, v)))
    np.testing.assert_allclose(out[:, 4:8], alone, rtol=1e-5, atol=1e-5)
    gradients = jax.jit(jax.grad(lambda *x: (run(*x, segment_ids=ids) ** 2).sum(), argnums=(0, 1, 2)))(q, k, v)
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        assert not np.asarray(gradient[:, 8:]).any()


def test_all_padding_gives_exact_zeros():
    arguments = inputs()
    nothing = jnp.zeros((1, N), jnp.int32)
    for run, count in ((dot_product_attention, 3), (interleaved_head_attention, 7)):
        for window in (2, None):
            total = lambda *x, run=run, w=window: jnp.sum(run(*x, window=w, segment_ids=nothing) + 0)  # noqa: E731
            value, gradients = jax.jit(jax.value_and_grad(total, argnums=tuple(range(count))))(*arguments[:count])
            assert value == 0
            assert not any(np.asarray(gradient).any() for gradient in gradients)


@pytest.mark.parametrize("window", [2, None])
@pytest.mark.parametrize("implementation", ["reference", "auto"])
def test_nan_in_one_row_stays_there(implementation, window):
    q, k, v, *mixing = (x[:, :5] if x.ndim == 4 else x for x in inputs(batch=3))
    q, k, v = (x.at[1, 3].set(jnp.nan) for x in (q, k, v))
    settings = dict(window=window, implementation=implementation)

    @jax.jit
    def run(q, k, v):
        iha = interleaved_head_attention(q, k, v, *mixing, rope_theta=10.0, **settings)
        return iha, dot_product_attention(q, k, v, **settings)

    def loss(*arguments):
        return sum(jnp.sum(out[::2] ** 2) for out in run(*arguments))

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)
    for x in (*run(q, k, v), *gradients):
        assert np.isfinite(x[::2]).all()
    assert all(np.isnan(x[1]).any() for x in run(q, k, v))


@pytest.mark.parametrize("rope_theta", [None, 10.0])
@pytest.mark.parametrize("window", [None, 4])
def test_identity_copies_are_mha_where_the_paper_mechanism_allows(window, rope_theta):
    q, k, v = inputs()[:3]
    copies, turn = identity_copies(), functools.partial(apply_rope, theta=10.0)
    rotated = (turn(q), turn(k)) if rope_theta else (q, k)
    mha = dot_product_attention(*rotated, v, window=window)
    run = functools.partial(interleaved_head_attention, q, k, v, copies, copies, copies, window=window)
    run = functools.partial(run, rope_theta=rope_theta, rope_positions="token")
    any_sum_to_one = jnp.broadcast_to(jnp.asarray([0.5, 0.75, -0.25]), (H, P))
    last = jnp.broadcast_to(jnp.asarray([0.0, 0.0, 1.0]), (H, P))
    np.testing.assert_allclose(run(any_sum_to_one, causality="token"), mha, rtol=2e-5, atol=2e-6)
    # The last pseudo-query's window holds whole tokens, as MHA's does.
    np.testing.assert_allclose(run(last, causality="virtual"), mha, rtol=2e-5, atol=2e-6)
    if rope_theta:
        turned = run(last, causality="virtual", rope_positions="virtual")
        assert np.abs(turned - mha).max() > 1e-3


def test_symmetry_trap():
    """Token mask, no virtual RoPE: identical pseudo-keys and values get identical gradients, so P stays 1."""
    q, k, v, alpha_q, *_, collapse = inputs()
    copies = identity_copies()

    def spread(alpha_k, alpha_v, **settings):
        """How far the P pseudo-heads' gradients are apart."""
        loss = lambda *alphas: jnp.sum(  # noqa: E731
            interleaved_head_attention(q, k, v, alpha_q, *alphas, collapse, **settings) ** 2
        )
        gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(alpha_k, alpha_v)
        return min(float(jnp.abs(x - x[:, :, :1]).max() / jnp.abs(x).max()) for x in gradients)

    trapped = dict(causality="token", rope_theta=10.0, rope_positions="token")
    assert spread(copies, copies, **trapped) < 1e-5
    noise_k, noise_v = (0.05 * x for x in normal(5, copies.shape, copies.shape))
    assert spread(copies + noise_k, copies + noise_v, **trapped) > 1e-3
    assert spread(copies, copies, **(trapped | dict(rope_positions="virtual"))) > 1e-3
    assert spread(copies, copies, **(trapped | dict(causality="virtual"))) > 1e-3


def test_virtual_sequence_is_token_major():
    x, alpha, collapse = normal(3, (2, 5, 2, 4), (2, 3, 7), (3, 3, 7))
    mixed = mix_heads(x, alpha)
    assert mixed.shape == (2, 5, 3, 7, 4)
    virtual = interleave(mixed)
    assert virtual.shape == (2, 35, 3, 4)
    expected = alpha[0, 2, 6] * x[1, 4, 0] + alpha[1, 2, 6] * x[1, 4, 1]
    np.testing.assert_allclose(virtual[1, 4 * 7 + 6, 2], expected, rtol=1e-5)
    out = collapse_heads(mixed, collapse)
    np.testing.assert_allclose(out[1, 4, 2], np.tensordot(collapse[2], mixed[1, 4], 2), rtol=1e-4, atol=1e-5)
    per_head = collapse_heads(mixed, collapse[0])
    np.testing.assert_allclose(per_head[1, 4, 2], collapse[0, 2] @ mixed[1, 4, 2], rtol=1e-4, atol=1e-5)


def test_rope_angles_are_right_at_position_163839():
    N, theta, d = 163_840, 500_000.0, 4
    x = normal(4, (1, 1, 1, d))[0]
    out = jax.jit(lambda x: apply_rope(jnp.broadcast_to(x, (1, N, 1, d)), theta=theta))(x)[0, :, 0]
    angles = np.arange(N)[:, None] * theta ** (-np.arange(0, d, 2) / d)
    first, second = np.split(np.asarray(x, np.float64).reshape(-1), 2)
    expected = np.concatenate(
        [first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)], -1
    )
    assert np.abs(out - expected).max() < 2e-6


def test_virtual_rope_far_out_equals_numpy_in_float64():
    N, P, W, theta, d = 1021, 13, 5, 1e4, 6
    q, k, v, *alphas = normal(6, *[(1, N, 1, d)] * 3, *[(1, 1, P)] * 3)
    collapse = jnp.asarray([[0.0, 1.0] + [0.0] * (P - 2)])
    run = functools.partial(interleaved_head_attention, window=W, rope_theta=theta)
    out = run(q, k, v, *alphas, collapse)[0, :, 0]
    q, k, v, aq, ak, av = (np.asarray(x, np.float64).squeeze() for x in (q, k, v, *alphas))
    inverse = theta ** (-np.arange(0, d, 2) / d)

    def turned(x, positions):
        z = (x[:, : d // 2] + 1j * x[:, d // 2 :]) * np.exp(1j * positions[:, None] * inverse)
        return np.concatenate([z.real, z.imag], -1)

    for n in (777, 1020):
        i, j = n * P + 1, np.arange((n - W) * P + 2, n * P + 2)
        keys, values = turned(k[j // P] * ak[j % P, None], j), v[j // P] * av[j % P, None]
        weights = np.exp(keys @ turned(q[n : n + 1] * aq[1], np.asarray([i]))[0] / np.sqrt(d))
        assert np.abs(out[n] - weights @ values / weights.sum()).max() < 1e-5


def largest_array(jaxpr):
    """The largest number of elements of any value in a jaxpr, inner ones included."""
    largest = 0
    for equation in jaxpr.eqns:
        largest = max([largest, *(int(np.prod(x.aval.shape)) for x in equation.outvars)])
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                largest = max(largest, largest_array(inner))
    return largest


@pytest.mark.parametrize("segments", [False, True], ids=["", "segments"])
@pytest.mark.parametrize("window", [2, None])
def test_streaming_never_holds_all_pseudo_tokens(window, segments):
    tokens, heads, pseudo, width = 16384, 2, 8, 64
    shapes = [(1, tokens, heads, width)] * 3 + [(heads, heads, pseudo)] * 4
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

    ids = jnp.ones((1, tokens), jnp.int32) if segments else None

    def loss(q, k, v, *mixing):
        settings = dict(causal=True, causality="virtual", rope_theta=1e4, rope_positions="virtual", segment_ids=ids)

        @jax.checkpoint
        def layer(x, _):
            q_k_v = x, x * k, x * v  # all of them the layer's own
            return streaming_interleaved_attention(*q_k_v, mixing, window=window, **settings, chunk=16), None

        return jax.lax.scan(layer, q, None, 2)[0].sum()

    largest = largest_array(jax.make_jaxpr(jax.grad(loss, argnums=tuple(range(7))))(*arguments).jaxpr)
    assert tokens * heads * width <= largest < tokens * pseudo * heads * width / 3


def refused(match, run, *arguments, **settings):
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(functools.partial(run, **settings), *arguments)


def test_bad_arguments_are_refused_at_trace_time():
    q, k, v, *mixing = inputs()
    iha, mha = interleaved_head_attention, dot_product_attention
    refused("q has shape", mha, q[0], k, v)
    refused("k has shape", mha, q, k[:, 1:], v)
    refused("k has shape", mha, q, k[..., 1:], v)
    refused("v has shape", mha, q, k, v[:, :, 1:])
    refused("divisor", mha, q, k[:, :, :2], v[:, :, :2])
    refused("k has dtype", mha, q, k.astype(jnp.bfloat16), v)
    refused("q has dtype", mha, q.astype(int), k, v)
    for window in (0, -3, True, 2.0):
        refused("window", mha, q, k, v, window=window)
        refused("window", iha, q, k, v, *mixing, window=window)
    ids = jnp.ones((1, N), jnp.int32)
    for bad in (ids[:, 1:], ids.astype(jnp.float32)):
        refused("segment_ids has", mha, q, k, v, segment_ids=bad)
    for name in ("cudnn", "splash", "blokwise", None):
        refused("implementation.*'blockwise'", mha, q, k, v, implementation=name)
    for name in ("fused", "stream"):
        refused("implementation.*'streaming'", iha, q, k, v, *mixing, implementation=name)
    for i, name in enumerate(("alpha_q", "alpha_k", "alpha_v", "collapse")):
        refused(f"{name} has shape", iha, q, k, v, *mixing[:i], mixing[i][:, :2], *mixing[i + 1 :])
        refused(f"{name} has dtype", iha, q, k, v, *mixing[:i], mixing[i].astype(jnp.bfloat16), *mixing[i + 1 :])
    refused("causality", iha, q, k, v, *mixing, causality="tokens")
    refused("rope_positions", iha, q, k, v, *mixing, rope_positions="virtul")
    refused("rope_theta", iha, q, k, v, *mixing, rope_theta=-1.0)
    refused("rope_theta", iha, q[..., 1:], k[..., 1:], v, *mixing, rope_theta=10.0)
    refused("theta", apply_rope, q, theta=0.0)
    refused("even head width", apply_rope, q[..., 1:], theta=10.0)
    refused("positions", apply_rope, q, theta=10.0, positions=np.arange(N - 1))
