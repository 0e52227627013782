"""Relation composition: the data, the labeller, seeds side by side, resuming, early stopping, the report."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from iha_jax.config import ConfigError
from iha_jax.data.relation_composition import SPLITS, make_examples
from iha_jax.model.labeller import bind_labeller, initialize_labeller
from iha_jax.relation_composition.__main__ import RELATION_COMPOSITION
from iha_jax.relation_composition.command import admit
from iha_jax.relation_composition.experiment import examples, load_points
from iha_jax.relation_composition.figure import last_carried_on
from iha_jax.relation_composition.report import csv_text, report, verdicts
from iha_jax.relation_composition.runs import RESULT, check_points, run_point
from iha_jax.relation_composition.training import Patience, data_of, evaluate, initial_state, make_epoch, make_step
from iha_jax.training.command import main as train_command
from iha_jax.training.run_directory import RunDirectoryError, flat
from tests.stopping import StopAfter

CONFIG = "configs/relation_composition.py"
SMALL = (
    "experiment.smallest_size=3",
    "experiment.largest_size=4",
    "experiment.train_examples=14",
    "experiment.validation_examples=5",
    "experiment.test_examples=3",
    "experiment.density=0.5",
    "experiment.arms=mha",
    "experiment.epochs=3",
    "experiment.seeds=2",
    "training.batch_size=6",
    "optimizer.warmup_steps=2",
    "model.width=6",
    "model.num_heads=2",
    "model.mlp_width=5",
)


def small(*overrides):
    return load_points(f"{CONFIG}:reduced", [*SMALL, *overrides])["reduced"][0]


@pytest.fixture(scope="module")
def splits():
    return make_examples(hops=3, sizes=(3, 5), density=0.3, counts=(53, 17, 11), seed=7)


def test_labels_are_the_composition_and_padding_is_marked(splits):
    for split in SPLITS:
        rows = splits[split]
        for tokens, labels, segments in zip(rows.tokens, rows.labels, rows.segment_ids, strict=True):
            m = round(segments.sum() ** 0.5)
            assert segments.tolist() == [1] * m * m + [0] * (25 - m * m)
            R = tokens[: m * m].reshape(m, m)
            for i, k in itertools.product(range(m), range(m)):
                paths = (R[i, a] and R[a, b] and R[b, k] for a in range(m) for b in range(m))
                assert labels[i * m + k] == any(paths)
            assert not tokens[m * m :].any()
            assert not labels[m * m :].any()


def test_splits_have_their_sizes_share_no_relation_and_follow_the_seed(splits):
    assert [len(splits[split].tokens) for split in SPLITS] == [53, 17, 11]
    assert [len(splits["train"].of_size(m)[0]) for m in (3, 4, 5)] == [18, 18, 17]
    everything = [(*t, *s) for split in SPLITS for t, s in zip(splits[split].tokens, splits[split].segment_ids)]  # noqa: B905
    assert len(set(everything)) == 53 + 17 + 11
    again, other = (make_examples(hops=3, sizes=(3, 5), density=0.3, counts=(53, 17, 11), seed=s) for s in (7, 8))
    assert np.array_equal(again["test"].tokens, splits["test"].tokens)
    assert not np.array_equal(other["test"].tokens, splits["test"].tokens)
    wide = make_examples(hops=2, sizes=(8, 8), density=0.264, counts=(1000, 1, 1), seed=0)
    assert abs(wide["train"].tokens.mean() - 0.264) < 0.01


def test_more_examples_than_relations_are_refused():
    with pytest.raises(ValueError, match=r"m = 3: 200 examples asked for, but there are only 2\^9 relations"):
        make_examples(hops=2, sizes=(3, 3), density=0.5, counts=(100, 50, 50), seed=0)


@pytest.mark.parametrize(("arm", "count"), [("mha", 206_849), ("iha", 208_513), ("simplicial", 239_873)])
def test_parameters_are_as_many_as_the_papers(arm, count):
    point = load_points(f"{CONFIG}:ternary", [f"experiment.arms={arm}"])["ternary"][0]
    shapes = jax.eval_shape(lambda: initialize_labeller(point.config.model, jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


SLOW = [pytest.param(arm, marks=pytest.mark.slow) for arm in ("talking_heads", "differential", "fused_mixing")]


@pytest.mark.parametrize("arm", ["mha", "iha_p2", "simplicial", *SLOW])
def test_padding_changes_nothing_and_every_bias_acts(arm):
    point = small(f"experiment.arms={arm}")
    parameters = jax.jit(lambda: initialize_labeller(point.config.model, jax.random.key(3)))()
    noise = np.random.default_rng(4)
    parameters = jax.tree.map(lambda x: x + 0.3 * noise.standard_normal(x.shape).astype(np.float32), parameters)
    tokens = jnp.asarray([[1, 0, 0, 1, 0, 1, 1, 0, 1]])
    ids = jnp.asarray([[1] * 4 + [0] * 5])

    def padded(parameters, tokens):
        logits = bind_labeller(point.config.model, parameters)(tokens, ids)[:, :4]
        return jnp.sum(logits**2), logits

    @jax.jit
    def run(parameters):
        alone = bind_labeller(point.config.model, parameters)(tokens[:, :4])
        others = padded(parameters, tokens.at[:, 4:].set(1))[1]
        return *jax.value_and_grad(padded, has_aux=True)(parameters, tokens), others, alone

    (_, logits), gradient, others, alone = run(parameters)
    np.testing.assert_array_equal(others, logits)
    np.testing.assert_allclose(logits, alone, rtol=1e-4, atol=1e-5)
    biases = {k: v for k, v in gradient["attention"].items() if k.endswith("bias")}
    assert len(biases) == {"iha_p2": 1, "simplicial": 6}.get(arm, 4)
    # A key's bias shifts all logits of a query alike in plain softmax attention.
    plain = ("mha", "talking_heads", "differential", "fused_mixing")
    for name, value in biases.items():
        assert (name == "key_bias" and arm in plain) or float(jnp.abs(value).max()) > 1e-4, name


def test_side_by_side_seeds_take_the_steps_they_take_alone():
    # Not MHA: the gradient of its key bias is 0 but for rounding, which Adam's first step makes as large as any other.
    point = small("experiment.arms=iha_p2", "experiment.largest_size=3", "optimizer.warmup_steps=0")
    data = data_of(point, examples(point.experiment)["train"])
    seeds = jnp.arange(2)
    states = jax.jit(jax.vmap(lambda seed: initial_state(point, seed)))(seeds)
    step = make_step(point)
    together = jax.jit(jax.vmap(step, in_axes=(0, 0, None)))(states["parameters"], states["optimizer"], data)
    start, step = jax.jit(lambda seed: initial_state(point, seed)), jax.jit(step)
    for i in seeds:
        state = start(i)
        alone = step(state["parameters"], state["optimizer"], data)
        assert not np.allclose(alone[0]["mlp_up"]["kernel"], state["parameters"]["mlp_up"]["kernel"], atol=1e-4)
        for x, y in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
            np.testing.assert_allclose(x, y[i], rtol=1e-4, atol=1e-5)


def test_patience_over_a_scripted_run():
    losses = [5.0, 4.0, 4.0, 3.0, 3.5, np.nan, 3.0, 1.0]
    patience, seen = Patience(jnp.float32(jnp.inf), jnp.int32(0)), []
    for loss in losses:
        patience, improved = patience.observe(jnp.float32(loss), 3)
        seen.append((bool(improved), float(patience.best), int(patience.waited)))
    kept = (False, 3.0, 3)  # spent: the better loss that comes after it does not count
    expected = [(True, 5, 0), (True, 4, 0), (False, 4, 1), (True, 3, 0), (False, 3, 1), (False, 3, 2), kept, kept]
    assert seen == expected


def test_a_stopped_seed_is_frozen_while_another_trains_and_the_best_is_kept():
    point = small()
    data = {name: data_of(point, split) for name, split in examples(point.experiment).items()}
    states = jax.jit(jax.vmap(lambda seed: initial_state(point, seed)))(jnp.arange(2))
    best = states["patience"].best
    states["patience"] = Patience(best, states["patience"].waited.at[0].set(point.experiment.patience))
    epoch = jax.vmap(make_epoch(point), in_axes=(0, None, None))
    after, row = jax.jit(epoch)(states, data["train"], data["validation"])
    assert row["active"].tolist() == [False, True]
    assert after["epoch"].tolist() == [0, 1]
    for x, y in zip(jax.tree.leaves(states), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(x[0], y[0])
    moved = jax.tree.map(lambda x, y: np.any(np.asarray(x[1] != y[1])), states["parameters"], after["parameters"])
    assert all(jax.tree.leaves(moved))
    for x, y in zip(jax.tree.leaves(after["best_parameters"]), jax.tree.leaves(after["parameters"]), strict=True):
        np.testing.assert_array_equal(x[1], y[1])
    assert float(after["patience"].best[1]) == float(row["validation_loss"][1])


def test_evaluation_counts_entries_and_whole_matrices():
    point = small("training.batch_size=4")  # 5 validation rows: the last chunk is not whole
    parameters = jax.jit(lambda: initialize_labeller(point.config.model, jax.random.key(0)))()
    split = examples(point.experiment)["validation"]
    got = jax.jit(lambda: evaluate(point, parameters, data_of(point, split)))()
    label = jax.jit(lambda tokens, ids: bind_labeller(point.config.model, parameters)(tokens, ids))
    logits = label(split.tokens, split.segment_ids)
    valid = split.segment_ids > 0
    right = (np.asarray(logits) > 0) == (split.labels > 0)
    entropy = np.logaddexp(0, np.asarray(logits)) - split.labels * np.asarray(logits)
    assert float(got["accuracy"]) == pytest.approx(right[valid].mean())
    assert float(got["exact"]) == pytest.approx((right | ~valid).all(1).mean())
    assert float(got["loss"]) == pytest.approx(entropy[valid].mean(), rel=1e-5)


def test_an_interrupted_point_ends_with_the_same_result(tmp_path):
    point = small()
    data = examples(point.experiment)
    whole, parts = epath.Path(tmp_path / "whole"), epath.Path(tmp_path / "parts")
    assert run_point(whole, point, data, StopAfter(-1), lambda _: None)
    for epochs in (1, 2):
        assert not run_point(parts, point, data, StopAfter(epochs), lambda _: None)
        assert not (parts / point.folder / RESULT).exists()
    assert run_point(parts, point, data, StopAfter(-1), lambda _: None)
    assert sorted(p.name for p in (parts / point.folder).iterdir()) == ["config.json", "result.json"]
    first, second = (json.loads((folder / point.folder / RESULT).read_text()) for folder in (whole, parts))
    free = ("seconds", "date")
    assert {k: v for k, v in first.items() if k not in free} == {k: v for k, v in second.items() if k not in free}
    assert len(first["history"]["train_loss"][0]) == 3

    assert "| mha | 0.001 |" in report(whole, "reduced", [point])
    assert (whole / "report.png").stat().length > 1000
    with pytest.raises(RunDirectoryError, match=r"model.width: 6 there, 8 now"):
        check_points(whole, [small("model.width=8")])
    check_points(whole, [small("experiment.arms=mha,simplicial")])


def result(arm, *accuracies, rate=1e-3, loss=0.1):
    return {
        "arm": arm,
        "learning_rate": rate,
        "parameters": 1,
        "seeds": list(range(len(accuracies))),
        "epochs": [3] * len(accuracies),
        "best_validation_loss": [loss] * len(accuracies),
        "test_loss": [0.5] * len(accuracies),
        "test_accuracy": list(accuracies),
        "test_exact": [0.0] * len(accuracies),
    }


def test_the_verdict_follows_the_intervals_at_the_best_learning_rates():
    mha, middle = result("mha", 0.8, 0.81, 0.79), result("simplicial", 0.85, 0.86, 0.84)
    high, low = result("iha", 0.9, 0.91, 0.89), result("iha", 0.7, 0.71, 0.69, rate=1e-4, loss=0.2)
    (sentence,) = verdicts([mha, middle, high, low])
    assert sentence.startswith("The order iha > simplicial > mha holds (iha less simplicial 5.00 ± 0.00 (n=3)")
    assert "does not hold" in verdicts([mha, middle, low])[0]
    assert "is not decided" in verdicts([mha, middle, result("iha", 0.9, 0.7, 0.95)])[0]
    assert "cannot be judged" in verdicts([result("mha", 0.8), result("simplicial", 0.8), result("iha", 0.9)])[0]
    assert csv_text([mha]).splitlines()[1] == "mha,0.001,1,0,3,0.1,0.5,0.8,0.0"


def test_curves_of_different_lengths_keep_their_last_value():
    assert last_carried_on([[1.0], [1.0, 2.0, 3.0]]).tolist() == [[1, 1, 1], [1, 2, 3]]


@pytest.mark.parametrize(
    ("spec", "override", "message"),
    [
        (f"{CONFIG}:reducd", "", "no experiment reducd; there are: binary, ternary, reduced"),
        ("configs/quickstart.py", "", "defines no get_experiment"),
        (f"{CONFIG}:reduced", "experiment.seed=3", "did you mean config.experiment.seeds"),
        (f"{CONFIG}:reduced", "experiment.hops=1", "config.experiment.hops = 1: expected 2 or more"),
        (f"{CONFIG}:reduced", "experiment.arms=ihaa", "no arm ihaa; arms of"),
        (f"{CONFIG}:reduced", "experiment.largest_size=3", "smallest_size = 4: larger than largest_size = 3"),
        (f"{CONFIG}:reduced", "training.batch_size=161", "not divisible by the 2 sizes"),
        (f"{CONFIG}:reduced", "optimizer.learning_rate=1", "set by the experiment"),
        (f"{CONFIG}:reduced", "model.causal=True", "config.model.causal = True: a labeller needs False"),
        (f"{CONFIG}:reduced", "experiment.train_examples=60000", "there are only 2^16 relations"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_written(tmp_path, spec, override, message):
    with pytest.raises(ValueError) as error:
        admit(RELATION_COMPOSITION, spec, str(tmp_path / "run"), [override] if override else [])
    assert message in str(error.value).replace("\n", " ")
    assert not (tmp_path / "run").exists()
    assert isinstance(error.value, ConfigError) or "relations" in message


def test_train_py_hands_over_what_is_no_language_model(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        train_command([f"--config={CONFIG}:binary", f"--workdir={tmp_path / 'runs'}", "--config.experiment.hops=1"])
    assert end.value.code == 2
    assert "config.experiment.hops = 1" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_ablations_differ_from_iha_in_what_their_name_says():
    base, *others = load_points(f"{CONFIG}:ablations")["ablations"]
    assert base.arm == "iha_p4"
    differing = {
        point.arm: {key for key, value in flat(point.facts()).items() if value != flat(base.facts()).get(key)}
        for point in others
    }
    assert differing["start_noise"] == {f"model.iha.{key}" for key in ("mixing_init", "collapse_init", "init_noise")}
    assert differing["per_head_collapse"] == {"model.iha.collapse"}
    assert differing["frozen_mixing"] == differing["fast_mixing"] == {"optimizer.mixing_multiplier"}
    assert differing["window_9"] == {"model.layer_pattern", "model.iha.window"}
