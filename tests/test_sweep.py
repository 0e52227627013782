"""`python -m iha_jax.sweep`: points and their names, commands, what is skipped, refused and reported."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from iha_jax import compare, sweep
from iha_jax.comparison import launch
from iha_jax.comparison.launch import Launcher
from iha_jax.config import ConfigError
from iha_jax.config_file import load_config
from iha_jax.overrides import as_text, grid, product, settings_name, zipped
from iha_jax.training import command as training
from tests.comparisons import CONFIG, config_file, ends, write_run

ROOT = Path(__file__).parent.parent


def sweep_file(folder: Path, points: str, *, arms: bool = True) -> str:
    """A config file whose `get_sweep()` returns the expression `points`; without `arms` it has one model only."""
    text = CONFIG.split("def get_comparison")[0].format(data={})
    if not arms:
        text = text.replace('ARMS = ("mha", "iha", "big")\n', "").replace('arm="iha"', "").replace("arm ==", "'' ==")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny.py"
    path.write_text(
        f"from iha_jax.overrides import grid, product, zipped\n{text}\ndef get_sweep():\n    return {points}\n"
    )
    return str(path)


# --- Lists of overrides.


def test_grids_zips_and_products():
    assert grid({"a": (1, 2), "b": ["x", "y"]}) == [
        {"a": 1, "b": "x"},
        {"a": 1, "b": "y"},
        {"a": 2, "b": "x"},
        {"a": 2, "b": "y"},
    ]
    assert zipped({"a": (1, 2), "b": range(5, 7)}) == [{"a": 1, "b": 5}, {"a": 2, "b": 6}]
    both = product(zipped({"a": (1, 2), "b": (5, 6)}), grid({"seed": range(2)}))
    assert [tuple(point.values()) for point in both] == [(1, 5, 0), (1, 5, 1), (2, 6, 0), (2, 6, 1)]
    with pytest.raises(ValueError, match="expected as many values of each key, found a: 2, b: 3"):
        zipped({"a": (1, 2), "b": range(3)})
    with pytest.raises(ValueError, match="a is set by two of the lists"):
        product(grid({"a": (1,)}), grid({"a": (2,)}))
    with pytest.raises(ValueError, match=re.escape("arm has 'iha'; expected several values, such as ('iha',)")):
        grid({"arm": "iha"})


def test_names_are_readable_and_depend_on_the_values_alone():
    settings = {"optimizer.learning_rate": 3e-3, "model.layer_pattern": ("iha_local", "mha"), "model.qk_norm": True}
    name = "model.layer_pattern=iha_local+mha,model.qk_norm=true,lr0.003"
    assert settings_name(settings) == name
    assert settings_name(dict(reversed(settings.items()))) == name
    assert settings_name({}) == ""


def test_names_tell_values_apart_and_are_safe():
    values = [1e-3, 1.0000001e-3, 12345678, 12345679, "a/b", "a b", "A b", "a+b", ("a", "b"), "x" * 300, "x" * 301, -1]
    names = [settings_name({"data.tokenizer": value}) for value in values]
    assert len(set(names)) == len(values)
    for name in names:
        assert re.fullmatch(r"[a-z0-9._=,+-]{1,120}", name), name
    assert settings_name({"optimizer.learning_rate": 1.0}) == "lr1"
    assert settings_name({"optimizer.learning_rate": np.float32(0.5)}) == "lr0.5"


def test_values_survive_the_command_line():
    file = str(ROOT / "configs" / "base.py")
    point = {"optimizer.learning_rate": np.geomspace(1e-3, 1e-2, 3)[1], "model.num_layers": np.int64(7)}
    point |= {"model.layer_pattern": ("mha", "iha_local"), "model.qk_norm": True, "data.weights": (2,)}
    config = load_config(file, [f"{key}={as_text(value)}" for key, value in point.items()])
    assert config.optimizer.learning_rate == np.geomspace(1e-3, 1e-2, 3)[1]
    assert (config.model.num_layers, config.model.layer_pattern) == (7, ("mha", "iha_local"))
    assert config.model.qk_norm is True


# --- Points of a file.


def test_dry_run_prints_one_command_a_point_that_train_py_would_accept(tmp_path, capsys):
    points = 'grid({"arm": ARMS[:2], "optimizer.learning_rate": (1e-3, 2e-3), "seed": (0, 3)})'
    file = sweep_file(tmp_path / "my files", points)
    flags = f"--config={file}", "--workdir=my runs", "--config.training.steps=5"
    assert ends(sweep.main, *flags, "--dry_run", "--", "--some_flag=a b") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    words = shlex.split(lines[5])
    assert words[:2] == ["python", "train.py"]
    assert words[2:4] == [f"--config={file}:iha", f"--workdir={os.path.join('my runs', 'iha', 'lr0.001', 'seed3')}"]
    assert words[-1] == "--some_flag=a b"
    config = load_config(words[2].removeprefix("--config="), training.split_overrides(words)[0])
    assert (config.training.steps, config.optimizer.learning_rate, config.seed) == (5, 1e-3, 3)
    assert config.model.uses_iha
    assert not Path("my runs").exists()
    assert ends(sweep.main, *flags[::2], "--count") == 0
    assert capsys.readouterr().out == "8\n"


def test_folders_do_not_change_when_points_are_added_or_reordered(tmp_path):
    few = 'grid({"arm": ("mha", "iha"), "model.mlp_width": (29, 31)})'
    more = 'grid({"model.mlp_width": (37, 31, 29), "arm": ("big", "iha", "mha")})[::-1] + [{"seed": 5}]'
    folders = [{run.folder for run in sweep.sweep_runs(sweep_file(tmp_path, text), ())} for text in (few, more)]
    assert "mha/model.mlp_width=31/seed0" in folders[0]
    assert folders[0] < folders[1]
    assert "iha/seed5" in folders[1]  # no arm named: the file's default


def test_arms_of_the_command_line_and_files_without_arms(tmp_path):
    file = sweep_file(tmp_path, 'grid({"seed": range(2)})')
    assert [run.folder for run in sweep.sweep_runs(f"{file}:big", ())] == ["big/seed0", "big/seed1"]
    assert sweep.sweep_runs(f"{file}:big", ())[0].config().model.mlp_width == 61
    plain = sweep_file(tmp_path / "plain", '[{}, {"seed": 1}, {"optimizer.learning_rate": 0.1}]', arms=False)
    assert [run.folder for run in sweep.sweep_runs(plain, ())] == ["seed0", "seed1", "lr0.1/seed0"]
    assert sweep.sweep_runs(plain, ())[0].flags("d")[0] == f"--config={plain}"


def test_a_comparison_is_swept_as_its_runs(tmp_path):
    file = config_file(tmp_path, learning_rates=(1e-3, 2e-3), controls=("widened", "longer"))
    folders = [run.folder for run in sweep.sweep_runs(file, ())]
    assert folders[:4] == ["mha/lr0.001/seed0", "mha/lr0.002/seed0", "iha/lr0.001/seed0", "iha/lr0.002/seed0"]
    assert "mha_widened/lr0.001/seed1" in folders
    assert len(folders) == 12


REFUSED = {
    "unknown key": ('[{"optimizer.learning_rat": 1}]', "did you mean config.optimizer.learning_rate?"),
    "unknown arm": ('[{"arm": "ihaa"}]', "did you mean 'iha'?"),
    "bad value": ('[{}, {"model.num_heads": -1}]', "point 1: config.model.num_heads = -1"),
    "bad everywhere": ('grid({"seed": (0, 1, 2), "model.widht": (1,)})', "3 points, the first 0: --config.model.widht"),
    "the same point": ('[{"seed": 1}, {"seed": 0}, {"seed": 1}]', "point 2: trains the same as point 0"),
    "the same config": ('[{"seed": 0}, {"model.mlp_width": 29}]', "point 1: trains the same as point 0"),
    "no points": ("[]", "get_sweep() returns no points"),
    "no list": ("3", "expected a list of dictionaries"),
    "bad grid": ('grid({"seed": 3})', "seed has 3; expected several values"),
    "set twice": ('grid({"training.steps": (4, 5)})', "--config.training.steps: is set for each run"),
    "arm set twice": ('grid({"arm": ARMS})', "the arm is set for each run by the config file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_swept_is_refused_before_anything_runs(tmp_path, monkeypatch, capsys, case):
    points, message = REFUSED[case]
    monkeypatch.setattr(launch, "Launcher", None)
    spec = sweep_file(tmp_path, points) + (":iha" if case == "arm set twice" else "")
    more = ["--config.training.steps=6"] if case == "set twice" else []
    assert ends(sweep.main, f"--config={spec}", f"--workdir={tmp_path / 'runs'}", *more) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_file_without_a_sweep_is_refused():
    with pytest.raises(ConfigError, match="defines no get_sweep"):
        sweep.sweep_runs(str(ROOT / "configs" / "base.py"), ())


@pytest.mark.parametrize("index", ["-1", "3", "", "x"])
def test_an_index_out_of_range_is_refused(tmp_path, capsys, index):
    file = sweep_file(tmp_path, 'grid({"seed": range(3)})')
    assert ends(sweep.main, f"--config={file}", f"--workdir={tmp_path / 'runs'}", f"--index={index}") == 2
    said = capsys.readouterr().err
    assert ("the sweep has 3 points, 0 to 2" in said) == (index in ("-1", "3"))


# --- Running.


class Writing(Launcher):
    """Writes the run directory that training would leave; a seed of `codes` ends with that exit code instead."""

    codes: dict = {}  # noqa: RUF012
    ran: list = []  # noqa: RUF012

    def __call__(self, command, environment):
        flags = dict(argument.split("=", 1) for argument in command[3:])
        seed = int(flags["--config.seed"])
        Writing.ran.append(seed)
        if seed in Writing.codes:
            return Writing.codes[seed]
        run = sweep.sweep_runs(flags["--config"].partition(":")[0], ())[seed]
        write_run(flags["--workdir"].removesuffix(run.folder), run, run.config(), 3.0)
        return 0


@pytest.fixture
def three(tmp_path, monkeypatch):
    """Flags of a sweep of three seeds whose runs are written, not trained."""
    monkeypatch.setattr(launch, "Launcher", Writing)
    monkeypatch.setattr(Writing, "ran", [])
    monkeypatch.setattr(Writing, "codes", {})
    file = sweep_file(tmp_path / "files", 'grid({"seed": range(3)})')
    return f"--config={file}", f"--workdir={tmp_path / 'runs'}"


def test_a_failed_point_is_named_the_rest_runs_and_finished_ones_are_skipped(three, capsys):
    Writing.codes = {1: 3}
    assert ends(sweep.main, *three) == 1
    assert Writing.ran == [0, 1, 2]
    said = capsys.readouterr().err
    assert "run 2 of 3: iha/seed1" in said
    assert "1 of 3 runs did not end well:\n  iha/seed1 (exit code 3)" in said
    Writing.codes = {1: 75}  # preempted by something else than a signal to the sweep
    assert ends(sweep.main, *three) == 75
    Writing.codes = {}
    assert ends(sweep.main, *three) == 0
    assert Writing.ran == [0, 1, 2, 1, 1]
    said = capsys.readouterr().err
    assert "2 of 3 runs are finished already" in said
    assert "all 3 runs are finished" in said


def test_one_index_runs_one_point_by_train_py_itself_and_passes_its_exit_code_on(three, tmp_path, monkeypatch, capsys):
    calls = []

    def train(arguments):
        calls.append(arguments)
        sys.exit(75)

    monkeypatch.setattr(training, "main", train)
    assert ends(sweep.main, *three, "--index=1", "--", "--process_count=2") == 75
    directory = f"--workdir={tmp_path / 'runs' / 'iha' / 'seed1'}"
    assert calls == [[f"{three[0]}:iha", directory, "--config.seed=1", "--process_count=2"]]
    run = sweep.sweep_runs(three[0].removeprefix("--config="), ())[1]
    write_run(tmp_path / "runs", run, run.config(), 3.0)
    assert ends(sweep.main, *three, "--index=1") == 0
    assert len(calls) == 1
    assert "iha/seed1 is finished already" in capsys.readouterr().err


@pytest.mark.parametrize("mode", [(), ("--index=2",)])
def test_a_point_made_with_another_config_is_refused_by_name(three, tmp_path, capsys, mode):
    run = sweep.sweep_runs(three[0].removeprefix("--config="), ["training.batch_size=2"])[2]
    write_run(tmp_path / "runs", run, run.config(), 3.0)
    assert ends(sweep.main, *three, *mode) == 2
    said = capsys.readouterr().err
    assert os.path.join("runs", "iha", "seed2") in said
    assert "training.batch_size: 2 in the run, 4 now" in said
    assert Writing.ran == []


def test_compare_reports_a_sweep(tmp_path, capsys):
    points = 'product(grid({"arm": ("mha", "iha"), "optimizer.weight_decay": (0.1, 0.2)}), grid({"seed": range(2)}))'
    file = sweep_file(tmp_path / "files", points)
    for run in sweep.sweep_runs(file, ()):
        decay = dict(run.settings)["optimizer.weight_decay"]
        bits = {("mha", 0.1): 3.0, ("mha", 0.2): 2.9, ("iha", 0.1): 2.5, ("iha", 0.2): 2.7}[run.arm, decay]
        write_run(tmp_path / "runs", run, run.config(), bits + 0.1 * run.seed)
    assert ends(compare.main, f"--config={file}", f"--workdir={tmp_path / 'runs'}", "--report_only") == 0
    text = capsys.readouterr().out
    same, best = text.split("Best of its settings")
    assert "iha optimizer.weight_decay=0.2 - mha optimizer.weight_decay=0.2 = -0.2000" in same
    assert "iha optimizer.weight_decay=0.1 - mha optimizer.weight_decay=0.2 = -0.4000" in best
    assert "WARNING" not in text
    csv = (tmp_path / "runs" / "comparison.csv").read_text().splitlines()
    assert len(csv) == 9
    assert csv[1].startswith("mha,optimizer.weight_decay=0.1,0,")


@pytest.mark.slow
def test_two_points_trained_for_real_and_reported(tmp_path):
    """The example on the standard library's sources, made smaller; the second point by its index."""
    file = ROOT / "configs" / "learning_rate_sweep.py"
    text = file.read_text().replace("(3e-3, 7e-3, 1.5e-2)", "(7e-3,)")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "two.py").write_text(text)
    more = "training.steps=4 training.eval_rows=4 training.eval_every=2 optimizer.warmup_steps=2"
    flags = [f"--config={tmp_path / 'files' / 'two.py'}", f"--workdir={tmp_path / 'runs'}"]
    small = [f"--config.{override}" for override in more.split()]

    def run(module, *arguments):
        command = [sys.executable, "-m", module, *flags, *small, *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    first = run("iha_jax.sweep", "--index=1")
    assert first.returncode == 0, first.stderr
    assert (tmp_path / "runs" / "iha" / "lr0.007" / "seed0" / "checkpoints" / "4").is_dir()
    rest = run("iha_jax.sweep")
    assert rest.returncode == 0, rest.stderr
    assert "1 of 2 runs are finished already" in rest.stderr
    report = run("iha_jax.compare", "--report_only")
    assert report.returncode == 0, report.stderr
    assert "iha lr0.007 - mha lr0.007" in report.stdout
