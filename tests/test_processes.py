"""Several processes: real ones on this machine. Same losses as one, shared checkpoints, and nobody left hanging."""

import argparse
import json
import shutil
import signal
import socket
import sys

import numpy as np
import pytest

from iha_jax.config import ConfigError
from iha_jax.parallel import start
from iha_jax.parallel.mesh import axis_sizes
from tests.several import Processes, free_port, metrics, prepare_texts, run, train_command
from tests.tiny import tiny


def flags(*given):
    parser = argparse.ArgumentParser()
    start.add_process_flags(parser)
    return parser.parse_args(given)


ADDRESS, COUNT, INDEX = "--coordinator_address=h:1", "--process_count=3", "--process_index=2"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([COUNT], "--process_count=3: --coordinator_address and --process_index missing"),
        ([ADDRESS, INDEX], "--process_count missing"),
        ([ADDRESS, COUNT, "--process_index=3"], "--process_index=3: expected 0 to 2"),
        ([ADDRESS, "--process_count=0", "--process_index=0"], "--process_count=0: expected at least 1"),
        (["--coordinator_address=host", COUNT, INDEX], "--coordinator_address=host: expected HOST:PORT"),
        (["--coordinator_address=host:99999", COUNT, INDEX], "expected HOST:PORT"),
        (["--single_process", ADDRESS, COUNT, INDEX], "contradict each other"),
        (["--initialization_timeout=0"], "--initialization_timeout=0: expected at least 1 second"),
    ],
)
def test_flags_that_say_too_little_or_too_much_are_refused(given, message):
    with pytest.raises(ValueError) as error:
        start.start_processes(flags(*given))
    assert message in str(error.value)


def test_flags_name_the_place():
    assert start.place_from_flags(flags(ADDRESS, COUNT, INDEX)) == start.Place("h:1", 3, 2)
    assert start.place_from_flags(flags()) is None


SLURM = dict(SLURM_JOB_ID="4097", SLURM_STEP_NODELIST="n[7-8]", SLURM_PROCID="3", SLURM_LOCALID="1")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (SLURM | dict(SLURM_NTASKS="4", SLURM_STEP_NUM_NODES="2"), start.Place("n7:61441", 4, 3, [1])),
        # One process a node: all of the node's GPUs are its own.
        (SLURM | dict(SLURM_NTASKS="4", SLURM_STEP_NUM_NODES="4", SLURM_LOCALID="0"), start.Place("n7:61441", 4, 3)),
        (SLURM | dict(SLURM_NTASKS="1", SLURM_STEP_NUM_NODES="1"), None),
    ],
)
def test_a_cluster_is_detected(monkeypatch, environment, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert start.detected_place(timeout=1) == expected


def test_a_cluster_that_says_too_little_is_refused(monkeypatch):
    for name, value in (SLURM | dict(SLURM_NTASKS="4", SLURM_PROCID="x")).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"looks like SlurmCluster.*--single_process"):
        start.detected_place(timeout=1)


def test_a_mesh_of_another_size_names_the_processes():
    with pytest.raises(ConfigError, match=r"data 8 \* fsdp 2.*must be the 8 devices of 4 processes"):
        axis_sizes(tiny(mesh__data=8, mesh__fsdp=2).mesh, 8, processes=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_texts(tmp_path_factory.mktemp("data"))


def test_an_unreachable_coordinator_is_named(data, tmp_path):
    address = f"127.0.0.1:{free_port()}"
    place = [f"--coordinator_address={address}", "--process_count=2", "--process_index=1", "--initialization_timeout=2"]
    (code,), (text,) = run([*train_command(tmp_path / "run", data), *place], 1, output=tmp_path)
    assert code == 1
    assert f"process 1 of 2 gave up after 2 s: coordinator {address}: nothing listens there" in text


def test_a_taken_port_is_named():
    with socket.create_server(("", 0)) as taken:
        place = start.Place(f"localhost:{taken.getsockname()[1]}", 2, 0)
        with pytest.raises(ValueError, match=f"port {taken.getsockname()[1]} of this host cannot be used"):
            start.connect(place, timeout=9)


def test_a_process_with_another_config_ends_all_of_them(data, tmp_path):
    def other(index):
        return ["--config.model.mlp_width=48"] * (index == 1)

    with Processes(train_command(tmp_path / "run", data), 2, extra=other, output=tmp_path) as processes:
        assert processes.wait() == [2, 2]
        for text in processes.texts():
            assert "config.model.mlp_width: 32 in process 0" in text
            assert "48 in process 1" in text
    assert not (tmp_path / "run").exists()


def test_each_process_places_its_own_rows(tmp_path):
    port = str(free_port())
    command = ["-m", "tests.place_rows"]
    with Processes(command, 1, devices=2, extra=lambda _: ["0", port], output=tmp_path / "0") as first:
        with Processes(command, 1, devices=2, extra=lambda _: ["1", port], output=tmp_path / "1") as second:
            assert first.wait() + second.wait() == [0, 0], first.texts() + second.texts()
        assert "placed" in first.texts()[0]


@pytest.mark.slow
def test_a_process_that_refuses_ends_all_of_them(data, tmp_path):
    command = ["-m", "tests.troubled_run", '{"refuses": true}', *train_command(tmp_path / "run", data)[1:]]
    codes, texts = run(command, 2, output=tmp_path)
    assert codes == [2, 2]
    for text in texts:
        assert "refused: process 1 (" in text
        assert "the disk of this host is not there" in text
    assert not (tmp_path / "run").exists()


def check_same_run(workdir, expected):
    """Same rows, losses to 1e-5, and exactly as many tokens."""
    found = metrics(workdir)
    assert [(row["split"], row["step"], row["tokens"]) for row in found] == [
        (row["split"], row["step"], row["tokens"]) for row in expected
    ]
    for name in ("loss", "bits_per_byte", "grad_norm"):
        some = [row[name] for row in found if name in row]
        assert some
        np.testing.assert_allclose(some, [row[name] for row in expected if name in row], rtol=1e-5)


@pytest.mark.slow
def test_any_number_of_processes_trains_the_same_and_goes_on_with_any_other(data, tmp_path):
    def train(workdir, count, **options):
        codes, texts = run(train_command(workdir, data), count, output=tmp_path / f"{workdir.name}_{count}", **options)
        assert codes == [0] * count, texts
        return texts

    train(tmp_path / "one", 1)
    expected = metrics(tmp_path / "one")
    assert [row["step"] for row in expected if row["split"] == "val"] == [0, 3, 6]
    texts = train(tmp_path / "two", 2, devices=2)
    check_same_run(tmp_path / "two", expected)
    assert "process 1" in texts[0]
    assert "step 6/6" in texts[0]
    assert "step" not in texts[1]  # process 0 speaks for all
    train(tmp_path / "four", 4)
    check_same_run(tmp_path / "four", expected)

    shutil.rmtree(tmp_path / "two" / "checkpoints" / "6")
    for count in (1, 4):
        shutil.copytree(tmp_path / "two", tmp_path / f"onto_{count}")
        train(tmp_path / f"onto_{count}", count)
        check_same_run(tmp_path / f"onto_{count}", expected)

    evaluation = ["eval.py", f"--workdir={tmp_path / 'four'}", f"--out={tmp_path / 'out.json'}", "--new_tokens=3"]
    codes, texts = run(evaluation, 2, output=tmp_path / "eval")
    assert codes == [0, 0], texts
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["step"] == 6
    np.testing.assert_allclose(found["tasks"]["loss"]["loss"], expected[-1]["loss"], rtol=1e-5)
    assert "95 % interval" in texts[0]
    assert "95 % interval" not in texts[1]


@pytest.mark.slow
def test_a_signal_to_one_process_saves_one_step_in_all(data, tmp_path):
    workdir = tmp_path / "run"
    long = dict(steps=600, eval_every=600, checkpoint_every=600)

    def stop(number, which, after):
        output = tmp_path / f"stop_{which}"
        with Processes(train_command(workdir, data, **long), 2, output=output) as processes:
            processes.wait_for(lambda: len(metrics(workdir)) > after)
            processes.processes[which].send_signal(number)
            assert processes.wait() == [75, 75], processes.texts()
            saved = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
            assert metrics(workdir)[-1]["step"] == saved < 600
            assert f"preempted: step {saved} is saved;" in processes.texts()[0]
        return saved

    first = stop(signal.SIGTERM, 1, after=5)
    second = stop(signal.SIGINT, 0, after=first + 5)  # the same command has gone on where it was stopped
    assert [row["step"] for row in metrics(workdir) if row["split"] == "train"] == list(range(1, second + 1))


@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["raises", "is killed"])
def test_no_process_outlives_another_by_long(data, tmp_path, trouble):
    long = dict(steps=100_000, eval_every=100_000, checkpoint_every=100_000)
    command = train_command(tmp_path / "run", data, **long)
    if trouble == "raises":
        command = ["-m", "tests.troubled_run", '{"raises": 4}', *command[1:]]
    with Processes(command, 2, output=tmp_path) as processes:
        survivor, troubled = processes.processes
        if trouble == "is killed":
            processes.wait_for(lambda: len(metrics(tmp_path / "run")) > 3)
            troubled.kill()
        assert troubled.wait(600) != 0
        assert survivor.wait(10) != 0
        if trouble == "raises":
            said = processes.texts()
            assert "RuntimeError: a cable was pulled" in said[1]
            assert "Traceback" in said[1]
            assert "process 1 (" in said[0]


if sys.platform == "darwin":  # its firewall asks before a process may listen
    pytestmark = pytest.mark.slow
