"""Diagnostics against hand-computed values and against the dense attention logits of a whole model."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iha_jax.model import bind, initialize
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
