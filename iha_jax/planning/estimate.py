"""Roofline of a training step: time to compute, to move memory, and to exchange data over each network.

Every time is a lower bound but for the efficiency that matrix products are assumed to reach; none was measured. The
estimate takes the largest of them, as if the others ran beside it; `seconds_in_turn` is their sum, as if none did.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh

from iha_jax.accounting import count_parameters, peak_flops, training_flops_per_token
from iha_jax.config import Config, ModelConfig
from iha_jax.executed import executed_flops_per_token
from iha_jax.parallel.topology import Topology
from iha_jax.planning.hlo import Collective

EFFICIENCY = 0.6  # of peak FLOP/s, in matrix products: a common figure for dense transformers, not measured here
ASSUMPTIONS = (
    "matrix products reach {efficiency:.0%} of peak, whatever their shapes; kernels and loops cost nothing to start",
    "device memory: weights, gradients and optimizer state once a step each way, weights again for every micro-batch "
    "and pass, activations in the compute type; reached at the data sheet's rate",
    "a collective uses every torus dimension its devices differ in, both ways where it is a ring, at the data sheet's "
    "rate, and nothing else at that time",
    "the step takes the longest of the four times: the others are hidden behind it",
)


@dataclass(frozen=True)
class Traffic:
    """The collectives of one kind over one set of mesh axes: `count` runs a step, `bytes` received by a device a step.

    `network`: "ici" inside a slice or node, "dcn" between them.
    """

    kind: str
    axes: tuple[str, ...]
    network: str
    members: int
    count: int
    bytes: float
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """Seconds of a step on every device, by what bounds it."""

    useful_flops: float
    executed_flops: float | None
    compute: float
    memory: float
    ici: float
    dcn: float
    efficiency: float
    peak: float
    devices: int

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.ici, self.dcn)

    @property
    def seconds_in_turn(self) -> float:
        return self.compute + self.memory + self.ici + self.dcn

    @property
    def bound(self) -> str:
        times = {"compute": self.compute, "memory": self.memory, "ici": self.ici, "dcn": self.dcn}
        return max(times, key=lambda name: times[name])

    @property
    def mfu(self) -> float:
        """Useful FLOPs over what the devices could do in the estimated time."""
        return self.useful_flops / (self.devices * self.peak * self.seconds)


def estimate(
    config: Config,
    topology: Topology,
    mesh_sizes: dict[str, int],
    traffic: Sequence[Traffic],
    efficiency: float = EFFICIENCY,
) -> Estimate:
    """The roofline of one step. Raises ValueError for a chip whose peak FLOP/s are not known."""
    peak = peak_flops(topology.chip.kind)
    if peak is None:
        raise ValueError(f"{topology.chip.kind}: its peak FLOP/s are not in iha_jax/accounting.py")
    tokens = config.training.batch_size * config.model.context_length
    useful, executed = training_flops_per_token(config.model) * tokens, executed_flops(config)
    times = defaultdict(float)
    for part in traffic:
        times[part.network] += part.seconds
    return Estimate(
        useful_flops=useful,
        executed_flops=executed,
        compute=(executed or recomputed(config.model) * useful) / (topology.devices * peak * efficiency),
        memory=memory_traffic(config, mesh_sizes) / topology.chip.memory_bandwidth,
        ici=times["ici"],
        dcn=times["dcn"],
        efficiency=efficiency,
        peak=peak,
        devices=topology.devices,
    )


def executed_flops(config: Config) -> float | None:
    """Matrix-product FLOPs of a step as the implementations named execute them, None where one has no closed form.

    Under `remat` "full" every layer's forward runs once more; under "dots" attention's does.
    Logits run once more where `training.loss_chunk` is set.
    """
    model, training = config.model, config.training
    plain = dataclasses.replace(model, remat="none")
    try:
        step = executed_flops_per_token(plain, training=True)
        forward = executed_flops_per_token(plain)
    except ValueError:
        return None
    total = step.total + (forward.output if training.loss_chunk else 0)
    if model.remat == "full":
        total += forward.total - forward.output
    elif model.remat != "none":
        total += forward.scores + forward.mixing
    return total * training.batch_size * model.context_length


def recomputed(model: ModelConfig) -> float:
    """Executed over useful FLOPs where nothing better is known: 4/3 where the forward pass runs twice."""
    return 4 / 3 if model.remat == "full" else 1.0


def memory_traffic(config: Config, mesh: dict[str, int]) -> float:
    """Bytes that a device reads and writes in a step, by a closed form.

    A device's share of n parameters: parameter, gradient and two moments read and written in float32, `32 n`. Weights
    in the compute type, w bytes: read by each of A micro-batches in 2 passes, 3 with `remat`, after being written once:
    `w (2 A (passes + 1)) / tensor`. Activations of a token and layer: `w (14 D + 4 F)` a pass, D and F divided by
    `tensor` but for the 4 D of the residual stream. Logits: float32, written and read twice a pass.
    """
    model, training = config.model, config.training
    width = 2 if model.compute_dtype == "bfloat16" else 4
    passes = 2 if model.remat == "none" else 3
    tensor, split = mesh["tensor"], mesh["fsdp"] * mesh["tensor"]
    parameters = count_parameters(model).total
    rows = math.prod(mesh[axis] for axis in ("data", "fsdp"))
    tokens = training.batch_size / rows * model.context_length / mesh.get("context", 1)
    layer = 4 * model.width + (10 * model.width + 4 * model.mlp_width) / tensor
    weights = width * parameters / tensor * training.accumulation * (passes + 1)
    logits = 4 * 2 * (passes if training.loss_chunk else 2) * model.vocab_size / tensor
    return 32 * parameters / split + weights + tokens * (passes * width * layer * model.num_layers + logits)


def traffic(collectives: Sequence[Collective], topology: Topology, mesh: Mesh) -> list[Traffic]:
    """Collectives by kind, mesh axes and network, largest time first."""
    devices = list(mesh.devices.flat)
    inside = [i for i, device in enumerate(devices) if getattr(device, "slice_index", 0) == _slice(devices[0])]
    sums: dict[tuple[str, tuple[str, ...], str, int], list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for collective in collectives:
        if collective.between_slices:
            axes, members, network = ("data",), topology.slices, "dcn"
            moved = collective.moved_bytes(members)
            seconds = moved / topology.chip.between
        else:
            members, axes, network, seconds, moved = _inside(collective, topology, mesh, devices, inside)
        row = sums[collective.kind, axes, network, members]
        row[0] += collective.times
        row[1] += moved * collective.times
        row[2] += seconds * collective.times
    rows = [
        Traffic(kind, axes, network, members, int(count), moved, seconds)
        for (kind, axes, network, members), (count, moved, seconds) in sums.items()
    ]
    return sorted(rows, key=lambda row: -row.seconds)


def _slice(device: Any) -> int:
    return getattr(device, "slice_index", 0)


def _inside(
    collective: Collective, topology: Topology, mesh: Mesh, devices: Sequence[Any], inside: Sequence[int]
) -> tuple[int, tuple[str, ...], str, float, float]:
    groups = collective.groups or (tuple(range(len(inside))),)
    if "permute" in collective.kind:
        groups = tuple(group for group in groups if len(set(group)) > 1) or groups[:1]
    places = [inside[number] for number in groups[0]]
    coordinates = np.stack(np.unravel_index(places, mesh.devices.shape), axis=1)
    axes = tuple(
        name for name, column in zip(mesh.axis_names, coordinates.T, strict=True) if len(set(column.tolist())) > 1
    )
    members = len(set(places))
    moved = collective.moved_bytes(members)
    if topology.platform == "gpu":
        gpus = topology.shape[1]
        nodes = len({place // gpus for place in places})
        if nodes > 1:
            share = (nodes - 1) / nodes * members / max(1, members - 1) / (members / nodes)
            return members, axes, "dcn", moved * share / topology.chip.between, moved
        return members, axes, "ici", moved / topology.chip.link, moved
    return members, axes, "ici", moved / _bandwidth([devices[place] for place in places], topology), moved


def _bandwidth(devices: Sequence[Any], topology: Topology) -> float:
    """Bytes a second into one device from the others: a link for each torus dimension in which they differ, two where
    that dimension is a ring and they go round it."""
    spread = np.ptp(np.asarray([device.coords for device in devices]), axis=0)
    links = 0
    for extent, size in zip(spread, (*topology.shape, 1)[:3], strict=True):
        ring = extent == size - 1 and size % topology.chip.wrap == 0 and size > 2
        links += 0 if not extent else 2 if ring else 1
    return max(1, links) * topology.chip.link
