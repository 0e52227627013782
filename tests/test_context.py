"""Layers whose tokens are split over `context` give the outputs and gradients of the reference on one device."""

import pytest

from tests.several import printed_by

# 15 tokens over 3 devices, which heads do not divide; half as many key heads.
TWO = dict(model__num_heads=2, model__num_kv_heads=1)
CASES = {
    "a window longer than a device's tokens": dict(kind="mha_local", model__window=7, segments=True, **TWO),
    "IHA's window, heads split too": dict(kind="iha_local", segments=True, tensor=2, tokens=18),
    "whole rows for a share of the heads": dict(kind="mha", segments=True, **TWO),
}
SLOW = {
    "both neighbors": dict(kind="mha_local", causal=False, segments=False),
    "a window over all devices": dict(kind="mha_local", model__window=15, segments=False),
    "key heads repeated and not filled up": dict(kind="mha", segments=False, context=5, model__num_heads=20),
    "global IHA, heads split too": dict(kind="iha", segments=True, tensor=2),
    "global IHA, collapsed per head": dict(kind="iha", causal=False, segments=False, model__iha__collapse="per_head"),
    "IHA's window, heads split alone": dict(kind="iha_local", segments=False, tensor=2, context=1, tokens=14),
    "IHA collapsed per head, both neighbors, heads split": dict(
        kind="iha_local", causal=False, segments=True, tensor=2, context=1, tokens=18, model__iha__collapse="per_head"
    ),
    "IHA by tokens, both neighbors": dict(
        kind="iha_local", causal=False, segments=True, model__iha__causality="token", model__iha__rope_positions="token"
    ),
    "two windows of pairs": dict(kind="simplicial_local", segments=False),
    "all pairs": dict(kind="simplicial", segments=True),
    "pairs of heads": dict(kind="differential", segments=True),
}


@pytest.mark.parametrize("cases", [CASES, pytest.param(SLOW, marks=pytest.mark.slow)], ids=["few", "many"])
def test_layers_with_split_tokens_equal_the_reference(cases):
    found = printed_by("tests.context_layers", cases, devices=6)
    assert set(found) == set(cases)
    assert {name: error for name, error in found.items() if not error < 1e-5} == {}
