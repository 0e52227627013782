"""A plan: one config's training step, compiled for one topology, with what follows from it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from iha_jax.config import Config
from iha_jax.parallel.topology import Topology, TopologyError, open_devices
from iha_jax.planning.compiled import CompiledStep, check_plan, compile_step, target
from iha_jax.planning.estimate import EFFICIENCY, Estimate, Traffic, estimate, traffic

GIB = 2**30
NO_CODE = "no machine code was made: whether the compiler accepts every kernel is not known"


@dataclass(frozen=True)
class Plan:
    """`mesh`: sizes of its axes. `changes`: what could not be compiled as it will run."""

    config: Config
    topology: Topology
    mesh: Mapping[str, int]
    changes: list[str]
    step: CompiledStep
    traffic: list[Traffic]
    estimate: Estimate

    @property
    def tokens_per_step(self) -> int:
        return self.config.training.batch_size * self.config.model.context_length

    @property
    def days(self) -> float:
        """Of the config's steps at the estimated time of one."""
        return self.config.training.steps * self.estimate.seconds / 86_400

    @property
    def chip_hours(self) -> float:
        return self.days * 24 * self.topology.chips

    @property
    def verdict(self) -> str:
        """One sentence: that it fits, or the largest buffers and what to change."""
        memory, capacity = self.step.memory, self.topology.chip.memory
        if self.step.fits:
            return f"fits: {memory.total / GIB:.2f} of {capacity / GIB:.2f} GiB a device"
        largest = "; ".join(map(str, self.step.buffers)) or "not listed by the compiler"
        return (
            f"does not fit: {memory.total / GIB:.2f} of {capacity / GIB:.2f} GiB a device, of which arguments (weights "
            f"and optimizer) {memory.arguments / GIB:.2f}; largest buffers: {largest}; change: "
            f"{' or '.join(_remedies(self.config, self.mesh, memory.arguments / capacity))}"
        )


def make_plan(
    config: Config,
    topology: Topology,
    say: Callable[[str], None],
    efficiency: float = EFFICIENCY,
    *,
    code: bool = True,
) -> Plan:
    """Checks, compiles (`code=False`: until memory is assigned) and estimates.

    Raises:
      ConfigError, TopologyError: for what cannot be compiled for; in seconds, before anything is.
      PlanError: when the compiler refuses the step for another reason than memory.
    """
    if not code and topology.platform == "gpu":
        raise TopologyError(f"{topology}: --skip_code is for TPU's compiler; the fake devices' is fast without")
    config, mesh, changes = check_plan(config, topology, open_devices(topology))
    step = compile_step(config, topology, mesh, say, code=code)
    if not code:
        changes = [*changes, NO_CODE]
    moved = traffic(step.collectives, topology, mesh)
    with target(topology):
        roofline = estimate(config, topology, dict(mesh.shape), moved, efficiency)
    return Plan(config, topology, dict(mesh.shape), changes, step, moved, roofline)


def _remedies(config: Config, mesh: Mapping[str, int], state_share: float) -> list[str]:
    """Options that lower what a device holds, the likeliest first."""
    model, training, found = config.model, config.training, []
    rows = training.batch_size // training.accumulation // (mesh["data"] * mesh["fsdp"])
    if state_share > 0.5 and mesh["data"] > 1:
        found.append("--config.mesh.data=1 --config.mesh.fsdp=-1 (weights and optimizer over all devices)")
    if model.remat == "none":
        found.append("--config.model.remat=full")
    elif model.remat != "full":
        found.append("--config.model.remat=full in place of " + model.remat)
    if rows > 1:
        found.append(f"--config.training.accumulation={training.accumulation * 2} ({rows} rows a device now)")
    if not training.loss_chunk:
        found.append("--config.training.loss_chunk=1024")
    if model.implementation == "reference" or model.iha.implementation == "reference":
        found.append("another implementation than the reference")
    found.append(f"--config.mesh.tensor={mesh['tensor'] * 2}")
    found.append("more devices, or devices with more memory")
    return found
