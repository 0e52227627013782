"""`python -m iha_jax.compare` as a user runs it: a whole tiny comparison, refusals, failures, interruptions."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from iha_jax import compare
from iha_jax.comparison.arms import load_comparison, planned_runs
from iha_jax.comparison.launch import Launcher
from iha_jax.data import prepare
from iha_jax.training import command as training
from tests.comparisons import config_file, ends, write_run, written

ROOT = Path(__file__).parent.parent


class InProcess(Launcher):
    """Runs the very commands in this process, which has jax awake already, and remembers them."""

    commands: tuple = ()

    def __call__(self, command, environment):
        assert command[:3] == [sys.executable, "-m", "iha_jax.training"]
        InProcess.commands += (command[3:],)
        return ends(training.main, *command[3:])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "text"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        words = rng.choice(["alpha", "beta", "gamma", "delta", "head", "mix"], size=60 + i)
        (folder / f"document_{i:02d}.txt").write_text(" ".join(words))
    prepared = folder.parent / "prepared"
    assert ends(prepare.main, f"--input={folder}", f"--output={prepared}") == 0
    return dict(sources=(str(prepared),), cache_dir=str(folder.parent / "cache"))


def test_a_whole_comparison_then_what_is_missing_of_it(data, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(compare, "Launcher", InProcess)
    monkeypatch.setattr(InProcess, "commands", ())
    monkeypatch.chdir(tmp_path)
    flags = f"--config={config_file(tmp_path / 'files', data=data, seeds=1)}", "--workdir=my runs"  # relative, a space
    assert ends(compare.main, *flags) == 0
    out = capfd.readouterr().out
    assert len(InProcess.commands) == 2
    assert "(n=1, no interval)" in out
    assert "iha - mha = " in out
    assert "WARNING" not in out
    workdir = tmp_path / "my runs"
    files = {name: (workdir / f"comparison.{name}").read_bytes() for name in ("md", "csv", "png")}
    assert "bits/byte" in files["md"].decode()
    assert len(files["csv"].decode().splitlines()) == 3

    # Finished: nothing runs. One run stopped half-way: that one alone goes on, and the table is the same again.
    assert ends(compare.main, *flags) == 0
    assert len(InProcess.commands) == 2
    metrics = workdir / "mha" / "seed0" / "metrics.jsonl"
    metrics.write_text("".join(line for line in metrics.open() if '"step": 4' not in line))
    shutil.rmtree(workdir / "mha" / "seed0" / "checkpoints" / "4")
    capfd.readouterr()
    assert ends(compare.main, *flags) == 0
    assert [c[1] for c in InProcess.commands[2:]] == [f"--workdir={os.path.join('my runs', 'mha', 'seed0')}"]
    captured = capfd.readouterr()
    assert "1 of 2 runs are finished already" in captured.err
    assert "resuming after step 2" in captured.err

    def losses(markdown):
        return [line for line in markdown.decode().splitlines() if "val loss" in line or "bits" in line]

    assert losses((workdir / "comparison.md").read_bytes()) == losses(files["md"])

    # The report alone rebuilds all three files from the run directories.
    for name in files:
        (workdir / f"comparison.{name}").unlink()
    assert ends(compare.main, *flags, "--report_only") == 0
    assert losses((workdir / "comparison.md").read_bytes()) == losses(files["md"])
    assert (workdir / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    assert len(InProcess.commands) == 3


def test_report_of_a_directory_that_does_not_exist_is_refused_and_creates_nothing(tmp_path, capsys):
    flags = f"--config={config_file(tmp_path / 'files')}", f"--workdir={tmp_path / 'no where'}", "--report_only"
    assert ends(compare.main, *flags) == 2
    assert "refused: --workdir" in capsys.readouterr().err
    assert not (tmp_path / "no where").exists()


def test_a_workdir_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for more in ((), ("--report_only",)):
        assert (
            ends(compare.main, f"--config={config_file(tmp_path / 'f')}", f"--workdir={tmp_path / 'file'}", *more) == 2
        )
    assert "is a file" in capsys.readouterr().err


def test_finished_runs_of_another_config_are_refused_before_anything_runs(tmp_path, monkeypatch, capsys):
    """They would stand in one table with runs of this one."""
    monkeypatch.setattr(compare, "Launcher", None)  # nothing may be launched
    comparison, workdir, _ = written(tmp_path, lambda *_: 3.0)
    flags = f"--config={comparison.path}", f"--workdir={workdir}", "--config.training.batch_size=2"
    assert ends(compare.main, *flags) == 2
    assert "training.batch_size: 4 in the run, 2 now" in capsys.readouterr().err
    assert not (workdir / "comparison.md").exists()


def test_longer_control_runs_for_the_seconds_of_the_last_arm(tmp_path, monkeypatch):
    comparison = load_comparison(config_file(tmp_path / "files", controls=("longer",)))
    for run in planned_runs(comparison, ()):
        seconds = {"mha": 4.0, "iha": 7.0}[run.arm]
        write_run(tmp_path / "runs", run, run.config(), 3.0, seconds=seconds)

    class Writing(Launcher):
        def __call__(self, command, environment):
            flags = dict(argument.split("=", 1) for argument in command[3:])
            assert flags["--config.training.steps"] == "7"  # 4 steps * 7 s / 4 s
            assert flags["--config"].endswith(":mha")
            run = planned_runs(comparison, ())[int(flags["--config.seed"]) * 2]
            config = run.config()
            longer = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=7))
            write_run(tmp_path / "runs", dataclasses.replace(run, arm="mha_longer"), longer, 2.9)
            return 0

    monkeypatch.setattr(compare, "Launcher", Writing)
    assert ends(compare.main, f"--config={comparison.path}", f"--workdir={tmp_path / 'runs'}") == 0
    text = (tmp_path / "runs" / "comparison.md").read_text()
    assert "mha_longer - mha = -0.1000" in text
    assert "WARNING" not in text


# What a training run may do when the signal comes: say that it waits, then end in one way or another.
HANDLES = "import signal, sys, time, pathlib\n"
HANDLES += "signal.signal(signal.SIGTERM, lambda *_: sys.exit({code}))\n"
WAITS = "import time, pathlib\npathlib.Path({ready!r}).touch()\ntime.sleep(60)\n"
ENDINGS = {
    "saves": (HANDLES.format(code=75) + WAITS, 75),
    "had just ended well": (HANDLES.format(code=0) + WAITS, 75),
    "cannot save yet": (WAITS, 75),
    "fails": (HANDLES.format(code=3) + WAITS, 3),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_sigterm_is_passed_on_and_gives_75(tmp_path, monkeypatch, ending):
    program, expected = ENDINGS[ending]
    ready, started = tmp_path / "ready", []

    class Scripted(Launcher):
        def __call__(self, command, environment):
            started.append(command)
            return super().__call__([sys.executable, "-c", program.format(ready=str(ready))], environment)

    def interrupt():
        while not ready.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(compare, "Launcher", Scripted)
    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    began = time.monotonic()
    assert ends(compare.main, f"--config={config_file(tmp_path / 'f')}", f"--workdir={tmp_path / 'runs'}") == expected
    thread.join()
    assert time.monotonic() - began < 30
    assert len(started) == 1
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(("program", "code"), [("exit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 137)])
def test_a_failing_run_ends_the_comparison_with_its_exit_code(tmp_path, monkeypatch, capsys, program, code):
    class Failing(Launcher):
        def __call__(self, command, environment):
            return super().__call__([sys.executable, "-c", program], environment)

    monkeypatch.setattr(compare, "Launcher", Failing)
    assert ends(compare.main, f"--config={config_file(tmp_path / 'f')}", f"--workdir={tmp_path / 'my runs'}") == code
    said = capsys.readouterr().err
    assert "mha/seed0 ended with exit code" in said
    assert f"'--workdir={tmp_path / 'my runs' / 'mha' / 'seed0'}'" in said  # quoted: it can be pasted


@pytest.mark.slow
def test_the_command_itself_trains_and_reports(data, tmp_path):
    file = config_file(tmp_path / "files", data=data, seeds=1)
    arguments = [sys.executable, "-m", "iha_jax.compare", f"--config={file}", f"--workdir={tmp_path / 'runs'}"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "(n=1, no interval)" in done.stdout
