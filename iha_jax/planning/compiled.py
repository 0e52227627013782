"""Compiling a run's own training step for a topology: what it needs, or why it cannot be had.

The step is the one `train.py` compiles (`lower_train_step`): optimizer, gradient accumulation and the config's mesh.
For GPUs it is compiled for fake CPU devices: shardings and collectives are those of the mesh, memory is that of XLA's
CPU compiler, and attention is block-wise and streaming, since cuDNN and the fused kernels need a GPU to compile.
"""

import contextlib
import dataclasses
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from iha_jax.config import Config
from iha_jax.ops import target_platform
from iha_jax.parallel.mesh import check_batch_sizes, make_mesh
from iha_jax.parallel.rules import check_split
from iha_jax.parallel.topology import Topology
from iha_jax.planning.assigned import compile_until_assigned
from iha_jax.planning.hlo import Collective, collectives
from iha_jax.training.banner import kernels
from iha_jax.training.optimizer import make_optimizer
from iha_jax.training.state import abstract_state
from iha_jax.training.step import lower_train_step

_GPU_ONLY = ("cudnn", "fused")


class PlanError(ValueError):
    """The compiler refused the step for another reason than memory."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. `aliased`: outputs that take the place of donated arguments, part of both."""

    arguments: int
    temporaries: int
    output: int
    aliased: int

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries + self.output - self.aliased


@dataclass(frozen=True)
class Buffer:
    """A large value of the compiled program and the operation that makes it."""

    size: int
    shape: str
    source: str

    def __str__(self) -> str:
        return f"{self.size / 2**30:.2f} GiB {self.shape} by {self.source}"


@dataclass(frozen=True)
class CompiledStep:
    """What the compiler says of a step. `compiler_flops`: its own count for one device (None where it made no code), in
    which the body of a loop counts once and a kernel not at all."""

    memory: Memory
    fits: bool
    compiler_flops: float | None
    collectives: list[Collective]
    buffers: list[Buffer]
    kernels: dict[str, str]
    seconds: float
    with_code: bool


def check_plan(config: Config, topology: Topology, devices: Sequence[Any]) -> tuple[Config, Mesh, list[str]]:
    """The config as it can be compiled here, its mesh on the devices, and what had to be changed, in words.

    Raises:
      ConfigError: as `train.py` would on these devices.
    """
    config, changes = _without_gpu_kernels(config, topology)
    mesh = make_mesh(config.mesh, devices)
    check_batch_sizes(config, mesh)
    check_split(config.model, mesh)
    with target(topology):
        kernels(config, mesh)
    return config, mesh, changes


def compile_step(
    config: Config, topology: Topology, mesh: Mesh, say: Callable[[str], None], *, code: bool = True
) -> CompiledStep:
    """Lowers and compiles the training step of a config that `check_plan` let through.

    `code=False` ends once memory is assigned, before machine code is made: the same memory and collectives, but kernels
    that the compiler would refuse are not noticed, and its count of FLOPs is not known.

    Raises:
      PlanError: when the compiler refuses it, but not for its memory: such a step comes back with `fits` False.
    """
    optimizer, began = make_optimizer(config.optimizer, config.training.steps), time.perf_counter()
    with jax.set_mesh(mesh), target(topology), tempfile.TemporaryDirectory() as folder:
        state, chosen, compiled, refusal = abstract_state(config, optimizer, mesh), kernels(config, mesh), None, ""
        if code:
            say(f"lowering the training step for {topology}")
            lowered = lower_train_step(config, optimizer, state, mesh)
            say(f"lowered in {time.perf_counter() - began:.0f} s; compiling")
            try:
                compiled = lowered.compile(compiler_options={"xla_dump_to": folder})
            except Exception as error:
                refusal = str(error) or type(error).__name__
        else:
            say(f"compiling the training step for {topology} until memory is assigned")
            refusal = compile_until_assigned(config, topology, folder)
        if refusal and ("RESOURCE_EXHAUSTED" not in refusal or "vmem" in refusal.lower()):
            raise PlanError(explain(refusal, config))
        seconds, dump = time.perf_counter() - began, Dump(folder)
        say(f"refused for its memory after {seconds:.0f} s" if refusal else f"compiled in {seconds:.0f} s")
        memory = dump.memory() or (_memory(compiled) if compiled is not None else None)
        if memory is None:
            raise PlanError(f"needs more memory than a device has; the compiler lists no buffers: {refusal}")
        text = dump.text("after_optimizations_after_buffer_assignment")
        if not text and compiled is not None:
            text = compiled.as_text() or ""
        return CompiledStep(
            memory=memory,
            fits=not refusal and memory.total <= topology.chip.memory,
            compiler_flops=float((compiled.cost_analysis() or {}).get("flops", 0.0)) if compiled is not None else None,
            # Partitions are numbered within a slice: each slice runs the same program.
            collectives=collectives(text, mesh.size // topology.slices) if text else [],
            buffers=dump.buffers(text),
            kernels=chosen,
            seconds=seconds,
            with_code=code,
        )


def explain(text: str, config: Config) -> str:
    """One sentence on why the compiler refused a step, and which option avoids it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if "Error" in line), lines[0])
    if "Mosaic" in text or "pallas" in text.lower() or "vmem" in text.lower():
        name = re.search(r"kernel_name[\"=:\s]+([\w.]+)|name:?\s*[\"']?([\w]*(?:splash|interleaved|fused)[\w.]*)", text)
        kernel = next(filter(None, name.groups()), "") if name else ""
        if config.model.iha.implementation == "fused" and "splash" not in kernel:
            kernel, option = kernel or "the fused IHA kernel", "config.model.iha.implementation=streaming"
        else:
            kernel, option = kernel or "Splash", "config.model.implementation=blockwise"
        return f"TPU's compiler refused a kernel ({kernel}); --{option} does without it. It said: {said}"
    return f"the compiler refused the step: {said}"


class Dump:
    """The files that XLA writes while it compiles, also when it then refuses the program for its memory."""

    def __init__(self, folder: str):
        files = [path for path in Path(folder).rglob("*.txt") if ".jit_step." in path.name]
        self._files = {path.name.rsplit(".", 2)[-2]: path for path in files}

    def text(self, name: str) -> str:
        found = (path for end, path in self._files.items() if end.endswith(name))
        return next((path.read_text(errors="replace") for path in found), "")

    def memory(self) -> Memory | None:
        """Of TPU's compiler, constants among the temporaries; None where it wrote no total."""
        total = re.search(r"default \(color=0\)\s*Total bytes: (\d+)", self.text("memory-usage-report"))
        if not total:
            return None
        arguments = aliased = output = 0
        for size, rest in re.findall(r"^allocation \d+: size (\d+), (.*)$", self.text("buffer-assignment"), re.M):
            if "color" in rest:  # memory on the chip itself
                continue
            is_argument, is_output = "parameter" in rest, "maybe-live-out" in rest
            arguments += int(size) * is_argument
            output += int(size) * is_output
            aliased += int(size) * (is_argument and is_output)
        return Memory(arguments, int(total[1]) - arguments - output + aliased, output, aliased)

    def buffers(self, program: str, count: int = 3) -> list[Buffer]:
        """The largest values that are no arguments, one for each place in memory."""
        places: dict[tuple[str, str], Buffer] = {}
        allocation = ""
        for line in self.text("buffer-assignment").splitlines():
            if line.startswith("allocation "):
                skipped = any(word in line for word in ("color", "parameter", "constant"))
                allocation = "" if skipped else line
            found = re.match(r"\s+value: <\d+ (\S+?)(?:\{[\d,]*\})? @\d+> \(size=(\d+),offset=(\d+)\): (\S+)", line)
            if not found or not allocation:
                continue
            name, size, offset, shape = found.groups()
            buffer = Buffer(int(size), re.sub(r"\{.*", "", shape), name)
            place = (allocation, offset)
            if place not in places or buffer.size > places[place].size:
                places[place] = buffer
        largest = sorted(places.values(), key=lambda buffer: -buffer.size)[:count]
        return [dataclasses.replace(buffer, source=_source(buffer.source, program)) for buffer in largest]


def _source(name: str, program: str) -> str:
    """The operation of the model that an instruction was made of, as its metadata says; else its own name."""
    found = re.search(rf"%?{re.escape(name)} = .*?op_name=\"([^\"]*)\"", program)
    return found[1] if found else name


def _memory(compiled: jax.stages.Compiled) -> Memory:
    sizes: Any = compiled.memory_analysis()
    return Memory(
        sizes.argument_size_in_bytes, sizes.temp_size_in_bytes, sizes.output_size_in_bytes, sizes.alias_size_in_bytes
    )


@contextlib.contextmanager
def target(topology: Topology) -> Iterator[None]:
    """Implementations are chosen as on the topology's chips; where GPUs are fake, as on a CPU."""
    if topology.platform == "gpu":
        with target_platform("cpu", devices=topology.devices):
            yield
        return
    chip = topology.generation.removeprefix("tpu")  # the kernels' name of tpu7x is 7x
    with target_platform("tpu", devices=topology.devices, chip=chip):
        yield


def _without_gpu_kernels(config: Config, topology: Topology) -> tuple[Config, list[str]]:
    if topology.platform != "gpu":
        return config, []
    model = config.model
    changes = ["GPUs are fake CPU devices here: shardings and collectives are right, memory is XLA's CPU compiler's"]
    if model.implementation in _GPU_ONLY:
        model = dataclasses.replace(model, implementation="auto")
    if model.iha.implementation in _GPU_ONLY:
        model = dataclasses.replace(model, iha=dataclasses.replace(model.iha, implementation="auto"))
    changes.append("between nodes, GPUs of a node share the work of a collective; inside, NVLink carries the rest")
    changes.append("attention is block-wise and streaming: cuDNN and fused kernels compile on a GPU only")
    return dataclasses.replace(config, model=model), changes
