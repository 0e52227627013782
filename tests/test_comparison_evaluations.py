"""Evaluations of the runs of a comparison: read back, put side by side, asked for by `compare`."""

import json

import pytest

from iha_jax import compare
from iha_jax.comparison.launch import Launcher, evaluate_all
from iha_jax.comparison.report import report
from iha_jax.training.run_directory import evaluation_file
from tests.comparisons import ends, written

SCORES = {"mha": (0.1, 0.3, 0.5), "iha": (0.4, 0.5, 0.9)}


def write_evaluation(workdir, run, score, *, step=4, settings=None, interval=(0.0, 1.0), command="eval.py"):
    path = evaluation_file(workdir / run.folder, step)
    path.parent.mkdir(exist_ok=True)
    task = {"score": score, "unbounded": 7.0, "intervals": {"score": interval}, "settings": settings or {"limit": 5}}
    path.write_text(json.dumps({"step": step, "tasks": {"ruler": task | {"command": command}}}))


def test_scores_stand_side_by_side_with_differences_paired_by_seed(tmp_path):
    comparison, workdir, runs = written(tmp_path, lambda *_: 3.0, seeds=3)
    assert "Evaluations" not in report(comparison, str(workdir), runs)
    for run in runs:
        write_evaluation(workdir, run, SCORES[run.arm][run.seed])
    text = report(comparison, str(workdir), runs)
    # By hand: s = 0.2 and 0.0700^0.5; differences 0.3, 0.2, 0.4; t(0.975, 2) = 4.30265.
    [line] = [line for line in text.splitlines() if line.startswith("ruler")]
    assert line.split()[1:5] == ["score", "0.3000", "±", "0.4968"]
    assert "0.6000 ± 0.6572 (+0.3000 ± 0.2484)" in line
    assert "UNFAIR" not in text
    markdown = (workdir / "comparison.md").read_text()
    assert "| ruler | score | 0.3000 ± 0.4968 | 0.6000 ± 0.6572 (+0.3000 ± 0.2484) |" in markdown


def test_what_is_not_comparable_is_said(tmp_path):
    comparison, workdir, runs = written(tmp_path, lambda *_: 3.0, seeds=2)
    last = runs[-1]
    for run in runs:
        if run is not last:
            write_evaluation(workdir, run, 0.25, settings={"limit": 5 + run.seed, "shots": 2}, interval=(0.2, 0.3))
    write_evaluation(workdir, last, 1.0, step=2)  # of an earlier checkpoint: not what is compared
    text = report(comparison, str(workdir), runs)
    assert f"Not evaluated on ruler: {last.setting} seed 1." in text
    assert "UNFAIR: ruler was not run with the same settings everywhere: limit differ." in text
    assert "0.2500 [0.2000, 0.3000]" in text  # the one seed of the last arm, with the interval over its samples


def test_evaluations_are_asked_for_once(tmp_path, monkeypatch):
    comparison, workdir, runs = written(tmp_path, lambda *_: 3.0, seeds=2)
    commands, flags = [], ["--tasks=ruler", "--limit=3"]

    class Fake(Launcher):
        def __call__(self, command, environment):
            commands.append(command[1:])
            run = next(run for run in runs if command[3] == f"--workdir={workdir / run.folder}")
            write_evaluation(workdir, run, 0.5, command=" ".join(["eval.py", *command[3:]]))
            return 0

    monkeypatch.setattr(compare, "Launcher", Fake)
    command = [f"--config={comparison.path}", f"--workdir={workdir}", f"--evaluate={' '.join(flags)}"]
    assert ends(compare.main, *command) == 0
    assert commands == [["-m", "iha_jax.evaluation", f"--workdir={workdir / run.folder}", *flags] for run in runs]
    assert ends(compare.main, *command) == 0
    assert len(commands) == 4  # done already
    # Half of it done, as after a kill: not done.
    both = [f"--config={comparison.path}", f"--workdir={workdir}", "--evaluate=--tasks=ruler,gsm8k --limit=3"]
    for run in runs:
        path = evaluation_file(workdir / run.folder, 4)
        content = json.loads(path.read_text())
        content["tasks"]["ruler"]["command"] = f"eval.py --workdir={workdir / run.folder} --tasks=ruler,gsm8k --limit=3"
        path.write_text(json.dumps(content))
    assert ends(compare.main, *both) == 0
    assert len(commands) == 8


@pytest.mark.parametrize("flag", ["--out=x.json", "--step=3", "--workdir=other", "--limt=3"])
def test_evaluations_of_many_runs_have_no_flags_of_one(tmp_path, flag, capsys):
    comparison, workdir, _ = written(tmp_path, lambda *_: 3.0, seeds=1)
    command = [f"--config={comparison.path}", f"--workdir={workdir}", f"--evaluate=--tasks=loss {flag}"]
    assert ends(compare.main, *command) == 2
    assert flag.partition("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize(("code", "expected"), [(2, 2), (-9, 137)])
def test_an_evaluation_that_fails_ends_the_comparison_with_its_code(tmp_path, code, expected):
    _, workdir, runs = written(tmp_path, lambda *_: 3.0, seeds=1)

    class Failing(Launcher):
        def __call__(self, command, environment):
            return code

    said = []
    with Failing() as launcher:
        assert evaluate_all(str(workdir), runs, launcher, said.append, flags=["--tasks=x"]) == expected
    assert "ended with exit code" in said[-1]
