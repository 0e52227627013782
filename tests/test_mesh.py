"""Meshes: same losses on every mesh as on one device, the collectives that were meant and no others, named refusals."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from iha_jax.config import ConfigError, MeshConfig
from iha_jax.model import abstract_parameters
from iha_jax.parallel.mesh import axis_sizes
from iha_jax.parallel.rules import WEIGHTS, check_divisible, weight_spec
from tests.tiny import tiny

ONE = dict(data=1, fsdp=1, tensor=1)
MESHES = {
    "one": ONE,
    "data 8": ONE | dict(data=8),
    "fsdp 8": ONE | dict(fsdp=8),
    "fsdp 4 x tensor 2": ONE | dict(fsdp=4, tensor=2),
    "tensor 4 x data 2": ONE | dict(tensor=4, data=2),
}


@pytest.fixture(scope="module")
def found():
    meshes = {"mha": MESHES, "iha": MESHES}
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.mesh_losses", json.dumps(meshes)],
        cwd=Path(__file__).parent.parent,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("arm", ["mha", "iha"])
@pytest.mark.parametrize("mesh", [name for name in MESHES if name != "one"])
def test_every_mesh_gives_the_losses_of_one_device(found, arm, mesh):
    expected = found[f"{arm} one"]["losses"]
    assert expected[-1] < expected[0]
    np.testing.assert_allclose(found[f"{arm} {mesh}"]["losses"], expected, rtol=1e-5)
