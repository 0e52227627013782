"""Cached decoding: every step gives the logits of the full forward pass, whatever the mechanism and its switches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iha_jax.accounting import cache_bytes
from iha_jax.evaluation.decoding import mechanisms
from iha_jax.evaluation.decoding.mechanisms import DECODING
from iha_jax.evaluation.decoding.transformer import Decoder, prefill
from iha_jax.model import ATTENTION, bind, initialize
from tests.test_model import KEY, perturbed
from tests.tiny import HYBRID, tiny

KINDS = sorted(ATTENTION)
LENGTHS = np.asarray([1, 7, 13])  # of prompts: shorter than, as long as and longer than the rings


def small(kinds, **changes):
    settings = dict(model__vocab_size=31, model__layer_pattern=kinds, model__num_layers=2, model__context_length=17)
    return tiny(**{**settings, "model__num_heads": 4, "model__head_width": 6, **changes}).model


def decoded(config, parameters, tokens, length):
    """Float32 logits [B, N, V] by one prefill of `LENGTHS` tokens and steps to N, NaN before; and the cache."""
    decoder_step = jax.jit(lambda *arguments: Decoder(config, parameters).step(*arguments))
    padded = np.where(np.arange(LENGTHS.max()) < LENGTHS[:, None], tokens[:, : LENGTHS.max()], 5)
    run = jax.jit(functools.partial(prefill, config, length=length))
    logits, caches = run(parameters, padded, LENGTHS)
    out = np.full((*tokens.shape, config.vocab_size), np.nan, np.float32)
    rows = np.arange(len(tokens))
    out[rows, LENGTHS - 1] = logits
    positions = LENGTHS.copy()
    while (positions < length).any():
        here = np.minimum(positions, length - 1)  # a row at its end writes its last token again
        logits, caches = decoder_step(caches, tokens[rows, here], here)
        out[rows, here] = logits
        positions += 1
    return out, caches


def check(config, length=None, tolerance=1e-5):
    length = length or config.context_length
    parameters = jax.jit(lambda key: perturbed(initialize(config, key), scale=0.1))(KEY)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (len(LENGTHS), length))
    expected = np.asarray(jax.jit(lambda p: bind(config, p)(tokens))(parameters))
    got, caches = decoded(config, parameters, tokens, length)
    there = np.arange(length) >= LENGTHS[:, None] - 1
    assert np.isnan(got[~there]).all() and np.isfinite(got[there]).all()
    off = np.linalg.norm(got[there] - expected[there], axis=-1) / np.linalg.norm(expected[there], axis=-1)
    assert off.max() < tolerance
    assert sum(x.nbytes for x in jax.tree.leaves(caches)) == cache_bytes(config, len(LENGTHS), length)


def test_every_mechanism_can_decode():
    assert set(DECODING) == set(ATTENTION)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_equal_the_full_forward_pass(kind):
    """Two scanned layers, K < H, rings that come round, rows of different lengths."""
    check(small((kind,), model__num_kv_heads=2))
