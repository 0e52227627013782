"""Program of tests/test_processes.py: train.py in which process 1 meets trouble, "refuses" or "raises"."""

import sys

import jax

from iha_jax.training import loop
from iha_jax.training.command import main


def refuse(workdir, config):
    if jax.process_index() == 1:
        raise ValueError("the disk of this host is not there")


class Raising(loop.Meter):
    def training_row(self, step, metrics):
        if step == 4 and jax.process_index() == 1:
            raise RuntimeError("a cable was pulled")
        return super().training_row(step, metrics)


if __name__ == "__main__":
    trouble = sys.argv.pop(1)
    if trouble == "refuses":
        loop.check_run = refuse
    else:
        loop.Meter = Raising
    main()
