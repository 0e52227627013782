"""What kernels execute: XLA does not see into them, so their products are counted as they run, interpreted.

Every product that a kernel makes reports its FLOPs when it runs, in whatever loop or condition it stands. The sum has
to be the closed form's, exactly: element-wise work is in neither.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

from iha_jax.accounting import layer_pairs
from iha_jax.executed import attention_flops, layer_work
from iha_jax.executed.fused import fused_gpu_work, fused_tpu_work
from iha_jax.executed.kernels import CUDNN_TILE, cudnn_work, splash_work, visible_blocks
from iha_jax.executed.xla import Work
from iha_jax.ops import splash, target_platform
from iha_jax.ops.pallas import (
    interleaved_gpu,
    interleaved_gpu_backward,
    interleaved_gpu_blocks,
    interleaved_gpu_forward,
    interleaved_tpu,
    interleaved_tpu_backward,
    interleaved_tpu_forward,
    interleaved_tpu_head,
)
from tests.test_executed import model_of


class Counter:
    """Makes products report what they compute: `2 m n k` FLOPs."""

    def __init__(self):
        self.flops = 0

    def counting(self, product):
        def run(a, b, *rest, **options):
            out = product(a, b, *rest, **options)
            contracted = math.isqrt(a.size * b.size // out.size)
            assert contracted**2 * out.size == a.size * b.size  # two matrices: m k, k n, m n
            jax.debug.callback(functools.partial(self.add, 2 * out.size * contracted))
            return out

        return run

    def add(self, flops):
        self.flops += flops

    def of(self, function, *arrays):
        jax.block_until_ready(jax.jit(function)(*arrays))
        jax.effects_barrier()
        return self.flops


class Lax:
    """`jax.lax` whose products report."""

    def __init__(self, counter):
        self.dot_general, self.dot = counter.counting(jax.lax.dot_general), counter.counting(jax.lax.dot)

    def __getattr__(self, name):
        return getattr(jax.lax, name)


@pytest.fixture
def counter(monkeypatch):
    counter = Counter()
    dot, product = counter.counting(interleaved_tpu_head.dot), counter.counting(interleaved_gpu_blocks.product)
    for module in (interleaved_tpu_head, interleaved_tpu_forward, interleaved_tpu_backward):
        monkeypatch.setattr(module, "dot", dot)
    for module in (interleaved_gpu_blocks, interleaved_gpu_forward, interleaved_gpu_backward):
        monkeypatch.setattr(module, "product", product)
    monkeypatch.setattr(splash_attention_kernel, "lax", Lax(counter))
    return counter


def normal(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def step_of(function, training):
    if not training:
        return function
    return lambda *arrays: jax.grad(lambda *a: jnp.sum(jnp.sin(function(*a))), tuple(range(len(arrays))))(*arrays)


H, K, d, e = 4, 2, 6, 5


def flops(work: Work, P: int) -> float:
    """Of one row; a global collapse. `Work` counts values by d numbers; here they have e."""
    scores = d * (H * work.scores + P * (work.queries * H * H + work.keys * K * H))
    sums = e * (H * work.sums + P * (work.values * K * H + work.collapsed * H * H))
    return 2 * (scores + sums)


CASES = [
    # N, P, causal, causality, window, block
    (11, 3, True, "virtual", 3, 2),
    (11, 2, True, "token", 4, 3),
    (13, 3, False, "virtual", 2, 2),
    (8, 1, True, "virtual", None, 4),
    (7, 2, False, "token", None, None),
]


def settings_of(causal, causality, window):
    rope = dict(rope_theta=100.0, rope_positions="virtual")
    return dict(causal=causal, causality=causality, window=window, **rope)


def arrays_of(N, P, batch):
    return normal((batch, N, H, d), (batch, N, K, d), (batch, N, K, e), (H, H, P), (K, H, P), (K, H, P), (H, H, P))


FAST = (CASES[0], 1, True)
GRID = [
    pytest.param(*one, marks=() if one == FAST else pytest.mark.slow)
    for one in itertools.product(CASES, (1, 2), (False, True))
]


@pytest.mark.parametrize(("case", "batch", "training"), GRID, ids=str)
def test_fused_on_tpu(counter, case, batch, training):
    """With an odd batch, two parts that both compute the blocks between them."""
    N, P, *masks, block = case
    settings, (q, k, v, *mixing) = settings_of(*masks), arrays_of(N, P, batch)

    def attend(*arrays):
        options = dict(segment_ids=None, interpret=True, block=block)
        return interleaved_tpu.fused_interleaved_attention(*arrays[:3], arrays[3:], **settings, **options)

    blocks = interleaved_tpu.plan((q, k, v), P, **settings, interpret=True, block=block)
    got = counter.of(step_of(attend, training), q, k, v, *mixing)
    assert got == pytest.approx(batch * flops(fused_tpu_work(blocks, training=training), P), rel=1e-12)


@pytest.mark.parametrize(("case", "batch", "training"), GRID, ids=str)
def test_fused_on_gpu(counter, case, batch, training):
    N, P, *masks, block = case
    settings, (q, k, v, *mixing) = settings_of(*masks), arrays_of(N, P, batch)

    def attend(*arrays):
        options = dict(segment_ids=None, interpret=True, block=block)
        return interleaved_gpu.fused_interleaved_attention(*arrays[:3], arrays[3:], **settings, **options)

    blocks = interleaved_gpu.plan((q, k, v), P, **settings, block=block)
    work = fused_gpu_work(blocks, width=d, value_width=e, training=training)
    got = counter.of(step_of(attend, training), q, k, v, *mixing)
    assert got == pytest.approx(batch * flops(work, P), rel=1e-12)


@pytest.mark.parametrize(
    ("N", "window", "causal", "training"),
    [
        (257, 100, True, True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [(257, None, True, False), (131, None, False, True), (641, 100, True, True)]
        ),
    ],
)
def test_splash(counter, N, window, causal, training):
    def attend(*arrays):
        return splash.splash_attention(*arrays, causal=causal, window=window, segment_ids=None, interpret=True)

    work = splash_work(N, window, causal=causal, training=training)
    got = counter.of(step_of(attend, training), *normal((2, N, H, d), (2, N, K, d), (2, N, K, e)))
    assert got == 2 * flops(work, 0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("N", "size"), [(13, 1), (13, 3), (12, 4), (5, 7)])
def test_visible_blocks_by_looking_at_every_pair(N, size, causal):
    distance = np.arange(N)[:, None] - np.arange(N)
    for window in (None, 1, 2, 3, 4, 7, 12):
        seen = np.abs(distance) < (window or N)
        seen &= (distance >= 0) | (not causal)
        starts = range(0, N, size)
        blocks = sum(seen[i : i + size, j : j + size].any() for i in starts for j in starts)
        assert visible_blocks(N, size, window, causal=causal) == blocks


def test_cudnn_computes_whole_tiles():
    """1000 tokens: 8 tiles. Causal, 36 of 64; with a window of 130 tokens a tile sees itself and two before it, with
    129 one."""
    for window, tiles in ((None, 36), (130, 8 + 7 + 6), (129, 8 + 7)):
        work = cudnn_work(1000, window)
        assert work == Work(tiles * CUDNN_TILE**2, tiles * CUDNN_TILE**2)
        training = cudnn_work(1000, window, training=True)
        assert (training.scores, training.sums) == (4 * work.scores, 3 * work.sums)
    assert cudnn_work(1000, None, causal=False).scores == 64 * CUDNN_TILE**2


def test_layers_ask_for_the_kernel_that_runs_them():
    model = dataclasses.replace(model_of(("mha",)), compute_dtype="bfloat16", context_length=256, window=100)
    with target_platform("tpu", chip="v5p"):
        assert layer_work(model, "mha_local") == splash_work(256, 100)
        wide = layer_work(model, "differential", training=True)
        once = splash_work(256, None, training=True)
        assert (wide.scores, wide.sums) == (once.scores, 2 * once.sums)
        assert layer_work(dataclasses.replace(model, causal=False), "mha") == splash_work(256, None, causal=False)
    with target_platform("gpu"):
        assert layer_work(model, "mha", segments=False) == cudnn_work(256, None)
        twice = layer_work(model, "differential", segments=False)
        assert (twice.scores, twice.sums) == (2 * cudnn_work(256, None).scores, 2 * cudnn_work(256, None).sums)


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_a_fused_layer(platform):
    """Never less than what is visible, and a per-head collapse costs what a global one does."""
    model = dataclasses.replace(model_of(("iha_local",)), compute_dtype="bfloat16")
    changed = {"implementation": "fused"}
    per_head, whole = (
        dataclasses.replace(model, iha=dataclasses.replace(model.iha, collapse=collapse, **changed))
        for collapse in ("per_head", "global")
    )
    with target_platform(platform, chip="v5p" if platform == "tpu" else None):
        work = layer_work(whole, "iha_local", training=True)
        assert min(work.scores, work.sums) > 3 * layer_pairs(model, "iha_local")
        flops = [attention_flops(m, layer_work(m, "iha_local", training=True)) for m in (per_head, whole)]
        assert flops[0] == flops[1]
