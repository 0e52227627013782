"""The device mesh. One axis so far: `data`, over all devices, with the state replicated."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from iha_jax.config import Config, ConfigError


def data_mesh() -> Mesh:
    """All devices of all processes along one axis, `data`."""
    return Mesh(np.asarray(jax.devices()), ("data",))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch spread over the `data` axis."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same values on every device."""
    return NamedSharding(mesh, PartitionSpec())


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch, joined with the other processes' into arrays sharded over `data`."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def check_batch_sizes(config: Config, devices: int) -> None:
    """Raises ConfigError unless every micro-batch and evaluation batch divides evenly over the devices."""
    training, problems = config.training, []
    micro = training.batch_size // training.accumulation
    if micro % devices:
        problems.append(
            f"config.training.batch_size = {training.batch_size}: its micro-batches of {micro} rows do not divide over "
            f"{devices} devices; choose a multiple of {devices * training.accumulation}"
        )
    if training.eval_batch_size % devices:
        problems.append(
            f"config.training.eval_batch_size = {training.eval_batch_size}: does not divide over {devices} devices; "
            f"choose a multiple of {devices}"
        )
    if problems:
        raise ConfigError(problems)
