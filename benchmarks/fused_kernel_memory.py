"""Compiles the fused IHA kernel for TPUs that are not here, and prints what it needs on chip and in device memory.

    pip install -e '.[tpu]' && python -m benchmarks.fused_kernel_memory [--chips=v4,v5e,v5p,v6e]

The paper's shape (B = 1, N = 8192, H = 20, d = 128, bfloat16) at P = 20, 8, 4 and 2, with the window of its
FLOP-matched schedule, N / (2 P^2). Columns: tokens of a block; parts of the sequence; memory on chip (VMEM), as
`vmem_needed` estimates it for the backward kernel and as the compiler reports it for the kernel it made; temporaries in
device memory beside arguments and outputs; seconds to compile. Nothing is run.
Writes the same to `benchmarks/results/fused_kernel_memory.csv`.
"""

import argparse
import csv
import datetime
import importlib.metadata
import os
import pathlib
import re
import time
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU machine to ask about
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # compiling needs no chip, so nobody has to wait for it

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from iha_jax.ops.pallas.interleaved_tpu import fused_interleaved_attention, plan
from iha_jax.ops.pallas.interleaved_tpu_blocks import vmem_needed

TOPOLOGIES = {
    "v4": {"topology_name": "v4:2x2x1", "chip_config_name": "megacore"},
    "v5e": {"topology_name": "v5e:2x2"},
    "v5p": {"topology_name": "v5p:2x2x1"},
    "v6e": {"topology_name": "v6e:2x2"},
}
COLUMNS: tuple[str, ...] = (
    "chip", "P", "window", "pass", "block", "parts", "vmem_estimated_mib", "vmem_mib", "vmem_of_chip_mib",
    "temporaries_mib", "output_mib", "compile_seconds", "refused", "jax", "libtpu", "date",
)  # fmt: skip
RESULTS = pathlib.Path(__file__).parent / "results" / "fused_kernel_memory.csv"


def measure(
    chip: str, P: int, window: int, *, N: int = 8192, H: int = 20, d: int = 128, backward: bool, **switches: Any
) -> dict:
    """One row of the table; compiles for one device of `chip`."""
    topology = topologies.get_topology_desc(platform="tpu", **TOPOLOGIES[chip])
    sharding = SingleDeviceSharding(topology.devices[0])
    settings: dict[str, Any] = (
        dict(causal=True, causality="virtual", rope_theta=5e5, rope_positions="virtual") | switches
    )
    settings |= dict(window=window, chip=chip)

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)

    def forward(q, k, v, *mixing):
        return fused_interleaved_attention(q, k, v, mixing, segment_ids=None, **settings)

    def gradients(out, *arguments):
        return jax.vjp(forward, *arguments)[1](out)

    row = {"chip": chip, "P": P, "window": window, "pass": "backward" if backward else "forward"}
    q = array(1, N, H, d)
    try:
        blocks = plan((q, q, q), P, **settings)
    except ValueError as error:
        return row | {"refused": str(error)}
    arguments = [q] * 3 + [array(H, H, P)] * 4
    start = time.perf_counter()
    run, arguments = (gradients, [q, *arguments]) if backward else (forward, arguments)
    compiled = jax.jit(run).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    memory, program = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None
    assert program is not None
    return row | {
        "block": blocks.size,
        "parts": blocks.parts,
        "vmem_estimated_mib": vmem_needed(blocks) / 2**20,
        "vmem_mib": vmem_used(program) / 2**20,
        "vmem_of_chip_mib": (blocks.vmem_bytes or 0) / 2**20,
        "temporaries_mib": memory.temp_size_in_bytes / 2**20,
        "output_mib": memory.output_size_in_bytes / 2**20,
        "compile_seconds": seconds,
    }


def vmem_used(program: str) -> int:
    """Bytes of on-chip memory of the largest Pallas kernel of a compiled program, as its text states them."""
    kernels = [line for line in program.splitlines() if "tpu_custom_call" in line]
    sizes = [
        int(size)
        for line in kernels
        for size in re.findall(
            r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"', line
        )
    ]
    if not sizes:
        raise ValueError("the compiled program states no on-chip memory of a Pallas kernel; expected one kernel")
    return max(sizes)


def rows(chips: list[str]) -> Iterator[dict]:
    for chip in chips:
        for P in (20, 8, 4, 2):
            for backward in (False, True):
                yield measure(chip, P, max(1, 8192 // (2 * P * P)), backward=backward)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", default=",".join(TOPOLOGIES))
    RESULTS.parent.mkdir(exist_ok=True)
    stamp = {"jax": jax.__version__, "libtpu": importlib.metadata.version("libtpu"), "date": datetime.date.today()}
    print("B = 1, N = 8192, H = 20, d = 128, bfloat16, compiled and not run;", *(f"{k} {x}" for k, x in stamp.items()))
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in rows(parser.parse_args().chips.split(",")):
            cells = {key: f"{x:.2f}" if isinstance(x, float) else x for key, x in row.items()}
            writer.writerow(cells | stamp)
            print("  ".join(f"{key} {x}" for key, x in cells.items()), flush=True)


if __name__ == "__main__":
    main()
