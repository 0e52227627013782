"""The report of a comparison: statistics, pairing, what is said in words, what lies in the workdir; and fairness."""

import csv
import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from iha_jax.accounting import flops_per_token
from iha_jax.comparison.arms import (
    load_comparison,
    longer_steps,
    planned_runs,
    widened_mlp,
)
from iha_jax.comparison.report import report
from iha_jax.comparison.results import read_results
from iha_jax.comparison.statistics import estimate, paired_difference
from iha_jax.comparison.table import COLUMNS, make_rows
from iha_jax.config import ConfigError
from tests.comparisons import config_file, write_run, written

BITS = {"mha": (3.0, 3.2, 3.7), "iha": (2.5, 2.8, 3.1), "big": (2.0, 2.1, 2.2)}


def final(arm, seed, rate):
    return BITS[arm.split("_")[0]][seed] + (0 if rate is None else {1e-3: 0.0, 2e-3: 0.4, 4e-3: 0.1}[rate])


# --- Statistics. Quantiles t(0.975, n - 1) from a printed table: 12.7062 (n = 2), 4.30265 (n = 3).


def test_estimate_is_the_student_interval():
    found = estimate([3.0, 3.2, 3.7])
    assert found.mean == pytest.approx(3.3)
    assert found.half_width == pytest.approx(4.30265 * math.sqrt((0.09 + 0.01 + 0.16) / 2) / math.sqrt(3), rel=1e-5)
    assert estimate([1.0, 1.5]).half_width == pytest.approx(12.7062 * 0.25, rel=1e-5)
    assert found.n == 3
    assert "(n=3)" in found.text()
    alone = estimate([2.0])
    assert (alone.half_width, alone.distinguishable) == (None, False)
    assert "no interval" in alone.text()
    with pytest.raises(ValueError, match="no values"):
        estimate([])


def test_paired_difference_is_over_seeds_that_both_have():
    found = paired_difference({0: 2.5, 1: 2.8, 7: 9.0}, {0: 3.0, 1: 3.2, 2: 3.7})
    assert found.n == 2
    assert found.mean == pytest.approx(-0.45)
    assert found.half_width == pytest.approx(12.7062 * 0.05, rel=1e-5)
    assert not found.distinguishable  # though both seeds agree in sign
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


# --- The report.


def test_report_holds_what_a_fair_table_holds(tmp_path):
    comparison, workdir, runs = written(tmp_path, final, seeds=3)
    text = report(comparison, str(workdir), runs)
    rows = make_rows(read_results(workdir, runs).usable, ["mha", "iha"])
    markdown = (workdir / "comparison.md").read_text()
    for part in (text, markdown):
        assert all(column in part for column in COLUMNS)
        assert "3.3000 ± 0.8957 (n=3)" in part  # bits per byte of mha
        assert f"{0.7 * 3.3:.4f} ± {0.7 * 0.8957:.3f}" in part  # its loss
        assert "-0.5000 ± 0.2484 (n=3)" in part  # differences -0.5, -0.4, -0.6: 4.30265 * 0.1 / sqrt(3)
        assert "iha - mha = -0.5000 ± 0.2484 bits per byte (n = 3): iha is better." in part
        assert f"{rows[1].parameters.total:,}" in part
        assert f"{rows[1].flops.mixing:,.0f}" in part
        assert "1 x cpu" in part
        assert "WARNING" not in part
    lines = list(csv.DictReader((workdir / "comparison.csv").open()))
    assert [(line["arm"], line["seed"]) for line in lines] == [(r.arm, str(r.seed)) for r in runs]
    assert {line["bits_per_byte"] for line in lines if line["arm"] == "mha"} == {"3.0", "3.2", "3.7"}
    assert lines[0]["tokens_per_second"] == "46.0"
    assert (workdir / "comparison.png").read_bytes()[:4] == b"\x89PNG"


def test_arms_that_are_not_matched_are_said_in_words(tmp_path):
    comparison, workdir, runs = written(tmp_path, final, arms=("mha", "big"))
    text = report(comparison, str(workdir), runs)
    rows = make_rows(read_results(workdir, runs).usable, ["mha", "big"])
    for what, ratio in (
        ("parameters", rows[1].parameters.total / rows[0].parameters.total),
        ("useful FLOPs a token", rows[1].flops.total / rows[0].flops.total),
    ):
        assert f"big has {ratio - 1:+.1%} {what} against mha: the arms are not matched in {what}." in text


def test_intervals_that_reach_zero_and_single_seeds_get_no_verdict(tmp_path):
    comparison, workdir, runs = written(
        tmp_path / "two", lambda arm, seed, _: 3 + seed * (0.1 if arm == "mha" else -0.1)
    )
    assert "not distinguishable" in report(comparison, str(workdir), runs)
    comparison, workdir, runs = written(tmp_path / "one", final, seeds=1)
    assert "iha - mha = -0.5000 bits per byte (n = 1): one seed, no interval, no verdict." in report(
        comparison, str(workdir), runs
    )


def test_sweep_shows_the_same_setting_beside_best_of(tmp_path):
    def bits(arm, seed, rate):  # iha is best at 4e-3, mha at 1e-3
        return final(arm, seed, {1e-3: 4e-3, 4e-3: 1e-3}.get(rate, rate) if arm == "iha" else rate)

    comparison, workdir, runs = written(tmp_path, bits, seeds=3, learning_rates=(1e-3, 2e-3, 4e-3))
    text = report(comparison, str(workdir), runs)
    same, best = text.split("Best of its learning rates")
    assert "Same setting" in same
    assert "iha lr0.001 - mha lr0.001 = -0.4000" in same
    assert "iha lr0.004 - mha lr0.004 = -0.6000" in same
    assert "iha lr0.004 - mha lr0.001 = -0.5000 ± 0.2484 bits per byte (n = 3)" in best
    assert "each arm at whichever of its learning rates ended lowest" in best
    assert "iha is best at the edge of its sweep (0.004)" in best
    assert "WARNING" not in text
    assert "## Same setting" in (workdir / "comparison.md").read_text()


def test_a_rate_at_which_a_seed_diverged_is_not_the_best(tmp_path):
    def bits(arm, seed, rate):
        return None if (arm, seed, rate) == ("iha", 1, 1e-3) else final(arm, seed, rate)

    comparison, workdir, runs = written(tmp_path, bits, seeds=3, learning_rates=(1e-3, 2e-3))
    text = report(comparison, str(workdir), runs)
    assert "Diverged (the final loss is no number), and left out: iha/lr0.001/seed1." in text
    assert "iha lr0.002 - mha lr0.001" in text.split("Best of its learning rates")[1]
    assert "do not have the same seeds" in text
    assert "iha lr0.001: 0, 2" in text


def test_unequal_seeds_are_paired_where_both_have_them_and_said(tmp_path):
    comparison, workdir, runs = written(tmp_path, final, seeds=3, only=lambda run: run.folder != "iha/seed1")
    text = report(comparison, str(workdir), runs)
    assert "(mha: 0, 1, 2; iha: 0, 2); a difference is over the seeds that both have." in text
    assert "iha - mha = -0.5500 ± 0.6353 bits per byte (n = 2)" in text  # -0.5 and -0.6
    assert "Not started: iha/seed1." in text


def test_without_the_first_arm_there_is_no_difference(tmp_path):
    comparison, workdir, runs = written(tmp_path, final, only=lambda run: run.arm == "iha", learning_rates=(1e-3, 2e-3))
    text = report(comparison, str(workdir), runs)
    assert "iha lr0.001: no difference, mha has no finished run" in text
    assert " - mha" not in text


def test_foreign_and_broken_directories_are_named_and_do_no_harm(tmp_path):
    comparison, workdir, runs = written(tmp_path, final, seeds=3)
    expected = report(comparison, str(workdir), runs)
    for folder in ("old_arm/seed0", "mha/lrfoo", "mha/seedling", "mha/seed9", "plots", ".hidden"):
        (workdir / folder).mkdir(parents=True)
    (workdir / "iha" / "notes.txt").write_text("mine")
    listed = "mha/lrfoo, mha/seed9, mha/seedling, old_arm, plots"
    named = f"In the workdir, but no run of this comparison, and left out: {listed}.\n"
    assert named in report(comparison, str(workdir), runs)
    assert report(comparison, str(workdir), runs).replace(named, "") == expected
    for content in ("{", '{"seed": 1}\n', "[]\n", '{"split": "val", "step": 4}\n'):
        (workdir / "mha" / "seed1" / "metrics.jsonl").write_text(content + "\n")
        (workdir / "iha" / "seed1" / "config.json").write_text("no json")
        text = report(comparison, str(workdir), runs)
        assert "WARNING: cannot be read, and left out: mha/seed1 (" in text
        assert "iha/seed1 (" in text


CHANGES = {
    "training.steps": dict(training=dict(steps=6)),
    "training.batch_size": dict(training=dict(batch_size=2)),
    "data.train_split": dict(data=dict(train_split="train[:50%]")),
    "optimizer.learning_rate": dict(optimizer=dict(learning_rate=0.5)),
    "model.context_length": dict(model=dict(context_length=46)),
    "model.mlp_width": dict(model=dict(mlp_width=31)),
}


@pytest.mark.parametrize("key", CHANGES)
def test_runs_that_differ_in_more_than_their_arm_are_said(tmp_path, key):
    comparison, workdir, runs = written(tmp_path, final, only=lambda run: run.folder != "iha/seed1")
    config = runs[-1].config()
    for section, values in CHANGES[key].items():
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})
    write_run(workdir, runs[-1], config, 2.8)
    warnings = [line for line in report(comparison, str(workdir), runs).splitlines() if "WARNING" in line]
    assert len(warnings) == 1
    assert f"differ in {key}: " in warnings[0]
    assert warnings[0].endswith(" in iha/seed1.")
    assert " in iha/seed0; " in warnings[0] if key == "model.mlp_width" else " in mha, iha/seed0; " in warnings[0]
    assert warnings[0].endswith(" in iha/seed1.")
    assert " in iha/seed0; " in warnings[0] if key == "model.mlp_width" else " in mha, iha/seed0; " in warnings[0]


def test_other_data_devices_and_seeds_are_said(tmp_path):
    comparison, workdir, runs = written(tmp_path, final, only=lambda run: run.folder != "iha/seed1")
    other = dataclasses.replace(runs[-1].config(), seed=5)
    write_run(workdir, runs[-1], other, 2.8, digest="c2", device="TPU v4")
    text = report(comparison, str(workdir), runs)
    assert "differ in corpus_digest: they were not trained on the same data" in text
    assert "differ in device" in text
    assert "1 x TPU v4 in iha/seed1" in text
    assert "iha/seed1 was trained with seed 5" in text


def test_unfinished_runs_are_left_out_and_a_report_of_nothing_is_refused(tmp_path):
    comparison, workdir, runs = written(tmp_path, final, only=lambda run: run.seed == 0)
    write_run(workdir, runs[2], runs[2].config(), 9.9, steps=3)
    text = report(comparison, str(workdir), runs)
    assert "Not finished, and left out: mha/seed1." in text
    assert "9.9" not in text
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="no finished run"):
        report(comparison, str(empty), runs)
    assert list(empty.iterdir()) == []


# --- Arms: what they share, and controls.


def test_arms_share_data_order_and_initial_weights(tmp_path):
    from iha_jax.data.batches import train_batches
    from iha_jax.model import initialize

    comparison = load_comparison(config_file(tmp_path, arms=("mha", "iha", "big")))
    runs = planned_runs(comparison, ())
    configs = {(run.arm, run.seed): run.config() for run in runs}
    assert [(run.arm, run.seed) for run in runs] == [(arm, seed) for seed in (0, 1) for arm in ("mha", "iha", "big")]

    # That iha has all of mha's weights is a test of the model; here: big, whose shapes agree in part.
    starts = {}
    for arm in ("mha", "big"):
        model = configs[arm, 0].model
        start = jax.jit(lambda key, model=model: initialize(model, key))
        for seed in (0, 1):
            key = jax.random.key(configs[arm, seed].seed)
            starts[arm, seed] = {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(start(key))}
    mha, big = starts["mha", 0], starts["big", 0]
    shared = [name for name, value in mha.items() if big[name].shape == value.shape]
    assert len(shared) == len(mha) - 2 == len(big) - 2  # all but up and down
    for name in shared:
        np.testing.assert_array_equal(mha[name], big[name], err_msg=name)
    assert not np.array_equal(mha["['embedding']"], starts["mha", 1]["['embedding']"])

    class Numbered:  # rows that are their own index, so that a batch is the ids of its examples
        is_local = True

        def __len__(self):
            return 37

        def __getitem__(self, index):
            tokens = np.full(24, index, np.int32)
            return {"tokens": tokens, "segment_ids": np.ones_like(tokens)}

    def order(arm, seed):
        config = configs[arm, seed]
        batches = train_batches(
            [Numbered()],
            config.data.weights,
            seed=config.seed,
            batch_size=config.training.batch_size,
            start_step=0,
        )
        return [next(batches)["inputs"][:, 0].tolist() for _ in range(12)]

    assert order("mha", 0) == order("iha", 0) == order("big", 0)
    assert order("mha", 0) != order("mha", 1)


def test_controls_spend_what_the_last_arm_costs(tmp_path):
    comparison = load_comparison(config_file(tmp_path, controls=("widened", "longer")))
    runs = planned_runs(comparison, ())
    models = {run.arm: run.config().model for run in runs}
    assert list(models) == ["mha", "iha", "mha_widened"]
    wide = models["mha_widened"]
    assert wide.mlp_width == widened_mlp(models["mha"], models["iha"]) > models["mha"].mlp_width
    assert wide.layer_pattern == ("mha",)
    assert flops_per_token(wide).total >= flops_per_token(models["iha"]).total
    narrower = dataclasses.replace(wide, mlp_width=wide.mlp_width - 1)
    assert flops_per_token(narrower).total < flops_per_token(models["iha"]).total
    assert (longer_steps(100, 0.5, 0.75), longer_steps(100, 0.5, 0.4)) == (150, 100)


def test_widened_is_left_out_when_the_last_arm_costs_no_more(tmp_path):
    comparison = load_comparison(config_file(tmp_path, arms=("big", "mha"), controls=("widened",)))
    assert {run.arm for run in planned_runs(comparison, ())} == {"big", "mha"}


def test_longer_control_is_in_the_report(tmp_path):
    comparison, workdir, runs = written(tmp_path, final, controls=("longer",))
    text = report(comparison, str(workdir), runs)
    assert "mha_longer - mha = +0.0000" in text
    assert "WARNING" not in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(arms=("mha", "mah")), "comparison.arms = ('mha', 'mah'): expected different ones of ARMS: mha, iha, big"),
        (dict(arms="mha"), "comparison.arms = 'mha': expected a tuple"),
        (dict(seeds=True), "comparison.seeds = True: expected a positive number of seeds"),
        (dict(learning_rates=(1e-3, 1.0000001e-3)), "expected different ones"),
        (dict(learning_rates=1e-3), "comparison.learning_rates = 0.001: expected a tuple"),
        (dict(learning_rates=(math.nan,)), "comparison.learning_rates has nan: expected positive numbers"),
        (dict(controls=("wider",)), "comparison.controls has 'wider': expected some of widened, longer"),
        (dict(sedes=3), "comparison.sedes: no such key"),
    ],
)
def test_a_comparison_that_cannot_be_made_is_refused(tmp_path, changes, message):
    file = config_file(tmp_path, **changes)
    with open(file, "a") as stream:
        stream.write("\nnan = float('nan')\n")
    with pytest.raises(ConfigError) as error:
        load_comparison(file)
    assert message in str(error.value)


def test_overrides_that_the_comparison_sets_itself_are_refused(tmp_path):
    comparison = load_comparison(config_file(tmp_path, learning_rates=(1e-3,)))
    with pytest.raises(ConfigError, match=r"(?s)config\.seed.*config\.optimizer\.learning_rate"):
        planned_runs(comparison, ["seed=3", "optimizer.learning_rate=1"])
    assert json.dumps([run.folder for run in planned_runs(comparison, ["training.steps=5"])])
