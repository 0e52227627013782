"""Time and memory of a whole training step: forward, backward, clipping, AdamW; ours beside a plain PyTorch GPT.

    python -m benchmarks.train_step                  D = 128, a minute or two on 2 CPU cores
    python -m benchmarks.train_step --preset=cpu     D = 256, 5 layers, N = 512, P = 4, float32
    python -m benchmarks.train_step --preset=350m    350 M parameters, N = 2048, P = 4, bfloat16: accelerators

Flags after a preset replace its values. The hybrid of the paper is four local IHA layers, then a global MHA layer.
Before timing, every candidate's losses over its first steps are compared with those of a trusted implementation from
the same weights on the same batch; one that disagrees is reported as wrong and not timed.
"""

import argparse
import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch's workers share the accelerator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import report
from benchmarks.candidates import our_names
from benchmarks.flags import add_common, cross
from benchmarks.harness import (
    OUR_PREFIX,
    Arrays,
    Candidate,
    Limits,
    Prepared,
    Row,
    chosen,
    measure,
    say,
    with_costs,
    xla_temporary_bytes,
)
from benchmarks.rivals import Skip
from benchmarks.timing import matmul_rate, seconds_of
from benchmarks.torch_process import CPU_MEMORY, TorchPrepared
from configs import base
from iha_jax.accounting import training_flops_per_token
from iha_jax.config import IHA_KINDS, Config, resolve
from iha_jax.executed import executed_flops_per_token
from iha_jax.model import initialize
from iha_jax.training.optimizer import make_optimizer
from iha_jax.training.step import initial_state, make_train_step

# An arm is a layer pattern; add one with a line.
ARMS = {
    "mha": ("mha",),
    "iha": ("iha_local",) * 4 + ("mha",),
    "global_local": ("mha_local",) * 4 + ("mha",),
}
PRESETS = {
    "small": {"tokens": [256, 128, 512], "pseudo_heads": [4, 2], "width": 128, "heads": 4},
    "cpu": {"tokens": [512, 256, 1024], "pseudo_heads": [4, 2, 8]},
    "350m": {
        **{"tokens": [2048], "pseudo_heads": [4], "batch": 8, "layers": 24, "width": 1024, "heads": 16},
        **{"vocabulary": 50304, "dtype": "bfloat16", "remat": "full"},
    },
}
HEADLINES = (("iha · ours", "mha · ours"), ("mha · ours", "mha · torch"), ("iha · ours", "mha · torch"))
CHECKED_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Step:
    """One size of model and batch."""

    batch: int
    tokens: int
    layers: int
    width: int
    heads: int
    pseudo_heads: int
    vocabulary: int
    dtype: str
    remat: str
    segments: bool

    @property
    def title(self) -> str:
        packed = "packed segments" if self.segments else "no segments"
        return (
            f"B = {self.batch}, N = {self.tokens}, {self.layers} layers, D = {self.width}, H = {self.heads}, "
            f"P = {self.pseudo_heads}, V = {self.vocabulary}, {self.dtype}, remat {self.remat}, {packed}"
        )


def config_of(step: Step, arm: str, mha: str = "auto", iha: str = "auto") -> Config:
    """`mha` and `iha`: implementations of the layers of these kinds."""
    config: Any = base.get_config()
    config.model.update(
        vocab_size=step.vocabulary,
        context_length=step.tokens,
        width=step.width,
        num_layers=step.layers,
        num_heads=step.heads,
        mlp_width=4 * step.width,
        compute_dtype=step.dtype,
        remat=step.remat,
        layer_pattern=ARMS[arm],
        window=min(512, max(1, step.tokens // 4)),
    )
    config.model.iha.pseudo_heads = step.pseudo_heads
    config.model.implementation, config.model.iha.implementation = mha, iha
    config.data.document_attention = step.segments
    config.training.update(batch_size=step.batch, steps=1_000_000, eval_batch_size=1)
    config.optimizer.update(warmup_steps=0, final_fraction=1.0)  # a constant learning rate
    return resolve(config)


def batch_of(step: Step) -> Arrays:
    """Random tokens, every one counted; with segments, each row is two documents."""
    tokens = np.random.default_rng(0).integers(0, step.vocabulary, (step.batch, step.tokens + 1))
    batch: Arrays = {"inputs": tokens[:, :-1].astype(np.int32), "targets": tokens[:, 1:].astype(np.int32)}
    batch["loss_mask"] = np.ones(batch["inputs"].shape, np.float32)
    ids = 1 + (np.arange(step.tokens) >= step.tokens // 3) * step.segments
    batch["segment_ids"] = np.broadcast_to(ids, batch["inputs"].shape).astype(np.int32)
    return batch


def loss_names() -> list[str]:
    return ["loss", *(f"loss of run {i}" for i in range(1, CHECKED_STEPS))]


class OurStep:
    """Our jitted training step, its state donated from call to call."""

    def __init__(self, config: Config, step: Step, limits: Limits):
        optimizer = make_optimizer(config.optimizer, config.training.steps)
        self._batch = {name: jnp.asarray(x) for name, x in batch_of(step).items()}
        function = jax.jit(make_train_step(config, optimizer), donate_argnums=0)
        make_state = functools.partial(initial_state, config, optimizer)
        try:
            self._compiled = function.lower(jax.eval_shape(make_state), self._batch).compile()
        except (ValueError, NotImplementedError) as error:
            raise Skip(f"does not compile here: {error}") from error
        needed = self.temporary_bytes() or 0
        if needed > limits.memory_bytes:
            raise Skip(f"needs {needed / 2**30:.1f} GiB of temporaries, limit {limits.memory_bytes / 2**30:.1f}")
        self._state = jax.jit(make_state)()

    def _advance(self) -> Mapping[str, jax.Array]:
        self._state, metrics = self._compiled(self._state, self._batch)
        return metrics

    def _step(self) -> Any:
        self._advance()
        return self._state

    def results(self) -> Arrays:
        return {name: np.asarray(self._advance()["loss"], np.float32) for name in loss_names()}

    def run(self) -> float:
        return seconds_of(self._step)

    def temporary_bytes(self) -> int | None:
        return xla_temporary_bytes(self._compiled)

    def close(self) -> None:
        self._state = None


def torch_step(step: Step, limits: Limits, *, compiled: bool) -> Prepared:
    """A plain PyTorch GPT with our `mha` arm's initial weights, batch and optimizer settings."""
    if step.segments:
        raise Skip("the plain PyTorch GPT has no packed segments")
    config = config_of(step, "mha")
    parameters = jax.device_get(initialize(config.model, jax.random.key(config.seed)))
    block = parameters["groups"]["block_0"]  # every leaf has a leading axis: the layers
    arrays = {name: block["attention"][name] for name in ("query", "key", "value", "output")}
    arrays |= {"up": block["mlp"]["up"], "down": block["mlp"]["down"], "embedding": parameters["embedding"]}
    arrays |= {name: block[name]["scale"] for name in ("attention_norm", "mlp_norm")}
    arrays["final_norm"] = parameters["final_norm"]["scale"]
    arrays |= {name: batch_of(step)[name] for name in ("inputs", "targets")}
    model, optimizer = config.model, config.optimizer
    request = {"heads": step.heads, "rope_theta": model.rope_theta, "norm_epsilon": model.norm_epsilon}
    request |= {name: getattr(optimizer, name) for name in ("learning_rate", "beta1", "beta2", "epsilon")}
    request |= {"weight_decay": optimizer.weight_decay, "clip_norm": optimizer.clip_norm}
    request |= {"dtype": step.dtype, "compiled": compiled, "checked_runs": CHECKED_STEPS}
    return TorchPrepared("gpt", arrays, request, limits)


def _varied(arm: str) -> str:
    """Whose implementation is varied in an arm: that of its IHA layers where it has any, else of its MHA layers."""
    return "iha" if any(kind in IHA_KINDS for kind in ARMS[arm]) else "mha"


def ours(arm: str, implementation: str, limits: Limits) -> Candidate:
    def prepare(step: Step) -> Prepared:
        try:
            config = config_of(step, arm, **{_varied(arm): implementation})
        except ValueError as error:
            raise Skip(str(error).splitlines()[-1].strip(" -")) from error
        return OurStep(config, step, limits)

    return Candidate(arm, f"{OUR_PREFIX}{implementation}", prepare)


def registry(limits: Limits) -> list[Candidate]:
    """All candidates, whether or not they can run here; our `reference` is for tests and left out."""
    plain = functools.partial(torch_step, limits=limits)
    return [
        *(ours(arm, name, limits) for arm in ARMS for name in our_names(_varied(arm)) if name != "reference"),
        Candidate("mha", "torch GPT", functools.partial(plain, compiled=False), CPU_MEMORY),
        Candidate("mha", "torch GPT compiled", functools.partial(plain, compiled=True), CPU_MEMORY),
    ]


def executed_flops(step: Step, arm: str, implementation: str) -> float | None:
    """What a step computes, recomputation included; None under remat, which decides itself what to recompute."""
    if step.remat != "none":
        return None
    model = config_of(step, arm, **{_varied(arm): implementation}).model
    rows = executed_flops_per_token(model, batch_size=step.batch, training=True, segments=step.segments)
    return step.batch * step.tokens * rows.total


def trusted_losses(step: Step, arm: str) -> Arrays:
    """First losses in float32 with the implementation that the tests compare with the reference."""
    with jax.default_matmul_precision("highest"):
        exact = replace(step, dtype="float32")
        limits = Limits(memory_bytes=2**60, run_seconds=np.inf)
        trusted = OurStep(config_of(exact, arm, "blockwise", "streaming"), exact, limits)
        results = trusted.results()
        trusted.close()
    return results


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=257)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--remat", choices=("none", "full", "dots"), default="none")
    parser.add_argument("--segments", action="store_true", help="rows of two documents that do not see each other")
    add_common(parser)
    given = parser.parse_args(arguments)
    parser.set_defaults(**PRESETS[given.preset])
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    flags = parse(arguments)
    limits = Limits(memory_bytes=int(flags.memory_gib * 2**30), run_seconds=flags.run_seconds)
    facts = report.environment(matmul_rate(flags.dtype, flags.matmul_size))
    say(report.heading(facts))
    rows: list[Row] = []
    swept = ("tokens", "pseudo_heads")
    fixed: dict[str, Any] = {name: getattr(flags, name) for name in Step.__dataclass_fields__ if name not in swept}
    for N, P in cross(flags.tokens, flags.pseudo_heads):
        step = Step(tokens=N, pseudo_heads=P, **fixed)
        say(step.title)
        picked = chosen(registry(limits), flags.only, flags.without)
        trusted = {arm: trusted_losses(step, arm) for arm in {c.group for c in picked}}
        mine = measure(
            picked,
            step,
            trusted,
            tolerance=2e-2 if step.dtype == "bfloat16" else 1e-3,
            limits=limits,
            repetitions=flags.repetitions,
        )
        tokens = step.batch * step.tokens
        flops = {arm: tokens * training_flops_per_token(config_of(step, arm).model) for arm in trusted}
        executed = functools.partial(executed_flops, step)
        mine = with_costs(mine, flops.__getitem__, lambda arm: None, executed)
        rates = [f"  {r.label}: {tokens / r.seconds.median:,.0f} tokens/s" for r in mine if r.seconds]
        lines = [line for pair in HEADLINES if (line := report.headline(mine, *pair))]
        print("\n".join(["", report.table(step.title, mine, facts), *rates, *lines]), flush=True)
        rows += mine
        jax.clear_caches()
    print("\n" + report.heading(facts))
    print(report.finish("train_step", rows, facts, flags.out_dir))
    return rows


if __name__ == "__main__":
    main()
