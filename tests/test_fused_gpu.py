"""The fused GPU kernels, interpreted on the CPU, equal the reference, forward and gradients; they lower for CUDA."""

import contextlib
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from iha_jax.ops import interleaved_head_attention
from iha_jax.ops.pallas import interleaved_gpu_backward
from iha_jax.ops.pallas.interleaved_gpu import block_tokens, fused_interleaved_attention
from iha_jax.ops.pallas.interleaved_gpu_blocks import Blocks, Source

B, N, D, E = 2, 13, 6, 5  # batch, tokens, head width, value width
SEGMENTS = np.asarray([[1] * 4 + [2] * 6 + [0] * 3, [0, 7, 7, 7, 7, 7, 3, 3, 3, 3, 3, 3, 3]])
enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
PLAIN = dict(
    causal=True, causality="virtual", window=3, rope_theta=100.0, rope_positions="virtual", segment_ids=None
)  # fmt: skip


def arguments_of(H, K, P, collapse="global", dtype=jnp.float32, tokens=N, widths=(D, E)):
    rng = np.random.default_rng(0)
    d, e = widths
    shapes = [(B, tokens, H, d), (B, tokens, K, d), (B, tokens, K, e), (H, H, P), (K, H, P), (K, H, P)]
    shapes.append((H, H, P) if collapse == "global" else (H, P))
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def fused(*arguments, block=None, **settings):
    q, k, v, *mixing = arguments
    return fused_interleaved_attention(q, k, v, tuple(mixing), **settings, interpret=True, block=block)


def value_and_gradients(function, arguments):
    def loss(*arguments):
        out = function(*arguments)
        weights = np.random.default_rng(1).normal(size=out.shape)
        return jnp.sum(out * jnp.asarray(weights, out.dtype), dtype=jnp.promote_types(out.dtype, jnp.float32)), out

    gradients, out = jax.jit(jax.grad(loss, argnums=tuple(range(7)), has_aux=True))(*arguments)
    return [np.asarray(x.astype(jnp.promote_types(x.dtype, jnp.float32))) for x in (out, *gradients)]


def errors(got, expected):
    assert [x.shape for x in got] == [x.shape for x in expected]
    return [float(np.linalg.norm(x - y) / np.linalg.norm(y)) for x, y in zip(got, expected, strict=True)]


def check(arguments, block, segments, **settings):
    settings = PLAIN | settings | dict(segment_ids=jnp.asarray(SEGMENTS) if segments else None)
    slow = functools.partial(interleaved_head_attention, **settings, implementation="reference")
    with enable_x64(True):
        expected = value_and_gradients(slow, [jnp.asarray(np.asarray(x), jnp.float64) for x in arguments])
    assert (
        max(errors(value_and_gradients(functools.partial(fused, block=block, **settings), arguments), expected)) < 1e-5
    )


# A covering design: every value of every switch. Windows smaller and larger than the block, blocks of one token, of all
# tokens and by the rule, rows in one piece and in several, sequences that end inside a block.
CASES = [
    # H, K, P, collapse, causal, causality, window, rope_positions, segments, block
    (4, 2, 3, "global", True, "virtual", 3, "virtual", True, 2),
    (3, 3, 2, "per_head", True, "token", 5, "token", False, 5),
    (5, 1, 2, "global", False, "token", 2, None, True, 7),
    (2, 2, 1, "per_head", True, "virtual", 4, "virtual", False, None),
    (2, 1, 3, "global", False, "virtual", 4, "virtual", True, 3),
    (1, 1, 17, "global", True, "virtual", None, "virtual", True, 1),
]
MORE = [
    (3, 3, 2, "per_head", True, "virtual", 1, "token", False, 5),
    (4, 4, 2, "per_head", True, "token", 5, "virtual", True, 3),
    (7, 1, 3, "global", True, "token", 2, None, True, 7),
    (2, 2, 5, "global", True, "virtual", 12, None, True, None),
    (4, 2, 2, "global", False, "token", None, "token", True, 4),
    (2, 1, 17, "global", True, "virtual", None, "virtual", False, 1),
]


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE)], ids=str)
def test_equals_reference(case, monkeypatch):
    monkeypatch.setattr(interleaved_gpu_backward, "program_count", lambda blocks, *_: -(-blocks.count // 2))
    H, K, P, collapse, causal, causality, window, rope, segments, block = case
    check(
        arguments_of(H, K, P, collapse),
        block,
        segments,
        causal=causal,
        causality=causality,
        window=window,
        rope_theta=rope and 100.0,
        rope_positions=rope or "virtual",
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("causal", "causality", "window", "rope", "block", "share"),
    [
        (*case, *blocks)
        for case in itertools.product([True, False], ["virtual", "token"], [1, 3, 7, None], ["virtual", None])
        for blocks in [(1, 3), (3, 2)]
    ],
)
def test_equals_reference_on_every_combination(causal, causality, window, rope, block, share, monkeypatch):
    monkeypatch.setattr(interleaved_gpu_backward, "program_count", lambda blocks, *_: -(-blocks.count // share))
    settings = dict(causal=causal, causality=causality, window=window, rope_theta=rope and 100.0)
    check(arguments_of(4, 2, 3), block, True, **settings)


def test_padding_gets_exactly_nothing_and_rows_of_the_batch_do_not_meet():
    arguments = arguments_of(2, 1, 3)
    settings = PLAIN | dict(segment_ids=jnp.asarray(SEGMENTS))
    clean = value_and_gradients(functools.partial(fused, **settings), arguments)
    padding = SEGMENTS == 0
    for x in clean[:4]:
        assert np.all(x[padding] == 0)
        assert np.all(np.any(x[~padding] != 0, axis=-1))
    poisoned = [x.at[1].set(jnp.nan) for x in arguments[:3]] + arguments[3:]
    got = value_and_gradients(functools.partial(fused, **settings), poisoned)
    for x, y in zip(got[:4], clean[:4], strict=True):
        np.testing.assert_array_equal(x[0], y[0])
        assert np.all(np.isnan(x[1, 1:]))


def test_bfloat16_stays_near_float32():
    arguments = arguments_of(2, 2, 3, dtype=jnp.bfloat16)
    streaming = functools.partial(interleaved_head_attention, **PLAIN, implementation="streaming")
    expected = value_and_gradients(streaming, [x.astype(jnp.float32) for x in arguments])
    got = value_and_gradients(functools.partial(fused, **PLAIN), arguments)
    assert max(errors(got, expected)) < 0.03
    rival = np.asarray(streaming(*arguments), np.float32)
    assert errors(got[:1], expected[:1])[0] < 1.5 * errors([rival], expected[:1])[0]


def test_refuses_a_dtype_it_has_no_kernel_for():
    with pytest.raises(ValueError, match=r"q has dtype float16.*float32 or bfloat16"):
        fused(*arguments_of(2, 2, 3, dtype=jnp.float16), **PLAIN)


def test_the_block_rule():
    assert [block_tokens(8192, P) for P in (1, 2, 8, 20, 64, 100)] == [64, 32, 8, 3, 1, 1]
    assert block_tokens(2, 4) == 2


def test_a_block_leaves_the_rows_of_the_next_block_alone():
    """Interpreted programs run one after another and would hide it; on a GPU they run at once."""
    blocks = Blocks(N, 5, 5, 2, 3, 2, True, "virtual", False, 1.0)
    rows, own = blocks.rows(5), 3 * 5
    assert blocks.rows_of_block(5) > own

    def kernel(rows_ref, E_ref, _, sums_ref):
        tile = (jnp.ones((blocks.X, 16), jnp.float32),)
        for h in range(2):
            Source(blocks, 5, rows_ref, E_ref).add_adjoint(sums_ref, (jnp.int32(0), jnp.int32(0), jnp.int32(h)), tile)

    E = jnp.ones((5, blocks.X, blocks.rows_of_block(5)))
    sums = jnp.full((1, rows, 16), -7.0)
    call = pl.pallas_call(
        kernel, jax.ShapeDtypeStruct(sums.shape, sums.dtype), input_output_aliases={2: 0}, interpret=True
    )
    got = np.asarray(call(jnp.zeros_like(sums), E, sums))[0]
    np.testing.assert_array_equal(got[:own], 2 * blocks.X)
    np.testing.assert_array_equal(got[own:], -7)


def an_h100():
    """What newer versions of jax need to know to lower for a GPU that is not there."""
    sharding = jax.sharding
    if not hasattr(sharding, "AbstractDevice"):
        return contextlib.nullcontext()
    device = sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    return sharding.use_abstract_mesh(sharding.AbstractMesh((), (), abstract_device=device))


@pytest.mark.parametrize(("P", "dtype"), [(20, jnp.bfloat16), (2, jnp.float32)], ids=str)
@pytest.mark.parametrize("differentiated", [False, True])
def test_lowers_for_cuda_with_nothing_as_large_as_the_virtual_sequence(P, dtype, differentiated):
    tokens, H, d = 8192, 20, 128
    shapes = [(1, tokens, H, d)] * 3 + [(H, H, P)] * 4
    window = max(1, tokens // (2 * P**2))

    def out(q, k, v, *mixing):
        return fused_interleaved_attention(q, k, v, mixing, **PLAIN | dict(window=window))

    def loss(*arguments):
        return jnp.sum(out(*arguments).astype(jnp.float32))

    function = jax.grad(loss, argnums=tuple(range(7))) if differentiated else out
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    with an_h100():
        text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    kernels = ["backward_keys", "backward_queries", "forward"] if differentiated else ["forward"]
    assert sorted(re.findall(r'name = "interleaved_attention_(\w+)"', text)) == kernels
    sizes = {
        math.prod(map(int, found.rstrip("x").split("x"))) for found in re.findall(r"tensor<((?:\d+x)+)[fbi]", text)
    }
    assert tokens * H * d <= max(sizes) <= (2 if differentiated else 1) * 1.01 * tokens * H * d
