"""Every notebook runs from top to bottom on tiny settings; what is kept of it is small, and of one whole run."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import nbformat
import numpy as np
import pytest
from etils import epath
from nbclient import NotebookClient

from iha_jax.model import abstract_parameters
from iha_jax.training.checkpoint import Checkpointer
from tests.comparisons import config_file, written

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# By notebook: other values for its cell tagged "parameters"; `config_file` stands for the file that it writes, a
# comparison of tiny models. A WORKDIR among these is always a temporary folder.
TINY = {
    "01_interleaved_head_attention": {"TEXT": "tiny", "H": 2, "P": 2},
    "02_theory": {"N": 5, "K": 4, "N_MAX": 3, "M": 3, "G": 8, "ALL_UP_TO": 3},
    "03_compare_runs": {"CONFIG": config_file, "OVERRIDES": [], "SEEDS": 2},
    "04_attention_maps": {"CONFIG": config_file, "OVERRIDES": [], "IHA_OVERRIDES": [], "TEXT": "def f(x)"},
    "05_plan_a_pod_run": {"TOPOLOGY": "v5p:2x2x1", "MOST_CHIPS": 8, "COMPILE": False},
}
BYTES = 250_000
MACHINE = re.compile(r"(?<![\w.:/~-])/(home|root|tmp|Users|private|var|opt|mnt|usr|work|workspace|content)/|\b[A-Z]:\\")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def parameters(notebook):
    """Index of the cell tagged "parameters", and what it assigns: names to literals."""
    (index,) = (i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    values = {}
    for statement in ast.parse(notebook.cells[index].source).body:
        assert isinstance(statement, ast.Assign), f"line {statement.lineno}: expected NAME = literal"
        for target in statement.targets:
            assert isinstance(target, ast.Name), f"line {statement.lineno}: expected NAME = literal"
            values[target.id] = ast.literal_eval(statement.value)
    return index, values


def test_tiny_settings_are_those_of_notebooks():
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05"]
    assert set(TINY) <= {path.stem for path in NOTEBOOKS}


def evaluated_runs(tmp_path):
    """The runs of a tiny comparison, written instead of trained, with losses by position."""
    _, workdir, runs = written(tmp_path, lambda arm, seed, rate: 3.0 + 0.1 * seed - 0.2 * (arm == "iha"))
    for run in runs:
        loss = {"loss_from_1": 2.5, "loss_from_2": 2.0 + 0.1 * run.seed, "intervals": {}, "settings": {}}
        evaluation = workdir / run.folder / "evaluations" / "step_4.json"
        evaluation.parent.mkdir()
        evaluation.write_text(json.dumps({"tasks": {"loss": loss}}))
    return workdir, runs


def checkpoints_of(workdir, runs):
    """Checkpoints for one run of each arm, not trained either; the notebook's parameters that name these runs."""
    rng, found = np.random.default_rng(0), {}
    for run in runs:
        if run.seed == 0:
            found[f"{run.arm.upper()}_RUN"] = str(workdir / run.folder)
            shapes = abstract_parameters(run.config().model)  # drawn by numpy: nothing to compile
            parameters = jax.tree.map(lambda x: jnp.asarray(rng.normal(scale=0.3, size=x.shape), x.dtype), shapes)
            with Checkpointer(epath.Path(workdir / run.folder / "checkpoints"), writable=True) as checkpoints:
                checkpoints.save(4, {"parameters": parameters}, metadata={})
                assert checkpoints.confirm() == 4
    return found


def run_notebook(path, tiny, tmp_path, monkeypatch):
    notebook = read(path)
    index, defaults = parameters(notebook)
    if tiny.get("CONFIG") is config_file:
        tiny = tiny | {"CONFIG": config_file(tmp_path / "files")}
    if "WORKDIR" in defaults:
        tiny = tiny | {"WORKDIR": str(tmp_path / "runs")}
    assert set(tiny) <= set(defaults), f"{path.name} has the parameters {', '.join(defaults)}"
    injected = "\n".join(f"{name} = {value!r}" for name, value in tiny.items())
    notebook.cells.insert(index + 1, nbformat.v4.new_code_cell(injected))
    # This Python's kernel, not one that a user has installed under the same name, and nobody's start-up files.
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}})
    client.execute()
    assert all(cell.execution_count for cell in code(notebook))


@each_notebook
def test_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    tiny = TINY.get(path.stem, {})
    if tiny.get("CONFIG") is config_file:
        workdir, runs = evaluated_runs(tmp_path)
        if "MHA_RUN" in parameters(read(path))[1]:
            tiny = tiny | checkpoints_of(workdir, runs)
    run_notebook(path, tiny, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, tiny in TINY.items() if tiny.get("CONFIG") is config_file])
def test_trains_where_there_are_no_runs(name, tmp_path, monkeypatch):
    run_notebook(ROOT / "notebooks" / f"{name}.ipynb", TINY[name], tmp_path, monkeypatch)
    assert len(list((tmp_path / "runs").rglob("metrics.jsonl"))) == (4 if "SEEDS" in TINY[name] else 2)


@each_notebook
def test_what_is_kept_is_small_and_of_one_whole_run(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert path.stat().st_size < BYTES, "fewer or smaller pictures"
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    assert any(cell.outputs for cell in code(notebook))
    for cell in code(notebook):
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", f"cell {cell.id}: {output.text}"
    ids = [
        cell.get("id") for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
    ]  # nbformat adds missing ones
    assert all(ids)
    assert len(set(ids)) == len(ids)


@each_notebook
def test_nothing_of_the_machine_is_kept(path):
    notebook = read(path)
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags"}, f"cell {cell.id}: no times, no states of widgets"
        texts = [cell.source]
        for output in cell.get("outputs", []):
            data = {kind: value for kind, value in output.get("data", {}).items() if not kind.startswith("image/")}
            texts += [output.get("text", ""), json.dumps(data)]
        for text in texts:
            assert not MACHINE.search(text), f"cell {cell.id}: {MACHINE.search(text)}"
            assert str(ROOT) not in text


@each_notebook
def test_nothing_is_defined_that_belongs_in_the_package(path):
    for cell in code(read(path)):
        for node in ast.walk(ast.parse(cell.source)):  # no magics either
            found = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            assert not found, f"cell {cell.id} defines {getattr(node, 'name', '')}"


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff_passes(command):
    run = subprocess.run([sys.executable, "-m", "ruff", *command, *NOTEBOOKS], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
