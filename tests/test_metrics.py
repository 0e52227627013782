"""`metrics.jsonl` and its optional sinks: torn lines, resuming, numbers that are not finite, what a terminal sees."""

import io
import json
import math
import sys
import types

import pytest

from iha_jax.training.metrics import MetricsWriter, check_sinks, read_metrics
from iha_jax.training.progress import Progress


def row(step, split="train", **values):
    return {"step": step, "split": split, "loss": 1.0 / (step + 1), **values}


def write(directory, steps, resume_step=None, **settings):
    with MetricsWriter(directory, resume_step=resume_step, **settings) as writer:
        for step in steps:
            writer.write(row(step))
        assert not writer.has_validation(steps[-1])


def test_rows_after_the_restored_step_are_dropped(tmp_path):
    write(tmp_path, range(5))
    write(tmp_path, [3, 4, 5], resume_step=2)
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5]
    write(tmp_path, [0])  # a run that starts again, having no checkpoint
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [0]


def test_a_torn_last_line_is_left_out_and_any_other_bad_line_is_an_error(tmp_path):
    write(tmp_path, range(3))
    file = tmp_path / "metrics.jsonl"
    whole = file.read_text()
    file.write_text(whole + '{"step": 3, "spl')
    assert [r["step"] for r in read_metrics(file)] == [0, 1, 2]
    write(tmp_path, [3], resume_step=2)
    assert file.read_text() == whole + json.dumps(row(3)) + "\n"
    file.write_text(whole.replace('"split"', "split", 1))
    with pytest.raises(ValueError, match="line 1: not a JSON object"):
        read_metrics(file)


def test_numbers_that_are_not_finite_become_null(tmp_path):
    with MetricsWriter(tmp_path, resume_step=None) as writer:
        writer.write(row(0, grad_norm=math.nan, mfu=math.inf))
    found = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert found == row(0, grad_norm=None, mfu=None)


def test_tensorboard_gets_every_number(tmp_path):
    write(tmp_path, range(2), tensorboard=True)
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()


def test_wandb_continues_one_run_however_often_it_is_resumed(tmp_path, monkeypatch):
    opened, logged = [], []
    run = types.SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **s: opened.append(s) or run))
    write(tmp_path, [0], wandb_project="iha")
    write(tmp_path, [1], resume_step=0, wandb_project="iha")
    assert opened[0]["id"] == opened[1]["id"]
    assert {s["project"] for s in opened} == {"iha"}
    assert logged == [(0, {"train/loss": 1.0}), (1, {"train/loss": 0.5})]


def test_a_sink_whose_library_is_missing_is_refused_with_the_extra_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_sinks(False, "")
    with pytest.raises(ValueError, match=r"iha_jax\[tensorboard\]"):
        check_sinks(True, "")
    with pytest.raises(ValueError, match=r"iha_jax\[wandb\]"):
        check_sinks(False, "project")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()], ids=["terminal", "file"])
def test_progress_says_loss_throughput_and_time_left(stream):
    progress = Progress(steps=10, start_step=2, stream=stream)
    progress.message("before")
    progress.update(4, row(4, seconds=8.0, tokens_per_second=1234.5))
    progress.__exit__(None, None, None)
    text = stream.getvalue()
    assert "before" in text
    assert "loss 0.2000" in text
    assert "1,234 tokens/s" in text
    if stream.isatty():
        assert "4/10" in text
        assert "<" in text  # tqdm's "elapsed<left"
    else:
        assert "step 4/10" in text
        assert "0:12 left" in text
