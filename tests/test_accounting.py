"""Accounting against what is really there: the parameter tree, and every pair of positions counted one by one."""

import dataclasses
import itertools

import jax
import pytest

from iha_jax.accounting import (
    Parameters,
    count_parameters,
    flops_per_token,
    layer_pairs,
    training_flops_per_token,
    visible_pairs,
)
from iha_jax.config import IHA_KINDS
from iha_jax.model import abstract_parameters
from iha_jax.ops.reference import visible
from tests.tiny import HYBRID, tiny

MIXING = ("alpha_query", "alpha_key", "alpha_value", "collapse")
ROLES = {"attention": "attention", "mlp": "mlp", "embedding": "embedding", "unembedding": "embedding"}


def counted(model):
    """Parameters by role, from the leaves of the real (abstract) tree and their names alone."""
    found = dict.fromkeys(("embedding", "attention", "mixing", "mlp", "norms"), 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_parameters(model)):
        names = [entry.key for entry in path]
        module = names[2] if names[0] in ("groups", "remainder") else names[0]
        role = "mixing" if names[-1] in MIXING else ROLES.get(module, "norms")
        found[role] += leaf.size
    return Parameters(**found)


PAIR_KINDS = ("mha", "mha_local", "iha", "iha_local")  # the others: tests/test_attention_contract.py
PATTERNS = [*((kind,) for kind in PAIR_KINDS), HYBRID]  # HYBRID: 5 layers, one repetition and two left over


@pytest.mark.parametrize("pattern", PATTERNS, ids="-".join)
def test_parameters_are_those_of_the_tree(pattern):
    others = (("gelu", True, False), ("swiglu", False, True), ("gelu", False, True))
    grid = itertools.product((0, 2), ("global", "per_head"), (1, 3), others)
    for K, collapse, P, (mlp, tied, qk_norm) in grid:
        model = tiny(
            model__layer_pattern=pattern,
            model__num_kv_heads=K,
            model__iha__collapse=collapse,
            model__iha__pseudo_heads=P,
            model__mlp=mlp,
            model__tie_embeddings=tied,
            model__qk_norm=qk_norm,
            model__head_width=4 if mlp == "gelu" else 6,  # 6: H d is not D
        ).model
        assert count_parameters(model) == counted(model), (pattern, K, collapse, P, mlp, tied, qk_norm)
        assert count_parameters(model).total == sum(x.size for x in jax.tree.leaves(abstract_parameters(model)))


def test_iha_adds_four_squares_of_heads_a_layer():
    model = tiny(model__layer_pattern=HYBRID).model
    H, P = model.num_heads, model.iha.pseudo_heads
    without = count_parameters(tiny(model__layer_pattern=("mha",)).model)
    assert count_parameters(model).total - without.total == 4 * H**2 * P * model.layer_kinds.count("iha_local")


def pairs_one_by_one(N, reach, causal):
    return sum(visible(i, j, causal=causal, reach=reach) for i in range(N) for j in range(N))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("N", [1, 2, 7, 13])
def test_visible_pairs_counted_one_by_one(N, causal):
    for window in (None, 1, 2, 5, 7, 12, 13, 29):
        assert visible_pairs(N, window, causal=causal) == pairs_one_by_one(N, window, causal), window


@pytest.mark.parametrize("causality", ["virtual", "token"])
@pytest.mark.parametrize("kind", PAIR_KINDS)
def test_pairs_of_a_layer_counted_one_by_one(kind, causality):
    """Every pair of (virtual) positions of one head, with the reference's own rule of who sees whom."""
    for N, P, window in itertools.product((5, 11), (1, 2, 3), (1, 3, 5)):
        model = tiny(
            model__context_length=N,
            model__window=window,
            model__layer_pattern=(kind,),
            model__iha__pseudo_heads=P,
            model__iha__window=window,
            model__iha__causality=causality,
        ).model
        units = [n for n in range(N)]
        reach = window if kind.endswith("_local") else None
        if kind in IHA_KINDS:
            units = [n * P + p if causality == "virtual" else n for n in range(N) for p in range(P)]
            reach = reach * P if reach and causality == "virtual" else reach
        expected = sum(visible(i, j, causal=True, reach=reach) for i in units for j in units)
        assert layer_pairs(model, kind) == expected, (N, P, window)


@pytest.mark.parametrize("pattern", PATTERNS, ids="-".join)
def test_flops_follow_from_parameters_and_pairs(pattern):
    """A weight matrix costs 2 FLOPs a token and entry, a mixing weight 2 d; a visible pair costs 4 d FLOPs a head."""
    for K, mlp, tied, collapse in itertools.product((0, 2), ("gelu", "swiglu"), (True, False), ("global", "per_head")):
        model = tiny(
            model__layer_pattern=pattern,
            model__num_kv_heads=K,
            model__mlp=mlp,
            model__tie_embeddings=tied,
            model__iha__collapse=collapse,
        ).model
        parameters, flops = counted(model), flops_per_token(model)
        pairs = sum(layer_pairs(model, kind) for kind in model.layer_kinds)
        assert flops.projections == 2 * parameters.attention
        assert flops.mixing == 2 * model.head_width * parameters.mixing
        assert flops.mlp == 2 * parameters.mlp
        assert flops.output == 2 * model.vocab_size * model.width
        assert flops.scores * model.context_length == pytest.approx(4 * model.head_width * model.num_heads * pairs)
        parts = (flops.projections, flops.scores, flops.mixing, flops.mlp, flops.output)
        assert training_flops_per_token(model) == pytest.approx(3 * sum(parts))


def test_matched_window_makes_the_scores_of_local_iha_those_of_global_mha():
    """PAPER section 4.1 with `W = N / (2 P^2)`: equal up to the halves of diagonals, 1 part in N."""
    model = tiny(model__context_length=2048, model__iha__pseudo_heads=4, model__iha__window=0).model
    assert model.iha.window == 64
    assert layer_pairs(model, "iha_local") / layer_pairs(model, "mha") == pytest.approx(1, rel=0.02)


def test_a_layer_kind_without_a_formula_is_an_error():
    model = tiny().model
    unknown = dataclasses.replace(model, layer_pattern=("mha", "made_up"))
    for count in (count_parameters, flops_per_token):
        with pytest.raises(ValueError, match="'made_up' has no formula"):
            count(unknown)
