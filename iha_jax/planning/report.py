"""A plan as text for people and as JSON for programs."""

from typing import Any

from iha_jax.accounting import count_parameters
from iha_jax.planning.estimate import ASSUMPTIONS, Traffic
from iha_jax.planning.plan import GIB, Plan


def as_json(plan: Plan) -> dict[str, Any]:
    """Plain values. FLOPs are of all devices; bytes of one, of a whole step; `seconds` of a collective's kind are its
    share of the network times, as if nothing else ran."""
    memory, found, topology = plan.step.memory, plan.estimate, plan.topology
    compiler = plan.step.compiler_flops
    return {
        "topology": topology.name,
        "num_slices": topology.slices,
        "devices": topology.devices,
        "chips": topology.chips,
        "mesh": dict(plan.mesh),
        "parameters": count_parameters(plan.config.model).total,
        "bytes_per_device": {
            "arguments": memory.arguments,
            "temporaries": memory.temporaries,
            "output": memory.output,
            "aliased": memory.aliased,
            "total": memory.total,
            "capacity": int(topology.chip.memory),
        },
        "fits": plan.step.fits,
        "verdict": plan.verdict,
        "largest_buffers": [str(buffer) for buffer in plan.step.buffers],
        "kernels": plan.step.kernels,
        "flops_per_step": {
            "model": found.useful_flops,
            "executed": found.executed_flops,
            "compiler": None if compiler is None else compiler * topology.devices,
        },
        "collectives": _collectives(plan.traffic),
        "roofline_seconds": {
            "compute": found.compute,
            "memory": found.memory,
            "ici": found.ici,
            "dcn": found.dcn,
            "in_turn": found.seconds_in_turn,
        },
        "bound": found.bound,
        "step_seconds_estimate": found.seconds,
        "mfu_estimate": found.mfu,
        "tokens_per_step": plan.tokens_per_step,
        "steps": plan.config.training.steps,
        "days_estimate": plan.days,
        "chip_hours_estimate": plan.chip_hours,
        "assumptions": assumptions(plan),
        "compiled": "to machine code" if plan.step.with_code else "until memory was assigned",
        "compiling_seconds": plan.step.seconds,
    }


def assumptions(plan: Plan) -> list[str]:
    """What the figures rest on, in sentences."""
    return [*plan.changes, *(text.format(efficiency=plan.estimate.efficiency) for text in ASSUMPTIONS)]


def table(plan: Plan) -> str:
    """What a person reads: some thirty lines."""
    memory, found, topology, model = plan.step.memory, plan.estimate, plan.topology, plan.config.model
    chip, steps = topology.chip, plan.config.training.steps
    per_chip = " (2 devices a chip)" if chip.devices_per_chip == 2 else ""
    executed = "no closed form for these kernels" if found.executed_flops is None else f"{found.executed_flops:.3e}"
    compiler = plan.step.compiler_flops
    counted = "not known, no code was made" if compiler is None else f"{compiler * topology.devices:.3e}"
    lines = [
        f"topology    {topology}: {topology.devices} devices{per_chip}, mesh "
        + ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items()),
        f"model       {count_parameters(model).total:,} parameters, {plan.tokens_per_step:,} tokens a step in "
        f"{plan.config.training.accumulation} micro-batch(es), remat {model.remat}",
        "kernels     " + ", ".join(f"{kind}: {name}" for kind, name in plan.step.kernels.items()),
        "",
        "bytes a device             GiB",
        f"  arguments          {memory.arguments / GIB:9.2f}   weights, optimizer, batch",
        f"  temporaries        {memory.temporaries / GIB:9.2f}",
        f"  output             {memory.output / GIB:9.2f}   {memory.aliased / GIB:.2f} of it in the arguments' place",
        f"  total              {memory.total / GIB:9.2f}   of {chip.memory / GIB:.2f}",
        f"  {plan.verdict}",
        "",
        "FLOPs a step, all devices",
        f"  useful             {found.useful_flops:.3e}   visible pairs only, nothing twice",
        f"  executed           {executed}   with masked blocks and recomputation",
        f"  compiler's count   {counted}   each loop's body once and no kernels: no measure of the step",
        "",
        "collectives a step, bytes into one device",
        *_traffic_lines(plan.traffic),
        "",
        f"step time   {found.seconds:.3f} s, bound by {found.bound}; by itself compute {found.compute:.3f}, memory "
        f"{found.memory:.3f}, ici {found.ici:.3f}, dcn {found.dcn:.3f}; one after another {found.seconds_in_turn:.3f}",
        f"            model FLOPs utilization {found.mfu:.1%} of {found.peak / 1e12:.0f} TFLOP/s a device",
        f"budget      {steps:,} steps, {steps * plan.tokens_per_step:,} tokens: {plan.days:.1f} days, "
        f"{plan.chip_hours:,.0f} chip-hours",
        "an estimate, not a measurement; it assumes:",
        *(f"  - {text}" for text in assumptions(plan)),
    ]
    return "\n".join(lines)


def _traffic_lines(traffic: list[Traffic]) -> list[str]:
    if not traffic:
        return ["  none"]
    return [
        f"  {row.kind:<20} {'x'.join(row.axes) or '-':<16} {row.network}  {row.count:>6} x of {row.members:>5} devices "
        f"{row.bytes / GIB:9.3f} GiB  {row.seconds:8.4f} s"
        for row in traffic
    ]


def _collectives(traffic: list[Traffic]) -> dict[str, Any]:
    """By kind: how many run, bytes into one device and seconds; and the same for each set of mesh axes."""
    found: dict[str, Any] = {}
    for row in traffic:
        kind = found.setdefault(row.kind, {"count": 0, "bytes": 0.0, "seconds": 0.0, "over": []})
        kind["count"] += row.count
        kind["bytes"] += row.bytes
        kind["seconds"] += row.seconds
        kind["over"].append(
            {
                "axes": list(row.axes),
                "network": row.network,
                "devices": row.members,
                "count": row.count,
                "bytes": row.bytes,
                "seconds": row.seconds,
            }
        )
    return found
