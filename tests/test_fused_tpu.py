"""The fused TPU kernel against the reference: in Pallas's interpret mode; and compiled, where libtpu is."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from iha_jax.ops import interleaved_head_attention, target_platform
from iha_jax.ops.pallas.interleaved_tpu import fused_interleaved_attention, plan
from iha_jax.ops.pallas.interleaved_tpu_blocks import Blocks

N, D, E = 11, 6, 5  # tokens, head width, value width
SEGMENTS = np.asarray([[1] * 4 + [2] * 5 + [0] * 2, [0, 7, 7, 7, 7, 3, 3, 3, 3, 3, 3]])
NAMES = ("out", "q", "k", "v", "alpha_q", "alpha_k", "alpha_v", "collapse")
enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64


def arguments_of(B, H, K, P, collapse, tokens=N):
    rng = np.random.default_rng(0)
    shapes = [(B, tokens, H, D), (B, tokens, K, D), (B, tokens, K, E), (H, H, P), (K, H, P), (K, H, P)]
    return [rng.normal(size=shape) for shape in (*shapes, (H, H, P) if collapse == "global" else (H, P))]


def settings_of(causal, causality, window, rope_positions, segment_ids=None):
    return dict(
        causal=causal,
        causality=causality,
        window=window,
        rope_theta=rope_positions and 100.0,
        rope_positions=rope_positions or "virtual",
        segment_ids=segment_ids,
    )


def fused(q, k, v, *mixing, interpret=True, block=None, **settings):
    return fused_interleaved_attention(q, k, v, mixing, interpret=interpret, block=block, **settings)


def with_gradients(function):
    """Output and all seven gradients of a fixed weighted sum of it."""

    def loss(*arguments):
        out = function(*arguments)
        weights = np.random.default_rng(1).normal(size=out.shape)
        return jnp.sum(out * jnp.asarray(weights, out.dtype)), out

    def run(*arguments):
        gradients, out = jax.grad(loss, argnums=tuple(range(7)), has_aux=True)(*arguments)
        return dict(zip(NAMES, (out, *gradients), strict=True))

    return jax.jit(run)


def check(B, H, K, P, collapse, causal, causality, window, rope_positions, segments, block, interpret=True):
    ids = jnp.asarray(SEGMENTS[:B]) if segments else None
    settings = settings_of(causal, causality, window, rope_positions, ids)
    arguments = arguments_of(B, H, K, P, collapse)
    with enable_x64(True):
        slow = with_gradients(functools.partial(interleaved_head_attention, **settings, implementation="reference"))
        expected = jax.tree.map(np.asarray, slow(*arguments))
    fast = with_gradients(functools.partial(fused, **settings, block=block, interpret=interpret))
    got = fast(*(jnp.asarray(x, jnp.float32) for x in arguments))
    for name in NAMES:
        assert got[name].shape == expected[name].shape
        assert got[name].dtype == jnp.float32
        error = np.linalg.norm(np.asarray(got[name], np.float64) - expected[name]) / np.linalg.norm(expected[name])
        assert error < 1e-5, (name, error)
    if segments:
        for name in ("out", "q", "k", "v"):
            assert not np.any(np.asarray(got[name])[SEGMENTS[:B] == 0]), f"{name} is not 0 at padding"


# A covering design: every value of every switch; a window smaller than, equal to and larger than the block; sequences
# that are and are not a multiple of it; one part and two.
CASES = [
    # B, H, K, P, collapse, causal, causality, window, rope_positions, segments, block
    (2, 4, 2, 2, "global", True, "virtual", 3, "virtual", True, 2),
    (1, 3, 3, 2, "per_head", True, "token", 4, "token", False, 4),
    (1, 2, 1, 2, "global", False, "virtual", 1, "virtual", True, 2),
    (2, 2, 1, 3, "per_head", False, "token", None, None, True, None),
    (1, 3, 1, 1, "global", True, "virtual", 2, None, False, 1),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fused_equals_reference(case):
    check(*case)


def test_fused_reads_no_memory_that_was_never_written():
    """Interpreted as a TPU would run it, with NaN in fresh memory: two parts, ring, halo, an incomplete last block."""
    check(
        1, 2, 1, 2, "global", True, "virtual", 2, "virtual", True, 2, pltpu.InterpretParams(uninitialized_memory="nan")
    )


def test_padded_widths_change_nothing(monkeypatch):
    """On a TPU widths are padded to whole registers, which tiny shapes in interpret mode are spared."""
    monkeypatch.setattr(Blocks, "padded", lambda _, width: -(-width // 8) * 8)
    check(1, 2, 1, 2, "global", True, "virtual", 3, "virtual", False, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    enumerate(itertools.product([True, False], ["virtual", "token"], [1, 3, 7, None], ["virtual", "token", None])),
    ids=str,
)
def test_fused_equals_reference_on_every_combination(case):
    pick, switches = case  # the number of the combination spreads the remaining switches
    block, collapse = (1, 2, 3, 4, None)[pick % 5], ("global", "per_head")[pick // 2 % 2]
    check(1 + pick % 2, 4, 2, 3, collapse, *switches, pick % 3 > 0, block)


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
def test_fused_equals_reference_over_shapes(causal):
    for (H, K), P, window in itertools.product([(1, 1), (5, 1)], [1, 4], [2, 5]):
        check(1, H, K, P, "global", causal, "virtual", window, "virtual", False, 2)


def test_nan_in_one_row_of_the_batch_stays_there():
    arguments = [jnp.asarray(x, jnp.float32) for x in arguments_of(3, 2, 1, 2, "global")]
    run = with_gradients(functools.partial(fused, **settings_of(True, "virtual", 3, "virtual"), block=4))
    clean = run(*arguments)
    dirty = run(*(x.at[1].set(jnp.nan) for x in arguments[:3]), *arguments[3:])
    for name in ("out", "q", "k", "v"):
        assert np.all(np.isnan(dirty[name][1]))
        np.testing.assert_array_equal(dirty[name][::2], clean[name][::2])


def test_bfloat16_stays_near_float32():
    arguments = [jnp.asarray(x, jnp.bfloat16) for x in arguments_of(1, 2, 1, 2, "global")]
    run = with_gradients(functools.partial(fused, **settings_of(True, "virtual", 3, "virtual"), block=4))
    got, expected = run(*arguments), run(*(x.astype(jnp.float32) for x in arguments))
    for name in NAMES:
        assert got[name].dtype == jnp.bfloat16
        error = jnp.linalg.norm(got[name].astype(jnp.float32) - expected[name]) / jnp.linalg.norm(expected[name])
        assert error < 0.03, (name, error)


def shapes_of(H=20, d=128, tokens=8192, dtype=jnp.bfloat16):
    return (jax.ShapeDtypeStruct((1, tokens, H, d), dtype),) * 3


def paper(window, **changes):
    return settings_of(True, "virtual", window, "virtual") | changes


def planned(qkv, P, **settings):
    del settings["segment_ids"]
    return plan(qkv, P, **settings)


@pytest.mark.parametrize(
    ("chip", "P", "window", "block"),
    [("v5p", 20, 10, 16), ("v5e", 8, 64, 64), ("v4", 8, 64, 32), ("v5p", 2, 1024, 128), ("v6e", 2, 1024, 256)],
)
def test_block_holds_the_window_and_halves_until_it_fits(chip, P, window, block):
    assert planned(shapes_of(), P, **paper(window), chip=chip).size == block


def test_parts_have_equal_work_and_only_odd_batches_need_them():
    blocks = planned(shapes_of(), 20, **paper(10), chip="v5p")
    assert (blocks.n, blocks.before, blocks.ring, blocks.parts) == (512, 1, 2, 2)
    assert planned((jax.ShapeDtypeStruct((2, 8192, 20, 128), jnp.float32),) * 3, 20, **paper(10), chip="v5p").parts == 1
    assert planned(shapes_of(tokens=48), 20, **paper(10), chip="v5p").parts == 1  # three blocks


def test_what_cannot_run_is_refused_by_name():
    with pytest.raises(ValueError, match=r"window = 8192 .*TPU v5e has 128; use implementation='streaming'"):
        planned(shapes_of(), 20, **paper(None), chip="v5e")
    with pytest.raises(ValueError, match=r"chip = 'v5'; expected one of 'v4'"):
        planned(shapes_of(), 20, **paper(10), chip="v5")
    with pytest.raises(ValueError, match=r"'cpu' device; name the chip .*interpret=True"):
        planned(shapes_of(), 20, **paper(10))
    with pytest.raises(ValueError, match=r"q has dtype float16; .* float32 or bfloat16"):
        planned(shapes_of(dtype=jnp.float16), 20, **paper(10), chip="v5p")
    with pytest.raises(ValueError, match="block = 12; expected a positive multiple of 8"):
        planned(shapes_of(), 20, **paper(10), chip="v5p", block=12)


def test_public_call_for_a_chip_that_is_not_here():
    """v4 at P = 2 is refused while tracing; the same call is traced for v5p, and nothing is known without a chip."""
    mixing = [jax.ShapeDtypeStruct((20, 20, 2), jnp.bfloat16)] * 4
    call = functools.partial(interleaved_head_attention, **paper(1024), implementation="fused")
    needs = r"window = 1024 tokens with 20 heads of width 128, P = 2: .* needs about \d+ MiB .*\(VMEM\), and a core of "
    refusal = pytest.raises(ValueError, match=needs + r"TPU v4 has 16; use implementation='streaming'")
    with target_platform("tpu", chip="v4"), refusal:
        jax.eval_shape(call, *shapes_of(), *mixing)
    with target_platform("tpu", chip="v5p"):
        assert jax.eval_shape(call, *shapes_of(), *mixing).shape == (1, 8192, 20, 128)
    with (
        target_platform("tpu"),
        pytest.raises(ValueError, match=r"name the chip .*target_platform\('tpu', chip='v5p'\)"),
    ):
        jax.eval_shape(call, *shapes_of(), *mixing)
    with target_platform("tpu", chip="v5"), pytest.raises(ValueError, match=r"chip = 'v5'; expected one of 'v4'"):
        jax.eval_shape(call, *shapes_of(), *mixing)


def compile_row(chip, P, window, **switches):
    pytest.importorskip("libtpu")
    from benchmarks.fused_kernel_memory import measure

    return measure(chip, P, window, **switches)


def weights_mib(P, H=20):
    """The mixing weights relaid, and their gradients of two parts in float32, as a TPU stores them; a tenth more."""
    return 1.1 * 4 * H * (-(-max(H, P) // 8) * 8) * 128 * (2 + 2 * 4) / 2**20


@pytest.mark.parametrize("backward", [False, True])
def test_compiles_for_v5e_without_temporaries(backward):
    row = compile_row("v5e", 20, 10, backward=backward)
    assert row["vmem_mib"] < row["vmem_of_chip_mib"]
    assert row["temporaries_mib"] <= weights_mib(20)  # one of q, k, v alone has 40 MiB


@pytest.mark.slow
@pytest.mark.parametrize(("P", "window"), [(20, 10), (8, 64), (4, 256), (2, 1024)])
@pytest.mark.parametrize("chip", ["v4", "v5e", "v5p", "v6e"])
def test_compiles_for_every_chip_without_temporaries(chip, P, window):
    for backward in (False, True):
        row = compile_row(chip, P, window, backward=backward)
        if (chip, P) == ("v4", 2):
            assert "window = 1024" in row["refused"]
        else:
            assert row["vmem_mib"] < row["vmem_of_chip_mib"]
            assert row["temporaries_mib"] <= weights_mib(P)


@pytest.mark.slow
@pytest.mark.parametrize(
    "switches",
    [
        dict(causal=False),
        dict(causal=False, causality="token", rope_positions="token"),
        dict(rope_theta=None, d=64),
        dict(H=1),
        dict(N=1001, d=64),
        dict(H=32),
    ],
    ids=str,
)
@pytest.mark.parametrize("P", [1, 3])
def test_every_switch_compiles(switches, P):
    row = compile_row("v5e", P, 24, backward=True, **(dict(N=1024, H=6) | switches))
    assert row["vmem_mib"] < row["vmem_of_chip_mib"]
