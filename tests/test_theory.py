"""The theory: every statement holds, closed forms by hand, wrong constructions are caught, bad input is named."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iha_jax.theory import __main__ as command
from iha_jax.theory import cpm3, growth, polynomial_filters, superset
from iha_jax.theory.cpm3 import CPM3Error, Task
from iha_jax.theory.layers import (
    cold_softmax_attention,
    hard_attention,
    interleaved_layer,
    linear_attention,
    routing_mixing,
)
from iha_jax.theory.polynomial_filters import PolynomialFilterError
from iha_jax.theory.statements import Outcome, Statement


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def name(statement):
    return f"{statement.check.__module__.rpartition('.')[2]}.{statement.check.__name__}"


@pytest.mark.parametrize("statement", command.STATEMENTS, ids=name)
def test_the_statement_holds(statement):
    outcome = statement.outcome()
    assert outcome.holds, outcome.evidence


# Wrong constructions have to be seen, by a statement's check or against the definition.


def outcome_with(monkeypatch, module, name, wrong, check):
    monkeypatch.setattr(module, name, wrong)
    return Statement("", check).outcome()


def test_superset_sees_a_wrong_mixing(monkeypatch):
    right = superset.containing_mixing

    def wrong(H, P, selected=0):
        mixing = right(H, P, selected)
        return mixing._replace(alpha_v=np.roll(mixing.alpha_v, 1, axis=0))  # values of the neighboring head

    assert not outcome_with(monkeypatch, superset, "containing_mixing", wrong, superset.check_contained).holds


@pytest.mark.parametrize("wrong_signs", [([1, 1], [1, -1]), ([1, -1], [1, 1])])
def test_strictness_needs_both_signs(monkeypatch, wrong_signs):
    right = superset.signed_mixing
    assert not outcome_with(
        monkeypatch, superset, "signed_mixing", lambda H, *_: right(H, *wrong_signs), superset.check_corrected_example
    ).holds
    np.testing.assert_allclose(repeated_token_head(wrong_signs), [0.0 if wrong_signs[1][1] < 0 else 1.0], atol=1e-12)


def test_opposite_signs_give_tanh_of_the_scaled_score():
    """By hand, D = d = e = 1 and unit weights: q = k = v = x = 1, so the score is 1."""
    np.testing.assert_allclose(repeated_token_head(([1, -1], [1, -1])), [np.tanh(1.0)], atol=1e-12)
    np.testing.assert_allclose(repeated_token_head(([1, -1], [1, 1])), [1.0], atol=1e-12)


def repeated_token_head(signs):
    weights = superset.HeadWeights(*[np.ones((1, 1, 1))] * 3)
    x = jnp.ones((1, 3, 1))
    return np.asarray(superset.public_interleaved_layer(x, weights, superset.signed_mixing(1, *signs)))[0, 0, 0]


def wrong_constructions(right, r):
    """Variants of an IHA construction whose inputs are r numbers and N positions, each wrong in one place."""
    weights, mixing = right
    key = weights.key.copy()
    key[:, r:] = np.swapaxes(weights.key[:, r:], 1, 2)
    swapped = np.swapaxes(mixing.alpha_k, 1, 2)
    last = np.roll(mixing.collapse, 1, axis=2)
    return {
        "a key not transposed": (weights._replace(key=key), mixing),
        "values to the wrong block": (weights._replace(value=weights.value[::-1]), mixing),
        "keys of the own head": (weights, mixing._replace(alpha_k=swapped)),
        "another pseudo-query collapsed": (weights, mixing._replace(collapse=last)),
        "queries of the next head": (weights._replace(query=np.roll(weights.query, 1, axis=0)), mixing),
        "a sign": (weights._replace(query=-weights.query), mixing),
    }


WRONG = list(wrong_constructions(cpm3.iha_construction(4), 1))


@pytest.mark.parametrize("name", WRONG)
def test_polynomial_filters_see(monkeypatch, name):
    right = polynomial_filters.iha_construction

    def wrong(A, r, k):
        construction = right(A, r, k)
        return construction if k < 3 else wrong_constructions(construction, r)[name]

    check = polynomial_filters.check_reconstruction
    assert not outcome_with(monkeypatch, polynomial_filters, "iha_construction", wrong, check).holds


@pytest.mark.parametrize("name", WRONG)
def test_workspaces_see(monkeypatch, name):
    right = cpm3.iha_construction
    monkeypatch.setattr(cpm3, "iha_construction", lambda N: wrong_constructions(right(N), 1)[name])
    sequences, task = np.array([[1, 2, 3, 4, 0]]), Task(M=5, G=12, N_max=5)
    assert not np.array_equal(cpm3.workspace_by_iha(task, sequences)[0], shifts([1, 2, 3, 4, 0]))


def shifts(sequence):
    return [[sequence[(i + s) % len(sequence)] for s in range(len(sequence))] for i in range(len(sequence))]


def test_values_are_scaled_by_the_number_of_ties(monkeypatch):
    right = cpm3.iha_construction

    def unscaled(N):
        weights, mixing = right(N)
        return weights._replace(value=weights.value / cpm3.iha_heads(N)), mixing

    task, sequences = Task(M=5, G=12, N_max=4), np.array([[1, 2, 3, 4]])
    np.testing.assert_array_equal(cpm3.workspace_by_iha(task, sequences)[0], shifts([1, 2, 3, 4]))
    monkeypatch.setattr(cpm3, "iha_construction", unscaled)
    np.testing.assert_allclose(cpm3.workspace_by_iha(task, sequences)[0], np.array(shifts([1, 2, 3, 4])) / 2)


# Against independent code: plain loops over the definitions.


def test_filters_without_any_layer():
    """The mixing, written out: head h has q^h, and keys and values of head j in pseudo-head j."""
    rng = np.random.default_rng(0)
    A, X, k = rng.normal(size=(5, 5)) / 2, rng.normal(size=(5, 2)), 7
    expected, power = [], np.eye(5)
    for _ in range(k):
        expected.append(power @ X)
        power = A @ power
    np.testing.assert_allclose(polynomial_filters.filters_by_mha(A, X, k), expected, rtol=0, atol=1e-11)
    np.testing.assert_allclose(polynomial_filters.filters_by_iha(A, X, k), expected, rtol=0, atol=1e-11)
    assert polynomial_filters.filters_by_iha(A, X, k).shape == (7, 5, 2)


@pytest.mark.parametrize(("M", "G", "N_max"), [(3, 8, 3), (4, 10, 3), (5, 14, 2)])
def test_counts_against_loops(M, G, N_max):
    task = Task(M, G, N_max)
    sequences = [x for N in range(1, N_max + 1) for x in itertools.product(range(M), repeat=N)]
    padded = np.concatenate([task.padded(np.array([x])) for x in sequences])
    expected = [
        [sum((i + G * first + second) % M == 0 for first in x for second in x) for i in x] + [0] * (N_max - len(x))
        for x in sequences
    ]
    for count in (cpm3.brute_force, cpm3.counts_by_mha, cpm3.counts_by_iha):
        np.testing.assert_array_equal(count(task, padded), expected)


def test_sequences_of_several_lengths_in_one_batch():
    task = Task(M=3, G=8, N_max=5)
    batch = np.concatenate([task.padded(np.array([[2, 1, 1]])), np.array([[0, 1, 2, 0, 1]])])
    np.testing.assert_array_equal(cpm3.counts_by_iha(task, batch)[:1], cpm3.counts_by_mha(task, np.array([[2, 1, 1]])))
    np.testing.assert_array_equal(cpm3.counts_by_iha(task, batch), cpm3.brute_force(task, batch))


@pytest.mark.parametrize("wrong", ["kinks", "signs", "factor", "own token"])
def test_a_wrong_mlp_is_seen(wrong):
    task, sequences = Task(M=3, G=8, N_max=3), np.array([[2, 0, 1], [1, 1, 2]])
    mlp, workspace = cpm3.counting_mlp(task), cpm3.workspace_by_mha(task, sequences)
    np.testing.assert_array_equal(cpm3.count_matches(workspace, mlp), cpm3.brute_force(task, sequences))
    changed = {
        "kinks": mlp._replace(bias=mlp.bias - 1),
        "signs": mlp._replace(output=-mlp.output),
        "factor": mlp._replace(hidden=np.minimum(mlp.hidden, 1)),
        "own token": mlp._replace(hidden=mlp.hidden - (np.arange(3) == 0)[:, None]),
    }[wrong]
    assert not np.array_equal(cpm3.count_matches(workspace, changed), cpm3.brute_force(task, sequences))


def test_hard_attention_averages_ties():
    q, k = jnp.ones((1, 3, 1, 1)), jnp.array([2.0, 2.0, 1.0]).reshape(1, 3, 1, 1)
    v = jnp.array([[3.0, 0.0], [5.0, 1.0], [100.0, 100.0]]).reshape(1, 3, 1, 2)
    np.testing.assert_array_equal(hard_attention(q, k, v)[0, 0, 0], [4.0, 0.5])
    np.testing.assert_allclose(cold_softmax_attention(40.0)(q, k, v)[0, 0, 0], [4.0, 0.5], atol=1e-12)
    np.testing.assert_array_equal(linear_attention(q, k, v)[0, 0, 0], [116.0, 102.0])


def test_layers_agree_with_the_mechanism():
    """`interleaved_layer` with any mixing, softmax, is the public operation."""
    rng = np.random.default_rng(0)
    weights = superset.random_heads(rng, H=3, D=5, d=2, e=3)
    mixing = routing_mixing(3)._replace(alpha_v=rng.normal(size=(3, 3, 3)), collapse=rng.normal(size=(3, 3, 3)))
    x = jnp.asarray(rng.normal(size=(2, 5, 5)))
    np.testing.assert_allclose(
        interleaved_layer(x, weights, mixing, superset.softmax_attention),
        superset.public_interleaved_layer(x, weights, mixing),
        atol=1e-12,
    )


@pytest.mark.parametrize("H", [2, 3])
def test_a_per_head_collapse_is_enough_for_the_constructions(H):
    task, mixing = Task(M=3, G=8, N_max=H * H), routing_mixing(H)
    assert mixing.collapse.size + 3 * H**3 == 4 * H**3
    per_head = mixing._replace(collapse=mixing.collapse[np.arange(H), np.arange(H)])
    weights, x = cpm3.iha_construction(H * H)[0], cpm3.with_positions(task, np.arange(H * H)[None] % 3)
    np.testing.assert_array_equal(
        interleaved_layer(x, weights, per_head, hard_attention), interleaved_layer(x, weights, mixing, hard_attention)
    )


def test_the_paper_notes_name_every_statement_and_tests_that_exist():
    tests = Path(__file__).parent
    notes = (tests.parent / "docs" / "paper_notes.md").read_text()
    statements = {name(statement) for statement in command.STATEMENTS}
    assert set(re.findall(r"`(\w+\.check_\w+)`", notes)) == statements
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", notes)
    assert len(named) > 10
    for file, test in named:
        assert f"def {test}(" in (tests / file).read_text(), (file, test)


# Figures by hand, bad input, the command.


def test_closed_forms_by_hand():
    assert polynomial_filters.mha_parameters(N=3, r=2, k=5) == 5 * (3 * 5 + 3 * 5 + 2 * 5)
    assert polynomial_filters.iha_parameters(N=3, r=2, k=5) == 3 * (3 * 5 + 3 * 5) + 3 * 5 * 6 + 4 * 27
    assert cpm3.mha_parameters(5) == 5 * (30 + 30 + 6)
    assert cpm3.iha_parameters(5) == 3 * (30 + 30) + 3 * 6 * 3 + 4 * 27
    # g = 2, M = 5: z = 0..16 holds 4 multiples, 12 hidden units a pair, each of 3 + 2 numbers.
    assert cpm3.mlp_parameters(Task(M=5, G=12, N_max=3)) == 9 * 12 * 5
    assert [polynomial_filters.iha_heads(k) for k in (1, 2, 4, 5, 9, 10)] == [1, 2, 2, 3, 3, 4]
    assert polynomial_filters.iha_heads(10**30 + 1) == 10**15 + 1  # past the precision of a float's square root


def test_growth_has_the_papers_exponents():
    filters, counts = growth.filter_growth(), growth.cpm3_growth()
    found = [
        growth.exponent(filters, name) for name in ("mha_heads", "iha_heads", "mha_parameters", "iha_parameters")
    ] + [growth.exponent(counts, name) for name in ("mha_parameters", "iha_parameters")]
    np.testing.assert_allclose(found, [1, 0.5, 1, 0.5, 3, 2.5], atol=0.07)


@pytest.mark.parametrize(
    ("A", "k", "text"),
    [
        (np.ones((2, 3)), 2, r"A has shape \(2, 3\); expected a square matrix"),
        (np.ones((3, 3)), 2, "A has rank 1; expected full rank 3"),
        (np.full((2, 2), np.nan), 2, "not finite"),
        (np.eye(3), 0, "k = 0; expected the number of filters"),
        (np.eye(3), 2.0, "k = 2.0"),
        (np.eye(4), 2, r"X has shape \(3, 1\); expected \[4, r\]"),
    ],
)
@pytest.mark.parametrize("build", [polynomial_filters.filters_by_mha, polynomial_filters.filters_by_iha])
def test_filters_refuse(build, A, k, text):
    with pytest.raises(PolynomialFilterError, match=text):
        build(A, np.ones((3, 1)), k)


@pytest.mark.parametrize(
    ("task", "text"),
    [
        ((3, 10, 3), r"G = 10 is not order-sensitive modulo M = 3: gcd\(G - 1, M\) = 3, .*nearest valid: 11 or 8"),
        ((5, 15, 3), r"G mod M = 0, expected not 0"),
        ((2, 7, 3), "none for this M"),
        ((0, 7, 3), "M = 0; expected an integer of at least 1"),
        ((3, 8, 0), "N_max = 0"),
        ((3, 8.0, 2), "G = 8.0"),
    ],
)
def test_tasks_refuse(task, text):
    with pytest.raises(CPM3Error, match=text):
        Task(*task)


@pytest.mark.parametrize(
    ("sequences", "text"),
    [
        ([[0, 1, 2, 0]], "4 tokens; expected at most N_max = 3"),
        ([[0, 3]], "token 3 is out of range; expected 0 to M - 1 = 2"),
        ([[0, -1]], "token -1 is out of range"),
        ([[0.0, 1.0]], "expected integers"),
        ([0, 1], r"expected integers \[B, N\]"),
        (np.zeros((1, 0), int), "not empty"),
        ([[0, -12, 1]], "padding .* inside"),
        ([[-12, -12, -12]], "padding .* at the start"),
    ],
)
@pytest.mark.parametrize("count", [cpm3.brute_force, cpm3.counts_by_mha, cpm3.counts_by_iha])
def test_sequences_refused(count, sequences, text):
    with pytest.raises(CPM3Error, match=text):
        count(Task(M=3, G=8, N_max=3), np.asarray(sequences))


def test_the_command_fails_when_a_statement_does(monkeypatch, capsys, tmp_path):
    def raises():
        raise ValueError("no such array")

    both = (Statement("one", lambda: Outcome(True, "seen")), Statement("two", raises))
    for statements, arguments, code in ((both[:1], [], 0), (both, [f"--out={tmp_path / 'theory.png'}"], 1)):
        monkeypatch.setattr(command, "STATEMENTS", statements)
        with pytest.raises(SystemExit) as ended:
            command.main(arguments)
        assert ended.value.code == code
    printed = capsys.readouterr().out
    assert "FAIL  two\n      ValueError: no such array" in printed
    assert "1 of 2 hold" in printed
    assert (tmp_path / "theory.png").read_bytes()[:4] == b"\x89PNG"


def test_the_command_refuses_a_folder_that_is_not_there():
    refused = subprocess.run(
        [sys.executable, "-m", "iha_jax.theory", "--out=/nowhere/at/all.png"], capture_output=True, text=True
    )
    assert refused.returncode == 2
    assert "expected a file in a folder that exists" in refused.stderr
