"""Machines that are not here: chips, how they are joined, and devices to compile for.

A topology is named as TPU's compiler names it, `v5p:4x4x8` (a torus of chips), or `h100:16x8` (16 nodes of 8 GPUs).

Figures of a chip, from the vendors' public data sheets: Cloud TPU's pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e" and
"TPU7x (Ironwood)" (memory bandwidth; bandwidth between chips, here one way over one link; data-center network a chip),
NVIDIA's data sheets of A100 80GB SXM, H100 SXM and H200 SXM (memory, its bandwidth, NVLink one way), and NVIDIA's DGX
reference designs for the network between nodes (200 Gb/s a GPU for A100, 400 Gb/s for the others). Peak FLOP/s are
`accounting.peak_flops`. Memory of a TPU is what its compiler calls available (libtpu 0.0.52), a little below the data
sheet. What of it a program reaches is not known here.
"""

import difflib
import importlib.util
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One device as jax counts them. Bytes, and bytes a second.

    `link`: one way over one link of the torus (GPU: of one GPU to all others of its node); `wrap`: dimensions of the
    torus that are multiples of it are rings; `between`: over the network between slices (GPU: nodes);
    `devices_per_chip`: 2 where a chip's two cores are devices of their own.
    """

    kind: str
    memory: float
    memory_bandwidth: float
    link: float
    between: float
    wrap: int = 0
    devices_per_chip: int = 1
    cores_in_name: int = 1  # cloud names such as v5p-8 count cores


CHIPS: Mapping[str, Chip] = {
    "v4": Chip(
        kind="TPU v4",
        memory=30.75 * GIB,
        memory_bandwidth=1200e9,
        link=50e9,
        between=3.125e9,
        wrap=4,
        cores_in_name=2,
    ),
    "v5e": Chip(kind="TPU v5 lite", memory=15.75 * GIB, memory_bandwidth=819e9, link=50e9, between=3.125e9, wrap=16),
    "v5p": Chip(
        kind="TPU v5p",
        memory=95.73 * GIB,
        memory_bandwidth=2765e9,
        link=100e9,
        between=6.25e9,
        wrap=4,
        cores_in_name=2,
    ),
    "v6e": Chip(kind="TPU v6 lite", memory=31.24 * GIB, memory_bandwidth=1638e9, link=100e9, between=12.5e9, wrap=16),
    "tpu7x": Chip(
        kind="TPU7x",
        memory=94.74 * GIB,
        memory_bandwidth=7380e9 / 2,
        link=100e9 / 2,
        between=12.5e9 / 2,
        wrap=4,
        devices_per_chip=2,
        cores_in_name=2,
    ),
    "a100": Chip(kind="A100", memory=80e9, memory_bandwidth=2039e9, link=300e9, between=25e9),
    "h100": Chip(kind="H100", memory=80e9, memory_bandwidth=3350e9, link=450e9, between=50e9),
    "h200": Chip(kind="H200", memory=141e9, memory_bandwidth=4800e9, link=450e9, between=50e9),
}
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SMALL = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
_SHAPES: Mapping[str, tuple[str, ...]] = {
    "v4": ("1x1x1", *_SMALL),
    "v5e": _FLAT,
    "v5p": ("1x1x1", *_SMALL, "16x16x16", "16x16x24"),
    "v6e": _FLAT,
    "tpu7x": ("1x1x1", *_SMALL, "16x16x16"),
}
_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v6": "v6e", "v7x": "tpu7x", "ironwood": "tpu7x", "trillium": "v6e"}
_GPU_NODE = 8


class TopologyError(ValueError):
    """A topology that does not exist, or that cannot be compiled for here."""


@dataclass(frozen=True)
class Topology:
    """`slices` times `shape`: chips of a torus, or (nodes, GPUs of a node)."""

    generation: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        return CHIPS[self.generation]

    @property
    def platform(self) -> str:
        return "tpu" if self.generation in _SHAPES else "gpu"

    @property
    def devices(self) -> int:
        return self.slices * math.prod(self.shape) * self.chip.devices_per_chip

    @property
    def chips(self) -> int:
        return self.slices * math.prod(self.shape)

    @property
    def name(self) -> str:
        return f"{self.generation}:{'x'.join(map(str, self.shape))}"

    def __str__(self) -> str:
        return self.name if self.slices == 1 else f"{self.slices} slices of {self.name}"


def parse_topology(name: str, num_slices: int = 1) -> Topology:
    """The topology of a name such as `v5p:4x4x8` or `h100:16x8`.

    Raises:
      TopologyError: for a name that does not exist, with the nearest that does and all of its generation.
    """
    if num_slices < 1:
        raise TopologyError(f"--num_slices={num_slices}: expected 1 or more")
    generation, colon, shape = name.lower().partition(":")
    if colon and generation in _SHAPES and shape in _SHAPES[generation]:
        return Topology(generation, tuple(map(int, shape.split("x"))), num_slices)
    gpu = re.fullmatch(r"(\d+)x(\d+)", shape)
    if generation in CHIPS and generation not in _SHAPES and gpu:
        nodes, gpus = map(int, gpu.groups())
        if nodes and 1 <= gpus <= _GPU_NODE:
            if num_slices > 1:
                raise TopologyError(f"--num_slices={num_slices}: slices are TPU's; write more nodes, {name}")
            return Topology(generation, (nodes, gpus))
    raise TopologyError(f"--topology={name}: no such topology{_suggest(name)}")


def known_topologies(generation: str) -> list[Topology]:
    """The slices of a TPU generation by size, or 1 to 512 nodes of a GPU. Raises TopologyError for another name."""
    if generation not in CHIPS:
        raise TopologyError(f"--topology={generation}: no such generation; expected one of {', '.join(CHIPS)}")
    if generation in _SHAPES:
        return [parse_topology(f"{generation}:{shape}") for shape in _SHAPES[generation]]
    nodes = [Topology(generation, (2**n, _GPU_NODE)) for n in range(10)]
    return [Topology(generation, (1, 1)), *nodes]


def environment(topology: Topology) -> dict[str, str]:
    """Variables to set before jax starts, so that it takes no accelerator of this machine: TPU's compiler looks for no
    TPU and lets other processes load it too; GPUs are as many fake CPU devices."""
    found = {"JAX_PLATFORMS": "cpu"}
    if topology.platform == "tpu":
        found |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        return found | {"TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost"}
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    return found | {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={topology.devices}".strip()}


def open_devices(topology: Topology) -> list[Any]:
    """Devices of the topology that programs can be compiled for but not run on; GPUs are fake CPU devices.

    `environment` has to be set before jax starts.

    Raises:
      TopologyError: where TPU's compiler is not installed or refuses the name, or jax started with other devices.
    """
    import jax
    from jax.experimental import topologies

    if topology.platform == "gpu":
        devices = jax.devices("cpu")
        if len(devices) != topology.devices:
            raise TopologyError(f"{topology}: needs {topology.devices} fake CPU devices, jax has {len(devices)}")
        return devices
    if importlib.util.find_spec("libtpu") is None:
        raise TopologyError(
            f"{topology}: compiling for a TPU needs its compiler, libtpu, which is not installed: pip install libtpu"
        )
    options: dict[str, Any] = {} if topology.slices == 1 else {"num_slices": topology.slices}
    if topology.generation == "v4":  # else each of a chip's two cores is a device
        options["chip_config_name"] = "megacore"
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options).devices)
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        hint = "; another process holds libtpu's lock file: wait for it" if "lockfile" in first else ""
        raise TopologyError(f"{topology}: TPU's compiler refused it: {first}{hint}") from error


def _suggest(name: str) -> str:
    """`; did you mean v5p:4x4x8? ...` from a misspelt name or a cloud's name such as v5litepod-16."""
    cloud = re.fullmatch(r"([a-z0-9]+?)-(\d+)", name.lower())
    generation = re.split(r"[:\-_= ]", name.lower())[0]
    generation = _ALIASES.get(generation, generation)
    if generation not in CHIPS:
        close = difflib.get_close_matches(generation, CHIPS, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        examples = ", ".join(f"{g}:{'16x8' if g not in _SHAPES else _SHAPES[g][3]}" for g in CHIPS)
        return f"{hint}; generations are spelt as in {examples}"
    names = [topology.name for topology in known_topologies(generation)]
    if cloud:
        chips = max(1, int(cloud[2]) // CHIPS[generation].cores_in_name)
        counts = {topology.name: topology.chips for topology in known_topologies(generation)}
        near = min(counts, key=lambda other: abs(math.log(counts[other] / chips)))
        unit = "cores" if CHIPS[generation].cores_in_name > 1 else "chips"
        named = f"{cloud[2]} {unit}" + (f", {chips} chips" if unit == "cores" else "")
        return f" by the compiler's names; {name} ({named}) is {near}; {generation} has {', '.join(names)}"
    if generation not in _SHAPES:
        return f"; write NODESxGPUS with at most {_GPU_NODE} GPUs a node, such as {generation}:16x8"
    shape = re.findall(r"\d+", name.partition(generation)[2]) or ["1"]
    ordered = f"{generation}:{'x'.join(sorted(shape, key=int))}"
    near = ordered if ordered in names else difflib.get_close_matches(ordered, names, n=1, cutoff=0)[0]
    return f"; did you mean {near}? {generation} has {', '.join(names)}"
