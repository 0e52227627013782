"""Several real processes on this machine, joined through a free port of the loopback interface."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
SIZES = dict(context_length=23, width=24, num_heads=6, head_width=4, mlp_width=32, num_layers=2, vocab_size=257)
TRAINING = dict(steps=6, batch_size=8, log_every=1, eval_every=3, eval_rows=13, eval_batch_size=8, checkpoint_every=3)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def prepare_texts(folder):
    """A small prepared data set below `folder`."""
    rng = np.random.default_rng(0)
    (folder / "text").mkdir()
    for i in range(12):
        words = rng.choice(["alpha", "beta", "gamma", "delta", "head", "mix"], size=60 + i)
        (folder / "text" / f"document_{i:02d}.txt").write_text(" ".join(words))
    command = ["-m", "iha_jax.data.prepare", f"--input={folder / 'text'}", f"--output={folder / 'prepared'}"]
    subprocess.run([sys.executable, *command], check=True, cwd=ROOT, stderr=subprocess.DEVNULL)
    return folder / "prepared"


def train_command(workdir, data, program="train.py", **training):
    """A tiny run on `data`, of `prepare_texts`; `training` sets fields of config.training."""
    flags = [f"--config.model.{name}={value}" for name, value in SIZES.items()]
    flags += [f"--config.training.{name}={value}" for name, value in (TRAINING | training).items()]
    flags += ["--config.model.layer_pattern=iha_local,mha", "--config.optimizer.warmup_steps=2"]
    flags += [f"--config.data.sources={data}", f"--config.data.cache_dir={data.parent / 'cache'}"]
    return [program, "--config=configs/base.py", f"--workdir={workdir}", *flags]


def small_command(workdir, data, trouble=None, *, flags=(), **training):
    """The smallest run there is, one layer of MHA; `trouble`: what it meets, fields of `tests.troubled_run.Trouble`."""
    program, *rest = train_command(workdir, data, **(dict(steps=8, eval_every=8, eval_rows=8) | training))
    rest += ["--config.model.num_layers=1", "--config.model.layer_pattern=mha", *flags]
    return [program, *rest] if trouble is None else ["-m", "tests.troubled_run", json.dumps(trouble), *rest]


def metrics(workdir):
    """The whole rows of a run's metrics so far."""
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def losses(workdir):
    """Every loss of a run, to the last bit, by split and step; none may come twice."""
    rows = [(row["split"], row["step"], row["loss"].hex()) for row in metrics(workdir)]
    found = {(split, step): loss for split, step, loss in rows}
    assert len(found) == len(rows)
    return found


def fingerprints(workdir, step):
    """Of every array of a checkpoint, as it was noted when it was saved."""
    return json.loads((workdir / "checkpoints" / str(step) / "metadata" / "metadata").read_text())["fingerprints"]


def examples(folder):
    """Checksums of the rows of every batch, by position in the data; whoever read a row has found the same."""
    found = {}
    for file in folder.iterdir():
        for line in file.read_text().splitlines():
            position, rows = json.loads(line)
            for row, checksum in rows.items():
                assert found.setdefault(position, {}).setdefault(int(row), checksum) == checksum
    return {position: [rows[i] for i in range(len(rows))] for position, rows in sorted(found.items())}


def with_devices(count):
    """The environment of a process with so many fake CPU devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


def printed_by(program, cases, *, devices):
    """The JSON that `python -m program CASES` prints, run with so many fake devices."""
    done = subprocess.run(
        [sys.executable, "-m", program, json.dumps(cases)],
        cwd=ROOT,
        env=with_devices(devices),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


class Processes:
    """`count` processes of one command, each with `devices` fake devices; killed by id at the end of a `with` block."""

    def __init__(self, command, count, *, devices=1, extra=lambda index: [], output):
        self.began = time.monotonic()
        joined = [] if count == 1 else [f"--coordinator_address=127.0.0.1:{free_port()}", f"--process_count={count}"]
        # Every program from the cache that all tests share: a start then takes seconds.
        cached = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        environment = with_devices(devices) | cached
        output.mkdir(parents=True, exist_ok=True)
        self._outputs = [output / f"{index}.txt" for index in range(count)]
        self.processes = []
        for index in range(count):
            own = [f"--process_index={index}", "--initialization_timeout=180"] if joined else []
            with open(self._outputs[index], "w") as file:
                arguments = [sys.executable, *command, *joined, *own, *extra(index)]
                self.processes.append(
                    subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
                )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()

    def wait(self, seconds=600):
        """The exit codes, in order. Fails when a process is still there after `seconds`."""
        deadline = time.monotonic() + seconds
        codes = [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]
        self.seconds = time.monotonic() - self.began
        return codes

    def wait_for(self, found, seconds=600):
        """Returns when `found()` is true; fails when a process ends first, or it takes longer."""
        deadline = time.monotonic() + seconds
        while not found():
            assert time.monotonic() < deadline, self.texts()
            assert all(process.poll() is None for process in self.processes), self.texts()
            time.sleep(0.02)

    def texts(self):
        return [path.read_text() for path in self._outputs]


def run(command, count, **options):
    """Runs to the end; returns exit codes and what each process printed."""
    with Processes(command, count, **options) as processes:
        return processes.wait(), processes.texts()
