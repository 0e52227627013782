"""Runs that are stopped, killed, moved, corrupted or fed with nonsense, as real commands; what is left is compared to
the last bit with a run that nothing happened to. What each shows: docs/reliability.md."""

import json
import os
import random
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest

from tests.several import Processes, examples, fingerprints, losses, metrics, prepare_texts, run, small_command
from tests.troubled_run import flip_array_data

pytestmark = pytest.mark.slow
EVERY = dict(checkpoint_every=2, keep_checkpoints=9)
SPLIT = ["--config.mesh.fsdp=2"]  # so that each of two processes saves arrays of its own


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_texts(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """`whole(count)`: a finished run of `count` processes that nothing happened to, and what it was trained on."""
    made = {}

    def make(count):
        if count not in made:
            folder = tmp_path_factory.mktemp(f"whole_{count}")
            (folder / "examples").mkdir()
            trouble = dict(examples=str(folder / "examples"))
            command = small_command(folder / "run", data, trouble, flags=SPLIT[: count - 1], **EVERY)
            codes, texts = run(command, count, output=folder)
            assert codes == [0] * count, texts
            made[count] = folder / "run", examples(folder / "examples")
        return made[count]

    return make


def to_the_end(command, count, output, *, expected=0, **options):
    codes, texts = run(command, count, output=output, **options)
    assert all(code == expected for code in codes), (codes, texts)
    return texts


def same_run(found, expected):
    assert losses(found) == losses(expected)
    assert fingerprints(found, 8) == fingerprints(expected, 8)


@pytest.mark.parametrize("count", [1, 2])
def test_a_run_stopped_three_times_equals_one_never_stopped(data, whole, tmp_path, count):
    expected, batches = whole(count)
    (tmp_path / "examples").mkdir()
    trouble = dict(examples=str(tmp_path / "examples"), stops=[1, 3, 5])
    command = small_command(tmp_path / "run", data, trouble, flags=SPLIT[: count - 1], **EVERY)
    for _ in trouble["stops"]:
        texts = to_the_end(command, count, tmp_path, expected=75)
        assert "is saved; the same command goes on from there" in texts[0]
    to_the_end(command, count, tmp_path)
    same_run(tmp_path / "run", expected)
    assert examples(tmp_path / "examples") == batches
    assert list(batches) == list(range(8))


def first_state(text):
    """(fingerprints, checksum) of the state a run began with."""
    return json.loads(next(line for line in text.splitlines() if line.startswith("state ")).removeprefix("state "))


def test_a_run_goes_on_with_other_devices_meshes_and_processes(data, whole, tmp_path):
    batches = whole(1)[1]
    (tmp_path / "examples").mkdir()
    places = [  # processes, devices of each, mesh, stop at
        (1, 8, ["--config.mesh.fsdp=8"], 1),
        (1, 4, ["--config.mesh.fsdp=2", "--config.mesh.tensor=2", "--config.model.vocab_size=258"], 2),
        (1, 1, [], 3),
        (2, 1, SPLIT, 4),
        (1, 1, [], 0),
    ]
    workdir, before, checksums = tmp_path / "run", None, []
    for number, (count, devices, mesh, stop) in enumerate(places):
        flags = ["--config.model.vocab_size=258", *mesh]
        trouble = dict(examples=str(tmp_path / "examples"), stops=[stop])
        command = small_command(workdir, data, trouble, flags=flags, **EVERY)
        output = tmp_path / f"output_{number}"
        texts = to_the_end(command, count, output, expected=75 if stop else 0, devices=devices)
        if before is not None:
            assert first_state(texts[0])[0] == fingerprints(workdir, before)
        before = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
        checksums.append(first_state(texts[0])[1])
    assert len(set(checksums)) == len(places)  # each began with another state
    assert examples(tmp_path / "examples") == batches
    one = small_command(tmp_path / "one", data, flags=["--config.model.vocab_size=258"], **EVERY)
    to_the_end(one, 1, tmp_path)
    for row, other in zip(metrics(workdir), metrics(tmp_path / "one"), strict=True):
        assert (row["step"], row["tokens"]) == (other["step"], other["tokens"])
        np.testing.assert_allclose(row["loss"], other["loss"], rtol=1e-5)


@pytest.mark.parametrize("count", [1, 2])
def test_ten_kills_change_nothing_and_every_second_is_accounted_for(data, tmp_path, count):
    """Of several processes one, chosen at random, which ends the others."""
    sizes = dict(flags=SPLIT[: count - 1], steps=100, eval_every=50, checkpoint_every=2)
    to_the_end(small_command(tmp_path / "whole", data, **sizes), count, tmp_path)
    rng, kills, wall, codes = random.Random(5), 0, 0.0, [None]
    account = tmp_path / "run" / "wall_time.json"
    command = small_command(tmp_path / "run", data, dict(pauses={"step": 0.15}), **sizes)
    while codes != [0] * count:
        written = account.stat().st_mtime_ns if account.exists() else 0
        with Processes(command, count, output=tmp_path / f"attempt_{kills}") as processes:
            victim = rng.choice(processes.processes)
            if killed := kills < 10:
                processes.wait_for(lambda: account.exists() and account.stat().st_mtime_ns > written)
                time.sleep(rng.uniform(0, 4))
                victim.kill()
                kills += 1
            processes.processes[0].wait()  # which keeps the account
            wall += time.monotonic() - processes.began
            codes = processes.wait()
            assert killed or codes == [0] * count, processes.texts()
            assert victim.returncode == (-signal.SIGKILL if killed else 0), processes.texts()
            assert 0 not in codes if killed else True, (codes, processes.texts())
    assert kills == 10
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert fingerprints(tmp_path / "run", 100) == fingerprints(tmp_path / "whole", 100)
    spent = {name: x for name, x in metrics(tmp_path / "run")[-1].items() if name.endswith("_seconds")}
    print(f"{sum(spent.values()):.1f} of {wall:.1f} s: {spent}")
    assert spent["lost_seconds"] > 0
    assert sum(spent.values()) == pytest.approx(wall, rel=0.05)


@pytest.mark.parametrize("milliseconds", [0, 50, 150, 300, 600])
def test_a_kill_while_saving_leaves_the_step_before(data, whole, tmp_path, milliseconds):
    workdir = tmp_path / "run"
    trouble = dict(killed_saving=[4, milliseconds], pauses={"step": 0.3})
    to_the_end(small_command(workdir, data, trouble, **EVERY), 1, tmp_path, expected=-signal.SIGKILL)
    assert fingerprints(workdir, 2) == fingerprints(whole(1)[0], 2)
    left = {path.name for path in (workdir / "checkpoints").iterdir()}
    print("left:", sorted(left))
    (workdir / "checkpoints" / "4.orbax-checkpoint-tmp" / "state").mkdir(parents=True, exist_ok=True)
    texts = to_the_end(small_command(workdir, data, {}, **EVERY), 1, tmp_path)
    assert "WARNING" not in texts[0].replace("WARNING:absl", "")
    same_run(workdir, whole(1)[0])
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["2", "4", "6", "8"]
    assert not list(workdir.rglob("*tmp*"))


def unfinished(whole, tmp_path, count):
    """A copy of a whole run as if it had been killed after step 4; and a path of its newest checkpoint."""
    workdir = shutil.copytree(whole(count)[0], tmp_path / "run")
    for step in ("6", "8"):
        shutil.rmtree(workdir / "checkpoints" / step)
    return workdir, workdir / "checkpoints" / "4"


@pytest.mark.parametrize("what", ["one process", "a shard of process 1", "a shard of process 1, no manifest"])
def test_a_corrupt_checkpoint_is_put_aside_and_the_one_before_it_taken(data, whole, tmp_path, what):
    count = 1 if what == "one process" else 2
    workdir, newest = unfinished(whole, tmp_path, count)
    if what.endswith("no manifest"):
        (newest / "manifest.json").unlink()
        for file in (newest / "state" / "ocdbt.process_1" / "d").iterdir():
            os.truncate(file, file.stat().st_size // 2)
    else:
        flip_array_data(newest, "*" if count == 1 else "*process_1")
    command = small_command(workdir, data, {}, flags=SPLIT[: count - 1], **EVERY)
    texts = to_the_end(command, count, tmp_path)
    told = [line for text in texts for line in text.splitlines() if line.startswith("WARNING: ")]
    assert len(told) == 1
    assert f"checkpoint {newest}: " in told[0]
    assert "falling back to an older one" in told[0]
    assert first_state(texts[0])[0] == first_state(texts[-1])[0] == fingerprints(workdir, 2)
    assert (workdir / "quarantine" / "4-1" / "state").is_dir()
    assert (workdir / "quarantine" / "4-1.txt").read_text()
    same_run(workdir, whole(count)[0])


def test_a_run_with_corrupt_checkpoints_alone_is_refused_and_not_trained_anew(data, whole, tmp_path):
    workdir, newest = unfinished(whole, tmp_path, 1)
    for path in newest.parent.iterdir():
        flip_array_data(path)
    before = (workdir / "metrics.jsonl").read_bytes()
    for _ in range(2):  # whoever starts it again, such as a cluster's queue, finds the same
        (text,) = to_the_end(small_command(workdir, data, **EVERY), 1, tmp_path, expected=1)
        assert "no checkpoint is left that is sound; quarantine/ beside them has 2-1, 4-1" in text
    assert (workdir / "metrics.jsonl").read_bytes() == before


def told_of_failed_saves(text):
    return [line for line in text.splitlines() if line.startswith("WARNING: saving step")]


@pytest.mark.parametrize("count", [1, 2])
def test_saves_that_fail_are_told_tried_again_and_end_the_run(data, whole, tmp_path, count):
    workdir = tmp_path / "run"
    flags = [*SPLIT[: count - 1], "--config.model.mlp_width=16384"]  # what is printed is a file too, but smaller
    cache = ["--compilation_cache=off"]  # whose files the limit would cut off, for the next test that reads them
    trouble = dict(full_from=4, pauses={"step": 0.3}, seconds_to_write=10)
    command = small_command(workdir, data, trouble, flags=flags + cache, **(EVERY | dict(steps=12, eval_every=12)))
    with Processes(command, count, output=tmp_path) as processes:
        codes, texts = processes.wait(300), processes.texts()
        assert codes == [1] * count, texts
    assert "saving step 4 " in told_of_failed_saves(texts[0])[0]
    assert "MiB are free there" in texts[0]
    assert len(told_of_failed_saves(texts[0])) == 2
    assert "failed 3 times in a row, last good checkpoint: 2" in texts[0]
    assert (
        metrics(workdir)[-1]["step"] <= 10
    )  # where steps take less time than writing: saved at 4, 6 and 8, told by 10
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["2"]
    command = small_command(workdir, data, flags=flags, **(EVERY | dict(steps=12, eval_every=12)))
    to_the_end(command, count, tmp_path)


def test_a_full_disk_ends_the_run_with_the_last_good_checkpoint(data, whole, tmp_path):
    workdir, newest = unfinished(whole, tmp_path, 1)
    kept = shutil.move(newest, tmp_path / "4")
    size = sum(-(-path.stat().st_size // 4096) for path in kept.rglob("*") if path.is_file()) * 4096 + 20_000
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(newest.parent)]
    if subprocess.run(mount, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here: it needs root")
    try:
        shutil.copytree(kept, newest)
        (text,) = to_the_end(small_command(workdir, data, **EVERY), 1, tmp_path, expected=1)
        assert "No space left" in text or "ENOSPC" in text or "RESOURCE_EXHAUSTED" in text, text
        assert "failed 3 times in a row, last good checkpoint: 4" in text
        assert fingerprints(workdir, 4) == fingerprints(whole(1)[0], 4)
        assert [path.name for path in newest.parent.iterdir()] == ["4"]
    finally:
        subprocess.run(["umount", str(newest.parent)], check=True)


@pytest.mark.parametrize("spoiled", [1, 9])
def test_exit_code_0_needs_a_final_checkpoint_that_was_read_back(data, whole, tmp_path, spoiled):
    command = small_command(tmp_path / "run", data, dict(spoils=spoiled), **EVERY)
    (text,) = to_the_end(command, 1, tmp_path, expected=0 if spoiled == 1 else 1)
    assert "what was saved is not what is read back" in text
    if spoiled == 1:
        same_run(tmp_path / "run", whole(1)[0])
    else:
        assert ("val", 8) not in losses(tmp_path / "run")
        assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["2", "4", "6"]


@pytest.mark.parametrize("count", [1, 2])
def test_steps_that_are_not_finite_change_nothing(data, tmp_path, count):
    workdir = tmp_path / "run"
    bad = dict(bad={"0": "nan", "3": "inf", "4": "gradient"})  # of process 1's rows alone
    sizes = dict(checkpoint_every=1, keep_checkpoints=9)
    texts = to_the_end(small_command(workdir, data, bad, flags=SPLIT[: count - 1], **sizes), count, tmp_path)
    states = [first_state(texts[0])[0]] + [fingerprints(workdir, step) for step in range(1, 9)]
    for step in range(1, 9):
        changed = [name for name, value in states[step].items() if value != states[step - 1][name]]
        assert (changed == ["step"]) == (step in (1, 4, 5)), (step, changed)
    rows = [row for row in metrics(workdir) if row["split"] == "train"]
    assert [row["skipped_steps"] for row in rows][-1] == 3
    assert [row["loss"] is None for row in rows] == [True, False, False, True, False, False, False, False]


@pytest.mark.parametrize("count", [1, 2])
def test_too_many_such_steps_end_the_run_and_name_the_last_good_checkpoint(data, tmp_path, count):
    bad = dict(bad={str(position): "nan" for position in range(2, 100)})
    sizes = dict(steps=12, eval_every=12, checkpoint_every=2, max_skipped_steps=3)
    command = small_command(tmp_path / "run", data, bad, flags=SPLIT[: count - 1], **sizes)
    texts = to_the_end(command, count, tmp_path, expected=1)
    assert "3 steps in a row, 3 to 5: none of them was applied; last good checkpoint: step 4" in texts[0]
    assert max(step for _, step in losses_or_none(tmp_path / "run")) <= 7


def losses_or_none(workdir):
    return [(row["loss"], row["step"]) for row in metrics(workdir)]


@pytest.mark.parametrize("count", [1, 2])
def test_a_bad_window_of_data_is_left_out_and_a_restart_leaves_out_the_same(data, tmp_path, count):
    bad = {str(position): "high" for position in (18, 19, 20)}
    sizes = dict(steps=30, eval_every=30, checkpoint_every=8, keep_checkpoints=9, spike_threshold=1.0)
    sizes["flags"] = SPLIT[: count - 1]
    for name, stops in (("whole", []), ("stopped", [12, 20, 24])):
        command = small_command(tmp_path / name, data, dict(bad=bad, stops=stops), **sizes)
        for expected in [75] * len(stops) + [0]:
            to_the_end(command, count, tmp_path / f"{name}_output", expected=expected)
    rollbacks = json.loads((tmp_path / "whole" / "rollbacks.json").read_text())
    assert [(entry["restored"], entry["spike"]) for entry in rollbacks] == [(16, 19), (16, 17), (16, 17)]
    assert sum(entry["skipped"] for entry in rollbacks) == 5  # data 16 to 20; the three bad ones are the last of them
    assert max(loss for loss, _ in losses_or_none(tmp_path / "whole")) < 7
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert fingerprints(tmp_path / "stopped", 30) == fingerprints(tmp_path / "whole", 30)
    command = small_command(tmp_path / "bounded", data, dict(bad=bad), max_rollbacks=2, **sizes)
    text = to_the_end(command, count, tmp_path, expected=1)[0]
    assert "2 rollbacks were made, and config.training.max_rollbacks = 2" in text
