"""Scores of continuations against a plain loop; independence of batches and buckets; windows over long texts."""

import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iha_jax.config import MeshConfig
from iha_jax.evaluation import scoring
from iha_jax.evaluation.scoring import Scorer, rolling_log_likelihoods, rolling_windows, row_lengths
from iha_jax.model import bind, initialize
from iha_jax.parallel.mesh import make_mesh
from tests.several import printed_by
from tests.tiny import tiny

N, DOCUMENT = 23, 256


@pytest.fixture(scope="module")
def config():
    return tiny(model__compute_dtype="float32", model__num_layers=3).model


@pytest.fixture(scope="module")
def parameters(config):
    found = initialize(config, jax.random.key(1))
    # Twelve times the usual embedding: tokens differ in how likely they are, and some are predicted.
    return found | {"embedding": 12 * found["embedding"]}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=1, fsdp=1, context=1, tensor=1), jax.devices()[:1])


def requests(*sizes):
    rng = np.random.default_rng(0)
    return [(rng.integers(0, 256, a).astype(np.int32), rng.integers(0, 256, b).astype(np.int32)) for a, b in sizes]


SIZES = [(5, 3), (0, 4), (19, 4), (20, 4), (31, 7), (0, N), (2, N), (7, 1), (3, 0), (1, 1), (13, 5)]


@pytest.fixture(scope="module")
def plain(config, parameters):
    """ln p, greedy and dropped tokens, one token at a time in float64."""
    forward = jax.jit(lambda row: bind(config, parameters)(row[None])[0])

    def score(context, continuation):
        tokens, total, greedy = [DOCUMENT, *context], 0.0, True
        everything = [*tokens, *continuation]
        first = max(0, len(everything) - 1 - N)  # of the tokens that are seen
        for i in range(len(tokens), len(everything)):
            row = np.zeros(N, np.int32)
            row[: i - first] = everything[first:i]
            logits = np.asarray(forward(row)[i - first - 1], np.float64)
            total += logits[everything[i]] - logits.max() - math.log(np.exp(logits - logits.max()).sum())
            greedy &= int(logits.argmax()) == everything[i]
        return total, greedy, max(0, first - 1)

    return score


def test_scores_are_those_of_a_plain_loop(config, parameters, mesh, plain):
    asked = requests(*SIZES)
    # A continuation that is greedy: the likeliest token after the first context, twice.
    context, forward = asked[0][0], jax.jit(lambda row: bind(config, parameters)(row[None])[0])
    best = []
    for _ in range(2):
        tokens = np.asarray([DOCUMENT, *context, *best], np.int32)
        best.append(int(jnp.argmax(forward(np.pad(tokens, (0, N - len(tokens))))[len(tokens) - 1])))
    asked.append((context, np.asarray(best, np.int32)))
    found = Scorer(config, parameters, DOCUMENT, mesh, batch_size=3).score(asked)
    expected = [plain(*request) for request in asked]
    np.testing.assert_allclose([f.log_likelihood for f in found], [e[0] for e in expected], rtol=1e-5)
    assert [f.is_greedy for f in found] == [e[1] for e in expected]
    assert (found[-1].is_greedy, found[0].is_greedy) == (True, False)
    assert [f.dropped_tokens for f in found] == [e[2] for e in expected] == [0, 0, 0, 0, 14, 0, 1, 0, 0, 0, 0, 0]


def test_batches_buckets_and_chunks_change_nothing(config, parameters, mesh, monkeypatch):
    asked = requests(*SIZES)
    expected = Scorer(config, parameters, DOCUMENT, mesh, batch_size=3).score(asked)
    monkeypatch.setattr(scoring, "_SHORTEST", 5)
    monkeypatch.setattr(scoring, "_CHUNK", 4)
    assert row_lengths(N, 1) == [5, 10, 20, N]
    found = Scorer(config, parameters, DOCUMENT, mesh, batch_size=2).score(asked)
    np.testing.assert_allclose(
        [f.log_likelihood for f in found], [e.log_likelihood for e in expected], rtol=1e-5, atol=1e-5
    )
    assert [(f.is_greedy, f.dropped_tokens) for f in found] == [(e.is_greedy, e.dropped_tokens) for e in expected]


def test_row_lengths_divide_over_devices_and_end_with_the_context():
    assert row_lengths(8192, 1) == [64, 128, 256, 512, 1024, 2048, 4096, 8192]
    assert row_lengths(96, 6) == [66, 96]
    assert row_lengths(N, 1) == [N]


@pytest.mark.parametrize("length", [0, 1, N - 1, N, N + 1, 2 * N, 2 * N + 1, 3 * N - 1])
def test_windows_predict_every_token_once_with_as_much_context_as_there_is(length):
    text = np.arange(length)
    windows = list(rolling_windows(text, N))
    assert np.concatenate([[], *(predicted for _, predicted in windows)]).tolist() == text.tolist()
    for i, (context, predicted) in enumerate(windows):
        seen = [*context, *predicted]
        assert seen == list(range(predicted[0] - len(context), predicted[-1] + 1))
        assert len(seen) == N + 1 if i else len(context) == 0  # of N + 1 tokens N are input


def test_windows_are_those_of_the_harness():
    harness = pytest.importorskip("lm_eval.utils")
    for length in (1, N, N + 1, 2 * N + 5):
        text = list(range(length))
        theirs = map(harness.make_disjoint_window, harness.get_rolling_token_windows(text, -1, N, 1))
        ours = [(a.tolist() or [-1], b.tolist()) for a, b in rolling_windows(np.asarray(text), N)]
        assert ours == list(theirs)


def test_a_long_text_is_the_sum_of_its_windows(config, parameters, mesh, plain):
    model: Any = SimpleNamespace(context_length=N, score=Scorer(config, parameters, DOCUMENT, mesh, batch_size=2).score)
    text = requests((0, 2 * N + 3))[0][1]
    windows = [([], text[:N]), (text[N - 1 : N], text[N : 2 * N]), (text[N + 2 : 2 * N], text[2 * N :])]
    expected = math.fsum(plain(*window)[0] for window in windows)
    assert rolling_log_likelihoods(model, [text, text[:0], text[:4]]) == pytest.approx(
        [expected, 0.0, plain([], text[:4])[0]], rel=1e-5
    )


def test_refusals(config, parameters, mesh):
    scorer = Scorer(config, parameters, DOCUMENT, mesh, batch_size=2)
    with pytest.raises(ValueError, match="request 1: the continuation has 24 tokens, more than the context of 23"):
        scorer.score(requests((1, 1), (0, N + 1)))
    with pytest.raises(ValueError, match="request 0 has token 257; expected ids below 257"):
        scorer.score([(np.array([257]), np.array([1]))])
    with pytest.raises(ValueError, match="bidirectional model has no next token"):
        Scorer(tiny(model__causal=False).model, parameters, DOCUMENT, mesh)


@pytest.mark.slow
def test_meshes_score_as_one_device():
    one = dict(data=1, fsdp=1, context=1, tensor=1)
    meshes = [dict(fsdp=4), dict(data=2, tensor=2), dict(context=2, fsdp=2), dict(context=2, tensor=2)]
    found = printed_by("tests.mesh_scores", {"one": one} | {str(m): one | m for m in meshes}, devices=4)
    expected = found.pop("one")
    assert len(found) == 4
    for scores in found.values():
        np.testing.assert_allclose(scores, expected, rtol=1e-5)
