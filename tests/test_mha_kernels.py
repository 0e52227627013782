"""Splash equals the reference in interpret mode and compiles for a TPU; cuDNN's descriptor says what is meant.

What runs here shows the mapping of arguments and the arithmetic of the kernels' interpreted form, not the hardware.
"""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iha_jax.ops import differential_attention, dot_product_attention, reference, target_platform
from iha_jax.ops.cudnn import cudnn_attention
from iha_jax.ops.splash import block_size, splash_attention

B, D, E = 2, 6, 10  # rows, head width, value width


def normal(seed, *shapes, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def value_and_gradients(function, arguments, weights):
    def loss(*arguments):
        out = function(*arguments)
        return jnp.sum(out.astype(jnp.float32) * weights), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arguments)
    return [np.asarray(x, np.float64) for x in (out, *gradients)]


def segments(tokens):
    """Two documents with an edge inside a block and padding after them; padding first, then one document."""
    ids = np.ones((B, tokens), np.int32)
    ids[0, tokens // 3 :] = 2
    ids[0, tokens - 11 :] = 0
    ids[1, :7] = 0
    return jnp.asarray(ids)


def slow(*case):
    return pytest.param(case, marks=pytest.mark.slow, id=str(case))


SPLASH_CASES = [
    # tokens, H, K, causal, window, segments, dtype
    (131, 4, 2, True, None, True, jnp.float32),
    (257, 2, 1, False, 37, True, jnp.float32),
    (131, 2, 2, True, 100, False, jnp.bfloat16),
    slow(128, 2, 2, False, None, False, jnp.float32),
    slow(131, 3, 3, False, None, False, jnp.float32),
    slow(131, 3, 1, True, None, False, jnp.float32),
    slow(257, 2, 1, True, 129, True, jnp.bfloat16),
    slow(641, 4, 2, True, 300, True, jnp.float32),
    slow(641, 2, 2, False, None, True, jnp.bfloat16),
    slow(1000, 2, 1, True, None, True, jnp.float32),
]


@pytest.mark.parametrize("case", SPLASH_CASES, ids=str)
def test_splash_equals_reference(case):
    tokens, H, K, causal, window, segmented, dtype = case
    *arguments, weights = normal(1, (B, tokens, H, D), (B, tokens, K, D), (B, tokens, K, E), (B, tokens, H, E))
    arguments = [x.astype(dtype) for x in arguments]
    settings = dict(causal=causal, window=window, segment_ids=segments(tokens) if segmented else None)
    got = value_and_gradients(functools.partial(splash_attention, **settings, interpret=True), arguments, weights)
    wide = [x.astype(jnp.float32) for x in arguments]
    expected = value_and_gradients(functools.partial(reference.dot_product_attention, **settings), wide, weights)
    for x, y in zip(got, expected, strict=True):
        assert x.shape == y.shape
        assert np.linalg.norm(x - y) < (1e-5 if dtype == jnp.float32 else 1e-2) * np.linalg.norm(y)
    if segmented:
        padding = np.asarray(settings["segment_ids"] == 0)
        for x in got:  # exactly 0, not nearly
            assert not x[padding].any()
            assert x[~padding].any()


@pytest.mark.parametrize("causal", [True, False])
def test_splash_window_is_exact_to_the_token(causal):
    """The gradient of one output reaches the keys of its window and no other."""
    tokens, window, query = 257, 100, 128
    q, k, v = normal(2, *[(1, tokens, 1, D)] * 3)
    run = functools.partial(splash_attention, causal=causal, window=window, segment_ids=None, interpret=True)
    reached = jax.jit(jax.grad(lambda v: run(q, k, v)[0, query].sum()))(v)[0, :, 0].any(axis=-1)
    last = query if causal else query + window - 1
    np.testing.assert_array_equal(np.flatnonzero(reached), np.arange(query - window + 1, last + 1))


def test_splash_blocks_divide_the_tokens_and_keep_near_the_window():
    assert [block_size(n, None) for n in (1, 128, 129, 640, 768, 1024, 8192)] == [128, 128, 256, 128, 384, 512, 512]
    assert [block_size(8192, w) for w in (1, 128, 129, 512, 1024)] == [128, 128, 256, 512, 512]
    assert [block_size(n, 300) for n in (640, 1152, 2048)] == [128, 384, 256]


def refused(match, arguments, **settings):
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(functools.partial(dot_product_attention, **settings), *arguments)


def test_kernels_refuse_what_they_cannot_run():
    half = normal(3, *[(1, 6, 2, 16)] * 3, dtype=jnp.bfloat16)
    ids = jnp.ones((1, 6), jnp.int32)
    for name, home in (("cudnn", "gpu"), ("splash", "tpu")):
        refused(f"'{name}': runs on {home}, and this is cpu; .*'blockwise'", half, implementation=name)
    with target_platform("gpu"):
        cudnn = functools.partial(refused, implementation="cudnn")
        cudnn("segment_ids.*'blockwise'", half, segment_ids=ids)
        cudnn("window only together with causal=True", half, causal=False, window=3)
        cudnn("bfloat16 or float16, got float32", [x.astype(jnp.float32) for x in half])
        cudnn("as wide as keys", [*half[:2], half[2][..., :8]])
        cudnn(r"as wide as keys \(16\), or a multiple, got 24", [*half[:2], jnp.ones((1, 6, 2, 24), jnp.bfloat16)])
        cudnn("multiples of 8, at most 128", [x[..., :12] for x in half])
        cudnn("multiples of 8, at most 128", [jnp.concatenate([x] * 9, axis=-1) for x in half])
        cudnn("even number of tokens, got 5", [x[:, :5] for x in half])
        refused("runs on tpu, and this is gpu", half, implementation="splash")
    with target_platform("tpu"):
        refused("bfloat16 or float32, got float16", [x.astype(jnp.float16) for x in half], implementation="splash")


@pytest.fixture
def cuda_lowering(monkeypatch):
    """Lets jax lower cuDNN calls with no CUDA here, as if cuDNN 9.10 were installed."""
    from jax._src.cudnn import fused_attention_stablehlo as calls

    class Versions:
        @staticmethod
        def cudnn_get_version():
            return 91000

    monkeypatch.setattr(calls, "cuda_versions", Versions)


def descriptors(function, *arguments):
    """(target, operand shapes, mask, window, scale) of each cuDNN call in the program lowered for CUDA."""
    with target_platform("gpu"):
        text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    found = []
    for line in text.splitlines():
        if match := re.search(
            r'custom_call @(__cudnn\S+?)\(.*backend_config = "(.*?)", operand_layouts.*: \((.*?)\)', line
        ):
            config = json.loads(match[2].replace("\\22", '"').replace('\\"', '"'))["cudnn_fmha_backend_config"]
            shapes = re.findall(r"tensor<([\dx]+)x\w+>", match[3])
            facts = config["mask_type"], config["sliding_window_length"], config["fmha_scale"]
            found.append((match[1], shapes[:3], *facts))
    return found


@pytest.mark.parametrize(
    ("causal", "window", "mask", "length"),
    [(True, None, "CAUSAL", 0), (True, 3, "CAUSAL", 3), (False, None, "NO_MASK", 0), (True, 99, "CAUSAL", 0)],
)
@pytest.mark.parametrize("name", ["cudnn", "auto"])
def test_cudnn_is_told_mask_window_scale_and_groups(cuda_lowering, name, causal, window, mask, length):
    """cuDNN's window length counts the query's own token: key j is seen when `i - length < j <= i`, as ours is."""
    shapes = [(2, 22, 4, 16), (2, 22, 2, 16), (2, 22, 2, 16)]
    q, k, v = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    run = functools.partial(dot_product_attention, causal=causal, window=window, implementation=name)
    got = descriptors(jax.grad(lambda *x: run(*x).sum().astype(jnp.float32), argnums=(0, 1, 2)), q, k, v)
    operands = ["2x22x4x16", "2x22x2x16", "2x22x2x16"]
    assert got == [(f"__cudnn$fmhaSoftmax{direction}", operands, mask, length, 0.25) for direction in ("", "Backward")]


@pytest.mark.parametrize("name", ["cudnn", "auto"])
def test_differential_attention_is_two_calls_of_cudnn(cuda_lowering, name):
    """Values of width 2d in halves of width d: twice the same queries and keys, forward and backward."""
    shapes = [(2, 22, 8, 16), (2, 22, 4, 16), (2, 22, 2, 32)]
    q, k, v = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    run = functools.partial(differential_attention, lambda_=jnp.float32(0.3), window=3, implementation=name)
    got = descriptors(jax.grad(lambda *x: run(*x).sum().astype(jnp.float32), argnums=(0, 1, 2)), q, k, v)
    call = ["2x22x8x16", "2x22x4x16", "2x22x4x16"], "CAUSAL", 3, 0.25
    assert sorted(got) == [(f"__cudnn$fmhaSoftmax{direction}", *call) for direction in ("", "", *["Backward"] * 2)]


@pytest.mark.parametrize("window", [None, 4])
def test_values_in_parts_of_the_width_of_keys_equal_the_reference(monkeypatch, window):
    """What `cudnn` computes of values three times as wide as keys, its kernel replaced by `jax.nn`'s XLA form."""
    attend = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *x, **how: attend(*x, **(how | {"implementation": "xla"}))
    )
    *arguments, weights = normal(5, (1, 7, 2, D), (1, 7, 1, D), (1, 7, 1, 3 * D), (1, 7, 2, 3 * D))
    got = value_and_gradients(functools.partial(cudnn_attention, causal=True, window=window), arguments, weights)
    expected = value_and_gradients(
        functools.partial(reference.dot_product_attention, causal=True, window=window), arguments, weights
    )
    for x, y in zip(got, expected, strict=True):
        assert x.shape == y.shape
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=5e-6)


def test_the_library_behind_cudnn_missing_is_a_refusal():
    half = normal(3, *[(1, 6, 2, 16)] * 3, dtype=jnp.bfloat16)
    with target_platform("gpu"):
        refused("'cudnn': cuDNN is not detected.*expected 'blockwise'", half, implementation="cudnn")


@pytest.mark.parametrize(
    ("causal", "window"), [(True, None), (True, 4), (False, None)], ids=["causal", "window", "bidirectional"]
)
def test_the_window_of_jax_nn_is_ours_to_the_token(causal, window):
    """`jax.nn`'s own XLA form, given what `cudnn` gives it, agrees with the reference."""
    arguments = normal(4, (1, 13, 4, D), (1, 13, 2, D), (1, 13, 2, D))
    pair = None if window is None else (window - 1, 0)
    got = jax.nn.dot_product_attention(*arguments, is_causal=causal, local_window_size=pair, implementation="xla")
    expected = reference.dot_product_attention(*arguments, causal=causal, window=window)
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 512])
@pytest.mark.parametrize("width", [20, 64, 128])
def test_splash_compiles_for_v5e(monkeypatch, width, window):
    """Forward and backward, 8192 tokens, grouped heads: no temporary as large as one head's scores."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # do not ask a cloud's metadata server which TPU this is
    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    here = jax.sharding.SingleDeviceSharding(device)
    tokens = 8192
    shapes = (2, tokens, 4, width), (2, tokens, 2, width), (2, tokens, 2, width)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=here) for shape in shapes]
    ids = jax.ShapeDtypeStruct((2, tokens), jnp.int32, sharding=here)

    def loss(q, k, v, ids):
        return dot_product_attention(q, k, v, window=window, segment_ids=ids).astype(jnp.float32).sum()

    with target_platform("tpu"):
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arguments, ids).compile()
    text = compiled.as_text()
    assert "splash_mha_fwd" in text
    assert "splash_mha_dq" in text
    assert compiled.memory_analysis().temp_size_in_bytes < tokens * tokens
