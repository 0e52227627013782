"""The device mesh: four axes, each fine at size 1, and where a batch lies on it.

| axis    | what is split over it                                      | traffic                                     |
|---------|------------------------------------------------------------|---------------------------------------------|
| data    | rows of the batch; weights are copied                      | gradients, once a step: the slow network    |
| fsdp    | rows of the batch, and weights along one dimension         | weights before use, gradients after         |
| context | tokens of a row; weights are copied                        | gradients; local attention: the window's    |
|         |                                                            | keys and values, from the neighbor; global: |
|         |                                                            | heads for tokens (`attention.py`)           |
| tensor  | heads, feed-forward width, vocabulary                      | activations, in every layer: fast links     |

Axes stand in this order, so that neighbors of `tensor` are neighbors on the machine, and slices or hosts joined by a
slow network differ in `data` only. Device i of `context` has tokens i N/C to (i + 1) N/C of a row.
"""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from iha_jax.config import Config, ConfigError, MeshConfig

AXES = ("data", "fsdp", "context", "tensor")
BATCH = ("data", "fsdp")  # the axes that split the rows of a batch


def axis_sizes(config: MeshConfig, devices: int, processes: int = 1) -> dict[str, int]:
    """The size of each axis, the one given as -1 inferred from the number of devices (of all processes).

    Raises:
      ConfigError: unless the sizes multiply to `devices`, naming the nearest sizes that would.
    """
    asked = {axis: getattr(config, axis) for axis in AXES}
    free = [axis for axis, size in asked.items() if size == -1]
    fixed = int(np.prod([size for size in asked.values() if size != -1]))
    if len(free) > 1:
        raise ConfigError([f"config.mesh: {' and '.join(free)} are both -1; only one can be inferred"])
    if free and devices % fixed == 0:
        return asked | {free[0]: devices // fixed}
    if not free and fixed == devices:
        return asked
    where = f" of {processes} processes" if processes > 1 else ""
    given = " * ".join(f"{axis} {size}" for axis, size in asked.items() if size != -1)
    if free:
        divisors = [n for n in range(1, devices + 1) if devices % n == 0]
        wish = f"their product {fixed} must divide the {devices} devices{where}: {', '.join(map(str, divisors))}"
    else:
        wish = f"their product {fixed} must be the {devices} devices{where}; set one of them to -1 to have it inferred"
    raise ConfigError([f"config.mesh: {given}: {wish}"])


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over all devices of all processes; across slices of a TPU, `data` is the axis between them.

    Raises:
      ConfigError: for sizes that do not fit the devices, or a `data` axis that the slices do not divide.
    """
    devices = jax.devices() if devices is None else devices
    sizes = axis_sizes(config, len(devices), len({device.process_index for device in devices}))
    # A GPU's slice is its machine: any axis may run between those.
    slices = len({getattr(d, "slice_index", 0) for d in devices if d.platform == "tpu"}) or 1
    shape = tuple(sizes.values())
    if slices == 1:
        return Mesh(mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True), AXES)
    if sizes["data"] % slices:
        raise ConfigError(
            [f"config.mesh.data = {sizes['data']}: the {slices} slices must divide it; choose a multiple of {slices}"]
        )
    inside, between = (sizes["data"] // slices, *shape[1:]), (slices, *[1] * (len(AXES) - 1))
    return Mesh(mesh_utils.create_hybrid_device_mesh(inside, between, devices, allow_split_physical_axes=True), AXES)


def mesh_for_evaluation(config: MeshConfig) -> Mesh:
    """The run's own mesh where it fits the devices that are here, else all of them along `fsdp`."""
    try:
        return make_mesh(config)
    except ConfigError:
        return make_mesh(dataclasses.replace(config, data=1, fsdp=-1, context=1, tensor=1))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch [B, N] spread over `data` and `fsdp`, their tokens over `context`."""
    return NamedSharding(mesh, PartitionSpec(BATCH, "context"))


def batch_shards(mesh: Mesh) -> int:
    """How many ways the rows of a batch are split."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH]))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same values on every device."""
    return NamedSharding(mesh, PartitionSpec())


def local_rows(mesh: Mesh, batch_size: int, devices: Collection[Any] | None = None) -> list[int]:
    """Which rows of a batch these devices (None: this process's) hold at least a part of, ascending.

    Rows that several processes hold, as copies or some tokens each, are local to all of those.
    """
    over_rows = NamedSharding(mesh, PartitionSpec(*batch_sharding(mesh).spec[:1]))
    places = over_rows.devices_indices_map((batch_size,))
    held = [np.arange(batch_size)[places[d]] for d in (over_rows.addressable_devices if devices is None else devices)]
    return np.unique(np.concatenate(held)).tolist()


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh, batch_size: int) -> dict[str, jax.Array]:
    """The global arrays [batch_size, ...] of which `batch` has this process's `local_rows`, as `batch_sharding` says.

    Each device gets its slice of every dimension that is split; nothing is sent between processes.
    """
    sharding, rows = batch_sharding(mesh), local_rows(mesh, batch_size)

    def place(x: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size)
            first = int(np.searchsorted(rows, start))  # the rows of one device are consecutive, and so here
            return x[(slice(first, first + stop - start), *index[1:])]

        return jax.make_array_from_callback((batch_size, *x.shape[1:]), sharding, part)

    return {name: place(x) for name, x in batch.items()}


def check_batch_sizes(config: Config, mesh: Mesh) -> None:
    """Raises ConfigError unless micro-batches, evaluation batches and chunks of the loss divide over their axes."""
    training, shards, problems = config.training, batch_shards(mesh), []
    micro = training.batch_size // training.accumulation
    if micro % shards:
        problems.append(
            f"config.training.batch_size = {training.batch_size}: its micro-batches of {micro} rows do not divide over "
            f"the {shards} shards of data and fsdp; choose a multiple of {shards * training.accumulation}"
        )
    if training.eval_batch_size % shards:
        problems.append(
            f"config.training.eval_batch_size = {training.eval_batch_size}: does not divide over the {shards} shards "
            f"of data and fsdp; choose a multiple of {shards}"
        )
    chunk, context = training.loss_chunk, mesh.shape["context"]
    if chunk % context:
        N = config.model.context_length
        able = [n for n in range(context, N + 1, context) if N % n == 0]
        near = [n for n in able if n < chunk][-1:] + [n for n in able if n > chunk][:1]
        problems.append(
            f"config.training.loss_chunk = {chunk}: does not divide over config.mesh.context = {context}; choose "
            f"{' or '.join(map(str, near or [0]))}"
        )
    if problems:
        raise ConfigError(problems)
