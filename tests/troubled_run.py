"""Program of the tests of faults: train.py, which meets the trouble its first argument describes, a JSON object."""

import ctypes
import json
import os
import resource
import signal
import sys
import threading
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from iha_jax.training import checkpoint, loop, step
from iha_jax.training.command import main
from iha_jax.training.fingerprint import inspect

REAL_START = loop.starting_state
KINDS = {  # of bad batches, whose first token says which: factors of the objective and of the loss
    -1: ("nan", jnp.nan, jnp.nan),
    -2: ("inf", jnp.inf, jnp.inf),
    -3: ("gradient", jnp.nan, 1.0),
    -4: ("high", 3.0, 3.0),
}


@dataclass
class Trouble:
    process: int = 1  # the one that refuses, raises, hangs, or has a full disk; a process alone is always the one
    refuses: bool = False
    raises: int = 0  # the step at which it does
    stops: list = field(default_factory=list)  # steps at which it gets a SIGTERM
    hangs: list = field(default_factory=lambda: ["", 0])  # phase, the how-manieth time
    pauses: dict = field(default_factory=dict)  # seconds by phase; "PHASE begins" is printed
    bad: dict = field(default_factory=dict)  # kind of a batch by position in the data
    examples: str = ""  # folder for a checksum of every row that is trained on
    full_from: int = 0  # the step from which no file may grow beyond 1,000,000 bytes
    seconds_to_write: int = 0  # how long several processes wait for one that does not write; 0: as long as ever
    spoils: int = 0  # how many final checkpoints lose a bit before they are read back
    killed_saving: list = field(default_factory=lambda: [0, 0])  # step, milliseconds after its save began

    def is_here(self):
        return jax.process_count() == 1 or jax.process_index() == self.process


def phase(trouble, name, function):
    """`function`, before which the process may pause or hang."""
    count = 0

    def in_trouble(*arguments, **options):
        nonlocal count
        count += 1
        if name in trouble.pauses:
            print(f"{name} begins", flush=True)
            time.sleep(trouble.pauses[name])
        if trouble.hangs == [name, count] and trouble.is_here():
            print(f"{name} hangs", flush=True)
            hang_here()
        return function(*arguments, **options)

    return in_trouble


def hang_here():
    """In C, as a compiler does: without the interpreter's lock, and no signal gets it out."""
    mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)


def poison(real):
    """A loss that a bad batch makes NaN, infinite or high; or whose gradient alone is NaN."""

    def summed_loss(model, batch, **options):
        first, objective_factor, nll_factor = batch["inputs"].min(), 1.0, 1.0
        for token, (_, objective, nll) in KINDS.items():
            objective_factor = jnp.where(first == token, objective, objective_factor)
            nll_factor = jnp.where(first == token, nll, nll_factor)
        objective, nll = real(model, batch | {"inputs": jnp.maximum(batch["inputs"], 0)}, **options)
        return objective * objective_factor, nll * nll_factor

    return summed_loss


def train_batches(trouble, real):
    def batches(*arguments, start_step, local_rows=None, **options):
        found = real(*arguments, start_step=start_step, local_rows=local_rows, **options)
        for position, batch in enumerate(found, start_step):
            if trouble.examples:
                sums = [zlib.crc32(tokens.tobytes()) for tokens in batch["inputs"]]
                rows = range(len(sums)) if local_rows is None else local_rows
                with open(Path(trouble.examples) / f"{os.getpid()}.jsonl", "a") as file:
                    file.write(json.dumps([position, dict(zip(map(int, rows), sums, strict=True))]) + "\n")
            if (kind := trouble.bad.get(str(position))) and trouble.is_here():
                batch["inputs"] = batch["inputs"].copy()
                batch["inputs"][0, 0] = next(token for token, (name, *_) in KINDS.items() if name == kind)
            yield batch

    return batches


class Checkpointer(checkpoint.Checkpointer):
    trouble: Trouble

    def save(self, step, *arguments, **options):
        at, milliseconds = self.trouble.killed_saving
        if step == at:
            threading.Timer(milliseconds / 1000, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        super().save(step, *arguments, **options)

    def verify(self, like, step):
        if self.trouble.spoils and jax.process_index() == 0:
            self.trouble.spoils -= 1
            flip_array_data(self.path(step))
        super().verify(like, step)


def flip_array_data(path, part="*"):
    """Flips a bit in the middle of every file that holds arrays; `part`: of one process, such as "*process_1"."""
    for file in Path(path, "state").glob(f"{part}/d/*" if part != "*" else "**/d/*"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 4
        file.write_bytes(bytes(content))


class Meter(loop.Meter):
    trouble: Trouble

    def training_row(self, step, metrics, skipped):
        trouble = self.trouble
        if trouble.is_here() and step == trouble.raises:
            raise RuntimeError("a cable was pulled")
        if trouble.is_here() and step in trouble.stops:
            os.kill(os.getpid(), signal.SIGTERM)
        if trouble.is_here() and step == trouble.full_from:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
        return super().training_row(step, metrics, skipped)


def starting_state(*arguments):
    """Prints the fingerprints of the first state, and a checksum that knows nothing of them."""
    state, carried = REAL_START(*arguments)
    named = checkpoint._named(state)
    checksum = 0
    for name in sorted(named):
        if named[name].is_fully_addressable:
            checksum = zlib.crc32(np.asarray(named[name]).tobytes(), checksum)
    print(f"state {json.dumps([inspect(named)[0], checksum])}", flush=True)
    return state, carried


def check_run(trouble, real):
    def check(*arguments):
        if trouble.is_here():
            raise ValueError("the disk of this host is not there")
        return real(*arguments)

    return check


def meet(trouble):
    """Puts the trouble into this process's training."""
    Checkpointer.trouble = Meter.trouble = trouble
    loop.Checkpointer, loop.Meter = Checkpointer, Meter
    loop.train_batches = train_batches(trouble, loop.train_batches)
    if trouble.seconds_to_write:
        checkpoint.SECONDS_TO_WRITE = trouble.seconds_to_write
    if trouble.bad:
        step.summed_loss = poison(step.summed_loss)
    if trouble.refuses:
        loop.check_run = check_run(trouble, loop.check_run)
    loop.starting_state = phase(trouble, "restore", starting_state)
    loop.lower_train_step = phase(trouble, "compile", loop.lower_train_step)
    loop.place_batch = phase(trouble, "step", loop.place_batch)
    loop.Validation.__call__ = phase(trouble, "evaluate", loop.Validation.__call__)
    loop.Saves.finish = phase(trouble, "finish", loop.Saves.finish)
    checkpoint.Checkpointer.save = phase(trouble, "save", checkpoint.Checkpointer.save)


if __name__ == "__main__":
    meet(Trouble(**json.loads(sys.argv.pop(1))))
    main()
