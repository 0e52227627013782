"""Bad input to every public operation is a ValueError at trace time that names the argument; NaN stays in its row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iha_jax.ops import (
    attention_weights,
    collapse_heads,
    differential_attention,
    dot_product_attention,
    fuse_mixing,
    interleave,
    interleaved_attention_weights,
    interleaved_head_attention,
    mix_heads,
    query_blocks,
    simplicial,
    simplicial_attention,
    talking_heads,
    talking_heads_attention,
)
from iha_jax.ops.splash import splash_attention

B, N, H, K, P, d, e = 3, 7, 4, 2, 3, 6, 5
QKV = {"q": (B, N, H, d), "k": (B, N, K, d), "v": (B, N, K, e)}
MIXING = {"alpha_q": (H, H, P), "alpha_k": (K, H, P), "alpha_v": (K, H, P), "collapse": (H, H, P)}
SHAPES = {
    dot_product_attention: QKV,
    interleaved_head_attention: QKV | MIXING,
    attention_weights: {"q": QKV["q"], "k": QKV["k"]},
    interleaved_attention_weights: {name: (QKV | MIXING)[name] for name in ("q", "k", "alpha_q", "alpha_k")},
    talking_heads_attention: QKV | {"logits_mix": (H, H), "weights_mix": (H, H)},
    differential_attention: QKV | {"v": (B, N, K // 2, e), "lambda_": ()},
    simplicial_attention: QKV | {"k2": (B, N, K, d), "v2": (B, N, K, e)},
    mix_heads: {"x": (B, N, K, d), "alpha": (K, H, P)},
    interleave: {"x": (B, N, H, P, d)},
    collapse_heads: {"x": (B, N, H, P, d), "collapse": (H, H, P)},
    fuse_mixing: {"weight": (d, K, e), "mix": (K, K)},
}
ATTENTION = [run for run in SHAPES if run.__name__.endswith("attention")]


def call(run, *, dtypes=None, shapes=None, **settings):
    """Traces `run` on abstract arrays, some of other shapes or dtypes."""
    arrays = {
        name: jax.ShapeDtypeStruct(shape, (dtypes or {}).get(name, jnp.float32))
        for name, shape in (SHAPES[run] | (shapes or {})).items()
    }
    return jax.eval_shape(lambda arrays: run(**arrays, **settings), arrays)


@pytest.mark.parametrize("run", SHAPES, ids=lambda run: run.__name__)
def test_every_array_has_its_rank_and_dtype(run):
    call(run)
    for name, shape in SHAPES[run].items():
        if name == "weight":  # any rank from 2
            wrong = [(shape[-1],)]
        else:
            wrong = [(*shape, 2)] + ([shape[1:]] if shape and name != "collapse" else [])
        for bad in wrong:
            with pytest.raises(ValueError, match=rf"^{name} has shape|^{name} is float32") as caught:
                call(run, shapes={name: bad})
            assert str(bad) in str(caught.value)
        if name in ("lambda_", "x", "weight") and len(SHAPES[run]) > 1:
            continue  # a float32 scalar beside bfloat16 is meant; x and weight are what the other one is compared with
        others = {other: jnp.bfloat16 for other in SHAPES[run] if other not in (name, "lambda_")}
        if others:
            with pytest.raises(ValueError, match=r"(has dtype|is) (float32|bfloat16).*expected"):
                call(run, dtypes=others)
    first = next(iter(SHAPES[run]))
    if run not in (interleave, collapse_heads):
        with pytest.raises(ValueError, match=f"{first} has dtype int32; expected a floating-point dtype"):
            call(run, dtypes=dict.fromkeys(SHAPES[run], jnp.int32))


@pytest.mark.parametrize("run", ATTENTION, ids=lambda run: run.__name__)
def test_what_attention_operations_share(run):
    heads = K // 2 if run is differential_attention else K
    more = {"k2": (B, N, K, d + 1)} if run is simplicial_attention else {}
    for name, shape, match in (
        ("k", (B, N + 1, K, d), "k has shape"),
        ("k", (B, N, K, d + 1), "k has shape|k2 is float32"),
        ("v", (B, N + 1, heads, e), rf"v has shape \({B}, {N + 1}, {heads}, {e}\)|v2 is float32"),
        ("v", (B, N, 3, e), rf"v has shape \({B}, {N}, 3, {e}\)"),
    ):
        with pytest.raises(ValueError, match=match):
            call(run, shapes={name: shape} | (more if shape[-1] == d + 1 else {}))
    for empty in ({"q": (B, N, H, 0), "k": (B, N, K, 0)}, {"v": (*SHAPES[run]["v"][:3], 0)}, {"q": (B, N, 0, d)}):
        with pytest.raises(ValueError, match=r"has shape .*expected at least one token, head"):
            call(run, shapes=empty)
    odd = {name: (*shape[:2], 3, *shape[3:]) for name, shape in QKV.items() if name != "q"}
    with pytest.raises(ValueError, match=r"k has 3 key/value heads; expected a divisor of the 4|q has 4 heads and k 3"):
        call(run, shapes=odd | {"v": (B, N, 3, e)})
    for segment_ids, match in (
        (jnp.ones((B, N + 1), jnp.int32), "segment_ids has shape"),
        (jnp.ones((B, N)), "segment_ids has dtype"),
    ):
        with pytest.raises(ValueError, match=match):
            call(run, segment_ids=segment_ids)
    for name in ("cudnn", "splash", "fused", "refrence", None):
        with pytest.raises(ValueError, match=rf"implementation = {name!r}.*expected 'auto' \(here '\w+'\) or one of"):
            call(run, implementation=name)
    if run is simplicial_attention:
        for bad in (0, (0, 3), (3, -1), (3,), (True, 3), (2.0, 3)):
            with pytest.raises(ValueError, match=r"^windows = .*expected None or \(w1, w2\)"):
                call(run, windows=bad)
    else:
        for bad in (0, -3, True, 2.0):
            with pytest.raises(ValueError, match=r"^window = .*expected None or a positive"):
                call(run, window=bad)


def test_shapes_of_mixing():
    for run, name, bad in (
        (interleaved_head_attention, "alpha_q", (H, H, 0)),
        (interleaved_head_attention, "alpha_k", (K, H, P + 1)),
        (interleaved_head_attention, "collapse", (H, P + 1)),
        (interleaved_attention_weights, "alpha_k", (K, H, P + 1)),
        (talking_heads_attention, "logits_mix", (H, H + 1)),
        (talking_heads_attention, "weights_mix", (H + 1, H)),
        (mix_heads, "alpha", (K + 1, H, P)),
        (mix_heads, "alpha", (K, H, 0)),
        (collapse_heads, "collapse", (H, H + 1, P)),
        (collapse_heads, "collapse", (P, H)),
        (collapse_heads, "collapse", (P,)),
        (fuse_mixing, "mix", (K, K + 1)),
    ):
        with pytest.raises(ValueError, match=f"^{name} has shape") as caught:
            call(run, shapes={name: bad})
        assert str(bad) in str(caught.value)
    with pytest.raises(ValueError, match="v2 is float32"):
        call(simplicial_attention, shapes={"v2": (B, N, K, e + 1)})
    assert call(collapse_heads, shapes={"collapse": (H + 1, H, P)}).shape == (B, N, H + 1, d)
    assert call(collapse_heads, shapes={"collapse": (H, P)}).shape == (B, N, H, d)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(query_blocks, "SCORES_A_BLOCK", 1)
    for name in ("SMALLEST_BLOCK", "SMALLEST_WINDOW_BLOCK"):
        monkeypatch.setattr(simplicial, name, 4)
    monkeypatch.setattr(talking_heads, "SMALLEST_BLOCK", 4)


ROWS = [
    (run, window, implementation)
    for run in ATTENTION
    for implementation in ("auto", "reference")
    for window in (None, 3)
    if not (implementation == "reference" and window)
]


@pytest.mark.slow  # the contract test asks the same of the layers' own implementations by default
@pytest.mark.parametrize(("run", "window", "implementation"), ROWS, ids=lambda x: getattr(x, "__name__", str(x)))
def test_nan_in_one_row_reaches_no_other(run, window, implementation, small_blocks):
    """Outputs and gradients of the other rows are what they are without it, to the bit."""
    rng = np.random.default_rng(0)
    arrays = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in SHAPES[run].items()}
    rows = {name: x for name, x in arrays.items() if x.ndim == 4}
    weights = {name: x for name, x in arrays.items() if x.ndim != 4}
    settings = {"implementation": implementation, "segment_ids": jnp.asarray([[1] * 3 + [2] * 3 + [0]] * B)}
    if run is simplicial_attention:
        settings["windows"] = window and (window, 2)
    else:
        settings["window"] = window
    check_rows(lambda **rows: run(**rows, **weights, **settings), rows)


@pytest.mark.slow
def test_nan_in_one_row_reaches_no_other_through_splash():
    rng = np.random.default_rng(0)
    rows = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in QKV.items()}
    check_rows(functools.partial(splash_attention, causal=True, window=3, segment_ids=None, interpret=True), rows)


def check_rows(run, rows):
    @jax.jit
    def results(rows):
        out, pullback = jax.vjp(lambda rows: run(**rows), rows)
        return {"out": out, **pullback(jnp.ones_like(out))[0]}

    clean, broken = results(rows), results({name: x.at[1, 2].set(jnp.nan) for name, x in rows.items()})
    for name in clean:
        assert np.isnan(broken[name][1]).any()
        assert np.isfinite(broken[name][::2]).all()
        np.testing.assert_array_equal(broken[name][::2], clean[name][::2])


@pytest.mark.parametrize("run", [interleaved_head_attention, interleaved_attention_weights])
def test_choices_of_the_virtual_sequence(run):
    for setting, match in (
        ({"causality": "tokens"}, "^causality = 'tokens'; expected one of 'virtual', 'token'"),
        ({"rope_positions": "none"}, "^rope_positions = 'none'; expected one of 'virtual', 'token'"),
        ({"rope_theta": 0.0}, "^rope_theta = 0.0, head width 6; expected theta > 0"),
    ):
        with pytest.raises(ValueError, match=match):
            call(run, **setting)
