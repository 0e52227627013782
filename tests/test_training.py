"""Training as a user runs it: golden steps, resuming bit for bit, refusals that write nothing, evaluation of a run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import base
from iha_jax.config import resolve
from iha_jax.evaluation import command as evaluation
from iha_jax.training.loop import admit, train
from iha_jax.training.optimizer import make_optimizer
from iha_jax.training.step import initial_state, make_train_step
from tests.tiny import tiny

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Overrides that train on a few small text files, prepared once for this module."""
    folder = tmp_path_factory.mktemp("data") / "text"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        words = rng.choice(["alpha", "beta", "gamma", "delta", "head", "mix"], size=60 + i)
        (folder / f"document_{i:02d}.txt").write_text(" ".join(words))
    prepared = folder.parent / "prepared"
    subprocess.run(
        [sys.executable, "-m", "iha_jax.data.prepare", f"--input={folder}", f"--output={prepared}"],
        check=True,
        cwd=ROOT,
    )
    return dict(data__sources=(str(prepared),), data__cache_dir=str(folder.parent / "cache"))


def rows(workdir, split):
    lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["split"] == split]


def losses(workdir):
    return {(split, row["step"]): row["loss"].hex() for split in ("train", "val") for row in rows(workdir, split)}


GOLDEN = {  # loss and gradient norm of the first two steps, the same on jax 0.10 and 0.12
    "mha": [5.560733795166016, 0.8488625884056091, 5.492469787597656, 0.6344081163406372],
    "iha": [5.55333948135376, 0.8243243098258972, 5.4784040451049805, 0.6575831770896912],
}


@pytest.mark.parametrize("arm", ["mha", "iha"])
def test_golden_training_step(arm):
    """One step of each quickstart arm. If a change moves these on purpose, print the new numbers and say why."""
    pattern = ("mha",) if arm == "mha" else ("iha_local", "iha_local", "mha")
    config = tiny(model__layer_pattern=pattern)
    optimizer = make_optimizer(config.optimizer, config.training.steps)
    tokens = np.arange(4 * 24).reshape(4, 24) * 37 % 257
    batch = {
        "inputs": tokens[:, :-1].astype(np.int32),
        "targets": tokens[:, 1:].astype(np.int32),
        "segment_ids": np.ones((4, 23), np.int32),
        "loss_mask": np.ones((4, 23), np.float32),
    }
    state, found = initial_state(config, optimizer), []
    step = jax.jit(make_train_step(config, optimizer))
    for _ in range(2):
        state, metrics = step(state, batch)
        found += [float(metrics["loss"]), float(metrics["grad_norm"])]
    np.testing.assert_allclose(found, GOLDEN[arm], rtol=1e-5)


@pytest.mark.parametrize("multiplier", [0.0, 0.3])
def test_head_mixing_has_a_learning_rate_of_its_own(multiplier):
    """The first step of Adam is the learning rate times the sign of the gradient; 0 freezes."""
    config = tiny(optimizer__mixing_multiplier=multiplier, optimizer__weight_decay=0.0, optimizer__clip_norm=1e9)
    optimizer = make_optimizer(config.optimizer, config.training.steps)
    parameters = {"alpha_query": np.zeros(3, np.float32), "query": np.zeros(3, np.float32)}
    gradients = {name: np.array([5.0, -7.0, 11.0], np.float32) for name in parameters}
    updates, _ = optimizer.update(gradients, optimizer.init(parameters), parameters)
    np.testing.assert_allclose(updates["query"], -config.optimizer.learning_rate / 2 * np.array([1, -1, 1]), rtol=1e-5)
    np.testing.assert_allclose(updates["alpha_query"], multiplier * updates["query"], rtol=1e-6)


def test_a_run_resumed_equals_one_never_stopped_bit_for_bit(data, tmp_path):
    config = tiny(**data)
    assert train(admit(config, str(tmp_path / "whole"))) == 0
    # The same run, stopped by its own SIGTERM after step 2 and again after step 3, between a log and a checkpoint.
    for stop in (2, 3):
        assert train_and_stop(config, tmp_path / "stopped", stop) == 75
        assert rows(tmp_path / "stopped", "train")[-1]["step"] == stop
    assert train(admit(config, str(tmp_path / "stopped"))) == 0
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert rows(tmp_path / "whole", "val")[-1]["step"] == config.training.steps
    assert [row["step"] for row in rows(tmp_path / "whole", "val")] == [0, 3, 6]
    last = rows(tmp_path / "whole", "train")[-1]
    assert {"tokens", "flops", "seconds", "tokens_per_second", "grad_norm", "learning_rate"} < set(last)
    # Finished: the same command again does nothing and changes nothing.
    before = (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert train(admit(config, str(tmp_path / "whole"))) == 0
    assert (tmp_path / "whole" / "metrics.jsonl").read_text() == before


def train_and_stop(config, workdir, step):
    from iha_jax.training import loop

    class Stopping(loop.Meter):
        def training_row(self, at, *rest):
            if at == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().training_row(at, *rest)

    original, loop.Meter = loop.Meter, Stopping
    try:
        return train(admit(config, str(workdir)))
    finally:
        loop.Meter = original


def test_a_killed_run_resumes_and_ends_the_same(data, tmp_path):
    """SIGKILL at a moment nobody chose, through the real command."""
    flags = [
        f"--config.{name.replace('__', '.')}={value if isinstance(value, str) else ','.join(value)}"
        for name, value in data.items()
    ]
    flags += [
        f"--config.model.{n}={v}" for n, v in dict(context_length=23, width=24, num_heads=6, mlp_width=29).items()
    ]
    flags += ["--config.model.head_width=4", "--config.model.num_layers=2", "--config.optimizer.warmup_steps=2"]
    sizes = dict(steps=40, batch_size=4, log_every=1, eval_every=20, eval_rows=6, eval_batch_size=4, checkpoint_every=4)
    flags += [f"--config.training.{n}={v}" for n, v in sizes.items()]

    def start(workdir):
        arguments = [sys.executable, "train.py", "--config=configs/base.py", f"--workdir={workdir}", *flags]
        return subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.DEVNULL)

    assert start(tmp_path / "whole").wait() == 0
    process, metrics = start(tmp_path / "killed"), tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and metrics.read_text().count("\n") > 9:
            process.kill()
        time.sleep(0.005)
    assert process.wait() == -signal.SIGKILL
    assert start(tmp_path / "killed").wait() == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_a_changed_config_is_refused_with_the_keys(data, tmp_path):
    train(admit(tiny(**data), str(tmp_path / "run")))
    with pytest.raises(ValueError, match=r"(?s)model\.mlp_width.*29.*31"):
        admit(tiny(**data, model__mlp_width=31), str(tmp_path / "run"))


def test_warm_start_from_a_run(data, tmp_path):
    mha = tiny(**data, model__layer_pattern=("mha",))
    train(admit(mha, str(tmp_path / "mha")))
    options = dict(model__iha__causality="token", model__iha__rope_positions="token")
    iha = tiny(**data, **options, model__layer_pattern=("iha",), training__init_from=str(tmp_path / "mha"))
    train(admit(iha, str(tmp_path / "iha")))
    assert rows(tmp_path / "iha", "val")[0]["loss"] == pytest.approx(
        rows(tmp_path / "mha", "val")[-1]["loss"], rel=1e-5
    )
    wider = tiny(**data, training__init_from=str(tmp_path / "mha"), model__mlp_width=31)
    with pytest.raises(ValueError, match="mlp/up"):
        admit(wider, str(tmp_path / "wider"))
    assert not (tmp_path / "wider").exists()


def test_evaluation_of_a_run_repeats_its_last_validation(data, tmp_path, capsys):
    config = tiny(**data)
    train(admit(config, str(tmp_path / "run")))
    out = tmp_path / "eval.json"
    with pytest.raises(SystemExit) as end:
        evaluation.main([f"--workdir={tmp_path / 'run'}", f"--out={out}", "--new_tokens=5", "--prompt=alpha"])
    assert end.value.code == 0
    result, last = json.loads(out.read_text()), rows(tmp_path / "run", "val")[-1]
    assert result["step"] == 6
    assert result["tasks"]["loss"]["loss"] == last["loss"]
    assert result["tasks"]["loss"]["bits_per_byte"] == last["bits_per_byte"]
    assert "bits_per_byte" in capsys.readouterr().out
    for bad in ("--step=5", "--tasks=los", "--temperature=-1", f"--out={tmp_path}", f"--out={tmp_path / 'no/e.json'}"):
        with pytest.raises(SystemExit) as end:
            evaluation.main([f"--workdir={tmp_path / 'run'}", bad])
        assert end.value.code == 2
        assert bad.split("=")[0] in capsys.readouterr().err or bad == "--step=5"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(data__sources=("/no/such/folder",)), "/no/such/folder"),
        (dict(data__tokenizer="byte"), "byte"),
        (dict(model__vocab_size=100), "config.model.vocab_size = 100: smaller than the 257 ids"),
        (dict(training__init_from="/no/such/run"), "/no/such/run"),
    ],
)
def test_unusable_input_is_refused_and_nothing_written(data, tmp_path, changes, message):
    with pytest.raises(ValueError) as error:
        admit(tiny(**(data | changes)), str(tmp_path / "run"))
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_workdir_that_is_a_file_is_refused(data, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file"):
        admit(tiny(**data), str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


def test_command_refuses_with_exit_code_2_in_seconds(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "train.py", "--config=configs/base.py", f"--workdir={tmp_path / 'run'}"),
            *("--config.model.widht=3", "--config.training.steps=nan"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "did you mean config.model.width" in done.stderr
    assert "config.training.steps = nan" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_every_config_file_resolves():
    from iha_jax.config_file import load_config, load_module

    for file in sorted((ROOT / "configs").glob("*.py")):
        module = load_module(str(file))
        for arm in getattr(module, "ARMS", ("",)) if hasattr(module, "get_config") else ():
            load_config(f"{file}:{arm}" if arm else str(file))
    assert resolve(base.get_config()).training.steps
