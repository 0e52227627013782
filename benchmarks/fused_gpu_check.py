"""The fused GPU kernel against everything else, on a machine with an NVIDIA GPU, in one run.

    python -m benchmarks.fused_gpu_check                # the paper's shape, P = 20, 8, 4, 2
    python -m benchmarks.fused_gpu_check --rehearse     # anywhere: tiny shapes on the CPU; its times mean nothing

First parity: output and seven gradients against streaming in float32, over a few shapes and at the shape to be timed.
Then time, forward and backward, medians and quartiles of rounds in which the candidates take turns:

    fused       iha_jax's kernel                        streaming   iha_jax's XLA form
    naive       the virtual sequence written out, through jax.nn.dot_product_attention(implementation="cudnn")
    mha         cuDNN's causal multi-head attention of the same N, H, d: what IHA is to cost

Exit code 0 when parity holds, 1 when it does not, 2 when there is no GPU.
"""

import argparse
import csv
import functools
import sys
import time
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from iha_jax.ops import apply_rope, collapse_heads, interleave, mix_heads
from iha_jax.ops.pallas.interleaved_gpu import fused_interleaved_attention
from iha_jax.ops.streaming import streaming_interleaved_attention

ROPE_THETA = 500_000.0
BOUNDS = {"float32": 1e-4, "bfloat16": 0.03}  # of the relative error against streaming in float32
PARITY = [  # N, H, K, P, d, window
    (257, 4, 2, 3, 64, 7),
    (300, 20, 20, 20, 128, 10),
    (512, 8, 8, 8, 128, 64),
    (512, 8, 4, 2, 64, None),
]


def window_of(N: int, P: int) -> int:
    """The paper's FLOP match."""
    return max(1, N // (2 * P**2))


def make_arguments(B: int, N: int, H: int, K: int, P: int, d: int, dtype: str) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), 7)
    shapes = [(B, N, H, d), (B, N, K, d), (B, N, K, d), (H, H, P), (K, H, P), (K, H, P), (H, H, P)]
    scales = [1.0] * 3 + [H**-0.5] * 3 + [(H * P) ** -0.5]
    return [(jax.random.normal(k, s) * x).astype(dtype) for k, s, x in zip(keys, shapes, scales, strict=True)]


def iha(attend: Callable, window: int | None) -> Callable:
    def run(q: jax.Array, k: jax.Array, v: jax.Array, *mixing: jax.Array) -> jax.Array:
        return attend(
            q, k, v, mixing, causal=True, causality="virtual", window=window, rope_theta=ROPE_THETA,
            rope_positions="virtual", segment_ids=None,
        )  # fmt: skip

    return run


def naive(implementation: Literal["xla", "cudnn"], window: int) -> Callable:
    def run(q, k, v, alpha_q, alpha_k, alpha_v, collapse):
        B, N, H, d = q.shape
        P = alpha_q.shape[-1]
        q, k, v = (interleave(mix_heads(x, a)) for x, a in ((q, alpha_q), (k, alpha_k), (v, alpha_v)))
        q, k = (apply_rope(x, theta=ROPE_THETA) for x in (q, k))
        out = jax.nn.dot_product_attention(
            q, k, v, is_causal=True, local_window_size=(window * P - 1, 0), implementation=implementation
        )
        return collapse_heads(jnp.swapaxes(out.reshape(B, N, P, H, d), 2, 3), collapse)

    return run


def mha(implementation: Literal["xla", "cudnn"]) -> Callable:
    def run(q, k, v, *_):
        q, k = (apply_rope(x, theta=ROPE_THETA) for x in (q, k))
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)

    return run


def with_gradients(function: Callable) -> Callable:
    def loss(*arguments: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = function(*arguments)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

    return jax.jit(jax.grad(loss, argnums=tuple(range(7)), has_aux=True))


def largest_error(got: tuple, expected: tuple) -> float:
    """The largest relative error of the output and the gradients; NaN counts as infinite."""
    errors = []
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        errors.append(float(np.linalg.norm(x - y) / np.linalg.norm(y)))
    return max(np.inf if np.isnan(x) else x for x in errors)


def parity(shapes: list[tuple], fused: Callable) -> bool:
    print(f"{'N, H, K, P, d, window':32} {'dtype':10} {'largest relative error':>24} {'bound':>8}")
    good = True
    for N, H, K, P, d, window in shapes:
        for dtype, bound in BOUNDS.items():
            arguments = make_arguments(2 if N < 2048 else 1, N, H, K, P, d, dtype)
            with jax.default_matmul_precision("highest"):
                expected = with_gradients(iha(streaming_interleaved_attention, window))(
                    *(x.astype(jnp.float32) for x in arguments)
                )
            error = largest_error(with_gradients(iha(fused, window))(*arguments), expected)
            good &= error < bound
            verdict = "" if error < bound else "FAILED"
            print(f"{(N, H, K, P, d, window)!s:32} {dtype:10} {error:24.2e} {bound:8.0e} {verdict}")
    return good


def timed(candidates: dict[str, Callable], arguments: list[jax.Array], rounds: int) -> list[dict]:
    """Median and quartiles in milliseconds, and temporary device memory, of each candidate that runs."""
    ready, rows = {}, []
    for name, function in candidates.items():
        try:
            compiled = with_gradients(function).lower(*arguments).compile()
            jax.block_until_ready(compiled(*arguments))
            ready[name] = compiled
        except Exception as error:  # a rival that cannot run is a line of the table, not the end of it
            print(f"  {name}: does not run here: {type(error).__name__}: {str(error).splitlines()[0][:160]}")
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(rounds):
        for name, compiled in ready.items():
            start = time.perf_counter()
            jax.block_until_ready(compiled(*arguments))
            seconds[name].append(time.perf_counter() - start)
    for name, compiled in ready.items():
        low, median, high = np.percentile(np.asarray(seconds[name]) * 1e3, [25, 50, 75])
        analysis = compiled.memory_analysis()
        temporaries = analysis.temp_size_in_bytes / 2**20 if analysis else float("nan")
        rows.append(dict(name=name, ms=median, low=low, high=high, temporary_mib=temporaries))
    return rows


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=20)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--pseudo_heads", type=int, nargs="+", default=[20, 8, 4, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", help="also write the times to this CSV file")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, interpreted on the CPU")
    return parser.parse_args()


def main() -> int:
    flags = parsed()
    device = jax.devices()[0]
    print(f"device: {device.device_kind} ({device.platform}), jax {jax.__version__}")
    if device.platform != "gpu" and not flags.rehearse:
        print("no GPU: nothing was checked and nothing timed; --rehearse walks through the script on this machine")
        return 2
    fused, cudnn, shapes = fused_interleaved_attention, "cudnn", PARITY
    if flags.rehearse:
        fused, cudnn, shapes = functools.partial(fused, interpret=True), "xla", [(23, 2, 1, 3, 8, 4)]
        flags.tokens, flags.heads, flags.width, flags.pseudo_heads, flags.rounds = 24, 2, 8, [2], 2
    N, H, d = flags.tokens, flags.heads, flags.width
    good = parity([*shapes, *((N, H, H, P, d, window_of(N, P)) for P in flags.pseudo_heads)], fused)
    table = []
    for P in flags.pseudo_heads:
        W = window_of(N, P)
        print(f"\nforward and backward, bfloat16: B = {flags.batch}, N = {N}, H = {H}, d = {d}, P = {P}, W = {W}")
        candidates = {
            "fused": iha(fused, W),
            "streaming": iha(streaming_interleaved_attention, W),
            "naive": naive(cudnn, W),
            "mha": mha(cudnn),
        }
        rows = timed(candidates, make_arguments(flags.batch, N, H, H, P, d, "bfloat16"), flags.rounds)
        base = next((row["ms"] for row in rows if row["name"] == "mha"), float("nan"))
        for row in rows:
            print(
                f"  {row['name']:10} {row['ms']:9.3f} ms [{row['low']:.3f}, {row['high']:.3f}]"
                f"  {row['ms'] / base:6.2f} of mha  {row['temporary_mib']:9.1f} MiB of temporaries"
            )
            table.append(
                dict(device=device.device_kind, jax=jax.__version__, B=flags.batch, N=N, H=H, d=d, P=P, W=W) | row
            )
    if flags.out and table:
        with open(flags.out, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(table[0]))
            writer.writeheader()
            writer.writerows(table)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
