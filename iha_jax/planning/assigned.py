"""A compilation that ends once memory is assigned: collectives and buffers are final then, and machine code, which
takes most of the time, is not made. XLA has no option for that, so a process of its own compiles, and is ended when the
files that XLA writes on the way are there.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from iha_jax.config import Config, as_dict, resolve
from iha_jax.parallel.topology import Topology, environment, open_devices, parse_topology

MARK = "after_buffer_assignment.txt"
_CONFIG = "config.json"


def compile_until_assigned(config: Config, topology: Topology, folder: str) -> str:
    """Fills `folder` with what XLA writes up to the assignment of memory. Returns what the compiler said when it
    refused the step before that, else nothing."""
    (Path(folder) / _CONFIG).write_text(json.dumps(as_dict(config)))
    command = [sys.executable, "-m", "iha_jax.planning.assigned", folder, topology.name, str(topology.slices)]
    with (Path(folder) / "stderr").open("w+") as said:
        child = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=said, env=os.environ | environment(topology)
        )
        try:
            while child.poll() is None and not _is_whole(folder):
                time.sleep(0.5)
        finally:
            child.kill()
            child.wait()
        said.seek(0)
        return "" if _is_whole(folder) else said.read()


def _is_whole(folder: str) -> bool:
    """XLA writes one file after the other; the marker's size must not grow any more."""
    found = [path for path in Path(folder).rglob(f"*jit_step*{MARK}")]
    if not found:
        return False
    sizes = []
    for _ in range(2):
        sizes.append([path.stat().st_size for path in found])
        time.sleep(0.5)
    return sizes[0] == sizes[1] and all(sizes[0])


def _main(folder: str, name: str, slices: str) -> None:
    import jax

    from iha_jax.parallel.mesh import make_mesh
    from iha_jax.planning.compiled import target
    from iha_jax.training.optimizer import make_optimizer
    from iha_jax.training.state import abstract_state
    from iha_jax.training.step import lower_train_step

    config = resolve(json.loads((Path(folder) / _CONFIG).read_text()))
    topology = parse_topology(name, int(slices))
    mesh = make_mesh(config.mesh, open_devices(topology))
    optimizer = make_optimizer(config.optimizer, config.training.steps)
    with jax.set_mesh(mesh), target(topology):
        lowered = lower_train_step(config, optimizer, abstract_state(config, optimizer, mesh), mesh)
        lowered.compile(compiler_options={"xla_dump_to": folder})


if __name__ == "__main__":
    _main(*sys.argv[1:])
