"""The small pieces beside the training loop: skipped steps, spikes and rollbacks, the watchdog, wall time."""

import json
import random
import subprocess
import sys
import threading
import time

import jax.numpy as jnp
import pytest
from etils import epath

from iha_jax.parallel import stop
from iha_jax.training.guard import Guard, TrainingDiverged
from iha_jax.training.spikes import (
    LossSpike,
    SpikeDetector,
    batches_without_gaps,
    data_step,
    read_rollbacks,
    roll_back,
)
from iha_jax.training.time_account import CATEGORIES, COMPILE, PRODUCTIVE, SAVE, TimeAccount


def test_skipped_steps_are_counted_and_a_row_of_them_ends_the_run():
    guard = Guard(limit=3, total=5, last_good=lambda: 2)
    for step, skipped in enumerate([0, 1, 1, 0, 1, 1], 1):
        guard.watch(step, jnp.asarray(bool(skipped)))
    guard.catch_up()
    assert guard.total == 9
    guard.watch(7, jnp.asarray(True))
    with pytest.raises(TrainingDiverged, match=r"3 steps in a row, 5 to 7: .* last good checkpoint: step 2"):
        guard.catch_up()


def test_a_spike_is_a_loss_far_above_the_median_and_never_nan():
    detector = SpikeDetector(1.0, [])
    for step in range(1, 30):
        detector.observe(step, 3.0 + 0.01 * step if step % 7 else float("nan"))
    detector.observe(30, 4.0)
    with pytest.raises(LossSpike, match=r"loss 4\.5000 at step 31"):
        detector.observe(31, 4.5)
    with pytest.raises(LossSpike):
        SpikeDetector(1.0, [3.0, None] * 16).observe(33, 4.5)  # what was logged before a restart counts
    SpikeDetector(1.0, [3.0] * 15).observe(16, 4.5)  # too few
    off = SpikeDetector(0.0, [])
    for step, loss in enumerate([1.0] * 40 + [1e9], 1):
        off.observe(step, loss)


def test_rollbacks_leave_out_data_and_a_restart_anywhere_sees_the_same(tmp_path):
    run = epath.Path(tmp_path)
    for spike, restored in ((25, 20), (47, 40), (42, 40)):
        (tmp_path / "checkpoints" / str(restored)).mkdir(parents=True, exist_ok=True)
        roll_back(run, LossSpike(spike, 9.0, 3.0), limit=3)
    with pytest.raises(LossSpike, match=r"loss 9\.0000 at step 50"):
        roll_back(run, LossSpike(50, 9.0, 3.0), limit=3)
    rollbacks = read_rollbacks(run)
    #           steps 1..20: data 0..19    21..40: 25..44      41...: 45 + 7 + 2 = 54...
    expected = [*range(20), *range(25, 45), *range(54, 70)]

    def from_position(start):
        return iter(range(start, 200))

    for start in (0, 7, 19, 20, 21, 39, 40, 45):
        batches = batches_without_gaps(start, rollbacks, from_position)
        assert [next(batches) for _ in range(56 - start)] == expected[start:], start
        assert data_step(start, rollbacks) == expected[start]


@pytest.mark.parametrize("told", [[0], [2], [0, 1, 2]])
def test_processes_that_are_at_different_steps_stop_after_the_same_one(monkeypatch, told):
    """Three, each in a thread, whose steps and looks at the news take as long as they like."""
    news, stopped, rng = {}, {}, random.Random(7)
    monkeypatch.setattr(stop, "publish", news.__setitem__)
    monkeypatch.setattr(stop, "of_first", lambda _: 0)
    monkeypatch.setattr(stop, "of_all", lambda mine: [mine] * 3)
    monkeypatch.setattr(stop.jax, "process_count", lambda: 3)

    def look(process, waits):
        for wait in waits:
            time.sleep(wait)
            process._read(dict(news))

    def train(index, process, waits):
        for step, wait in enumerate(waits, 1):
            time.sleep(wait)
            if process.after(step):
                stopped[index] = step
                return

    for _ in range(10):
        news.clear()
        stopped.clear()
        processes, threads = [], []
        for index in range(3):
            monkeypatch.setattr(stop.jax, "process_index", lambda index=index: index)
            process = stop.StopTogether()
            assert not process.before_first_step(0)
            slowness, looks = rng.uniform(0, 2e-3), [rng.uniform(0, 1e-2) for _ in range(40)]
            threads.append(threading.Thread(target=look, args=(process, looks)))
            threads.append(threading.Thread(target=train, args=(index, process, [slowness] * 2000), daemon=True))
            processes.append(process)
        for thread in threads:
            thread.start()
        time.sleep(rng.uniform(0, 2e-2))
        for index in told:
            processes[index].tell()
        for thread in threads:
            thread.join(20)
        assert len(stopped) == 3
        assert len(set(stopped.values())) == 1
        assert next(iter(stopped.values())) == max(map(int, news.values())) + 1


HANG = """
import time
from iha_jax.training.watchdog import Watchdog
with Watchdog(1.0) as watchdog:
    for _ in range(3):
        watchdog.beat()
        time.sleep(0.4)
    print("alive", flush=True)
    def stuck_here(): time.sleep(60)
    watchdog.beat()
    stuck_here()
"""


def test_a_hung_process_ends_and_shows_where():
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HANG], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 1
    assert done.stdout == "alive\n"
    assert "stuck_here" in done.stderr
    assert time.monotonic() - began < 30


def test_wall_time_adds_up_over_attempts_and_what_a_kill_lost_is_told(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("iha_jax.training.time_account.time.monotonic", lambda: now[0])
    run = epath.Path(tmp_path)

    first = TimeAccount(run, now[0])
    first.carry({})
    now[0] += 5
    first.enter(COMPILE)
    now[0] += 7
    first.enter(PRODUCTIVE)
    now[0] += 20
    saved = first.totals  # a checkpoint holds this; then 11 s of work and a kill
    now[0] += 11
    first._write()

    now[0] += 1000  # nothing ran
    second = TimeAccount(run, now[0])
    now[0] += 3
    second.carry(saved)
    second.enter(SAVE)
    now[0] += 2
    second._write()
    expected = {"start": 5 + 3, "compile": 7, "productive": 20, "lost": 11, "save": 2}
    assert second.totals == {f"{name}_seconds": expected.get(name, 0) for name in CATEGORIES}
    assert json.loads((tmp_path / "wall_time.json").read_text())["seconds"] == sum(expected.values())
    assert "lost 23%" in second.summary()
