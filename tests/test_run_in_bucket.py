"""A run directory in a bucket: rows that nothing can be appended to, and uploads that fail."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import orbax.checkpoint as ocp
import pytest

from iha_jax import compare
from iha_jax.data import storage
from iha_jax.data.prepare import main as prepare
from iha_jax.training import loop
from iha_jax.training.checkpoint import Checkpointer
from iha_jax.training.metrics import MetricsWriter, read_metrics
from tests.bucket import Bucket, use_bucket
from tests.comparisons import written
from tests.texts import write_texts
from tests.tiny import tiny

RUN = "gs://mine/runs/a"


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    return use_bucket(tmp_path, monkeypatch) / "mine"


def row(step):
    return {"step": step, "split": "train", "loss": 1.0 / (step + 1)}


def steps(path=f"{RUN}/metrics.jsonl"):
    return [row["step"] for row in read_metrics(path)]


def losses(path):
    return [(row["split"], row["step"], row["loss"]) for row in read_metrics(path)]


def failing(monkeypatch, error, times):
    """The next `times` uploads fail. Returns the waits between them."""
    opened, left, waits = Bucket._open, [times], []

    def open_(self, path, mode="rb", **options):
        if mode == "wb" and left[0]:
            left[0] -= 1
            raise error
        return opened(self, path, mode, **options)

    monkeypatch.setattr(Bucket, "_open", open_)
    monkeypatch.setattr(storage.time, "sleep", waits.append)
    return waits


def test_rows_reach_a_bucket_at_a_bounded_rate_and_all_of_them_on_request(bucket, monkeypatch):
    with MetricsWriter(RUN, resume_step=None, tensorboard=True) as writer:
        for step in range(3):
            writer.write(row(step))
        writer._staging._pending.result()
        assert len(steps()) <= 3  # the first upload has what was there when it began
        writer.write(row(3))
        writer._staging._pending.result()
        assert 3 not in steps()
        writer.flush()
        assert steps() == [0, 1, 2, 3]
        monkeypatch.setattr(writer._staging, "_due", 0.0)
        writer.write(row(4))
        writer._staging._pending.result()
        assert steps() == [0, 1, 2, 3, 4]
        writer.write(row(5))
        folder = Path(writer._staging.folder)
    assert steps() == [0, 1, 2, 3, 4, 5]
    (events,) = (bucket / "runs/a/tensorboard").iterdir()
    assert events.read_bytes().count(b"train/loss") == 6
    assert not folder.exists()


def test_a_resumed_run_keeps_the_rows_before_its_step_and_a_new_one_none(bucket):
    for resume_step, new, expected in ((None, range(5), [0, 1, 2, 3, 4]), (2, [3], [0, 1, 2, 3]), (None, [0], [0])):
        with MetricsWriter(RUN, resume_step=resume_step) as writer:
            for step in new:
                writer.write(row(step))
        assert steps() == expected


def test_an_upload_that_fails_is_tried_again(bucket, monkeypatch, capsys):
    waits = failing(monkeypatch, ConnectionError("reset"), 3)
    with MetricsWriter(RUN, resume_step=None) as writer:
        writer.write(row(0))
    assert steps() == [0]
    assert waits == [1.0, 2.0, 4.0]
    assert not capsys.readouterr().err


@pytest.mark.parametrize("error", [ConnectionError("unplugged"), PermissionError("forbidden")])
def test_rows_that_cannot_be_uploaded_are_kept_said_and_found_again(bucket, monkeypatch, capsys, error):
    with MetricsWriter(RUN, resume_step=None) as writer:
        writer.write(row(0))
    with monkeypatch.context() as patched:
        waits = failing(patched, error, 1000)
        kept = pytest.raises(RuntimeError, match=r"gs://mine/runs/a lacks .* kept in /")
        with kept, MetricsWriter(RUN, resume_step=0) as writer:
            writer.write(row(1))
            writer.flush()  # the checkpoint of step 1 would be saved now: training goes on
            writer.write(row(2))
        assert bool(waits) == isinstance(error, ConnectionError)
    assert str(error) in capsys.readouterr().err
    assert steps() == [0]
    with MetricsWriter(RUN, resume_step=1) as writer:
        writer.write(row(2))
    assert steps() == [0, 1, 2]


def test_rows_left_behind_by_another_run_of_that_name_are_not_taken(bucket, monkeypatch):
    with monkeypatch.context() as patched:
        failing(patched, PermissionError(), 1000)
        with pytest.raises(RuntimeError), MetricsWriter(RUN, resume_step=None) as writer:
            writer.write(row(0) | {"loss": 7.0})
    (bucket / "runs/a").mkdir(parents=True)
    (bucket / "runs/a/metrics.jsonl").write_text(json.dumps(row(0)) + "\n")  # written from another machine
    with MetricsWriter(RUN, resume_step=0) as writer:
        assert writer.training_losses() == [row(0)["loss"]]


def test_a_run_in_a_bucket_stopped_and_resumed_equals_a_local_one(bucket, tmp_path, monkeypatch):
    """All but its checkpoints, which Orbax reads and writes past fsspec: those of test_run_on_server.py."""
    write_texts(tmp_path / "in")
    with pytest.raises(SystemExit):
        prepare([f"--input={tmp_path / 'in'}", "--suffix=.txt", "--output=gs://mine/set"])
    config = tiny(
        model__num_layers=1,
        model__layer_pattern=("mha",),
        data__sources=("gs://mine/set",),
        data__cache_dir="gs://mine/cache",
    )
    original, folders = loop.Checkpointer, {str(tmp_path / "here"): "here", RUN: "there"}

    class Stopping(loop.Meter):
        def training_row(self, step, *rest):
            if step == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().training_row(step, *rest)

    monkeypatch.setattr(
        loop,
        "Checkpointer",
        lambda at, writable: original(tmp_path / "saved" / folders[str(at.parent)], writable=writable),
    )
    assert loop.train(loop.admit(config, str(tmp_path / "here"))) == 0
    with monkeypatch.context() as patched:
        patched.setattr(loop, "Meter", Stopping)
        assert loop.train(loop.admit(config, RUN)) == 75
    assert steps()[-1] == 4
    assert loop.train(loop.admit(config, RUN)) == 0
    assert losses(f"{RUN}/metrics.jsonl") == losses(tmp_path / "here/metrics.jsonl")
    assert sorted(path.name for path in (bucket / "runs/a").iterdir()) == [
        "config.json",
        "metrics.jsonl",
        "provenance.json",
        "wall_time.json",
    ]
    starts = json.loads((bucket / "runs/a/provenance.json").read_text())["runs"]
    assert ["start_seconds" in start for start in starts] == [True, True]


def test_a_report_is_made_in_a_bucket_of_the_runs_there(bucket, tmp_path):
    comparison, workdir, _ = written(tmp_path, lambda *_: 3.0)
    bucket.mkdir(parents=True)
    workdir.rename(bucket / "all")
    with pytest.raises(SystemExit) as end:
        compare.main([f"--config={comparison.path}", "--workdir=gs://mine/all", "--report_only"])
    assert end.value.code == 0
    assert "iha" in (bucket / "all/comparison.md").read_text()
    assert (bucket / "all/comparison.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("command", ["train.py", "eval.py", "compare"])
def test_a_bucket_whose_library_is_missing_is_refused(command, monkeypatch, capsys, tmp_path):
    from iha_jax.evaluation.command import main as evaluate
    from iha_jax.training.command import main as train

    config = "--config=configs/quickstart.py"
    main, flags = {"train.py": (train, [config]), "eval.py": (evaluate, []), "compare": (compare.main, [config])}[
        command
    ]
    with pytest.raises(SystemExit) as end:
        main(["--workdir=s3://mine/run", *flags])
    assert end.value.code == 2
    assert "s3://mine/run: cannot be reached: Install s3fs" in capsys.readouterr().err


def test_a_checkpoint_whose_upload_was_cut_off_is_none(bucket, monkeypatch):
    monkeypatch.setattr(ocp, "CheckpointManager", lambda *_, **__: SimpleNamespace(close=lambda: None))
    for step in (3, 6):
        (bucket / f"runs/a/checkpoints/{step}/metadata").mkdir(parents=True)
        (bucket / f"runs/a/checkpoints/{step}/metadata/metadata").write_text("{}")
    (bucket / "runs/a/checkpoints/3/commit_success.txt").write_text("")
    with Checkpointer(f"{RUN}/checkpoints", writable=False) as checkpoints:
        assert checkpoints.latest_step() == 3
