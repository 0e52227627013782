"""Diagnostics against hand-computed values and against the dense attention logits of a whole model."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iha_jax.model import bind, initialize
from iha_jax.ops import apply_rope
from iha_jax.training.diagnostics import (
    effective_pseudo_heads,
    largest_logit,
    mixing_diagnostics,
    pseudo_head_distance,
)
from tests.test_model import KEY, perturbed, random_tokens
from tests.tiny import tiny


def test_identical_pseudo_heads_have_distance_zero_and_effective_p_one():
    alpha = jnp.broadcast_to(jnp.eye(5)[:, :, None], (5, 5, 3))
    assert pseudo_head_distance(alpha) == 0
    assert effective_pseudo_heads(alpha) == pytest.approx(1)


def test_orthogonal_pseudo_heads_have_distance_sqrt_two_and_effective_p_p():
    alpha = jnp.stack([jnp.roll(jnp.eye(5), p, axis=0) for p in range(3)], axis=-1)
    assert pseudo_head_distance(alpha) == pytest.approx(math.sqrt(2))
    assert effective_pseudo_heads(alpha) == pytest.approx(3)


def test_effective_p_is_the_participation_ratio_of_singular_values():
    alpha = np.random.default_rng(0).normal(size=(7, 5, 3))
    expected = []
    for h in range(5):
        squares = np.linalg.svd(alpha[:, h], compute_uv=False) ** 2
        expected.append(squares.sum() ** 2 / (squares**2).sum())
    assert effective_pseudo_heads(jnp.asarray(alpha)) == pytest.approx(np.mean(expected), rel=1e-5)


def test_mixing_diagnostics_average_over_stacked_and_left_over_layers():
    config = tiny()
    parameters = perturbed(initialize(config.model, KEY))
    found = mixing_diagnostics(parameters)
    norms = [
        np.linalg.norm(layer)
        for group, blocks in (("groups", ("block_0", "block_1")), ("remainder", ("block_0", "block_1")))
        for block in blocks
        for layer in np.reshape(parameters[group][block]["attention"]["collapse"], (-1, 6, 6, 3))
    ]
    assert found["collapse_norm"] == pytest.approx(np.mean(norms), rel=1e-5)
    assert {"alpha_query_distance", "alpha_key_effective_p", "alpha_value_norm"} < set(found)


def test_largest_logit_of_one_mha_layer():
    config = tiny(model__layer_pattern=("mha",), model__num_layers=1, model__num_heads=2, model__head_width=4)
    parameters = perturbed(initialize(config.model, KEY))
    tokens = random_tokens(config, batch=1)
    segments = jnp.asarray([[1] * 10 + [2] * 13])
    got = largest_logit(config.model, parameters, tokens, segments)

    block = jax.tree.map(lambda x: x[0], bind(config.model, parameters).groups).block_0
    x = bind(config.model, parameters).embedding[...][tokens]
    q, k, _ = (np.asarray(t[0], np.float64) for t in block.attention.project(block.attention_norm(x)))
    frequency = 10_000.0 ** (-np.arange(0, 4, 2) / 4)
    largest = -np.inf
    for i in range(23):
        for j in range(i + 1):
            if (i < 10) != (j < 10):
                continue
            rotation = np.exp(1j * (i - j) * frequency)
            for h in range(2):
                complex_q, complex_k = q[i, h, :2] + 1j * q[i, h, 2:], k[j, h, :2] + 1j * k[j, h, 2:]
                largest = max(largest, np.real(np.sum(complex_q * rotation * np.conj(complex_k))) / 2)
    assert got == pytest.approx(largest, rel=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["talking_heads", "simplicial_local"])
def test_largest_logit_of_mixed_and_trilinear_logits(kind, causal):
    config = tiny(
        model__layer_pattern=(kind,),
        model__num_layers=1,
        model__num_kv_heads=2,
        model__simplicial__window=5,
        model__simplicial__second_window=3,
    )
    model = dataclasses.replace(config.model, causal=causal)
    parameters = perturbed(initialize(model, KEY), scale=0.3)
    tokens = random_tokens(config, batch=1)
    got = largest_logit(model, parameters, tokens, jnp.asarray([[1] * 10 + [2] * 13]))

    block = jax.tree.map(lambda x: x[0], bind(model, parameters).groups).block_0
    x = block.attention_norm(bind(model, parameters).embedding[...][tokens])
    q, k, _ = block.attention.project(x)
    if kind == "talking_heads":
        q, k = (np.asarray(apply_rope(y, theta=model.rope_theta)[0], np.float64) for y in (q, k))
        mix = np.asarray(block.attention.logits_mix[...], np.float64)
    else:
        k2 = np.asarray(block.attention.project_second(x)[0][0], np.float64)
        q, k = (np.asarray(y[0], np.float64) for y in (q, k))

    def sees(i, j, reach=23):
        return abs(i - j) < reach and (j <= i or not causal) and (i < 10) == (j < 10)

    found = []
    for i in range(23):
        for j in filter(lambda j: sees(i, j, 23 if kind == "talking_heads" else 5), range(23)):
            if kind == "talking_heads":
                found += list(mix.T @ [q[i, h] @ k[j, h // 3] / 2 for h in range(6)])
            else:
                pairs = [m for m in range(23) if sees(i, m, 3)]
                found += [np.sum(q[i, h] * k[j, h // 3] * k2[m, h // 3]) / 2 for m in pairs for h in range(6)]
    assert got == pytest.approx(max(found), rel=1e-5)
