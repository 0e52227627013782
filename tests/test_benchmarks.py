"""The benchmarks on tiny sizes, without PyTorch: what they leave behind, the order of timings, the guard."""

import csv
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from benchmarks import attention, candidates, flags, harness, report, rivals, timing, train_step, workload
from iha_jax.accounting import visible_pairs

LIMITS = harness.Limits(memory_bytes=2**30, run_seconds=30.0)
TINY = workload.Workload(
    batch=1, tokens=13, heads=2, head_width=4, pseudo_heads=3, window=2, dtype="float32", rope_theta=100.0
)


@pytest.fixture(autouse=True)
def no_torch(monkeypatch):
    """The tests must not depend on an extra, nor pay for it."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))


def records(folder: Path, command: str) -> list[dict[str, str]]:
    (path,) = folder.glob(f"{command}_*.csv")
    assert path.with_suffix(".png").stat().st_size > 10_000
    return list(csv.DictReader(path.open()))


def check_timed(rows: list[dict[str, str]], expected: set[tuple[str, str]]) -> None:
    timed = [row for row in rows if row["status"] == "timed"]
    assert {(row["group"], row["name"]) for row in timed} == expected
    for row in timed:
        assert row["date"].startswith("20")
        assert row["jax"]
        assert row["device"]
        seconds = [float(row[f"{name}_s"]) for name in ("least", "lower", "median", "upper", "most")]
        assert seconds[0] > 0
        assert seconds == sorted(seconds)
        assert float(row["ratio"]) > 0
        assert float(row["useful_flops"]) > 0
        assert float(row["fraction_of_matmul"]) > 0
        assert float(row["temporary_bytes"]) > 0
        assert row["name"].startswith("ours") == (row["executed_flops"] != "")
        assert float(row["executed_flops"] or "inf") > float(row["useful_flops"])
    for row in rows:
        assert row["status"] == "timed" or row["reason"]


def test_attention_command(tmp_path, capsys):
    sizes = ["--tokens=13", "--pseudo_heads=3", "--heads=2", "--head_width=4", "--matmul_size=16"]
    attention.main([*sizes, "--repetitions=2", f"--out_dir={tmp_path}", "--without=tokamax,reference"])
    printed = capsys.readouterr().out
    assert "iha_local · ours streaming / mha · ours blockwise: time" in printed
    rows = records(tmp_path, "attention")
    check_timed(
        rows,
        {
            ("mha", "ours blockwise"),
            ("mha", "jax.nn xla"),
            ("iha_local", "ours streaming"),
            ("iha_local", "virtual sequence, jax.nn xla"),
        },
    )
    torch = next(row for row in rows if row["name"] == "torch sdpa")
    assert torch["status"] == "skipped"
    assert "extra 'benchmarks'" in torch["reason"]


def test_train_step_command(tmp_path, capsys):
    sizes = ["--tokens=11", "--pseudo_heads=2", "--width=8", "--heads=2", "--vocabulary=5", "--layers=2", "--batch=2"]
    train_step.main([*sizes, "--matmul_size=16", "--repetitions=1", f"--out_dir={tmp_path}", "--only=mha · ours"])
    assert "tokens/s" in capsys.readouterr().out
    check_timed(records(tmp_path, "train_step"), {("mha", "ours blockwise")})


class Fake:
    """A candidate that notes when it runs."""

    def __init__(self, name: str, order: list[str], value: float, seconds: float):
        self.name, self.order, self.value, self.seconds = name, order, value, seconds

    def results(self) -> dict[str, np.ndarray]:
        return {"output": np.full(3, self.value)}

    def run(self) -> float:
        self.order.append(self.name)
        return self.seconds

    def temporary_bytes(self) -> int:
        return 5

    def close(self) -> None:
        self.order.append(f"{self.name} closed")


def test_candidates_are_checked_then_interleaved():
    order: list[str] = []
    fakes = {"a": (1.0, 1.0), "wrong": (1.01, 1.0), "nan": (np.nan, 1.0), "slow": (1.0, 99.0), "b": (1.0, 3.0)}
    entries = [
        harness.Candidate("g", name, lambda w, name=name, fake=fake: Fake(name, order, *fake))
        for name, fake in fakes.items()
    ]

    def absent(_: object) -> harness.Prepared:
        raise rivals.Skip("not here")

    entries.append(harness.Candidate("g", "absent", absent))
    trusted = {"g": {"output": np.ones(3)}}
    rows = harness.measure(
        entries, None, trusted, tolerance=1e-3, limits=LIMITS, repetitions=3, baseline="g · a", pause=0
    )
    assert {row.name: row.status for row in rows} == {
        **{"a": "timed", "wrong": "wrong", "nan": "wrong"},
        **{"slow": "slow", "b": "timed", "absent": "skipped"},
    }
    assert "output is off by 1.0e-02" in rows[1].reason
    assert order.count("wrong") == order.count("nan") == 0, "a wrong candidate is never run"
    after_preparing = order[order.index("b") + 1 :]
    assert after_preparing == ["a", "b", "a", "b", "a", "b", "a closed", "b closed"]
    assert [row.ratio for row in rows if row.status == "timed"] == [1.0, 3.0]


def test_a_window_off_by_one_key_is_wrong():
    def off_by_one(q, k, v, window):
        return rivals.jax_nn("xla", q, k, v, window + 1)

    def prepare(attend):
        def function(w, *arrays):
            return rivals.virtual_sequence_local(attend, w, *arrays)

        return lambda w: candidates.jax_attention("iha_local", function, w, LIMITS)

    entries = [
        harness.Candidate("iha_local", "right", prepare(rivals.LIBRARIES["jax.nn xla"])),
        harness.Candidate("iha_local", "off by one", prepare(off_by_one)),
    ]
    trusted = {"iha_local": workload.trusted_results(TINY, "iha_local")}
    assert set(trusted["iha_local"]) == {"output"} | {
        f"gradient of {x}" for x in ("q", "k", "v", "alpha_q", "alpha_k", "alpha_v", "collapse")
    }
    rows = harness.measure(
        entries, TINY, trusted, tolerance=workload.tolerance(TINY), limits=LIMITS, repetitions=1, pause=0
    )
    assert [row.status for row in rows] == ["timed", "wrong"]


def test_too_large_is_skipped_with_its_size():
    with pytest.raises(rivals.Skip, match=r"needs .* GiB of temporaries, limit 0\.0"):
        candidates.ours("iha_local", "streaming", harness.Limits(memory_bytes=1, run_seconds=1)).prepare(TINY)


def test_costs_by_hand():
    B, N, H, d, P, W = 1, 13, 2, 4, 3, 2
    scores = 4 * d * H * visible_pairs(N * P, W * P)
    mixing = 2 * d * N * 4 * H * H * P
    assert workload.useful_flops(TINY, "iha_local") == pytest.approx(3 * (scores + mixing))
    assert workload.useful_flops(TINY, "mha") == pytest.approx(3 * 4 * d * H * N * (N + 1) / 2)
    assert workload.least_bytes(TINY, "mha") == 4 * (3 * 3 * B * N * H * d + 3 * B * N * H * d)
    assert workload.matched_window(8192, 20) == 10
    # One block of 13 queries by 13 keys; training computes scores 4 times and sums 3.
    assert workload.executed_flops(TINY, "mha", "blockwise") == 2 * d * H * (4 + 3) * N * N
    assert workload.executed_flops(TINY, "mha", "reference") is None


def test_sizes_form_a_cross():
    assert flags.cross([13, 7], [3, 2]) == [(13, 3), (7, 3), (13, 2)]


def test_paired_ratio_and_spread():
    # Medians alone would say 2 / 2 = 1; by rounds the ratios are 3, 1, 1/3 -> 1, and 2, 2, 2 -> 2.
    assert timing.paired_ratio([3.0, 2.0, 1.0], [1.0, 2.0, 3.0]) == 1.0
    assert timing.paired_ratio([2.0, 20.0, 4.0], [1.0, 10.0, 2.0]) == 2.0
    spread = timing.Spread.of([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (spread.least, spread.lower, spread.median, spread.upper, spread.most) == (1, 2, 3, 4, 5)


def test_largest_error_needs_every_result():
    right = {"output": np.ones(2), "gradient of q": np.ones(2)}
    assert harness.largest_error({"output": np.ones(2)}, right) == (np.inf, "gradient of q")
    assert harness.largest_error({**right, "output": np.ones(3)}, right)[0] == np.inf
    assert harness.largest_error(right, right)[0] == 0


def test_file_name_says_device_versions_and_date():
    facts = report.environment(1.0)
    stem = report.file_stem("attention", facts)
    assert stem.startswith(f"attention_{facts['date'].replace(':', '')}_")
    assert stem.endswith(f"_jax-{facts['jax']}")
    assert all(c.isalnum() or c in "_-." for c in stem)
