"""Power laws through runs of several sizes, and the report of a comparison over sizes."""

import math

import numpy as np
import pytest
from comparisons import CONFIG, write_run

from iha_jax.accounting import count_parameters
from iha_jax.comparison import scaling
from iha_jax.comparison.arms import load_comparison, planned_runs
from iha_jax.comparison.report import report
from iha_jax.comparison.statistics import estimate

SWEEP = """

def get_sweep():
    from iha_jax.overrides import grid, product, zipped

    sizes = zipped({{"model.mlp_width": {widths}, "training.steps": {steps}}})
    return product(grid({{"seed": range(3), "arm": ("mha", "iha")}}), sizes)
"""
WIDTHS, STEPS = (29, 211, 1009, 4001), (4, 8, 20, 60)
BETA = {"mha": 0.11, "iha": 0.12}


def test_a_power_law_is_recovered_exactly():
    x = np.array([3.0, 11.0, 29.0, 101.0])
    law = scaling.fit(x.tolist(), (5.3 * x**-0.17).tolist())
    assert law.beta == pytest.approx(0.17, rel=1e-12)
    assert law(7.0) == pytest.approx(5.3 * 7.0**-0.17, rel=1e-12)
    assert law.inverse(law(1234.5)) == pytest.approx(1234.5, rel=1e-9)
    with pytest.raises(ValueError, match="two different sizes"):
        scaling.fit([3.0, 3.0], [1.0, 2.0])


def bits(arm: str, seed: int, steps: int) -> float:
    """Of FLOPs as `write_run` notes them; seeds differ in the factor, so intervals of the exponents have no width."""
    return (7 + seed) * (1e6 * steps) ** -BETA[arm]


def written(tmp_path, widths=WIDTHS, steps=STEPS, bits=bits):
    path = tmp_path / "sizes.py"
    text = CONFIG.format(data={}, comparison={}).split("\n\ndef get_comparison")[0]
    path.write_text(text + SWEEP.format(widths=widths, steps=steps))
    comparison = load_comparison(str(path))
    runs = planned_runs(comparison, ())
    for run in runs:
        write_run(tmp_path / "runs", run, run.config(), bits(run.arm, run.seed, run.config().training.steps))
    return comparison, tmp_path / "runs", runs


def test_a_comparison_over_sizes_reports_exponents_and_the_compute_saved(tmp_path):
    comparison, workdir, runs = written(tmp_path)
    text = report(comparison, str(workdir), runs)
    (line,) = (line for line in text.splitlines() if line.startswith("iha ") and "; " in line)
    assert "0.1200 ± 0.0000 (n=3); +0.0100 ± 0.0000" in line
    factors = []
    for seed in range(3):  # where iha's law has the loss of mha's largest run
        needed = ((7 + seed) / bits("mha", seed, STEPS[-1])) ** (1 / BETA["iha"])
        factors.append(1e6 * STEPS[-1] / needed)
    logs = estimate([math.log(factor) for factor in factors])
    low, high = math.exp(logs.mean - logs.half_width), math.exp(logs.mean + logs.half_width)
    assert f"0.0%  {math.exp(logs.mean):.2f} [{low:.2f}, {high:.2f}] (n=3)" in line
    assert "Best of" not in text  # the best of several sizes says nothing
    assert "WARNING" not in text
    assert "comparison_scaling.png" in (workdir / "comparison.md").read_text()
    for name in ("comparison_scaling.png", "comparison_differences.png"):
        assert (workdir / name).stat().st_size > 1000


def test_exponents_and_deviations_are_those_of_least_squares(tmp_path):
    def uneven(arm, seed, steps):
        return bits(arm, seed, steps) * (1.07 if (arm, seed, steps) == ("iha", 1, STEPS[1]) else 1.0)

    comparison, workdir, runs = written(tmp_path, bits=uneven)
    text = report(comparison, str(workdir), runs)
    (line,) = (line for line in text.splitlines() if line.startswith("iha ") and "; " in line)
    sizes = np.log([count_parameters(runs[i].config().model).total for i in range(4, 8)])
    slopes, worst = [], 0.0
    for seed in range(3):
        losses = np.log([uneven("iha", seed, n) for n in STEPS])
        slopes.append(-np.cov(sizes, losses)[0, 1] / np.var(sizes, ddof=1))
        flops = np.log([1e6 * n for n in STEPS])
        design = np.stack([flops, np.ones(4)], axis=1)
        fitted = design @ np.linalg.lstsq(design, losses, rcond=None)[0]
        worst = max(worst, float(np.abs(np.exp(losses - fitted) - 1).max()))
    assert estimate(slopes).text() in line
    assert f"{worst:.1%}" in line
    assert worst > 0.03


def test_a_loss_that_an_arm_never_had_saves_nothing_that_is_known(tmp_path):
    comparison, workdir, runs = written(tmp_path, bits=lambda arm, *rest: bits(arm, *rest) / (9 if arm == "iha" else 1))
    text = report(comparison, str(workdir), runs)
    (line,) = (line for line in text.splitlines() if line.startswith("iha ") and "; " in line)
    assert line.endswith(" -")


def test_mismatches_are_between_arms_of_one_size(tmp_path):
    comparison, workdir, runs = written(tmp_path)
    text = report(comparison, str(workdir), runs)
    gaps = [float(part.split()[-1].strip("+%")) for part in text.split(" parameters against mha")[:-1]]
    assert len(gaps) == 1  # the smallest size's, where head mixing weighs most
    assert 1 < gaps[0] < 20


def test_two_sizes_are_settings_and_no_scaling(tmp_path):
    comparison, workdir, runs = written(tmp_path, WIDTHS[:2], STEPS[:2])
    text = report(comparison, str(workdir), runs)
    assert "Best of its settings" in text
    assert not (workdir / "comparison_scaling.png").exists()
