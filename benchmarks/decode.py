"""Decoding with a cache: tokens a second and cache bytes of the IHA hybrid, global MHA and Global+Local.

    python -m benchmarks.decode --contexts=1024,4096,8192

Models of one size (width 512, 8 heads of 64, 5 layers, P = 8), float32, differing in their layers alone: five of global
MHA; four of local MHA (512 tokens) and a global one; four of local IHA (W = N / (2 P^2) tokens) and a global MHA one.
Caches are full: the last tokens of the context are decoded, one a row and step, greedily, in turn A B C, A B C.
Bars: the hybrid's cache at most 0.35 of global MHA's at 8192 tokens, its tokens/s at least MHA's from 4096 on.
"""

import argparse
import csv
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.flags import integers
from benchmarks.report import environment, file_stem
from benchmarks.timing import Spread, interleaved, paired_ratio, seconds_of
from configs import base
from iha_jax.accounting import cache_bytes
from iha_jax.config import ModelConfig, resolve
from iha_jax.evaluation.decoding.transformer import Caches, Decoder, prefill
from iha_jax.model import initialize

ARMS = {
    "global": ("mha",) * 5,
    "global_local": ("mha_local",) * 4 + ("mha",),
    "iha": ("iha_local",) * 4 + ("mha",),
}
COLUMNS: tuple[str, ...] = (
    "context",
    "arm",
    "batch",
    "cache_bytes",
    "of_global",
    "tokens_per_second",
    "lower",
    "upper",
    "speedup",
)


def model_of(arm: str, context: int, dtype: str) -> ModelConfig:
    config: Any = base.get_config()
    config.model.update(vocab_size=257, context_length=context, width=512, num_layers=5, num_heads=8, mlp_width=2048)
    config.model.update(layer_pattern=ARMS[arm], window=min(512, context), compute_dtype=dtype)
    config.model.iha.update(pseudo_heads=8, window=0)  # 0: N / (2 P^2)
    config.training.loss_chunk = 0
    return resolve(config).model


def decode(config: ModelConfig, steps: int, parameters: Any, caches: Caches, tokens_B: jax.Array) -> Any:
    """`steps` greedy tokens a row up to the end of the context, and the caches."""
    decoder = Decoder(config, parameters)

    def body(carry: Any, position: jax.Array) -> tuple[Any, None]:
        caches, tokens_B = carry
        logits_BV, caches = decoder.step(caches, tokens_B, jnp.full_like(tokens_B, position))
        return (caches, jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)), None

    positions = jnp.arange(config.context_length - steps, config.context_length)
    return jax.lax.scan(body, (caches, tokens_B), positions)[0]


def full_caches(config: ModelConfig, parameters: Any, batch: int) -> Caches:
    """Caches of the shapes that `prefill` makes, all slots filled with random numbers."""
    tokens, lengths = np.zeros((batch, 1), np.int32), np.ones(batch, np.int32)
    shapes = jax.eval_shape(
        functools.partial(prefill, config, length=config.context_length), parameters, tokens, lengths
    )[1]
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten([jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, leaves, strict=True)])


def run_of(config: ModelConfig, batch: int, steps: int) -> Callable[[], float]:
    """A function that decodes `steps` tokens a row in the same caches again and returns its seconds."""
    parameters = jax.jit(functools.partial(initialize, config))(jax.random.key(0))
    caches = full_caches(config, parameters, batch)
    held = sum(x.nbytes for x in jax.tree.leaves(caches))
    assert held == cache_bytes(config, batch, config.context_length), held
    state = [caches, jnp.zeros(batch, jnp.int32)]
    run = jax.jit(functools.partial(decode, config, steps), donate_argnums=1)
    program = run.lower(parameters, *state).compile()
    memory = program.memory_analysis()
    temporaries = 0 if memory is None else memory.temp_size_in_bytes
    print(f"N = {config.context_length}: cache {held / 2**20:.1f} MiB, temporaries {temporaries / 2**20:.1f} MiB")

    def again() -> float:
        def step() -> Any:
            state[:] = program(parameters, *state)
            return state

        return seconds_of(step)

    again()
    return again


def measure(context: int, flags: argparse.Namespace) -> list[dict[str, Any]]:
    models = {arm: model_of(arm, context, flags.dtype) for arm in ARMS}
    runs = {arm: run_of(model, flags.batch, flags.steps) for arm, model in models.items()}
    seconds = interleaved(runs, flags.repetitions)
    rows = []
    for arm, model in models.items():
        spread, tokens = Spread.of(seconds[arm]), flags.batch * flags.steps
        held = cache_bytes(model, flags.batch, context)
        values = (
            held,
            round(held / cache_bytes(models["global"], flags.batch, context), 4),
            *(round(tokens / s, 1) for s in (spread.median, spread.upper, spread.lower)),
            round(1 / paired_ratio(seconds[arm], seconds["global"]), 3),
        )
        rows.append(dict(zip(COLUMNS, (context, arm, flags.batch, *values), strict=True)))
        print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=integers, default=[1024, 4096, 8192], help="N, N, ...")
    parser.add_argument("--batch", type=int, default=4, help="rows decoded together")
    parser.add_argument("--steps", type=int, default=16, help="tokens a row and call")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repetitions", type=int, default=11, help="rounds of A B C")
    parser.add_argument("--out_dir", type=Path, default=Path(__file__).parent / "results")
    flags = parser.parse_args()
    found = environment(math.nan)  # no matmul is the yardstick here: a step reads weights and caches
    facts = {name: found[name] for name in ("date", "device", "jax")} | {"dtype": flags.dtype}
    print(", ".join(facts.values()))
    rows = [facts | row for context in flags.contexts for row in measure(context, flags)]
    path = flags.out_dir / f"{file_stem('decode', facts)}.csv"
    with path.open("w", newline="") as file:
        writer: Any = csv.DictWriter(file, [*facts, *COLUMNS])
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
