"""Learned tasks: labels, the constructions as settings of the learned layers, resuming, the verdict, bad input."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from iha_jax.learned_tasks.__main__ import LEARNED_TASKS
from iha_jax.learned_tasks.experiment import IHA, MATCHED, MHA
from iha_jax.learned_tasks.layer import MIXING, PROJECTIONS, initialize
from iha_jax.learned_tasks.load import load_points
from iha_jax.learned_tasks.report import best_rates, csv_text, report, verdict
from iha_jax.relation_composition.command import admit
from iha_jax.relation_composition.runs import RESULT, run_point
from iha_jax.relation_composition.training import data_of, evaluate
from iha_jax.theory import cpm3, polynomial_filters
from iha_jax.theory.layers import cold_queries
from iha_jax.training.run_directory import RunDirectoryError
from tests.stopping import StopAfter

CONFIG = "configs/learned_tasks.py"
SMALL = (
    "experiment.train_examples=14",
    "experiment.validation_examples=5",
    "experiment.test_examples=3",
    "experiment.batch_size=4",
    "experiment.epochs=3",
    "experiment.seeds=2",
    "experiment.learning_rates=0.01",
    "experiment.optimizer.warmup_steps=2",
)
FILTERS = ("experiment.tokens=5", "experiment.filters=3", "experiment.signals=2")
CPM3 = ("experiment.tokens=5", "experiment.modulus=4", "experiment.factor=10", "experiment.mlp_width=300")


def points(name, *overrides):
    return load_points(f"{CONFIG}:{name}", [*SMALL, *overrides])[name]


def point_of(name, mechanism, heads, *overrides):
    own = [f"experiment.{kind}_heads={heads}" for kind in ("mha", "iha", "matched")]
    (found,) = (p for p in points(name, *own, *overrides) if p.mechanism == mechanism)
    return found


def attention_of(weights, mixing):
    """The theory's arrays under the names of the learned layer."""
    named = dict(zip(PROJECTIONS, weights, strict=True))
    return named | (dict(zip(MIXING, mixing, strict=True)) if mixing else {})


def as_constructed(point, parameters):
    """Float32 arrays of the shapes that `point` learns."""
    shapes = jax.tree.map(jnp.shape, jax.eval_shape(lambda: point.initialize(jax.random.key(0))))
    assert jax.tree.map(np.shape, parameters) == shapes
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), parameters)


def measured(point, parameters):
    data = data_of(point, point.experiment.examples()["test"])
    return {name: float(value) for name, value in jax.jit(lambda p: evaluate(point, p, data))(parameters).items()}


@pytest.mark.parametrize(("mechanism", "heads"), [(MHA, 3), (IHA, 2)])
@pytest.mark.parametrize("matrix", ["orthogonal", "not normal"])
def test_the_constructed_filters_are_a_setting_of_the_learned_layer(mechanism, heads, matrix):
    point = point_of("polynomial_filters", mechanism, heads, *FILTERS, f"experiment.matrix={matrix}")
    task = point.experiment
    assert task.heads_by_theorem()[mechanism] == heads
    build = polynomial_filters.iha_construction if mechanism == IHA else polynomial_filters.mha_construction
    built = build(task.operator, 2, 3)
    weights, mixing = built if mechanism == IHA else (built, None)
    kernel = np.eye(heads * point.layer.value_width, 3 * 2)  # what IHA computes beyond the k filters is not used
    parameters = as_constructed(point, {"attention": attention_of(weights, mixing), "output": {"kernel": kernel}})
    found = measured(point, parameters)
    assert found["loss"] < 1e-10
    assert (found["accuracy"], found["exact"]) == (1, 1)
    parameters["attention"]["query"] = jnp.roll(parameters["attention"]["query"], 1, axis=0)  # of another head
    assert measured(point, parameters)["accuracy"] < 0.5


@pytest.mark.parametrize(("mechanism", "heads"), [(MHA, 5), (IHA, 3)])
def test_the_constructed_counts_are_a_setting_of_the_learned_layer(mechanism, heads):
    point = point_of("cpm3", mechanism, heads, *CPM3)
    task = point.experiment
    assert task.heads_by_theorem()[mechanism] == heads
    built = cpm3.iha_construction(5) if mechanism == IHA else cpm3.mha_construction(5)
    weights, mixing = built if mechanism == IHA else (built, None)
    weights = weights._replace(query=cold_queries(weights.query, 60.0))  # softmax is then hard attention
    counting, inner = cpm3.counting_mlp(task.cpm3), heads * point.layer.value_width
    hidden = np.zeros((inner, counting.hidden.shape[1]))
    hidden[:5] = counting.hidden  # shifts that IHA has twice are not used
    parameters = {
        "attention": attention_of(weights, mixing),
        "mlp_up": {"kernel": hidden, "bias": counting.bias},
        "mlp_down": {"kernel": counting.output[:, None], "bias": np.zeros(1)},
    }
    found = measured(point, as_constructed(point, parameters))
    assert found["loss"] < 1e-6
    assert (found["accuracy"], found["exact"]) == (1, 1)
    parameters["attention"]["query"] = np.roll(parameters["attention"]["query"], 1, axis=0)
    assert measured(point, as_constructed(point, parameters))["accuracy"] < 0.9


def test_the_default_mlp_is_as_wide_as_the_construction():
    task = load_points(f"{CONFIG}:cpm3")["cpm3"][0].experiment
    assert task.mlp_width == len(cpm3.counting_mlp(task.cpm3).bias)


def test_labels_are_the_filters_and_the_counts():
    task = points("polynomial_filters", *FILTERS)[0].experiment
    X, labels = task.examples()["validation"]
    assert (X.shape, labels.shape) == ((5, 5, 2), (5, 5, 3, 2))
    for one, label in zip(X, labels, strict=True):
        np.testing.assert_allclose(label[:, 2], task.operator @ (task.operator @ one), rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(label[:, 0], one)
    task = points("cpm3", *CPM3, "experiment.tokens=3")[0].experiment
    splits = task.examples()
    sequences = [tuple(x[:, 0].tolist()) for split in splits.values() for x in split.inputs]
    assert len(set(sequences)) == 14 + 5 + 3
    counts = [row.tolist() for split in splits.values() for row in split.labels]
    for x, found in zip(sequences, counts, strict=True):
        assert found == [sum((c + 10 * a + b) % 4 == 0 for a, b in itertools.product(x, x)) for c in x]
    assert task.variance == pytest.approx(np.var(counts[:14]))
    errors, right = task.measure(jnp.asarray([[[3.4], [-0.6], [7.0]]]), jnp.asarray([[3.0, 0.0, 7.0]]))
    np.testing.assert_allclose(errors, np.array([[0.16, 0.36, 0]]) / task.variance, rtol=1e-5)
    assert right.tolist() == [[True, False, True]]


@pytest.mark.parametrize("matrix", ["orthogonal", "not normal"])
def test_an_error_is_a_share_of_the_filters_variance(matrix):
    task = points("polynomial_filters", *FILTERS, f"experiment.matrix={matrix}")[0].experiment
    labels = np.random.default_rng(0).normal(size=(4, 5, 3, 2)).astype(np.float32)
    norms = [np.linalg.norm(np.linalg.matrix_power(task.operator, i)) ** 2 for i in range(3)]
    errors, right = task.measure(jnp.asarray(0.9 * labels.reshape(4, 5, 6)), jnp.asarray(labels))
    np.testing.assert_allclose(errors, 0.01 * (labels**2).sum((1, 3)) / (2 * np.array(norms)), rtol=1e-4)
    np.testing.assert_array_equal(right, np.asarray(errors) < 0.01)


def test_matrices_blind_to_the_input_are_bounded():
    bounds = {}
    for matrix in ("cyclic shift", "not normal"):
        bounds[matrix] = points("polynomial_filters", *FILTERS, f"experiment.matrix={matrix}")[
            0
        ].experiment.blind_bounds()
    np.testing.assert_allclose(bounds["cyclic shift"], [1 / 3, 2 / 3, 1])  # orthogonal powers: one a matrix
    operator = polynomial_filters.example_matrices(5)["not normal"]
    wanted = np.stack([np.linalg.matrix_power(operator, i).ravel() for i in range(3)])
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    best = 0.0
    for angle in np.linspace(0, np.pi, 181):  # the best two matrices lie in the span of two mixtures of the powers
        for other in np.linspace(0, np.pi, 181):
            normal = [np.cos(angle), np.sin(angle) * np.cos(other), np.sin(angle) * np.sin(other)]
            best = max(best, 1 - np.sum((normal @ wanted) ** 2) / 3)
    assert bounds["not normal"][1] == pytest.approx(best, abs=1e-3)


def test_initial_weights_have_their_spread_and_points_their_learning_rate():
    shapes = {"attention": {"query": (9, 16, 40), "alpha_key": (9, 9, 9), "collapse": (9, 9, 9), "bias": (7,)}}
    found = initialize(shapes, jax.random.key(0))["attention"]
    for name, std in (("query", 1 / 4), ("alpha_key", 1 / 3), ("collapse", 1 / 9), ("bias", 0)):
        assert float(found[name].std()) == pytest.approx(std, rel=0.1)
    of_rates = points("cpm3", "experiment.learning_rates=0.1,0.2", "experiment.mha_heads=1")[:2]
    assert [p.optimizer.learning_rate for p in of_rates] == [0.1, 0.2] == [p.learning_rate for p in of_rates]


def test_one_head_that_sees_one_hot_codes_would_do_for_the_counts():
    x = np.array(list(itertools.product(range(4), repeat=5)))
    weights = np.where(np.eye(5), 0.28, 0.18)  # all tokens alike, a head's own more
    seen = np.einsum("ij,bjm->bim", weights, np.eye(4)[x]).round(6).reshape(-1, 4)
    counts = cpm3.brute_force(cpm3.Task(4, 10, 5), x).reshape(-1, 1)
    assert len(np.unique(seen, axis=0)) == len(np.unique(np.hstack([seen, counts]), axis=0)) < len(seen) / 10


def test_given_shifts_are_the_workspace_of_the_construction():
    point = next(p for p in points("cpm3", *CPM3) if p.mechanism == "shifts_given")
    counting = cpm3.counting_mlp(point.experiment.cpm3)
    up = {"kernel": counting.hidden, "bias": counting.bias}
    parameters = {"mlp_up": up, "mlp_down": {"kernel": counting.output[:, None], "bias": np.zeros(1)}}
    assert measured(point, as_constructed(point, parameters))["accuracy"] == 1


@pytest.mark.parametrize("name", ["polynomial_filters", "cpm3"])
def test_parameters_are_counted_and_matched(name):
    for heads in (1, 2, 3, 5):
        layers = {m: point_of(name, m, heads).layer for m in (MHA, IHA, MATCHED)}
        attention = {m: layer.attention_parameters for m, layer in layers.items()}
        shapes = jax.eval_shape(lambda layer=layers[IHA]: layer.initialize(jax.random.key(0)))
        assert attention[IHA] == sum(leaf.size for leaf in jax.tree.leaves(shapes["attention"]))
        a_column = heads * layers[MHA].width
        assert attention[IHA] <= attention[MATCHED] < attention[IHA] + a_column
        assert attention[MHA] == attention[MATCHED] - a_column * (layers[MATCHED].value_width - 1)
    needed = {"polynomial_filters": polynomial_filters, "cpm3": cpm3}[name]
    task, size = point_of(name, IHA, 2).experiment, {"polynomial_filters": (8, 1, 4), "cpm3": (6,)}[name]
    theorem = task.heads_by_theorem()
    for mechanism, closed_form in ((MHA, needed.mha_parameters), (IHA, needed.iha_parameters)):
        assert task.layer(mechanism, theorem[mechanism]).attention_parameters == closed_form(*size)


def test_an_interrupted_point_ends_with_the_same_result(tmp_path):
    point = point_of("polynomial_filters", IHA, 2, *FILTERS)
    data = point.experiment.examples()
    whole, parts = epath.Path(tmp_path / "whole"), epath.Path(tmp_path / "parts")
    assert run_point(whole, point, data, StopAfter(-1), lambda _: None)
    assert not run_point(parts, point, data, StopAfter(2), lambda _: None)
    assert run_point(parts, point, data, StopAfter(-1), lambda _: None)
    first, second = (json.loads((folder / point.folder / RESULT).read_text()) for folder in (whole, parts))
    free = ("seconds", "date")
    assert {k: v for k, v in first.items() if k not in free} == {k: v for k, v in second.items() if k not in free}
    losses = np.array(first["history"]["train_loss"])
    assert losses.shape == (2, 3)
    assert (losses[:, 2] < losses[:, 0]).all()

    text = report(whole, "polynomial_filters", [point, point_of("polynomial_filters", MHA, 3, *FILTERS)])
    assert "| iha | 2 | 4 | 228 | 276 | 0.01 |" in text
    assert "Not finished, and left out: mha/heads=3/learning_rate=0.01." in text
    assert len((whole / "report.csv").read_text().splitlines()) == 1 + 2
    assert (whole / "report.png").read_bytes()[:4] == b"\x89PNG"
    changed = [*SMALL, *FILTERS, "experiment.iha_heads=2"]
    (tmp_path / "polynomial_filters").symlink_to(tmp_path / "whole")
    with pytest.raises(RunDirectoryError, match=r"experiment.epochs: 3 there, 4 now"):
        admit(LEARNED_TASKS, f"{CONFIG}:polynomial_filters", str(tmp_path), [*changed, "experiment.epochs=4"])


def result(mechanism, heads, *accuracies, rate=1e-2, loss=0.1):
    n = len(accuracies)
    return {
        "mechanism": mechanism,
        "heads": heads,
        "value_width": 1,
        "attention_parameters": 2,
        "parameters": 3,
        "learning_rate": rate,
        "seeds": list(range(n)),
        "epochs": [3] * n,
        "best_validation_loss": [loss] * n,
        "test_loss": [0.5] * n,
        "test_accuracy": list(accuracies),
        "test_exact": [0.0] * n,
    }


def test_the_verdict_follows_the_intervals():
    needed = {MHA: 4, IHA: 2}
    few, mha, iha = result(MHA, 3, 0.7, 0.71, 0.69), result(MHA, 4, 1.0, 1.0, 0.99), result(IHA, 2, 1.0, 1.0, 1.0)
    assert "(4 of MHA, 2 of IHA) holds. Solved" in verdict([few, mha, iha], needed)
    assert "mha with 4 heads; iha with 2 heads" in verdict([few, mha, iha], needed)
    assert "is not decided" in verdict([few, mha, result(IHA, 2, 1.0, 1.0, 0.5)], needed)
    assert "is not decided" in verdict([few, mha, result(IHA, 2, 1.0, 1.0, 0.9)], needed)  # the mean alone is above
    assert "is not decided" in verdict([result(MHA, 2, 1.0, 1.0, 0.5), few, mha, iha], needed)
    assert "is not decided" in verdict([mha, iha], needed)
    assert "does not hold" in verdict([few, mha, result(IHA, 2, 0.3, 0.31, 0.3)], needed)
    assert "does not hold" in verdict([result(MHA, 3, 1.0, 1.0, 1.0), mha, iha], needed)
    assert "is not decided" in verdict([result(MHA, 3, 0.7), result(MHA, 4, 1.0), result(IHA, 2, 1.0)], needed)
    assert csv_text([few]).splitlines()[1] == "mha,3,1,2,3,0.01,0,3,0.1,0.5,0.7,0.0"
    assert best_rates([few, result(MHA, 3, 0.1, rate=1e-3, loss=0.05), mha])[0]["learning_rate"] == 1e-3


@pytest.mark.parametrize(
    ("spec", "override", "message"),
    [
        ("polynomial_filters", "filters=0", "k = 0; expected the number of filters, an integer of at least 1"),
        ("polynomial_filters", "matrix=orthogonl", "did you mean 'orthogonal'?"),
        ("polynomial_filters", "optimizer.learning_rate=1", "set by config.experiment.learning_rates"),
        ("polynomial_filters", "batch_size=15", "batch_size = 15: more than the 14 train_examples"),
        ("polynomial_filters", "iha_heads=0", "config.experiment.iha_heads[0] = 0: expected 1 or more"),
        ("polynomial_filters", "factor=1", "config.experiment has no key 'factor'"),
        ("polynomial_filters", "task=cpm4", "config.experiment.task = 'cpm4': expected one of"),
        ("cpm3", "factor=7", "G = 7 is not order-sensitive modulo M = 3"),
        ("cpm3", "modulus=0", "M = 0; expected an integer of at least 1"),
        ("cpm3", "tokens=2", "22 examples asked for, but there are only 3^2 = 9 sequences"),
        ("cpm3", "tokens=40", "3^40 sequences; expected fewer than 2^63: ask for fewer tokens"),
        ("cpm4", "", "no experiment cpm4; there are: polynomial_filters, cpm3"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_written(tmp_path, spec, override, message):
    overrides = [*SMALL, *([f"experiment.{override}"] if override else [])]
    with pytest.raises(ValueError) as error:
        admit(LEARNED_TASKS, f"{CONFIG}:{spec}", str(tmp_path / "run"), overrides)
    assert message in str(error.value).replace("\n", " ")
    assert not (tmp_path / "run").exists()


def test_a_singular_matrix_is_refused(monkeypatch):
    monkeypatch.setattr(
        "iha_jax.learned_tasks.polynomial_filters.example_matrices", lambda N: {"orthogonal": np.ones((N, N))}
    )
    with pytest.raises(polynomial_filters.PolynomialFilterError, match="A has rank 1; expected full rank 8"):
        points("polynomial_filters")
