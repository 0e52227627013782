"""Time and memory of one attention layer (without its projections), ours beside public implementations.

    python -m benchmarks.attention                        a few minutes on 2 CPU cores
    python -m benchmarks.attention --preset=cpu           N = 1024, 2048, 4096; P = 8 (and 2, 4 at N = 1024)
    python -m benchmarks.attention --preset=paper         N = 8192, H = P = 20, d = 128, W = 10, bfloat16: accelerators
    python -m benchmarks.attention --preset=memory        the largest N the naive virtual sequence survives in 12 GiB

Flags after a preset replace its values. All candidates of one size are timed in turn, A B C, A B C, ..., after each
has been compared with a trusted result; one that disagrees is reported as wrong and not timed.
"""

import argparse
import functools
import os
from collections.abc import Sequence

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch's workers share the accelerator

import jax

from benchmarks import candidates as attention_candidates
from benchmarks import report, workload
from benchmarks.flags import add_common, cross, names
from benchmarks.harness import Limits, Row, chosen, measure, say, with_costs
from benchmarks.rivals import Skip
from benchmarks.timing import matmul_rate
from benchmarks.workload import Workload, matched_window

PRESETS = {
    "small": {"tokens": [256, 512, 1024], "pseudo_heads": [4, 2, 8]},
    "cpu": {"tokens": [1024, 2048, 4096], "pseudo_heads": [8, 4, 2]},
    "paper": {"tokens": [8192], "pseudo_heads": [20], "heads": 20, "head_width": 128, "dtype": "bfloat16"},
    "memory": {"pseudo_heads": [8], "mechanisms": ["iha_local"], "run_seconds": 600.0},
}
MEMORY_NAIVE = "iha_local · virtual sequence, jax.nn xla"

# Ratios printed under each table: the fastest of the left over the fastest of the right.
HEADLINES = (
    ("iha_local · ours", "mha · ours"),
    ("iha_local · ours", "iha_local · virtual sequence, jax.nn"),
    ("iha_local · ours", "iha_local · virtual sequence, tokamax"),
    ("iha_local · ours", "iha_local · virtual sequence, torch"),
    ("mha · ours", "mha · jax.nn"),
    ("mha · ours", "mha · tokamax"),
    ("mha · ours", "mha · torch"),
)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head_width", type=int, default=32)
    parser.add_argument("--window", type=int, default=0, help="tokens; 0: max(1, N // (2 P^2))")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rope", type=names, default=["virtual"], help="virtual, none or both, for all candidates")
    parser.add_argument("--rope_theta", type=float, default=10_000.0)
    parser.add_argument("--forward_only", action="store_true")
    parser.add_argument("--mechanisms", type=names, default=["mha", "iha_local"], help=", ".join(workload.MECHANISMS))
    add_common(parser)
    given = parser.parse_args(arguments)
    parser.set_defaults(**PRESETS[given.preset])
    flags = parser.parse_args(arguments)
    unknown = (set(flags.mechanisms) - set(workload.MECHANISMS)) | (set(flags.rope) - {"virtual", "none"})
    if unknown:
        parser.error(f"unknown mechanism or rope: {', '.join(sorted(unknown))}")
    return flags


def workloads(flags: argparse.Namespace) -> list[Workload]:
    return [
        Workload(
            batch=flags.batch,
            tokens=N,
            heads=flags.heads,
            head_width=flags.head_width,
            pseudo_heads=P,
            window=min(N, flags.window or matched_window(N, P)),
            dtype=flags.dtype,
            rope_theta=flags.rope_theta if rope == "virtual" else None,
            backward=not flags.forward_only,
        )
        for rope in flags.rope
        for N, P in cross(flags.tokens, flags.pseudo_heads)
    ]


def largest_naive(flags: argparse.Namespace, limits: Limits, step: int = 64) -> int:
    """The largest multiple of `step` tokens at which XLA's analysis of the naive virtual sequence fits the limit."""
    naive = next(c for c in attention_candidates.registry(limits) if c.label == MEMORY_NAIVE)

    def fits(count: int) -> bool:
        flags.tokens = [count * step]
        try:
            naive.prepare(workloads(flags)[0]).close()
        except Skip as reason:
            say(f"  N = {count * step}: {reason}")
            return False
        return True

    if not fits(1):
        raise SystemExit(f"--memory_gib={flags.memory_gib:g} holds not even {step} tokens of the naive form")
    low = 1
    while fits(2 * low):
        low *= 2
    high = 2 * low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * step


def run_one(w: Workload, flags: argparse.Namespace, limits: Limits) -> list[Row]:
    """All chosen candidates at one size."""
    picked = chosen(attention_candidates.registry(limits), flags.only, flags.without)
    if flags.preset == "memory":
        picked = [c for c in picked if "ours" in c.name or c.label == MEMORY_NAIVE]
    picked = [c for mechanism in flags.mechanisms for c in picked if c.group == mechanism]
    trusted = {mechanism: workload.trusted_results(w, mechanism) for mechanism in {c.group for c in picked}}
    baseline = attention_candidates.default_label("mha" if "mha" in flags.mechanisms else flags.mechanisms[0], w)
    rows = measure(
        picked,
        w,
        trusted,
        tolerance=workload.tolerance(w),
        limits=limits,
        repetitions=flags.repetitions,
        baseline=baseline,
    )
    costs = (workload.useful_flops, workload.least_bytes, workload.executed_flops)
    return with_costs(rows, *(functools.partial(cost, w) for cost in costs))


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    flags = parse(arguments)
    limits = Limits(memory_bytes=int(flags.memory_gib * 2**30), run_seconds=flags.run_seconds)
    facts = report.environment(matmul_rate(flags.dtype, flags.matmul_size))
    say(report.heading(facts))
    if flags.preset == "memory" and flags.tokens is None:
        flags.tokens = [largest_naive(flags, limits)]
    rows: list[Row] = []
    for w in workloads(flags):
        say(w.title)
        mine = run_one(w, flags, limits)
        lines = (report.headline(mine, *pair) for pair in HEADLINES)
        print("\n".join(["", report.table(w.title, mine, facts), *(line for line in lines if line)]), flush=True)
        rows += mine
        jax.clear_caches()
    print("\n" + report.heading(facts))
    print(report.finish("attention", rows, facts, flags.out_dir))
    return rows


if __name__ == "__main__":
    main()
