"""Runs that are told to stop, die in part, or hang, as real commands: who leaves when, with which exit code and words.
What each shows: docs/reliability.md."""

import signal
import time

import pytest

from tests.several import Processes, fingerprints, metrics, prepare_texts, run, small_command

pytestmark = pytest.mark.slow
LONG = dict(steps=100_000, eval_every=100_000, checkpoint_every=100_000)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_texts(tmp_path_factory.mktemp("data"))


def begun(processes, phase, times=1):
    """Whether every process has begun `phase` so many times."""
    return lambda: all(text.count(f"{phase} begins") >= times for text in processes.texts())


@pytest.mark.parametrize("count", [1, 2])
def test_a_signal_during_an_evaluation_saves_and_leaves_after_it(data, tmp_path, count):
    workdir = tmp_path / "run"
    command = small_command(workdir, data, dict(pauses={"evaluate": 2}), **(LONG | dict(eval_every=3)))
    with Processes(command, count, output=tmp_path) as processes:
        processes.wait_for(begun(processes, "evaluate", 2))  # of steps 0 and 3
        processes.processes[-1].send_signal(signal.SIGTERM)
        assert processes.wait(120) == [75] * count, processes.texts()
        last = metrics(workdir)[-1]["step"]
        assert 3 <= last <= 6
        assert [row["step"] for row in metrics(workdir) if row["split"] == "val"][:2] == [0, 3]
        assert fingerprints(workdir, last)
        assert f"preempted: step {last} is saved" in processes.texts()[0]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("phase", ["restore", "compile", "evaluate"])
def test_a_signal_before_the_first_step_leaves_without_one_and_saves_nothing(data, tmp_path, count, phase):
    workdir = tmp_path / "run"
    command = small_command(workdir, data, dict(pauses={phase: 3}), **LONG)
    with Processes(command, count, output=tmp_path) as processes:
        processes.wait_for(begun(processes, phase))
        processes.processes[-1].send_signal(signal.SIGTERM)
        assert processes.wait(120) == [75] * count, processes.texts()
    assert not list((workdir / "checkpoints").iterdir())
    assert [row["step"] for row in metrics(workdir)] == ([0] if phase == "evaluate" else [])
    assert "compiled the training step" in processes.texts()[0]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("phase", ["compile", "step"])
def test_a_second_signal_leaves_at_once(data, tmp_path, count, number, phase):
    """Also where the main thread is in C, and of several processes all."""
    command = small_command(tmp_path / "run", data, dict(hangs=[phase, 1]), **LONG)
    with Processes(command, count, output=tmp_path) as processes:
        hanging = processes.processes[-1]
        processes.wait_for(lambda: f"{phase} hangs" in processes.texts()[-1])
        hanging.send_signal(number)
        time.sleep(2)
        assert [process.poll() for process in processes.processes] == [None] * count
        hanging.send_signal(number)
        assert hanging.wait(5) == 128 + number
        assert all(process.wait(10) != 0 for process in processes.processes)


@pytest.mark.parametrize("trouble", ["process 1 is killed", "process 0 is killed", "process 0 raises"])
def test_a_dead_process_ends_the_job(data, tmp_path, trouble):
    raises = dict(process=0, raises=9) if trouble == "process 0 raises" else {}
    sizes = LONG | dict(checkpoint_every=1, keep_checkpoints=2)  # a save is always under way
    with Processes(small_command(tmp_path / "run", data, raises, **sizes), 2, output=tmp_path) as processes:
        troubled, survivor = processes.processes
        if trouble == "process 1 is killed":
            troubled, survivor = survivor, troubled
        if "killed" in trouble:
            processes.wait_for(lambda: len(metrics(tmp_path / "run")) > 5)
            troubled.kill()
        assert troubled.wait(120) != 0
        began = time.monotonic()
        code = survivor.wait(60)
        seconds = time.monotonic() - began
        print(f"{trouble}: the other ended with {code} after {seconds:.1f} s")
        assert code != 0
        assert seconds < 10, processes.texts()
        if "raises" in trouble:
            assert "RuntimeError: a cable was pulled" in processes.texts()[0]
            assert "another process failed: process 0" in processes.texts()[1]


@pytest.mark.parametrize(
    "hangs", [("restore", 1), ("compile", 1), ("evaluate", 1), ("step", 1), ("step", 4), ("save", 1), ("finish", 1)]
)
def test_a_hang_in_any_phase_ends_the_process_and_shows_where(data, tmp_path, hangs):
    command = small_command(tmp_path / "run", data, dict(hangs=hangs), watchdog_seconds=10)
    with Processes(command, 1, output=tmp_path) as processes:
        processes.wait_for(lambda: f"{hangs[0]} hangs" in processes.texts()[0])
        began = time.monotonic()
        assert processes.wait(120) == [1], processes.texts()
        seconds = time.monotonic() - began
        print(f"{hangs}: ended after {seconds:.1f} s")
        assert seconds < 11.5
        assert "hang_here" in processes.texts()[0]


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("how", ["sleeps", "is stopped"])
def test_processes_do_not_wait_for_one_that_hangs(data, tmp_path, which, how):
    trouble = dict(process=which, hangs=("step", 4) if how == "sleeps" else ("", 0))
    sizes = LONG | dict(watchdog_seconds=20)
    with Processes(small_command(tmp_path / "run", data, trouble, **sizes), 2, output=tmp_path) as processes:
        hanging, other = processes.processes[which], processes.processes[1 - which]
        if how == "sleeps":
            processes.wait_for(lambda: "step hangs" in processes.texts()[which])
        else:
            processes.wait_for(lambda: len(metrics(tmp_path / "run")) > 3)
            hanging.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        code = other.wait(60)
        seconds = time.monotonic() - began
        print(f"process {which} {how}: the other ended with {code} after {seconds:.1f} s")
        assert code != 0
        assert seconds < 22
        said = processes.texts()
        assert "most recent call first" in said[1 - which] or "most recent call first" in said[which]
        if how == "sleeps":
            assert hanging.wait(5) != 0
            assert "hang_here" in said[which]


def test_a_healthy_run_is_never_ended_by_its_watchdog(data, tmp_path):
    """Every phase takes nearly as long as the watchdog allows, the whole run many times that."""
    slow = dict.fromkeys(("restore", "compile", "evaluate", "step", "finish"), 6)
    command = small_command(tmp_path / "run", data, dict(pauses=slow), steps=4, eval_every=4, watchdog_seconds=12)
    (code,), texts = run(command, 1, output=tmp_path)
    assert code == 0, texts
