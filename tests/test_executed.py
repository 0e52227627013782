"""Executed FLOPs against XLA's own cost analysis of the same programs, unrolled.

XLA counts the body of a loop once, the dearer branch of a condition, and element-wise work, which the closed forms
leave out. So scans are replaced by Python loops, conditions on positions are decided while tracing, and heads are 128
wide as in the paper's model: what is left of the difference is that element-wise work, between 0 and 3 %. The program
is the one handed to the compiler, before it merges equal parts that a loop would compute each time.
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from iha_jax.accounting import Flops, flops_per_token, layer_pairs, training_flops_per_token
from iha_jax.config import LAYER_KINDS
from iha_jax.executed import executed_flops_per_token, layer_work
from iha_jax.executed.xla import blockwise_work, reference_work, simplicial_work, streaming_work, talking_heads_work
from iha_jax.model import abstract_parameters, bind
from iha_jax.ops import (
    differential_attention,
    dot_product_attention,
    interleaved_head_attention,
    simplicial_attention,
    talking_heads_attention,
)
from iha_jax.ops.streaming import Geometry
from tests.tiny import tiny

H, K, d = 4, 2, 128


def python_loop(body, carry, xs=None, length=None, **_):
    """`jax.lax.scan` without the loop."""
    outputs = []
    for i in range(length if xs is None else len(jax.tree.leaves(xs)[0])):
        carry, out = body(carry, jax.tree.map(lambda x, i=i: x[i], xs))
        outputs.append(out)
    return carry, jax.tree.map(lambda *x: jnp.stack(x), *outputs)


def decided(condition, yes, no, *operands):
    """`jax.lax.cond` of a condition that is known while tracing."""
    return yes(*operands) if bool(condition) else no(*operands)


def counted(function, *shapes):
    """XLA's count for `function` of float32 arrays of these shapes."""
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*arguments).cost_analysis()["flops"]


def flops(work, P=0, collapse=0):
    """Of one row: `2 d` for each product of a head and for each mixing weight and token."""
    mixed = work.queries * H * H * P + (work.keys + work.values) * K * H * P + work.collapsed * collapse
    return 2 * d * (H * (work.scores + work.sums) + mixed) + 2 * H * H * work.exchanged


def step_of(function):
    """Value and gradients: what a training step makes of it, the forward pass being needed too."""

    def run(*arguments):
        return jax.value_and_grad(lambda *a: jnp.sum(jnp.sin(function(*a))), tuple(range(len(arguments))))(*arguments)

    return run


def check(expected, xla, low=1.0):
    assert low <= xla / expected < 1.03, f"closed form {expected:.4g}, XLA {xla:.4g}"


@pytest.fixture
def unrolled(monkeypatch):
    monkeypatch.setattr(jax.lax, "scan", python_loop)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("N", "window"), [(203, None), (203, 29), (203, 97), (61, None)])
@pytest.mark.parametrize("causal", [True, False])
def test_blockwise(unrolled, N, window, causal, training):
    def attend(q, k, v):
        return dot_product_attention(q, k, v, causal=causal, window=window, implementation="blockwise")

    xla = counted(step_of(attend) if training else attend, (1, N, H, d), (1, N, K, d), (1, N, K, d))
    check(flops(blockwise_work(N, window, causal=causal, training=training)), xla)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("N", "window"), [(203, None), (203, 29), (211, 97)])
@pytest.mark.parametrize("causal", [True, False])
def test_talking_heads(unrolled, N, window, causal, training):
    def attend(*arguments):
        return talking_heads_attention(*arguments, causal=causal, window=window)

    shapes = (2, N, H, d), (2, N, K, d), (2, N, K, d), (H, H), (H, H)
    work = talking_heads_work(N, window, heads=H, batch=2, causal=causal, training=training)
    check(2 * flops(work), counted(step_of(attend) if training else attend, *shapes))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("N", "windows"), [(97, None), (203, (97, 11)), (203, (7, 61))])
@pytest.mark.parametrize("causal", [True, False])
def test_simplicial(unrolled, N, windows, causal, training):
    def attend(*arguments):
        return simplicial_attention(*arguments, causal=causal, windows=windows)

    keys = (1, N, K, d)
    work = simplicial_work(N, windows, heads=H, causal=causal, training=training)
    check(flops(work), counted(step_of(attend) if training else attend, (1, N, H, d), *[keys] * 4))


@pytest.mark.parametrize("training", [False, True])
def test_differential(unrolled, training):
    """Values of width 2 d: one call of block-wise attention whose sums are twice as wide."""
    N = 203
    work = blockwise_work(N, None, training=training)
    work = dataclasses.replace(work, sums=2 * work.sums)
    shapes = (1, N, H, d), (1, N, K, d), (1, N, K // 2, 2 * d), ()
    check(flops(work), counted(step_of(differential_attention) if training else differential_attention, *shapes))


def interleaved(N, P, window, causal, causality, collapse="global", implementation="streaming", B=1):
    """The function and its shapes."""
    shapes = [(B, N, H, d), (B, N, K, d), (B, N, K, d), (H, H, P), (K, H, P), (K, H, P)]
    shapes.append((H, H, P) if collapse == "global" else (H, P))

    def attend(*arguments):
        options = dict(causal=causal, causality=causality, window=window, implementation=implementation)
        return interleaved_head_attention(*arguments, **options)

    return attend, shapes


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("N", "P", "window", "causal", "causality", "collapse", "B"),
    [
        (101, 3, 7, True, "virtual", "global", 1),
        (101, 3, 7, False, "token", "per_head", 1),
        (211, 2, 17, True, "token", "global", 3),
        (37, 5, 31, False, "virtual", "global", 2),
    ],
)
def test_streaming_with_a_window(unrolled, N, P, window, causal, causality, collapse, B, training):
    attend, shapes = interleaved(N, P, window, causal, causality, collapse, B=B)
    work = streaming_work(Geometry(N, P, window, causal, causality, None, "token"), heads=H, batch=B, training=training)
    expected = B * flops(work, P, H * H * P if collapse == "global" else H * P)
    check(expected, counted(step_of(attend) if training else attend, *shapes))


@pytest.mark.parametrize("causal", [True, False])
def test_streaming_without_a_window(unrolled, monkeypatch, causal):
    monkeypatch.setattr(jax.lax, "cond", decided)
    monkeypatch.setattr(jax, "checkpoint", lambda function, **_: function)  # else positions are not known inside
    N, P = 211, 4
    attend, shapes = interleaved(N, P, None, causal, "virtual")
    work = streaming_work(Geometry(N, P, None, causal, "virtual", None, "token"), heads=H)
    with jax.ensure_compile_time_eval():  # positions become numbers
        xla = counted(attend, *shapes)
    check(flops(work, P, H * H * P), xla)


def test_training_through_streaming_without_a_window(unrolled):
    """Bidirectional, where every key chunk is visited, since under `jax.checkpoint` no position is known."""
    N, P = 211, 4
    attend, shapes = interleaved(N, P, None, False, "virtual")
    work = streaming_work(Geometry(N, P, None, False, "virtual", None, "token"), heads=H, training=True)
    check(flops(work, P, H * H * P), counted(step_of(attend), *shapes))


def test_references():
    """Written as multiplications and sums: a sum of d terms is d - 1 additions, so XLA's count is a little below."""
    N, P = 13, 3
    shapes = (1, N, H, d), (1, N, K, d), (1, N, K, d)
    xla = counted(lambda q, k, v: dot_product_attention(q, k, v, implementation="reference"), *shapes)
    check(flops(reference_work(N, None)), xla, low=0.97)
    attend, shapes = interleaved(N, P, None, True, "virtual", implementation="reference")
    check(flops(reference_work(N, P), P, H * H * P), counted(attend, *shapes), low=0.97)


def model_of(pattern, **changes):
    wide = dict(model__width=256, model__num_heads=2, model__head_width=128, model__mlp_width=307)
    wide |= dict(model__context_length=149, model__window=31, model__iha__window=7, model__iha__pseudo_heads=3)
    return tiny(**wide, model__layer_pattern=pattern, model__num_layers=3, **changes).model


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "pattern",
    [
        ("mha",),
        ("mha_local", "mha"),
        ("iha_local", "mha"),
        ("talking_heads",),
        ("differential",),
        ("simplicial_local", "fused_mixing"),
    ],
    ids="-".join,
)
def test_a_whole_model(unrolled, pattern, training):
    heads = 2 if "differential" in pattern else 1
    model = model_of(pattern, model__num_kv_heads=heads, model__mlp="swiglu")
    tokens = jnp.zeros((2, model.context_length), jnp.int32)

    def loss(parameters):
        return jnp.mean(jax.nn.logsumexp(bind(model, parameters)(tokens), axis=-1))

    run = jax.value_and_grad(loss) if training else loss
    xla = jax.jit(run).lower(abstract_parameters(model)).cost_analysis()["flops"]
    executed = executed_flops_per_token(model, batch_size=2, training=training)
    check(executed.total * tokens.size, xla)
    useful = flops_per_token(model)
    assert executed.total > (training_flops_per_token(model) if training else useful.total)
    assert executed.output == (3 if training else 1) * useful.output


def test_work_is_never_less_than_what_is_visible():
    for kind in LAYER_KINDS:
        for causal in (True, False):
            model = dataclasses.replace(model_of((kind,)), causal=causal)
            work = layer_work(model, kind)
            assert min(work.scores, work.sums) >= layer_pairs(model, kind)
            assert isinstance(executed_flops_per_token(model), Flops)


def test_what_has_no_closed_form_is_an_error():
    model = model_of(("iha_local", "mha"))
    with pytest.raises(ValueError, match="'made_up' has no formula"):
        executed_flops_per_token(dataclasses.replace(model, layer_pattern=("made_up",)))
    with pytest.raises(ValueError, match="remat = 'full'"):
        executed_flops_per_token(dataclasses.replace(model, remat="full"), training=True)
    with pytest.raises(ValueError, match="'reference'"):
        executed_flops_per_token(dataclasses.replace(model, implementation="reference"), training=True)
