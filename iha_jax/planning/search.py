"""Many plans: a config over the slices of a generation, and the fastest settings that fit one topology.

A search estimates every setting by closed forms, without a compiler, and compiles only the fastest whose estimated
memory fits. It varies what changes no result but rounding: the mesh, the number of micro-batches, and `remat`. The
rows of a step stay the config's.
"""

import dataclasses
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import AbstractMesh

from iha_jax.accounting import count_parameters
from iha_jax.config import REMAT_POLICIES, Config, ConfigError
from iha_jax.parallel.mesh import AXES, check_batch_sizes
from iha_jax.parallel.rules import check_split
from iha_jax.parallel.topology import Topology, known_topologies
from iha_jax.planning.compiled import target
from iha_jax.planning.estimate import EFFICIENCY, Estimate, Traffic, estimate
from iha_jax.planning.plan import GIB, make_plan
from iha_jax.planning.report import as_json

Say = Callable[[str], None]


@dataclass(frozen=True)
class Setting:
    """A candidate of a search with its closed-form figures: bytes of a device, and the roofline."""

    config: Config
    mesh: dict[str, int]
    memory: float
    estimate: Estimate

    @property
    def rank(self) -> tuple[float, float]:
        """Fastest first; of those that compute bounds alike, the one with the least beside it."""
        return self.estimate.seconds, self.estimate.seconds_in_turn

    def __str__(self) -> str:
        sizes = " ".join(f"--config.mesh.{axis}={size}" for axis, size in self.mesh.items())
        training, model = self.config.training, self.config.model
        return f"{sizes} --config.training.accumulation={training.accumulation} --config.model.remat={model.remat}"


def search(
    config: Config, topology: Topology, say: Say, *, compiled: int = 3, efficiency: float = EFFICIENCY
) -> tuple[str, dict[str, Any]]:
    """(text, JSON) of the fastest settings that fit by the compiler, after compiling at most `compiled` of them.

    Raises:
      ConfigError: when no setting at all can be split over these devices.
    """
    found = settings(config, topology, efficiency)
    fitting = _fitting(found, topology)
    say(f"{len(found)} settings estimated, {len(fitting)} fit by the estimate; compiling the fastest {compiled}")
    lines, plans = [], []
    for number, setting in enumerate(fitting[:compiled], 1):
        say(f"{number} of {min(compiled, len(fitting))}: {setting}")
        plan = make_plan(setting.config, topology, say, efficiency)
        plans.append((plan, setting))
    plans.sort(key=lambda pair: (not pair[0].step.fits, pair[0].estimate.seconds))
    for plan, setting in plans:
        total, answer = plan.step.memory.total / GIB, "fits" if plan.step.fits else "does not fit"
        lines.append(
            f"{answer:<13} {plan.estimate.seconds:7.3f} s ({plan.estimate.bound}) "
            f"{total:7.2f} GiB (estimated {setting.estimate.seconds:.3f} s, {setting.memory / GIB:.2f} GiB)  {setting}"
        )
    if not fitting:
        least = min(found, key=lambda s: s.memory)
        lines.append(f"none fits by the estimate; the least memory, {least.memory / GIB:.1f} GiB, needs: {least}")
    others = fitting[compiled : compiled + 5]
    lines += [
        f"not compiled  {s.estimate.seconds:7.3f} s {s.memory / GIB:9.2f} GiB, both estimated  {s}" for s in others
    ]
    title = (
        f"{topology}, {topology.chip.memory / GIB:.2f} GiB a device: {len(found)} settings estimated, {len(plans)} "
        "compiled; fastest first"
    )
    return "\n".join([title, *lines]), {
        "topology": topology.name,
        "num_slices": topology.slices,
        "estimated": len(found),
        "compiled": len(plans),
        "plans": [{"flags": str(setting)} | as_json(plan) for plan, setting in plans],
    }


def settings(config: Config, topology: Topology, efficiency: float = EFFICIENCY) -> list[Setting]:
    """Every mesh, number of micro-batches and remat policy that `train.py` would accept on this topology.

    Raises:
      ConfigError: when there is none.
    """
    with target(topology):
        found = list(_settings(config, topology, efficiency))
    if not found:
        raise ConfigError(
            [
                f"config.training.batch_size = {config.training.batch_size}: no mesh of {topology.devices} devices "
                "splits it and the model; choose more rows, or fewer devices"
            ]
        )
    return found


def _settings(config: Config, topology: Topology, efficiency: float) -> Iterator[Setting]:
    rows = config.training.batch_size
    accumulations = [n for n in range(1, rows + 1) if rows % n == 0]
    for sizes in factorizations(topology.devices, len(AXES)):
        mesh: dict[str, int] = dict(zip(AXES, sizes, strict=True))
        if mesh["data"] % topology.slices:
            continue
        placed = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **mesh))
        for accumulation, remat in itertools.product(accumulations, REMAT_POLICIES):
            candidate = dataclasses.replace(
                placed,
                training=dataclasses.replace(config.training, accumulation=accumulation),
                model=dataclasses.replace(config.model, remat=remat),
            )
            abstract: Any = AbstractMesh(sizes, AXES)
            try:
                check_batch_sizes(candidate, abstract)
                check_split(candidate.model, abstract)
            except ConfigError:
                continue
            moved = traffic_estimate(candidate, topology, mesh)
            roofline = estimate(candidate, topology, mesh, moved, efficiency)
            yield Setting(candidate, mesh, memory_estimate(candidate, mesh), roofline)


def _fitting(found: Sequence[Setting], topology: Topology) -> list[Setting]:
    return sorted((s for s in found if s.memory <= topology.chip.memory), key=lambda s: s.rank)


def factorizations(n: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ordered ways to write n as a product of `parts` positive integers."""
    if parts == 1:
        yield (n,)
        return
    for first in range(1, n + 1):
        if n % first == 0:
            yield from ((first, *rest) for rest in factorizations(n // first, parts - 1))


def memory_estimate(config: Config, mesh: dict[str, int]) -> float:
    """Bytes of a device by a closed form that only ranks settings; the compiler decides.

    n parameters, split over s = fsdp * tensor devices: weights and moments `12 n / s`, gradients `4 n / s`, twice with
    accumulation. Gathered: the embedding in the compute type (w bytes) and its float32 gradient, and two groups of
    layers. Activations of t tokens: what `remat` keeps of every layer, and all of one, in w bytes: all of a layer is
    `14 D + 4 F`, its products `6 D + F`, its input D. Logits: `12` bytes each of a chunk.
    """
    model, training = config.model, config.training
    width, tensor = 2 if model.compute_dtype == "bfloat16" else 4, mesh["tensor"]
    n, D, F, V = count_parameters(model).total, model.width, model.mlp_width, model.vocab_size
    others = mesh["data"] * mesh["fsdp"]
    rows = training.batch_size / training.accumulation / others
    tokens = rows * model.context_length / mesh.get("context", 1)
    group, layers = len(model.layer_pattern), model.num_layers
    state = (12 + 4 * (2 if training.accumulation > 1 else 1)) * n / (mesh["fsdp"] * tensor)
    gathered = (width + 4) * V * D / tensor + 2 * width * group * (n - V * D) / layers / tensor
    whole = width * (4 * D + (10 * D + 4 * F) / tensor)
    kept = {
        "full": width * D * layers + whole,
        "dots": layers * width * (2 * D + (3 * D + F) / tensor) + whole,
        "none": layers * whole,
    }[model.remat]
    chunk = min(training.loss_chunk or model.context_length, model.context_length)
    logits = 12 * rows * chunk * V / tensor
    return state + gathered + tokens * kept + logits


def traffic_estimate(config: Config, topology: Topology, mesh: dict[str, int]) -> list[Traffic]:
    """Seconds of each network by closed forms; one torus dimension's two links for each axis.

    fsdp: weights gathered in w bytes for each micro-batch and pass and float32 gradients scattered, of its share of
    `tensor`. data: gradients reduced, `8 n / s` bytes. tensor: per layer and pass 4 exchanges of the activations.
    Another axis: keys and values of each layer and pass.
    """
    model, training = config.model, config.training
    n, width = count_parameters(model).total, 2 if model.compute_dtype == "bfloat16" else 4
    passes, chip = (2 if model.remat == "none" else 3), topology.chip
    tokens = training.batch_size * model.context_length / (mesh["data"] * mesh["fsdp"])
    fsdp, tensor, data = mesh["fsdp"], mesh["tensor"], mesh["data"]
    bytes_of = {
        "fsdp": n / tensor * training.accumulation * (width * (passes - 1) + 4) * (fsdp - 1) / fsdp,
        "data": 8 * n / (fsdp * tensor) * (data - 1) / data,
        "tensor": model.num_layers * passes * 4 * tokens * model.width * width * (tensor - 1) / tensor,
    }
    for axis in AXES:
        size = mesh[axis]
        kv = 2 * model.num_kv_heads * model.head_width * width
        bytes_of.setdefault(axis, model.num_layers * passes * tokens * kv * (size - 1) / size)
    found = []
    for axis, moved in bytes_of.items():
        slow = (axis == "data" and topology.slices > 1) or (
            topology.platform == "gpu" and _spans_nodes(axis, topology, mesh)
        )
        rate = chip.between if slow else chip.link * (2 if topology.platform == "tpu" else 1)
        found.append(Traffic("estimate", (axis,), "dcn" if slow else "ici", mesh[axis], 1, moved, moved / rate))
    return found


def _spans_nodes(axis: str, topology: Topology, mesh: dict[str, int]) -> bool:
    """Axes are laid out in order, the last one inside a node first."""
    inner = 1
    for name in reversed(AXES):
        inner *= mesh[name]
        if name == axis:
            return inner > topology.shape[1]
    return False


def sweep_estimates(config: Config, largest: Topology, efficiency: float = EFFICIENCY) -> tuple[str, dict[str, Any]]:
    """(text, JSON): on every topology up to `largest`, the fastest setting that fits, by closed forms alone."""
    lines = [
        "closed forms, nothing compiled; times of a step in seconds, each by itself",
        f"{'topology':<16} {'devices':>7} {'GiB':>6} {'compute':>8} {'memory':>8} {'ici':>8} {'dcn':>8} {'bound':<8} "
        f"{'MFU':>6} {'days':>8}  setting",
    ]
    rows = []
    for topology in smaller(largest):
        start = f"{topology.name:<16} {topology.devices:>7} "
        try:
            fitting = _fitting(settings(config, topology, efficiency), topology)
            refused = "" if fitting else "nothing fits"
        except ConfigError as error:
            fitting, refused = [], error.problems[0]
        if not fitting:
            lines.append(start + refused)
            rows.append({"topology": topology.name, "devices": topology.devices, "refused": refused})
            continue
        best, found = fitting[0], fitting[0].estimate
        days = config.training.steps * found.seconds / 86_400
        times = f"{found.compute:>8.3f} {found.memory:>8.3f} {found.ici:>8.3f} {found.dcn:>8.3f}"
        lines.append(
            f"{start}{best.memory / GIB:>6.1f} {times} {found.bound:<8} {found.mfu:>6.1%} {days:>8.1f}  {best}"
        )
        rows.append(
            {"topology": topology.name, "devices": topology.devices, "flags": str(best), "bytes": best.memory}
            | {"bound": found.bound, "step_seconds_estimate": found.seconds, "mfu_estimate": found.mfu}
        )
    return "\n".join(lines), {"closed_forms": rows}


def smaller(largest: Topology) -> list[Topology]:
    """The topologies of a generation with at most as many devices, as many slices of each."""
    found = [dataclasses.replace(topology, slices=largest.slices) for topology in known_topologies(largest.generation)]
    return [topology for topology in found if topology.devices <= largest.devices]


def sweep(
    spec: str, overrides: Sequence[str], largest: Topology, say: Say, efficiency: float = EFFICIENCY
) -> tuple[str, dict[str, Any]]:
    """(text, JSON): the config on every topology of a generation up to `largest`, each planned in a process of its own.

    A topology that the config cannot be split over, or that cannot hold weights and optimizer alone, is listed with the
    reason.
    """
    from iha_jax.config_file import load_config

    state = 12 * count_parameters(load_config(spec, overrides).model).total
    lines = [
        f"{'topology':<16} {'devices':>7} {'fits':<5} {'GiB':>7} {'s a step':>9} {'bound':<8} {'MFU':>6} {'days':>7}"
    ]
    plans, compiled = [], 0
    for topology in smaller(largest):
        if state / topology.devices > topology.chip.memory:
            reason = f"weights and optimizer alone are {state / GIB:.0f} GiB"
            plans.append({"topology": topology.name, "fits": False, "refused": reason})
            lines.append(_sweep_line(plans[-1], topology.devices))
            continue
        compiled += 1
        say(f"planning for {topology.name}")
        found = _planned_apart(spec, overrides, topology, efficiency)
        plans.append(found)
        lines.append(_sweep_line(found, topology.devices))
    lines.append(f"{len(plans)} topologies, {compiled} compiled for")
    return "\n".join(lines), {"plans": plans}


def _planned_apart(spec: str, overrides: Sequence[str], topology: Topology, efficiency: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "plan.json"
        command = [sys.executable, "-m", "iha_jax.plan", f"--config={spec}", f"--topology={topology.name}"]
        command += [f"--num_slices={topology.slices}", f"--efficiency={efficiency}", f"--out={out}"]
        command += [*(f"--config.{override}" for override in overrides)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode == 0:
            return json.loads(out.read_text())
        said = [line for line in done.stderr.splitlines() if line and not line.startswith("[plan")]
        return {
            "topology": topology.name,
            "fits": False,
            "refused": " ".join(said[-3:]) or f"exit code {done.returncode}",
        }


def _sweep_line(found: dict[str, Any], devices: int) -> str:
    start = f"{found['topology']:<16} {devices:>7} "
    if "refused" in found:
        return start + f"no    {found['refused']}"
    return start + (
        f"{'yes' if found['fits'] else 'no':<5} {found['bytes_per_device']['total'] / GIB:>7.2f} "
        f"{found['step_seconds_estimate']:>9.3f} {found['bound']:<8} {found['mfu_estimate']:>6.1%} "
        f"{found['days_estimate']:>7.1f}"
    )
