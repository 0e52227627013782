"""What evaluations share: options, results on disk, intervals, the loss of tokens by what they see."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from iha_jax.evaluation.results import table, write_results
from iha_jax.evaluation.run import Restored
from iha_jax.evaluation.tasks import PREFIXES, TASKS, Options, TaskResult, load_task, mean_interval
from iha_jax.evaluation.text_model import Sampling
from iha_jax.evaluation.validation_loss import ratio_interval
from iha_jax.model import bind, initialize
from iha_jax.training.fingerprint import tree_digest
from iha_jax.training.loss import summed_loss, token_losses
from iha_jax.training.run_directory import evaluation_file
from iha_jax.training.step import make_eval_step, visible_tokens
from tests.tiny import tiny


def test_every_registered_task_is_there_and_another_name_lists_them():
    for name in (*TASKS, *(f"{prefix}:x" for prefix in PREFIXES)):
        assert callable(load_task(name))
    with pytest.raises(ValueError, match=r"no task 'los'; expected some of loss, sample"):
        load_task("los")


def test_options_replace_what_a_task_samples_with():
    default = Sampling(max_tokens=7, temperature=0.5, stop=("x",))
    assert Options(seed=3).sampling(default) == Sampling(max_tokens=7, temperature=0.5, stop=("x",), seed=3)
    asked = Options(samples=5, temperature=0.0, top_p=0.9).sampling(default)
    assert asked == Sampling(max_tokens=7, temperature=0.0, top_p=0.9, stop=("x",), samples=5)


def test_intervals_by_hand():
    low, high = mean_interval([0.0, 1.0, 1.0, 0.0, 1.0])  # mean 0.6, s = sqrt(0.3), t = 2.7764 with 4 degrees
    assert (low, high) == pytest.approx((0.6 - 2.7764 * math.sqrt(0.06), 0.6 + 2.7764 * math.sqrt(0.06)), abs=1e-4)
    assert mean_interval([1.0] * 5) == pytest.approx((5 / (5 + 1.96**2), 1.0), abs=1e-4)
    assert mean_interval([0.0] * 5) == pytest.approx((0.0, 1.96**2 / (5 + 1.96**2)), abs=1e-4)
    assert all(map(math.isnan, mean_interval([0.3])))
    # Equal weights: the interval of a mean.
    values = np.array([0.0, 1.0, 1.0, 0.0, 1.0])
    assert ratio_interval(values, np.ones(5)) == pytest.approx((low, high))
    assert ratio_interval(3 * values, np.full(5, 3.0)) == pytest.approx((low, high))


def test_the_interval_of_a_ratio_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        tokens = rng.integers(50, 150, 31).astype(float)
        nll = tokens * (2 + rng.normal(0, 0.3, 31))
        low, high = ratio_interval(nll, tokens)
        hits += low <= 2 <= high
    assert 0.925 < hits / 1000 < 0.975


@pytest.mark.parametrize("chunk", [0, 1, 23])
def test_losses_of_tokens_add_up_to_the_loss(chunk):
    config = tiny(training__loss_chunk=chunk)
    rng = np.random.default_rng(1)
    batch = {
        "inputs": rng.integers(0, 257, (3, 23)),
        "targets": rng.integers(0, 257, (3, 23)),
        "segment_ids": np.sort(rng.integers(1, 4, (3, 23))),
        "loss_mask": rng.integers(0, 2, (3, 23)).astype(np.float32),
    }
    model = bind(config.model, initialize(config.model, jax.random.key(2)))
    expected = summed_loss(model, batch, z_loss=0.0, chunk=0)[1]
    losses = token_losses(model, batch, chunk=chunk)
    np.testing.assert_allclose(losses.sum(), expected, rtol=1e-6)
    np.testing.assert_array_equal(losses[batch["loss_mask"] == 0], 0)
    whole = token_losses(model, batch, chunk=0)
    np.testing.assert_allclose(losses, whole, rtol=1e-5)  # each in its place, whatever the chunk

    lengths = np.arange(257, dtype=np.int32)
    sums = make_eval_step(config)(initialize(config.model, jax.random.key(2)), batch, lengths)
    np.testing.assert_allclose(sums["nll"], whole.sum(1), rtol=1e-6)
    np.testing.assert_array_equal(sums["tokens"], batch["loss_mask"].sum(1))
    np.testing.assert_array_equal(sums["text_bytes"], (batch["targets"] * batch["loss_mask"]).sum(1))
    np.testing.assert_allclose(sums["reach_nll"].sum(), expected, rtol=1e-6)
    reach = np.array([[list(row[: n + 1]).count(row[n]) for n in range(23)] for row in batch["segment_ids"]])
    by_hand = [np.sum(np.asarray(whole)[(reach >= 2**k) & (reach < 2 ** (k + 1))]) for k in range(5)]
    np.testing.assert_allclose(sums["reach_nll"], by_hand, rtol=1e-5)


def test_visible_tokens_by_hand():
    segments = jnp.array([[1, 1, 1, 2, 3, 3, 0]])
    inputs = jnp.zeros((1, 7), jnp.int32)
    assert visible_tokens(inputs, segments).tolist() == [[1, 2, 3, 1, 1, 2, 1]]
    assert visible_tokens(inputs, None).tolist() == [[1, 2, 3, 4, 5, 6, 7]]


def run_of(digest):
    return Restored(config=None, parameters=None, step=4, mesh=None, digest=digest)  # type: ignore[arg-type]


def test_results_are_written_whole_and_later_tasks_added(tmp_path):
    path = evaluation_file(str(tmp_path), 4)
    one = TaskResult({"score": 0.5, "nothing": math.nan}, {"score": (0.4, 0.6)}, {"seed": 1}, [{"id": 1}, {"id": 2}])
    other = TaskResult({"score": 0.25}, {}, {}, [{"x": math.inf}])
    write_results(path, run_of("a"), {"one": one}, ["--limit=3"], add=True)
    write_results(path, run_of("a"), {"lm_eval:two": other}, ["--limit=3"], add=True)
    found = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert found["step"] == 4
    assert found["checkpoint_digest"] == "a"
    first = found["tasks"]["one"]
    assert (first["score"], first["nothing"], first["samples"]) == (0.5, None, 2)
    assert first["intervals"] == {"score": [0.4, 0.6]}
    assert first["command"] == "eval.py --limit=3"
    assert {"date", "code", "device"} < first.keys()
    assert [json.loads(line) for line in (path.parent / first["records"]).read_text().splitlines()] == [
        {"id": 1},
        {"id": 2},
    ]
    second = found["tasks"]["lm_eval:two"]
    assert (path.parent / second["records"]).read_text() == '{"x": null}\n'
    # Other parameters under the same step: nothing of the old ones stays in the table.
    write_results(path, run_of("b"), {"one": other}, ["--limit=3"], add=True)
    assert json.loads(path.read_text())["tasks"].keys() == {"one"}
    write_results(epath.Path(tmp_path / "out.json"), run_of("b"), {"one": one}, ["--limit=3"], add=False)
    assert (tmp_path / "out.one.jsonl").exists()


def test_the_table_has_a_line_a_metric():
    counts = {"prompts_truncated": 2, "questions_left_out": 0}
    result = TaskResult({"loss": 2.0, "bits": 3.0}, {"loss": (1.9, 2.1)}, {}, [{}] * 7, {"loss": 7}, counts)
    lines = table({"loss": result}).splitlines()
    assert [line.split() for line in lines[2:]] == [
        ["loss", "loss", "2.0000", "1.9000", "to", "2.1000", "7"],
        ["loss", "bits", "3.0000"],
        ["loss:", "prompts", "truncated:", "2"],
    ]


def test_a_digest_names_values_and_places():
    tree = {"a": jnp.arange(5.0), "b": {"c": jnp.ones((2, 3))}}
    digest = tree_digest(tree)
    assert digest == tree_digest(jax.tree.map(lambda x: x + 0, tree))
    changed = (tree | {"a": tree["a"].at[3].add(1e-6)}, {"a": tree["a"], "d": tree["b"]}, tree | {"a": jnp.ones(5)})
    assert len({digest, *map(tree_digest, changed)}) == 4
