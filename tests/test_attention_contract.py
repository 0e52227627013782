"""What every attention mechanism promises, asked of every layer kind in the registry: register one and it is tested.

Sizes are odd or differ from one another, K < H, P > 1; parameters are moved away from special initial values.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from iha_jax.accounting import count_parameters, flops_per_token, layer_pairs
from iha_jax.config import LAYER_KINDS
from iha_jax.model import ATTENTION, abstract_parameters, bind, initialize
from iha_jax.ops import apply_rope, dot_product_attention, query_blocks, reference_baselines, simplicial, talking_heads
from iha_jax.training.banner import kernels
from iha_jax.training.diagnostics import largest_logit, mixing_diagnostics
from iha_jax.training.optimizer import is_decayed, is_mixing, path_name
from tests.test_model import KEY, perturbed, random_tokens
from tests.test_ops_equivalence import enable_x64
from tests.tiny import tiny

KINDS = sorted(ATTENTION)
N, D, LAYER = 11, 14, 3
SEGMENTS = jnp.asarray([[5] * 4 + [2] * 4 + [0] * 3])
SIZES = dict(
    model__context_length=N,
    model__width=D,
    model__num_heads=4,
    model__num_kv_heads=2,
    model__head_width=6,
    model__window=4,
    model__iha__pseudo_heads=2,
    model__iha__window=2,
)
# Tokens that a windowed kind reaches, its own included. IHA: query (n, 0) also sees pseudo-keys of token n - window.
REACH = {"mha_local": 4, "iha_local": 3, "simplicial_local": 5}

# Scanned and recomputed in the default tests of the model already, or differing only in the mask or the weights from
# kinds that are here.
STACKED = ("mha", "mha_local", "iha", "iha_local", "simplicial", "fused_mixing")


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks of queries, the last one not full."""
    monkeypatch.setattr(query_blocks, "SCORES_A_BLOCK", 1)
    monkeypatch.setattr(talking_heads, "SMALLEST_BLOCK", 4)
    monkeypatch.setattr(simplicial, "SMALLEST_BLOCK", 4)
    monkeypatch.setattr(simplicial, "SMALLEST_WINDOW_BLOCK", 4)


def model_config(kind, *, implementation="auto", causal=True, positions="rope", **changes):
    model = tiny(**{**SIZES, **changes}, model__layer_pattern=(kind,), model__num_layers=5).model
    iha = dataclasses.replace(model.iha, implementation=implementation)
    return dataclasses.replace(model, implementation=implementation, causal=causal, positions=positions, iha=iha)


def make_layer(kind, *, scale=0.2, **settings):
    """`(apply(parameters, x, segment_ids), parameters)` of one layer."""
    config = model_config(kind, **settings)
    graphdef, state = nnx.split(ATTENTION[kind](config, kind, rngs=nnx.Rngs(params=KEY)))
    parameters = perturbed(nnx.to_pure_dict(state), scale=scale)
    return lambda p, x, segment_ids=None: nnx.merge(graphdef, p)(x, segment_ids, LAYER), parameters


def inputs(batch=1, seed=0):
    return jax.random.normal(jax.random.key(seed), (batch, N, D))


def error(got, expected):
    got, expected = (np.asarray(x, np.float64) for x in (got, expected))
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


def test_every_kind_a_config_can_name_is_registered():
    assert set(ATTENTION) == set(LAYER_KINDS)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_token_sees_by_gradient(kind, causal, small_blocks):
    """Causality, window edges, segments and padding, exact to the token: which outputs depend on which inputs."""
    apply, parameters = make_layer(kind, causal=causal)
    readout = jax.random.normal(jax.random.key(9), (D,))
    distance = np.arange(N)[:, None] - np.arange(N)
    near = (np.abs(distance) < (REACH[kind] if kind.endswith("_local") else N)) & ((distance >= 0) | (not causal))
    ids = np.asarray(SEGMENTS[0])

    @jax.jit
    def reached(x, segment_ids, token):
        gradient = jax.grad(lambda x: (apply(parameters, x, segment_ids)[0] @ readout)[token])(x)
        return jnp.abs(gradient[0]).sum(-1) > 0

    def influence(x, segment_ids):
        return np.stack([reached(x, segment_ids, token) for token in range(N)])

    np.testing.assert_array_equal(influence(inputs(), jnp.ones((1, N), jnp.int32)), near)
    together = (ids[:, None] == ids) & (ids[:, None] != 0)
    np.testing.assert_array_equal(influence(inputs(), SEGMENTS), near & together)
    assert not np.asarray(apply(parameters, inputs(), SEGMENTS)[0, 8:]).any()


@pytest.mark.parametrize("causal", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_gradients_equal_the_reference(kind, causal, small_blocks):
    segments = SEGMENTS if causal else None
    x, weights = inputs(), inputs(seed=1)

    _, parameters = make_layer(kind)

    def value_and_gradients(implementation, dtype):
        apply, _ = make_layer(kind, implementation=implementation, causal=causal)
        cast = functools.partial(jax.tree.map, lambda a: jnp.asarray(np.asarray(a), dtype))

        def loss(p, x):
            out = apply(p, x, segments)
            return jnp.sum(out * cast(weights)), out

        gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(cast(parameters), cast(x))
        return jax.tree.map(np.asarray, {"out": out, "x": gradients[1], **gradients[0]})

    with enable_x64(True):
        expected = value_and_gradients("reference", jnp.float64)
    got = value_and_gradients("auto", jnp.float32)
    for (path, want), have in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(got), strict=True):
        assert np.abs(want).max() > 0, path
        assert error(have, want) < 1e-5, path


@pytest.mark.parametrize("kind", KINDS)
def test_one_row_never_reaches_another(kind, small_blocks):
    """NaN in one row of the batch, forward and backward; and a row alone gives what it gives among others."""
    apply, parameters = make_layer(kind)
    x = inputs(batch=3)
    broken = x.at[1, 5].set(jnp.nan)

    @jax.jit
    def run(x):
        out, pullback = jax.vjp(lambda x: apply(parameters, x), x)
        return out, pullback(jnp.ones_like(out).at[1].set(0))[0]

    out, gradient = run(broken)
    assert np.isnan(out[1]).any()
    assert np.isfinite(gradient[::2]).all()
    np.testing.assert_array_equal(out[::2], run(x)[0][::2])
    assert error(apply(parameters, x[:1]), out[:1]) < 1e-6  # and jit agrees with no jit


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_stays_near_float32(kind):
    """Within 2 %; a difference of two softmaxes, whose halves are rounded first, within 3 %."""
    apply, parameters = make_layer(kind)
    exact = apply(parameters, inputs(batch=2))
    rough = apply(parameters, inputs(batch=2).astype(jnp.bfloat16))
    assert rough.dtype == jnp.bfloat16
    assert 0 < error(rough, exact) < (0.03 if kind == "differential" else 0.02)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.endswith("_local")])
def test_without_positions_tokens_have_no_order(kind):
    apply, parameters = make_layer(kind, causal=False, positions="none")
    order = np.random.default_rng(0).permutation(N)
    out = apply(parameters, inputs())
    assert error(apply(parameters, inputs()[:, order]), out[:, order]) < 1e-5
    if not kind.startswith("simplicial"):
        ordered, _ = make_layer(kind, causal=False)
        assert error(ordered(parameters, inputs()), out) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_initial_output_is_of_the_size_the_residual_expects(kind):
    """Root mean square over `1 / sqrt(2 L)`, what MHA gives to a token that sees itself alone."""
    config = dataclasses.replace(model_config(kind), width=48, num_heads=8, num_kv_heads=4)
    layer = ATTENTION[kind](config, kind, rngs=nnx.Rngs(params=KEY))
    out = layer(jax.random.normal(jax.random.key(2), (4, N, 48)), None, 1)
    size = float(jnp.sqrt(jnp.mean(out**2) * 2 * config.num_layers))
    assert 0.1 < size < 1.5


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_parameter_counts_equal_accounting(kind, qk_norm):
    config = model_config(kind, model__qk_norm=qk_norm)
    leaves = jax.tree_util.tree_leaves_with_path(abstract_parameters(config))
    counted, of_mixing = count_parameters(config), 0
    for path, leaf in leaves:
        name = path_name(path)
        assert leaf.dtype == jnp.float32
        assert is_decayed(name) == (not is_mixing(name) and not name.endswith("scale")), name
        of_mixing += leaf.size if is_mixing(name) else 0
    assert counted.total == sum(leaf.size for _, leaf in leaves)
    assert counted.mixing == of_mixing
    assert (of_mixing > 0) == (kind not in ("mha", "mha_local", "simplicial", "simplicial_local"))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("kind", ["mha", "mha_local", "simplicial", "simplicial_local", "talking_heads"])
def test_visible_pairs_by_counting(kind, causal):
    config = model_config(kind, causal=causal)

    def seen(i, w):
        return sum(abs(i - j) < w and (j <= i or not causal) for j in range(N))

    windows = {"mha_local": (4,), "simplicial": (N, N), "simplicial_local": (5, 3)}.get(kind, (N,))
    assert layer_pairs(config, kind) == sum(int(np.prod([seen(i, w) for w in windows])) for i in range(N))


def test_flops_of_the_baselines():
    """H = 4 heads, K = 2, d = 6, D = 14, five layers, N = 11 tokens, 66 causal pairs: counted by hand."""
    flops = {kind: flops_per_token(model_config(kind)) for kind in KINDS}
    mha = flops["mha"]
    assert mha.scores == pytest.approx(5 * 4 * 6 * 4 * 66 / 11)
    assert flops["fused_mixing"] == mha
    assert flops["talking_heads"] == dataclasses.replace(mha, mixing=5 * 2 * (2 * 4 * 4) * 66 / 11)
    assert flops["differential"].scores == pytest.approx(1.5 * mha.scores)  # values are twice as wide
    assert flops["simplicial"].projections == mha.projections * 16 / 12
    assert flops["simplicial"].scores == pytest.approx(mha.scores * 506 / 66)  # 1 + 4 + 9 + ... + 121 triples
    mixed = flops_per_token(model_config("fused_mixing", model__qk_norm=True)).mixing
    assert mixed == 5 * 2 * 6 * (16 + 4 + 4)


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow if k in STACKED else ()) for k in KINDS])
def test_scan_and_remat_equal_a_loop_without(kind):
    config = dataclasses.replace(model_config(kind), num_layers=2)
    parameters = perturbed(initialize(config, KEY), scale=0.02)
    tokens = jax.random.randint(jax.random.key(0), (1, N), 0, 257)

    def value_and_grad(**changes):
        model = dataclasses.replace(config, **changes)
        return jax.jit(jax.value_and_grad(lambda p: jnp.mean(jnp.square(bind(model, p).hidden(tokens)[:, -1]))))(
            parameters
        )

    scanned, looped = value_and_grad(remat="full"), value_and_grad(scan_layers=False)
    for got, expected in zip(jax.tree.leaves(scanned), jax.tree.leaves(looped), strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-4, atol=1e-6)


@pytest.fixture(scope="module")
def every_kind():
    """One model with a layer of each kind, and its parameters."""
    config = tiny(model__layer_pattern=LAYER_KINDS, model__num_layers=len(LAYER_KINDS), model__num_kv_heads=2)
    return config, perturbed(initialize(config.model, KEY), scale=0.05)


def test_a_model_of_every_kind_is_diagnosed_and_described(every_kind):
    config, parameters = every_kind
    tokens = random_tokens(config)
    assert np.isfinite(largest_logit(config.model, parameters, tokens, jnp.ones_like(tokens)))
    norms = {name for name in mixing_diagnostics(parameters) if name.endswith("_norm")}
    assert {"logits_mix_norm", "lambda_query_1_norm", "mix_value_norm", "collapse_norm"} < norms
    assert set(kernels(config)) == set(LAYER_KINDS)


def as_mha(kind, change, **settings):
    """Outputs of a layer of `kind` and of the MHA layer with the parameters that `change` makes of its own."""
    apply, parameters = make_layer(kind, **settings)
    parameters, mha_parameters = change(parameters)
    mha, _ = make_layer("mha", **settings)
    return apply(parameters, inputs(), SEGMENTS), mha(mha_parameters, inputs(), SEGMENTS)


def without(parameters, *names):
    return {name: value for name, value in parameters.items() if name not in names}


def test_talking_heads_with_identity_mixes_are_mha():
    def change(p):
        return p | {"logits_mix": jnp.eye(4), "weights_mix": jnp.eye(4)}, without(p, "logits_mix", "weights_mix")

    out, expected = as_mha("talking_heads", change)
    assert error(out, expected) < 1e-6


@pytest.mark.parametrize("qk_norm", [False, True])
def test_fused_mixing_is_mha_with_mixed_weights(qk_norm):
    names = ("mix_query", "mix_key", "mix_value")

    def identity(p):
        return p | {name: jnp.eye(len(p[name])) for name in names}, without(p, *names)

    def mixed(p):
        weights = {n: reference_baselines.fuse_mixing(p[n], p[f"mix_{n}"]) for n in ("query", "key", "value")}
        return p, without(p, *names) | weights

    out, expected = as_mha("fused_mixing", identity, model__qk_norm=qk_norm)
    assert error(out, expected) < 1e-6
    out, expected = as_mha("fused_mixing", mixed, model__qk_norm=qk_norm)
    assert error(out, expected) > 1e-2 if qk_norm else error(out, expected) < 1e-6  # norms come before mixing


def test_iha_with_one_identity_pseudo_head_is_mha():
    names = ("alpha_query", "alpha_key", "alpha_value", "collapse")
    own = jnp.eye(4)[:, :, None]
    keys = jnp.repeat(jnp.eye(2), 2, axis=1)[:, :, None]

    def change(p):
        return p | dict(zip(names, (own, keys, keys, own), strict=True)), without(p, *names)

    out, expected = as_mha("iha", change, model__iha__pseudo_heads=1)
    assert error(out, expected) < 1e-6


def test_simplicial_with_second_keys_and_values_of_ones_is_mha(small_blocks):
    q, k, v = (jax.random.normal(jax.random.key(i), (1, N, heads, 6)) for i, heads in enumerate((4, 2, 2)))
    ones = jnp.ones_like(k)
    for windows in (None, (5, 3), (3, 5)):
        out = simplicial.simplicial_attention(q, k, v, ones, ones, windows=windows, segment_ids=SEGMENTS)
        window = windows and windows[0]
        assert error(out, dot_product_attention(q, k, v, window=window, segment_ids=SEGMENTS)) < 1e-6


def test_differential_layer_follows_its_formula():
    """Two MHA calls, lambda of this depth, a norm over 2d, and `1 - lambda_init`, written out."""
    config = model_config("differential")
    graphdef, state = nnx.split(ATTENTION["differential"](config, "differential", rngs=nnx.Rngs(params=KEY)))
    p = perturbed(nnx.to_pure_dict(state), scale=0.2)
    layer = nnx.merge(graphdef, p)
    q, k, v = layer.project(inputs())
    q, k = apply_rope(q, theta=config.rope_theta), apply_rope(k, theta=config.rope_theta)
    values = v.reshape(1, N, 1, 12)
    first, second = (dot_product_attention(q[:, :, g::2], k[:, :, g::2], values) for g in (0, 1))
    for depth, lambda_init in ((1, 0.2), (LAYER, 0.8 - 0.6 * np.exp(-0.6))):
        lambdas = [np.exp(p[f"lambda_query_{i}"] @ p[f"lambda_key_{i}"]) for i in (1, 2)]
        out = np.asarray(first - (lambdas[0] - lambdas[1] + lambda_init) * second, np.float64)
        out = out / np.sqrt((out**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(p["head_norm"]["scale"])
        out = np.einsum("bnhd,hdD->bnD", (1 - lambda_init) * out.reshape(1, N, 4, 6), p["output"])
        assert error(layer(inputs(), None, depth), out) < 1e-5


def test_layers_know_their_number_however_they_are_stacked():
    """Differential layers depend on depth: the same three layers as three groups, and as a group and one more."""
    alone = dataclasses.replace(model_config("differential"), num_layers=3)
    grouped = dataclasses.replace(alone, layer_pattern=("differential",) * 2)
    tokens = jax.random.randint(jax.random.key(0), (1, N), 0, 257)
    outs = [jax.jit(bind(c, initialize(c, KEY)).hidden)(tokens) for c in (alone, grouped)]
    assert error(*outs) < 1e-6
